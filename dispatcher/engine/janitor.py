"""The janitor: a task beside the others that keeps partitions ahead of the log and takes away what is older than the retention.

Every ten seconds it looks at the shape of the log. Whatever fails is logged and tried again later; it never stops a delivery.

**A leaf goes** when its newest event is older than the retention, or when the log is larger than it may be; the oldest first, and only below
the *committed* position and outside of gaps. Nearly always every lane has passed it. A lane that hasn't, because its endpoint is paused,
disabled or down for days, loses what it has not sent, and loses it in a way that can be counted:

    stall    lanes with anything open below the leaf's end take nothing more from reads and let go of what isn't in flight
    wait     … until what they have in flight below it is recorded, and a checkpoint after that
    expire   one transaction: count what each of them has not sent, end the retries, keep the counts (`discard`), tell the accounts, TRUNCATE
    go on    the lanes read on, and find nothing there

A crash at any point leaves either all of it or nothing. Lanes that are past the leaf aren't touched. The empty shell is dropped when the lock
of the whole table can be had; an open transaction of a producer keeps that from happening, not the TRUNCATE.
"""

import asyncio
from collections.abc import Callable
from itertools import pairwise

import structlog

from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.retention import DAY_S, Span, is_expired, is_settled
from dispatcher.domain.run import RunSource
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes
from dispatcher.engine.provision import TRY_MAX_S, TRY_S, Patience, Provisioner
from dispatcher.ports import Expired, FencedError, LifeLostError, LogShape, Parent, Partitions, StoreAwayError, Sweep
from dispatcher.settings import Settings

_log = structlog.get_logger(room="janitor")

TURN_S = 10.0
DOUBLINGS_MAX = 5  # of that wait, one for each failure in a row
BUSY_S = 0.1  # between turns while there is something to do
SETTLE_MAX_S = 90.0  # the longest POST takes 60
SETTLE_POLL_S = 0.2
# Between tries to expire a leaf that somebody reads, or that a lane is slow to leave.
EXPIRE_S, EXPIRE_MAX_S = 10.0, 300.0
SHELLS_MAX = 4  # dropped a turn
SWEEP_S = 3_600.0
KEYS_SWEEP_S = 60.0  # there may be a key an event: 200 pages a minute are 16,000 a second
KEYS_DAYS = 1  # webhook.emit() says so
WARN_S = 3_600.0
SWEEP_ROWS = 5_000
SWEEP_PAUSE_S = 0.02
SWEEP_PAGES = 200  # of each kind a time
RUNS_ROWS = 100  # each is a change of configuration
TESTS_DAYS = 30
STATS_DAYS = 35


