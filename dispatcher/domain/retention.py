"""Partitions of the log: where the next one ends, which is too wide, which may go. Pure: numbers in, decisions out.

A *leaf* holds the ids low ≤ id < high. It is what retention takes away, whole, so it should be as wide as a part of the
retention that nobody minds: a day's ids, or a quarter of a short retention. A wider one holds events for longer than
they should be, narrower ones are many: with 50, a read of the head costs twice what it costs with 20 (DESIGN §5).

The ids ahead of the last one are covered for an hour at the highest rate seen lately, and for a million at the least,
because a platform may begin to send at any moment. A slow log gets there by one wide leaf at its end; narrow ones are
cut off its front while nothing is in it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DAY_S = 86_400
LEAF_IDS_MIN = 10_000
LEAF_IDS_MAX = 50_000_000  # some 50 GB of events and attempts
LEAVES_MAX = 40  # live at a time; a longer retention gets wider leaves
LEAD_S = 3_600
LEAD_IDS_MIN = 1_000_000
MARGIN_IDS = 100_000  # nearer to the last id than this, a leaf is attached under the parent's lock (schema.sql: attach_partition)
TOO_WIDE = 4
CUT_LEAVES = 4
PEAK_HALF_LIFE_S = 3_600.0
PEAK_OVER_S = 10.0
PEAK_MAX_PER_S = 100_000.0  # more is no rate but a sequence that somebody has set


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Ids low ≤ id < high."""

    low: int
    high: int

    def overlaps(self, other: "Span") -> bool:
        return self.low < other.high and other.low < self.high


class Pace:
    """How fast ids are handed out: in a day, and the highest rate lately, which halves in an hour."""

    __slots__ = ("_at", "_last_id", "ids_per_day", "peak_per_s")

    def __init__(self) -> None:
        self.ids_per_day = 0.0
        self.peak_per_s = 0.0
        self._last_id: int | None = None
        self._at = 0.0

    def __repr__(self) -> str:
        return f"Pace({self.ids_per_day:.0f} a day, peak {self.peak_per_s:.0f}/s)"

    def saw(self, last_id: int, now: float) -> None:
        """Note the last id handed out at `now` (monotonic)."""
        elapsed = now - self._at
        if self._last_id is not None:
            if elapsed < PEAK_OVER_S:
                return
            rate = min((last_id - self._last_id) / elapsed, PEAK_MAX_PER_S)
            self.peak_per_s = max(self.peak_per_s * 0.5 ** (elapsed / PEAK_HALF_LIFE_S), rate)
        self._last_id, self._at = last_id, now

    def measured(self, ids: int, over_s: float) -> None:
        """`ids` were handed out in the last `over_s`. A log that began just now isn't taken for what it will be."""
        self.ids_per_day = ids / max(over_s, 3_600.0) * DAY_S


def leaf_ids(ids_per_day: float, retention_days: float) -> int:
    """Return how many ids a leaf should hold."""
    days = max(min(1.0, retention_days / 4), retention_days / LEAVES_MAX)
    least = ids_per_day * retention_days / LEAVES_MAX  # fewer would be too many leaves, however wide that makes them
    return math.ceil(max(min(max(ids_per_day * days, LEAF_IDS_MIN), LEAF_IDS_MAX), least))


def lead_ids(peak_per_s: float) -> int:
    """Return how many ids beyond the last one must have their leaf."""
    return max(LEAD_IDS_MIN, math.ceil(peak_per_s * LEAD_S))


def next_leaf(end: int, ahead: int, last_id: int, pace: Pace, retention_days: float) -> Span | None:
    """Return the leaf to add behind `end`, where the last one ends; None if enough are there.

    `ahead`: how many leaves begin above `last_id`. Only for a log that hasn't outrun its leaves (`end` > `last_id`)."""
    assert end > last_id, "what has outrun its leaves is adopted first"
    lead = lead_ids(pace.peak_per_s)
    if ahead >= 2 and end - 1 - last_id >= lead:
        return None
    high = end + leaf_ids(pace.ids_per_day, retention_days)
    if end - 1 - last_id < lead:
        # Half as much again: at 100,000 ids a second the lead itself moves by 10,000 each turn, and each would be a leaf.
        high = max(high, last_id + lead + lead // 2 + 1)
    return Span(end, high)


def adoption_end(last_id: int, pace: Pace, retention_days: float) -> int:
    """Return where the leaf ends that the DEFAULT partition becomes: so far ahead that it isn't full before the next one is there."""
    return last_id + 1 + max(leaf_ids(pace.ids_per_day, retention_days), LEAD_IDS_MIN)


def cuts(leaves: Sequence[Span], last_id: int, pace: Pace, retention_days: float) -> tuple[Span, list[int]] | None:
    """Return the leaf to divide and the bounds of what it becomes: narrow ones and the rest. None if the next leaf fits.

    Only once the leaf in use is half full: by then the rate is known, and there is time to try again."""
    current = next((leaf for leaf in leaves if leaf.low <= last_id + 1 < leaf.high), None)
    following = next((leaf for leaf in leaves if leaf.low > last_id + 1), None)
    if current is None or following is None or following.low != current.high:
        return None
    if last_id + 1 - current.low < (current.high - current.low) // 2:
        return None
    width = leaf_ids(pace.ids_per_day, retention_days)
    if following.high - following.low <= TOO_WIDE * width:
        return None
    inner = [following.low + n * width for n in range(CUT_LEAVES + 1)]
    return following, [at for at in inner if at < following.high] + [following.high]


def is_settled(leaf: Span, position: int, gaps: Iterable[tuple[int, int]]) -> bool:
    """Tell whether the leaf is wholly at or below the committed position, and no gap (inclusive ranges) reaches into it."""
    return leaf.high - 1 <= position and not any(low < leaf.high and high >= leaf.low for low, high in gaps)


def is_expired(newest_us: int, now_us: int, retention_days: float) -> bool:
    return newest_us < now_us - retention_days * DAY_S * 1e6
