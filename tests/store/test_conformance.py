"""What the engine may rely on in a Store: one suite, held against PostgreSQL and against the twin."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.shape import PLAIN, ExtraSignature
from dispatcher.ports import (
    AttemptRow,
    Batch,
    CheckpointWrite,
    DeadRow,
    FencedError,
    HeadPage,
    LaneRow,
    LifeLostError,
    Page,
    Recorded,
    RetryRow,
    Store,
    StoreAwayError,
)
from tests.rig import until
from tests.store.worlds import (
    HUGE,
    MANY,
    ORIGIN,
    SECRETS,
    URL,
    World,
    insisting,
    same_json,
    shorten_watch,
)

NOW = 1_700_000_000_000_000
HOUR_US = 3_600_000_000
SINCE = "2023-11-14T22:13:20.000Z"  # NOW, as customers are told


def ids(page: Page) -> list[int]:
    return [event.id for event in page.events]


def delivered(event_id: int, endpoint_id: int = 1, run: int = 0, number: int = 1) -> AttemptRow:
    return AttemptRow(event_id, endpoint_id, run, number, NOW, 1_234, 204, None, None)


def failed(event_id: int, endpoint_id: int = 1, run: int = 0, number: int = 1) -> AttemptRow:
    head = b"HTTP/1.1 500 \x00\xff\r\n\r\n"
    return AttemptRow(event_id, endpoint_id, run, number, NOW, 1_234, 500, Fault.STATUS, head)


def retry(event_id: int, due_us: int, endpoint_id: int = 1, run: int = 0, number: int = 2) -> RetryRow:
    return RetryRow(endpoint_id, event_id, run, number, NOW, due_us, "HTTP 500")


def checkpoint(position: int, **parts: Any) -> CheckpointWrite:
    return CheckpointWrite(**{"position": position, "gaps": IdRanges(), "lanes": [], "lanes_gone": [], "taken_up": []} | parts)  # fmt: skip


ASKED = [1, 7, 8]  # endpoints whose attempts pages are to tell


async def read(store: Store, after: int = 0, limit: int = MANY, bytes_max: int = HUGE, **options: Any) -> HeadPage:
    return await store.head(after, limit, bytes_max, **{"young": [], "attempted": False} | options)


# ── head ──


async def test_an_empty_log(store: Store) -> None:
    page = await read(store, attempted=True)
    assert (page.events, page.attempted, page.full, page.last_id) == ([], [], False, 0)
    assert (await read(store)).attempted is None


async def test_events_come_whole_and_in_order(world: World, store: Store) -> None:
    payload = '{"text":  "two  spaces, ü and \\u0041 stay"}'
    await world.insert(account_id="å", type="a.b_1", payload=payload, occurred_us=NOW)
    await world.insert(2)
    before = (await store.config_changes(0, 1)).wall_us
    page = await read(store)
    assert ids(page) == [1, 2, 3]
    assert (page.full, page.last_id) == (False, 3)
    first, second, third = page.events
    assert (first.account_id, first.type, first.payload, first.occurred_us) == ("å", "a.b_1", payload.encode(), NOW)
    assert second.occurred_us is None
    assert 0 <= before - first.created_us < 60_000_000
    assert len({event.public_id for event in page.events}) == 3
    assert all(len(event.public_id) == 36 and event.public_id.startswith(b"evt_") for event in page.events)
    [again] = (await read(store, after=2)).events
    assert again.public_id == third.public_id


@pytest.mark.parametrize(("limit", "found", "full"), [(1, 1, True), (3, 3, True), (4, 3, False)])
async def test_head_is_bounded_in_rows(world: World, store: Store, limit: int, found: int, full: bool) -> None:
    await world.insert(3)
    page = await read(store, limit=limit)
    assert (ids(page), page.full) == (list(range(1, found + 1)), full)


# Sizes as pg_column_size() tells them: a varlena's header takes 1 or 4 bytes, or none where the payload is stored outside of its row.
@pytest.mark.parametrize(
    ("length", "size"),
    [(2, 3), (126, 127), (127, 131), (1_960, 1_964), (1_961, 1_961), (100_000, 100_000)],
)
async def test_head_is_bounded_in_bytes(world: World, store: Store, length: int, size: int) -> None:
    await world.insert(3, payload='"' + "x" * (length - 2) + '"')
    for bytes_max, found in ((1, 1), (size, 1), (size + 1, 2), (2 * size, 2), (3 * size, 3)):
        page = await read(store, bytes_max=bytes_max)
        assert (ids(page), page.full) == (list(range(1, found + 1)), True), bytes_max
    page = await read(store, bytes_max=3 * size + 1)
    assert (ids(page), page.full) == ([1, 2, 3], False)


async def test_events_bear_what_their_producers_ask_for(world: World, store: Store) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await world.insert(ordering_key="k", expires_us=NOW, priority=-3, traceparent=trace)
    await world.insert(traceparent="00-4bf9\r\nx-evil: 1")
    pages = [await read(store), await store.account("acct", 0, 9, None, MANY, HUGE, ASKED)]
    pages += [*await store.holes("acct", [(1, 2)], MANY, HUGE, ASKED), *await store.probe([(1, 2)], MANY, HUGE)]
    for page in pages:
        one, other = page.events
        assert (one.ordering_key, one.expires_us, one.priority, one.traceparent) == ("k", NOW, -3, trace.encode())
        assert (other.ordering_key, other.expires_us, other.priority, other.traceparent) == (None, None, None, None)


async def test_what_has_priority_is_read_by_itself(world: World, store: Store) -> None:
    for priority in (None, 0, -1, 1, 5, 1, None):
        await world.insert(priority=priority)
    await world.insert(priority=1, account_id="other")
    await store.record(Batch(1, [delivered(4)]))
    page = await store.urgent("acct", 0, 7, MANY, HUGE, ASKED)
    assert (ids(page), [list(skip) for skip in page.attempted or ()], page.full) == ([4, 5, 6], [[1], [], []], False)
    assert (ids(await store.urgent("acct", 4, 5, MANY, HUGE, ASKED))) == [5]
    page = await store.urgent("acct", 0, 7, 2, HUGE, ASKED)
    assert (ids(page), page.full) == ([4, 5], True)
    page = await store.urgent("acct", 0, 7, MANY, 1, ASKED)
    assert (ids(page), page.full) == ([4], True)


async def test_the_next_events_of_keys_are_read(world: World, store: Store) -> None:
    for key in ("a", "b", None, "a", "a", "b"):
        await world.insert(ordering_key=key)
    await world.insert(ordering_key="a", account_id="other")
    pages = await store.keys("acct", [("b", 1), ("a", 2), ("c", 1)], 6, 2, HUGE, ASKED)
    assert [(ids(page), page.full) for page in pages] == [([2, 6], True), ([4, 5], True), ([], False)]
    pages = await store.keys("acct", [("b", 3), ("a", 5)], 5, 2, HUGE, ASKED)
    assert [(ids(page), page.full) for page in pages] == [([], False), ([5], False)]
    first, second = await store.keys("acct", [("b", 1), ("a", 1)], 6, 2, 1, ASKED)
    assert (ids(first), first.full, ids(second), second.full) == ([2], True, [], True), "cut by its bytes"


async def test_retries_tell_which_keys_they_hold(world: World, store: Store) -> None:
    await world.insert(4, ordering_key="k")
    rows = [replace(retry(n, NOW), ordering_key=f"key {n}" if n < 4 else None) for n in (1, 2, 4)]
    rows.append(replace(retry(3, NOW, run=1), ordering_key="of a run"))
    await store.record(Batch(1, [failed(n) for n in (1, 2, 4)], rows))
    assert sorted(await store.held_keys(1)) == [("key 1", 1), ("key 2", 2)]
    assert await store.held_keys(2) == []
    await store.record(Batch(1, settled_retries=[(1, 1, 0)]))
    assert await store.held_keys(1) == [("key 2", 2)]


async def test_young_ids_are_read_again_below_the_head(world: World, store: Store) -> None:
    async with world.begin() as late, world.begin() as never:
        await late.insert()
        await never.insert()
        await world.insert()
        page = await read(store)
        assert (ids(page), page.last_id) == ([3], 3)
        await late.commit()
        await never.rollback()
    await world.insert(3)
    page = await read(store, after=3, young=[1, 2])
    assert (ids(page), page.full, page.last_id) == ([1, 4, 5, 6], False, 6)
    # Rows are bounded above the head only, bytes from the lowest young id on.
    page = await read(store, after=3, limit=3, young=[1, 2])
    assert (ids(page), page.full) == ([1, 4, 5, 6], True)
    page = await read(store, after=3, bytes_max=1, young=[1, 2])
    assert (ids(page), page.full) == ([1], True)
    page = await read(store, after=6, young=[2])
    assert (ids(page), page.full) == ([], False)


async def test_last_id_counts_ids_that_nobody_sees(world: World, store: Store) -> None:
    async with world.begin() as tx:
        await tx.insert(5)
        page = await read(store)
        assert (ids(page), page.full, page.last_id) == ([], False, 5)
        await tx.rollback()
    page = await read(store)
    assert (ids(page), page.last_id) == ([], 5)


async def test_last_id_is_never_behind_its_page_and_bounds_the_next(world: World, store: Store) -> None:
    """Under a stream of commits: no id at or below the last page's last_id is missing unless its transaction was open then."""
    stop = asyncio.Event()
    done: set[int] = set()

    async def produce() -> None:
        while not stop.is_set():
            done.update(await world.insert(2))

    async with asyncio.TaskGroup() as tasks:
        producers = [tasks.create_task(produce()) for _ in range(3)]
        pages, seen, before = 0, set[int](), 0
        while len(done) < 150:
            committed = {i for i in done if i <= before}
            page = await read(store)
            seen = set(ids(page))
            assert page.last_id >= max(seen, default=0)
            assert committed <= seen
            before = page.last_id
            pages += 1
        stop.set()
        await asyncio.wait(producers)
    assert pages > 3