class Janitor:
    """`look` tells the reader that a lane may want a page again."""

    def __init__(
        self,
        partitions: Partitions,
        lanes: Lanes,
        clock: Clock,
        counters: Counters,
        settings: Settings,
        *,
        epoch: int,
        look: Callable[[Lane], None],
        after_read: Callable[[Callable[[], None]], None] = lambda action: action(),
    ) -> None:
        self._partitions = partitions
        self._lanes = lanes
        self._clock = clock
        self._counters = counters
        self._settings = settings
        self._epoch = epoch
        self._after_read = after_read
        self._look = look
        self._provisioner = Provisioner(partitions, clock, counters, retention_days=settings.retention_days)
        self._expiring = Patience(EXPIRE_S, EXPIRE_MAX_S)
        self._dropping = Patience(TRY_S, TRY_MAX_S)
        self._warning = Patience(WARN_S, WARN_S)
        self._swept_at = float("-inf")
        self._keys_swept_at = float("-inf")
        self._retries_after = (0, 0, 0)
        self.turns = 0  # that were begun

    @property
    def ids_ahead(self) -> int | None:
        """How many ids the log's partitions have left, None before the first look; 0: rows go to the DEFAULT partition."""
        return self._provisioner.ids_ahead

    async def run(self) -> None:
        """Go on until cancelled. Raises LifeLostError and FencedError; everything else is met here."""
        begun = False
        failures = 0  # one after another
        while True:
            busy = False
            try:
                if not begun:
                    await self._partitions.begin()
                    begun = True
                busy = await self.turn()
                failures = 0
            except (LifeLostError, FencedError):
                raise
            except StoreAwayError as exc:
                self._counters.store_away += 1
                _log.warning("janitor.away", error=str(exc))
            except Exception:  # noqa: BLE001 - logged with its traceback
                # Whatever it is, deliveries go on without a janitor for a while.
                self._counters.janitor_failures += 1
                failures += 1
                _log.exception("janitor.failed")
            await asyncio.sleep(BUSY_S if busy else TURN_S * 2 ** min(failures, DOUBLINGS_MAX))

    async def turn(self) -> bool:
        """Do what is due; return whether there is more. One part's failure doesn't keep the others from their turn."""
        self.turns += 1
        shape = await self._partitions.shape()
        failed: Exception | None = None
        busy = False
        for part in (self._provisioner.turn, self._expire, self._drop, self._sweep):
            try:
                busy = await part(shape) or busy
            except (LifeLostError, FencedError, StoreAwayError):
                raise
            except Exception as exc:  # noqa: BLE001 - raised below, once the others had their turn
                failed = failed or exc
        if failed is not None:
            raise failed
        return busy

    # ── retention ──

    async def _expire(self, shape: LogShape) -> bool:
        if not self._expiring.is_over(self._clock.now()):
            return False
        leaf = await self._expirable(shape)
        if leaf is None:
            return False
        stalled: dict[Lane, None] = {}
        expired = None
        try:
            retrying = set(await self._partitions.retrying_below(leaf.high))
            if await self._settled(stalled, retrying, leaf.high):
                expired = await self._partitions.expire(self._epoch, leaf)
        finally:
            for lane in stalled:
                lane.stalled = False
                self._look(lane)
            if expired is not None:
                self._after_read(self._ask_for_keys)
            self._expiring.tried(self._clock.now(), had=expired is not None)
        if expired is None:
            _log.info("partition.not_now", low=leaf.low, high=leaf.high, lanes=len(stalled))
            return False
        self._note(leaf, expired)
        return True

    async def _expirable(self, shape: LogShape) -> Span | None:
        """Return the oldest leaf that has rows, if it may go. A log that is too large goes by its size."""
        days = self._settings.retention_days
        for leaf in shape.outbox.leaves:
            if not is_settled(leaf, shape.position, shape.gaps):
                break
            event_us, attempt_us = await self._partitions.newest_us(leaf)
            if event_us is not None:
                return leaf if is_expired(event_us, shape.wall_us, days) or await self._is_too_large() else None
            if (
                attempt_us is not None
                and is_expired(attempt_us, shape.wall_us, days)
                and _has_attempts_apart(shape, leaf)
            ):
                return leaf  # its events went before: erased, or in an earlier turn, and dead letters of them were resent since
        if self._warning.is_over(self._clock.now()) and await self._is_too_large():
            self._warning.tried(self._clock.now(), had=False)
            _log.warning(
                "retention.too_large", bytes_max=self._settings.retention_bytes_max, why="no partition may go yet"
            )
        return None

    async def _is_too_large(self) -> bool:
        bytes_max = self._settings.retention_bytes_max
        return bytes_max is not None and await self._partitions.total_bytes() > bytes_max

    async def _settled(self, stalled: dict[Lane, None], retrying: set[int], bound: int) -> bool:
        """Stall the lanes that have anything open below `bound`, and wait until nothing of it is in their hands and a checkpoint has said where
        they are; False if that takes too long. Looks again each time, because a replay may begin meanwhile."""
        deadline = self._clock.now() + SETTLE_MAX_S
        seen: int | None = None
        while True:
            for lane in self._lanes:
                if lane.id in retrying or _is_open_below(lane, bound):
                    stalled[lane] = None
                    self._lanes.stall(lane)  # again, too: for what a read brought that was under way
            if not stalled:
                return True
            if any(_has_in_hand(lane, bound) for lane in stalled):
                seen = None
            elif seen is None:
                seen = self._counters.checkpoints
            elif self._counters.checkpoints >= seen + 2:  # the first may have been built before
                return True
            if self._clock.now() > deadline:
                return False
            await asyncio.sleep(SETTLE_POLL_S)

    def _ask_for_keys(self) -> None:
        """Retries are gone, and the keys that they held are free: lanes that order by key ask for what is left."""
        for lane in self._lanes:
            if lane.keys is not None:
                lane.keys.are_known = False
                self._look(lane)

    def _note(self, leaf: Span, expired: Expired) -> None:
        self._counters.partitions_expired += 1
        for loss in expired.losses:
            self._counters.deliveries_expired += loss.deliveries
            _log.warning(
                "endpoint.events_expired",
                endpoint_id=loss.endpoint_id,
                deliveries=loss.deliveries,
                unsent=loss.unsent,
                waiting_for_retry=loss.retries,
                low=leaf.low,
                high=leaf.high,
            )
            lane = self._lanes.get(loss.endpoint_id)
            if lane is not None:
                lane.backlog = max(0, lane.backlog - loss.unsent)
                if lane.endpoint.state is not EndpointState.LIVE:
                    self._counters.deliveries_expired_held += loss.deliveries
        _log.info("partition.expired", low=leaf.low, high=leaf.high, freed_bytes=expired.freed_bytes)

    async def _drop(self, shape: LogShape) -> bool:
        """Drop empty shells of the log, and join the attempts' to the leaf below: the oldest, or the first above a hole."""
        if not self._dropping.is_over(self._clock.now()):
            return False
        shells = []
        for leaf in shape.outbox.leaves:
            if not is_settled(leaf, shape.position, shape.gaps):
                break
            if await self._partitions.newest_us(leaf) == (None, None):
                shells.append(leaf)
        dropped = [leaf for leaf in shells[:SHELLS_MAX] if await self._drop_leaf("outbox", leaf)]
        self._counters.partitions_dropped += len(dropped)
        oldest = min((leaf.low for leaf in shape.outbox.leaves if leaf not in dropped), default=shape.last_id)
        joinable = [leaf for below, leaf in pairwise(shape.attempt.leaves) if below.high == leaf.low]
        for leaf in joinable[:SHELLS_MAX]:
            if leaf.high > oldest or shape.attempt.outside or (await self._partitions.newest_us(leaf))[1] is not None:
                break
            if not await self._drop_leaf("attempt", leaf):
                break
        return bool(dropped)

    async def _drop_leaf(self, parent: Parent, leaf: Span) -> bool:
        if not self._dropping.is_over(self._clock.now()):
            return False
        had = await self._partitions.recut(parent, leaf, ())
        self._dropping.tried(self._clock.now(), had=had)
        if had:
            _log.info("partition.dropped", table=parent, low=leaf.low, high=leaf.high)
        return had

    # ── sweeping ──

    async def _sweep(self, shape: LogShape) -> bool:
        swept = await self._partitions.sweep_retries(self._retries_after, SWEEP_ROWS)
        self._retries_after = swept.passed or (0, 0, 0)
        if swept.deliveries:
            self._counters.deliveries_expired += swept.deliveries
            _log.warning("retries.expired", deliveries=swept.deliveries, why="their events are gone")
            self._after_read(self._ask_for_keys)  # a read that is under way may know them still
        if self._clock.now() - self._keys_swept_at >= KEYS_SWEEP_S:
            await self._sweep_kind("event_keys", shape.wall_us - KEYS_DAYS * DAY_S * 1_000_000, SWEEP_ROWS)
            self._keys_swept_at = self._clock.now()
        if self._clock.now() - self._swept_at >= SWEEP_S:
            await self._sweep_old(shape)
            self._swept_at = self._clock.now()
        return False

    async def _sweep_old(self, shape: LogShape) -> None:
        """Delete what is older than it is kept, in pages with a pause between them."""
        now_us = shape.wall_us
        letters_us = now_us - int(self._settings.dead_letter_retention_days * DAY_S * 1e6)
        kinds: tuple[tuple[Sweep, int, int], ...] = (
            ("tests", now_us - TESTS_DAYS * DAY_S * 1_000_000, SWEEP_ROWS),
            ("stats", now_us - STATS_DAYS * DAY_S * 1_000_000, SWEEP_ROWS),
            ("runs", letters_us, RUNS_ROWS),
        )
        for kind in kinds:
            await self._sweep_kind(*kind)
        events_us = now_us - int(self._settings.retention_days * DAY_S * 1e6)
        below = await self._emptied_below(shape)
        for _ in range(SWEEP_PAGES):
            if await self._partitions.sweep_attempts(below, events_us, SWEEP_ROWS) < SWEEP_ROWS:
                break
            await asyncio.sleep(SWEEP_PAUSE_S)
        after, deleted, still_open = 0, 0, 0
        for _ in range(SWEEP_PAGES):
            letters = await self._partitions.sweep_dead_letters(after, letters_us, SWEEP_ROWS)
            deleted, still_open = deleted + letters.deleted, still_open + letters.open
            if letters.passed is None:
                break
            after = letters.passed
            await asyncio.sleep(SWEEP_PAUSE_S)
        if deleted:
            self._counters.dead_letters_expired += deleted
            _log.log(30 if still_open else 20, "dead_letters.expired", deleted=deleted, open=still_open)

    async def _emptied_below(self, shape: LogShape) -> int:
        """Return the id below which no leaf has events. Attempts there, in whatever partition, are of events that are gone."""
        below = 0
        for leaf in shape.outbox.leaves:
            if (
                not is_settled(leaf, shape.position, shape.gaps)
                or (await self._partitions.newest_us(leaf))[0] is not None
            ):
                return leaf.low
            below = leaf.high
        return below

    async def _sweep_kind(self, what: Sweep, before_us: int, limit: int) -> None:
        for _ in range(SWEEP_PAGES):
            if await self._partitions.sweep(what, before_us, limit) < limit:
                break
            await asyncio.sleep(SWEEP_PAUSE_S)


