"""Backlog: one endpoint that is paused, or dead, with many events behind it; what the others notice, what it costs, and
how it comes back.

For each size: fresh events for a hundred others at a steady rate before, with the backlog parked, and while the one
that was away catches up. Its own receiver notes how many POSTs it gets in each tenth of a second from the moment it
is back.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg

from bench import load, rig
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table, median
from dispatcher.sink import Received, Sink

OTHERS = 100
RATE = 1_000.0  # fresh events a second for the others
PARKED_PAYLOAD_BYTES = 200
FILL_ROWS = 20_000  # a commit
BREAKER_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Size:
    paused: tuple[int, ...]  # events behind a pause
    dead: tuple[int, ...]  # events behind a breaker
    seconds: float  # of fresh events in each state
    slices: int  # that they come in: before and parked can't alternate, so each is several


SIZES = {
    "full": Size(paused=(100_000, 1_000_000, 5_000_000), dead=(1_000_000,), seconds=20, slices=5),
    "quick": Size(paused=(50_000,), dead=(), seconds=2, slices=1),
    "tiny": Size(paused=(500,), dead=(), seconds=0.3, slices=1),
}


async def run(bench: Bench, size: Size) -> Result:
    result = Result()
    comings: dict[str, list[tuple[float, float]]] = {}
    back = Table("The one that was away, when it is back")
    for how, sizes in (("paused", size.paused), ("dead", size.dead)):
        for parked in sizes:
            table = Table(f"The others, beside one that is {how} with {parked:,} events")
            comings[f"{how}, {parked:,}"] = await _one(bench, table, back, how, parked, size)
            result.tables.append(table)
            result.goals += table.goal(
                f"others' p99, {parked:,} events behind one that is {how} ÷ before", "p99_ms", "parked", "≤", 1.1, over="before"
            )  # fmt: skip
            result.goals += table.goal(
                f"memory growth, {parked:,} events behind one that is {how}, MB", "growth_mb", "parked", "≤", 20
            )
    result.tables.append(back)
    result.plots.append(
        Plot("backlog-return", "POSTs to the one that is back", "seconds since it is back", "POSTs a second", comings)
    )
    return result


async def _one(bench: Bench, table: Table, back: Table, how: str, parked: int, size: Size) -> list[tuple[float, float]]:
    told = f"backlog: {parked:,} events, {how}"
    async with load.arrivals() as arrivals, _Away.make() as away, bench.database() as dsn:
        urls = [away.url, *(f"http://127.0.0.1:{arrivals.sink.port}/hook/{n}" for n in range(OTHERS))]
        connection = await rig.install(dsn, endpoints=len(urls), port=0, in_flight=100, urls=urls)
        settings: dict[str, Any] = {
            "breaker_wait_s": BREAKER_WAIT_S,
            "breaker_wait_max_s": BREAKER_WAIT_S,
            "retry_schedule_s": "2,2,2,2,2,2,2,2,2,2",
        }
        async with rig.dispatcher(dsn, connection, **settings) as running, load.producers(dsn) as producers:

            async def fresh(row: str) -> None:
                bench.tell(f"{told}, {row}")
                for _ in range(size.slices):
                    cpu_s = running.cpu_s()
                    committed = await producers.open_loop(RATE, size.seconds / size.slices, range(1, OTHERS + 1))
                    waits = await arrivals.all_of(committed)
                    cpu_us = (running.cpu_s() - cpu_s) / waits.total * 1e6
                    table.add(row, **waits.figures(), cpu_us=cpu_us if row != "catching up" else None)

            await arrivals.all_of(await producers.open_loop(RATE, min(2.0, size.seconds), range(1, OTHERS + 1)))
            await rig.settle(connection)
            await fresh("before")
            rss_mb = running.rss_mb()
            if how == "paused":
                await set_state(connection, "paused")
            bench.tell(f"{told}, filling")
            await load.bulk(connection, parked, 1, size=PARKED_PAYLOAD_BYTES, rows=FILL_ROWS)
            await _read(connection)
            bench.tell(f"{told}, settling")
            await rig.settle(connection)
            await fresh("parked")
            table.add("before", growth_mb=0)
            table.add("parked", growth_mb=running.rss_mb() - rss_mb)
            await away.begin()
            if how == "paused":
                await set_state(connection, "live")
            began = time.perf_counter()
            await fresh("catching up")
            await away.first()
            table.add("catching up", growth_mb=running.rss_mb() - rss_mb)
            back.add(f"{how}, {parked:,} events", **away.figures(began))
        connection.terminate()
        return away.rates(began)


async def set_state(connection: asyncpg.Connection, state: str) -> None:
    """Pause the first endpoint, or let it go on, holding what came meanwhile."""
    await connection.execute(
        "UPDATE webhook.endpoint SET state = $1, paused_at_id = CASE WHEN $1 = 'paused' THEN webhook.last_id() END "
        "WHERE id = (SELECT min(id) FROM webhook.endpoint)",
        state,
    )


async def _read(connection: asyncpg.Connection) -> None:
    """Wait until the head has passed everything, and what was committed behind it is read too: what waits then is one lane's."""
    read = "SELECT position >= webhook.last_id() AND isempty(gaps) FROM webhook.checkpoint"
    async with asyncio.timeout(rig.PASSED_S):
        while not await connection.fetchval(read):
            await asyncio.sleep(0.05)


