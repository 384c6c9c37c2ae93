"""Runs (resends and replays) and statistics as the engine sees them in a Store: held against PostgreSQL and against the twin."""

from typing import Any

import pytest

from dispatcher.domain.outcome import Fault
from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.ports import AttemptRow, Batch, DeadRow, RetryRow, RunPage, RunRow, StatRow, Store
from tests.store.worlds import HUGE, MANY, World

NOW = 1_700_000_000_000_000


def attempt(event_id: int, run: int = 0, number: int = 1, *, ok: bool = True, endpoint: int = 1) -> AttemptRow:
    if ok:
        return AttemptRow(event_id, endpoint, run, number, NOW, 1, 200, None, None)
    return AttemptRow(event_id, endpoint, run, number, NOW, 1, 500, Fault.STATUS, None)


def row(run: int, settled: int, *counts: int, ended: bool = False, canceled: bool = False) -> RunRow:
    attempted, delivered, dead = counts or (0, 0, 0)
    return RunRow(run, 1, settled, attempted, delivered, dead, ended=ended, canceled=canceled)


async def only_run(store: Store) -> Run:
    changes = await store.config_changes(0, 1)
    [run] = changes.endpoints[0].runs
    return run


async def page(store: Store, run: Run, after: int = 0, limit: int = MANY, bytes_max: int = HUGE) -> RunPage:
    return await store.run_page(1, "acct", run, after, limit, bytes_max)


def ids(found: RunPage) -> list[int]:
    return [event.id for event in found.events]


