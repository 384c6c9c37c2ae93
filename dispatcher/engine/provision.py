"""Partitions ahead of the log: leaves enough for an hour at the highest rate seen, none far too wide; and what landed in the DEFAULT partition
because there was no leaf becomes one.

What to make is decided in domain/retention.py. Here: in which order, and how often to ask again. `attempt` gets the same leaves as `outbox`,
or narrower ones, and gets them first, so that an attempt always finds its own and retention empties both together. Whatever needs the lock of
a whole table is tried at most every 30 s, and more rarely while it isn't had: each try holds up every producer for as long as it waits, 20 ms.

Needs no lanes: `dispatcher maintain` does this too, beside a running dispatcher or without one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import structlog

from dispatcher.domain.endpoint import FOREVER
from dispatcher.domain.retention import DAY_S, MARGIN_IDS, Pace, Span, adoption_end, cuts, next_leaf
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.ports import LogShape, Parent, Partitions, RefusedError, TableShape

MEASURE_S = 600.0
TRY_S, TRY_MAX_S = 30.0, 600.0  # between tries for the lock of a whole table


class Patience:
    """When something that was not to be had may be tried again: after `first_s`, then twice as long each time, `longest_s` at the most."""

    __slots__ = ("_at", "_first_s", "_longest_s", "_wait_s")

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._at, self._wait_s = float("-inf"), first_s

    def is_over(self, now: float) -> bool:
        return now >= self._at

    def tried(self, now: float, *, had: bool) -> None:
        self._at = float("-inf") if had else now + self._wait_s
        self._wait_s = self._first_s if had else min(self._wait_s * 2, self._longest_s)


class Provisioner:
    def __init__(
        self, partitions: Partitions, clock: Clock, counters: Counters, *, retention_days: float, log: Any = None
    ) -> None:
        self.pace = Pace()
        self.ids_ahead: int | None = None  # in leaves, at the last turn
        self._partitions = partitions
        self._clock = clock
        self._counters = counters
        self._retention_days = retention_days
        self._log = log or structlog.get_logger(room="janitor")
        self._measured_at = float("-inf")
        self._adopting = {"outbox": Patience(TRY_S, TRY_MAX_S), "attempt": Patience(TRY_S, TRY_MAX_S)}
        self._given_up: set[Span] = set()
        self._attaching = Patience(TRY_S, TRY_MAX_S)
        self._cutting = Patience(TRY_S, TRY_MAX_S)

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing waits for a lock that was not to be had."""
        now = self._clock.now()
        return all(p.is_over(now) for p in (*self._adopting.values(), self._attaching, self._cutting))

    async def turn(self, shape: LogShape) -> bool:
        """Do the next thing that there is to do; return whether the shape is another now."""
        now = self._clock.now()
        self.ids_ahead = _ids_ahead(shape)
        self.pace.saw(shape.last_id, now)
        if now - self._measured_at >= MEASURE_S:
            await self._measure(shape)
            self._measured_at = now
        adopted = await self._adopt(shape, "attempt")
        if shape.outbox.fence is None or self._adoptable(shape, "attempt") is None:
            adopted = await self._adopt(shape, "outbox") or adopted
        return adopted or await self._extend(shape) or await self._cut(shape)

    async def _measure(self, shape: LogShape) -> None:
        """Learn from the events' times how many ids a day takes."""
        last_id, day_ago_us = shape.last_id, shape.wall_us - DAY_S * 1_000_000
        recent = await self._partitions.first_id_since(day_ago_us, 0, last_id)
        if recent is None:
            self.pace.measured(0, DAY_S)
            return
        first_id, first_us = recent
        is_first = await self._partitions.first_id_since(0, 0, last_id) == recent
        over_s = (shape.wall_us - first_us) / 1e6 if is_first else DAY_S
        self.pace.measured(last_id - first_id + 1, over_s)

    # ── the DEFAULT partition ──

    async def _adopt(self, shape: LogShape, parent: Parent) -> bool:
        leaf = self._adoptable(shape, parent)
        patience = self._adopting[parent]
        if leaf is None or not patience.is_over(self._clock.now()):
            return False
        step = await self._partitions.adopt(parent, leaf)
        went_on = step in ("fenced", "validated", "adopted")
        patience.tried(self._clock.now(), had=went_on)
        if step == "adopted":
            self._counters.partitions_made += 1
        if step in ("unfenced", "below"):
            self._log.warning("partition.not_adopted", table=parent, why=step, low=leaf.low, high=leaf.high)
            if step == "below" and parent == "attempt":
                self._given_up.add(leaf)  # its rows are swept one by one instead, when their events are gone
        elif step is not None:
            self._log.info("partition.adopting", table=parent, step=step, low=leaf.low, high=leaf.high)
        return went_on

    def _adoptable(self, shape: LogShape, parent: Parent) -> Span | None:
        """Return the leaf that the DEFAULT partition should become, if the log has outrun its leaves."""
        table = shape.of(parent)
        if table.fence is not None:
            return table.fence
        if parent == "attempt":  # it follows the log, also where it has no rows yet: they will come
            twins = (leaf for leaf in _with_fence(shape.outbox) if leaf.low <= shape.last_id)
            pieces = (piece for leaf in twins for piece in _without(leaf, table.leaves))
            return next((piece for piece in pieces if self._may_be_adopted(piece, shape)), None)
        if table.outside and table.outside[-1].high < FOREVER:
            return table.outside[-1]
        end, begun = _end(shape), _begun(shape)
        is_late = bool(begun) and shape.last_id >= end and begun[0].low - shape.last_id <= MARGIN_IDS
        if not table.outside and not is_late:
            return None
        low = table.outside[-1].low if table.outside else end
        # No leaf of `attempt` may reach over a bound of the log's: retention could not empty it.
        upto = next((leaf.low for leaf in begun if leaf.low - shape.last_id > MARGIN_IDS), None)
        if upto is None:
            least = adoption_end(shape.last_id, self.pace, self._retention_days)
            upto = max([least, *(leaf.high for leaf in begun)])
        return Span(low, upto)

    def _may_be_adopted(self, piece: Span, shape: LogShape) -> bool:
        """Tell whether the DEFAULT partition of `attempt` can become this: ids must not come to its end before it is a leaf."""
        is_near = piece.high - shape.last_id < MARGIN_IDS
        return piece not in self._given_up and (
            not is_near or any(leaf.low == piece.high for leaf in shape.attempt.leaves)
        )

    # ── ahead ──

    async def _extend(self, shape: LogShape) -> bool:
        end, begun = _end(shape), _begun(shape)
        if shape.last_id >= end:
            if self._adoptable(shape, "outbox") is not None:
                return False  # it has rows, or the attempts' leaf is too near: that is adopted first
            end = shape.last_id + 2 * MARGIN_IDS
        ahead = sum(leaf.low > shape.last_id for leaf in _with_fence(shape.outbox))
        leaf = next_leaf(end, ahead, shape.last_id, self.pace, self._retention_days)
        if leaf is None or not self._attaching.is_over(self._clock.now()):
            return False
        if begun:
            leaf = Span(max(_end(shape), begun[0].low), begun[0].high)  # the pace, and so the width, was another then
        had = bool(begun) or await self._partitions.attach("attempt", leaf)
        had = had and await self._partitions.attach("outbox", leaf)
        self._attaching.tried(self._clock.now(), had=had)
        if had:
            self._counters.partitions_made += 1
            self._log.info("partition.made", low=leaf.low, high=leaf.high, last_id=shape.last_id, pace=repr(self.pace))
        return had

    async def _cut(self, shape: LogShape) -> bool:
        """Divide the next leaf if it is far too wide: else a slow log would keep events for months beyond their retention."""
        found = cuts(shape.outbox.leaves, shape.last_id, self.pace, self._retention_days)
        if found is None or not self._cutting.is_over(self._clock.now()):
            return False
        leaf, bounds = found
        inside = [other for other in shape.attempt.leaves if leaf.low <= other.low and other.high <= leaf.high]
        if len(inside) > 1:  # cut at an earlier try, which did not come to the outbox
            bounds = [leaf.low, *(other.high for other in inside)]
        try:
            had = leaf not in shape.attempt.leaves or await self._partitions.recut("attempt", leaf, bounds)
            had = had and await self._partitions.recut("outbox", leaf, bounds)
        except RefusedError as exc:  # a burst reached it since it was looked at: as wide as it is, then
            self._log.warning("partition.not_cut", low=leaf.low, high=leaf.high, reason=str(exc))
            had = False
        self._cutting.tried(self._clock.now(), had=had)
        if had:
            self._counters.partitions_made += len(bounds) - 2
            self._log.info("partition.cut", low=leaf.low, high=leaf.high, into=bounds, pace=repr(self.pace))
        return had


def _end(shape: LogShape) -> int:
    """Return where the log's last leaf ends."""
    return max((leaf.high for leaf in _with_fence(shape.outbox)), default=0)


def _ids_ahead(shape: LogShape) -> int:
    """Return how many ids follow the last one until one has no leaf."""
    following = shape.last_id + 1
    for leaf in shape.outbox.leaves:  # ascending
        if leaf.low <= following < leaf.high:
            following = leaf.high
    return following - shape.last_id - 1


def _begun(shape: LogShape) -> list[Span]:
    """Return the leaves of `attempt` that earlier tries made, and did not come to the log's."""
    end = _end(shape)
    return [leaf for leaf in shape.attempt.leaves if leaf.high > end]


def _without(leaf: Span, others: Sequence[Span]) -> Iterator[Span]:
    """Give the parts of the leaf that the others, ascending, don't cover."""
    low = leaf.low
    for other in filter(leaf.overlaps, others):
        if low < other.low:
            yield Span(low, other.low)
        low = other.high
    if low < leaf.high:
        yield Span(low, leaf.high)


def _with_fence(table: TableShape) -> list[Span]:
    """Return the leaves, and what is about to be one."""
    return sorted([*table.leaves, *([] if table.fence is None else [table.fence])])
