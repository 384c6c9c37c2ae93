"""Maintenance: what producers notice while partitions are made, emptied and dropped, with and without a transaction of
theirs open throughout.

Short slices, in turn without and with maintenance, so that both meet the same moods of the disk; then the same again
while a producer that has inserted holds its transaction open from the first slice to the last. Once on a server as it
is, and once on one that doesn't flush, which leaves what locks and the work itself cost. Producers commit single rows
at Poisson instants; a wait is counted from the instant at which the row was due (no coordinated omission).

Maintenance is far denser than it ever is: in each of its slices two leaves are emptied with their attempts, four
shells are dropped, a pair of leaves is attached and one is divided; the service does each of these about once a day.
A dispatcher runs, reading the log.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from bench import load, rig
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table
from dispatcher.domain.retention import Span
from dispatcher.ports import Parent, RefusedError
from dispatcher.store.partitions import PgPartitions

RATE = 500.0  # inserts a second
LEAF_PAYLOAD_BYTES = 2_000
WIDTH = 15_000  # ids of a leaf; more than events in it
FIRST = 100_000  # where the leaves that are emptied begin
EMPTIED = 2  # in a slice with maintenance
PAIRS_MAX = 24  # of slices; more would be so many leaves that their number is what is measured
PARENTS: tuple[Parent, ...] = ("attempt", "outbox")
QUIET_SHARE = 0.2  # of held_s: how long the slices without an open transaction take


@dataclass(frozen=True, slots=True)
class Size:
    held_s: float  # how long the transaction is open, on the server as it is
    held_no_flush_s: float  # and on one that doesn't flush
    slice_s: float
    leaf_events: int  # in a leaf that is emptied


SIZES = {
    "full": Size(held_s=180, held_no_flush_s=120, slice_s=10, leaf_events=10_000),
    "quick": Size(held_s=2, held_no_flush_s=2, slice_s=1, leaf_events=1_000),
    "tiny": Size(held_s=0.8, held_no_flush_s=0.8, slice_s=0.4, leaf_events=100),
}


async def run(bench: Bench, size: Size) -> Result:
    result = Result()
    async with bench.database() as dsn:
        await _variant(bench, result, dsn, size, size.held_s, "as the server is")
    with rig.postgres(fsync="off") as (dsn, _):
        await _variant(bench, result, dsn, size, size.held_no_flush_s, "on a server that doesn't flush")
    return result


async def _variant(bench: Bench, result: Result, dsn: str, size: Size, held_s: float, where: str) -> None:
    pairs = {
        "no transaction open": max(1, round(held_s * QUIET_SHARE / size.slice_s / 2)),
        "a transaction open": max(1, round(held_s / size.slice_s / 2)),
    }
    if sum(pairs.values()) > PAIRS_MAX:
        longest = PAIRS_MAX * 2 * size.slice_s / (1 + QUIET_SHARE)
        raise ValueError(
            f"with slices of {size.slice_s:g} s the transaction can be held for {longest:.0f} s; make slice_s longer"
        )
    table = Table(f"An insert, from when it was due to its commit, {where}")
    work_done = Table(f"What was maintained, {where}")
    pooled: dict[str, Histogram] = {}
    connection = await rig.install(dsn, endpoints=0, port=1, in_flight=1)
    leaves = [Span(FIRST + n * WIDTH, FIRST + (n + 1) * WIDTH) for n in range(EMPTIED * sum(pairs.values()))]
    bench.tell(f"maintenance {where}: filling {len(leaves)} leaves")
    await _fill(connection, dsn, leaves, size)
    async with rig.dispatcher(dsn, connection), load.producers(dsn) as producers:
        await rig.passed(connection, await connection.fetchval("SELECT webhook.last_id()"))
        await producers.open_loop(RATE, min(2.0, size.slice_s), range(100))  # connections, caches
        done: Counter[str] = Counter()
        async with _maintaining(dsn, connection, leaves, done) as work:
            for state, slices in pairs.items():
                done.clear()
                async with _transaction(dsn, held=state == "a transaction open"):
                    for n in range(slices):
                        for phase in ("without", "with"):
                            bench.tell(f"maintenance {where}: {state}, {phase}, {n + 1} of {slices}")
                            doing = asyncio.create_task(work.run(size.slice_s)) if phase == "with" else None
                            committed = await producers.open_loop(RATE, size.slice_s, range(100))
                            pooled.setdefault(f"{state}, {phase} maintenance", Histogram()).merge([committed.waited])
                            if doing is not None:
                                await doing
                work_done.add(state, **{name: float(count) for name, count in sorted(done.items())})
    await connection.close()
    for row, histogram in pooled.items():
        table.add(row, inserts=histogram.total, **histogram.figures())
    result.tables += [table, work_done]
    for state in pairs:
        result.goals += table.goal(
            f"p99 of an insert: with maintenance ÷ without, {state}, {where}",
            "p99_ms", f"{state}, with maintenance", "≤", 2, over=f"{state}, without maintenance",
        )  # fmt: skip
    lines = {row: histogram.curve() for row, histogram in pooled.items()}
    name = f"maintenance-{len(result.plots) + 1}"
    result.plots.append(
        Plot(name, f"Inserts beside maintenance, {where}", "one insert in …", "ms", lines, log_x=True, log_y=True)
    )


async def _fill(connection: asyncpg.Connection, dsn: str, leaves: list[Span], size: Size) -> None:
    """Make narrow leaves, fill them, and let the next id be above them."""
    partitions = PgPartitions(dsn, timeout_s=60)
    cuts = [leaf.low for leaf in leaves] + [leaves[-1].high, 1_000_000]
    for parent in PARENTS:
        assert await partitions.recut(parent, Span(FIRST, 1_000_000), cuts)
    await partitions.close()
    for leaf in leaves:
        await connection.execute("SELECT setval('webhook.outbox_id_seq', $1)", leaf.low)
        await connection.execute(
            "WITH made AS (INSERT INTO webhook.outbox (account_id, type, payload) "
            "SELECT 'acct_' || n % 100, 'message.delivered', $2::text::json FROM generate_series(1, $1::integer) AS n RETURNING id) "
            "INSERT INTO webhook.attempt SELECT id, 1, now(), 0, 1000, 1, 200 FROM made",
            size.leaf_events, load.payload(LEAF_PAYLOAD_BYTES),
        )  # fmt: skip
    await connection.execute("SELECT setval('webhook.outbox_id_seq', $1)", leaves[-1].high)
    await connection.execute("CHECKPOINT")
    os.sync()  # what was filled is not to be written while others are measured


@contextlib.asynccontextmanager
async def _maintaining(
    dsn: str, connection: asyncpg.Connection, leaves: list[Span], done: Counter[str]
) -> AsyncIterator["_Work"]:
    partitions = PgPartitions(dsn, timeout_s=60)
    try:
        yield _Work(partitions, connection, leaves, done)
    finally:
        await partitions.close()


class _Work:
    """What the janitor does, without its patience."""

    def __init__(
        self, partitions: PgPartitions, connection: asyncpg.Connection, leaves: list[Span], done: Counter[str]
    ) -> None:
        self._partitions = partitions
        self._connection = connection
        self._leaves = leaves
        self._done = done
        self._shells: list[Span] = []
        self._wide: list[Span] = []

    async def run(self, seconds: float) -> None:
        """Work for so long, at even distances."""
        epoch = await self._connection.fetchval("SELECT epoch FROM webhook.checkpoint")
        steps = ["expire"] * EMPTIED + ["attach", "divide"] + ["drop"] * 2 * EMPTIED
        random.Random(2).shuffle(steps)
        began = time.perf_counter()
        for n, step in enumerate(steps):
            await asyncio.sleep(max(0.0, began + (n + 0.5) * seconds / len(steps) - time.perf_counter()))
            if step == "expire":
                await self._expire(epoch)
            elif step == "attach":
                await self._attach()
            elif step == "divide":
                await self._divide()
            elif self._shells:
                await self._drop()

    async def _expire(self, epoch: int) -> None:
        expired = await self._partitions.expire(epoch, self._leaves[0])
        self._note("emptied", had=expired is not None)
        if expired is not None:
            self._done["freed_mb"] += round(expired.freed_bytes / 1e6)
            self._shells.append(self._leaves.pop(0))

    async def _attach(self) -> None:
        end = (await self._partitions.shape()).outbox.leaves[-1].high  # the service adds its own
        leaf = Span(end, end + 1_000)
        had = all([await self._partitions.attach(parent, leaf) for parent in PARENTS])
        self._note("attached", had=had)
        if had:
            self._wide.append(leaf)

    async def _divide(self) -> None:
        if self._wide:
            leaf = self._wide[0]
            had = await self._partitions.recut("outbox", leaf, [leaf.low, leaf.low + 500, leaf.high])
            self._note("divided", had=had)
            if had:
                self._wide.pop(0)

    async def _drop(self) -> None:
        try:
            had = await self._partitions.recut("outbox", self._shells[0], ())
        except RefusedError:
            had = True  # the service was faster
        self._note("dropped", had=had)
        if had:
            self._shells.pop(0)

    def _note(self, what: str, *, had: bool) -> None:
        self._done[what if had else f"{what}_not_now"] += 1


@contextlib.asynccontextmanager
async def _transaction(dsn: str, *, held: bool) -> AsyncIterator[None]:
    """Hold a producer's transaction open, if asked."""
    if not held:
        yield
        return
    producer = await asyncpg.connect(dsn)
    try:
        await producer.execute("BEGIN")
        await producer.execute(load.OUTBOX.rows, [0], ["{}"])
        yield
        await producer.execute("COMMIT")
    finally:
        await producer.close()


SCENARIO = Scenario(
    "maintenance",
    shows="What producers notice of partitions being made, emptied, divided and dropped: an insert's time with and "
    "without, also beside a transaction that is open all the while.",
    misleads="it is thousands of times as dense as in a service's life; on a real disk most of an insert's time is the "
    "flush, which truncating and dropping keep busy too, so the server that doesn't flush tells what locks and"
    " work cost; there the dispatcher and the producers share the cores with it.",
    sizes=SIZES,
    run=run,
)
