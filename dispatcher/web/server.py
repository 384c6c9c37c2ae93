"""Listening: a bounded number of connections, a task that sweeps what has expired, and an orderly end.

Beside the engine a server that can't listen, or fails, says so and tries again; deliveries don't notice.
"""

import asyncio
import logging
from collections.abc import Callable

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from dispatcher.errors import DispatcherError, InputError
from dispatcher.ports import Transport
from dispatcher.settings import Settings, split_listen
from dispatcher.store import access
from dispatcher.store.pool import Pool
from dispatcher.web.app import LISTEN, LaneHealth, Vitals, Web, make_app
from dispatcher.web.listening import bounded
from dispatcher.web.requests import Requests

_log = structlog.get_logger(room="web")

AGAIN_S = 10.0
SWEEP_S = 600.0
GOODBYE_S = 2.0


class WebServer:
    """`run` serves until it is cancelled; `ready` is set, and `port` known, once it listens."""

    def __init__(
        self,
        settings: Settings,
        dsn: str,
        transport: Transport,
        *,
        lane_health: LaneHealth | None = None,
        vitals: Vitals = dict,
    ) -> None:
        self._settings = settings
        self._dsn = dsn
        self._transport = transport
        self._lane_health = lane_health
        self._vitals = vitals
        self.requests = Requests()
        self.ready = asyncio.Event()
        self.port = 0
        self.web: Web | None = None
        self._protocols: web.Server | None = None

    @property
    def connections(self) -> int:
        return 0 if self._protocols is None else len(self._protocols.connections)

    @property
    def streams(self) -> int:
        return 0 if self.web is None else self.web.streams.open

    async def run(self) -> None:
        """Serve. Raises InputError if it can't listen there."""
        settings = self._settings
        pool = Pool(self._dsn, size=settings.web_pool_size, statement_timeout_s=settings.web_statement_timeout_s)
        shared = self.web = Web(
            settings,
            pool,
            self._transport,
            lane_health=self._lane_health,
            vitals=self._vitals,
            requests=self.requests,
        )
        await asyncio.to_thread(shared.templates.compile)
        runner = web.AppRunner(
            make_app(shared),
            access_log=None,
            handle_signals=False,
            keepalive_timeout=60,
            shutdown_timeout=GOODBYE_S,
            auto_decompress=False,
        )
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        await runner.setup()
        listener: asyncio.Server | None = None
        try:
            self._protocols = runner.server
            assert self._protocols is not None
            listener = await _listen(settings, bounded(self._protocols, settings.web_connections_max))
            host, self.port = listener.sockets[0].getsockname()[:2]
            shared.listening = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
            _log.info("web.listening", address=shared.listening, url=shared.url("/"))
            self.ready.set()
            await _sweep(shared)
        finally:
            self.ready.clear()
            if listener is not None:
                listener.close()
            await shared.close()  # streams end first, or the runner would wait for them
            await runner.cleanup()

    async def run_beside(self) -> None:
        """Serve for as long as the engine runs, whatever happens."""
        while True:
            try:
                await self.run()
            except DispatcherError as exc:
                _log.error("web.failed", error=str(exc), again_in_s=AGAIN_S)
            except Exception:  # noqa: BLE001 - logged with its trace; deliveries must not end because of a page
                _log.exception("web.failed", again_in_s=AGAIN_S)
            await asyncio.sleep(AGAIN_S)


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out what isn't HTTP: anybody may send it, and it was answered with a 400; a trace in the log for each would be theirs to fill."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


async def _listen(settings: Settings, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.Server:
    listen = settings.web_listen or LISTEN
    host, port = split_listen(listen)
    try:
        return await asyncio.get_running_loop().create_server(factory, host, port, backlog=128)
    except OSError as exc:
        raise InputError(f"can't listen at {listen}: {exc.strerror or exc}; correct DISPATCHER_WEB_LISTEN") from exc


async def _sweep(shared: Web) -> None:
    """Delete a page of expired logins, links and Idempotency-Keys every ten minutes, for ever; while there are more, every second."""
    while True:
        done = 0
        try:
            async with shared.pool.connection() as db:
                done = await access.sweep(db)
        except DispatcherError as exc:
            _log.info("web.sweep", error=str(exc))  # the database is away or busy: next time
        except Exception:  # noqa: BLE001 - logged with its trace; the pages go on without it
            _log.exception("web.sweep")
        await asyncio.sleep(SWEEP_S if done < access.SWEPT else 1.0)
