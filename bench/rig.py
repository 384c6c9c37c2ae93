"""What the scenarios stand on: a PostgreSQL, a sink and a dispatcher, each a process of its own, and what each of them
uses.

One server serves a whole run, embedded or given; every measurement has a fresh database in it, which is dropped
afterwards, so nothing of a given server's is touched. All receivers are on loopback. What is started here is ended
here, by pid.
"""

import asyncio
import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg

from dispatcher import settings as settings_module
from dispatcher.store import embedded
from dispatcher.store.migrate import migrate

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjU"
TICKS = os.sysconf("SC_CLK_TCK")
STOP_S = 20.0
PASSED_S = 300.0  # nothing that is waited for takes longer
STOLEN_MAX, TRIES = 0.01, 3

T = TypeVar("T")


# ── what processes use (Linux: /proc) ──


def cpu_s(pid: int, *, with_children: bool = False) -> float:
    """Return the CPU seconds that a process has used; if asked, with its descendants', also of those that have ended and been waited for."""
    if not with_children:
        return sum(_times(pid)[:2])
    total = 0.0
    for one in [pid, *descendants(pid)]:
        try:
            total += sum(_times(one))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between the listing and here; its parent's figures have it
    return total


def _times(pid: int) -> list[float]:
    """Return a process's own user and system time, and those of children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(ticks) / TICKS for ticks in fields[11:15]]


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CoreWaits:
    """For which share of the time, since this was made, somebody on the machine could have run and waited for a core: the kernel's pressure
    stall information (Documentation/accounting/psi.rst). None where it isn't told."""

    def __init__(self) -> None:
        self._began, self._waited_s = time.perf_counter(), self._read_s()

    def share(self) -> float | None:
        waited_s = self._read_s()
        if waited_s is None or self._waited_s is None:
            return None
        return (waited_s - self._waited_s) / (time.perf_counter() - self._began)

    @staticmethod
    def _read_s() -> float | None:
        try:
            some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        except OSError:
            return None
        return int(some.rpartition("total=")[2]) / 1e6


def stolen_s() -> float:
    """Return for how long, in seconds of a core, this machine's cores wanted to run while the hypervisor let others: "steal" of proc_stat(5)."""
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / TICKS


async def undisturbed(measure: Callable[[], Awaitable[T]]) -> T:
    """Measure; again, as often as TRIES allows, where more than STOLEN_MAX of the cores' time was stolen meanwhile."""
    for _ in range(TRIES):
        before_s, began = stolen_s(), time.perf_counter()
        measured = await measure()
        cores_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
        if stolen_s() - before_s <= STOLEN_MAX * cores_s:
            break
    return measured


