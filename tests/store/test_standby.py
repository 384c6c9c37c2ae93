"""When a standby takes an owner's place, and when it doesn't; what Start and an owner without its session do about others' locks."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dispatcher.errors import DatabaseRefusedError
from dispatcher.ports import Batch, FencedError, StoreAwayError
from dispatcher.store import postgres
from dispatcher.store.postgres import LOCK_REFUSALS_MAX, PgStore
from dispatcher.store.standby import Look, Watch, session_name
from tests.conftest import connected
from tests.rig import until
from tests.store.test_conformance import checkpoint
from tests.store.worlds import SETTINGS, shorten_watch

LOOK = Look(holder=7, owner="a:1", epoch=1, heartbeat_us=0, held_up=False, now_us=0)
OWNER_LOCK = "SELECT pg_try_advisory_lock(9324665, 2)"


def looks(watch: Watch, *seconds: float, **other: Any) -> list[bool]:
    """Look at these instants; the heartbeat was at 0 unless said otherwise."""
    return [watch.is_dead(dataclasses.replace(LOOK, now_us=int(s * 1e6), **other)) for s in seconds]


QUARTERS = [n / 4 for n in range(13)]  # 0 … 3 s


def test_a_heartbeat_that_was_watched_for_3_s_is_stale() -> None:
    assert looks(Watch(), *QUARTERS) == [False] * 12 + [True]


def test_who_never_had_a_heartbeat_gets_as_long() -> None:
    assert looks(Watch(), *QUARTERS, heartbeat_us=None) == [False] * 12 + [True]


def test_an_old_heartbeat_alone_is_no_proof() -> None:
    """The owner may have taken the lock a moment ago; or the standby, or the database, may have been away itself."""
    watch = Watch()
    assert looks(watch, 100.0, 200.0, 300.0, 400.0) == [False] * 4
    assert looks(watch, 400.5, 401.0) == [False, False]
    assert looks(watch, 401.5) == [True]


def test_a_clock_that_is_set_back_counts_as_nothing() -> None:
    watch = Watch()
    assert looks(watch, 10, 10.5, 11, 5, 5.5, 6) == [False] * 6
    assert looks(watch, 6.5, 7.0) == [False, True]


def test_a_heartbeat_in_the_future_is_waited_for() -> None:
    assert not any(looks(Watch(), *QUARTERS, 3.5, 4.0, heartbeat_us=2_000_000)[:-2])
    assert looks(Watch(), *(n / 4 for n in range(21)), heartbeat_us=2_000_000)[-2:] == [False, True]


@pytest.mark.parametrize("change", [{"heartbeat_us": 1}, {"holder": 8}, {"holder": None}, {"held_up": True}])
def test_any_sign_of_life_begins_anew(change: dict[str, Any]) -> None:
    watch = Watch()
    looks(watch, *QUARTERS[:-1])
    assert looks(watch, 3.0, **change) == [False]
    assert not any(looks(watch, *(3.25 + s for s in QUARTERS[:-2])))
    assert looks(watch, 6.0, 6.25)[-1]


def test_a_sessions_name_fits_and_keeps_its_end() -> None:
    assert session_name("web-1:42") == "dispatcher standby web-1:42"
    long = session_name("x" * 60 + ".example.com:4242")
    assert len(long) == 63
    assert long.startswith("dispatcher standby xxx")
    assert long.endswith(".example.com:4242")


# ── PostgreSQL ──


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(dsn) as connection:
        yield connection


@pytest.fixture
async def stores(dsn: str) -> AsyncIterator[Any]:
    made: list[PgStore] = []

    def make(url: str = dsn) -> PgStore:
        made.append(PgStore(url, SETTINGS))
        return made[-1]

    yield make
    for store in made:
        await store.close()


@contextlib.asynccontextmanager
async def starting(store: PgStore, owner: str) -> AsyncIterator[asyncio.Task[Any]]:
    """A start that waits as a standby."""
    waiting = asyncio.Event()
    task = asyncio.create_task(store.start(owner, waiting.set))
    done = asyncio.create_task(waiting.wait())
    await asyncio.wait([task, done], return_when=asyncio.FIRST_COMPLETED)
    done.cancel()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def names(db: asyncpg.Connection) -> list[str]:
    rows = await db.fetch(
        "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY 1"
    )
    return [row[0] for row in rows]


async def test_a_waiting_session_says_so_also_after_it_was_lost(stores: Any, db: asyncpg.Connection) -> None:
    first, second = stores(), stores()
    await first.start("first")
    async with starting(second, "second:2") as task:

        async def both() -> bool:
            return await names(db) == ["dispatcher owner", "dispatcher standby second:2"]

        await until(both)
        await db.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE 'dispatcher standby%'"
        )
        with contextlib.suppress(AssertionError):
            await until(
                task.done, within_s=0.5
            )  # it may have been lost in the middle of a look: then Start begins again
        if task.done():
            with pytest.raises(StoreAwayError):
                task.result()
        else:
            await until(both)
    async with starting(second, "second:2") as task:
        await first.close()
        assert (await task).epoch == 2
        assert await names(db) == ["dispatcher owner"]


async def test_a_heartbeat_that_waits_behind_a_lock_says_nothing_about_the_owner(
    dsn: str, stores: Any, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_watch(monkeypatch, 0.3)
    first, second = stores(), stores()
    await first.start("first")
    loop = asyncio.get_running_loop()
    async with connected(dsn) as other, other.transaction():
        await other.execute("SELECT FROM webhook.checkpoint FOR UPDATE")
        recording = asyncio.create_task(first.record(Batch(1, checkpoint=checkpoint(0))))

        async def waits() -> bool:
            return await db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")

        await until(waits)
        async with starting(second, "second") as task:
            end = loop.time() + 1
            await until(lambda: task.done() or loop.time() > end)
            assert not task.done()
    await recording
    async with starting(second, "second") as task:
        assert (await asyncio.wait_for(task, 10)).epoch == 2


@pytest.mark.parametrize("name", ["dispatcher recorder", "dispatcher janitor"])
async def test_start_ends_who_holds_the_checkpoint_in_the_middle_of_a_statement(
    dsn: str, stores: Any, db: asyncpg.Connection, name: str
) -> None:
    """As a frozen or cut-off one does: no idle timeout counts there."""
    stuck = await asyncpg.connect(dsn, server_settings={"application_name": name})
    began = asyncio.Event()

    async def never() -> AsyncIterator[bytes]:
        began.set()
        await asyncio.Event().wait()
        yield b""

    transaction = stuck.transaction()
    await transaction.start()
    await stuck.execute("SELECT FROM webhook.checkpoint FOR UPDATE")
    copying = asyncio.create_task(stuck.copy_to_table("attempt", schema_name="webhook", source=never()))
    try:
        await began.wait()
        async with asyncio.timeout(5):
            assert (await stores().start("first")).epoch == 1
        assert name not in await names(db)
    finally:
        copying.cancel()
        stuck.terminate()
        await asyncio.gather(copying, return_exceptions=True)


async def test_somebody_elses_lock_on_the_checkpoint_is_waited_for(
    dsn: str, stores: Any, db: asyncpg.Connection
) -> None:
    async with connected(dsn) as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM webhook.checkpoint FOR UPDATE")
        task = asyncio.create_task(stores().start("first"))
        loop = asyncio.get_running_loop()
        end = loop.time() + 1.2  # longer than the lock timeout
        await until(lambda: task.done() or loop.time() > end)
        assert not task.done()
        await transaction.rollback()
        assert (await task).epoch == 1


async def test_a_start_that_takes_long_has_a_heartbeat(
    dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With very many endpoints: a standby must not end an owner that is still reading them."""
    monkeypatch.setattr(postgres, "BEAT_S", 0.02)
    reading, go_on = asyncio.Event(), asyncio.Event()

    class Slow(PgStore):
        async def _read_start(self, connection: Any, epoch: int) -> Any:
            reading.set()
            await go_on.wait()
            return await super()._read_start(connection, epoch)

    store = Slow(dsn, SETTINGS)
    task = asyncio.create_task(store.start("first"))
    await reading.wait()
    seen = set()

    async def beats() -> bool:
        seen.add(await db.fetchval("SELECT heartbeat_at FROM webhook.checkpoint"))
        return len(seen) > 5

    await until(beats)
    go_on.set()
    assert (await task).epoch == 1
    await store.close()


