"""Behind a pooler: in session mode everything works; in any other the program says so before it writes anything, and leaves nothing there.

Against the double in pooler.py, and against PgBouncer itself where it is installed.
"""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import asyncpg
import pytest

from bench.spawn import spawn
from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.ports import Batch
from dispatcher.store import pooling
from dispatcher.store.pooling import refuse_transaction_pooling
from dispatcher.store.postgres import PgStore
from dispatcher.store.session import connect_once
from tests.conftest import connected
from tests.process.support import Dispatcher, Load, check_invariant, dispatching, settle
from tests.rig import rig, until
from tests.store.pooler import Mode, Pooler
from tests.store.test_conformance import checkpoint, delivered
from tests.store.worlds import SETTINGS

ROOT = Path(__file__).parent.parent.parent
TROUBLE: dict[str, tuple[Mode, dict[str, Any]]] = {
    "transaction": ("transaction", {}),
    "transaction, 1 connection": ("transaction", {"size": 1}),
    "transaction, 2 in turn": ("transaction", {"in_turn": True, "opened": 2}),
    "transaction, 3 in turn": ("transaction", {"in_turn": True, "opened": 3}),
    "statement": ("statement", {}),
    "statement, 5 in turn": ("statement", {"in_turn": True, "opened": 5}),
}


async def checked(dsn: str) -> None:
    """What every verb does first."""
    connection = await connect_once(dsn, "dispatcher test")
    try:
        await refuse_transaction_pooling(connection, dsn)
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def busy(dsn: str, clients: int) -> AsyncIterator[None]:
    """Others use the pool all the time."""

    async def client(connection: asyncpg.Connection) -> None:
        try:
            while True:
                await connection.fetchval("SELECT 1")
        finally:
            connection.terminate()

    connections = [await asyncpg.connect(dsn, statement_cache_size=0) for _ in range(clients)]
    tasks = [asyncio.create_task(client(connection)) for connection in connections]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def leftovers(db: asyncpg.Connection, pooled: str) -> dict[str, list[Any]]:
    """What is left on the pool's server connections for whoever gets them next."""
    found: dict[str, list[Any]] = {
        "locks": await db.fetch("SELECT pid FROM pg_locks WHERE locktype = 'advisory'"),
        "epoch": await db.fetch("SELECT FROM webhook.checkpoint WHERE epoch > 0"),
    }
    async with connected(pooled) as connection:
        found["listening"] = await connection.fetch("SELECT pg_listening_channels()")
        found["settings"] = await connection.fetch(
            "SELECT name FROM pg_settings WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding')"
        )
    return {what: rows for what, rows in found.items() if rows}


@pytest.mark.parametrize("kind", TROUBLE)
@pytest.mark.parametrize("others", [0, 3])
async def test_other_modes_are_refused_and_nothing_is_left(
    dsn: str, db: asyncpg.Connection, kind: str, others: int
) -> None:
    mode, options = TROUBLE[kind]
    async with Pooler(dsn, mode, **options) as pooler, busy(pooler.dsn, others):
        for _ in range(5):
            with pytest.raises(DatabaseRefusedError, match=r"transaction or statement mode.*pool_mode=session"):
                await checked(pooler.dsn)
        if mode != "statement":
            assert await leftovers(db, pooler.dsn) == {}


async def test_session_mode_and_no_pooler_are_fine(dsn: str) -> None:
    await checked(dsn)
    for in_turn in (False, True):
        async with Pooler(dsn, "session", in_turn=in_turn, opened=3) as pooler, busy(pooler.dsn, 3):
            for _ in range(5):
                await checked(pooler.dsn)


async def test_a_pool_without_room_is_told_as_such(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "ANSWER_S", 0.3)
    async with Pooler(dsn, "session", size=1) as pooler:
        with pytest.raises(DatabaseAwayError, match=r"no server connection left.*pool_size"):
            await checked(pooler.dsn)


async def test_the_double_refuses_what_pgbouncer_refuses(dsn: str) -> None:
    async with Pooler(dsn, "session") as pooler:
        with pytest.raises(asyncpg.PostgresError, match="unsupported startup parameter: jit"):
            await asyncpg.connect(pooler.dsn, server_settings={"jit": "off"})


async def test_a_store_behind_session_mode(dsn: str, db: asyncpg.Connection) -> None:
    """Locks, LISTEN, prepared statements and parameters, and their end with the client's."""
    async with Pooler(dsn, "session") as pooler:
        store = PgStore(pooler.dsn, SETTINGS)
        started = await store.start("first")
        heard: list[str] = []
        listening = asyncio.create_task(store.listen(lambda: heard.append("doorbell"), lambda: heard.append("config")))
        await until(lambda: len(heard) == 2)
        assert await store.arm_doorbell()
        await db.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
        await until(lambda: heard[2:] == ["doorbell"])
        for _ in range(3):
            assert len((await store.head(0, 10, 1_000, [], attempted=True)).events) == 1
        await store.record(Batch(started.epoch, attempts=[delivered(1)], checkpoint=checkpoint(1)))
        await store.hold_ownership()
        assert await store._reader.run(lambda c: c.fetchval("SHOW enable_seqscan")) == "off"
        assert await store._recorder.run(lambda c: c.fetchval("SHOW synchronous_commit")) == "off"
        # The server's session ends, and the pooler ends the client's.
        await db.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE 'dispatcher %'"
        )
        await asyncio.gather(listening, return_exceptions=True)
        assert (await store.start("first")).epoch == 2
        await store.close()

        async def clean() -> bool:
            return await leftovers(db, pooler.dsn) == {"epoch": [()]}

        await until(clean, what="the pooled connections are as new")