def _has_attempts_apart(shape: LogShape, leaf: Span) -> bool:
    """Tell whether the attempts of the leaf's events are in partitions that have no others, so that they are emptied with it."""
    apart = all(
        leaf.low <= other.low and other.high <= leaf.high for other in shape.attempt.leaves if leaf.overlaps(other)
    )
    return apart and not any(map(leaf.overlaps, shape.attempt.outside))


def _is_open_below(lane: Lane, bound: int) -> bool:
    """Tell whether the lane has anything to do, or in hand, with ids below `bound`."""
    return (
        (not lane.live and lane.cursor < bound - 1)
        or bool(lane.holes and lane.holes.lows[0] < bound)
        or bool(lane.keys is not None and lane.keys.held_back and lane.keys.held_back.lows[0] < bound)
        or any(run.spec.source is RunSource.LOG and run.cursor < bound - 1 for run in lane.runs.values())
        or _has_in_hand(lane, bound)
    )


def _has_in_hand(lane: Lane, bound: int) -> bool:
    """What a dead letter's copy is sent from needs no leaf."""
    copies = [run.spec.id for run in lane.runs.values() if run.spec.source is RunSource.DEAD_LETTER]
    return (
        any(event_id < bound for event_id in lane.hands)
        or any(event_id < bound and run not in copies for event_id, run in lane.retry_hands)
        or any(i < bound for run in lane.runs.values() if run.spec.id not in copies for i in run.hands)
    )