async def test_a_run_comes_with_its_endpoint_and_how_far_it_is(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    seq = (await store.config_changes(0, 1)).seq
    run_id = await world.add_run(endpoint, 9, after_id=3, patterns=("a.*",), only_failed=True, rate_per_s=5.0)
    changes = await store.config_changes(seq, 1)
    expected = Run(run_id, RunSource.LOG, 3, 9, ("a.*",), True, 5.0, RunState.RUNNING, settled=3)
    assert [e.runs for e in changes.endpoints] == [(expected,)]
    await store.record(Batch(1, runs=[row(run_id, 7, 4, 3, 1)]))
    await world.change_run(run_id, "paused")
    changes = await store.config_changes(changes.seq, 1)
    [found] = changes.endpoints[0].runs
    assert (found.settled, found.attempted, found.delivered, found.dead, found.state) == (7, 4, 3, 1, RunState.PAUSED)
    successor = world.store()
    await store.close()
    [started] = (await successor.start("second")).endpoints
    assert started.runs == (found,)


async def test_recording_progress_is_no_change_of_configuration(world: World, store: Store) -> None:
    run_id = await world.add_run(await world.add_endpoint(), 9)
    seq = (await store.config_changes(0, 1)).seq
    await store.record(Batch(1, runs=[row(run_id, 5, 2, 2, 0)]))
    assert (await store.config_changes(seq, 1)).endpoints == []
    assert await world.progress(run_id) == (5, 2, 2, 0, False)


async def test_a_page_skips_what_has_an_attempt_of_this_run(world: World, store: Store) -> None:
    await world.add_run(await world.add_endpoint(), 4)
    await world.insert(6)
    run = await only_run(store)
    await store.record(Batch(1, attempts=[attempt(1), attempt(2, run=run.id), attempt(3, run=run.id + 1)]))
    found = await page(store, run)
    assert (ids(found), found.passed) == ([1, 3, 4], 4), "not beyond upto_id, whatever other runs did"


async def test_a_page_is_of_the_account_and_the_types(world: World, store: Store) -> None:
    await world.add_run(await world.add_endpoint(), 5, patterns=("a.b_c", "x.*"))
    for account, event_type in (
        ("acct", "a.b_c"),
        ("acct", "a.bxc"),
        ("acct", "x.y.z"),
        ("other", "x.y"),
        ("acct", "x.y"),
    ):
        await world.insert(account_id=account, type=event_type)
    assert ids(await page(store, await only_run(store))) == [1, 3, 5]


@pytest.mark.parametrize(("limit", "found", "passed"), [(1, [2], 2), (2, [2, 4], 4), (3, [2, 4], 6)])
async def test_a_page_is_bounded_in_rows(world: World, store: Store, limit: int, found: list[int], passed: int) -> None:
    await world.add_run(await world.add_endpoint(), 6)
    for n in range(1, 6):
        await world.insert(account_id="acct" if n % 2 == 0 else "other")
    got = await page(store, await only_run(store), limit=limit)
    assert (ids(got), got.passed) == (found, passed)


async def test_a_page_of_what_was_attempted_already_is_passed(world: World, store: Store) -> None:
    await world.add_run(await world.add_endpoint(), 5)
    await world.insert(5)
    run = await only_run(store)
    await store.record(Batch(1, attempts=[attempt(n, run=run.id) for n in (1, 2, 3)]))
    got = await page(store, run, limit=3)
    assert (ids(got), got.passed) == ([], 3)
    got = await page(store, run, after=3, limit=3)
    assert (ids(got), got.passed) == ([4, 5], 5)


async def test_a_page_is_bounded_in_bytes(world: World, store: Store) -> None:
    await world.add_run(await world.add_endpoint(), 3)
    await world.insert(3, payload='"' + "x" * 5_000 + '"')
    got = await page(store, await only_run(store), bytes_max=5_001)
    assert (ids(got), got.passed) == ([1], 1) or (ids(got), got.passed) == ([1, 2], 2)
    assert ids(await page(store, await only_run(store), bytes_max=1)) == [1]


async def test_only_failed_means_given_up(world: World, store: Store) -> None:
    await world.add_run(await world.add_endpoint(), 7, only_failed=True)
    await world.insert(7)
    run = await only_run(store)
    attempts = [
        attempt(1),  # delivered
        attempt(2, ok=False), attempt(2, number=2),  # delivered at the second try
        attempt(3, ok=False),  # given up
        attempt(4, ok=False),  # waits for a retry
        attempt(5, ok=False), attempt(5, run=run.id + 1),  # another run delivered it
        attempt(6, ok=False), attempt(6, run=run.id, ok=False),  # this run tried it
        # 7 was never tried: its lane will
    ]  # fmt: skip
    await store.record(Batch(1, attempts=attempts, retries=[RetryRow(1, 4, 0, 2, NOW, NOW, "HTTP 500")]))
    got = await page(store, run)
    assert (ids(got), got.passed) == ([3], 7)
    got = await page(store, run, limit=2)
    assert (ids(got), got.passed) == ([3], 3), "2 and 3 have failed attempts; the page ends there"


async def test_dead_letters_are_read_from_their_own_copies(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    await world.insert(4, payload='{"kept": true}')
    public = [event.public_id for event in (await store.head(0, MANY, HUGE, [], attempted=False)).events]
    dead = [DeadRow(1, n, 0, 3, NOW, "given up", 500, Fault.STATUS) for n in (1, 2, 3)]
    await store.record(Batch(1, attempts=[attempt(n, ok=False) for n in (1, 2, 3)], dead=dead))
    run_id = await world.add_run(endpoint, 4, source="dead_letter")
    await world.resend_dead(endpoint, run_id, 2, 3)
    await world.forget_events([1, 2, 3, 4])
    run = await only_run(store)
    got = await page(store, run)
    assert (ids(got), got.passed) == ([2, 3], 4)
    assert [(e.payload, e.public_id) for e in got.events] == [(b'{"kept": true}', p) for p in public[1:3]]
    # It fails again: the retry finds the copy, and the next dead letter has one of its own.
    await store.record(
        Batch(1, attempts=[attempt(2, run=run_id, ok=False)], retries=[RetryRow(1, 2, run_id, 2, NOW, NOW, "HTTP 500")])
    )
    [again] = (await store.due_retries([(1, MANY)], HUGE))[0].retries
    assert (again.event.id, again.run, again.event.payload) == (2, run_id, b'{"kept": true}')
    await store.record(
        Batch(1, dead=[DeadRow(1, 2, run_id, 2, NOW, "given up", 500, Fault.STATUS)], settled_retries=[(1, 2, run_id)])
    )
    assert [(d[1], d[2], d[5]) for d in await world.dead_letters() if d[1] == 2] == [
        (2, 0, '{"kept": true}'),
        (2, run_id, '{"kept": true}'),
    ]
    assert ids(await page(store, run)) == [3]


async def test_retries_of_idle_runs_are_passed_over(world: World, store: Store) -> None:
    await world.add_endpoint()
    await world.insert(3)
    later = (await store.config_changes(0, 1)).wall_us + 3_600_000_000
    rows = [
        RetryRow(1, 1, 7, 2, NOW, NOW, "x"),
        RetryRow(1, 2, 0, 2, NOW, NOW, "x"),
        RetryRow(1, 3, 7, 2, NOW, later, "x"),
    ]
    await store.record(Batch(1, retries=rows))
    [everything] = await store.due_retries([(1, MANY)], HUGE)
    assert sorted((r.event.id, r.run) for r in everything.retries) == [(1, 7), (2, 0)]
    assert everything.next_due_us == later
    [without] = await store.due_retries([(1, 1)], HUGE, without_runs=[7])
    assert [(r.event.id, r.run) for r in without.retries] == [(2, 0)], "the page is not filled by those passed over"
    assert without.next_due_us is None


async def test_a_run_is_finished_when_none_of_its_retries_is_left(world: World, store: Store) -> None:
    endpoint = await world.add_endpoint()
    await world.insert(2)
    run = await world.add_run(endpoint, 2)
    retry = RetryRow(1, 1, run, 2, NOW, NOW, "HTTP 500")
    done = await store.record(Batch(1, retries=[retry], runs=[row(run, 2, 2, 1, 0, ended=True)]))
    assert done.runs_finished == []
    assert await world.progress(run) == (2, 2, 1, 0, False)
    last = Batch(1, settled_retries=[(1, 1, run)], runs=[row(run, 2, 2, 2, 0, ended=True)])
    assert (await store.record(last)).runs_finished == [run]
    assert await world.progress(run) == (2, 2, 2, 0, True)
    assert (await store.record(last)).runs_finished == [run], "sent again, it says the same"
    assert (await store.config_changes(0, 1)).endpoints[0].runs == ()


async def test_a_canceled_run_ends_with_its_retries(world: World, store: Store) -> None:
    run = await world.add_run(await world.add_endpoint(), 2)
    rows = [
        RetryRow(1, 1, run, 2, NOW, NOW, "x"),
        RetryRow(1, 1, 0, 2, NOW, NOW, "x"),
        RetryRow(1, 2, run + 1, 2, NOW, NOW, "x"),
    ]
    await store.record(Batch(1, retries=rows))
    done = await store.record(Batch(1, runs=[row(run, 1, 1, 0, 0, ended=True, canceled=True)]))
    assert done.runs_finished == [run]
    assert [(r[1], r[2]) for r in await world.retries()] == [(1, 0), (2, run + 1)], "other runs keep theirs"


async def test_a_minute_is_written_once(world: World, store: Store) -> None:
    def minute(**changes: Any) -> StatRow:
        values = {
            "endpoint_id": 1,
            "minute": 28_000_000,
            "delivered": 3,
            "failed": 1,
            "dead": 1,
            "duration_ms": 70,
            "durations": [0, 3, 1],
        }
        return StatRow(**(values | changes))

    batch = Batch(1, stats=[minute(), minute(endpoint_id=2, durations=[1])])
    await store.record(batch)
    await store.record(batch)
    await store.record(Batch(1, stats=[minute(minute=28_000_001)]))
    assert await world.stats() == [
        (28_000_000, 1, 1, 3, 1, 1, 70, [0, 3, 1]),
        (28_000_000, 2, 1, 3, 1, 1, 70, [1]),
        (28_000_001, 1, 1, 3, 1, 1, 70, [0, 3, 1]),
    ]
