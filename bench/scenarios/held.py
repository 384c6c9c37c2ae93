"""Held transaction: full load while somebody keeps a transaction open from the first event to the last; and one
transaction of five million rows.

A held transaction keeps vacuum from taking anything away. A queue whose rows change state slows down behind what it
can't get rid of; a log has nothing to get rid of. Both are fed so that there is always something to deliver, and
their rate is told over time. The big transaction loads its rows for one endpoint with a rate limit, beside fresh
events for others at a steady rate: while it loads, its ids are a gap that grows. What of that is the machine's (such a
load takes a core, and the disk) tells the same load into a table of the same shape that nobody reads.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from bench import load, rig, usual
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table

ENDPOINTS = 100
SLOTS = 1_000
AHEAD = 20_000  # events that wait to be delivered while there is full load
OTHERS_RATE = 1_000.0
LOADER_RATE_PER_S = 500.0
LOADER_PAYLOAD_BYTES = 200
SAMPLE_S = 0.5
LOADS, ELSEWHERE = "while it loads", "while as many load elsewhere"
NOBODYS = load.Target(rows="", bulk=load.OUTBOX.bulk.replace("webhook.outbox", "elsewhere"))


@dataclass(frozen=True, slots=True)
class Size:
    seconds: float  # of full load
    usual_seconds: float  # none: 0
    loaded: int  # rows of the one big transaction
    fresh_s: float  # of fresh events before it, and after its commit


SIZES = {
    "full": Size(seconds=150, usual_seconds=60, loaded=5_000_000, fresh_s=20),
    "quick": Size(seconds=4, usual_seconds=3, loaded=50_000, fresh_s=2),
    "tiny": Size(seconds=0.5, usual_seconds=0, loaded=1_000, fresh_s=0.3),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table("Full load; the first fifth of the time and the last")
    lines: dict[str, list[tuple[float, float]]] = {}
    with rig.sink(bench.sink_kind) as (port, sink_pid):
        for held in (False, True):
            # Without one it is there to compare with, and need not take as long.
            seconds = size.seconds if held else min(size.seconds, size.usual_seconds or size.seconds)
            contenders = [(_log, seconds)] + ([(_queue, size.usual_seconds)] if size.usual_seconds else [])
            for contender, for_s in contenders:
                async with bench.database() as dsn, contender(dsn, port) as (name, target, running):
                    row = f"{name}, {'a transaction held' if held else 'none held'}"
                    bench.tell(f"held: {row}")
                    async with _transaction(dsn, held=held):
                        lines[row] = await _full_load(bench, table, row, dsn, target, for_s, running, sink_pid)
    loading = await _big(bench, size)
    goals = [
        *table.goal("a transaction held: last fifth's rate ÷ first's", "last_to_first", "dispatcher, a transaction held", "≥", 0.95),
        *table.goal(
            "a transaction held: CPU time a delivery, last fifth ÷ first", "cpu_last_to_first", "dispatcher, a transaction held", "≤", 1.05,
        ),
        *loading.goal(f"others' p99 while {size.loaded:,} rows load ÷ before", "p99_ms", LOADS, "≤", 1.5, over="before"),
        *loading.goal(f"others' p99 while {size.loaded:,} rows load ÷ while they load elsewhere", "p99_ms", LOADS, "≤", 1.5, over=ELSEWHERE),
        *loading.goal("others' p99 after its commit ÷ before", "p99_ms", "after its commit", "≤", 1.5, over="before"),
    ]  # fmt: skip
    plot = Plot("held", "Full load, with and without a held transaction", "seconds", "deliveries a second", lines)
    return Result([table, loading], goals, [plot])


Contender = tuple[str, load.Target, rig.Running]


@contextlib.asynccontextmanager
async def _log(dsn: str, port: int) -> AsyncIterator[Contender]:
    connection = await rig.install(dsn, endpoints=ENDPOINTS, port=port, in_flight=100)
    async with rig.dispatcher(dsn, connection, slots=SLOTS) as running:
        yield "dispatcher", load.OUTBOX, running
    connection.terminate()


@contextlib.asynccontextmanager
async def _queue(dsn: str, port: int) -> AsyncIterator[Contender]:
    connection = await usual.install(dsn, [f"http://127.0.0.1:{port}/hook/{n}" for n in range(ENDPOINTS)])
    async with rig.watched("bench.usual", dsn, "batched", str(SLOTS), env={}) as running:
        yield f"the usual way, {usual.FORMS['batched']}", usual.QUEUE, running
    connection.terminate()


@contextlib.asynccontextmanager
async def _transaction(dsn: str, *, held: bool) -> AsyncIterator[None]:
    """Keep a transaction open that has taken an id and a snapshot in this database, if asked."""
    if not held:
        yield
        return
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT pg_current_xact_id()")
            yield
    finally:
        connection.terminate()


async def _full_load(
    bench: Bench, table: Table, row: str, dsn: str, target: load.Target, seconds: float, running: rig.Running, sink_pid: int,
) -> list[tuple[float, float]]:  # fmt: skip
    """Feed so that something waits always; return (seconds, deliveries a second)."""
    feeder = await asyncpg.connect(dsn)
    done = False

    async def feed() -> None:
        last = 0
        while not done:
            if last - running.counters.settled < AHEAD:
                last = await load.bulk(feeder, load.BULK_ROWS, ENDPOINTS, target=target)
            else:
                await asyncio.sleep(0.01)

    feeding = asyncio.create_task(feed())
    try:
        await asyncio.sleep(min(3.0, seconds / 5))  # connections, caches, limits
        began, sink_s = time.perf_counter(), rig.cpu_s(sink_pid, with_children=True)
        samples = [(0.0, running.counters.settled)]
        cpu_s = [_cpu_s(bench, running)]
        while samples[-1][0] < seconds:
            await asyncio.sleep(min(SAMPLE_S, seconds / 10))
            assert running.process.poll() is None, f"{row} has ended"
            samples.append((time.perf_counter() - began, running.counters.settled))
            cpu_s.append(_cpu_s(bench, running))
        sink_share = (rig.cpu_s(sink_pid, with_children=True) - sink_s) / samples[-1][0]
    finally:
        done = True
        await feeding
        feeder.terminate()
    fifth = max(1, len(samples) // 5)
    first, last = _rate(samples[: fifth + 1]), _rate(samples[-fifth - 1 :])
    first_us = (cpu_s[fifth] - cpu_s[0]) / max(1, samples[fifth][1] - samples[0][1]) * 1e6
    last_us = (cpu_s[-1] - cpu_s[-fifth - 1]) / max(1, samples[-1][1] - samples[-fifth - 1][1]) * 1e6
    table.add(
        row, seconds=round(samples[-1][0]), first_per_s=first, last_per_s=last, last_to_first=last / first if first else 0,
        first_cpu_us=first_us, last_cpu_us=last_us, cpu_last_to_first=last_us / first_us if first_us else 0, sink_share=sink_share,
    )  # fmt: skip
    table.check_sink(row, sink_share)
    step = max(1, round(2 / SAMPLE_S)) if seconds > 10 else 1
    return [(samples[at][0], _rate(samples[at - step : at + 1])) for at in range(step, len(samples), step)]


def _cpu_s(bench: Bench, running: rig.Running) -> float:
    """Of who delivers and of PostgreSQL, if that can be told."""
    return running.cpu_s() + (bench.postgres_cpu_s() or 0.0)


def _rate(samples: list[tuple[float, int]]) -> float:
    return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])


async def _big(bench: Bench, size: Size) -> Table:
    """Load many rows in one transaction beside fresh events."""
    table = Table(f"Fresh events, {OTHERS_RATE:,.0f}/s, beside one transaction of {size.loaded:,} rows")
    accounts = range(1, ENDPOINTS)
    async with load.arrivals() as arrivals, bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=ENDPOINTS, port=arrivals.sink.port, in_flight=100)
        await connection.execute(
            "UPDATE webhook.endpoint SET rate_per_s = $1 WHERE id = (SELECT min(id) FROM webhook.endpoint)",
            LOADER_RATE_PER_S,
        )
        async with rig.dispatcher(dsn, connection) as running, load.producers(dsn) as producers:

            async def fresh(row: str, seconds: float, loading: "asyncio.Task[int] | None" = None) -> None:
                """Commit events for so long, and again for as long as something loads; a row of all of it."""
                waits, waited, cpu_s, began = Histogram(), Histogram(), running.cpu_s(), time.perf_counter()
                waiting = rig.CoreWaits()
                while not waits.total or (loading is not None and not loading.done()):
                    bench.tell(f"held: {size.loaded:,} rows in one transaction, {row}")
                    committed = await producers.open_loop(OTHERS_RATE, seconds, accounts)
                    waits.merge([await arrivals.all_of(committed)])
                    waited.merge([committed.waited])
                table.add(
                    row, **waits.figures(), seconds=time.perf_counter() - began, producer_p99_ms=waited.percentile_ms(0.99),
                    waits_for_a_core=waiting.share(), cpu_us=(running.cpu_s() - cpu_s) / waits.total * 1e6, rss_mb=running.rss_mb(),
                )  # fmt: skip

            await arrivals.all_of(await producers.open_loop(OTHERS_RATE, min(2.0, size.fresh_s), accounts))
            await fresh("before", size.fresh_s)
            loader = await asyncpg.connect(dsn)
            await loader.execute("CREATE TABLE elsewhere (LIKE webhook.outbox INCLUDING ALL)")
            for row, target in ((ELSEWHERE, NOBODYS), (LOADS, load.OUTBOX)):
                loading = asyncio.create_task(
                    load.bulk(loader, size.loaded, 1, size=LOADER_PAYLOAD_BYTES, target=target, rows=size.loaded)
                )
                await fresh(row, min(5.0, size.fresh_s), loading)
                await loading
                await loader.execute("DROP TABLE IF EXISTS elsewhere")
            await fresh("after its commit", size.fresh_s)
            loader.terminate()
        connection.terminate()
    return table


SCENARIO = Scenario(
    "held",
    shows="Whether somebody's open transaction slows deliveries down over time, beside a queue table under the same;"
    " and what others notice of one huge transaction.",
    misleads="each is one long run, not several rounds, and the disk's mood may change within it; the queue is fed as "
    "fast as it delivers, so its table grows with its own rate; the big transaction's inserts take a core for "
    "themselves, which anything would notice on two.",
    sizes=SIZES,
    run=run,
)
