"""What the scenarios share: an embedded PostgreSQL, a sink and a dispatcher, each a process of its own, and their CPU time."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg

from dispatcher import settings as settings_module
from dispatcher.store import embedded
from dispatcher.store.migrate import migrate

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjU"
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int, *, with_children: bool = False) -> float:
    """Return the CPU seconds that a process (and, if asked, its living descendants) has used. Linux: /proc."""
    if not with_children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    total = 0.0
    for one in [pid, *descendants(pid)]:
        try:
            total += cpu_s(one)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between the listing and here
    return total


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


@contextlib.contextmanager
def postgres(**options: str) -> Iterator[tuple[str, int]]:
    """Start a fresh embedded PostgreSQL; yield its DSN and the postmaster's pid."""
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-bench-", dir="/tmp"))
    server = embedded.start(directory, options={"max_connections": "300"} | options)
    try:
        yield server.dsn, int((directory / "pgdata" / "postmaster.pid").read_text().split()[0])
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def process(*command: str, env: dict[str, str] | None = None, quiet: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process; end it with SIGTERM, and if that does not help within 20 s with SIGKILL."""
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
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


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
  server {{ listen 127.0.0.1:{port} backlog=8192; location / {{ return 204; }} }} }}
"""


@contextlib.contextmanager
def sink(kind: str) -> Iterator[tuple[int, int]]:
    """Start a light receiver in a process of its own: nginx, or the project's sink. Yield its port and pid."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        if kind == "nginx":
            directory = tempfile.mkdtemp(prefix="dispatcher-bench-nginx-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            config = Path(directory) / "nginx.conf"
            config.write_text(NGINX.format(dir=directory, port=port))
            started = stack.enter_context(process("nginx", "-c", str(config)))
        else:
            started = stack.enter_context(
                process(sys.executable, "-m", "dispatcher", "sink", "--port", str(port), "--quiet")
            )
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


async def install(dsn: str, *, endpoints: int, port: int, in_flight: int) -> asyncpg.Connection:
    """Install the schema anew, with one endpoint in each of `endpoints` accounts."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP SCHEMA IF EXISTS webhook CASCADE")
    await migrate(connection, settings_module.load(database_url=dsn))
    await connection.execute(
        "INSERT INTO webhook.endpoint (account_id, url, state, in_flight_max) "
        "SELECT 'acct_' || n, 'http://127.0.0.1:' || $2::text || '/hook/' || n, 'live', $3 FROM generate_series(0, $1::integer - 1) AS n",
        endpoints, str(port), in_flight,
    )  # fmt: skip
    await connection.execute(
        "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) SELECT id, $1 FROM webhook.endpoint", SECRET
    )
    await connection.execute(
        "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT id, '*', 0 FROM webhook.endpoint"
    )
    return connection


@contextlib.asynccontextmanager
async def dispatcher(dsn: str, connection: asyncpg.Connection, **settings: Any) -> AsyncIterator[int]:
    """Run `dispatcher run` as a service would; yield its pid once it owns the log."""
    env = {f"DISPATCHER_{name.upper()}": str(value) for name, value in settings.items()}
    env |= {
        "DISPATCHER_DATABASE_URL": dsn,
        "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8",
        "DISPATCHER_LOG_LEVEL": "warning",
    }
    epoch = await connection.fetchval("SELECT epoch FROM webhook.checkpoint")
    with process(sys.executable, "-m", "dispatcher", "run", env=env, quiet=False) as started:
        while await connection.fetchval("SELECT epoch FROM webhook.checkpoint") == epoch:
            if started.poll() is not None:
                raise RuntimeError(f"the dispatcher ended with {started.returncode}")
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # its start's own CPU time is not a delivery's
        yield started.pid


def ceiling(port: int, connections: int, posts: int, body_bytes: int) -> dict[str, float]:
    """Run the frozen bare client against the sink."""
    out = subprocess.run(
        [sys.executable, "-m", "bench.ceiling", "127.0.0.1", str(port), str(connections), str(posts), str(body_bytes)],
        capture_output=True, check=True, text=True, timeout=300,
    )  # fmt: skip
    result: dict[str, float] = json.loads(out.stdout)
    return result
