"""Many seeds on several processes."""

from collections.abc import Iterable, Iterator
from multiprocessing.pool import Pool

from tests.simulation.faults import FAULTS
from tests.simulation.world import Result, simulate


def run_seeds(pool: Pool, seeds: Iterable[int], fault: str | None = None) -> Iterator[Result]:
    """Yield results as they come, without their traces."""
    return pool.imap_unordered(_one, [(seed, fault) for seed in seeds], chunksize=4)


def run_one(seed: int, fault: str | None = None, *, verbose: bool = False) -> Result:
    if fault is None:
        return simulate(seed, verbose=verbose)
    with next(f for f in FAULTS if f.name == fault)():
        return simulate(seed, verbose=verbose)


def _one(job: tuple[int, str | None]) -> Result:
    result = run_one(*job)
    result.trace = []
    return result
