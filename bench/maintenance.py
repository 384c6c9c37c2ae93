"""Maintenance: what producers notice while partitions are made, emptied and dropped, with and without a transaction of theirs open throughout.

Slices of 15 s, in turn without and with maintenance, so that both meet the same moods of the disk; then the same again
while a producer that has inserted holds its transaction open from the first slice to the last. Producers commit single
rows at Poisson instants; a wait is counted from the instant at which the row was due (no coordinated omission).
Maintenance is far denser than it ever is: in each of its slices two leaves of 10,000 events of 2 kB are emptied with their
attempts, four shells are dropped, a pair of leaves is attached and one is divided; the service does each of these about
once a day. A dispatcher runs, reading the log. Misleading when: the disk's flushes, which most of a commit's time goes to,
differ from slice to slice; the ratio is of all slices' waits together.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from bench import rig
from dispatcher.domain.retention import Span
from dispatcher.ports import Parent, RefusedError
from dispatcher.store.partitions import PgPartitions

PRODUCERS = 8
RATE = 500.0
EVENTS = 10_000  # in a leaf that is emptied
WIDTH = 15_000
FIRST = 100_000  # where the leaves that are emptied begin
SLICE_S = 15.0
EMPTIED = 2  # in a slice with maintenance
SLICES_MAX = 24  # with maintenance; more would be so many leaves that their number is what is measured
INSERT = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ($1, 'message.delivered', $2)"
PARENTS: tuple[Parent, ...] = ("attempt", "outbox")


async def run(*, held_s: float, progress: Any) -> dict[str, Any]:
    """Return percentiles of an insert's time in ms by kind of slice, and what maintenance did meanwhile.

    `held_s`: how long the transaction is held; without one it is a fifth of that.
    """
    pairs = {"quiet": max(1, round(held_s / SLICE_S / 10)), "held": max(1, round(held_s / SLICE_S / 2))}
    if sum(pairs.values()) > SLICES_MAX:
        raise ValueError(f"the transaction can be held for {SLICES_MAX * 2 * SLICE_S * 5 / 6:.0f} s at most")
    waits: defaultdict[str, list[float]] = defaultdict(list)
    done: Counter[str] = Counter()
    freed = {"quiet": 0, "held": 0}
    with rig.postgres() as (dsn, _):
        connection = await rig.install(dsn, endpoints=0, port=1, in_flight=1)
        leaves = [Span(FIRST + n * WIDTH, FIRST + (n + 1) * WIDTH) for n in range(EMPTIED * sum(pairs.values()))]
        progress(f"maintenance: filling {len(leaves)} leaves")
        await _fill(connection, dsn, leaves)
        async with rig.dispatcher(dsn, connection):
            last_id = await connection.fetchval("SELECT webhook.last_id()")
            while await connection.fetchval("SELECT position FROM webhook.checkpoint") < last_id:
                await asyncio.sleep(0.1)
            producers = [await asyncpg.connect(dsn) for _ in range(PRODUCERS)]
            await _produce(producers, 3.0)  # connections, caches
            work = _Work(dsn, connection, leaves, done)
            for held, slices in pairs.items():
                async with _transaction(dsn, held=held == "held"):
                    for n in range(slices):
                        for phase in ("without", "with"):
                            progress(f"maintenance: {held}, {phase}, {n + 1} of {slices}")
                            doing = asyncio.create_task(work.run(SLICE_S)) if phase == "with" else None
                            waits[f"{held}_{phase}"] += await _produce(producers, SLICE_S)
                            if doing is not None:
                                freed[held] += await doing
            await work.close()
            for producer in producers:
                await producer.close()
        await connection.close()
    figures = {
        f"{phase}_{name}_ms": _percentile(sorted(values), share)
        for phase, values in waits.items()
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))
    }
    return {
        "scenario": "maintenance",
        "rate_per_s": RATE,
        "held_s": pairs["held"] * 2 * SLICE_S,
        "inserts": sum(map(len, waits.values())),
        **figures,
        "ratio_p99": figures["quiet_with_p99_ms"] / figures["quiet_without_p99_ms"],
        "ratio_p99_held": figures["held_with_p99_ms"] / figures["held_without_p99_ms"],
        "freed_mb": freed["quiet"] / 1e6,
        "freed_held_mb": freed["held"] / 1e6,
        **{name: float(count) for name, count in sorted(done.items())},
    }


async def _fill(connection: Any, dsn: str, leaves: list[Span]) -> None:
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
            EVENTS, '{"text":"' + "x" * 2_000 + '"}',
        )  # fmt: skip
    await connection.execute("SELECT setval('webhook.outbox_id_seq', $1)", leaves[-1].high)
    await connection.execute("CHECKPOINT")
    os.sync()  # what was filled is not to be written while others are measured


class _Work:
    """What the janitor does, without its patience."""

    def __init__(self, dsn: str, connection: Any, leaves: list[Span], done: Counter[str]) -> None:
        self._partitions = PgPartitions(dsn, timeout_s=60)
        self._connection = connection
        self._leaves = leaves
        self._done = done
        self._shells: list[Span] = []
        self._wide: list[Span] = []
        self._freed = 0

    async def run(self, seconds: float) -> int:
        """Work for so long, at even distances; return the bytes freed."""
        epoch = await self._connection.fetchval("SELECT epoch FROM webhook.checkpoint")
        self._freed = 0
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
        return self._freed

    async def _expire(self, epoch: int) -> None:
        expired = await self._partitions.expire(epoch, self._leaves[0])
        self._note("emptied", had=expired is not None)
        if expired is not None:
            self._freed += expired.freed_bytes
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

    async def close(self) -> None:
        await self._partitions.close()


@contextlib.asynccontextmanager
async def _transaction(dsn: str, *, held: bool) -> AsyncIterator[None]:
    """Hold a producer's transaction open, if asked."""
    if not held:
        yield
        return
    producer = await asyncpg.connect(dsn)
    try:
        await producer.execute("BEGIN")
        await producer.execute(INSERT, "acct_0", "{}")
        yield
        await producer.execute("COMMIT")
    finally:
        await producer.close()


async def _produce(producers: list[Any], seconds: float) -> list[float]:
    """Commit single rows at Poisson instants; return how long after its instant each was acknowledged, in ms."""
    rng = random.Random(1)
    waits: list[float] = []
    free: asyncio.Queue[Any] = asyncio.Queue()
    for producer in producers:
        free.put_nowait(producer)

    async def commit(n: int, due: float) -> None:
        producer = await free.get()
        await producer.execute(INSERT, f"acct_{n % 100}", '{"text":"' + "x" * 380 + '"}')
        waits.append((time.perf_counter() - due) * 1e3)
        free.put_nowait(producer)

    began, at, n = time.perf_counter(), 0.0, 0
    async with asyncio.TaskGroup() as tasks:
        while at < seconds:
            at += rng.expovariate(RATE)
            wait = began + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(commit(n, began + at))
            n += 1
    return waits


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
