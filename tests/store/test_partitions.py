"""What the janitor may rely on in its port: one suite, held against PostgreSQL and against the twin; and what only PostgreSQL does."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from dispatcher import settings as settings_module
from dispatcher.domain.endpoint import FOREVER
from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.retention import DAY_S, MARGIN_IDS, Span
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.janitor import Janitor
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.provision import Provisioner
from dispatcher.errors import DatabaseRefusedError, InputError
from dispatcher.ports import (
    AttemptRow,
    Batch,
    CheckpointWrite,
    DeadRow,
    FencedError,
    LaneRow,
    LifeLostError,
    Parent,
    Partitions,
    RefusedError,
    RetryRow,
    StatRow,
    Store,
)
from dispatcher.settings import Settings
from dispatcher.store.embedded import EmbeddedServer
from dispatcher.store.memory_partitions import MemoryPartitions
from dispatcher.store.migrate import check, migrate
from dispatcher.store.partitions import PgPartitions
from tests.conftest import connected, dsn_of
from tests.engine.build import LIMITS, check_bounds
from tests.store.worlds import HUGE, MANY, ORIGIN, SETTINGS, MemoryWorld, PgWorld, World, same_json

NOW = 1_700_000_000_000_000
FIRST = [Span(0, 100_000), Span(100_000, 1_000_000), Span(1_000_000, 10_000_000), Span(10_000_000, 40_000_000)]
END = 40_000_000
PARENTS: tuple[Parent, ...] = ("attempt", "outbox")

_databases = 0


@pytest.fixture
async def dsn(server: EmbeddedServer, template: str) -> AsyncIterator[str]:
    """A database of its own: here the tables themselves change."""
    global _databases
    _databases += 1
    name = f"test_partitions_{_databases}"
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield dsn_of(server.dsn, name)
    async with connected(server.dsn) as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def partitions(world: World, store: Store) -> AsyncIterator[Partitions]:
    made: Partitions
    if isinstance(world, PgWorld):
        made = PgPartitions(world.dsn, timeout_s=10)
    else:
        made = MemoryPartitions(cast(MemoryWorld, world).database, cast(Any, store))
    await made.begin()
    yield made
    await made.close()


async def skip_to(world: World, last_id: int) -> None:
    """Let `last_id` be the last id handed out."""
    if isinstance(world, PgWorld):
        await (await world.db()).execute("SELECT setval('webhook.outbox_id_seq', $1)", last_id)
    else:
        cast(MemoryWorld, world).database._sequence = last_id


async def discards(world: World) -> list[tuple[Any, ...]]:
    if isinstance(world, PgWorld):
        return await world._rows(
            "SELECT endpoint_id, reason, after_id, upto_id, deliveries FROM webhook.discard ORDER BY id"
        )
    return list(cast(MemoryWorld, world).database.tables.discards)


async def all_ids(store: Store) -> list[int]:
    page = await store.head(0, MANY, HUGE, [], attempted=False)
    return [event.id for event in page.events]


def checkpoint(position: int, **parts: Any) -> CheckpointWrite:
    return CheckpointWrite(**{"position": position, "gaps": IdRanges(), "lanes": [], "lanes_gone": [], "taken_up": []} | parts)  # fmt: skip


async def settle(store: Store, position: int, **parts: Any) -> None:
    await store.record(Batch(1, checkpoint=checkpoint(position, **parts)))


def delivered(event_id: int, endpoint_id: int, run: int = 0) -> AttemptRow:
    return AttemptRow(event_id, endpoint_id, run, 1, NOW, 1, 204, None, None)


def failed(event_id: int, endpoint_id: int, run: int = 0) -> AttemptRow:
    return AttemptRow(event_id, endpoint_id, run, 1, NOW, 1, 500, Fault.STATUS, None)


def retry(event_id: int, endpoint_id: int, run: int = 0) -> RetryRow:
    return RetryRow(endpoint_id, event_id, run, 2, NOW, NOW, "HTTP 500")


# ── the shape ──


async def test_a_new_log(world: World, store: Store, partitions: Partitions) -> None:
    shape = await partitions.shape()
    for parent in PARENTS:
        assert (shape.of(parent).leaves, shape.of(parent).outside, shape.of(parent).fence) == (FIRST, [], None)
    assert (shape.position, shape.gaps, shape.last_id) == (0, IdRanges(), 0)
    assert shape.wall_us > NOW - 1
    assert await partitions.newest_us(FIRST[0]) == (None, None)
    assert await partitions.first_id_since(0, 0, 10) is None


async def test_the_shape_of_a_log_in_use(world: World, store: Store, partitions: Partitions) -> None:
    await world.insert(3)
    await skip_to(world, END + 5)
    await world.insert()
    await store.record(Batch(1, attempts=[delivered(2, 1), delivered(END + 6, 1)]))
    await settle(store, 2, gaps=IdRanges([(1, 1)]))
    shape = await partitions.shape()
    assert (shape.position, shape.gaps, shape.last_id) == (2, IdRanges([(1, 1)]), END + 6)
    assert shape.outbox.outside == shape.attempt.outside == [Span(END, FOREVER)]
    event_us, attempt_us = await partitions.newest_us(FIRST[0])
    assert attempt_us == NOW
    assert event_us is not None
    assert await partitions.newest_us(FIRST[1]) == (None, None)
    assert await partitions.total_bytes() > 0


async def test_the_first_event_since(world: World, store: Store, partitions: Partitions) -> None:
    for _ in range(6):
        await world.insert(2)
        await skip_to(world, (await partitions.shape()).last_id + 3)
    page = await store.head(0, MANY, HUGE, [], attempted=False)
    times = [(event.created_us, event.id) for event in page.events]
    assert await partitions.first_id_since(0, 0, 99) == (times[0][1], times[0][0])
    for created_us, _ in times:
        expected = min(event_id for us, event_id in times if us >= created_us)
        assert await partitions.first_id_since(created_us, 0, 99) == (expected, created_us)
    assert await partitions.first_id_since(times[-1][0] + 1, 0, 99) is None
    assert await partitions.first_id_since(0, times[0][1], 99) == (times[1][1], times[1][0])
    assert await partitions.first_id_since(times[-1][0], 0, times[3][1]) is None


# ── ahead ──


async def test_a_leaf_is_attached_ahead(world: World, store: Store, partitions: Partitions) -> None:
    leaf = Span(END, END + 10)
    async with world.begin() as producer:
        await producer.insert()
        for parent in PARENTS:
            assert await partitions.attach(parent, leaf)  # its open transaction is not in the way
    shape = await partitions.shape()
    assert shape.outbox.leaves == shape.attempt.leaves == [*FIRST, leaf]
    await skip_to(world, END)
    await world.insert(9)
    await store.record(Batch(1, attempts=[delivered(END + 1, 1)]))
    shape = await partitions.shape()
    assert shape.outbox.outside == shape.attempt.outside == []
    await world.insert()
    assert (await partitions.shape()).outbox.outside == [Span(END + 10, FOREVER)]
    assert await all_ids(store) == [1, *range(END + 1, END + 11)]


async def test_a_leaf_near_the_last_id_waits_for_running_statements(
    world: World, store: Store, partitions: Partitions
) -> None:
    leaf = Span(END, END + 10)
    await skip_to(world, END - MARGIN_IDS)
    async with world.begin() as producer:
        await producer.insert()
        assert not await partitions.attach("outbox", leaf)
        assert await partitions.attach("attempt", leaf)  # nobody but the dispatcher writes there
    assert await partitions.attach("outbox", leaf)


async def test_a_leaf_is_not_attached_over_others_or_what_was_handed_out(
    world: World, store: Store, partitions: Partitions
) -> None:
    with pytest.raises(RefusedError):
        await partitions.attach("outbox", Span(END - 1, END + 10))
    await skip_to(world, END)
    for parent in PARENTS:
        with pytest.raises(RefusedError):
            await partitions.attach(parent, Span(END, END + 10))


# ── dividing and dropping ──


async def test_an_unused_leaf_is_divided(world: World, store: Store, partitions: Partitions) -> None:
    cuts = [100_000, 110_000, 120_000, 1_000_000]
    async with world.begin() as producer:
        await producer.insert()
        assert not await partitions.recut("outbox", FIRST[1], cuts)
        assert await partitions.recut("attempt", FIRST[1], cuts)
    assert await partitions.recut("outbox", FIRST[1], cuts)
    shape = await partitions.shape()
    divided = [FIRST[0], Span(100_000, 110_000), Span(110_000, 120_000), Span(120_000, 1_000_000), *FIRST[2:]]
    assert shape.outbox.leaves == shape.attempt.leaves == divided
    await skip_to(world, 109_999)
    await world.insert()
    assert (await partitions.newest_us(divided[2]))[0] is not None
    assert (await partitions.shape()).outbox.outside == []


@pytest.mark.parametrize("cuts", [[100_000, 500_000], [100_001, 1_000_000], [100_000, 2, 1_000_000], [100_000, 100_000, 1_000_000]])  # fmt: skip
async def test_cuts_must_fit(world: World, store: Store, partitions: Partitions, cuts: list[int]) -> None:
    with pytest.raises(RefusedError):
        await partitions.recut("outbox", FIRST[1], cuts)
    assert (await partitions.shape()).outbox.leaves == FIRST


async def test_a_leaf_in_use_is_not_divided(world: World, store: Store, partitions: Partitions) -> None:
    await skip_to(world, 100_000)
    with pytest.raises(RefusedError):
        await partitions.recut("outbox", FIRST[1], [100_000, 200_000, 1_000_000])
    with pytest.raises(RefusedError):
        await partitions.recut("outbox", Span(5, 10), [5, 6, 10])


async def test_a_shell_is_dropped_once_it_is_settled(world: World, store: Store, partitions: Partitions) -> None:
    leaf = FIRST[1]
    await skip_to(world, 1_000_005)
    for position, gaps in ((999_998, []), (1_000_005, [(999_999, 1_000_001)]), (1_000_005, [(100_000, 100_000)])):
        await settle(store, position, gaps=IdRanges(gaps))
        with pytest.raises(RefusedError):
            await partitions.recut("outbox", leaf, ())
    await settle(store, 999_999, gaps=IdRanges([(99_999, 99_999)]))
    with pytest.raises(RefusedError):
        await partitions.recut("attempt", leaf, ())  # the events' leaf is there
    async with world.begin() as producer:
        await producer.insert()
        assert not await partitions.recut("outbox", leaf, ())
    assert await partitions.recut("outbox", leaf, ())
    assert (await partitions.shape()).outbox.leaves == [FIRST[0], *FIRST[2:]]
    with pytest.raises(RefusedError):
        await partitions.recut("attempt", leaf, ())  # it would be joined to one whose events are there
    await settle(store, 1_000_005)
    assert await partitions.recut("outbox", FIRST[0], ())
    assert await partitions.recut("attempt", leaf, ())
    shape = await partitions.shape()
    assert (shape.outbox.leaves, shape.attempt.leaves) == (FIRST[2:], [Span(0, 1_000_000), *FIRST[2:]])
    with pytest.raises(RefusedError):
        await partitions.recut("attempt", Span(0, 1_000_000), ())  # nothing is below it


async def test_a_leaf_with_rows_is_not_dropped(world: World, store: Store, partitions: Partitions) -> None:
    await world.insert()
    await store.record(Batch(1, attempts=[delivered(100_001, 1)]))
    await skip_to(world, 1_000_005)
    await settle(store, 1_000_005)
    with pytest.raises(RefusedError):
        await partitions.recut("outbox", FIRST[0], ())
    assert await partitions.recut("outbox", FIRST[1], ())
    with pytest.raises(RefusedError):
        await partitions.recut("attempt", FIRST[1], ())
    assert len(await world.attempts()) == 1


async def test_attempts_of_events_that_are_gone_find_a_place(
    world: World, store: Store, partitions: Partitions
) -> None:
    """A dead letter is resent long after its event's leaf was dropped."""
    await skip_to(world, 1_000_005)
    await settle(store, 1_000_005)
    for leaf in FIRST[:2]:
        assert await partitions.recut("outbox", leaf, ())
    assert await partitions.recut("attempt", FIRST[1], ())
    await store.record(Batch(1, attempts=[delivered(5, 1, run=3), delivered(100_001, 1, run=3)]))
    assert (await partitions.shape()).attempt.outside == []
    assert len(await world.attempts()) == 2
    assert await partitions.sweep_attempts(1_000_000, NOW, 10) == 0  # they began then, not before
    assert await partitions.sweep_attempts(100_000, NOW + 1, 10) == 1
    assert [row.event_id for row in await world.attempts()] == [100_001]
    assert await partitions.sweep_attempts(1_000_000, NOW + 1, 10) == 1


