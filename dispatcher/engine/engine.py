"""The engine: owns every task, and begins again at Start whenever memory is worth nothing.

An *incarnation* is everything learnt since one Start: lanes, gaps, results not recorded. Its tasks share one fate:

    reader   reads the log                    listener  wakes reader and config
    recorder writes results, the checkpoint   config    changes, the lease on sending
    owner    holds the owner lock             janitor   partitions and retention

`LifeLostError` (the server lost its memory) ends the incarnation, and the next one begins at Start: the same code as
for a start after a crash. `FencedError` ends the engine: another dispatcher rules. `StoreAwayError` is met by each task
on its own, with its state as it was. While another dispatcher owns the database, Start waits: that is all that a standby
is.

Stop: read no more, start no more, let POSTs end until the grace is over, record the results with a last checkpoint,
release the lock.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from enum import Enum
from typing import Any

import structlog

from dispatcher.engine.catchup import ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.config import ConfigWatcher
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.histogram import Histograms
from dispatcher.engine.janitor import Janitor
from dispatcher.engine.lane import Lane, LaneLimits
from dispatcher.engine.lanes import Lanes, Memory, is_wanted
from dispatcher.engine.reader import Reader
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.sender import Sender
from dispatcher.errors import DatabaseRefusedError
from dispatcher.ports import FencedError, LifeLostError, Partitions, Started, Store, StoreAwayError, Transport
from dispatcher.settings import Settings

_log = structlog.get_logger(room="engine")

AWAY_WAIT_S, AWAY_WAIT_MAX_S = 0.1, 1.0
HANDOVER_S = 1.0  # what POSTs in flight may take of a stop while a standby waits, which must go on within two seconds
ASK_S = 0.5
RECORD_S = 5.0  # what the results of a stop may take, at the least


class State(Enum):
    STARTING = "starting"  # or starting again, or the database is away
    STANDBY = "standby"  # another owns the database; waiting for its end
    OWNER = "owner"
    STOPPED = "stopped"


class Engine:
    """One dispatcher. `run` until `stop` is called; `owner` names this process for people."""

    def __init__(
        self,
        store: Store,
        transport: Transport,
        settings: Settings,
        *,
        owner: str,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        make_gaps: Callable[[], Gaps] = Gaps,
        partitions: Partitions | None = None,
        on_ready: Callable[[int], object] = lambda starts: None,
    ) -> None:
        self.counters = Counters()
        self.histograms = Histograms()
        self.state = State.STARTING
        self.ready = asyncio.Event()  # started, and reading
        self.incarnation: Incarnation | None = None
        self._store = store
        self._transport = transport
        self._settings = settings
        self._owner = owner
        self._clock = clock or Clock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter  # nosec B311
        self._make_gaps = make_gaps
        self._partitions = partitions  # None: nobody keeps them, as in most tests
        self._on_ready = on_ready  # called at the end of each start, with how many there were
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin an orderly stop. Safe to call twice, and before `run`."""
        self._stop.set()

    def adopt(self, settings: Settings) -> None:
        """Go on by other settings, as far as they can change while it runs: slots, memory, grace."""
        self._settings = settings
        if self.incarnation is not None:
            self.incarnation.adopt(settings)

    async def run(self) -> None:
        """Deliver until stopped; before that, wait while another owns the database. Raises FencedError when another took over from us, and
        DatabaseRefusedError where going on would lose events."""
        try:
            while not self._stop.is_set():
                started = await self._start()
                if started is None:
                    return
                incarnation = Incarnation(self, started)
                self.incarnation = incarnation
                self.state = State.OWNER
                try:
                    await incarnation.run()
                    return
                except LifeLostError as exc:
                    _log.warning("life.lost", reason=str(exc), unrecorded=incarnation.recorder.unrecorded)
                finally:
                    self.state = State.STARTING
                    self.ready.clear()
                    incarnation.sender.close()
        finally:
            self.state = State.STOPPED
            await self._store.close()
            if self._partitions is not None:
                await self._partitions.close()

    async def _start(self) -> Started | None:
        """Start, however long the database is away; None if stopped meanwhile."""
        wait_s = AWAY_WAIT_S
        while not self._stop.is_set():
            try:
                self.state = State.STARTING
                started = await self._unless_stopped(self._store.start(self._owner, self._standing_by))
            except (StoreAwayError, LifeLostError) as exc:
                self.counters.store_away += 1
                _log.warning("start.away", error=str(exc), retry_in_s=wait_s)
                try:
                    async with asyncio.timeout(wait_s):
                        await self._stop.wait()
                except TimeoutError:
                    wait_s = min(wait_s * 2, AWAY_WAIT_MAX_S)
                continue
            if started is None:
                return None
            if started.last_id < started.position:
                raise DatabaseRefusedError(
                    f"the outbox sequence is at {started.last_id}, behind the checkpoint at {started.position}: the server was restored to an "
                    "earlier state, or failed over without its tail. Events with ids in between would be taken for settled. Set the sequence "
                    "past the position (SELECT setval('webhook.outbox_id_seq', <position>)) when you have made sure of that, and start again."
                )
            self.counters.starts += 1
            self._clock.sync(started.wall_us)
            _log.info(
                "started",
                epoch=started.epoch,
                position=started.position,
                last_id=started.last_id,
                endpoints=len(started.endpoints),
                lanes_behind=len(started.lanes),
                gaps=len(started.gaps),
            )
            return started
        return None

    def lane_health(self, endpoint_id: int | None = None) -> list[dict[str, Any]]:
        """Return how the lanes (or one endpoint's) stand at this moment: limits, breaker, pace, keys, and whether their origins have room for
        another connection. Empty unless it owns the database."""
        if self.incarnation is None or self.state is not State.OWNER:
            return []
        now, lanes = self._clock.now(), self.incarnation.lanes
        if endpoint_id is not None:
            lane = lanes.get(endpoint_id)
            return [] if lane is None else [lane.health(now) | {"origin_full": self._is_full(lane)}]
        return [lane.health(now) | {"origin_full": self._is_full(lane)} for lane in lanes]

    def _is_full(self, lane: Lane) -> bool:
        target, transport = lane.endpoint.target, self._transport
        return target is not None and transport.sockets_at(target.origin) >= transport.sockets_per_origin_max

    def _standing_by(self) -> None:
        self.state = State.STANDBY

    async def _unless_stopped(self, starting: Coroutine[Any, Any, Started]) -> Started | None:
        """Await Start, which waits for as long as another owns the database; None if stopped meanwhile."""
        start, stop = asyncio.create_task(starting), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
            return start.result() if start.done() else None
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)


