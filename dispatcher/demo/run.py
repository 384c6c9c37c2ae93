"""`dispatcher demo`: the whole product on one screen, then an account of every event.

An embedded PostgreSQL in a temporary directory, the dispatcher and its panel as `run` would run them, five endpoints on a
local sink, and an SMS platform that inserts into the outbox. The first thing it prints is a link that logs a browser in,
once. At the end everything settles, and the account is drawn up from the database alone.
"""

import asyncio
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dispatcher.demo.events import SmsPlatform
from dispatcher.domain.principal import OPERATOR
from dispatcher.domain.text import amount
from dispatcher.engine.engine import Engine
from dispatcher.engine.lane import Lane
from dispatcher.main import make_engine, make_transport, make_web, tune_gc
from dispatcher.settings import Settings
from dispatcher.sink import Behaviour, Received, Sink
from dispatcher.store import access, embedded
from dispatcher.store.admin import Admin
from dispatcher.store.migrate import migrate
from dispatcher.store.session import connect_once

ACCOUNT = "acct_demo"
UP, DOWN = 12.0, 6.0  # the endpoint that goes down and comes back, seconds each
SETTLE_MAX_S = 120.0
LATENCIES_KEPT = 20_000
LOST_TRACK_MAX = 50_000
LINK_S = 86_400  # on this machine only, and gone with the demo


