"""The composition root: the one module that imports every room and joins them."""

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
from functools import partial
from typing import Any

import structlog

from dispatcher.engine.engine import Engine, State
from dispatcher.errors import ForcedStopError, InputError
from dispatcher.mail.mailer import Mailer
from dispatcher.ports import Limits
from dispatcher.settings import Settings
from dispatcher.store.partitions import PgPartitions
from dispatcher.store.postgres import PgStore
from dispatcher.transport.pool import Pool
from dispatcher.transport.tls import make_tls_context
from dispatcher.web.server import WebServer

_log = structlog.get_logger(room="main")

# A collection walks every live object; with 1,000 connections the default thresholds cost a third of all CPU time (DESIGN §8). What lives
# from start to end is frozen, and the young generation is made large: our hot objects are acyclic and go by reference count.
GC_THRESHOLDS = (50_000, 20, 100)


DESCRIPTORS_SPARE = 100  # for the database, logs, name look-ups and listeners; connections to the panel come on top


def make_transport(settings: Settings) -> Pool:
    spare = DESCRIPTORS_SPARE + (0 if settings.web_listen is None else settings.web_connections_max)
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
    kind = Pool
    if settings.transport == "aiohttp":
        from dispatcher.transport.aiohttp_transport import AiohttpTransport  # importing it takes 0.2 s and 8 MB

        kind = AiohttpTransport
    return kind(
        limits, settings.address_policy, tls=tls, tls_as=partial(make_tls_context, ca_file), proxy=settings.proxy
    )


def make_engine(settings: Settings, dsn: str, transport: Pool) -> Engine:
    return Engine(
        PgStore(dsn, settings),
        transport,
        settings,
        owner=f"{socket.gethostname()}:{os.getpid()}",
        partitions=PgPartitions(dsn, timeout_s=settings.statement_timeout_s),
    )


async def serve(settings: Settings, dsn: str) -> None:
    """Run one dispatcher until SIGTERM or SIGINT; a second signal ends it at once (ForcedStopError)."""
    transport = make_transport(settings)
    engine = make_engine(settings, dsn, transport)
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        signals.append(number)
        if len(signals) == 1:
            _log.info("signal", name=signal.Signals(number).name)
            engine.stop()
        else:
            _log.warning("signal.forced", name=signal.Signals(number).name)
            assert task is not None
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.set_exception_handler(log_unhandled)
    beside = []
    if settings.web_listen is not None:
        beside.append(asyncio.create_task(make_web(settings, dsn, transport, engine).run_beside()))
    if settings.mail_server is not None:
        mailer = Mailer(settings, settings.mail_server, dsn, lambda: engine.state is State.OWNER)
        beside.append(asyncio.create_task(mailer.run()))
    tune_gc()
    try:
        await engine.run()
    except asyncio.CancelledError:
        if len(signals) < 2:
            raise
        raise ForcedStopError(signals[1], signal.Signals(signals[1]).name) from None
    finally:
        for other in beside:
            other.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await transport.close()


def log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the loop would else print to stderr, where a log of JSON lines has no place for it. Seen so far: a request that asyncpg gave up
    for another reason learns later, and nobody with it, that its connection was closed."""
    exc = context.get("exception")
    _log.error("loop.unhandled", problem=context.get("message"), error=None if exc is None else repr(exc), exc_info=exc)


def make_web(settings: Settings, dsn: str, transport: Pool, engine: Engine | None = None) -> WebServer:
    """Make panel and API; beside an engine they can tell what only its memory knows."""
    return WebServer(settings, dsn, transport, lane_health=None if engine is None else engine.lane_health)


async def serve_web(settings: Settings, dsn: str) -> None:
    """Serve panel and API alone, until SIGTERM or SIGINT."""
    transport = make_transport(settings)
    server = asyncio.create_task(make_web(settings, dsn, transport).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.cancel)
    try:
        await server
    except asyncio.CancelledError:
        if not server.cancelled():
            raise
    finally:
        await transport.close()


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
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