# ── adopting the DEFAULT partition ──


async def adopt(partitions: Partitions, parent: Parent, leaf: Span, *steps: str | None) -> None:
    for step in steps:
        assert await partitions.adopt(parent, leaf) == step


async def test_the_default_partition_becomes_a_leaf(world: World, store: Store, partitions: Partitions) -> None:
    await skip_to(world, END)
    ids = await world.insert(5)
    await store.record(Batch(1, attempts=[delivered(ids[0], 1)]))
    leaf, above = Span(END, END + 500_000), Span(END + 500_000, END + 600_000)
    for parent in PARENTS:
        await adopt(partitions, parent, leaf, "fenced", "validated")
        assert (await partitions.shape()).of(parent).fence == leaf
        assert await partitions.attach(parent, above)
    ids += await world.insert(2)
    assert await all_ids(store) == ids
    for parent in PARENTS:
        await adopt(partitions, parent, leaf, "adopted")
        with pytest.raises(RefusedError):
            await partitions.adopt(parent, leaf)
        table = (await partitions.shape()).of(parent)
        assert (table.leaves, table.outside, table.fence) == ([*FIRST, leaf, above], [], None)
    ids += await world.insert(2)
    await store.record(Batch(1, attempts=[delivered(ids[-1], 1)]))
    assert await all_ids(store) == ids
    assert len(await world.attempts()) == 2
    await skip_to(world, END + 700_000)
    await world.insert()  # the new DEFAULT partition takes what no leaf does
    assert (await partitions.shape()).outbox.outside == [Span(above.high, FOREVER)]


