"""Each deliberate fault is caught: a simulation that can't fail proves nothing."""

from itertools import islice

import pytest

from tests.simulation.faults import FAULTS, Fault, seeds_for
from tests.simulation.world import simulate

SEEDS_MAX = 60


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_deliberate_fault_is_caught(fault: Fault):
    seen = []
    for seed in islice(seeds_for(fault), SEEDS_MAX):
        with fault():
            violation = simulate(seed).violation
        if violation is not None:
            seen.append(violation)
            if fault.shows in violation:
                assert simulate(seed).violation is None, "it is the fault that was caught, nothing else"
                return
    pytest.fail(f"not caught by {SEEDS_MAX} seeds; seen instead: {seen[:3]}")
