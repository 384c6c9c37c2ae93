"""Everything that tells of one engine, joined: made by the composition root, `run` beside the engine."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from dispatcher import log
from dispatcher.engine.engine import Engine, State
from dispatcher.errors import DispatcherError
from dispatcher.observe.figures import RoundTrips, Subject
from dispatcher.observe.health import describe, judge
from dispatcher.observe.pulse import Pulse
from dispatcher.observe.systemd import Notifier
from dispatcher.settings import Settings
from dispatcher.store.observe import Observer
from dispatcher.transport.room import Room

if TYPE_CHECKING:
    from dispatcher.observe.server import HealthServer

_log = structlog.get_logger(room="observe")

STATUS_EVERY_S = 5
REPEATS_EVERY_S = 10
AGAIN_S = 10.0


class Observation:
    """`stopping` and `reloading` tell the service manager; the rest goes by itself."""

    def __init__(
        self, engine: Engine, transport: Room, settings: Settings, dsn: str, round_trips: RoundTrips, notifier: Notifier
    ) -> None:
        self._engine = engine
        self._notifier = notifier
        self.pulse = Pulse(engine)
        self.observer = Observer(dsn, lambda: engine.state is State.OWNER)
        self.subject = Subject(engine, transport, settings, self.pulse, self.observer, round_trips)
        self.server = _health_server(settings, self.subject)
        self._is_ready = False
        self._looks = 0
        self.pulse.on_look = self._look

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
        self.subject.settings = settings
        if self._is_ready:
            self._notifier.ready(self._status())

    def _status(self) -> str:
        return describe(self._engine, judge(self._engine, self.pulse, self.observer))

    def _look(self) -> None:
        """Once a second: whoever started us hears when we are ready, then how we are."""
        self._looks += 1
        if not self._is_ready:
            if judge(self._engine, self.pulse, self.observer).is_ready:
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


async def _kept_up(part: Callable[[], Awaitable[None]]) -> None:
    """Run a part for as long as the engine runs, whatever happens to it: deliveries must not end because of a figure."""
    while True:
        try:
            await part()
            return
        except DispatcherError as exc:
            _log.error("observe.failed", error=str(exc), again_in_s=AGAIN_S)
        except Exception:  # noqa: BLE001 - logged with its trace
            _log.exception("observe.failed", again_in_s=AGAIN_S)
        await asyncio.sleep(AGAIN_S)


def _health_server(settings: Settings, subject: Subject) -> "HealthServer | None":
    if settings.health_listen is None:
        return None
    from dispatcher.observe.server import HealthServer  # brings an HTTP server, which takes 0.1 s to import

    return HealthServer(settings.health_listen, subject)
