"""The processes, and who keeps them running: each is started again when it ends, as a service manager would, unless it is held down."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import asyncpg

from bench import rig
from bench.network import Network
from bench.spawn import Spawned, spawn
from bench.torture.producer import ACCOUNTS, AWAY
from dispatcher import settings as settings_module
from dispatcher.domain.retention import Span
from dispatcher.errors import DispatcherError
from dispatcher.store import embedded
from dispatcher.store.migrate import migrate
from dispatcher.store.partitions import PgPartitions

ROOT = Path(__file__).parent.parent.parent
KINDS = ("steady", "flaky", "slow", "rejecting", "limited")  # each account has an endpoint of each at its own receiver
PRODUCERS = 2
LIMITED_PER_S = 10.0  # of some 70: this lane lags, until retention takes what it has not sent
AGAIN_S = 0.2  # after its end a process is started again
DISK_BYTES = 2 << 30
POOLER_PORT = 6432
LEAVES = Span(100_000, 1_000_000)  # as schema.sql makes it: the first that can be divided, and where ids begin here
SETTINGS: dict[str, Any] = {
    "allowed_networks": "127.0.0.0/8",
    "log_format": "json",
    "grace_s": 3,
    "retry_schedule_s": "1,1,1,1,2,2,2,2,5,5,5,5,5,5,5",
    "breaker_wait_s": 0.5,  # a receiver is back within seconds here, and is to be found within five
    "breaker_wait_max_s": 2,
    "retention_bytes_max": 16 << 20,
}
SETTLED = """
SELECT c.position >= webhook.last_id() AND isempty(c.gaps) AND NOT EXISTS (SELECT FROM webhook.lane) AND NOT EXISTS (SELECT FROM webhook.retry)
FROM webhook.checkpoint AS c
"""


class Kept:
    """One process. Its log and what it writes to stderr go to files, which outlive it."""

    def __init__(self, name: str, command: list[str], directory: Path, env: dict[str, Any] | None = None) -> None:
        self.name = name
        self.errors = directory / f"{name}.err"
        self.log = directory / f"{name}.log"
        self.statuses: Counter[int] = Counter()  # of its ends
        self.process: Spawned | None = None
        self._command = command
        self._env = {k: v for k, v in os.environ.items() if not k.startswith("DISPATCHER_")}
        self._env |= {f"DISPATCHER_{k.upper()}": str(v) for k, v in (env or {}).items()}
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._running = asyncio.Event()
        self._keeping = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    async def _keep(self) -> None:
        while True:
            await self._may_run.wait()
            with self.log.open("ab") as log, self.errors.open("ab") as errors:
                self.process = await spawn(
                    *self._command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=errors,
                    start_new_session=True,
                )  # fmt: skip
            self._running.set()
            self.statuses[await self.process.wait()] += 1
            self._running.clear()
            await asyncio.sleep(AGAIN_S)

    async def running(self) -> None:
        await self._running.wait()

    def signal(self, number: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            os.kill(pid, number)

    def hold(self) -> None:
        """Don't start it again, once it has ended."""
        self._may_run.clear()

    def release(self) -> None:
        self._may_run.set()

    async def stop(self, within_s: float = 20.0) -> int:
        """End it with SIGTERM, for good; with SIGKILL if that doesn't help. Return its exit status."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(within_s):
                    await self.process.wait()
            except TimeoutError:
                self.signal(signal.SIGKILL)
        return await self.process.wait()


class Plant:
    """Everything, ready to be broken. `skipped` says which faults can't be had here, and why."""

    def __init__(self, directory: Path, *, seed: str, events: int, disk: bool, say: Callable[[str], None]) -> None:
        self.directory = directory
        self.skipped: dict[str, str] = {}
        self.dispatchers: list[Kept] = []
        self.receivers: list[Kept] = []
        self.producers: list[Kept] = []
        self.pooler: Kept | None = None
        self.networks: list[Network] = []
        self.ports = [rig.free_port() for _ in ACCOUNTS]
        self.endpoints: dict[int, str] = {}  # id → path
        self.server: embedded.EmbeddedServer
        self.disk: Path | None = None
        self._seed = seed
        self._events = events
        self._wants_disk = disk
        self._say = say
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Plant":
        async with contextlib.AsyncExitStack() as stack:
            self._say("starting")
            await self._start_server(stack)
            await self._install()
            targets = [self.server.dsn, await self._start_pooler(stack)]
            for n, account in enumerate(ACCOUNTS):
                command = [sys.executable, "-m", "bench.torture.receiver", str(self.ports[n]), str(self.arrivals(n))]
                self.receivers.append(await self._kept(stack, f"receiver-{account}", command))
            for name, target in zip("ab", targets, strict=True):
                network = await stack.enter_async_context(Network(target))
                self.networks.append(network)
                env = SETTINGS | {"database_url": network.dsn}
                command = [sys.executable, "-m", "dispatcher", "run"]
                self.dispatchers.append(await self._kept(stack, f"dispatcher-{name}", command, env))
            await self.owner()
            for n in range(PRODUCERS):
                command = [
                    sys.executable, "-m", "bench.torture.producer", self.server.dsn, str(self.fates(n)), str(n + 1), self._seed,
                ]  # fmt: skip
                self.producers.append(await self._kept(stack, f"producer-{n}", command))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip
        await self._stack.aclose()

    def arrivals(self, n: int) -> Path:
        return self.directory / f"arrivals-{n}"

    def fates(self, n: int) -> Path:
        return self.directory / f"fates-{n}"

    async def _kept(self, stack: contextlib.AsyncExitStack, name: str, command: list[str], env: Any = None) -> Kept:
        kept = Kept(name, command, self.directory, env)
        stack.push_async_callback(kept.stop)
        await kept.running()
        return kept

    # ── PostgreSQL ──

    async def _start_server(self, stack: contextlib.AsyncExitStack) -> None:
        """Start a server that flushes, on a small disk of its own where that can be had."""
        self.directory.chmod(0o755)  # its account must get through
        data_dir = self.directory / "pg"
        if self._wants_disk:
            self.disk = self.directory / "disk"
            stack.callback(_mount(self.directory / "disk.img", self.disk))
            data_dir = self.disk / "pg"
        options = {
            "min_wal_size": "32MB",
            "max_wal_size": "64MB",
            "wal_writer_delay": "2s",  # so that a crash takes a good part of the asynchronous commits with it
        }
        self.server = await asyncio.to_thread(embedded.start, data_dir, options=options)
        stack.callback(self.server.stop)

    async def _install(self) -> None:
        """Install the schema, endpoints, and a log whose partitions are narrow enough for retention to take some of them."""
        connection = await asyncpg.connect(self.server.dsn)
        await migrate(connection, settings_module.load(database_url=self.server.dsn))
        for n, (account, port) in enumerate(zip(ACCOUNTS, self.ports, strict=True)):
            for kind in KINDS:
                path = f"/{n}/{kind}"
                endpoint_id = await connection.fetchval(
                    "INSERT INTO webhook.endpoint (account_id, url, state, timeout_ms, rate_per_s, retry_schedule_s) "
                    "VALUES ($1, $2, 'live', 3000, $3, $4) RETURNING id",
                    account, f"http://127.0.0.1:{port}{path}",
                    LIMITED_PER_S if kind == "limited" else None, [1] if kind == "rejecting" else None,
                )  # fmt: skip
                await connection.execute(
                    "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, $2)", endpoint_id, rig.SECRET
                )
                await connection.execute(
                    "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, '*', 0)", endpoint_id
                )
                self.endpoints[endpoint_id] = path
        partitions = PgPartitions(self.server.dsn, timeout_s=60)
        width = max(1_000, self._events // 30)
        cuts = [*range(LEAVES.low, min(LEAVES.high, LEAVES.low + self._events), width), LEAVES.high]
        for parent in ("attempt", "outbox"):
            if not await partitions.recut(parent, LEAVES, cuts):
                raise RuntimeError(f"the partition of {parent} at {LEAVES.low} could not be divided")
        await partitions.close()
        await connection.execute("SELECT setval('webhook.outbox_id_seq', $1)", LEAVES.low)
        await connection.close()

    async def up(self, within_s: float = 60.0) -> None:
        """Have a server that answers: started if it isn't there, and again if it can't start yet, because the disk is full."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                await asyncio.to_thread(self.server.start_again)
                break
            except DispatcherError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(AGAIN_S)
        await self.query("SELECT 1", within_s=within_s)

    async def query(self, statement: str, *args: Any, within_s: float = 30.0) -> list[Any]:
        """Run a statement on a connection of its own, again and again while the server is away."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                connection = await asyncpg.connect(self.server.dsn, timeout=5)
                try:
                    rows: list[Any] = await connection.fetch(statement, *args, timeout=20)
                    return rows
                finally:
                    connection.terminate()
            except AWAY:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.02)

    async def backends(self, like: str) -> list[int]:
        rows = await self.query("SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1 ORDER BY pid", like)
        return [row["pid"] for row in rows]

    async def owner(self, within_s: float = 30.0) -> int:
        """Return which of the dispatchers rules, once one that lives does."""
        deadline = time.monotonic() + within_s
        while True:
            [row] = await self.query("SELECT owner FROM webhook.checkpoint")
            for n, kept in enumerate(self.dispatchers):
                if kept.pid is not None and row["owner"] == f"{socket.gethostname()}:{kept.pid}":
                    return n
            if time.monotonic() > deadline:
                raise RuntimeError(f"no dispatcher owns the log within {within_s} s; look at {self.directory}")
            await asyncio.sleep(0.05)

    async def settled(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not (await self.query(SETTLED))[0][0]:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True

    # ── PgBouncer ──

    async def _start_pooler(self, stack: contextlib.AsyncExitStack) -> str:
        """Start PgBouncer, if there is one; return the dsn that dispatcher b uses."""
        program = shutil.which("pgbouncer")
        if program is None:
            self.skipped["PgBouncer restarted"] = "it is not installed"
            return self.server.dsn
        home = self.directory / "pooler"
        home.mkdir()
        (home / "users").write_text('"postgres" ""\n')
        (home / "ini").write_text(
            f"[databases]\n* = host={self.server.data_dir} port={embedded.PORT}\n[pgbouncer]\npool_mode = session\n"
            f"listen_addr =\nlisten_port = {POOLER_PORT}\nunix_socket_dir = {home}\nauth_type = trust\nauth_file = {home / 'users'}\n"
            "default_pool_size = 30\nmax_client_conn = 100\nserver_login_retry = 0.5\nlog_connections = 0\nlog_disconnections = 0\n"
        )
        command = [program, str(home / "ini")]
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (home, home / "users", home / "ini"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            command[1:1] = ["-u", "nobody"]
        self.pooler = await self._kept(stack, "pgbouncer", command)
        dsn = f"postgresql://postgres@/postgres?host={quote(str(home))}&port={POOLER_PORT}"
        deadline = time.monotonic() + 20
        while True:
            try:
                await (await asyncpg.connect(dsn, timeout=5)).close()
                return dsn
            except AWAY:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)


# ── a disk of its own ──


def why_no_disk() -> str | None:
    """Say why a small file system can't be mounted here, or None if it can."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    missing = [name for name in ("unshare", "mkfs.ext4", "mount") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespace for mounts: {tried.stderr.strip()}"


def _mount(image: Path, target: Path) -> Callable[[], None]:
    """Mount a file as a disk, in this process's own namespace of mounts; return what unmounts it."""
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    target.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)

    def unmount() -> None:
        subprocess.run(["umount", "--lazy", str(target)], check=True)

    return unmount


@contextlib.asynccontextmanager
async def full(disk: Path) -> AsyncIterator[None]:
    """Leave no room on the disk while inside."""
    ballast = disk / "ballast"
    try:
        with ballast.open("wb") as file:
            size = 1 << 24
            while size >= 4_096:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError:
                    size //= 2  # no room for so much; what is left is filled with less
        yield
    finally:
        ballast.unlink()
