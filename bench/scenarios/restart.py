"""Restart: an orderly stop, a kill -9 and a crash of PostgreSQL at full load, each with many events outstanding.

First POST is counted from the start of the new process (or, after PostgreSQL's crash, from the moment at which the
server answers again: the dispatcher survives that), and from the moment of the stop, which has the server's own
recovery in it. The crash is of an embedded server of its own.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from bench import load, rig
from bench.rig import Bench
from bench.scenario import Result, Scenario, Table
from dispatcher.sink import Sink
from dispatcher.store.embedded import EmbeddedServer

ENDPOINTS = 100
PAYLOAD_BYTES = 200
FULL_S = 3.0  # of full load before, and after the first POST
FIRST_POST_S_MAX = 60.0
SIGNALS = {"SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}
CRASH = "PostgreSQL crashes"


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    outstanding: int
    ways: tuple[str, ...]


SIZES = {
    "full": Size(rounds=3, outstanding=1_000_000, ways=(*SIGNALS, CRASH)),
    "quick": Size(rounds=1, outstanding=50_000, ways=("kill -9", CRASH)),
    "tiny": Size(rounds=1, outstanding=20_000, ways=("kill -9",)),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table(f"With about {size.outstanding:,} events outstanding")
    for n in range(size.rounds):
        for way in size.ways:
            bench.tell(f"restart: round {n + 1} of {size.rounds}, {way}")
            if way == CRASH:
                with rig.embedded_server() as server:
                    await _crash(table, way, server, size)
            else:
                async with bench.database() as dsn:
                    await _stop(table, way, dsn, SIGNALS[way], size)
    goals = [
        goal
        for row in ("kill -9", CRASH)
        for goal in table.goal(f"{row}: start to first POST, ms", "first_post_ms", row, "≤", 3_000)
    ]
    return Result([table], goals)


@contextlib.asynccontextmanager
async def _outstanding(dsn: str, size: Size) -> AsyncIterator[tuple[asyncpg.Connection, Sink]]:
    sink = Sink(max_ids=4 * size.outstanding)
    await sink.start()
    try:
        connection = await rig.install(dsn, endpoints=ENDPOINTS, port=sink.port, in_flight=100)
        await load.bulk(connection, size.outstanding, ENDPOINTS, size=PAYLOAD_BYTES, rows=10_000)
        yield connection, sink
        connection.terminate()
    finally:
        await sink.stop()


async def _stop(table: Table, row: str, dsn: str, number: signal.Signals, size: Size) -> None:
    async with _outstanding(dsn, size) as (connection, sink):
        async with rig.dispatcher(dsn, connection) as running:
            await _full_load(sink, size)
            rss_mb = running.rss_mb()
            stopped = time.perf_counter()
            running.process.send_signal(number)
            await asyncio.to_thread(running.process.wait, 30)
        received, began = sink.received, time.perf_counter()
        async with rig.service(dsn) as running:
            first = await _first_post(sink, received)
            await _full_load(sink, size)
            _add(table, row, sink, running, first, began, stopped, received, rss_mb)


async def _crash(table: Table, row: str, server: EmbeddedServer, size: Size) -> None:
    dsn = server.dsn
    async with _outstanding(dsn, size) as (connection, sink), rig.dispatcher(dsn, connection) as running:
        await _full_load(sink, size)
        rss_mb = running.rss_mb()
        stopped = time.perf_counter()
        await asyncio.to_thread(server.stop_now)
        await asyncio.to_thread(server.start_again)
        received, began = sink.received, time.perf_counter()
        first = await _first_post(sink, received)
        await _full_load(sink, size)
        _add(table, row, sink, running, first, began, stopped, received, rss_mb)


async def _full_load(sink: Sink, size: Size) -> None:
    """Let it deliver for a while, but leave most for later."""
    until, upto = time.perf_counter() + FULL_S, sink.received + size.outstanding // 4
    while time.perf_counter() < until and sink.received < upto:
        await asyncio.sleep(0.01)


async def _first_post(sink: Sink, received: int) -> float:
    async with asyncio.timeout(FIRST_POST_S_MAX):
        while sink.received == received:
            await asyncio.sleep(0.001)
    return time.perf_counter()


def _add(
    table: Table, row: str, sink: Sink, running: rig.Running, first: float, began: float,
    stopped: float, received: int, rss_mb: float,
) -> None:  # fmt: skip
    table.add(
        row,
        first_post_ms=(first - began) * 1e3,
        since_the_stop_ms=(first - stopped) * 1e3,
        received_before=received,
        received_after=sink.received - received,
        duplicates=sink.duplicates,
        rss_before_mb=rss_mb,
        rss_after_mb=running.rss_mb(),
    )


SCENARIO = Scenario(
    "restart",
    shows="How soon deliveries go on after an orderly stop, a kill -9 and a crash of PostgreSQL at full load, how "
    "many are repeated, and what it takes in memory.",
    misleads="importing Python's modules is the larger part of a start, and comes from the file cache here; a stop that"
    " waits for a slow receiver takes as long as its grace allows; duplicates are what was in flight or not "
    "recorded, so they grow with slots and with the wait for the disk.",
    sizes=SIZES,
    run=run,
)