@contextlib.contextmanager
def first(pids: Sequence[int]) -> Iterator[None]:
    """Have these processes run before all others (SCHED_FIFO, sched(7)). Raises PermissionError where that isn't allowed."""

    def schedule(policy: int, priority: int) -> None:
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    try:
        schedule(os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1)
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def process(*command: str, env: dict[str, str] | None = None, quiet: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process; end it with SIGTERM, and if that does not help within STOP_S with SIGKILL."""
    started = subprocess.Popen(
        command,
        env=os.environ | (env or {}),
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=None,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(STOP_S)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


class Counters:
    """Two numbers in a mapped file, by which a process under test tells how many statements it sent and how many deliveries it settled."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(16)
            self._map = mmap.mmap(file.fileno(), 16)

    @property
    def statements(self) -> int:
        return int(struct.unpack_from("q", self._map, 0)[0])

    @property
    def settled(self) -> int:
        return int(struct.unpack_from("q", self._map, 8)[0])

    def add(self, *, statements: int = 0, settled: int = 0) -> None:
        struct.pack_into("qq", self._map, 0, self.statements + statements, self.settled + settled)

    def count(self, _query: object) -> None:
        """Be a connection's query logger."""
        self.add(statements=1)


# ── PostgreSQL ──


@contextlib.contextmanager
def postgres(**options: str) -> Iterator[tuple[str, int]]:
    """Start a fresh embedded PostgreSQL; yield its DSN and the postmaster's pid."""
    with embedded_server(**options) as server:
        yield server.dsn, postmaster_pid(server)


@contextlib.contextmanager
def embedded_server(**options: str) -> Iterator[embedded.EmbeddedServer]:
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-bench-", dir="/tmp"))
    server = embedded.start(directory, options={"max_connections": "300"} | options)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def postmaster_pid(server: embedded.EmbeddedServer) -> int:
    return int((server.data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])


async def local_postmaster(dsn: str) -> int | None:
    """Return the pid of the server's first process, if it runs on this machine where we can see it."""
    connection = await asyncpg.connect(dsn)
    try:
        backend, address = await connection.fetchrow("SELECT pg_backend_pid(), host(inet_server_addr())")
        stat = Path(f"/proc/{backend}/stat")
        if (address is not None and not address.startswith("127.")) or not stat.exists():
            return None
        name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
        return int(fields.split()[1]) if name == "postgres" else None
    finally:
        await connection.close()


class Bench:
    """What a scenario gets: the server under test, the kind of sink, and a way to say what is going on."""

    def __init__(self, dsn: str, postmaster: int | None, sink: str, tell: Callable[[str], None]) -> None:
        self.dsn = dsn
        self.sink_kind = sink
        self.tell = tell
        self._postmaster = postmaster

    @property
    def is_server_here(self) -> bool:
        return self._postmaster is not None

    def postgres_cpu_s(self) -> float | None:
        return None if self._postmaster is None else cpu_s(self._postmaster, with_children=True)

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """Make a database for one measurement, and drop it. What it left to be written is written before the next one begins."""
        name = f"dispatcher_bench_{uuid4().hex[:12]}"
        admin = await asyncpg.connect(self.dsn)
        try:
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
            try:
                yield with_database(self.dsn, name)
            finally:
                await admin.execute(f"DROP DATABASE {name} WITH (FORCE)", timeout=120)
        finally:
            await admin.close()


def with_database(dsn: str, name: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


async def install(
    dsn: str, *, endpoints: int, port: int, in_flight: int, accounts: int | None = None, urls: Sequence[str] = (), **settings: Any
) -> asyncpg.Connection:  # fmt: skip
    """Install the schema anew, with `endpoints` live endpoints in `accounts` accounts, by default one in each.

    `urls` are where they are, else each has a path of its own at `port`."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP SCHEMA IF EXISTS webhook CASCADE")
    await migrate(connection, settings_module.load(database_url=dsn, **settings))
    await add_endpoints(
        connection,
        urls or [f"http://127.0.0.1:{port}/hook/{n}" for n in range(endpoints)],
        in_flight=in_flight,
        accounts=accounts or endpoints,
    )
    return connection


async def add_endpoints(connection: asyncpg.Connection, urls: Sequence[str], *, in_flight: int, accounts: int) -> None:
    """Add live endpoints that want everything; the n-th is of account `acct_<n % accounts>`. No dispatcher may be running: none is told."""
    async with connection.transaction():
        for table in ("endpoint", "endpoint_secret", "subscription"):  # telling takes longer than adding
            await connection.execute(f"ALTER TABLE webhook.{table} DISABLE TRIGGER USER")
        await connection.execute(
            "INSERT INTO webhook.endpoint (account_id, url, state, in_flight_max) "
            "SELECT 'acct_' || (n - 1) % $3::integer, url, 'live', $2 FROM unnest($1::text[]) WITH ORDINALITY AS u (url, n) ORDER BY n",
            urls, in_flight, max(1, accounts),
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) SELECT id, $1 FROM webhook.endpoint", SECRET
        )
        await connection.execute(
            "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id, taken_up) "
            "SELECT id, '*', 0, true FROM webhook.endpoint"
        )
        for table in ("endpoint", "endpoint_secret", "subscription"):
            await connection.execute(f"ALTER TABLE webhook.{table} ENABLE TRIGGER USER")
    await connection.execute("ANALYZE webhook.endpoint, webhook.endpoint_secret, webhook.subscription")


async def wal_bytes(connection: asyncpg.Connection) -> float:
    """Return where the server's WAL has got to. It is the whole server's: others' writes count."""
    return float(await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"))


async def dead_tuples(connection: asyncpg.Connection, schema: str = "webhook") -> int:
    """Return how many row versions have been left dead in this database's schema since it was made. Sessions that have ended have told all."""
    await connection.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
    dead: int = await connection.fetchval(
        "SELECT coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_user_tables WHERE schemaname = $1", schema
    )
    return dead


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What everybody has used until now, or between two of these. `postgres_s` is None where the server's processes can't be seen."""

    wall_s: float
    postgres_s: float | None
    running_s: float
    sink_s: float
    wal_bytes: float
    statements: int

    def since(self, before: "Snapshot") -> "Snapshot":
        return Snapshot(
            self.wall_s - before.wall_s,
            None if self.postgres_s is None or before.postgres_s is None else self.postgres_s - before.postgres_s,
            self.running_s - before.running_s,
            self.sink_s - before.sink_s,
            self.wal_bytes - before.wal_bytes,
            self.statements - before.statements,
        )


async def snapshot(
    bench: Bench, connection: asyncpg.Connection, running: "Running | None" = None, sink_pid: int | None = None
) -> Snapshot:
    return Snapshot(
        time.perf_counter(),
        bench.postgres_cpu_s(),
        0.0 if running is None else running.cpu_s(),
        0.0 if sink_pid is None else cpu_s(sink_pid, with_children=True),
        await wal_bytes(connection),
        0 if running is None else running.counters.statements,
    )


async def passed(connection: asyncpg.Connection, last: int) -> None:
    """Wait until every event up to `last` is settled."""
    deadline = time.monotonic() + PASSED_S
    while not await connection.fetchval(
        "SELECT position >= $1 AND isempty(gaps) AND NOT EXISTS (SELECT FROM webhook.lane) FROM webhook.checkpoint",
        last,
    ):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the events up to {last} were not settled within {PASSED_S:g} s")
        await asyncio.sleep(0.02)


async def settle(connection: asyncpg.Connection) -> None:
    """Have the server finish what a load has left it to do: its pages written, its tables vacuumed. What is measured next is not that."""
    for table in ("outbox", "attempt", "retry"):
        await connection.execute(f"VACUUM (ANALYZE) webhook.{table}", timeout=PASSED_S)
    await connection.execute("CHECKPOINT", timeout=PASSED_S)


# ── sinks ──


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log /dev/null crit; worker_rlimit_nofile 65536;
events {{ worker_connections 20000; }}
http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; client_max_body_size 2m; client_body_buffer_size 512k;
  server {{ listen 127.0.0.1:{port} backlog=8192{tls}; location / {{ return 204; }} }} }}
"""


class Certificate(NamedTuple):
    """PEM files of a certificate for 127.0.0.1 and of the authority that signed it."""

    chain: Path
    key: Path
    ca: Path


@contextlib.contextmanager
def certificate() -> Iterator[Certificate]:
    import trustme  # of the development group; nothing else of the bench needs it

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-tls-") as directory:
        made = Certificate(*(Path(directory) / name for name in ("chain.pem", "key.pem", "ca.pem")))
        for blob in issued.cert_chain_pems:
            blob.write_to_path(str(made.chain), append=True)
        issued.private_key_pem.write_to_path(str(made.key))
        authority.cert_pem.write_to_path(str(made.ca))
        yield made


@contextlib.contextmanager
def sink(kind: str, *, tls: Certificate | None = None, delay_s: float = 0) -> Iterator[tuple[int, int]]:
    """Start a light receiver in a process of its own: nginx, or the project's sink, which alone can be slow. Yield its port and pid."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        if kind == "nginx" and not delay_s:
            directory = tempfile.mkdtemp(prefix="dispatcher-bench-nginx-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            config = Path(directory) / "nginx.conf"
            secured = "" if tls is None else f" ssl; ssl_certificate {tls.chain}; ssl_certificate_key {tls.key}"
            config.write_text(NGINX.format(dir=directory, port=port, tls=secured))
            started = stack.enter_context(process("nginx", "-c", str(config)))
        else:
            options = ["--port", str(port), "--quiet", "--delay", str(delay_s)]
            if tls is not None:
                options += ["--tls-cert", str(tls.chain), "--tls-key", str(tls.key)]
            started = stack.enter_context(process(sys.executable, "-m", "dispatcher", "sink", *options))
        await_port(port)
        yield port, started.pid


def sink_kind(wanted: str) -> str:
    if wanted == "auto":
        return "nginx" if shutil.which("nginx") else "own"
    return wanted


def await_port(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.02)


# ── the dispatcher, and others that send ──


@dataclass(frozen=True, slots=True)
class Running:
    """A process that delivers, under test."""

    process: "subprocess.Popen[bytes]"
    counters: Counters

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def rss_mb(self) -> float:
        return rss_bytes(self.pid) / 1e6


@contextlib.asynccontextmanager
async def watched(module: str, *arguments: str, env: dict[str, str]) -> AsyncIterator[Running]:
    """Run a module of the bench's that counts its statements.

    Its end is awaited: a receiver in this loop has to answer its last POSTs.
    """
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
        path = Path(directory) / "counters"
        counters = Counters(path)
        with process(
            sys.executable, "-m", module, *arguments, env=env | {"BENCH_COUNTERS": str(path)}, quiet=False
        ) as started:
            yield Running(started, counters)
            started.terminate()
            await asyncio.to_thread(started.wait, STOP_S)


@contextlib.asynccontextmanager
async def service(
    dsn: str, *, dns_port: int | None = None, without_options: bool = False, **settings: Any
) -> AsyncIterator[Running]:
    """Start `dispatcher run` as a service would; don't wait for it. What it is told beyond settings says bench/service.py."""
    env = {f"DISPATCHER_{name.upper()}": str(value) for name, value in settings.items()}
    env |= {"DISPATCHER_DATABASE_URL": dsn, "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8"}
    env.setdefault("DISPATCHER_LOG_LEVEL", "error")  # a bad receiver is told of at each try, below that
    if dns_port is not None:
        env["BENCH_DNS_PORT"] = str(dns_port)
    if without_options:
        env["BENCH_WITHOUT_OPTIONS"] = "1"
    async with watched("bench.service", env=env) as running:
        yield running


@contextlib.asynccontextmanager
async def dispatcher(dsn: str, connection: asyncpg.Connection, **settings: Any) -> AsyncIterator[Running]:
    """Run `dispatcher run`; yield once it owns the log."""
    epoch = await connection.fetchval("SELECT epoch FROM webhook.checkpoint")
    async with service(dsn, **settings) as running:
        await owns(connection, running, epoch)
        await asyncio.sleep(0.3)  # its start's own CPU time is not a delivery's
        yield running


@contextlib.asynccontextmanager
async def web(dsn: str, port: int) -> AsyncIterator[None]:
    """Run `dispatcher web`, the panel and API alone; don't wait for it."""
    env = {
        "DISPATCHER_DATABASE_URL": dsn,
        "DISPATCHER_WEB_LISTEN": f"127.0.0.1:{port}",
        "DISPATCHER_LOG_LEVEL": "error",
    }
    with process(sys.executable, "-m", "dispatcher", "web", env=env):
        yield


async def owns(connection: asyncpg.Connection, running: Running, epoch: int) -> None:
    """Wait until the process has raised the epoch above `epoch`."""
    while await connection.fetchval("SELECT epoch FROM webhook.checkpoint") == epoch:
        if running.process.poll() is not None:
            raise RuntimeError(f"the dispatcher ended with {running.process.returncode}")
        await asyncio.sleep(0.02)


class Posted(NamedTuple):
    """What a client that only posts has done. `cpu_s` is None where it can't be told."""

    posts: int
    wall_s: float
    cpu_s: float


def ceiling(port: int, connections: int, posts: int, body_bytes: int) -> Posted:
    """Run the frozen bare client against a sink."""
    out = subprocess.run(
        [sys.executable, "-m", "bench.ceiling", "127.0.0.1", str(port), str(connections), str(posts), str(body_bytes)],
        capture_output=True, check=True, text=True, timeout=300,
    )  # fmt: skip
    return Posted(**json.loads(out.stdout))


WRK = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.body = string.rep("x", %d)
done = function(summary, latency, requests)
  io.stderr:write(string.format('{"posts": %%d, "wall_s": %%f, "failed": %%d}', summary.requests, summary.duration / 1e6,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
"""


def wrk(port: int, connections: int, seconds: float, body_bytes: int) -> Posted:
    """Run `wrk`, one thread, against a sink."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK % body_bytes)
        script.flush()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", script.name, f"http://127.0.0.1:{port}/hook"],
            capture_output=True, check=True, text=True, timeout=300,
        )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(out.stderr)
    assert not told["failed"], told
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Posted(told["posts"], told["wall_s"], used_s)