async def test_a_page_tells_who_attempted_in_the_original_run(world: World, store: Store) -> None:
    await world.insert(3)
    attempts = [delivered(1, 7), failed(1, 8), failed(1, 8, number=2), delivered(2, 9, run=1)]
    await store.record(Batch(1, attempts=attempts))
    page = await read(store, attempted=True)
    [probed] = await store.probe([(1, 3)], MANY, HUGE)
    [holed] = await store.holes("acct", [(1, 3)], MANY, HUGE, ASKED)
    account = await store.account("acct", 0, 3, None, MANY, HUGE, ASKED)
    for other in (page, probed, holed, account):
        assert other.attempted is not None
        assert [set(endpoints) for endpoints in other.attempted] == [{7, 8}, set(), set()]


async def test_a_page_for_some_endpoints_tells_their_attempts_only(world: World, store: Store) -> None:
    """Of an account with ten thousand, all of them were two million rows a page."""
    await world.insert(ordering_key="k", priority=1)
    await store.record(Batch(1, attempts=[delivered(1, n) for n in range(1, 10)]))
    for of in ([], [3], [4, 5, 77]):
        pages = [
            *await store.holes("acct", [(1, 1)], MANY, HUGE, of), await store.account("acct", 0, 1, None, MANY, HUGE, of),
            await store.urgent("acct", 0, 1, MANY, HUGE, of), *await store.keys("acct", [("k", 1)], 1, 2, HUGE, of),
        ]  # fmt: skip
        assert [[set(skip) for skip in page.attempted or ()] for page in pages] == [[set(of) - {77}]] * 4


# ── holders ──


async def test_holders_are_the_transactions_that_may_still_write(world: World, store: Store) -> None:
    assert await store.holders() == await store.holders()
    assert (await store.holders()).running == frozenset()
    async with world.begin() as writing, world.begin():
        await writing.insert()
        [first] = (await store.holders()).running
        async with world.begin() as another:
            await another.insert()
            assert first in (await store.holders()).running
            assert len((await store.holders()).running) == 2
        await writing.prepare("later")
    holders = await store.holders()
    assert (len(holders.running), len(holders.prepared)) == (0, 1)
    assert ids(await read(store)) == [2]
    await world.commit_prepared("later")
    assert (await store.holders()).prepared == frozenset()
    assert ids(await read(store)) == [1, 2]


# ── ranges, accounts ──


async def test_probe_reads_several_ranges(world: World, store: Store) -> None:
    await world.insert(10)
    pages = await store.probe([(2, 3), (5, 5), (9, 20), (30, 40)], MANY, HUGE)
    assert [ids(page) for page in pages] == [[2, 3], [5], [9, 10], []]
    assert [page.full for page in pages] == [False] * 4
    assert await store.probe([], MANY, HUGE) == []


