"""The composition root: the one module that imports every room and joins them."""

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from dispatcher import log
from dispatcher import settings as settings_module
from dispatcher.domain.breaker import BreakerState
from dispatcher.engine.engine import Engine, State
from dispatcher.errors import ForcedStopError, InputError
from dispatcher.mail.mailer import Mailer
from dispatcher.observe.reload import reload
from dispatcher.observe.service import EngineObservation, Observation, WebObservation
from dispatcher.observe.systemd import Notifier
from dispatcher.ports import Limits
from dispatcher.settings import Settings
from dispatcher.store.partitions import PgPartitions
from dispatcher.store.postgres import PgStore
from dispatcher.transport.pool import Pool
from dispatcher.transport.tcp import check_local
from dispatcher.transport.tls import make_tls_context

if TYPE_CHECKING:
    from dispatcher.web.server import WebServer

_log = structlog.get_logger(room="main")

# A collection walks every live object; with 1,000 connections the default thresholds cost a third of all CPU time (DESIGN §8). What lives
# from start to end is frozen, and older generations are rarely walked: our hot objects are acyclic and go by reference count. A young
# generation of 50,000 was a pause of 20 to 57 ms beside thousands of endpoints that fail, of 3,000 it is 1 to 4, and a delivery costs the
# same. The middle one is what the last so many young ones left, nearly all of it alive: the longer, the less time it takes in all
# (docs/profile.md).
GC_THRESHOLDS = (3_000, 1_000, 20)
# And by time, because a threshold is of objects made less objects gone, old ones too: where as many old ones go as young ones stay, as with
# thousands of connections that are opened in vain, the young had become 20,000 to 59,000 when it was reached, 10 to 33 ms.
GC_YOUNG_S = 0.1
_NEVER = 1 << 30  # by itself


DESCRIPTORS_SPARE = 100  # for the database, logs, name look-ups and listeners; connections to the panel come on top


def make_transport(settings: Settings) -> Pool:
    spare = spare_descriptors(settings)
    limits = Limits(
        sockets_max=allowed_sockets(settings.sockets_max, spare),
        sockets_per_origin_max=settings.sockets_per_origin_max,
        idle_s=settings.idle_socket_s,
        connect_s=settings.connect_timeout_s,
        headers_s=settings.headers_timeout_s,
        header_bytes_max=settings.response_header_bytes_max,
        body_bytes_max=settings.response_body_bytes_max,
        head_kept_bytes=settings.response_head_kept_bytes,
        dns_ttl_s=settings.dns_ttl_s,
    )
    ca_file = None if settings.ca_file is None else str(settings.ca_file)
    try:
        tls = make_tls_context(ca_file)
    except ssl.SSLError as exc:
        raise InputError(
            f"setting DISPATCHER_CA_FILE: {settings.ca_file} holds no certificate in PEM form ({exc.reason})"
        ) from exc
    check_local(settings.local_addresses)
    kind = Pool
    if settings.transport == "aiohttp":
        from dispatcher.transport.aiohttp_transport import AiohttpTransport  # importing it takes 0.2 s and 8 MB

        kind = AiohttpTransport
    return kind(
        limits,
        settings.address_policy,
        tls=tls,
        tls_as=partial(make_tls_context, ca_file),
        proxy=settings.proxy,
        local=settings.local_addresses,
    )


def make_engine(settings: Settings, dsn: str, transport: Pool, store: PgStore | None = None) -> Engine:
    return Engine(
        store or PgStore(dsn, settings),
        transport,
        settings,
        owner=f"{socket.gethostname()}:{os.getpid()}",
        partitions=PgPartitions(dsn, timeout_s=settings.statement_timeout_s),
        on_ready=keep_what_is_there,
    )


async def serve(settings: Settings, dsn: str) -> None:
    """Run one dispatcher until SIGTERM or SIGINT; a second signal ends it at once (ForcedStopError). SIGHUP reads the settings again,
    SIGUSR1 turns debug lines on and off."""
    transport = make_transport(settings)
    store = PgStore(dsn, settings)
    engine = make_engine(settings, dsn, transport, store)
    notifier = Notifier()
    web = None if settings.web_listen is None else make_web(settings, dsn, transport, engine)
    observation = EngineObservation(engine, transport, settings, dsn, store.round_trips, notifier, web)
    signals = _Signals(engine.stop, _Live(settings, engine, observation, notifier), notifier)
    beside = [asyncio.create_task(observation.run())]
    if web is not None:
        beside.append(asyncio.create_task(web.run_beside()))
    if settings.mail_server is not None:
        mailer = Mailer(settings, settings.mail_server, dsn, lambda: engine.state is State.OWNER)
        beside.append(asyncio.create_task(mailer.run()))
    tune_gc()
    try:
        await engine.run()
    except asyncio.CancelledError:
        signals.raise_if_forced("what was in flight will be sent again by the next start")
        raise
    finally:
        for other in beside:
            other.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await transport.close()


class _Signals:
    """What a running process does at signals: `stop` at the first that asks for it; at the second the task that made this is cancelled."""

    def __init__(self, stop: Callable[[], object], live: "_Live", notifier: Notifier) -> None:
        self._stop = stop
        self._notifier = notifier
        self._task = asyncio.current_task()
        self._came: list[signal.Signals] = []
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        # A terminal that is closed says SIGHUP too, and means the end.
        loop.add_signal_handler(signal.SIGHUP, *((self._end, signal.SIGHUP) if sys.stdin.isatty() else (live.reload,)))
        loop.add_signal_handler(signal.SIGUSR1, live.toggle_debug)
        loop.set_exception_handler(log_unhandled)

    def raise_if_forced(self, left: str) -> None:
        if len(self._came) >= 2:
            raise ForcedStopError(self._came[1], self._came[1].name, left) from None

    def _end(self, number: signal.Signals) -> None:
        self._came.append(number)
        if len(self._came) == 1:
            _log.info("signal", name=number.name)
            self._notifier.stopping()
            self._stop()
        else:
            _log.warning("signal.forced", name=number.name)
            assert self._task is not None
            self._task.cancel()


