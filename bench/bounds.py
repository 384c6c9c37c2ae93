"""Bounds: what a dispatcher takes of memory, descriptors and its own loop's time while something is far too large. `python -m bench.bounds`.

Each scenario has a fresh database, a dispatcher that measures itself (bench/probe.py), and, beside what is too large, an account whose small
events must go on arriving: `beside_max_ms` is the longest one of these took from its insert to its POST. Memory and descriptors are held to
bounds, and exceeding one is exit status 1; the loop's lateness is reported, because on a busy machine it is the machine's too.

`--full` is the size that the name says; without it everything is small and takes seconds.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import click
import uvloop
from rich.console import Console
from rich.table import Table

from bench import rig
from dispatcher import settings as settings_module
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.main import make_transport

MEMORY_GROWTH_MB = 160.0  # 64 MB of payloads in memory, as much again for what is read and recorded, and Python's own
DESCRIPTORS_MAX = 1_500.0  # 1,000 sockets an origin
BESIDE_S = 0.05  # between the small events
HELD_S = 2.0
BESIDE = "beside"
BIG = "big"
FILL = "INSERT INTO webhook.outbox (account_id, type, payload) SELECT $1, 'message.sent', $2::text::json FROM generate_series(1, $3::bigint)"
Figures = dict[str, Any]


class Bench:
    """One scenario's database and receivers."""

    def __init__(self, db: asyncpg.Connection, dsn: str, ports: dict[str, int]) -> None:
        self.db = db
        self.dsn = dsn
        self.ports = ports

    async def endpoint(self, account: str, url: str, **columns: Any) -> int:
        names = "".join(f", {name}" for name in columns)
        places = "".join(f", ${n}" for n in range(3, 3 + len(columns)))
        endpoint_id: int = await self.db.fetchval(
            f"INSERT INTO webhook.endpoint (account_id, url, state{names}) VALUES ($1, $2, 'live'{places}) RETURNING id",
            account, url, *columns.values(),
        )  # fmt: skip
        await self.db.execute(
            "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, $2)", endpoint_id, rig.SECRET
        )
        await self.db.execute(
            "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, '*', webhook.last_id())", endpoint_id
        )  # fmt: skip
        return endpoint_id

    def url(self, receiver: str, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.ports[receiver]}{path}"

    async def fill(self, count: int, payload: str = "{}", account: str = BIG) -> None:
        await self.db.execute(FILL, account, payload, count, timeout=900)

    async def until(self, condition: str, *args: Any, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not await self.db.fetchval(condition, *args, timeout=60):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {within_s:.0f} s: {condition}")
            await asyncio.sleep(0.1)

    @contextlib.asynccontextmanager
    async def dispatching(self, figures: Figures, **settings: Any) -> AsyncIterator[None]:
        """Run a dispatcher and the small events beside it; add what it measured to `figures`."""
        beside = await self.endpoint(BESIDE, self.url("beside"))
        out = Path(tempfile.mkstemp(prefix="dispatcher-bounds-")[1])
        env = {f"DISPATCHER_{name.upper()}": str(value) for name, value in settings.items()}
        env |= {
            "DISPATCHER_DATABASE_URL": self.dsn,
            "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8",
            "DISPATCHER_LOG_LEVEL": "error",
        }
        began = time.monotonic()
        with rig.process(sys.executable, "-m", "bench.probe", str(out), env=env, quiet=False) as started:
            await self.until("SELECT bool_and(taken_up) FROM webhook.subscription", within_s=60)
            await self.fill(1, account=BESIDE)
            going_on = asyncio.create_task(self._beside())
            started.send_signal(signal.SIGUSR1)
            figures["rss_start_mb"] = rig.rss_bytes(started.pid) / 2**20
            try:
                yield
            finally:
                going_on.cancel()
                await asyncio.gather(going_on, return_exceptions=True)
            await self.until(ARRIVED, beside, BESIDE, within_s=60)
            started.send_signal(signal.SIGTERM)
            await asyncio.to_thread(started.wait, 60)
        figures["seconds"] = time.monotonic() - began
        figures["beside_events"] = await self.db.fetchval(
            "SELECT count(*) FROM webhook.attempt WHERE endpoint_id = $1", beside
        )
        figures["beside_max_ms"] = await self.db.fetchval(SLOWEST, beside)
        figures |= json.loads(out.read_text())
        out.unlink()

    async def _beside(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        try:
            while True:
                await connection.execute(FILL, BESIDE, "{}", 1)
                await asyncio.sleep(BESIDE_S)
        finally:
            connection.terminate()


ARRIVED = """
SELECT NOT EXISTS (
    SELECT FROM webhook.outbox AS o WHERE o.account_id = $2
    AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = o.id AND a.endpoint_id = $1 AND a.fault IS NULL)
)
"""
SLOWEST = """
SELECT (1000 * extract(epoch FROM max(a.started_at - o.created_at)))::float
FROM webhook.attempt AS a JOIN webhook.outbox AS o ON o.id = a.event_id WHERE a.endpoint_id = $1
"""
PASSED = "SELECT position >= $1 AND isempty(gaps) FROM webhook.checkpoint"
ATTEMPTS = "SELECT count(*) >= $2 FROM webhook.attempt WHERE endpoint_id = $1"


# ── receivers without an end ──


async def hostile(bench: Bench, figures: Figures, path: str, size: int) -> None:
    """Let `size` events meet it; each attempt must end by itself. The breaker would spare it most of them: it is kept from that."""
    endpoint = await bench.endpoint(BIG, bench.url("hostile", path), timeout_ms=3_000)
    async with bench.dispatching(figures, breaker_wait_s=0.05, breaker_wait_max_s=0.05, headers_timeout_s=2):
        await bench.fill(size)
        await bench.until(ATTEMPTS, endpoint, size, within_s=600)
        outcomes = await bench.db.fetch(
            "SELECT DISTINCT coalesce(fault, 'delivered') AS o FROM webhook.attempt WHERE endpoint_id = $1", endpoint
        )
        figures["outcomes"] = ", ".join(sorted(row["o"] for row in outcomes))


async def ten_gigabytes(bench: Bench, figures: Figures, size: int) -> None:
    await hostile(bench, figures, "/body", size)


async def ten_million_headers(bench: Bench, figures: Figures, size: int) -> None:
    await hostile(bench, figures, "/headers", size)


async def a_byte_a_second(bench: Bench, figures: Figures, size: int) -> None:
    await hostile(bench, figures, "/drip", size)


async def refused_in_a_row(bench: Bench, figures: Figures, size: int) -> None:
    """The pool alone: behind a lane a breaker spares it nearly all of them."""
    settings = settings_module.load(allowed_networks="127.0.0.0/8", database_url=bench.dsn)
    pool = make_transport(settings)
    origin = Origin("http", "127.0.0.1", rig.free_port())
    before, most, began = len(os.listdir("/proc/self/fd")), 0, time.monotonic()
    rss = rig.rss_bytes(os.getpid())
    refused = 0
    for n in range(size):
        refused += await _is_refused(pool, origin)
        if n % 100 == 0:
            most = max(most, len(os.listdir("/proc/self/fd")))
    figures |= {
        "seconds": time.monotonic() - began,
        "refused": float(refused),
        "descriptors_max": float(most - before),
        "rss_start_mb": rss / 2**20,
        "rss_max_mb": rig.rss_bytes(os.getpid()) / 2**20,
    }
    await pool.close()


async def _is_refused(pool: Any, origin: Origin) -> bool:
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    pool.connect(origin, ready.set_result)
    outcome = await ready
    return isinstance(outcome, Outcome) and outcome.fault is Fault.CONNECT


# ── too much of it ──


async def retries_due_at_once(bench: Bench, figures: Figures, size: int) -> None:
    """They failed while nobody looked, and are all due as the dispatcher starts."""
    endpoint = await bench.endpoint(BIG, bench.url("good", "/big"), in_flight_max=1_000)
    await bench.fill(size)
    await bench.db.execute(
        "INSERT INTO webhook.attempt SELECT id, $1, now() - interval '1 hour', 0, 1000, 1, 500, 'status' FROM webhook.outbox", endpoint
    )  # fmt: skip
    await bench.db.execute(
        "INSERT INTO webhook.retry SELECT $1, id, 0, 2, now() - interval '1 hour', now(), 'status' FROM webhook.outbox", endpoint
    )  # fmt: skip
    # As it was left: with the checkpoint before them the head would read a million settled events first, and the small ones wait for that.
    await bench.db.execute("UPDATE webhook.checkpoint SET position = webhook.last_id()")
    await bench.db.execute("VACUUM ANALYZE")
    async with bench.dispatching(figures):
        await bench.until("SELECT NOT EXISTS (SELECT FROM webhook.retry)", within_s=1_800)


async def payloads_at_the_limit(bench: Bench, figures: Figures, size: int) -> None:
    endpoint = await bench.endpoint(BIG, bench.url("good", "/big"))
    limit = settings_module.Settings.model_fields["payload_bytes_max"].default
    async with bench.dispatching(figures):
        await bench.fill(size, '"' + "x" * (limit - 2) + '"')
        await bench.until(ATTEMPTS, endpoint, size, within_s=900)


async def transaction_committed(bench: Bench, figures: Figures, size: int) -> None:
    endpoint = await bench.endpoint(BIG, bench.url("good", "/big"), in_flight_max=1_000)
    async with bench.dispatching(figures):
        await bench.fill(size)
        await bench.until(ATTEMPTS, endpoint, size, within_s=1_800)


async def transaction_rolled_back(bench: Bench, figures: Figures, size: int) -> None:
    async with bench.dispatching(figures):
        transaction = bench.db.transaction()
        await transaction.start()
        await bench.fill(size)
        await transaction.rollback()
        await bench.until(PASSED, await bench.db.fetchval("SELECT webhook.last_id()"), within_s=120)


async def transaction_held_open(bench: Bench, figures: Figures, size: int) -> None:
    await bench.endpoint(BIG, bench.url("good", "/big"), in_flight_max=1_000)
    held = await asyncpg.connect(bench.dsn)
    async with bench.dispatching(figures):
        await held.execute("BEGIN")
        await held.execute(FILL, BIG, "{}", size, timeout=900)
        await asyncio.sleep(HELD_S)
        await held.execute("ROLLBACK")
        await held.close()
        await bench.until(PASSED, await bench.db.fetchval("SELECT webhook.last_id()"), within_s=120)


async def endpoints_of_an_account(bench: Bench, figures: Figures, size: int) -> None:
    await bench.db.execute(
        "INSERT INTO webhook.endpoint (account_id, url, state) SELECT $1, $2 || n, 'live' FROM generate_series(1, $3::integer) AS n",
        BIG, bench.url("good", "/big/"), size,
    )  # fmt: skip
    await bench.db.execute(
        "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) SELECT id, $1 FROM webhook.endpoint", rig.SECRET
    )
    await bench.db.execute(
        "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT id, '*', 0 FROM webhook.endpoint"
    )
    events = 10
    async with bench.dispatching(figures):
        await bench.fill(events)
        await bench.until(
            "SELECT count(*) >= $1 FROM webhook.attempt AS a JOIN webhook.endpoint AS e ON e.id = a.endpoint_id WHERE e.account_id = $2",
            size * events, BIG, within_s=600,
        )  # fmt: skip


async def an_hour_of_retry_after(bench: Bench, figures: Figures, size: int) -> None:
    """One answer silences the lane; what comes after it waits in the log, not in memory."""
    endpoint = await bench.endpoint(BIG, bench.url("patience", "/big"))
    async with bench.dispatching(figures):
        await bench.fill(size)
        await bench.until(
            "SELECT backlog >= $2 FROM webhook.lane WHERE endpoint_id = $1", endpoint, size - 1_000, within_s=300
        )
        figures["attempts"] = float(
            await bench.db.fetchval("SELECT count(*) FROM webhook.attempt WHERE endpoint_id = $1", endpoint)
        )


Scenario = Callable[[Bench, Figures, int], Awaitable[None]]
SCENARIOS: dict[str, tuple[Scenario, int, int]] = {  # name: what, small, full
    "10 GB in an answer": (ten_gigabytes, 20, 1_000),
    "ten million headers": (ten_million_headers, 20, 1_000),
    "a byte a second": (a_byte_a_second, 5, 200),
    "connections refused in a row": (refused_in_a_row, 2_000, 100_000),
    "retries due at once": (retries_due_at_once, 5_000, 1_000_000),
    "payloads at the limit": (payloads_at_the_limit, 400, 8_000),
    "rows in one transaction, committed": (transaction_committed, 20_000, 5_000_000),
    "rows in one transaction, rolled back": (transaction_rolled_back, 50_000, 5_000_000),
    "rows in one transaction, held open": (transaction_held_open, 50_000, 5_000_000),
    "endpoints of one account": (endpoints_of_an_account, 500, 10_000),
    "Retry-After of an hour": (an_hour_of_retry_after, 10_000, 1_000_000),
}


async def run(name: str, dsn: str, ports: dict[str, int], size: int) -> Figures:
    """Run one scenario in a fresh schema; return its figures."""
    db = await rig.install(dsn, endpoints=0, port=1, in_flight=1)
    figures: Figures = {"scenario": name, "size": size}
    try:
        await SCENARIOS[name][0](Bench(db, dsn, ports), figures, size)
    finally:
        await db.close()
    return figures


def exceeded(figures: Figures) -> list[str]:
    """Say which bounds do not hold."""
    grown = figures["rss_max_mb"] - figures["rss_start_mb"]
    found = []
    if grown > MEMORY_GROWTH_MB:
        found.append(f"memory grew by {grown:.0f} MB, and may by {MEMORY_GROWTH_MB:.0f}")
    if figures["descriptors_max"] > DESCRIPTORS_MAX:
        found.append(f"{figures['descriptors_max']:.0f} descriptors, and there may be {DESCRIPTORS_MAX:.0f}")
    return found


@contextlib.contextmanager
def receivers() -> Any:
    """Start the receivers, each a process of its own; yield their ports."""
    ports = {name: rig.free_port() for name in ("beside", "good", "patience", "hostile")}
    sink = [sys.executable, "-m", "dispatcher", "sink", "--quiet", "--port"]
    with (
        rig.process(
            *sink, str(ports["beside"])
        ),  # a receiver of its own: an origin's room is shared by all of its endpoints
        rig.process(*sink, str(ports["good"])),
        rig.process(*sink, str(ports["patience"]), "--status", "429", "--retry-after", "3600"),
        rig.process(sys.executable, "-m", "bench.hostile", str(ports["hostile"])),
    ):
        for port in ports.values():
            rig.await_port(port)
        yield ports


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--full", is_flag=True, help="The sizes that are promised, instead of small ones: about an hour.")
@click.option("--only", type=click.Choice(list(SCENARIOS)), help="One scenario.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(full: bool, only: str | None, as_json: bool) -> None:
    """Meet what is far too large, and measure memory, descriptors and the loop's lateness."""
    results = []
    with rig.postgres() as (dsn, _), receivers() as ports:
        for name, (_, small, large) in SCENARIOS.items():
            if only in (None, name):
                click.echo(name, err=True)
                results.append(uvloop.run(run(name, dsn, ports, large if full else small)))
                click.echo(json.dumps(results[-1]), err=True)
    if as_json:
        click.echo(json.dumps(results))
    else:
        _print(results)
    broken = [f"{figures['scenario']}: {what}" for figures in results for what in exceeded(figures)]
    for line in broken:
        click.echo(line, err=True)
    sys.exit(1 if broken else 0)


COLUMNS = {
    "seconds": "s", "rss_start_mb": "MB at start", "rss_max_mb": "MB at most", "descriptors_max": "descriptors",
    "lag_p99_ms": "lag p99, ms", "lag_max_ms": "lag max, ms", "beside_max_ms": "beside max, ms", "outcomes": "outcomes",
}  # fmt: skip


def _print(results: list[Figures]) -> None:
    table = Table()
    for column in ("scenario", "size", *COLUMNS.values()):
        table.add_column(column, justify="left" if column in ("scenario", "outcomes") else "right")
    for figures in results:
        cells = [figures.get(name, "–") for name in COLUMNS]
        shown = (f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
        table.add_row(figures["scenario"], f"{figures['size']:,}", *shown)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
