"""Held transaction: full load while somebody keeps a transaction open from the first event to the last; and one
transaction of five million rows.

A held transaction keeps vacuum from taking anything away. A queue whose rows change state slows down behind what it
can't get rid of; a log has nothing to get rid of. Both are fed so that there is always something to deliver. Two of each
take turns of a few seconds, each on a database of its own, with the transaction and without it: what the machine's
speed does meanwhile, it does to both. The big transaction loads its rows for one endpoint with a rate limit, beside fresh
events for others at a steady rate: while it loads, its ids are a gap that grows. What of that is the machine's (such a
load takes a core, and the disk) tells the same load into a table of the same shape that nobody reads.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import asyncpg

from bench import load, rig, turns, usual
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table

ENDPOINTS = 100
SLOTS = 1_000
OTHERS_RATE = 1_000.0
LOADER_RATE_PER_S = 500.0
LOADER_PAYLOAD_BYTES = 200
SLICE_S = 3.0
HELD = "dispatcher, a transaction held"
LOADS, ELSEWHERE = "while it loads", "while as many load elsewhere"
AFTER, AFTER_ELSEWHERE = "after its commit", "after the commit of as many elsewhere"
NOBODYS = load.Target(rows="", bulk=load.OUTBOX.bulk.replace("webhook.outbox", "elsewhere"))


@dataclass(frozen=True, slots=True)
class Size:
    seconds: float  # of full load, each
    usual_seconds: float  # none: 0
    loaded: int  # rows of the one big transaction
    fresh_s: float  # of fresh events before it, and after its commit


SIZES = {
    "full": Size(seconds=150, usual_seconds=60, loaded=5_000_000, fresh_s=20),
    "quick": Size(seconds=2, usual_seconds=0, loaded=50_000, fresh_s=1),
    "tiny": Size(seconds=0.5, usual_seconds=0, loaded=1_000, fresh_s=0.3),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table("Full load, with and without a held transaction in turns; the first third of the time and the last")
    lines: dict[str, list[tuple[float, float]]] = {}
    with rig.sink(bench.sink_kind) as (port, sink_pid):
        for contender, seconds in ((_log, size.seconds), (_queue, size.usual_seconds)):
            if seconds:
                lines |= await _in_turns(bench, table, contender, seconds, port, sink_pid)
    loading = await _big(bench, size)
    goals = [
        *table.goal("a transaction held: rate ÷ that without one, last third ÷ first", "rate_kept", HELD, "≥", 0.95),
        *table.goal("a transaction held: CPU time a delivery ÷ that without one, last third ÷ first", "cpu_grown", HELD, "≤", 1.05),
        *loading.goal(f"others' p99 while {size.loaded:,} rows load ÷ before", "p99_ms", LOADS, "≤", 1.5, over="before"),
        *loading.goal(f"others' p99 while {size.loaded:,} rows load ÷ while they load elsewhere", "p99_ms", LOADS, "≤", 1.5, over=ELSEWHERE),
        *loading.goal("others' p99 after its commit ÷ before", "p99_ms", AFTER, "≤", 1.5, over="before"),
        *loading.goal("others' p99 after its commit ÷ after that of as many elsewhere", "p99_ms", AFTER, "≤", 1.5, over=AFTER_ELSEWHERE),
    ]  # fmt: skip
    plot = Plot("held", "Full load, with and without a held transaction", "seconds", "deliveries a second", lines)
    return Result([table, loading], goals, [plot])


Contender = tuple[str, load.Target, rig.Running]
Start = Callable[[str, int], AbstractAsyncContextManager[Contender]]


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


async def _in_turns(
    bench: Bench, table: Table, contender: Start, seconds: float, port: int, sink_pid: int,
) -> dict[str, list[tuple[float, float]]]:  # fmt: skip
    """Run two at full load in turns, one of them beside a held transaction; return (seconds, deliveries a second) of each."""
    slices = max(2, round(seconds / SLICE_S))
    async with contextlib.AsyncExitStack() as stack:
        fed: dict[str, turns.Fed] = {}
        for held in (False, True):
            dsn = await stack.enter_async_context(bench.database())
            name, target, running = await stack.enter_async_context(contender(dsn, port))
            await stack.enter_async_context(_transaction(dsn, held=held))
            feeder = await asyncpg.connect(dsn)
            stack.callback(feeder.terminate)
            row = f"{name}, {'a transaction held' if held else 'none held'}"
            fed[row] = turns.Fed(bench, running, feeder, target, ENDPOINTS)
        await turns.take(fed, slices, seconds / slices, sink_pid, "held")
    third = max(1, slices // 3)
    lines: dict[str, list[tuple[float, float]]] = {}
    none_held = next(iter(fed.values())).slices
    for row, one in fed.items():
        sink_share = statistics.fmean(taken.sink_share for taken in one.slices)
        rates = [taken.per_s for taken in one.slices]
        costs = [taken.cpu_us + taken.postgres_cpu_us for taken in one.slices]
        # Turn by turn beside the one without, so that the machine's pace of the moment is in neither.
        rate_kept = _last_to_first([a / max(1e-9, b.per_s) for a, b in zip(rates, none_held, strict=True)], third)
        cpu_grown = _last_to_first(
            [a / max(1e-9, b.cpu_us + b.postgres_cpu_us) for a, b in zip(costs, none_held, strict=True)], third
        )
        table.add(
            row, seconds=seconds, first_per_s=statistics.median(rates[:third]), last_per_s=statistics.median(rates[-third:]),
            first_cpu_us=statistics.median(costs[:third]), last_cpu_us=statistics.median(costs[-third:]), rate_kept=rate_kept,
            cpu_grown=cpu_grown, sink_share=sink_share,
        )  # fmt: skip
        table.check_sink(row, sink_share)
        lines[row] = [((n + 0.5) * seconds / slices, rate) for n, rate in enumerate(rates)]
    return lines


def _last_to_first(ratios: list[float], third: int) -> float:
    return statistics.median(ratios[-third:]) / max(1e-9, statistics.median(ratios[:third]))


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
            for row, after, target in ((ELSEWHERE, AFTER_ELSEWHERE, NOBODYS), (LOADS, AFTER, load.OUTBOX)):
                loading = asyncio.create_task(
                    load.bulk(loader, size.loaded, 1, size=LOADER_PAYLOAD_BYTES, target=target, rows=size.loaded)
                )
                await fresh(row, min(5.0, size.fresh_s), loading)
                await loading
                await fresh(after, size.fresh_s)
                await loader.execute("DROP TABLE IF EXISTS elsewhere")
            loader.terminate()
        connection.terminate()
    return table


SCENARIO = Scenario(
    "held",
    shows="Whether somebody's open transaction slows deliveries down over time, beside a queue table under the same;"
    " and what others notice of one huge transaction.",
    misleads="the two share a server, and what one leaves to its background is done in the other's turn; the queue is fed as fast as it "
    "delivers, so its table grows with its own rate; the big transaction's inserts take a core for themselves, which anything "
    "would notice on two.",
    sizes=SIZES,
    run=run,
)