class Incarnation:
    """Everything between one Start and its end."""

    def __init__(self, engine: Engine, started: Started) -> None:
        settings, store, clock, counters = engine._settings, engine._store, engine._clock, engine.counters
        self._engine = engine
        self._store = store
        self._settings = settings
        self._clock = clock
        self._owner_lost = asyncio.Event()
        self.lanes = Lanes(LaneLimits.of(settings), Memory(settings.memory_events_max, settings.memory_bytes_max))
        self.recorder = Recorder(
            store,
            self.lanes,
            clock,
            counters,
            epoch=started.epoch,
            position=started.position,
            rows_max=settings.record_rows_max,
            wait_s=settings.record_wait_ms / 1000,
            unrecorded_max=settings.unrecorded_max,
        )
        self.sender = Sender(
            engine._transport,
            self.lanes,
            self.recorder,
            clock,
            counters,
            slots=settings.slots,
            rng=engine._rng,
            look=lambda lane: self.reader.catch_up.look(lane),
            disable=lambda lane, reason: self.config.disable(lane, reason),
            failing=lambda lane, was_us: self.config.note_failing(lane, was_us),
            tell_failing=lambda lane: self.config.tell_failing(lane),
            failing_after_s=settings.failing_after_s,
            disable_after_s=settings.disable_after_s,
        )
        gate = ReadGate()
        self.reader = Reader(
            store,
            self.lanes,
            clock,
            counters,
            offered=self.sender.offer,
            position=lambda: self.recorder.position_under_way,
            configured=lambda seq: self.config.reached(seq),
            doorbell=settings.doorbell == "on",
            poll_s=settings.poll_ms / 1000,
            gate=gate,
            gaps=engine._make_gaps(),
        )
        self.config = ConfigWatcher(
            store,
            self.lanes,
            self.sender,
            clock,
            counters,
            seq=started.config_seq,
            epoch=started.epoch,
            endpoints=started.endpoints,
            head=lambda: self.reader.head,
            changed=self._endpoint_changed,
            after_read=gate.after,
        )
        partitions = engine._partitions
        self.janitor = None if partitions is None else Janitor(
            partitions, self.lanes, clock, counters, settings, epoch=started.epoch, look=self.reader.catch_up.look, after_read=gate.after,
        )  # fmt: skip
        self.recorder.head = lambda: self.reader.head
        self.recorder.gaps = self.reader.gaps
        self.recorder.after_read = gate.after
        self.recorder.note_retry = self.reader.catch_up.note_retry
        self.recorder.look = self.reader.catch_up.look
        self.recorder.piled_up = self._piled_up
        self.recorder.histograms = engine.histograms
        store.on_owner_lost(self._lost_ownership)
        self._restore(started)

    def _restore(self, started: Started) -> None:
        """Put the lanes where the checkpoint says, believing nothing above its position."""
        now = self._clock.now()
        rows = {row.endpoint_id: row for row in started.lanes}
        for endpoint in started.endpoints:
            if not is_wanted(endpoint):
                continue
            row = rows.pop(endpoint.id, None)
            if row is None:
                lane = self.lanes.add(endpoint, now, live=True, cursor=started.position)
            else:
                lane = self.lanes.add(endpoint, now, live=False, cursor=min(row.settled, started.position))
                lane.holes = row.holes.copy()
                lane.holes.clip(lane.cursor)
                lane.row = row
                lane.backlog = row.backlog
                self.lanes.unsettled[lane] = None
            self.lanes.take_up(lane, started.position)
            if lane.held:
                self.lanes.fall_behind(lane, started.position, drop=True)
        self.lanes.rows_gone.update(rows)  # rows of endpoints that are no more
        self.reader.begin(started)

    def adopt(self, settings: Settings) -> None:
        self._settings = settings
        self.lanes.memory.events_max, self.lanes.memory.bytes_max = (
            settings.memory_events_max,
            settings.memory_bytes_max,
        )
        self.sender.set_slots(settings.slots)
        self.sender.pump_soon()

    async def run(self) -> None:
        """Run the tasks until stopped (returns) or until one fails for good (raises its error)."""
        await self._persist("config", self.config.look, once=True)  # the first lease
        for lane in self.lanes:
            self.reader.catch_up.look(lane)
        reader = asyncio.create_task(self._persist("reader", self._read))
        recorder = asyncio.create_task(self.recorder.run())
        others = [
            asyncio.create_task(self._persist("listener", self._listen)),
            asyncio.create_task(self.config.run()),
            asyncio.create_task(self._own()),
        ]
        if self.janitor is not None:
            others.append(asyncio.create_task(self.janitor.run()))
        stop = asyncio.create_task(self._engine._stop.wait())
        tasks = [reader, recorder, *others, stop]
        self._engine.ready.set()
        self._engine._on_ready(self._engine.counters.starts)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stop not in done:
                _raise_worst(done)
            await self._drain(reader, recorder, others)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(
        self, reader: asyncio.Task[None], recorder: asyncio.Task[None], others: list[asyncio.Task[None]]
    ) -> None:
        """Let what was begun end; `others` go on meanwhile, so that ownership is still watched."""
        self.sender.hold("stopping")
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        self.reader.stopped()
        grace_s = self._settings.grace_s
        if grace_s > HANDOVER_S and await self._is_stood_by():
            grace_s = HANDOVER_S  # one slow receiver would keep all the others waiting
        _log.info("stopping", in_flight=self.sender.in_flight, unrecorded=self.recorder.unrecorded, grace_s=grace_s)
        drained = asyncio.create_task(self.sender.drain())
        await asyncio.wait([drained, recorder, *others], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        left = self.sender.in_flight
        self.sender.close()  # what is still in flight will be sent again by the next start
        self.recorder.stop()
        done, _ = await asyncio.wait([recorder], timeout=max(RECORD_S, grace_s))
        if not done:
            _log.error(
                "stopped.unrecorded",
                results=self.recorder.unrecorded,
                why="the database did not take them in time; they will be sent again",
            )
        else:
            _raise_worst(done)
        _log.info("stopped", cut_off=left, position=self.recorder.position)

    async def _is_stood_by(self) -> bool:
        try:
            async with asyncio.timeout(ASK_S):
                return await self._store.is_stood_by()
        except (StoreAwayError, LifeLostError, TimeoutError):
            return False  # nobody could take over now

    # ── tasks ──

    async def _read(self) -> None:
        self.reader.lost_connection()
        await self.reader.run()

    async def _listen(self) -> None:
        await self._store.listen(self.reader.ring, self.config.ring)

    async def _own(self) -> None:
        """Hold the owner lock: while it is lost nothing starts; if another has it, stop."""
        while True:
            await self._owner_lost.wait()
            self._owner_lost.clear()
            await self._persist("owner", self._store.hold_ownership, once=True)
            if not self._owner_lost.is_set():  # lost again before we came to run
                self.sender.unhold("owner lost")

    async def _persist(self, what: str, work: Callable[[], Awaitable[None]], *, once: bool = False) -> None:
        """Run `work` again and again while the database is away (`once`: until it ends without that)."""
        wait_s = AWAY_WAIT_S
        while True:
            began = self._clock.now()
            try:
                await work()
            except StoreAwayError as exc:
                self._engine.counters.store_away += 1
                if self._clock.now() - began > AWAY_WAIT_MAX_S:
                    wait_s = AWAY_WAIT_S  # it worked for a while
                _log.warning(f"{what}.away", error=str(exc), retry_in_s=wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, AWAY_WAIT_MAX_S)
                continue
            if once:
                return

    # ── between the parts ──

    def _endpoint_changed(self, lane: Lane) -> None:
        self.reader.catch_up.look(lane)
        self.sender.changed(lane)

    def _piled_up(self, yes: bool) -> None:
        if yes:
            _log.warning("results.piled_up", unrecorded=self.recorder.unrecorded)
            self.sender.hold("unrecorded results")
        else:
            self.sender.unhold("unrecorded results")

    def _lost_ownership(self) -> None:
        self.sender.hold("owner lost")
        self._owner_lost.set()


def _raise_worst(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Raise what the tasks ended with: another's rule before a lost memory before a surprise."""
    errors = [exc for task in tasks if not task.cancelled() and (exc := task.exception()) is not None]
    for kind in (FencedError, LifeLostError, Exception, BaseException):
        for exc in errors:
            if isinstance(exc, kind):
                raise exc
