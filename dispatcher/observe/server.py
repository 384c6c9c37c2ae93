"""/livez, /readyz and /metrics, on a listener of their own: no login, so it belongs where only machines of yours can reach it.

It shows no payload, URL, account or name. What goes wrong here is logged and tried again; deliveries don't notice.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from dispatcher.errors import InputError
from dispatcher.observe.health import Health
from dispatcher.settings import split_listen
from dispatcher.web.listening import bounded

_log = structlog.get_logger(room="observe")

CONNECTIONS_MAX = 50
GOODBYE_S = 1.0


class HealthServer:
    """`run` serves until it is cancelled; `port` is known once it is `ready`. `scrape` returns the metrics in the text format."""

    def __init__(self, listen: str, health: Callable[[], Health], scrape: Callable[[], Awaitable[bytes]]) -> None:
        self._listen = listen
        self._health = health
        self._scrape = scrape
        self.ready = asyncio.Event()
        self.port = 0

    async def run(self) -> None:
        app = web.Application(client_max_size=1_024)
        app.add_routes([web.get(path, handler) for path, handler in self._handlers().items()])
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=75, shutdown_timeout=GOODBYE_S
        )
        await runner.setup()
        assert runner.server is not None
        host, port = split_listen(self._listen)
        listener: asyncio.Server | None = None
        try:
            listener = await asyncio.get_running_loop().create_server(
                bounded(runner.server, CONNECTIONS_MAX), host, port
            )
            self.port = listener.sockets[0].getsockname()[1]
            _log.info("health.listening", address=f"{host}:{self.port}")
            self.ready.set()
            await asyncio.Event().wait()
        except OSError as exc:
            raise InputError(
                f"can't listen at {self._listen}: {exc.strerror or exc}; correct DISPATCHER_HEALTH_LISTEN"
            ) from exc
        finally:
            self.ready.clear()
            if listener is not None:
                listener.close()
            await runner.cleanup()

    def _handlers(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        return {"/livez": self._live, "/readyz": self._ready, "/metrics": self._metrics}

    async def _live(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"alive": True})

    async def _ready(self, _: web.Request) -> web.StreamResponse:
        health = self._health()
        return web.json_response(health.as_dict(), status=200 if health.is_ready else 503)

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=await self._scrape(), headers={"content-type": CONTENT_TYPE_LATEST})
