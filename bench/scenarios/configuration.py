"""Configuration: how long a start takes with many endpoints, what an idle endpoint costs in memory, and what changing
one costs.

One event waits for the last endpoint when the process starts: a start has ended when that arrives. A change is a
pause or its end of one endpoint that has an event waiting: from the commit that lets it go on to the POST.
"""

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from bench import load, rig
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Result, Scenario, Table

START_S_MAX = 60.0
PAUSE_S = 1.0  # by then nothing is sent to a paused endpoint


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    endpoints: tuple[int, ...]
    changes: int


SIZES = {
    "full": Size(rounds=3, endpoints=(1, 1_000, 10_000, 100_000), changes=10),
    "quick": Size(rounds=1, endpoints=(1, 5_000), changes=2),
    "tiny": Size(rounds=1, endpoints=(1, 100), changes=1),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table("Endpoints, idle")
    for n in range(size.rounds):
        least_mb: float | None = None
        for endpoints in size.endpoints:
            bench.tell(f"configuration: round {n + 1} of {size.rounds}, {endpoints:,} endpoints")
            rss_mb = await _measure(bench, table, f"{endpoints:,}", endpoints, size.changes)
            if least_mb is None:
                least_mb = rss_mb
            else:
                table.add(f"{endpoints:,}", per_endpoint_kb=(rss_mb - least_mb) * 1e3 / (endpoints - size.endpoints[0]))
    goals = [
        *table.goal("start with 100,000 endpoints, ms", "start_ms", "100,000", "≤", 5_000),
        *table.goal("memory of an idle endpoint of 10,000, kB", "per_endpoint_kb", "10,000", "≤", 3),
        *table.goal("memory of an idle endpoint of 100,000, kB", "per_endpoint_kb", "100,000", "≤", 3),
    ]
    return Result([table], goals)


async def _measure(bench: Bench, table: Table, row: str, endpoints: int, changes: int) -> float:
    async with load.arrivals() as arrivals, bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=endpoints, port=arrivals.sink.port, in_flight=100)
        account = endpoints - 1
        async with load.producers(dsn, count=1) as producers:
            number = await producers.one(account)
            began = time.perf_counter()
            async with rig.service(dsn) as running:
                await _arrived(arrivals, number, running)
                start_ms = (time.perf_counter() - began) * 1e3
                await asyncio.sleep(0.5)
                rss_mb = running.rss_mb()
                waits, cpu_us = await _change(arrivals, connection, producers, running, account, changes)
        table.add(
            row, start_ms=start_ms, rss_mb=rss_mb, change_p50_ms=waits.percentile_ms(0.5), change_max_ms=waits.percentile_ms(1),
            cpu_per_change_us=cpu_us,
        )  # fmt: skip
        connection.terminate()
    return rss_mb


async def _change(
    arrivals: load.Arrivals, connection: asyncpg.Connection, producers: load.Producers, running: rig.Running, account: int, changes: int
) -> tuple[Histogram, float]:  # fmt: skip
    """Pause the account's endpoint, commit an event, let it go on: how long until it is there, and the CPU µs of a change."""
    waits = Histogram()
    cpu_s = running.cpu_s()
    for _ in range(changes):
        await _set_state(connection, account, "paused")
        await asyncio.sleep(PAUSE_S)
        committed = await producers.one(account)
        await asyncio.sleep(0.02)
        assert committed not in arrivals.at, "a paused endpoint got an event"
        await _set_state(connection, account, "live")
        began = time.perf_counter()
        await _arrived(arrivals, committed, running)
        waits.add((arrivals.at[committed] - began) * 1e6)
    return waits, (running.cpu_s() - cpu_s) / (2 * changes) * 1e6


async def _set_state(connection: asyncpg.Connection, account: int, state: str) -> None:
    await connection.execute(
        "UPDATE webhook.endpoint SET state = $1, paused_at_id = CASE WHEN $1 = 'paused' THEN webhook.last_id() END "
        "WHERE account_id = 'acct_' || $2::integer",
        state, account,
    )  # fmt: skip


async def _arrived(arrivals: load.Arrivals, number: int, running: rig.Running) -> None:
    async with asyncio.timeout(START_S_MAX):
        while number not in arrivals.at:
            assert running.process.poll() is None, "the dispatcher has ended"
            await asyncio.sleep(0.001)


SCENARIO = Scenario(
    "configuration",
    shows="How long a start takes with 1,000 to 100,000 endpoints, from the process's start to a first POST, what an"
    " idle endpoint takes in memory, and how soon a change counts.",
    misleads="memory per endpoint is against the first row's process, and allocators take it in large pieces; a "
    "change's CPU time holds that of the event that shows it; an endpoint in use takes more (its queue, its "
    "connections).",
    sizes=SIZES,
    run=run,
)
