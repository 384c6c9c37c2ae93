"""Throughput: what a delivery costs and how many there are a second, one factor at a time, beside four others that do
the same or less.

Events are committed in statements of 500 rows, faster than they can be delivered, and the clock runs until the
checkpoint has passed the last one. What the dispatcher delivers first (a tenth as many) was committed before it
started: that tells what producing costs PostgreSQL, and warms everything up.
"""

import asyncio
import contextlib
import shutil
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import asyncpg

from bench import load, rig, turns, usual
from bench.rig import Bench
from bench.scenario import Goal, Plot, Result, Scenario, Table, median

BODY_BYTES = 470  # of the bare clients: what a payload of 400 bytes becomes with its envelope
SECONDS_WRK = 3.0
BARE_AS_FAST = "bare client, 2 connections"


@dataclass(frozen=True, slots=True)
class Variant:
    """One factor away from the base. `share` of the events, where a delivery costs so much more that they would take too long."""

    name: str
    endpoints: int = 100
    slots: int = 1_000
    payload_bytes: int = load.PAYLOAD_BYTES
    fan_out: int = 1
    delay_s: float = 0
    target: load.Target = load.OUTBOX
    tls: bool = False
    transport: str = "thin"
    share: float = 1


BASE = Variant("dispatcher")
KNOWS = "dispatcher, in turns"
WITHOUT = "without keys, expiry and priority"  # a dispatcher of the bench's that doesn't know them
SLICE_S = 3.0
AIOHTTP = replace(BASE, name="engine on aiohttp", transport="aiohttp", share=0.2)
FACTORS = (
    replace(BASE, name="1 endpoint", endpoints=1),
    replace(BASE, name="1,000 endpoints", endpoints=1_000),
    replace(BASE, name="10,000 endpoints", endpoints=10_000),
    replace(BASE, name="100 in flight", slots=100),
    replace(BASE, name="4,000 in flight", slots=4_000),
    replace(BASE, name="TLS", tls=True),
    replace(BASE, name="4 kB", payload_bytes=4_000, share=0.5),
    replace(BASE, name="32 kB", payload_bytes=32_000, share=0.1),
    replace(BASE, name="fan-out 5", fan_out=5, share=0.2),
    replace(BASE, name="every column given", target=load.OUTBOX_OPTIONS),
    replace(BASE, name="sink answers after 50 ms", delay_s=0.05),
)
USUAL: dict[usual.Form, float] = {"row": 0.05, "batched": 0.2}  # share of the events


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    events: int  # of the base
    factors: tuple[str, ...]  # names
    in_turns_s: float  # of full load, each; none: 0


SIZES = {
    "full": Size(rounds=3, events=100_000, factors=tuple(one.name for one in FACTORS), in_turns_s=60),
    "quick": Size(rounds=1, events=20_000, factors=("10,000 endpoints", "TLS", "fan-out 5"), in_turns_s=0),
    "tiny": Size(rounds=1, events=1_000, factors=("every column given",), in_turns_s=0.5),
}


async def run(bench: Bench, size: Size) -> Result:
    others, factors = Table("Beside others"), Table("One factor at a time")
    if unknown := set(size.factors) - {one.name for one in FACTORS}:
        raise ValueError(
            f"there is no factor {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in FACTORS)}"
        )
    chosen = [one for one in FACTORS if one.name in size.factors]
    with rig.certificate() as certificate:
        for n in range(size.rounds):
            told = f"throughput: round {n + 1} of {size.rounds}"
            with rig.sink(bench.sink_kind) as (port, sink_pid):
                bench.tell(f"{told}, bare client")
                await _bare(others, port, sink_pid, size.events)
                if shutil.which("wrk"):
                    bench.tell(f"{told}, wrk")
                    seconds = min(SECONDS_WRK, size.events / 10_000)
                    used = await asyncio.to_thread(rig.wrk, port, 1_000, seconds, BODY_BYTES)
                    _add_bare(others, "wrk", used, None)
                for variant in (BASE, AIOHTTP):
                    bench.tell(f"{told}, {variant.name}")
                    await _deliver(bench, others, variant, size, port, sink_pid, None)
                for form in USUAL:
                    bench.tell(f"{told}, the usual way, {form}")
                    await _usual(bench, others, form, size, port, sink_pid)
            for variant in chosen:
                bench.tell(f"{told}, {variant.name}")
                tls = certificate if variant.tls else None
                with rig.sink(bench.sink_kind, tls=tls, delay_s=variant.delay_s) as (port, sink_pid):
                    await _deliver(bench, factors, variant, size, port, sink_pid, tls)
    factors.rows = {BASE.name: others.rows[BASE.name]} | factors.rows
    if BASE.name in others.void:
        factors.void[BASE.name] = others.void[BASE.name]
    options = await _in_turns(bench, size.in_turns_s) if size.in_turns_s else Table("")
    tables = [others, factors, *([options] if options.rows else [])]
    return Result(tables, _goals(others, factors, options), [_plot(others, factors)])