async def test_adoption_waits_for_open_transactions_where_it_must(
    world: World, store: Store, partitions: Partitions
) -> None:
    await skip_to(world, END)
    await world.insert()
    leaf = Span(END, END + 500_000)
    async with world.begin() as producer:
        await producer.insert()
        await adopt(partitions, "outbox", leaf, None)  # it has written to the DEFAULT partition
    await adopt(partitions, "outbox", leaf, "fenced")
    async with world.begin() as producer:
        [late] = await producer.insert()
        await adopt(partitions, "outbox", leaf, "validated", None)
    await adopt(partitions, "outbox", leaf, "adopted")
    assert late in await all_ids(store)


async def test_a_fence_is_taken_back_before_ids_come_to_it(world: World, store: Store, partitions: Partitions) -> None:
    await skip_to(world, END)
    await world.insert()
    leaf = Span(END, END + 200_000)
    await adopt(partitions, "outbox", leaf, "fenced")
    await skip_to(world, END + 100_001)
    await adopt(partitions, "outbox", leaf, "unfenced")
    assert (await partitions.shape()).outbox.fence is None
    await skip_to(world, END + 300_000)
    await world.insert()
    with pytest.raises(RefusedError):
        await partitions.adopt("outbox", leaf)  # too near
    # … unless what comes next has its leaf.
    await adopt(partitions, "outbox", Span(END, END + 900_000), "fenced", "validated")
    assert await partitions.attach("outbox", Span(END + 900_000, END + 950_000))
    await skip_to(world, END + 899_999)
    await world.insert(3)
    await adopt(partitions, "outbox", leaf, "adopted")
    assert (await partitions.shape()).outbox.outside == []


async def test_rows_between_two_leaves_are_adopted_too(world: World, store: Store, partitions: Partitions) -> None:
    above = Span(END + 200_000, END + 300_000)
    assert await partitions.attach("outbox", above)
    await skip_to(world, END)
    await world.insert()
    hole = Span(END, END + 200_000)
    assert (await partitions.shape()).outbox.outside == [hole]
    await adopt(partitions, "outbox", hole, "fenced", "validated", "adopted")
    assert (await partitions.shape()).outbox.leaves == [*FIRST, hole, above]
    await skip_to(world, END + 400_000)
    await world.insert()
    with pytest.raises(RefusedError):  # a leaf is there
        await partitions.adopt("outbox", Span(END + 250_000, END + 700_000))


async def test_a_fence_that_does_not_hold_is_taken_back(world: World, store: Store, partitions: Partitions) -> None:
    await skip_to(world, END)
    await world.insert()
    await skip_to(world, END + 500_000)
    await world.insert()
    await adopt(partitions, "outbox", Span(END + 100, END + 900_000), "below")
    assert await partitions.attach("outbox", Span(END + 700_000, END + 800_000))
    await adopt(partitions, "outbox", Span(END, END + 700_000), "fenced", "validated", "adopted")


# ── expiring ──


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("beyond", [-50_000, 50_000])
async def test_what_was_begun_for_attempts_only_goes_with_its_events(
    world: World, store: Store, partitions: Partitions, beyond: int, rows: int
) -> None:
    """The log outran its leaves, and came near a leaf that `attempt` has and `outbox` was not to be had for."""
    begun = Span(END + 5_000_000, END + 6_000_000)
    await skip_to(world, END + 4_000_000)
    assert await partitions.attach("attempt", begun)
    await skip_to(world, begun.low + beyond)
    ids = await world.insert(rows)
    await store.record(Batch(1, attempts=[delivered(event_id, 1) for event_id in ids]))
    provisioner = Provisioner(partitions, Clock(), Counters(), retention_days=7)
    for _ in range(30):
        shape = await partitions.shape()
        if not await provisioner.turn(shape):
            break
    check_bounds(shape)
    ids += await world.insert(2)
    await store.record(Batch(1, attempts=[delivered(event_id, 1) for event_id in ids[-2:]]))
    assert await all_ids(store) == ids
    leaf = next(leaf for leaf in shape.outbox.leaves if leaf.low <= ids[0] < leaf.high)
    assert leaf.low <= begun.low + min(beyond, 0) < begun.high <= leaf.high
    await settle(store, leaf.high)
    assert await partitions.expire(1, leaf) is not None
    assert await partitions.newest_us(leaf) == (None, None)