async def test_run_behind_a_transaction_pooler_ends_with_the_sentence(dsn: str, db: asyncpg.Connection) -> None:
    async with Pooler(dsn, "transaction") as pooler:
        d = await Dispatcher(pooler.dsn).launch()
        assert await d.ended() == 5, d
        assert d.errors.startswith("error: DISPATCHER_DATABASE_URL leads to a pooler in transaction or statement mode")
        assert d.errors.count("\n") == 1
        assert d.lines == []
        for verb in (["endpoint", "create", "acct", "https://example.com/"], ["migrate"], ["status"]):
            process = await spawn(
                sys.executable, "-m", "dispatcher", *verb,
                cwd=ROOT, env=os.environ | {"DISPATCHER_DATABASE_URL": pooler.dsn},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            out, err = await process.communicate()
            assert (process.returncode, out) == (5, b""), err
            assert b"transaction or statement mode" in err
        assert await leftovers(db, pooler.dsn) == {}
        assert await db.fetchval("SELECT count(*) FROM webhook.endpoint") == 0


async def test_run_behind_a_session_pooler_and_a_takeover(dsn: str) -> None:
    async with Pooler(dsn, "session") as pooler:
        await deliver_and_take_over(dsn, pooler.dsn)


async def deliver_and_take_over(dsn: str, pooled: str) -> None:
    """Deliver under load, freeze the owner, let a standby behind the same pooler take over; end by SIGTERM."""
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        second = Dispatcher(pooled)
        try:
            async with Load(dsn, producers=2, pace_s=0.05) as load, dispatching(pooled) as first:
                await load.more(100)
                await second.launch()
                await second.said("standby.waiting")
                first.signal(signal.SIGSTOP)
                line = await second.said("standby.taking_over", within_s=8)
                assert line["reason"] == "the owner's heartbeat stopped"
                await second.said("started")
                first.signal(signal.SIGCONT)
                assert await first.ended() == 7, first
                await load.more(50)
                await settle(r, load, {"/steady": "acct"}, second)
                await check_invariant(r.db)
        finally:
            await second.kill()


# ── PgBouncer itself ──

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
with_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


def listens(path: Path) -> bool:
    """Whether someone takes connections there: the path exists (bind) before it does (listen)."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@contextlib.asynccontextmanager
async def pgbouncer(dsn: str, mode: str, **settings: object) -> AsyncIterator[str]:
    """Run one in front of the server; yield the DSN that leads through it. It refuses to run as root, so then it runs as nobody."""
    assert PGBOUNCER is not None
    at = urlsplit(dsn)
    where = parse_qs(at.query)
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-test-", dir="/tmp"))
    lines = {
        "listen_addr": "",
        "listen_port": 6432,
        "unix_socket_dir": directory,
        "auth_type": "trust",
        "auth_file": directory / "users",
        "logfile": directory / "log",
        "pool_mode": mode,
    } | settings
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "ini").write_text(
        f"[databases]\n* = host={where['host'][0]} port={where['port'][0]} user=postgres\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in lines.items())
    )
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (directory, *directory.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    process = subprocess.Popen(
        [PGBOUNCER, "-q", str(directory / "ini")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **account,
    )  # fmt: skip
    try:
        await until(lambda: listens(directory / ".s.PGSQL.6432"), what="PgBouncer listens")
        yield urlunsplit(at._replace(query=f"host={directory}&port=6432"))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


@with_pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("settings", [{}, {"server_round_robin": 1, "min_pool_size": 3}, {"default_pool_size": 1}])
@pytest.mark.parametrize("others", [0, 3])
async def test_pgbouncer_in_other_modes(
    dsn: str, db: asyncpg.Connection, mode: str, settings: dict[str, Any], others: int
) -> None:
    async with pgbouncer(dsn, mode, **settings) as pooled, busy(pooled, others):
        for _ in range(3):
            with pytest.raises(DatabaseRefusedError, match="pool_mode=session"):
                await checked(pooled)
        if mode != "statement":
            assert await leftovers(db, pooled) == {}


@with_pgbouncer
async def test_pgbouncer_in_session_mode(dsn: str) -> None:
    async with pgbouncer(dsn, "session") as pooled:
        await checked(pooled)
        await deliver_and_take_over(dsn, pooled)


@with_pgbouncer
@pytest.mark.parametrize("settings", [{}, {"query_wait_timeout": 1}])
async def test_pgbouncer_without_room(dsn: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "ANSWER_S", 3.0)
    async with pgbouncer(dsn, "session", default_pool_size=1, **settings) as pooled:
        with pytest.raises(DatabaseAwayError, match=r"no server connection left"):
            await checked(pooled)