async def test_a_summary_tells_who_has_what_in_ranges(world: World, store: Store) -> None:
    for account_id, event_type, priority in (
        ("a", "x.y", None), ("b", "x.y", 0), ("a", "x.y", 3), ("a", "x.z", None), ("b", "x.y", -1), ("b", "x.y", 1),
    ):  # fmt: skip
        await world.insert(account_id=account_id, type=event_type, priority=priority)
    groups = await store.summary([(2, 5), (6, 9), (20, 30)])
    assert sorted((g.account_id, g.event_type, g.events, g.urgent, g.low, g.high) for g in groups) == [
        ("a", "x.y", 1, True, 3, 3), ("a", "x.z", 1, False, 4, 4), ("b", "x.y", 3, True, 2, 6),
    ]  # fmt: skip
    assert [g.urgent for g in await store.summary([(1, 2), (4, 5)])] == [False] * 3
    assert await store.summary([]) == []
    pages = await store.probe([(1, 4), (5, 9)], MANY, HUGE, (["a", "nobody"], ["x.y"]))
    assert [ids(page) for page in pages] == [[1, 3], []]
    assert await store.probe([(1, 9)], MANY, HUGE, ([], ["x.y"])) == [Page([], [], full=False)]


async def test_ranges_share_one_bound(world: World, store: Store) -> None:
    await world.insert(10)  # payloads of 3 stored bytes
    ranges = [(2, 4), (6, 7), (9, 9)]
    for limit, bytes_max, found, full in (
        (3, HUGE, [[2, 3, 4], [], []], [True, True, True]),
        (4, HUGE, [[2, 3, 4], [6], []], [False, True, True]),
        (5, HUGE, [[2, 3, 4], [6, 7], []], [False, True, True]),
        (6, HUGE, [[2, 3, 4], [6, 7], [9]], [False, False, True]),
        (7, HUGE, [[2, 3, 4], [6, 7], [9]], [False, False, False]),
        (7, 1, [[2], [], []], [True, True, True]),
        (7, 9, [[2, 3, 4], [], []], [True, True, True]),
        (7, 10, [[2, 3, 4], [6], []], [False, True, True]),
        (7, 19, [[2, 3, 4], [6, 7], [9]], [False, False, False]),
    ):
        for pages in (
            await store.probe(ranges, limit, bytes_max),
            await store.holes("acct", ranges, limit, bytes_max, ASKED),
        ):
            assert [ids(page) for page in pages] == found, (limit, bytes_max)
            assert [page.full for page in pages] == full, (limit, bytes_max)


async def test_holes_are_read_for_one_account(world: World, store: Store) -> None:
    for account_id in ("a", "b", "a", "b", "a"):
        await world.insert(account_id=account_id)
    pages = await store.holes("a", [(1, 2), (4, 4), (5, 9)], 10, HUGE, ASKED)
    assert [ids(page) for page in pages] == [[1], [], [5]]
    assert await store.holes("a", [], 10, HUGE, ASKED) == []


async def test_account_reads_one_account_its_types_and_its_range(world: World, store: Store) -> None:
    for n in range(12):
        await world.insert(account_id="ab"[n % 2], type=("x.y", "x.z", "x.w")[n % 3])
    page = await store.account("a", 0, MANY, None, MANY, HUGE, ASKED)
    assert (ids(page), page.full) == ([1, 3, 5, 7, 9, 11], False)
    assert ids(await store.account("a", 3, 9, None, MANY, HUGE, ASKED)) == [5, 7, 9]
    assert ids(await store.account("a", 0, MANY, ["x.y"], MANY, HUGE, ASKED)) == [1, 7]
    assert ids(await store.account("a", 0, MANY, ["x.y", "x.w"], MANY, HUGE, ASKED)) == [1, 3, 7, 9]
    assert ids(await store.account("a", 0, MANY, [], MANY, HUGE, ASKED)) == []
    assert ids(await store.account("nobody", 0, MANY, None, MANY, HUGE, ASKED)) == []
    page = await store.account("a", 0, MANY, ["x.y"], 2, HUGE, ASKED)
    assert (ids(page), page.full) == ([1, 7], True)
    page = await store.account("a", 0, MANY, None, MANY, 4, ASKED)
    assert (ids(page), page.full) == ([1, 3], True)


# ── retries ──


async def test_due_retries_are_those_of_one_endpoint_oldest_first(world: World, store: Store) -> None:
    await world.insert(5)
    now = (await store.config_changes(0, 1)).wall_us
    rows = [
        retry(1, now - 1_000_000),
        retry(2, now - 3_000_000, number=4),
        retry(3, now + 2 * HOUR_US),
        retry(4, now + HOUR_US),
        retry(2, now - 2_000_000, run=1),
        retry(5, now - HOUR_US, endpoint_id=2),
    ]
    await store.record(Batch(1, retries=rows))
    page, other, nobody = await store.due_retries([(1, MANY), (2, 1), (3, MANY)], HUGE)
    assert [(r.event.id, r.run, r.number, r.first_attempt_us) for r in page.retries] == [
        (2, 0, 4, NOW),
        (2, 1, 2, NOW),
        (1, 0, 2, NOW),
    ]
    assert page.retries[0].event.payload == b"{}"
    assert (page.full, page.next_due_us) == (False, now + HOUR_US)
    assert ([(r.event.id, r.run) for r in other.retries], other.full, other.next_due_us) == ([(5, 0)], True, None)
    assert (nobody.retries, nobody.full, nobody.next_due_us) == ([], False, None)
    for limit, bytes_max, found in ((2, HUGE, 2), (3, HUGE, 3), (MANY, 1, 1), (MANY, 4, 2)):
        [page] = await store.due_retries([(1, limit)], bytes_max)
        assert (len(page.retries), page.full, page.next_due_us) == (found, True, now + HOUR_US)


async def test_pages_of_retries_are_bounded_together(world: World, store: Store) -> None:
    """Who comes after the bound is told to come again, also who has nothing."""
    await world.insert(2)
    now = (await store.config_changes(0, 1)).wall_us
    await store.record(Batch(1, retries=[retry(1, now - 2), retry(2, now - 1), retry(2, now - 1, endpoint_id=2)]))
    first, second, third = await store.due_retries([(1, MANY), (2, MANY), (3, MANY)], 4)
    assert ([r.event.id for r in first.retries], first.full) == ([1, 2], True)
    assert (second.retries, second.full, second.next_due_us) == ([], True, None)
    assert (third.retries, third.full) == ([], True)
    pages = await store.due_retries([(3, MANY), (2, MANY), (1, 1)], 7)
    assert [([r.event.id for r in page.retries], page.full) for page in pages] == [
        ([], False),
        ([2], False),
        ([1], True),
    ]