async def test_attempts_that_no_leaf_of_their_own_was_emptied_of_are_swept(
    world: World, store: Store, partitions: Partitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the bounds came to differ: a leaf of `attempt` that reaches over the log's, and rows in its DEFAULT partition."""
    await skip_to(world, END)
    assert await partitions.attach("outbox", Span(END + 1_000_000, END + 2_000_000))
    assert await partitions.attach("outbox", Span(END + 2_000_000, END + 3_000_000))
    assert await partitions.attach("attempt", Span(END + 1_500_000, END + 3_000_000))
    ids = []
    for after in (END + 1_100_000, END + 1_600_000, END + 2_100_000):
        await skip_to(world, after)
        ids += await world.insert(2)
    await store.record(Batch(1, attempts=[delivered(event_id, 1) for event_id in ids]))
    monkeypatch.setattr("dispatcher.engine.janitor.is_expired", lambda newest_us, now_us, days: True)
    now = 0.0
    clock, lanes = Clock(lambda: now), Lanes(LIMITS, Memory(1, 1))
    janitor = Janitor(partitions, lanes, clock, Counters(), Settings(), epoch=1, look=lambda lane: None)
    for gone in (4, 6):
        kept = ids[gone:]
        await settle(store, ids[-1])
        for _ in range(8):
            now += 3_600.0
            busy = await janitor.turn()
        assert not busy
        assert await all_ids(store) == kept
        assert [row.event_id for row in await world.attempts()] == kept
        await skip_to(world, END + 3_100_000 + gone)
        ids += await world.insert(2)
        await store.record(Batch(1, attempts=[delivered(event_id, 1) for event_id in ids[-2:]]))
    shape = await partitions.shape()
    oldest = min(leaf.low for leaf in shape.outbox.leaves)
    assert oldest >= END + 3_000_000
    assert len([leaf for leaf in shape.attempt.leaves if leaf.low < oldest]) == 2, "one on each side of the hole"


async def old_leaf(world: World, store: Store, count: int = 8) -> list[int]:
    """Fill the first leaf with `count` events, and go on in the second."""
    ids = await world.insert(count)
    await skip_to(world, 100_000)
    await world.insert(2)
    return ids


async def test_a_leaf_goes_with_its_attempts(world: World, store: Store, partitions: Partitions) -> None:
    ids = await old_leaf(world, store)
    endpoint = await world.add_endpoint()
    await store.record(Batch(1, attempts=[delivered(i, endpoint) for i in [*ids, 100_001]]))
    await settle(store, 100_002)
    expired = await partitions.expire(1, FIRST[0])
    assert expired is not None
    assert expired.losses == []
    assert expired.freed_bytes > 0
    assert await all_ids(store) == [100_001, 100_002]
    assert [row.event_id for row in await world.attempts()] == [100_001]
    assert await discards(world) == []
    assert await partitions.newest_us(FIRST[0]) == (None, None)
    assert (await partitions.expire(1, FIRST[0])) is not None  # again, to no effect


async def test_what_is_lost_is_counted_kept_and_told(world: World, store: Store, partitions: Partitions) -> None:
    live = await world.add_endpoint()
    paused = await world.add_endpoint()
    holed = await world.add_endpoint("message.*")
    two_patterns = await world.add_endpoint("*", "message.sent")
    gone = await world.add_endpoint()
    other = await world.add_endpoint("other.type")
    elsewhere = await world.add_endpoint(account_id="elsewhere")
    ids = await old_leaf(world, store)
    late = await world.add_endpoint()  # subscribes to what comes after
    before = {e: [s[0] for s in await world.subscriptions(e)] for e in (live, paused, holed, two_patterns)}
    taken_up = [i for subscriptions in before.values() for i in subscriptions]
    lanes = [
        LaneRow(paused, 3, IdRanges([(2, 2)]), 6),
        LaneRow(holed, 100_002, IdRanges([(4, 5)]), 0),
        LaneRow(two_patterns, 0, IdRanges(), 8),
        LaneRow(gone, 0, IdRanges(), 8),
        LaneRow(other, 0, IdRanges(), 0),
        LaneRow(elsewhere, 0, IdRanges(), 0),
        LaneRow(late, 0, IdRanges(), 0),
    ]
    attempts = [delivered(i, live) for i in ids]
    attempts += [delivered(1, paused), delivered(3, paused), failed(7, paused), failed(8, two_patterns, run=5)]
    retries = [retry(7, paused), retry(8, two_patterns, run=5), retry(1, gone), retry(100_001, live)]
    await store.record(Batch(1, attempts=attempts, retries=retries))
    await settle(store, 100_002, lanes=lanes, taken_up=taken_up)
    await world.update_endpoint(gone, state="deleted")
    expired = await partitions.expire(1, FIRST[0])
    assert expired is not None
    lost = {loss.endpoint_id: (loss.unsent, loss.retries) for loss in expired.losses}
    assert lost == {paused: (5, 1), holed: (2, 0), two_patterns: (8, 1)}  # 2, 4, 5, 6, 8 and the retry of 7
    assert all(0 < loss.first_us <= loss.last_us for loss in expired.losses)
    kept = sorted(await discards(world))
    assert kept == [(e, "expired", -1, 99_999, sum(lost[e])) for e in sorted(lost)]
    assert [(row[0], row[1]) for row in await world.retries()] == [(live, 100_001)]
    page = await store.head(100_002, MANY, HUGE, [], attempted=False)
    assert [(event.account_id, event.type) for event in page.events] == [("acct", "endpoint.events_expired")] * 3
    first = expired.losses[0]
    assert first.endpoint_id == paused
    about = {"id": paused, "name": "", "url": ORIGIN}
    told = {"endpoint": about, "deliveries": 6, "from": stamp(first.first_us), "to": stamp(first.last_us)}
    assert same_json(page.events[0].payload, told)
    again = await partitions.expire(1, FIRST[0])
    assert again is not None
    assert again.losses == []
    assert sorted(await discards(world)) == kept


def stamp(us: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(us // 1_000_000)) + f".{us // 1000 % 1000:03d}Z"


async def test_a_subscription_that_was_not_taken_up_loses_too(
    world: World, store: Store, partitions: Partitions
) -> None:
    endpoint = await world.add_endpoint()
    await old_leaf(world, store)
    await settle(store, 100_002)
    expired = await partitions.expire(1, FIRST[0])
    assert expired is not None
    assert [(loss.endpoint_id, loss.unsent) for loss in expired.losses] == [(endpoint, 8)]


async def test_only_a_settled_leaf_goes(world: World, store: Store, partitions: Partitions) -> None:
    ids = await old_leaf(world, store)
    for position, gaps in ((99_998, []), (100_002, [(5, 5)]), (100_002, [(99_999, 100_001)])):
        await settle(store, position, gaps=IdRanges(gaps))
        with pytest.raises(RefusedError):
            await partitions.expire(1, FIRST[0])
    await settle(store, 99_999, gaps=IdRanges([(100_000, 100_002)]))
    with pytest.raises(RefusedError):
        await partitions.expire(1, Span(0, 50_000))
    assert await all_ids(store) == [*ids, 100_001, 100_002]
    assert await partitions.expire(1, FIRST[0]) is not None


async def test_another_dispatcher_rules(world: World, store: Store, partitions: Partitions) -> None:
    endpoint = await world.add_endpoint()
    ids = await old_leaf(world, store)
    await settle(store, 100_002, lanes=[LaneRow(endpoint, 0, IdRanges(), 8)])
    for epoch in (0, 2):
        with pytest.raises(FencedError):
            await partitions.expire(epoch, FIRST[0])
    assert await discards(world) == []
    assert await all_ids(store) == [*ids, 100_001, 100_002]
    assert await partitions.expire(1, FIRST[0]) is not None


async def test_a_row_that_is_being_written_keeps_its_leaf(world: World, store: Store, partitions: Partitions) -> None:
    """No gap says so here: the lock on the leaf does."""
    endpoint = await world.add_endpoint()
    async with world.begin() as producer:
        await producer.insert()
        await skip_to(world, 100_000)
        await world.insert()
        await settle(store, 100_001, lanes=[LaneRow(endpoint, 0, IdRanges(), 0)])
        assert await partitions.expire(1, FIRST[0]) is None
    assert await discards(world) == []
    assert await all_ids(store) == [1, 100_001]


async def test_a_retry_goes_on_from_the_copy_that_a_dead_letter_kept(
    world: World, store: Store, partitions: Partitions
) -> None:
    endpoint = await world.add_endpoint()
    await old_leaf(world, store)
    dead = DeadRow(endpoint, 1, 0, 3, NOW, "the last", 500, Fault.STATUS)
    await store.record(Batch(1, dead=[dead], retries=[retry(1, endpoint, run=4), retry(2, endpoint, run=4)]))
    subscriptions = [s[0] for s in await world.subscriptions(endpoint)]
    await settle(store, 100_002, taken_up=subscriptions)
    assert await partitions.retrying_below(2) == [endpoint]
    assert await partitions.retrying_below(1) == []
    expired = await partitions.expire(1, FIRST[0])
    assert expired is not None
    assert [(loss.unsent, loss.retries) for loss in expired.losses] == [(0, 1)]
    assert [row[1] for row in await world.retries()] == [1]
    swept = await partitions.sweep_retries((0, 0, 0), 10)
    assert (swept.deliveries, swept.passed) == (0, (endpoint, 1, 4))


async def test_dead_letters_that_a_replay_has_not_come_to_are_open_again(
    world: World, store: Store, partitions: Partitions
) -> None:
    if not isinstance(world, PgWorld):
        pytest.skip("the twin's have no state")
    endpoint = await world.add_endpoint()
    await old_leaf(world, store)
    ids = [1, 2, 3, 100_001]
    await store.record(Batch(1, dead=[DeadRow(endpoint, i, 0, 3, NOW, "the last", 500, Fault.STATUS) for i in ids]))
    db = await world.db()
    for source in ("log", "dead_letter", "log"):
        await db.execute(
            "INSERT INTO webhook.run (endpoint_id, source, after_id, upto_id, total) VALUES ($1, $2, 0, 9, 4)",
            endpoint,
            source,
        )
    await db.execute(
        "INSERT INTO webhook.run_progress (run_id, settled, finished_at) VALUES (1, 0, NULL), (2, 0, NULL), (3, 0, now());"
        "UPDATE webhook.dead_letter SET state = 'resent', resent_run = 1;"
        "UPDATE webhook.dead_letter SET resent_run = 2 WHERE event_id = 3"
    )
    await store.record(Batch(1, attempts=[delivered(1, endpoint, run=1)]))
    await settle(store, 100_002)
    assert await partitions.expire(1, FIRST[0]) is not None
    rows = await db.fetch("SELECT event_id, state, resent_run FROM webhook.dead_letter ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        (1, "resent", 1),
        (2, "open", None),
        (3, "resent", 2),
        (100_001, "resent", 1),
    ]


# ── sweeping ──


async def test_retries_without_an_event_are_ended_page_by_page(
    world: World, store: Store, partitions: Partitions
) -> None:
    a, b, gone = [await world.add_endpoint() for _ in range(3)]
    ids = await world.insert(6)
    rows = [retry(i, endpoint) for endpoint in (a, b, gone) for i in ids]
    await store.record(Batch(1, retries=rows))
    await world.update_endpoint(gone, state="deleted")
    await world.forget_events([2, 3, 6])
    after: tuple[int, int, int] | None = (0, 0, 0)
    counts = []
    while after is not None:
        swept = await partitions.sweep_retries(after, 4)
        counts.append(swept.deliveries)
        after = swept.passed
    assert counts == [2, 2, 2, 0, 0, 0]  # 18 rows by four, the deleted endpoint's uncounted
    assert [(row[0], row[1]) for row in await world.retries()] == [(e, i) for e in (a, b, gone) for i in (1, 4, 5)]
    assert sum(row[4] for row in await discards(world)) == 6
    assert {row[:2] for row in await discards(world)} == {(a, "expired"), (b, "expired")}


# ── PostgreSQL alone ──


async def test_the_leaves_of_an_older_version_are_taken_as_they_are(server: EmbeddedServer) -> None:
    """Version 1 made four of ten million ids each, under other names."""
    name = "test_partitions_v1"
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
    dsn = dsn_of(server.dsn, name)
    partitions = PgPartitions(dsn, timeout_s=10)
    try:
        async with connected(dsn) as old:
            await old.execute((Path(__file__).parents[1] / "schemas" / "1.sql").read_text())
            await old.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
            await migrate(old, SETTINGS)
            wide = [Span(n * 10_000_000, (n + 1) * 10_000_000) for n in range(4)]
            shape = await partitions.shape()
            assert shape.outbox.leaves == shape.attempt.leaves == wide
            for parent in PARENTS:
                assert await partitions.recut(parent, wide[1], [10_000_000, 10_010_000, 20_000_000])
                assert await partitions.attach(parent, Span(END, END + 10))
            await old.execute("SELECT setval('webhook.outbox_id_seq', 10009999)")
            await old.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
            await old.execute("UPDATE webhook.checkpoint SET position = 10010000, epoch = 1")
            assert await partitions.expire(1, wide[0]) is not None
            assert await partitions.recut("outbox", wide[0], ())
            assert await old.fetchval("SELECT array_agg(id) FROM webhook.outbox") == [10_010_000]
    finally:
        await partitions.close()
        async with connected(server.dsn) as connection:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def pg(dsn: str) -> AsyncIterator[PgPartitions]:
    made = PgPartitions(dsn, timeout_s=10)
    yield made
    await made.close()


LEAF = """
SELECT 'index' AS what, pg_get_indexdef(x.indexrelid) AS is, i.inhparent::regclass::text AS of
FROM pg_index x LEFT JOIN pg_inherits i ON i.inhrelid = x.indexrelid WHERE x.indrelid = $1::text::regclass
UNION ALL SELECT 'constraint', pg_get_constraintdef(oid), conname FROM pg_constraint
WHERE conrelid = $1::text::regclass AND contype = 'c'
UNION ALL SELECT 'column', attname || attstorage::text || attnotnull::text || attidentity::text, '' FROM pg_attribute
WHERE attrelid = $1::text::regclass AND attnum > 0
"""


async def look_of(db: asyncpg.Connection, leaf: str) -> set[tuple[str, ...]]:
    rows = await db.fetch(LEAF, leaf)
    return {tuple(str(x).split(" USING")[-1].removesuffix(" NOT VALID") for x in row) for row in rows}


@pytest.mark.parametrize("parent", PARENTS)
async def test_every_leaf_is_like_the_first(dsn: str, db: asyncpg.Connection, pg: PgPartitions, parent: Parent) -> None:
    first = await look_of(db, f"webhook.{parent}_p0")
    await pg.attach(parent, Span(END, END + 10))
    assert await look_of(db, f"webhook.{parent}_p{END}") == first
    await pg.recut(parent, FIRST[3], [10_000_000, 20_000_000, END])
    assert await look_of(db, f"webhook.{parent}_p20000000") == first
    # A bound that was changed holds for what is made later, too.
    await migrate(db, settings_module.Settings(payload_bytes_max=4_096))
    await pg.attach(parent, Span(END + 10, END + 20))
    assert await look_of(db, f"webhook.{parent}_p{END + 10}") == await look_of(db, f"webhook.{parent}_p0")
    await db.execute("SELECT setval('webhook.outbox_id_seq', $1)", END + 30)
    await db.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
    await db.execute("INSERT INTO webhook.attempt VALUES ($1, 1, now(), 0, 1, 1, 200)", END + 31)
    for step in ("fenced", "validated", "adopted"):
        assert await pg.adopt(parent, Span(END + 20, END + 900_000)) == step
    assert await look_of(db, f"webhook.{parent}_p{END + 20}") == await look_of(db, f"webhook.{parent}_p0")
    assert await look_of(db, f"webhook.{parent}_default") == await look_of(db, f"webhook.{parent}_p0")


async def test_an_insert_that_runs_across_a_leaf_that_is_attached_near_it(
    dsn: str, db: asyncpg.Connection, pg: PgPartitions
) -> None:
    """It would fail, because it goes by the partitions that it saw when it began. So the attaching gives way, and later waits for none."""
    await db.execute("SELECT setval('webhook.outbox_id_seq', $1)", END - 5)
    slow = (
        "INSERT INTO webhook.outbox (account_id, type, payload) "
        "SELECT 'a' || coalesce(pg_sleep(0.02)::text, ''), 'b.c', '{}' FROM generate_series(1, 20)"
    )
    running = asyncio.create_task(db.execute(slow))
    await asyncio.sleep(0.1)
    assert not await pg.attach("outbox", Span(END, END + 1_000))
    assert await running == "INSERT 0 20"
    assert (await pg.shape()).outbox.outside == [Span(END, FOREVER)]


async def test_nobody_waits_behind_a_try_while_a_producers_transaction_is_open(
    dsn: str, db: asyncpg.Connection, pg: PgPartitions
) -> None:
    """Without the look before it, each try would hold up every insert for its 20 ms."""
    insert = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')"
    async with connected(dsn) as holder:
        await holder.execute("BEGIN")
        await holder.execute(insert)
        trying = asyncio.create_task(_many(lambda: pg.recut("outbox", FIRST[1], [100_000, 200_000, 1_000_000]), 20))
        waits = []
        while not trying.done():
            began = time.perf_counter()
            await db.execute(insert)
            waits.append(time.perf_counter() - began)
        assert not any(await trying)
        assert not await db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        await holder.execute("ROLLBACK")
    waits.sort()
    assert len(waits) > 50
    assert waits[len(waits) // 2] < 0.02


async def _many(call: Callable[[], Any], times: int) -> list[Any]:
    return [await call() for _ in range(times)]


async def test_a_leaf_goes_under_a_producers_long_transaction(
    world: World, store: Store, partitions: Partitions, made: World
) -> None:
    await old_leaf(world, store)
    await settle(store, 100_002)
    async with world.begin() as producer:
        await producer.insert()
        assert await partitions.expire(1, FIRST[0]) is not None
        assert not await partitions.recut("outbox", FIRST[0], ())
    assert await partitions.recut("outbox", FIRST[0], ())


async def test_who_reads_the_log_for_long_keeps_the_leaf(world: World, store: Store, partitions: Partitions) -> None:
    """A dump, or a report. It fails fast, and the reader waits for it no longer than that."""
    if not isinstance(world, PgWorld):
        pytest.skip("the twin has no such readers")
    await old_leaf(world, store)
    await settle(store, 100_002)
    async with connected(world.dsn) as dump:
        await dump.execute("BEGIN")
        await dump.fetch("SELECT count(*) FROM webhook.outbox")
        began = time.perf_counter()
        assert await partitions.expire(1, FIRST[0]) is None
        assert time.perf_counter() - began < 1.0
        await dump.execute("COMMIT")
    assert await partitions.expire(1, FIRST[0]) is not None


async def test_no_other_dispatcher_begins_while_a_leaf_goes(
    dsn: str, world: World, store: Store, partitions: Partitions
) -> None:
    """expire_partition holds the checkpoint's row to the end of its transaction: who raises the epoch waits."""
    if not isinstance(world, PgWorld):
        pytest.skip("one statement at a time")
    await old_leaf(world, store)
    await settle(store, 100_002)
    async with connected(dsn) as one, connected(dsn) as two:
        await one.execute("BEGIN")
        assert await one.fetchval("SELECT webhook.expire_partition(0, 100000, 1)") is not None
        await two.execute("SET lock_timeout = '100ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await two.execute("UPDATE webhook.checkpoint SET epoch = epoch + 1")
        await one.execute("ROLLBACK")
        await two.execute("UPDATE webhook.checkpoint SET epoch = epoch + 1")
        assert await one.fetchval("SELECT webhook.expire_partition(0, 100000, 1)") is None
    assert len(await all_ids(store)) == 10


@contextlib.asynccontextmanager
async def role(dsn: str, name: str, *granted: str) -> AsyncIterator[str]:
    """A login with the granted roles' privileges and no others; its dsn."""
    async with connected(dsn) as admin:
        await admin.execute(f"CREATE ROLE {name} LOGIN")
        for other in granted:
            await admin.execute(f"GRANT {other} TO {name}")
        try:
            parts = urlsplit(dsn)
            host = parts.netloc.rpartition("@")[2]
            yield urlunsplit(parts._replace(netloc=f"{name}@{host}"))
        finally:
            await admin.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_role_that_owns_nothing_keeps_the_partitions(
    server: EmbeddedServer, world: World, store: Store
) -> None:
    if not isinstance(world, PgWorld):
        pytest.skip("the twin has no roles")
    await old_leaf(world, store)
    endpoint = await world.add_endpoint()
    await settle(store, 100_002, lanes=[LaneRow(endpoint, 0, IdRanges(), 0)])
    async with role(world.dsn, "plain_dispatcher", "webhook_dispatcher") as dsn, connected(dsn) as connection:
        assert await check(connection, SETTINGS) == []
        partitions = PgPartitions(dsn, timeout_s=10)
        try:
            await partitions.begin()
            for parent in PARENTS:
                assert await partitions.attach(parent, Span(END, END + 1_000))
                assert await partitions.recut(parent, FIRST[1 + 1], [1_000_000, 2_000_000, 10_000_000])
            assert await partitions.expire(1, FIRST[0]) is not None
            assert await partitions.recut("outbox", FIRST[0], ())
            await skip_to(world, END + 2_000)
            [event_id] = await world.insert()
            await store.record(Batch(1, attempts=[delivered(event_id, endpoint)]))
            for parent in PARENTS:
                for step in ("fenced", "validated", "adopted"):
                    assert await partitions.adopt(parent, Span(END + 1_000, END + 900_000)) == step
            shape = await partitions.shape()
            assert shape.outbox.outside == shape.attempt.outside == []
            assert await partitions.total_bytes() > 0
        finally:
            await partitions.close()
        assert await connection.fetchval("SELECT max(id) FROM webhook.outbox") == event_id
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DROP TABLE webhook.outbox_p10000000")


async def test_producers_may_do_nothing_to_partitions(dsn: str) -> None:
    async with role(dsn, "plain_producer", "webhook_producer") as producer_dsn, connected(producer_dsn) as producer:
        for call in ("attach_partition('outbox', 1000000000, 1000000001)", "recut_partition('outbox', 100000, '{}')",
                     "expire_partition(0, 100000, 1)", "adopt_default('outbox', 0, 1)"):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await producer.execute(f"SELECT webhook.{call}")


async def test_a_role_that_may_not_call_the_functions_is_told(dsn: str, db: asyncpg.Connection) -> None:
    async with role(dsn, "half_dispatcher") as half_dsn:
        await db.execute(
            "GRANT USAGE ON SCHEMA webhook TO half_dispatcher; GRANT ALL ON ALL TABLES IN SCHEMA webhook TO half_dispatcher;"
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA webhook TO half_dispatcher"
        )
        async with connected(half_dsn) as half:
            with pytest.raises(DatabaseRefusedError, match="attach_partition"):
                await check(half, SETTINGS)


async def test_retention_shorter_than_retrying_is_refused(dsn: str, db: asyncpg.Connection) -> None:
    with pytest.raises(InputError, match=r"DISPATCHER_RETENTION_DAYS \(2 days\).*DISPATCHER_RETRY_AGE_MAX_S"):
        await check(db, settings_module.Settings(retention_days=2))
    await check(db, settings_module.Settings(retention_days=2, retry_age_max_s=2 * DAY_S - 1))


@pytest.mark.parametrize(
    "call",
    [
        "attach_partition('endpoint', 1000000000, 1000000001)",
        "attach_partition('outbox', 1000000001, 1000000001)",
        "attach_partition('outbox', 0, 1000000001)",
        "recut_partition('endpoint', 0, '{}')",
        "recut_partition('outbox', 0, '{}')",
        "recut_partition('outbox', 4711, '{}')",
        "recut_partition('outbox', 100000, '{100000}')",
        "recut_partition('outbox', 100000, NULL)",
        "expire_partition(0, 100000, 0)",
        "expire_partition(0, 4711, 0)",
        "adopt_default('endpoint', 0, 1)",
    ],
)
async def test_the_functions_refuse_what_is_not_safe(db: asyncpg.Connection, call: str) -> None:
    await db.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
    with pytest.raises(asyncpg.PostgresError):
        await db.execute(f"SELECT webhook.{call}")
    assert await db.fetchval("SELECT count(*) FROM webhook.leaves() WHERE low IS NOT NULL") == 8
    assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 1


async def test_adopting_two_hundred_thousand_rows_moves_none(
    dsn: str, db: asyncpg.Connection, pg: PgPartitions
) -> None:
    await db.execute("SELECT setval('webhook.outbox_id_seq', $1)", END)
    await db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'a', 'b.c', '{}' FROM generate_series(1, 200000)"
    )
    node = await db.fetchval("SELECT pg_relation_filenode('webhook.outbox_default')")
    leaf = Span(END, END + 1_000_000)
    assert await pg.adopt("outbox", leaf) == "fenced"
    assert await pg.adopt("outbox", leaf) == "validated"
    began = time.perf_counter()
    assert await pg.adopt("outbox", leaf) == "adopted"
    assert time.perf_counter() - began < 0.5
    assert await db.fetchval(f"SELECT pg_relation_filenode('webhook.outbox_p{END}')") == node
    assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 200_000


async def test_a_server_that_lost_its_memory_is_noticed(dsn: str, db: asyncpg.Connection, pg: PgPartitions) -> None:
    await db.execute("INSERT INTO webhook.life DEFAULT VALUES")
    await pg.begin()
    await db.execute("UPDATE webhook.life SET token = gen_random_uuid()")
    await db.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'dispatcher janitor'"
    )
    with contextlib.suppress(Exception):
        await pg.shape()
    with pytest.raises(LifeLostError):
        await pg.shape()
    await pg.begin()
    await pg.shape()


async def test_dead_letters_are_kept_for_their_time(world: World, store: Store, partitions: Partitions) -> None:
    if not isinstance(world, PgWorld):
        pytest.skip("the twin's have no age")
    endpoint = await world.add_endpoint()
    ids = await world.insert(9)
    await store.record(Batch(1, dead=[DeadRow(endpoint, i, 0, 3, NOW, "the last", 500, Fault.STATUS) for i in ids]))
    db = await world.db()
    await db.execute("UPDATE webhook.dead_letter SET died_at = now() - interval '31 days' WHERE event_id <= 6")
    await db.execute(
        "UPDATE webhook.dead_letter SET state = 'resent', resent_run = 1, state_changed_at = now() - interval '1 day' WHERE event_id = 2;"
        "UPDATE webhook.dead_letter SET state = 'discarded', state_changed_at = now() - interval '31 days' WHERE event_id = 3"
    )
    month_ago_us = (await store.config_changes(0, 1)).wall_us - 30 * DAY_S * 1_000_000
    after, deleted, still_open = 0, [], 0
    while True:
        swept = await partitions.sweep_dead_letters(after, month_ago_us, 2)
        deleted.append(swept.deleted)
        still_open += swept.open
        if swept.passed is None:
            break
        after = swept.passed
    assert (deleted, still_open) == ([1, 2, 2, 0], 4)
    assert [row["event_id"] for row in await db.fetch("SELECT event_id FROM webhook.dead_letter ORDER BY 1")] == [
        2,
        7,
        8,
        9,
    ]


async def test_tests_statistics_and_runs_are_kept_for_their_time(
    world: World, store: Store, partitions: Partitions
) -> None:
    if not isinstance(world, PgWorld):
        pytest.skip("the twin's have no age")
    endpoint = await world.add_endpoint()
    db = await world.db()
    await db.execute(
        "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, started_at, duration_us, verdict, request) "
        "SELECT $1, 'x', now() - n * interval '1 day', 1, 'ok', '' FROM generate_series(9, 0, -1) AS n",
        endpoint,
    )
    runs = (
        "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, total) SELECT $1, 0, 9, 9 FROM generate_series(0, 9)"
    )
    await db.execute(runs, endpoint)
    await db.execute(
        "INSERT INTO webhook.run_progress (run_id, settled, finished_at) "
        "SELECT id, 9, CASE WHEN id < 10 THEN now() - (10 - id) * interval '1 day' END FROM webhook.run"
    )
    await db.execute(
        "INSERT INTO webhook.event_key SELECT 'acct', n::text, n, now() - n * interval '1 day' FROM generate_series(0, 9) AS n"
    )
    wall_us = (await store.config_changes(0, 1)).wall_us
    minute = wall_us // 60_000_000
    stats = [StatRow(endpoint, minute - 1_440 * n, 1, 0, 0, 5, [1]) for n in range(10)]
    await store.record(Batch(1, stats=stats))
    before_us = wall_us - int(4.5 * DAY_S * 1e6)
    swept = {
        what: [await partitions.sweep(what, before_us, 3) for _ in range(3)]
        for what in ("tests", "stats", "runs", "event_keys")
    }  # type: ignore[arg-type]
    assert swept == {what: [3, 2, 0] for what in swept}
    for table in ("test_attempt", "endpoint_stat", "run", "run_progress", "event_key"):
        assert await db.fetchval(f"SELECT count(*) FROM webhook.{table}") == 5
