"""All scenarios, in the order in which they run."""

from bench.scenario import Scenario
from bench.scenarios import (
    backlog,
    configuration,
    held,
    latency,
    maintenance,
    neighbours,
    producers,
    replay,
    restart,
    soak,
    throughput,
    transport,
)

# Panel under load belongs here once there is a panel: its pages' times beside a dispatcher at full load, and the other way round.
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
)
