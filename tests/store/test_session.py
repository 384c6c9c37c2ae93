"""A session against a real server: which errors are "away", which are not, and what becomes of its connection."""

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from bench.network import Network
from dispatcher import settings as settings_module
from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.ports import AttemptRow, Batch, LifeLostError, StoreAwayError
from dispatcher.store import postgres, recording
from dispatcher.store.postgres import PgStore
from dispatcher.store.session import _PARAMETERS, _SOCKET_OPTIONS, Session, connect_once, is_away
from tests.conftest import connected, dsn_of
from tests.rig import until
from tests.store import people

NAME = "dispatcher test"


@pytest.fixture
async def make(dsn: str) -> AsyncIterator[Callable[..., Session]]:
    made: list[Session] = []

    def make(url: str = dsn, *, timeout_s: float = 10.0, **options: Any) -> Session:
        made.append(Session(url, "test", timeout_s=timeout_s, **options))
        return made[-1]

    yield make
    for session in made:
        await session.close()


@pytest.fixture
def session(make: Callable[..., Session]) -> Session:
    return make()


async def ask(session: Session, sql: str = "SELECT 1") -> Any:
    return await session.run(lambda c: c.fetchval(sql))


async def pid_of(session: Session) -> int:
    pid: int = await ask(session, "SELECT pg_backend_pid()")
    return pid


async def runs(db: asyncpg.Connection, statement: str) -> bool:
    """Tell whether the session's backend is in the middle of `statement`."""
    count: int = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1 AND query = $2 "
        "AND state = 'active'",
        NAME, statement,
    )  # fmt: skip
    return count == 1


async def test_a_connection_is_made_at_the_first_use_and_kept(session: Session, db: asyncpg.Connection) -> None:
    assert not session.is_connected
    first = await pid_of(session)
    assert await pid_of(session) == first
    assert session.is_connected
    assert (session.connects, session.round_trips) == (1, 2)
    name = await db.fetchval("SELECT application_name FROM pg_stat_activity WHERE pid = $1", first)
    assert name == NAME
    assert await ask(session, "SHOW timezone") == "UTC"
    assert await ask(session, "SHOW jit") == "off"


async def test_parameters_and_setup_hold_for_every_connection(make: Callable[..., Session]) -> None:
    prepared: list[Any] = []

    async def setup(connection: Any) -> None:
        prepared.append(connection)

    session = make(parameters={"lock_timeout": "123ms"}, setup=setup)
    for connects in (1, 2):
        assert await ask(session, "SHOW lock_timeout") == "123ms"
        assert len(prepared) == connects
        session.drop()


async def test_a_parameter_that_is_set_later_holds_for_every_connection(session: Session) -> None:
    await session.run(lambda c: session.set_parameter(c, "application_name", "dispatcher by another name"))
    for _ in range(2):
        assert await ask(session, "SHOW application_name") == "dispatcher by another name"
        session.drop()


async def test_both_ends_of_a_tcp_connection_notice_a_cut_network(make: Callable[..., Session], dsn: str) -> None:
    async with Network(dsn) as network:
        session = make(network.dsn)
        assert await ask(session) == 1
        sock = session._connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = {name: getattr(socket, name) for name in _SOCKET_OPTIONS if hasattr(socket, name)}
        got = {name: sock.getsockopt(socket.IPPROTO_TCP, option) for name, option in options.items()}
        assert got == {name: _SOCKET_OPTIONS[name] for name in options}
        assert len(got) == 4 or sys.platform != "linux"
        # The server's end of this one is a unix socket, where these mean nothing; what was set is in the statement.
        assert set(_PARAMETERS) >= {"tcp_keepalives_idle", "tcp_user_timeout"}
        await session.close()