class _Live:
    """What people may change while it runs. Without an engine it is panel and API alone."""

    def __init__(self, settings: Settings, engine: Engine | None, observation: Observation, notifier: Notifier) -> None:
        self._settings = settings
        self._engine = engine
        self._observation = observation
        self._notifier = notifier
        self._is_debugging = False

    def reload(self) -> None:
        self._notifier.reloading()
        self._settings = reload(self._settings, settings_module.load)
        self._is_debugging = False
        log.configure(self._settings)
        if self._engine is not None:
            self._engine.adopt(self._settings)
        self._observation.reloaded(self._settings)

    def toggle_debug(self) -> None:
        self._is_debugging = not self._is_debugging
        level = "debug" if self._is_debugging else self._settings.log_level
        log.configure(self._settings, level=level)
        _log.warning("log.level", now=level)


def log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the loop would else print to stderr, where a log of JSON lines has no place for it. Seen so far: a request that asyncpg gave up
    for another reason learns later, and nobody with it, that its connection was closed."""
    exc = context.get("exception")
    _log.error("loop.unhandled", problem=context.get("message"), error=None if exc is None else repr(exc), exc_info=exc)


def make_web(settings: Settings, dsn: str, transport: Pool, engine: Engine | None = None) -> "WebServer":
    """Make panel and API; beside an engine they can tell what only its memory knows."""
    from dispatcher.web.server import WebServer  # importing it takes 0.2 s, and not all have a panel

    if engine is None:
        return WebServer(settings, dsn, transport)
    return WebServer(settings, dsn, transport, lane_health=engine.lane_health, vitals=partial(vitals, engine))


def vitals(engine: Engine) -> dict[str, float]:
    """Return how deliveries stand at this moment, for the panel. Empty unless this process delivers. Asked once in two seconds, however many
    look; 10,000 lanes take half a millisecond."""
    incarnation = engine.incarnation
    if incarnation is None or engine.state is not State.OWNER:
        return {}
    lanes, counters = incarnation.lanes, engine.counters
    return {
        "in_flight": incarnation.sender.in_flight,
        "unrecorded": incarnation.recorder.unrecorded,
        "events_in_memory": lanes.memory.events,
        "bytes_in_memory": lanes.memory.bytes,
        "breakers_open": sum(lane.breaker.state is not BreakerState.CLOSED for lane in lanes),
        "delivered": counters.delivered,
        "failed": counters.failed,
    }


async def serve_web(settings: Settings, dsn: str) -> None:
    """Serve panel and API alone, with the signals that `serve` knows."""
    transport = make_transport(settings)
    web = make_web(settings, dsn, transport)
    notifier = Notifier()
    observation = WebObservation(web, settings, dsn, notifier)
    server = asyncio.create_task(web.run())
    signals = _Signals(server.cancel, _Live(settings, None, observation, notifier), notifier)
    beside = asyncio.create_task(observation.run())
    try:
        await server
    except asyncio.CancelledError:
        signals.raise_if_forced(
            "requests under way were cut off, and changes that were not answered may be made or not"
        )
        if not server.cancelled():
            raise
        _log.info("stopped")
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        await transport.close()


def spare_descriptors(settings: Settings) -> int:
    return DESCRIPTORS_SPARE + (0 if settings.web_listen is None else settings.web_connections_max)


def descriptors(settings: Settings) -> tuple[int, int]:
    """Return how many descriptors this process may have if it asks, and how many the settings need."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.sockets_max + spare_descriptors(settings)
    return (sys.maxsize if hard == resource.RLIM_INFINITY else hard), needed


def allowed_sockets(wanted: int, spare: int = DESCRIPTORS_SPARE) -> int:
    """Raise the limit of descriptors as far as it goes, and return how many sockets that leaves, at most `wanted`.

    Running out of descriptors would look like a receiver's failure; so the pool is made smaller than the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + spare
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(1, soft - spare)
    _log.warning(
        "descriptors.few",
        limit=hard,
        sockets=allowed,
        wanted=wanted,
        remedy="raise it (ulimit -Hn, LimitNOFILE=) or lower DISPATCHER_SOCKETS_MAX",
    )
    return allowed


def tune_gc() -> None:
    """Have the collector leave alone what is there, and walk often what is new, for as long as the running loop lives."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLDS[0], _NEVER, _NEVER)
    asyncio.get_running_loop().call_later(GC_YOUNG_S, _collect, False)


def _collect(warm: bool) -> None:
    """Collect the young, or an older generation that is due. The first of these is left alone for good: it is what ten thousand endpoints had
    made at their first event, 94 ms."""
    counts = gc.get_count()
    due = max(n for n in range(3) if n == 0 or counts[n] > GC_THRESHOLDS[n])
    if due and not warm:
        gc.freeze()
    else:
        gc.collect(due)
    asyncio.get_running_loop().call_later(GC_YOUNG_S, _collect, warm or due > 0)


def keep_what_is_there(starts: int) -> None:
    """Have the collector leave alone what a start has made, 60 objects an endpoint: walking those of 10,000 held the loop for 80 ms. What an
    earlier start had made (the server has lost its memory since) goes first."""
    if starts > 1:
        gc.unfreeze()
        gc.collect()
    gc.freeze()