async def test_a_retry_of_an_event_that_is_gone_ends_and_keeps_no_other_from_its_turn(
    world: World, store: Store
) -> None:
    """Erased while it was in flight. A lane whose breaker is open asks for one, and found the same nothing for ever."""
    await world.insert(3)
    now = (await store.config_changes(0, 1)).wall_us
    await store.record(Batch(1, retries=[retry(1, now - 3), retry(2, now - 2), retry(3, now - 1, endpoint_id=2)]))
    await world.forget_events([1])
    first, other = await store.due_retries([(1, 1), (2, 1)], HUGE)
    assert ([r.event.id for r in first.retries], first.full) == ([], True)
    assert [r.event.id for r in other.retries] == [3]
    [second] = await store.due_retries([(1, 1)], HUGE)
    assert [r.event.id for r in second.retries] == [2]
    assert [row[:2] for row in sorted(await world.retries())] == [(1, 2), (2, 3)]


async def test_a_retry_that_becomes_due_is_never_overlooked(world: World, store: Store) -> None:
    """It is in the page, or it is what is due next."""
    await world.insert()
    for step_us in range(0, 3_000, 60):
        await store.record(Batch(1, settled_retries=[(1, 1, 0)]))
        await store.record(Batch(1, retries=[retry(1, (await store.config_changes(0, 1)).wall_us + step_us)]))
        [page] = await store.due_retries([(1, MANY)], HUGE)
        assert page.retries or page.next_due_us is not None, step_us


# ── wake-ups ──


class Bells:
    def __init__(self) -> None:
        self.doorbell = self.config = 0

    def ring_doorbell(self) -> None:
        self.doorbell += 1

    def ring_config(self) -> None:
        self.config += 1

    @contextlib.asynccontextmanager
    async def listening(self, store: Store) -> AsyncIterator["asyncio.Task[None]"]:
        before = self.config
        task = asyncio.create_task(store.listen(self.ring_doorbell, self.ring_config))
        await until(lambda: self.config > before or task.done())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_listening_begins_with_a_ring_each_for_what_was_missed(store: Store) -> None:
    bells = Bells()
    async with bells.listening(store):
        assert (bells.doorbell, bells.config) == (1, 1)


async def test_producers_ring_only_while_the_doorbell_is_armed(world: World, store: Store) -> None:
    bells = Bells()
    async with bells.listening(store):
        await world.insert()
        assert await store.arm_doorbell()
        await world.insert()
        await until(lambda: bells.doorbell == 2)
        await store.disarm_doorbell()
        await world.insert()
        assert await store.arm_doorbell()
        await world.insert()
        await until(
            lambda: bells.doorbell == 3
        )  # in the order of the commits: the silent one before would have come first
        async with world.begin() as tx:
            await tx.insert()
            await tx.rollback()
        await world.insert()
        await until(lambda: bells.doorbell == 4)


async def test_the_doorbell_is_not_armed_over_an_open_transaction_that_chose_silence(
    world: World, store: Store
) -> None:
    async with world.begin() as silent, world.begin() as prepared, world.begin() as undone:
        await silent.insert()
        assert not await store.arm_doorbell()
        await undone.savepoint()
        await undone.insert()
        await prepared.insert()
        await silent.commit()
        assert not await store.arm_doorbell()
        await undone.rollback_to()
        assert not await store.arm_doorbell()
        await prepared.prepare("silent")
        assert not await store.arm_doorbell()
        await world.commit_prepared("silent")
        assert await store.arm_doorbell()


async def test_a_lost_reader_gives_the_doorbell_back(world: World, store: Store) -> None:
    assert await store.arm_doorbell()
    await world.sever(store, "reader")
    async with world.begin() as tx:
        await tx.insert()  # silent again
        await insisting(lambda: store.config_changes(0, 1))
        assert await insisting(store.arm_doorbell) is False


async def test_configuration_changes_ring(world: World, store: Store) -> None:
    bells = Bells()
    async with bells.listening(store):
        endpoint = await world.add_endpoint()
        await until(lambda: bells.config >= 2)
        await store.note_failing({endpoint: NOW})  # not a change of configuration
        before = bells.config
        await world.update_endpoint(endpoint, timeout_ms=500)
        await until(lambda: bells.config == before + 1)
        assert bells.doorbell == 1


async def test_a_lost_listener_says_so(world: World, store: Store) -> None:
    bells = Bells()
    async with bells.listening(store) as task:
        await world.sever(store, "listener")
        with pytest.raises(StoreAwayError):
            await asyncio.wait_for(task, 5)
    async with bells.listening(store):
        await store.arm_doorbell()
        await world.insert()
        await until(lambda: bells.doorbell >= 3)


# ── recording ──