async def test_a_connection_for_a_verb_leaves_nothing_behind(dsn: str) -> None:
    connection = await connect_once(dsn, "test")
    try:
        assert await connection.fetchval("SELECT $1::integer", 1) == 1
        changed = "SELECT name FROM pg_settings WHERE source = 'session' AND name <> 'application_name'"
        assert await connection.fetch(changed) == []
        assert await connection.fetch("SELECT FROM pg_prepared_statements WHERE name <> ''") == []
    finally:
        await connection.close()


# ── losing it ──


async def test_a_backend_killed_in_the_middle_is_away_and_made_again(session: Session, db: asyncpg.Connection) -> None:
    lost: list[bool] = []
    session.on_lost(lambda: lost.append(True))
    first = await pid_of(session)
    sleeping = asyncio.create_task(ask(session, "SELECT pg_sleep(60)"))
    await until(lambda: runs(db, "SELECT pg_sleep(60)"))
    await db.fetchval("SELECT pg_terminate_backend($1, 5000)", first)
    with pytest.raises(StoreAwayError, match="terminating connection"):
        await sleeping
    assert await pid_of(session) != first
    assert session.connects == 2


async def test_a_backend_killed_while_idle_is_told_and_made_again(session: Session, db: asyncpg.Connection) -> None:
    lost: list[bool] = []
    session.on_lost(lambda: lost.append(True))
    first = await pid_of(session)
    await db.fetchval("SELECT pg_terminate_backend($1, 5000)", first)
    await until(lambda: lost)
    assert not session.is_connected
    assert await pid_of(session) != first
    session.drop()
    await ask(session)
    await session.close()
    assert lost == [True], "what we end ourselves is not lost"


async def test_too_slow_is_away_and_the_connection_thrown_away(make: Callable[..., Session]) -> None:
    session = make(timeout_s=0.1)
    with pytest.raises(StoreAwayError, match="no answer in time"):
        await ask(session, "SELECT pg_sleep(60)")
    assert not session.is_connected
    assert await ask(session) == 1
    with pytest.raises(StoreAwayError):
        await session.run(lambda c: c.fetchval("SELECT pg_sleep(60)"), timeout_s=0.05)
    assert await session.run(lambda c: c.fetchval("SELECT pg_sleep(0.15) IS NULL"), timeout_s=10) is False


async def test_the_servers_own_timeouts_are_away(make: Callable[..., Session], db: asyncpg.Connection) -> None:
    session = make(parameters={"statement_timeout": "20ms"})
    with pytest.raises(StoreAwayError):
        await ask(session, "SELECT pg_sleep(60)")
    session = make(parameters={"lock_timeout": "20ms"})
    async with db.transaction():
        await db.execute("LOCK webhook.checkpoint")
        with pytest.raises(StoreAwayError):
            await ask(session, "SELECT epoch FROM webhook.checkpoint")
    assert await ask(session, "SELECT epoch FROM webhook.checkpoint") == 0


async def test_a_cancelled_call_throws_the_connection_away(session: Session, db: asyncpg.Connection) -> None:
    await ask(session)
    sleeping = asyncio.create_task(ask(session, "SELECT pg_sleep(60)"))
    await until(lambda: runs(db, "SELECT pg_sleep(60)"))
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    assert not session.is_connected
    assert await ask(session, "SELECT 2") == 2, "not the answer to what was asked before"
    assert session.connects == 2


async def test_a_call_cancelled_while_connecting_leaves_nothing(make: Callable[..., Session]) -> None:
    entered, never = asyncio.Event(), asyncio.Event()

    async def setup(connection: Any) -> None:
        entered.set()
        await never.wait()

    session = make(setup=setup)
    asking = asyncio.create_task(ask(session))
    await entered.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not session.is_connected
    assert session.connects == 0


async def test_setup_that_hangs_is_away(make: Callable[..., Session]) -> None:
    session = make(setup=lambda c: c.fetchval("SELECT pg_sleep(60)"), timeout_s=0.2)
    with pytest.raises(StoreAwayError):
        await ask(session)
    assert not session.is_connected


# ── keeping it ──


