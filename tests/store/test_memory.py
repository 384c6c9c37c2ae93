"""What only the twin can be told to do: crashes that lose a chosen part, calls that die on their way, rings that are lost."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.ports import AttemptRow, Batch, CheckpointWrite, FencedError, LifeLostError, RetryRow, StoreAwayError
from dispatcher.store.memory import Fate, MemoryStore
from dispatcher.store.memory_database import CannotPrepareError, MemoryDatabase, TransactionOverError, WouldBlockError

NOW = 1_700_000_000_000_000


def make_database(seed: int = 0) -> MemoryDatabase:
    return MemoryDatabase(now_us=lambda: NOW, rng=random.Random(seed))


@pytest.fixture
def database() -> MemoryDatabase:
    return make_database()


@pytest.fixture
async def store(database: MemoryDatabase) -> MemoryStore:
    store = MemoryStore(database)
    await store.start("test")
    return store


def attempt(event_id: int, endpoint_id: int = 1, fault: Fault | None = None, number: int = 1) -> AttemptRow:
    return AttemptRow(event_id, endpoint_id, 0, number, NOW, 1, 500 if fault else 200, fault, None)


def position(at: int, *taken_up: int) -> CheckpointWrite:
    return CheckpointWrite(at, IdRanges(), [], [], list(taken_up))


def one_fate(session: str, what: str, fate: Fate) -> Callable[[str, str], Fate]:
    """Let the next such call have that fate, and every other one be done."""
    left = [fate]

    def decide(asked: str, doing: str) -> Fate:
        return left.pop() if left and (asked, doing) == (session, what) else Fate.DONE

    return decide


# ── what a crash loses ──


async def test_a_crash_loses_a_suffix_of_what_was_not_flushed() -> None:
    survivors = set()
    for seed in range(40):
        database = make_database(seed)
        store = MemoryStore(database)
        await store.start("test")
        for n in range(1, 4):
            await store.record(Batch(1, attempts=[attempt(n)], checkpoint=position(n)))
        database.crash()
        tables = database.tables
        kept = [event_id for event_id, *_ in tables.attempts]
        assert kept == list(range(1, tables.position + 1)), "a prefix, and rows and checkpoint together"
        assert tables.epoch == 1, "raised durably"
        survivors.add(len(kept))
    assert survivors == {0, 1, 2, 3}


@pytest.mark.parametrize("flush", ["producer", "writer", "restart"])
async def test_what_was_flushed_is_kept(database: MemoryDatabase, store: MemoryStore, flush: str) -> None:
    await store.record(Batch(1, attempts=[attempt(1)], checkpoint=position(0)))
    if flush == "producer":
        database.insert()  # a synchronous commit flushes all before it
    elif flush == "writer":
        database.flush()
    else:
        database.restart()
    for _ in range(20):
        database.crash()
    assert list(database.tables.attempts) == [(1, 1, 0, 1)]


async def test_ids_after_a_crash_may_skip_and_may_be_handed_out_again() -> None:
    again, skipped = 0, 0
    for seed in range(40):
        database = make_database(seed)
        tx = database.begin()
        first = tx.insert()
        tx.commit(asynchronous=True)
        database.crash()
        was_lost = first not in database.tables.outbox
        [second] = database.insert()
        assert was_lost or second > first
        again += second == first
        skipped += second > first + 1
    assert again
    assert skipped


async def test_a_crash_ends_connections_transactions_and_life(database: MemoryDatabase, store: MemoryStore) -> None:
    tx = database.begin()
    tx.insert()
    assert database.life is not None
    database.crash()
    assert database.life is None
    with pytest.raises(TransactionOverError):
        tx.commit()
    with pytest.raises(LifeLostError):
        await store.config_changes(0, database.tables.epoch)
    assert database.tables.outbox == {}
    assert (await store.start("again")).epoch == 2


async def test_a_restart_keeps_life_and_renames_prepared_transactions(
    database: MemoryDatabase, store: MemoryStore
) -> None:
    tx = database.begin()
    tx.insert()
    [running] = (await store.holders()).running
    tx.prepare("later")
    before = await store.holders()
    assert (before.running, before.prepared) == (frozenset(), frozenset({running}))
    database.restart()
    [renamed] = (await store.holders()).prepared
    assert renamed != running
    assert not await store.arm_doorbell(), "it still holds the doorbell's lock"
    database.crash()
    await store.start("again")
    assert len((await store.holders()).prepared) == 1
    database.commit_prepared("later")
    assert (await store.holders()).prepared == frozenset()
    assert [event.id for event in (await store.head(0, 10, 1 << 20, [], attempted=False)).events] == [1]


# ── calls that die ──


@pytest.mark.parametrize(("fate", "attempts"), [(Fate.LOST_BEFORE, 0), (Fate.LOST_AFTER, 1)])
async def test_a_batch_of_unknown_fate_is_sent_again(
    database: MemoryDatabase, store: MemoryStore, fate: Fate, attempts: int
) -> None:
    batch = Batch(1, attempts=[attempt(1)])
    store.fate = one_fate("recorder", "record", fate)
    with pytest.raises(StoreAwayError):
        await store.record(batch)
    assert len(database.tables.attempts) == attempts
    await store.record(batch)
    assert len(database.tables.attempts) == 1


async def test_a_call_on_a_connection_that_ends_meanwhile_is_away(database: MemoryDatabase) -> None:
    """On its way there, between its two statements, and on its way back; the next call connects anew."""
    for pauses, happened in ((1, False), (2, True)):
        store = MemoryStore(database)
        await store.start("test")
        await store.config_changes(0, database.tables.epoch)
        await store.record(Batch(database.tables.epoch))
        recording = asyncio.create_task(
            store.record(Batch(database.tables.epoch, attempts=[attempt(1, database.tables.epoch)]))
        )
        for _ in range(pauses):
            await asyncio.sleep(0)
        store.sever("recorder")
        with pytest.raises(StoreAwayError):
            await recording
        assert ((1, database.tables.epoch, 0, 1) in database.tables.attempts) is happened
        await store.record(Batch(database.tables.epoch))
        await store.close()


async def test_what_is_committed_between_snapshot_and_last_id_is_of_the_next_page(
    database: MemoryDatabase, store: MemoryStore
) -> None:
    database.insert()
    await store.head(0, 10, 1 << 20, [], attempted=False)
    reading = asyncio.create_task(store.head(0, 10, 1 << 20, [], attempted=False))
    for _ in range(2):
        await asyncio.sleep(0)
    database.insert()
    page = await reading
    assert [event.id for event in page.events] == [1]
    assert page.last_id == 2


async def test_a_cancelled_call_gives_its_connection_up(database: MemoryDatabase, store: MemoryStore) -> None:
    assert await store.arm_doorbell()
    reading = asyncio.create_task(store.holders())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert database.doorbell_lock.holder is None


async def test_a_server_that_is_down_is_away_and_comes_back(database: MemoryDatabase, store: MemoryStore) -> None:
    database.is_up = False
    for call in (lambda: store.config_changes(0, 1), store.holders, store.hold_ownership):
        with pytest.raises(StoreAwayError):
            await call()
    database.is_up = True
    await store.hold_ownership()


async def test_a_connection_that_lingers_keeps_its_locks_until_its_owner_ends_it(
    database: MemoryDatabase, store: MemoryStore
) -> None:
    lost: list[bool] = []
    store.on_owner_lost(lambda: lost.append(True))
    before = database.owner_lock.holder
    store.sever("owner", lingering=True)
    assert database.owner_lock.holder is before
    await store.hold_ownership()
    assert lost == [True]
    assert database.owner_lock.holder not in (None, before)


async def test_fencing_after_another_start(database: MemoryDatabase, store: MemoryStore) -> None:
    store.sever("owner")
    other = MemoryStore(database)
    assert (await other.start("other")).epoch == 2
    for call in (store.hold_ownership(), store.record(Batch(1)), store.config_changes(0, 1)):
        with pytest.raises(FencedError):
            await call


# ── producers ──


async def test_a_lost_ring_is_never_heard(database: MemoryDatabase, store: MemoryStore) -> None:
    heard: list[str] = []
    listening = asyncio.create_task(store.listen(lambda: heard.append("doorbell"), lambda: heard.append("config")))
    while len(heard) < 2:
        await asyncio.sleep(0)
    await store.arm_doorbell()
    database.loses_notification = lambda: True
    database.insert()
    database.loses_notification = lambda: False
    with database.begin() as tx:
        tx.add_endpoint()
    while "config" not in heard[2:]:
        await asyncio.sleep(0)
    assert heard[2:] == ["config"]
    listening.cancel()


async def test_two_phase_commit_and_notify_exclude_each_other(database: MemoryDatabase, store: MemoryStore) -> None:
    await store.arm_doorbell()
    tx = database.begin()
    tx.insert()
    with pytest.raises(CannotPrepareError):
        tx.prepare("never")
    assert database.tables.prepared == {}
    assert database.open_transactions == []


def test_an_id_is_taken_before_the_trigger_runs(database: MemoryDatabase) -> None:
    tx = database.begin()
    tx.lock_log()
    assert len(database.holders().running) == 1
    assert database.last_id() == 0
    tx.write_row("acct", "message.sent", b"{}")
    assert database.last_id() == 1
    assert not tx.is_silent
    tx.ring()
    assert tx.is_silent
    tx.rollback()


def test_changes_of_configuration_queue_up(database: MemoryDatabase) -> None:
    first, second = database.begin(), database.begin()
    first.add_endpoint()
    with pytest.raises(WouldBlockError):
        second.add_endpoint()
    first.commit()
    second.add_endpoint()
    second.commit()
    assert [seq for seq, _ in database.tables.config_changes] == [1, 2, 3, 4]


# ── the invariant ──


async def test_the_invariant_is_watched(database: MemoryDatabase, store: MemoryStore) -> None:
    with database.begin() as tx:
        endpoint = tx.add_endpoint(patterns=("message.*",))
        other = tx.add_endpoint(patterns=("link.*",))
    [first, _] = database.tables.subscriptions
    database.insert(3)

    async def after(**parts: Any) -> int:
        await store.record(Batch(1, **parts))
        return len(database.tables.violations())

    assert other != endpoint
    assert await after() == 0, "above the position"
    assert await after(checkpoint=position(3)) == 0, "not taken up"
    assert await after(checkpoint=position(3, first)) == 3
    assert await after(attempts=[attempt(1, endpoint)]) == 2
    assert await after(attempts=[attempt(2, endpoint, Fault.STATUS)]) == 2, "failed, and no retry row"
    assert await after(retries=[RetryRow(endpoint, 2, 0, 2, NOW, NOW, "")]) == 1
    assert await after(checkpoint=CheckpointWrite(3, IdRanges([(3, 3)]), [], [], [])) == 0, "in a gap"
    with database.begin() as tx:
        tx.delete_endpoint(endpoint)
    assert await after(checkpoint=position(3)) == 0, "nobody's any more"


async def test_the_same_seed_makes_the_same_run() -> None:
    def run(seed: int) -> list[Any]:
        database = make_database(seed)
        for n in range(10):
            for _ in range(3):
                tx = database.begin()
                tx.insert()
                tx.commit(asynchronous=n % 2 == 0)
            database.crash()
        return [database.tables.ids, database.last_id()]

    assert run(7) == run(7)
    assert len({str(run(seed)) for seed in range(10)}) > 1