async def _bare(table: Table, port: int, sink_pid: int, posts: int) -> None:
    """With as many connections as the dispatcher may use, and with so few that it is about as fast as the dispatcher: then its sink sleeps
    between two requests too, and each has to wake it."""
    for name, connections, share in (("bare client", 1_000, 1.0), (BARE_AS_FAST, 2, 0.2)):
        before = rig.cpu_s(sink_pid, with_children=True)
        used = await asyncio.to_thread(rig.ceiling, port, connections, max(1, round(posts * share)), BODY_BYTES)
        _add_bare(table, name, used, rig.cpu_s(sink_pid, with_children=True) - before)


def _add_bare(table: Table, name: str, used: rig.Posted, sink_s: float | None) -> None:
    # Being the limit of these is what the sink is for: they show how far it goes. Their CPU time per POST stands.
    table.add(
        name,
        rate_per_s=used.posts / used.wall_s,
        cpu_us=used.cpu_s / used.posts * 1e6,
        sink_cpu_us=None if sink_s is None else sink_s / used.posts * 1e6,
        sink_share=None if sink_s is None else sink_s / used.wall_s,
    )


async def _deliver(
    bench: Bench, table: Table, variant: Variant, size: Size, port: int, sink_pid: int, tls: rig.Certificate | None
) -> None:
    accounts = max(1, variant.endpoints // variant.fan_out)
    scheme = "http" if tls is None else "https"
    urls = [f"{scheme}://127.0.0.1:{port}/hook/{n}" for n in range(variant.endpoints)]
    settings: dict[str, Any] = {
        "slots": variant.slots,
        "sockets_max": variant.slots + 1_000,
        "sockets_per_origin_max": max(1_000, variant.slots),
        "transport": variant.transport,
    }
    if tls is not None:
        settings["ca_file"] = tls.ca
    in_flight = min(4_000, max(100, variant.slots // variant.endpoints))
    async with bench.database() as dsn:
        connection = await rig.install(
            dsn, endpoints=variant.endpoints, port=port, in_flight=in_flight, accounts=accounts, urls=urls
        )

        @contextlib.asynccontextmanager
        async def start() -> AsyncIterator[tuple[rig.Running, Passed]]:
            async with rig.dispatcher(dsn, connection, **settings) as running:
                yield running, lambda last: rig.passed(connection, last)

        events = max(500, round(size.events * variant.share))
        plan = _Plan(events, accounts, variant.fan_out, variant.payload_bytes, variant.target, "webhook")
        await _measure(bench, table, variant.name, connection, sink_pid, plan, start)
        wanted = (events + plan.first) * variant.fan_out
        recorded = await connection.fetchval("SELECT count(*) FROM webhook.attempt WHERE fault IS NULL")
        assert recorded == wanted, f"{recorded} attempts that succeeded instead of {wanted}"
        connection.terminate()


async def _usual(bench: Bench, table: Table, form: usual.Form, size: Size, port: int, sink_pid: int) -> None:
    async with bench.database() as dsn:
        connection = await usual.install(dsn, [f"http://127.0.0.1:{port}/hook/{n}" for n in range(BASE.endpoints)])

        @contextlib.asynccontextmanager
        async def start() -> AsyncIterator[tuple[rig.Running, Passed]]:
            async with rig.watched("bench.usual", dsn, form, str(BASE.slots), env={}) as running:
                yield running, lambda last: usual.settled(running, last)

        events = max(500, round(size.events * USUAL[form]))
        plan = _Plan(events, BASE.endpoints, 1, BASE.payload_bytes, usual.QUEUE, "usual")
        await _measure(bench, table, f"the usual way, {usual.FORMS[form]}", connection, sink_pid, plan, start)
        assert await connection.fetchval("SELECT bool_and(status = 'done' AND attempts = 1) FROM usual.queue")
        connection.terminate()


async def _in_turns(bench: Bench, seconds: float) -> Table:
    """Compare the dispatcher with one that knows no options, a few seconds each at a time: the difference is smaller than what the machine's
    pace does to two that are measured minutes apart."""
    table = Table("Keys, expiry and priority that nobody uses: full load in turns")
    slices = max(2, round(seconds / SLICE_S))
    async with contextlib.AsyncExitStack() as stack:
        port, sink_pid = stack.enter_context(rig.sink(bench.sink_kind))
        fed: dict[str, turns.Fed] = {}
        for row in (KNOWS, WITHOUT):
            dsn = await stack.enter_async_context(bench.database())
            connection = await rig.install(dsn, endpoints=BASE.endpoints, port=port, in_flight=100)
            stack.callback(connection.terminate)
            running = await stack.enter_async_context(
                rig.dispatcher(dsn, connection, slots=BASE.slots, without_options=row == WITHOUT)
            )
            fed[row] = turns.Fed(bench, running, connection, BASE.target, BASE.endpoints)
        await turns.take(fed, slices, seconds / slices, sink_pid, "throughput")
    for row, one in fed.items():
        for taken in one.slices:
            table.add(row, rate_per_s=taken.per_s, cpu_us=taken.cpu_us, sink_share=taken.sink_share)
        table.check_sink(row, statistics.fmean(taken.sink_share for taken in one.slices))
    return table


Passed = Callable[[int], Awaitable[None]]
Start = Callable[[], contextlib.AbstractAsyncContextManager[tuple[rig.Running, Passed]]]


@dataclass(frozen=True, slots=True)
class _Plan:
    events: int
    accounts: int
    fan_out: int
    payload_bytes: int
    target: load.Target
    schema: str

    @property
    def first(self) -> int:
        """How many events are there before whoever delivers them starts."""
        return max(500, self.events // 10)


async def _measure(
    bench: Bench, table: Table, row: str, connection: asyncpg.Connection, sink_pid: int, plan: _Plan, start: Start
) -> None:
    deliveries = plan.events * plan.fan_out
    produce = partial(load.bulk, connection, accounts=plan.accounts, size=plan.payload_bytes, target=plan.target)
    was = await rig.snapshot(bench, connection)
    last = await produce(plan.first)
    produced = (await rig.snapshot(bench, connection)).since(was)
    async with start() as (running, passed):
        await passed(last)
        was = await rig.snapshot(bench, connection, running, sink_pid)
        await passed(await produce(plan.events))
        used = (await rig.snapshot(bench, connection, running, sink_pid)).since(was)
        rss_mb = running.rss_mb()
    # All sessions of whoever delivered have ended, and told their statistics.
    dead = await rig.dead_tuples(connection, plan.schema) / (deliveries + plan.first * plan.fan_out)
    share = plan.events / plan.first  # of what producing costs
    table.add(
        row,
        rate_per_s=deliveries / used.wall_s,
        cpu_us=used.running_s / deliveries * 1e6,
        postgres_cpu_us=None if used.postgres_s is None or produced.postgres_s is None
        else max(0.0, used.postgres_s - produced.postgres_s * share) / deliveries * 1e6,
        sink_cpu_us=used.sink_s / deliveries * 1e6,
        sink_share=used.sink_s / used.wall_s,
        wal_bytes=(used.wal_bytes - produced.wal_bytes * share) / deliveries,
        statements=used.statements / deliveries,
        dead_per_1000=dead * 1_000,
        rss_mb=rss_mb,
    )  # fmt: skip
    table.check_sink(row, used.sink_s / used.wall_s)


def _goals(others: Table, factors: Table, options: Table) -> list[Goal]:
    base = BASE.name
    batched = f"the usual way, {usual.FORMS['batched']}"
    return [
        *others.goal("CPU: bare client ÷ dispatcher", "cpu_us", "bare client", "≥", 0.35, over=base, out_for=0.5),
        *others.goal("CPU: engine on aiohttp ÷ ours", "cpu_us", AIOHTTP.name, "≥", 2.5, over=base, out_for=4),
        *others.goal("rate: ours ÷ the usual way, batched", "rate_per_s", base, "≥", 2.5, over=batched, out_for=4),
        *factors.goal("CPU: TLS ÷ plain", "cpu_us", "TLS", "≤", 2.5, over=base),
        *factors.goal("CPU: 10,000 endpoints ÷ 100", "cpu_us", "10,000 endpoints", "≤", 1.4, over=base),
        *options.goal(
            "CPU: keys, expiry and priority that nobody uses ÷ without them", "cpu_us", KNOWS, "≤", 1.03, over=WITHOUT
        ),
        *factors.goal("CPU per delivery: fan-out 5 ÷ 1", "cpu_us", "fan-out 5", "≤", 1, over=base),
        *others.goal("WAL to consume, bytes per delivery", "wal_bytes", base, "≤", 200),
        *others.goal("statements per delivery", "statements", base, "≤", 0.02),
        *others.goal("dead tuples per 1,000 deliveries", "dead_per_1000", base, "≤", 1),
    ]


def _plot(others: Table, factors: Table) -> Plot:
    parts = {"cpu_us": "who sends", "postgres_cpu_us": "PostgreSQL", "sink_cpu_us": "sink"}
    bars = {
        row: {name: median(figures[figure]) for figure, name in parts.items() if figure in figures}
        for row, figures in (others.rows | factors.rows).items()
    }
    return Plot("throughput-cpu", "CPU time per delivery", "µs", "", stacked=bars)


SCENARIO = Scenario(
    "throughput",
    shows="What a delivery costs each process, and how many there are a second, around 100 endpoints, 1,000 in "
    "flight, plain HTTP, 0.5 kB, fan-out 1.",
    misleads="the rate depends on how four processes share the machine's cores, the CPU time per delivery much less; an"
    " idle sink has to be woken by each write, which the one that the bare client saturates hasn't; "
    "with 2 connections, about as fast as the dispatcher, it wakes its sink too. PostgreSQL's part is what is left after "
    "subtracting what producing alone took.",
    sizes=SIZES,
    run=run,
)