async def test_a_batch_is_recorded_whole_and_may_be_sent_again(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    [[subscription, *_]] = await world.subscriptions(endpoint)
    await world.insert(4, payload='{"n":  1}')
    await store.record(Batch(1, retries=[retry(4, NOW, endpoint)]))
    dead = DeadRow(endpoint, 3, 0, 5, NOW, "given up\x00" + "x" * 600, 500, Fault.STATUS)
    batch = Batch(
        1,
        attempts=[delivered(1, endpoint), failed(2, endpoint), failed(3, endpoint, number=5)],
        retries=[retry(2, NOW + 5_000_000, endpoint)],
        settled_retries=[(endpoint, 4, 0), (endpoint, 99, 0)],
        dead=[dead],
        checkpoint=checkpoint(4, gaps=IdRanges([(2, 2), (7, 9)]), taken_up=[subscription, 999]),
    )
    for _ in range(3):
        assert (await store.record(batch)).taken_up == [subscription]
        assert await world.attempts() == batch.attempts
        assert await world.retries() == [(endpoint, 2, 0, 2, NOW, NOW + 5_000_000, "HTTP 500")]
        [letter] = await world.dead_letters()
        assert letter[:8] == (endpoint, 3, 0, "acct", "message.sent", '{"n":  1}', 5, NOW)
        assert letter[8].startswith("given up")
        assert letter[9:] == (500, "status")
        assert [taken_up for *_, taken_up in await world.subscriptions(endpoint)] == [True]
    started = await world_restart(world, store)
    assert (started.position, started.gaps) == (4, IdRanges([(2, 2), (7, 9)]))


async def world_restart(world: World, store: Store) -> Any:
    await store.close()
    return await world.store().start("next")


async def test_rows_that_are_there_already_dont_keep_others_out(world: World, store: Store) -> None:
    await store.record(Batch(1, attempts=[delivered(2), failed(3)]))
    batch = Batch(1, attempts=[delivered(1), failed(2), delivered(3), failed(4)], retries=[retry(4, NOW)])
    assert await store.record(batch) == Recorded([], [])
    assert await world.attempts() == [delivered(1), delivered(2), failed(3), failed(4)]
    assert len(await world.retries()) == 1


async def test_an_empty_batch_and_a_heartbeat(world: World, store: Store) -> None:
    assert await store.record(Batch(1)) == Recorded([], [])
    assert await store.record(Batch(1, checkpoint=checkpoint(0))) == Recorded([], [])
    assert await world.attempts() == []


async def test_every_outcome_can_be_recorded(world: World, store: Store) -> None:
    rows = []
    for event_id, fault in enumerate(Fault, start=1):
        rows.append(AttemptRow(event_id, 1, 0, 1, NOW, 0, None, fault, None))
        rows.append(AttemptRow(event_id, 1, 0, 2, NOW, 2**31 - 1, 599, fault, b""))
    await store.record(Batch(1, attempts=rows))
    assert await world.attempts() == rows


async def test_a_retry_only_moves_on(world: World, store: Store) -> None:
    async def numbers() -> list[Any]:
        return [(row[3], row[4], row[5]) for row in await world.retries()]

    await store.record(Batch(1, retries=[retry(1, NOW + 1, number=3)]))
    await store.record(Batch(1, retries=[retry(1, NOW + 2, number=3)]))
    await store.record(Batch(1, retries=[retry(1, NOW + 3, number=2)]))
    assert await numbers() == [(3, NOW, NOW + 1)]
    later = RetryRow(1, 1, 0, 4, NOW + 77, NOW + 4, "HTTP 500")
    await store.record(Batch(1, retries=[later]))
    assert await numbers() == [(4, NOW, NOW + 4)]  # the age counts from the first attempt of all


async def test_a_dead_letter_needs_its_event(world: World, store: Store) -> None:
    [event_id] = await world.insert()
    await world.forget_events([event_id])
    await store.record(Batch(1, dead=[DeadRow(1, event_id, 0, 5, NOW, "given up", None, Fault.TIMEOUT)]))
    assert await world.dead_letters() == []


async def test_an_older_epoch_records_nothing(world: World, store: Store) -> None:
    await store.close()
    successor = world.store()
    assert (await successor.start("second")).epoch == 2
    everything = Batch(1, attempts=[delivered(1)], retries=[retry(1, NOW)], checkpoint=checkpoint(7))
    with pytest.raises(FencedError):
        await store.record(everything)
    assert await world.attempts() == []
    assert await world.retries() == []
    await successor.record(Batch(2, attempts=[delivered(1)]))
    assert await world.attempts() == [delivered(1)]


async def test_checkpoint_and_lanes_round_trip(world: World, store: Store) -> None:
    a, b, c = [await world.add_endpoint() for _ in range(3)]
    wide = IdRanges((n * 10, n * 10 + 3) for n in range(1, 1_000))
    lanes = [LaneRow(a, 5, IdRanges([(1, 1), (3, 4)]), 17), LaneRow(b, 0, IdRanges(), 0), LaneRow(c, 9_999, wide, 1)]
    await store.record(Batch(1, checkpoint=checkpoint(12, gaps=wide, lanes=lanes)))
    lanes[0].holes.add(2, 2)  # ours; what was written stays as it was
    successor = world.store()
    await store.close()
    started = await successor.start("second")
    assert (started.position, started.gaps) == (12, wide)
    assert sorted(started.lanes, key=lambda lane: lane.endpoint_id) == [
        LaneRow(a, 5, IdRanges([(1, 1), (3, 4)]), 17),
        LaneRow(b, 0, IdRanges(), 0),
        LaneRow(c, 9_999, wide, 1),
    ]
    # A mark may fall, rows go; who has none is not mentioned.
    write = checkpoint(13, lanes=[LaneRow(a, 2, IdRanges(), 3)], lanes_gone=[b, 4_711])
    await successor.record(Batch(2, checkpoint=write))
    await successor.close()
    started = await world.store().start("third")
    assert (started.position, started.gaps) == (13, IdRanges())
    assert sorted((lane.endpoint_id, lane.settled) for lane in started.lanes) == [(a, 2), (c, 9_999)]


async def test_a_subscription_that_somebody_holds_is_taken_up_later(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint("a.*", "b.*")
    [first, second] = [row[0] for row in await world.subscriptions(endpoint)]
    batch = Batch(1, checkpoint=checkpoint(0, taken_up=[first, second]))
    async with world.begin() as tx:
        await tx.touch_subscription(first)
        assert (await store.record(batch)).taken_up == [second]
    assert sorted((await store.record(batch)).taken_up) == [first, second]
    [endpoint_now] = (await world_restart(world, store)).endpoints
    assert [s.taken_up for s in endpoint_now.subscriptions] == [True, True]


# ── configuration ──


async def test_configuration_changes_are_read_by_their_number(world: World, store: Store) -> None:
    changes = await store.config_changes(0, 1)
    assert (changes.seq, changes.endpoints, changes.gone) == (0, [], [])
    await world.insert(3)
    limits = {"rate_per_s": 2.5, "rate_burst": 3, "in_flight_max": 4, "timeout_ms": 1500, "retry_schedule_s": [1, 2]}
    a = await world.add_endpoint("message.*", "link.clicked", **limits)
    b = await world.add_endpoint(account_id="other", state="draft")
    changes = await store.config_changes(0, 1)
    assert [endpoint.id for endpoint in sorted(changes.endpoints, key=lambda e: e.id)] == [a, b]
    endpoint = next(e for e in changes.endpoints if e.id == a)
    assert endpoint.account_id == "acct"
    assert endpoint.target is not None
    assert endpoint.target.url == URL
    assert endpoint.state is EndpointState.LIVE
    assert endpoint.secrets == SECRETS
    assert [(s.pattern, s.since_id, s.taken_up) for s in endpoint.subscriptions] == [
        ("message.*", 3, False),
        ("link.clicked", 3, False),
    ]
    assert not endpoint.subscriptions[0].matches("message.sent", 3)
    assert endpoint.subscriptions[0].matches("message.sent", 1 << 60)
    assert (endpoint.rate_per_s, endpoint.rate_burst, endpoint.in_flight_max) == (2.5, 3, 4)
    assert (endpoint.timeout_s, endpoint.retry_schedule_s, endpoint.failing_since_us) == (1.5, (1, 2), None)

    seq = changes.seq
    changes = await store.config_changes(seq, 1)
    assert (changes.seq, changes.endpoints, changes.gone) == (seq, [], [])
    await world.update_endpoint(a, state="paused", paused_at_id=3)
    await world.update_endpoint(b, state="deleted")
    changes = await store.config_changes(seq, 1)
    assert [(e.id, e.state) for e in changes.endpoints] == [(a, EndpointState.PAUSED)]
    assert changes.gone == [b]
    assert changes.seq > seq


async def test_a_page_of_the_head_tells_the_newest_change_that_it_saw(world: World, store: Store) -> None:
    async def seen() -> int:
        return (await store.head(0, 10, 1 << 20, (), attempted=False)).config_seq

    assert await seen() == 0
    endpoint = await world.add_endpoint()
    changed = await seen()
    assert changed == (await store.config_changes(0, 1)).seq > 0
    await world.insert(3)
    assert await seen() == changed
    await world.update_endpoint(endpoint, timeout_ms=500)
    assert (await store.head(0, 10, 1 << 20, (), attempted=True)).config_seq > changed


async def test_endpoints_are_read_again_though_nothing_changed(world: World, store: Store) -> None:
    a, b, c = [await world.add_endpoint() for _ in range(3)]
    seq = (await store.config_changes(0, 1)).seq
    changes = await store.config_changes(seq, 1, again=[a, 4_711])
    assert (changes.seq, [e.id for e in changes.endpoints], changes.gone, changes.forget) == (seq, [a], [4_711], [])
    await world.update_endpoint(b, timeout_ms=500)
    await world.update_endpoint(c, state="deleted")
    changes = await store.config_changes(seq, 1, again=[b, a])
    assert (sorted(e.id for e in changes.endpoints), changes.gone) == ([a, b], [c])
    assert changes.seq > seq


async def test_an_endpoint_whose_url_cant_be_used_is_not_gone(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint(url="http://10.0.0.1/not-allowed-here")
    changes = await store.config_changes(0, 1)
    assert [(e.id, e.target) for e in changes.endpoints] == [(endpoint, None)]
    assert changes.gone == []
    [started] = (await world_restart(world, store)).endpoints
    assert (started.id, started.target) == (endpoint, None)


async def test_a_change_is_seen_when_it_commits_with_the_bounds_of_when_it_was_made(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    seq = (await store.config_changes(0, 1)).seq
    async with world.begin() as tx:
        await tx.subscribe(endpoint, "late.*")
        await world.insert(5)
        assert (await store.config_changes(seq, 1)).endpoints == []
    [changed] = (await store.config_changes(seq, 1)).endpoints
    assert [(s.pattern, s.since_id, s.taken_up) for s in changed.subscriptions] == [
        ("*", 0, False),
        ("late.*", 0, False),
    ]


async def test_configuration_says_what_requests_are_made_of(world: World, store: Store) -> None:
    plain = await world.add_endpoint()
    shaped = await world.add_endpoint(
        body_format="payload", omit=["/a", "/b/c"], extra_signature="hex:x-sig:sha256=",
        credentials='{"bearer": "t", "headers": {"x-a": "1"}, "extra_signature_key": "hunter22"}',
    )  # fmt: skip
    changes = await store.config_changes(0, 1)
    by_id = {endpoint.id: endpoint for endpoint in changes.endpoints}
    assert by_id[plain].shape is PLAIN
    shape = by_id[shaped].shape
    assert (shape.bare, shape.pointers) == (True, ("/a", "/b/c"))
    assert shape.headers == (("x-a", "1"), ("authorization", "Bearer t"))
    assert shape.extra_signature == ExtraSignature("hex", "x-sig", "sha256=", "hunter22")
    await world.update_endpoint(plain, omit=["/a"])
    changes = await store.config_changes(changes.seq, 1)
    assert [(endpoint.id, endpoint.shape.pointers) for endpoint in changes.endpoints] == [(plain, ("/a",))]
    await world.update_endpoint(plain, omit=[], credentials='{"basic": "a:b"}')
    changes = await store.config_changes(changes.seq, 1)
    assert [endpoint.shape.headers for endpoint in changes.endpoints] == [(("authorization", "Basic YTpi"),)]


async def test_configuration_tells_that_another_rules(world: World, store: Store) -> None:
    await store.close()
    successor = world.store()
    await successor.start("second")
    with pytest.raises(FencedError):
        await store.config_changes(0, 1)
    await successor.config_changes(0, 2)


async def test_failing_since_is_noted_without_being_a_change(world: World, store: Store) -> None:
    a, b = await world.add_endpoint(), await world.add_endpoint()
    seq = (await store.config_changes(0, 1)).seq
    await store.note_failing({a: NOW, b: NOW + 1, 4_711: NOW})
    await store.note_failing({b: None})
    assert (await store.config_changes(seq, 1)).seq == seq
    started = await world_restart(world, store)
    assert {e.id: e.failing_since_us for e in started.endpoints} == {a: NOW, b: None}


async def test_notes_wait_for_nobodys_transaction(world: World, store: Store) -> None:
    a, b = await world.add_endpoint(), await world.add_endpoint()
    async with world.begin() as tx:
        await tx.touch_endpoint(a)
        with pytest.raises(StoreAwayError):
            await store.note_failing({a: NOW})
        await store.note_failing({b: NOW})
        with pytest.raises(StoreAwayError):
            await store.disable_endpoint(b, "gone", None)  # its change of configuration has its turn after the other's
        await store.config_changes(0, 1)
        await store.record(Batch(1, attempts=[delivered(1)], checkpoint=checkpoint(0)))
    await store.note_failing({a: NOW})
    await store.disable_endpoint(b, "gone", None)


async def test_an_endpoint_is_disabled_once_and_says_so_in_the_log(world: World, store: Store) -> None:
    await world.insert(2)
    endpoint = await world.add_endpoint()
    seq = (await store.config_changes(0, 1)).seq
    for _ in range(2):
        await store.disable_endpoint(endpoint, "gone", NOW)
    await store.disable_endpoint(4_711, "gone", None)
    changes = await store.config_changes(seq, 1)
    assert [(e.id, e.state) for e in changes.endpoints] == [(endpoint, EndpointState.DISABLED)]
    [event] = (await read(store, after=2)).events
    assert (event.account_id, event.type) == ("acct", "endpoint.disabled")
    about = {"id": endpoint, "name": "", "url": ORIGIN}
    told = {"endpoint": about, "reason": "gone", "failing_since": SINCE, "held_events": 0}
    assert same_json(event.payload, told)
    assert event.is_about(endpoint)


async def test_an_endpoint_is_not_told_about_itself(world: World, store: Store) -> None:
    a = await world.add_endpoint("*", "message.*")
    b = await world.add_endpoint("endpoint.*")
    await world.insert(2)
    await store.disable_endpoint(a, "gone", None)
    await world.insert(2)
    [told] = [event.id for event in (await read(store)).events if event.type == "endpoint.disabled"]
    endpoints = {endpoint.id: endpoint for endpoint in (await store.config_changes(0, 1)).endpoints}
    for event_id in range(1, 7):
        matches = [any(s.matches("endpoint.disabled", event_id) for s in endpoints[i].subscriptions) for i in (a, b)]
        assert matches == [event_id != told, True]
    # Only what could match is divided, and the new half has to be taken up.
    assert [(s.pattern, s.since_id, s.taken_up) for s in endpoints[a].subscriptions] == [
        ("*", 0, False),
        ("message.*", 0, False),
        ("*", told, False),
    ]


async def test_that_it_has_been_failing_for_long_is_told_once(world: World, store: Store) -> None:
    a, b = await world.add_endpoint(), await world.add_endpoint()
    for _ in range(2):
        await store.tell_failing(a, NOW)
    await store.tell_failing(4_711, NOW)
    [event] = (await read(store)).events
    assert (event.account_id, event.type) == ("acct", "endpoint.failing")
    about = {"id": a, "name": "", "url": ORIGIN}
    assert same_json(event.payload, {"endpoint": about, "reason": "consecutive_failures", "failing_since": SINCE})
    assert event.is_about(a)
    for _ in range(2):
        await store.tell_recovered(a, NOW)
        await store.tell_failing(a, NOW)
    types = [event.type for event in (await read(store)).events]
    assert types == ["endpoint.failing", "endpoint.recovered"] * 2 + ["endpoint.failing"]
    started = await world_restart(world, store)
    assert {e.id: (e.failing_since_us, e.failing_told) for e in started.endpoints} == {a: (NOW, True), b: (None, False)}


async def test_a_recovery_is_told_once(world: World, store: Store) -> None:
    a, b = await world.add_endpoint(), await world.add_endpoint()
    await store.tell_recovered(a, NOW)  # nothing was noted: it has been told already
    await store.tell_recovered(4_711, NOW)
    assert ids(await read(store)) == []
    await store.note_failing({a: NOW, b: NOW})
    await store.tell_recovered(a, NOW)  # nobody knows that it failed
    assert ids(await read(store)) == []
    await store.tell_failing(a, NOW)
    for _ in range(2):
        await store.tell_recovered(a, NOW)
    [_, event] = (await read(store)).events
    assert (event.account_id, event.type) == ("acct", "endpoint.recovered")
    about = {"id": a, "name": "", "url": ORIGIN}
    assert same_json(event.payload, {"endpoint": about, "reason": "delivered", "failing_since": SINCE})
    assert event.is_about(a)
    assert not event.is_about(b)
    endpoints = {endpoint.id: endpoint for endpoint in (await store.config_changes(0, 1)).endpoints}
    assert {i: endpoints[i].failing_since_us for i in (a, b)} == {a: None, b: NOW}
    wanted = {i: any(s.matches(event.type, event.id) for s in endpoints[i].subscriptions) for i in (a, b)}
    assert wanted == {a: False, b: True}


@pytest.mark.parametrize("state", ["paused", "draft", "disabled", "deleted"])
async def test_only_a_live_endpoint_recovers(world: World, store: Store, state: str) -> None:
    endpoint = await world.add_endpoint(state=state, paused_at_id=0)
    await store.note_failing({endpoint: NOW})
    await store.tell_failing(endpoint, NOW)
    await store.tell_recovered(endpoint, NOW)
    assert ids(await read(store)) == []


@pytest.mark.parametrize("state", ["paused", "draft", "disabled", "deleted"])
async def test_only_a_live_endpoint_is_disabled(world: World, store: Store, state: str) -> None:
    endpoint = await world.add_endpoint(state=state, paused_at_id=0)
    seq = (await store.config_changes(0, 1)).seq
    await store.disable_endpoint(endpoint, "gone", None)
    assert (await store.config_changes(seq, 1)).seq == seq
    assert ids(await read(store)) == []


# ── start, ownership, life ──


async def test_start_on_a_fresh_database(world: World) -> None:
    started = await world.store().start("first")
    assert (started.epoch, started.position, started.gaps, started.lanes) == (1, 0, IdRanges(), [])
    assert (started.endpoints, started.config_seq, started.last_id, started.retries_due) == ([], 0, 0, {})


async def test_start_reads_where_to_begin(world: World, store: Store) -> None:
    await world.insert(3)
    live, paused, deleted = [await world.add_endpoint(state=s, paused_at_id=0) for s in ("live", "paused", "live")]
    rows = [retry(1, NOW + 2, live), retry(2, NOW + 1, live), retry(1, NOW + 3, deleted), retry(3, NOW + 4, paused)]
    lanes = [LaneRow(live, 1, IdRanges(), 1), LaneRow(deleted, 1, IdRanges(), 1)]
    await store.record(Batch(1, retries=rows, checkpoint=checkpoint(2, lanes=lanes)))
    await world.update_endpoint(deleted, state="deleted")
    seq = (await store.config_changes(0, 1)).seq
    async with world.begin() as tx:
        await tx.insert()
        started = await world_restart(world, store)
    assert started.epoch == 2
    assert started.position == 2
    assert started.last_id == 4
    assert started.config_seq == seq
    assert {e.id: e.state for e in started.endpoints} == {live: EndpointState.LIVE, paused: EndpointState.PAUSED}
    assert [lane.endpoint_id for lane in started.lanes] == [live]
    assert started.retries_due == {live: NOW + 1, paused: NOW + 4}
    assert [row[0] for row in await world.retries()] == [live, live, paused]


async def test_each_start_raises_the_epoch(world: World, store: Store) -> None:
    for epoch in (2, 3):
        assert (await store.start("again")).epoch == epoch
        await store.record(Batch(epoch))
        with pytest.raises(FencedError):
            await store.record(Batch(epoch - 1))


async def test_start_waits_while_another_owns_and_heartbeats(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_watch(monkeypatch, 0.3)
    waiting: list[bool] = []
    second = world.store()
    assert not await store.is_stood_by()
    starting = asyncio.create_task(second.start("second", lambda: waiting.append(True)))
    loop = asyncio.get_running_loop()
    await until(lambda: waiting)
    await until(store.is_stood_by)
    end = loop.time() + 1.0
    while loop.time() < end:
        await store.record(Batch(1, checkpoint=checkpoint(0)))
        await asyncio.sleep(0.02)
    assert not starting.done()
    await store.hold_ownership()  # untouched by it
    await store.close()
    assert (await starting).epoch == 2
    assert not await second.is_stood_by()
    assert waiting == [True]
    with pytest.raises(FencedError):
        await store.record(Batch(1))


async def test_start_takes_over_from_an_owner_whose_heartbeat_is_stale(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sessions go on: nobody but the heartbeat tells."""
    shorten_watch(monkeypatch, 0.3)
    lost: list[bool] = []
    store.on_owner_lost(lambda: lost.append(True))
    second = world.store()
    assert (await second.start("second")).epoch == 2
    await until(lambda: lost)
    for call in (store.hold_ownership, lambda: store.record(Batch(1)), lambda: store.config_changes(0, 1)):
        with pytest.raises(FencedError, match="took over"):
            await insisting(call)
    await second.hold_ownership()


async def test_what_a_former_owner_notes_changes_nothing(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    failing = await world.add_endpoint()
    await store.note_failing({failing: NOW})
    await store.tell_failing(failing, NOW)
    told = ids(await read(store))
    await store.close()
    second = world.store()
    started = await second.start("second")
    await store.note_failing({endpoint: NOW, failing: NOW + 1})
    await store.disable_endpoint(endpoint, "gone", NOW)
    await store.tell_failing(endpoint, NOW)
    await store.tell_recovered(failing, NOW)
    assert (await second.config_changes(started.config_seq, 2)).endpoints == []
    assert ids(await read(second)) == told
    again = await second.start("second")
    assert {e.id: (e.state, e.failing_since_us) for e in again.endpoints} == {
        endpoint: (EndpointState.LIVE, None),
        failing: (EndpointState.LIVE, NOW),
    }


async def test_one_of_two_standbys_takes_over(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_watch(monkeypatch, 0.3)
    stores = {name: world.store() for name in ("second", "third")}
    starting = {name: asyncio.create_task(store.start(name)) for name, store in stores.items()}
    await asyncio.wait(starting.values(), return_when=asyncio.FIRST_COMPLETED)
    [winner] = [name for name, task in starting.items() if task.done()]
    [loser] = starting.keys() - {winner}
    assert starting[winner].result().epoch == 2
    for _ in range(30):
        await stores[winner].record(Batch(2, checkpoint=checkpoint(0)))
        await asyncio.sleep(0.02)
    assert not starting[loser].done()
    await stores[winner].close()
    assert (await starting[loser]).epoch == 3


async def test_a_start_that_is_cancelled_while_it_waits_leaves_the_owner_alone(world: World, store: Store) -> None:
    second, waiting = world.store(), asyncio.Event()
    starting = asyncio.create_task(second.start("second", waiting.set))
    await waiting.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await second.close()

    async def nobody_waits() -> bool:
        return not await store.is_stood_by()

    await until(nobody_waits)
    await store.record(Batch(1))
    await store.hold_ownership()


async def test_a_lost_owner_is_told_and_takes_the_lock_again(world: World, store: Store) -> None:
    lost: list[bool] = []
    store.on_owner_lost(lambda: lost.append(True))
    await world.sever(store, "owner")
    await until(lambda: lost)
    await insisting(store.hold_ownership)
    await store.hold_ownership()
    assert lost == [True]
    await store.close()
    assert lost == [True]  # not when it is our own doing
    store.on_owner_lost(lambda: lost.append(False))
    assert lost == [True, False]  # whoever asks later is told too


async def test_a_lost_owner_meets_another(world: World, store: Store) -> None:
    await world.sever(store, "owner")
    second = world.store()
    await second.start("second")
    with pytest.raises(FencedError):
        await insisting(store.hold_ownership)
    await second.close()
    with pytest.raises(FencedError):  # the lock is free, but the epoch has moved on
        await insisting(store.hold_ownership)


async def listen_for_ever(store: Store) -> None:
    await store.listen(lambda: None, lambda: None)


CALLS: dict[str, Callable[[Store], Awaitable[Any]]] = {
    "owner": lambda store: store.hold_ownership(),
    "listener": listen_for_ever,
    "reader": lambda store: read(store),
    "recorder": lambda store: store.record(Batch(1)),
    "config": lambda store: store.config_changes(0, 1),
}


async def use_all(store: Store) -> None:
    for name, call in CALLS.items():
        if name != "listener":
            await call(store)
    bells = Bells()
    async with bells.listening(store):
        pass


@pytest.mark.parametrize("session", [name for name in CALLS if name != "listener"])
async def test_a_session_that_was_lost_is_made_again(world: World, store: Store, session: str) -> None:
    await use_all(store)
    await world.sever(store, session)
    await insisting(lambda: CALLS[session](store))


@pytest.mark.parametrize("used", [True, False])
async def test_every_session_learns_that_the_server_lost_its_memory(world: World, store: Store, used: bool) -> None:
    if used:
        await use_all(store)
    await world.lose_life(store)
    for session in [*CALLS, *CALLS]:  # and doesn't forget
        with pytest.raises(LifeLostError):
            await asyncio.wait_for(insisting(partial(CALLS[session], store)), 5)
    started = await store.start("again")
    await store.record(Batch(started.epoch))
    await read(store)
