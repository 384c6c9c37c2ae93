"""All scenarios, in the order in which they run."""

from bench.scenario import Scenario
from bench.scenarios import (
    backlog,
    configuration,
    held,
    latency,
    maintenance,
    neighbours,
    panel,
    producers,
    replay,
    restart,
    soak,
    throughput,
    transport,
)

SCENARIOS: tuple[Scenario, ...] = (
    throughput.SCENARIO,
    latency.SCENARIO,
    neighbours.SCENARIO,
    backlog.SCENARIO,
    held.SCENARIO,
    producers.SCENARIO,
    restart.SCENARIO,
    configuration.SCENARIO,
    soak.SCENARIO,
    transport.SCENARIO,
    replay.SCENARIO,
    maintenance.SCENARIO,
    panel.SCENARIO,
)