async def test_who_may_not_end_the_owners_session_is_no_standby(
    dsn: str, stores: Any, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_watch(monkeypatch, 0.3)
    for name in ("standby_a", "standby_b"):
        await db.execute(f"CREATE ROLE {name} LOGIN IN ROLE webhook_dispatcher")
    try:
        first = stores(dsn.replace("postgres@", "standby_a@"))
        await first.start("first")
        second = stores(dsn.replace("postgres@", "standby_b@"))
        with pytest.raises(DatabaseRefusedError, match="GRANT pg_signal_backend TO standby_b"):
            await second.start("second")
        assert (await db.fetchval("SELECT epoch FROM webhook.checkpoint")) == 1
        for grant in ("pg_signal_backend", "standby_a"):
            await db.execute(f"GRANT {grant} TO standby_b")
            assert (await asyncio.wait_for(second.start("second"), 10)).epoch > 1
            await db.execute(f"REVOKE {grant} FROM standby_b")
            await second.close()
            await first.start("first")
        owner = stores()
        await first.close()
        await owner.start("a superuser")
        await db.execute("GRANT pg_signal_backend TO standby_b")
        with pytest.raises(DatabaseRefusedError, match="must not be a superuser"):
            await second.start("second")
    finally:
        await first.close()
        await second.close()
        await db.execute("DROP ROLE standby_a, standby_b")


async def test_a_standby_whose_schema_was_migrated_meanwhile_does_not_begin(
    stores: Any, db: asyncpg.Connection
) -> None:
    first, second = stores(), stores()
    await first.start("first")
    async with starting(second, "second") as task:
        version = await db.fetchval("SELECT max(version) FROM webhook.schema_version")
        await until(lambda: second._owner.round_trips > 4)
        await db.execute("INSERT INTO webhook.schema_version (version) VALUES ($1)", version + 1)
        try:
            await first.close()
            with pytest.raises(DatabaseRefusedError, match=f"from version {version} to {version + 1}"):
                await task
        finally:
            await db.execute("DELETE FROM webhook.schema_version WHERE version > $1", version)
    assert await db.fetchval("SELECT epoch FROM webhook.checkpoint") == 1
    assert await db.fetchval(OWNER_LOCK), "the lock is free again"


async def test_an_owner_ends_its_own_former_session_that_the_server_takes_for_alive(
    stores: Any, db: asyncpg.Connection
) -> None:
    store = stores()
    await store.start("first")
    former, store._owner._connection = store._owner._connection, None  # a flow that a middlebox has forgotten
    await store.hold_ownership()
    await until(former.is_closed)
    assert not await db.fetchval(OWNER_LOCK)


async def test_another_has_the_lock_and_raises_the_epoch_later(stores: Any, db: asyncpg.Connection) -> None:
    """A standby between its two steps: what the former owner asks meanwhile is answered when the epoch has moved."""
    store = stores()
    await store.start("first")
    store._owner.drop()

    async def taken() -> bool:
        return await db.fetchval(OWNER_LOCK)

    await until(taken)
    for _ in range(3):
        with pytest.raises(StoreAwayError, match="not raised the epoch yet"):
            await store.hold_ownership()
    await db.execute("UPDATE webhook.checkpoint SET epoch = epoch + 1")
    with pytest.raises(FencedError, match="epoch 2 rules, ours was 1"):
        await store.hold_ownership()


async def test_a_lock_that_another_keeps_without_ruling_is_not_waited_for_for_ever(
    stores: Any, db: asyncpg.Connection
) -> None:
    store = stores()
    await store.start("first")
    store._owner.drop()

    async def taken() -> bool:
        return await db.fetchval(OWNER_LOCK)

    await until(taken)
    for _ in range(LOCK_REFUSALS_MAX - 1):
        with pytest.raises(StoreAwayError):
            await store.hold_ownership()
    with pytest.raises(FencedError, match="keeps the owner lock"):
        await store.hold_ownership()
