"""Everything that tells of one process, joined: made by the composition root, `run` beside the engine, or beside panel and API alone."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from dispatcher import log
from dispatcher.engine.engine import Engine, State
from dispatcher.errors import DispatcherError
from dispatcher.observe.figures import Process, RoundTrips, Subject
from dispatcher.observe.health import Health, describe, describe_web, judge, judge_web
from dispatcher.observe.pulse import Pulse
from dispatcher.observe.systemd import Notifier
from dispatcher.settings import Settings
from dispatcher.store.observe import Observer
from dispatcher.transport.room import Room

if TYPE_CHECKING:
    from dispatcher.observe.server import HealthServer
    from dispatcher.web.server import WebServer

_log = structlog.get_logger(room="observe")

STATUS_EVERY_S = 5
REPEATS_EVERY_S = 10
AGAIN_S = 10.0


class Observation(ABC):
    """`run` it beside what it tells of, and say when the settings were `reloaded`; the rest goes by itself."""

    def __init__(self, process: Process, notifier: Notifier) -> None:
        self._process = process
        self._notifier = notifier
        self.pulse = process.pulse
        self.observer = process.observer
        self.server = self._health_server(process.settings)
        self._is_ready = False
        self._looks = 0
        self.pulse.on_look = self._look

    @abstractmethod
    def health(self) -> Health:
        """Judge it by what is known already."""

    @abstractmethod
    def _describe(self, health: Health) -> str:
        """Say in a line how it is."""

    @abstractmethod
    async def _scrape(self) -> bytes:
        """Return its metrics."""

    async def run(self) -> None:
        """Observe until cancelled."""
        parts = [self.pulse.run, self._signs_of_life]
        if self.server is not None or self._notifier.is_heard:
            parts.append(self.observer.run)
        if self.server is not None:
            parts.append(self.server.run)
        tasks = [asyncio.create_task(_kept_up(part)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def reloaded(self, settings: Settings) -> None:
        self._process.settings = settings
        if self._is_ready:
            self._notifier.ready(self._status())

    def _status(self) -> str:
        return self._describe(self.health())

    def _look(self) -> None:
        """Once a second: whoever started us hears when we are ready, then how we are."""
        self._looks += 1
        if not self._is_ready:
            if self.health().is_ready:
                self._is_ready = True
                self._notifier.ready(self._status())
        elif self._looks % STATUS_EVERY_S == 0:
            self._notifier.status(self._status())
        if self._looks % REPEATS_EVERY_S == 0:
            log.repeats.tell(_log)

    async def _signs_of_life(self) -> None:
        """Tell the watchdog that the loop turns, three times in the time that it waits."""
        while self._notifier.watchdog_s is not None:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_s / 3)

    def _health_server(self, settings: Settings) -> "HealthServer | None":
        if settings.health_listen is None:
            return None
        from dispatcher.observe.server import HealthServer  # brings an HTTP server, which takes 0.1 s to import

        return HealthServer(settings.health_listen, self.health, self._scrape)


class EngineObservation(Observation):
    """Of a process that delivers, or would. `web`: panel and API, where it serves them too."""

    def __init__(
        self, engine: Engine, transport: Room, settings: Settings, dsn: str, round_trips: RoundTrips, notifier: Notifier,
        web: "WebServer | None" = None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._subject = Subject(
            engine=engine,
            transport=transport,
            settings=settings,
            pulse=Pulse(engine),
            observer=Observer(dsn, lambda: engine.state is State.OWNER),
            round_trips=round_trips,
            web=web,
        )
        super().__init__(self._subject, notifier)

    def health(self) -> Health:
        return judge(self._engine, self.pulse, self.observer)

    def _describe(self, health: Health) -> str:
        return describe(self._engine, health)

    async def _scrape(self) -> bytes:
        from dispatcher.observe.metrics import scrape

        return await scrape(self._subject)


class WebObservation(Observation):
    """Of panel and API alone."""

    def __init__(self, web: "WebServer", settings: Settings, dsn: str, notifier: Notifier) -> None:
        self._web = web
        process = Process(settings=settings, pulse=Pulse(None), observer=Observer(dsn, lambda: False), web=web)
        super().__init__(process, notifier)

    def health(self) -> Health:
        return judge_web(self._web, self.observer)

    def _describe(self, health: Health) -> str:
        return describe_web(self._web, health)

    async def _scrape(self) -> bytes:
        from dispatcher.observe.metrics import scrape_web

        return await scrape_web(self._process)


async def _kept_up(part: Callable[[], Awaitable[None]]) -> None:
    """Run a part for as long as the process runs, whatever happens to it: deliveries must not end because of a figure."""
    while True:
        try:
            await part()
            return
        except DispatcherError as exc:
            _log.error("observe.failed", error=str(exc), again_in_s=AGAIN_S)
        except Exception:  # noqa: BLE001 - logged with its trace
            _log.exception("observe.failed", again_in_s=AGAIN_S)
        await asyncio.sleep(AGAIN_S)