class _Away:
    """The receiver of the one that is away: nobody listens at its port until it begins."""

    @classmethod
    @contextlib.asynccontextmanager
    async def make(cls) -> AsyncIterator["_Away"]:
        away = cls()
        try:
            yield away
        finally:
            await away._sink.stop()

    def __init__(self) -> None:
        self._port = rig.free_port()
        self._sink = Sink(on_event=self._note)
        self._at: list[float] = []
        self._connections_max = 0
        self.url = f"http://127.0.0.1:{self._port}/away"

    async def begin(self) -> None:
        await self._sink.start(port=self._port)

    async def first(self) -> None:
        async with asyncio.timeout(30):
            while not self._at:
                await asyncio.sleep(0.02)

    def _note(self, _event: Received) -> None:
        self._at.append(time.perf_counter())
        self._connections_max = max(self._connections_max, self._sink.connections)

    def rates(self, began: float) -> list[tuple[float, float]]:
        """Return (seconds since it is back, POSTs a second), by tenths of a second."""
        tenths = [0] * (1 + int((self._at[-1] - began) * 10))
        for at in self._at:
            tenths[max(0, int((at - began) * 10))] += 1
        return [(n / 10, count * 10.0) for n, count in enumerate(tenths)]

    def figures(self, began: float) -> dict[str, float]:
        rates = [rate for _, rate in self.rates(began)]
        seconds = max(0.1, self._at[-1] - self._at[0])
        return {
            "first_post_ms": (self._at[0] - began) * 1e3,
            "posts": len(self._at),
            "in_first_second": sum(at < self._at[0] + 1 for at in self._at),
            "catch_up_per_s": len(self._at) / seconds,
            "busiest_tenth_per_s": max(rates),
            "median_tenth_per_s": median(rates),
            "connections_max": self._connections_max,
            "duplicates": self._sink.duplicates,
        }


SCENARIO = Scenario(
    "backlog",
    shows="What an endpoint that is paused or dead with a mountain of events behind it costs the others, and what "
    "its receiver sees when it is back.",
    misleads="before and parked are minutes apart, in several slices each, and what loading leaves the server to do (vacuum, "
    "a checkpoint) is done in between, unmeasured; the receivers share one process with the "
    "producers; the catching up is watched for as long as the others are measured, not to its end; a dead one "
    "had failed attempts, which come again as retries.",
    sizes=SIZES,
    run=run,
)