async def test_a_refused_statement_is_no_reason_to_reconnect(session: Session) -> None:
    first = await pid_of(session)
    with pytest.raises(asyncpg.UniqueViolationError):
        await ask(session, "INSERT INTO webhook.checkpoint DEFAULT VALUES")
    with pytest.raises(asyncpg.UndefinedTableError):
        await ask(session, "SELECT FROM webhook.nothing")
    assert await pid_of(session) == first


async def test_a_value_that_cant_be_sent_is_not_away(session: Session) -> None:
    """Asking again would be for ever: it is our own mistake, and must be seen."""
    first = await pid_of(session)
    with pytest.raises(asyncpg.DataError):
        await session.run(lambda c: c.fetchval("SELECT $1::smallint", 1 << 20))
    assert await pid_of(session) == first


async def test_what_the_work_raises_comes_through(session: Session) -> None:
    async def work(connection: Any) -> None:
        async with connection.transaction():
            raise KeyError("x")

    with pytest.raises(KeyError):
        await session.run(work)
    assert await ask(session) == 1


# ── connecting ──


async def test_a_server_that_isnt_there_is_away(make: Callable[..., Session]) -> None:
    nowhere = "postgresql://u@/d?host=/nonexistent"
    with pytest.raises(StoreAwayError):
        await ask(make(nowhere))
    with pytest.raises(DatabaseAwayError, match="DISPATCHER_DATABASE_URL"):
        await connect_once(nowhere, "test")


async def test_a_refused_login_is_never_mistaken_for_away(make: Callable[..., Session], dsn: str) -> None:
    stranger = dsn.replace("postgres@", "webhook_producer@")  # NOLOGIN
    assert stranger != dsn
    for url in (stranger, dsn.replace("postgres@", "nobody_at_all@"), dsn_of(dsn, "no_such_database")):
        with pytest.raises(DatabaseRefusedError, match="DISPATCHER_DATABASE_URL"):
            await ask(make(url))
        with pytest.raises(DatabaseRefusedError, match="DISPATCHER_DATABASE_URL"):
            await connect_once(url, "test")


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "http://x/d",
        "postgresql://u@h:port/d",
        "postgresql://[::1/d",
        "postgresql://u@/d?sslmode=some&host=/x",
    ],
)
async def test_a_malformed_url_is_told_as_such(make: Callable[..., Session], url: str) -> None:
    with pytest.raises(DatabaseRefusedError, match="malformed"):
        await connect_once(url, "test")
    with pytest.raises(DatabaseRefusedError, match="malformed"):
        await ask(make(url))


async def test_a_port_out_of_range_is_malformed_where_the_loop_notices() -> None:
    url = "postgresql://u@127.0.0.1:99999/d"  # uvloop tries 99999 − 65536 instead
    with pytest.raises(DatabaseRefusedError, match="malformed"):
        await asyncio.to_thread(asyncio.run, connect_once(url, "test"))


async def test_too_many_connections_is_away(make: Callable[..., Session], db: asyncpg.Connection) -> None:
    await db.execute("CREATE ROLE test_limited LOGIN CONNECTION LIMIT 0")
    try:
        with pytest.raises(StoreAwayError):
            await ask(make(str(make()._dsn).replace("postgres@", "test_limited@")))
    finally:
        await db.execute("DROP ROLE test_limited")


async def test_another_life_is_told_at_every_connect(
    make: Callable[..., Session], session: Session, db: asyncpg.Connection, dsn: str
) -> None:
    await db.execute("INSERT INTO webhook.life DEFAULT VALUES")
    session.life = await db.fetchval("SELECT token FROM webhook.life")
    assert await ask(session) == 1
    await db.execute("UPDATE webhook.life SET token = gen_random_uuid()")
    assert await ask(session) == 1, "compared at connects, when a crash can have come between"
    session.drop()
    for change in ("SELECT", "DELETE FROM webhook.life"):
        await db.execute(change)
        with pytest.raises(LifeLostError):
            await ask(session)
        assert not session.is_connected
    async with connected(dsn) as other:
        await other.execute("INSERT INTO webhook.life VALUES (true, $1)", session.life)
    assert await ask(session) == 1


