"""One dispatcher: the real engine with its stores, watched at every POST and killed, frozen or stopped by the world.

The classes here replace the engine's own while a simulation runs (`watched`): they do what theirs do and tell the checker. A deliberate
fault replaces methods of the engine's classes, so that both go together.
"""

import asyncio
import contextlib
import contextvars
import random
import traceback
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from dispatcher.domain.outcome import Outcome
from dispatcher.domain.ranges import IdRanges
from dispatcher.engine import engine as engine_module
from dispatcher.engine.clock import Clock
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.engine import Engine
from dispatcher.engine.gaps import Gap, Gaps, Look
from dispatcher.engine.sender import Sender
from dispatcher.ports import Connection, FencedError
from dispatcher.store.memory import Fate, MemoryStore
from dispatcher.store.memory_database import Connection as Session
from dispatcher.store.memory_partitions import MemoryPartitions
from dispatcher.transport.memory import MemoryTransport
from tests.simulation.loop import PROCESS, Halting

if TYPE_CHECKING:
    from tests.simulation.world import World


class Process(Halting):
    """`end`: how it ended, once it has. A killed one has ended though its tasks are still there, halted."""

    def __init__(self, world: "World", name: str) -> None:
        super().__init__()
        self.world = world
        self.name = name
        self.end: str | None = None
        self.ended = asyncio.Event()
        self.was_told_to_stop = False
        self.rng = random.Random(f"process {name} {world.plan.seed}")
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        self.store = WatchedStore(self)
        self.transport = MemoryTransport(
            world.network.limits, world.network.find, latency_s=(0.0, 0.003), rng=world.network.rng
        )
        self.engine = Engine(
            self.store,
            self.transport,
            world.plan.settings,
            owner=name,
            clock=Clock(world.loop.time),
            rng=self.rng,
            make_gaps=WatchedGaps,
            partitions=MemoryPartitions(world.database, self.store) if world.plan.has("retention") else None,
        )
        self.task = world.loop.create_task(self._main(), context=self.context.copy())

    @property
    def sender(self) -> Sender | None:
        return None if self.engine.incarnation is None else self.engine.incarnation.sender

    async def _main(self) -> None:
        end = "stopped"
        try:
            await self.engine.run()
        except FencedError:
            end = "fenced"
        except Exception as exc:
            end = "failed"
            where = traceback.extract_tb(exc.__traceback__)[-1]
            self.world.checker.fail(
                f"{self.name} ended with {exc!r} at {where.filename.rpartition('/')[2]}:{where.lineno}"
            )
        if end == "stopped" and self.was_told_to_stop:
            self.world.checker.stopped(self)
        self._ended(end)
        await self.transport.close()

    def _ended(self, end: str) -> None:
        if self.end is None:
            self.end = end
            self.world.note(f"{self.name} {end}")
            self.ended.set()

    def kill(self, *, lingering: bool) -> None:
        """End it where it stands. `lingering`: nobody tells the server, whose sessions stay until it notices."""
        self.halted = True
        for session in list(self.store._connections):
            self.store.sever(session, lingering=lingering)
        self._ended("killed")

    def stop(self) -> None:
        """SIGTERM."""
        self.was_told_to_stop = True
        self.engine.stop()

    def freeze(self) -> None:
        self.halted = True
        self.world.note(f"{self.name} frozen")

    def thaw(self) -> None:
        if self.end is None and self.halted:
            self.world.note(f"{self.name} goes on")
            self.world.loop.let_go_on(self)


class WatchedStore(MemoryStore):
    """Every wait of a call is drawn, and now and then a call is where something happens."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        super().__init__(process.world.database, pause=self._wait)
        self.fate = self._draw_fate

    def _draw_fate(self, session: str, what: str) -> Fate:
        world = self.world
        world.calls += 1
        if world.healed or not world.plan.has("unknown"):
            return Fate.DONE
        chance = self.process.rng.random()
        return Fate.LOST_BEFORE if chance < 0.004 else Fate.LOST_AFTER if chance < 0.012 else Fate.DONE

    async def _wait(self) -> None:
        world, rng = self.world, self.process.rng
        if rng.random() < world.plan.ambush and not world.healed:
            world.disasters.ambush(self.process)
        chance = rng.random()
        if chance < 0.5:
            await asyncio.sleep(0)
        elif chance < 0.995 or world.healed or not world.plan.has("slow"):
            await asyncio.sleep(rng.uniform(0.0001, 0.001))
        else:
            await asyncio.sleep(rng.choice((0.05, 0.5, 3.0)))

    def _lost(self, session: str, connection: Session) -> None:
        # Whoever ended the connection, it is this process that notices.
        self.process.context.copy().run(super()._lost, session, connection)


class WatchedGaps(Gaps):
    """Remembers which ids were ever in a gap that is looked at now and then only: an event there comes late, until a look has found it."""

    def __init__(self) -> None:
        super().__init__()
        self.ever_old = IdRanges()
        self.found: dict[int, float] = {}  # when a look did

    def comes_late(self, event_id: int, at: float) -> bool:
        """Tell whether nobody could know of it at `at`."""
        return event_id in self.ever_old and self.found.get(event_id, at) >= at

    def looked(self, look: Look, found: list[int], full: bool) -> None:
        for event_id in found:
            self.found.setdefault(event_id, PROCESS.get().world.loop.time())
        super().looked(look, found, full)

    def restore(self, ranges: Iterable[tuple[int, int]]) -> None:
        ranges = list(ranges)
        self.ever_old.update(ranges)
        super().restore(ranges)

    def _insert(self, gaps: list[Gap]) -> None:
        self.ever_old.update((gap.low, gap.high) for gap in gaps)
        super()._insert(gaps)
        self.ever_old.update((gap.low, gap.high) for gap in self.old)  # joined ones reach over ids that were young


class WatchedSender(Sender):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        process: Process = PROCESS.get()
        self.process = process
        self.watch = process.world.checker.watch_sender(self, process)

    def _occupy(self, delivery: Delivery, now: float) -> None:
        super()._occupy(delivery, now)
        self.watch.occupied(delivery)

    def _vacate(self, delivery: Delivery) -> None:
        super()._vacate(delivery)
        self.watch.vacated(delivery)

    def _post(self, delivery: Delivery, connection: Connection) -> None:
        self.watch.posting(delivery, connection)
        super()._post(delivery, connection)

    def _send_again(self, delivery: Delivery) -> None:
        self.watch.was_not_seen(delivery)
        super()._send_again(delivery)

    def answered(self, delivery: Delivery, outcome: Outcome) -> None:
        self.watch.answered(delivery, outcome)
        super().answered(delivery, outcome)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    with mock.patch.object(engine_module, "Sender", WatchedSender):
        yield