PROMPT = Behaviour()


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the demo's endpoints. `rate_share`: its rate limit as a share of the demo's rate."""

    name: str
    about: str
    types: list[str]
    behaviour: Behaviour = PROMPT
    rate_share: float | None = None


SAMPLES = (
    Sample("fast", "answers at once", ["*"]),
    Sample("slow", "takes 200–600 ms", ["message.delivered"], Behaviour(delay_s=0.2, delay_jitter_s=0.4)),
    Sample("flaky", "fails one in five", ["message.*"], Behaviour(fail_rate=0.2)),
    Sample("limited", "has a rate limit", ["message.sent"], rate_share=0.3),
    Sample("outage", f"down {DOWN:g} s in every {UP + DOWN:g}", ["message.*", "contact.*"]),
)


@dataclass
class Tally:
    """What the producer did and the sink saw."""

    committed: int = 0
    received: int = 0
    first_delivery_s: float | None = None
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    committed_at: dict[str, float] = field(
        default_factory=dict
    )  # public id → acknowledged at; until the fast endpoint has it
    early: dict[str, float] = field(default_factory=dict)  # received before the producer's own acknowledgement

    def commit(self, public_ids: list[str], at: float) -> None:
        self.committed += len(public_ids)
        for public_id in public_ids:
            if self.early.pop(public_id, None) is not None:
                self.latencies_ms.append(0.0)
            elif len(self.committed_at) < LOST_TRACK_MAX:
                self.committed_at[public_id] = at

    def receive(self, event: Received) -> None:
        self.received += 1
        if event.path == "/fast" and event.webhook_id is not None and event.attempt == 1:
            committed = self.committed_at.pop(event.webhook_id, None)
            if committed is not None:
                self.latencies_ms.append(max(0.0, (event.received_at - committed) * 1e3))
            elif len(self.early) < LOST_TRACK_MAX:
                self.early[event.webhook_id] = event.received_at

    def percentile(self, share: float) -> float | None:
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def run_demo(settings: Settings, *, seconds: float | None, rate: float, plain: bool, json_out: bool) -> bool:
    """Run the demo; return whether every committed event is accounted for."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    began = time.monotonic()
    with _temporary_directory() as directory:
        if not json_out:
            click.echo("starting an embedded PostgreSQL …", err=True)
        server = await asyncio.to_thread(embedded.start, directory)
        try:
            return await _demo(
                settings, server.dsn, stop, began, seconds=seconds, rate=rate, plain=plain, json_out=json_out
            )
        finally:
            await asyncio.to_thread(server.stop)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def _demo(
    settings: Settings, dsn: str, stop: asyncio.Event, began: float, *, seconds: float | None, rate: float, plain: bool, json_out: bool
) -> bool:  # fmt: skip
    tally = Tally()
    sink = Sink(behaviour=Behaviour(), on_event=tally.receive)
    await sink.start()
    connection = await connect_once(dsn, "dispatcher demo")
    transport = make_transport(settings)
    engine = make_engine(settings, dsn, transport)
    panel = make_web(settings, dsn, transport, engine)
    tasks: list[asyncio.Task[Any]] = []
    serving: asyncio.Task[None] | None = None
    try:
        await migrate(connection, settings)
        serving = asyncio.create_task(panel.run())
        await _either(panel.ready.wait(), serving)
        admin = Admin(connection, settings)
        lanes = {sample.name: await _make_endpoint(admin, sink, sample, rate) for sample in SAMPLES}
        tune_gc()
        tasks.append(asyncio.create_task(engine.run()))
        await _either(engine.ready.wait(), tasks[0])
        _, token = await access.create_link(connection, OPERATOR, account_id=None, ttl_s=LINK_S, session_s=LINK_S)
        say = _quiet if json_out else click.echo
        say(
            f"The panel, with live traffic; this link logs a browser in, once: http://127.0.0.1:{panel.port}/enter/{token}"
        )
        enough = asyncio.Event()
        producer = asyncio.create_task(_produce(admin, tally, rate, enough))
        outage = asyncio.create_task(_outages(sink))
        tasks += [producer, outage]
        end = asyncio.create_task(_wait(stop, seconds))
        view = asyncio.create_task(_show(engine, tally, lanes, plain, json_out, began))
        tasks += [end, view]
        await asyncio.wait([end, *tasks[:3]], return_when=asyncio.FIRST_COMPLETED)
        enough.set()  # not cancelled: an insert under way is committed, and counted
        outage.cancel()
        for result in await asyncio.gather(producer, outage, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        sink.set_behaviour("/outage", Behaviour())
        stop.clear()
        accounts = await _settle(engine, admin, stop, say=say)
        view.cancel()
        await asyncio.gather(view, return_exceptions=True)
        engine.stop()
        await tasks[0]
        return _summary(accounts, tally, sink, engine, json_out)
    finally:
        tasks += [] if serving is None else [serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await transport.close()
        await sink.stop()
        await connection.close()


async def _make_endpoint(admin: Admin, sink: Sink, sample: Sample, rate: float) -> int:
    path = f"/{sample.name}"
    sink.set_behaviour(path, sample.behaviour)
    config: dict[str, Any] = {"url": sink.url + path, "name": sample.name, "event_types": sample.types}
    if sample.rate_share is not None:
        config["rate_per_s"] = max(2.0, rate * sample.rate_share)
    return (await admin.create(ACCOUNT, config, live=True)).id


async def _produce(admin: Admin, tally: Tally, rate: float, enough: asyncio.Event) -> None:
    """Insert events at `rate`, in small statements, as a platform would."""
    platform = SmsPlatform(random.Random(), [ACCOUNT])  # noqa: S311 - samples  # nosec B311
    began, produced = time.monotonic(), 0
    while not enough.is_set():
        due = min(500, int((time.monotonic() - began) * rate) - produced)
        if due > 0:
            events = [platform.next(datetime.now(UTC)) for _ in range(due)]
            ids = await admin.events.emit_many(
                [(e.account_id, e.type, e.payload.decode(), e.occurred_at) for e in events]
            )
            tally.commit(ids, time.time())
            produced += due
        await asyncio.sleep(max(0.002, min(0.05, 1 / rate)))


async def _outages(sink: Sink) -> None:
    while True:
        await asyncio.sleep(UP)
        sink.set_behaviour("/outage", Behaviour(status=503))
        await asyncio.sleep(DOWN)
        sink.set_behaviour("/outage", Behaviour())


async def _settle(engine: Engine, admin: Admin, stop: asyncio.Event, *, say: Any) -> list[dict[str, Any]]:
    """Wait until nothing is open any more, at most SETTLE_MAX_S; a second Ctrl-C gives up."""
    say("no new events; letting everything settle (Ctrl-C gives up) …")
    deadline = time.monotonic() + SETTLE_MAX_S
    while True:
        accounts = await admin.events.account_for()
        open_ = sum(account["open"] for account in accounts)
        if not open_ or time.monotonic() > deadline or stop.is_set():
            return accounts
        try:
            async with asyncio.timeout(0.5):
                await stop.wait()
        except TimeoutError:
            pass  # look again


# ── the view ──


async def _show(engine: Engine, tally: Tally, lanes: dict[str, int], plain: bool, json_out: bool, began: float) -> None:
    console = Console()
    live = not plain and console.is_terminal
    rates = _Rates(engine)
    with ExitStack() as stack:
        screen = stack.enter_context(Live(console=console, refresh_per_second=4, transient=False)) if live else None
        while True:
            await asyncio.sleep(0.25 if live else 1.0)
            rates.tick()
            if tally.first_delivery_s is None and tally.received:
                tally.first_delivery_s = time.monotonic() - began
            if screen is not None:
                screen.update(_screen(engine, tally, lanes, rates))
            elif not json_out:
                click.echo(_line(engine, tally, rates))


class _Rates:
    """Deliveries a second over the last few seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=12)

    def tick(self) -> None:
        self._points.append((time.monotonic(), self._engine.counters.delivered))

    @property
    def per_s(self) -> float:
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"


def _line(engine: Engine, tally: Tally, rates: _Rates) -> str:
    counters = engine.counters
    return (
        f"committed {tally.committed:7}  delivered {counters.delivered:7} ({rates.per_s:6.0f}/s)  failed attempts {counters.failed:5}  "
        f"commit → received p50 {_ms(tally.percentile(0.5))}, p99 {_ms(tally.percentile(0.99))}"
    )


def _screen(engine: Engine, tally: Tally, lanes: dict[str, int], rates: _Rates) -> Group:
    table = Table(expand=False)
    for column in ("endpoint", "what it does", "state", "breaker", "in flight", "queued", "behind", "retries due"):
        table.add_column(
            column, justify="left" if column in ("endpoint", "what it does", "state", "breaker") else "right"
        )
    incarnation = engine.incarnation
    for sample in SAMPLES:
        lane = None if incarnation is None else incarnation.lanes.get(lanes[sample.name])
        if lane is not None:
            table.add_row(sample.name, sample.about, *_lane_cells(lane))
    return Group(Text(_line(engine, tally, rates)), table)


def _lane_cells(lane: Lane) -> list[str]:
    return [
        "live" if lane.live else "catching up",
        lane.breaker.state.value,
        f"{lane.in_flight}/{lane.limit()}",
        str(len(lane.queue)),
        str(lane.backlog),
        str(len(lane.retries)),
    ]


def _summary(accounts: list[dict[str, Any]], tally: Tally, sink: Sink, engine: Engine, json_out: bool) -> bool:
    owed, delivered = sum(a["owed"] for a in accounts), sum(a["delivered"] for a in accounts)
    dead, still_open = sum(a["dead_letters"] for a in accounts), sum(a["open"] for a in accounts)
    good: bool = still_open == 0 and owed == delivered + dead
    if json_out:
        click.echo(
            orjson.dumps(
                {
                    "ok": good, "committed": tally.committed, "owed": owed, "delivered": delivered, "dead_letters": dead, "open": still_open,
                    "received": sink.received, "duplicates_received": sink.duplicates, "first_delivery_s": tally.first_delivery_s,
                    "latency_p50_ms": tally.percentile(0.5), "latency_p99_ms": tally.percentile(0.99), "endpoints": accounts,
                    "counters": engine.counters.as_dict(),
                },
                option=orjson.OPT_INDENT_2,
            ).decode()
        )  # fmt: skip
        return good
    click.echo("\nFrom the database:")
    click.echo(f"{'endpoint':10}{'owed':>9}{'delivered':>11}{'dead letters':>14}{'open':>6}{'attempts':>10}")
    for a in accounts:
        click.echo(
            f"{a['name']:10}{a['owed']:9}{a['delivered']:11}{a['dead_letters']:14}{a['open']:6}{a['attempts']:10}"
        )
    click.echo(
        f"\n{amount(tally.committed, 'event')} committed, {amount(owed, 'delivery', 'deliveries')} owed: {delivered:,} delivered, "
        f"{dead:,} in dead letters, {still_open:,} open.\n"
        f"The receivers got {amount(sink.received, 'POST')}, {sink.duplicates:,} of them again (their own failures, retried).\n"
        f"Commit → received at the fast endpoint: p50 {_ms(tally.percentile(0.5))}, p99 {_ms(tally.percentile(0.99))}."
    )
    if good:
        click.echo("Every committed event is accounted for.")
    elif owed == delivered + dead + still_open:
        click.echo(
            f"It ended with {amount(still_open, 'delivery', 'deliveries')} still open: none is lost, and not all are made."
        )
    else:
        click.echo("NOT every committed event is accounted for.")
    return good


# ── small things ──


async def _wait(stop: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass  # time is up


async def _either(ready: Any, task: asyncio.Task[None]) -> None:
    """Wait for `ready`, or raise what ended `task` before."""
    waiter = asyncio.ensure_future(ready)
    await asyncio.wait([waiter, task], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiter.cancel()
        task.result()


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    # Under /tmp by name: a socket's path may have 107 bytes, and some systems' TMPDIR alone has more than half of that.
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-demo-", dir="/tmp"))  # made for us alone  # nosec B108
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quiet(*_: object) -> None:
    """Say nothing."""
