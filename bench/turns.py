"""Two at full load in turns of a few seconds, each on a database of its own: what the machine's speed does meanwhile, it does to both."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg

from bench import load, rig
from bench.rig import Bench

AHEAD = 20_000  # events that wait to be delivered while there is full load
RAMP_S = 0.5  # of each slice isn't measured: connections, caches, limits
DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Slice:
    """What was delivered in so long, and the CPU time of who delivers, of PostgreSQL where it can be seen, and of the sink."""

    seconds: float
    deliveries: int
    running_s: float
    postgres_s: float
    sink_s: float

    @property
    def per_s(self) -> float:
        return self.deliveries / self.seconds

    @property
    def cpu_us(self) -> float:
        return self.running_s / max(1, self.deliveries) * 1e6

    @property
    def postgres_cpu_us(self) -> float:
        return self.postgres_s / max(1, self.deliveries) * 1e6

    @property
    def sink_share(self) -> float:
        return self.sink_s / self.seconds


@dataclass(slots=True)
class Fed:
    """One that delivers to `endpoints`, an account each, and who feeds it while it is its turn: something waits always."""

    bench: Bench
    running: rig.Running
    feeder: asyncpg.Connection
    target: load.Target
    endpoints: int
    slices: list[Slice] = field(default_factory=list)
    _fed: int = 0

    async def turn(self, seconds: float, sink_pid: int) -> None:
        ends = time.perf_counter() + seconds
        feeding = asyncio.create_task(self._feed(ends))
        await asyncio.sleep(min(RAMP_S, seconds / 5))
        before, began = self._read(sink_pid), time.perf_counter()
        await asyncio.sleep(ends - began)
        after, took_s = self._read(sink_pid), time.perf_counter() - began
        await feeding
        deliveries, running_s, postgres_s, sink_s = (b - a for a, b in zip(before, after, strict=True))
        self.slices.append(Slice(took_s, int(deliveries), running_s, postgres_s, sink_s))
        async with asyncio.timeout(DRAIN_S):  # nothing of this turn is left to the next
            while self.running.counters.settled < self._fed:
                assert self.running.process.poll() is None, "who delivers has ended"
                await asyncio.sleep(0.01)

    async def _feed(self, ends: float) -> None:
        while time.perf_counter() < ends:
            if self._fed - self.running.counters.settled < AHEAD:
                await load.bulk(self.feeder, load.BULK_ROWS, self.endpoints, target=self.target)
                self._fed += load.BULK_ROWS
            else:
                await asyncio.sleep(0.01)

    def _read(self, sink_pid: int) -> tuple[float, ...]:
        postgres_s = self.bench.postgres_cpu_s() or 0.0
        return (
            self.running.counters.settled,
            self.running.cpu_s(),
            postgres_s,
            rig.cpu_s(sink_pid, with_children=True),
        )


async def take(fed: Mapping[str, Fed], slices: int, slice_s: float, sink_pid: int, told: str) -> None:
    """Give each so many turns, who was first in one round being last in the next."""
    for n in range(slices):
        for row in list(fed) if n % 2 == 0 else reversed(list(fed)):
            fed[row].bench.tell(f"{told}: {row}, slice {n + 1} of {slices}")
            await fed[row].turn(slice_s, sink_pid)
