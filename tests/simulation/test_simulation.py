"""Some hundred seeds on every run of the tests; the same seed is the same run, to the byte."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.night import run_seeds
from tests.simulation.plan import KINDS, OPTIONS, draw
from tests.simulation.world import simulate

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "200"))
ROOT = Path(__file__).parent.parent.parent

# Seeds that found something, and what. What a seed draws changes with the simulation, so each has a test of its own in tests/engine as well.
FOUND = {
    21: "a connection to the old host was used after the endpoint's URL had changed",
    41: "a lane whose timer was set for a token was not woken at the end of Retry-After",
    72: "a run whose next page was due in the same microsecond never got one",
    199: "while the server's clock was behind ours, a retry that was due by ours only was asked for again and again",
    88: "results piled up beyond unrecorded_max when that is less than a fifth of record_rows_max",
}


def test_seeds_settle():
    """Every violation is printed with the command that replays it."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        failed = [result for result in run_seeds(pool, range(1_000, 1_000 + SEEDS)) if result.violation]
    assert not failed, "\n\n".join(str(result) for result in failed)


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_found_something(seed):
    result = simulate(seed)
    assert result.violation is None, f"{FOUND[seed]}?\n{result}"


def test_a_seed_is_a_run():
    """Twice here, once in another process with other hashes."""
    here = [simulate(7).digest, simulate(7).digest]
    command = "from tests.simulation.world import simulate; print(simulate(7).digest)"
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    there = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert {*here, there.stdout.strip()} == {here[0]}
    assert simulate(8).digest != here[0]


def test_the_log_does_not_change_the_run():
    quiet, verbose = simulate(7), simulate(7, verbose=True)
    assert [line for line in verbose.trace if "    log " not in line] == quiet.trace


def test_swarms_differ():
    plans = [draw(seed) for seed in range(200)]
    for kind in (*KINDS, *OPTIONS):
        share = sum(plan.has(kind) for plan in plans) / len(plans)
        assert 0.1 < share < 0.9, kind