# ── the table ──


@pytest.mark.parametrize(
    ("exc", "away"),
    [
        (asyncpg.AdminShutdownError("x"), True),
        (asyncpg.CannotConnectNowError("x"), True),
        (asyncpg.CrashShutdownError("x"), True),
        (asyncpg.TooManyConnectionsError("x"), True),
        (asyncpg.DiskFullError("x"), True),
        (asyncpg.QueryCanceledError("x"), True),
        (asyncpg.LockNotAvailableError("x"), True),
        (asyncpg.DeadlockDetectedError("x"), True),
        (asyncpg.SerializationError("x"), True),
        (asyncpg.ReadOnlySQLTransactionError("x"), True),
        (asyncpg.FeatureNotSupportedError("an UNLOGGED table on a standby"), True),
        (asyncpg.ConnectionDoesNotExistError("x"), True),
        (asyncpg.InterfaceError("x"), True),
        (asyncpg.InternalClientError("x"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ssl.SSLCertVerificationError("x"), True),
        (asyncpg.UniqueViolationError("x"), False),
        (asyncpg.CheckViolationError("x"), False),
        (asyncpg.UndefinedTableError("x"), False),
        (asyncpg.InsufficientPrivilegeError("x"), False),
        (asyncpg.ClientConfigurationError("x"), False),
        (ValueError("x"), False),
        (asyncio.CancelledError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_as_away(exc: BaseException, away: bool) -> None:
    assert is_away(exc) is away


async def test_a_connection_dropped_on_the_way_to_a_copy_is_away(
    dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by torture: a process that thawed between two statements of a batch ended with an AttributeError of the driver's."""
    store = PgStore(dsn, settings_module.load())
    epoch = (await store.start("test")).epoch
    batch = Batch(epoch, attempts=[AttemptRow(1, 1, 0, 1, 1_700_000_000_000_000, 1_234, 204, None, None)])
    copy_rows = recording._copy_rows

    def drop(rows: Any) -> Any:
        store._recorder.drop()
        return copy_rows(rows)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "_copy_rows", drop)
        with pytest.raises(StoreAwayError):
            await store.record(batch)
    assert await db.fetchval("SELECT count(*) FROM webhook.attempt") == 0
    await store.record(batch)
    assert await db.fetchval("SELECT count(*) FROM webhook.attempt") == 1
    await store.close()


async def test_many_changes_of_configuration_come_in_pages(
    dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "CONFIG_CHANGES", 4)
    store = PgStore(dsn, settings_module.load())
    await store.start("test")
    made = [await people.endpoint(db) for _ in range(5)]
    last = await db.fetchval("SELECT max(seq) FROM webhook.config_change")
    seq, pages, seen = 0, 0, set[int]()
    while True:
        changes = await store.config_changes(seq, 1)
        assert changes.seq > seq
        seq, pages = changes.seq, pages + 1
        seen |= {endpoint.id for endpoint in changes.endpoints}
        if not changes.more:
            break
    assert (seq, seen) == (last, set(made))
    assert pages > 1
    await store.close()


async def test_a_start_that_takes_long_does_not_make_the_clock_slow(
    dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 50,000 endpoints the wall clock was read 3 s before it was used: timestamps, retries and secrets' ends were late by that."""
    read = PgStore._endpoints
    read_at: list[datetime] = []

    def endpoints(self: PgStore, *rows: Any) -> Any:
        made = read(self, *rows)
        read_at.append(datetime.now(UTC))
        return made

    monkeypatch.setattr(PgStore, "_endpoints", endpoints)
    await people.endpoint(db)
    store = PgStore(dsn, settings_module.load())
    started = await store.start("test")
    await store.close()
    assert started.wall_us >= read_at[-1].timestamp() * 1e6, "the clock was read before the endpoints"
