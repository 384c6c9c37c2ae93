"""Gaps: ids at or below the head that are not visible (yet).

Ids are taken in order, but rows become visible in commit order, and a rolled-back id never does. A *young* gap is one
id, looked at again with every head read: with many producers most events are first seen so. After 100 ms it becomes
part of an *old* gap, a range, which is closed as "never" only when no transaction is left that could fill it:

    NEW ──holders noted──▶ WATCHED ──every holder gone──▶ CLOSING ──a later read found nothing more──▶ gone
                              │
                              └─ looked at again when a holder has left, and each second

A *barrier* is the set of transactions that held the writers' lock on the log at a moment when the gap was known; it
only shrinks. But a prepared transaction changes its name when the server restarts, so when a member has left,
the prepared holders of that moment join. Two tempting rules are wrong: snapshots' xmax is no bound on transactions that
have yet to take an xid, and an id can be taken before an xid.

Ranges with different barriers are never joined, but at the bound; a joined range begins again as NEW. No I/O here: the
reader asks what to read, and tells what it saw.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from dispatcher.domain.ranges import IdRanges, runs
from dispatcher.ports import Holders

YOUNG_S = 0.1
YOUNG_MAX = 2_000  # ids looked at with every head read; more are ranges at once
YOUNG_RUN_MAX = 100  # a longer run of missing ids is a load under way, not a neighbour about to commit
OLD_MAX = 10_000
PROBE_RANGES_MAX = 1_000
WATCH_S = 0.02  # how often holders are looked at while a gap is watched
WATCH_IDLE_S = 0.25  # … and once nothing has changed for a second
PROBE_EVERY_S = 1.0


@dataclass(slots=True, eq=False)
class Barrier:
    """`members` only shrinks, but for prepared transactions that join when one of the `first` members leaves."""

    members: frozenset[str]
    first: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.members

    @property
    def is_open(self) -> bool:
        return not self.members

    def note(self, holders: Holders) -> bool:
        """Take in who holds now; return whether a member has left."""
        now = holders.running | holders.prepared
        left = self.members - now
        if left & self.first:
            # It may have been prepared, and may bear another name since. A name changes once, so nobody follows those who
            # joined: else a platform that always has something prepared would keep every gap open for ever.
            self.members |= holders.prepared
        self.members &= now
        return bool(left)


@dataclass(slots=True, eq=False)
class Gap:
    low: int
    high: int
    barrier: Barrier | None = None
    probe_now: bool = False
    page_from: int = field(default=0)  # where the next page of a look begins, when found ids stay in the range

    @property
    def is_closing(self) -> bool:
        return self.barrier is not None and self.barrier.is_open


class Gaps:
    """Owned by the reader. `old` is ascending and disjoint; young ids lie outside of it."""

    def __init__(self, *, barrier_off: bool = False) -> None:
        self.young: dict[int, float] = {}  # id → seen missing at
        self.old: list[Gap] = []
        self.closed_ids = 0
        self._barrier_off = barrier_off  # only for the control run that must lose events
        self._watched_at = float("-inf")
        self._changed_at = float("-inf")
        self._probed_at = float("-inf")

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def __contains__(self, event_id: int) -> bool:
        if event_id in self.young:
            return True
        at = bisect_right(self.old, event_id, key=attrgetter("low")) - 1
        return at >= 0 and event_id <= self.old[at].high

    def ranges(self) -> IdRanges:
        """Return all gaps as one set."""
        ranges = IdRanges()
        ranges.lows, ranges.highs = [gap.low for gap in self.old], [gap.high for gap in self.old]
        ranges.update(runs(sorted(self.young)))
        return ranges

    # ── learning ──

    def restore(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.old = [Gap(low, high) for low, high in ranges]

    def passed(self, old_head: int, new_head: int, seen: Iterable[int], now: float) -> None:
        """Note which ids of (old_head, new_head] were not among the ascending `seen`."""
        at = old_head + 1
        ranges = []
        for event_id in (*seen, new_head + 1):
            if event_id > at:
                low, high = at, event_id - 1
                if high - low < YOUNG_RUN_MAX and len(self.young) + high - low < YOUNG_MAX:
                    for missing in range(low, high + 1):
                        self.young[missing] = now
                else:
                    ranges.append(Gap(low, high))
            at = event_id + 1
        if ranges:
            self._insert(ranges)

    def found_young(self, event_id: int) -> None:
        self.young.pop(event_id, None)

    def age(self, now: float) -> None:
        """Turn young ids whose time is over into old gaps."""
        over = []
        for event_id, since in self.young.items():  # in the order in which they were seen missing
            if now < since + YOUNG_S:
                break
            over.append(event_id)
        if over:
            for event_id in over:
                del self.young[event_id]
            self._insert([Gap(low, high) for low, high in runs(sorted(over))])

    def _insert(self, gaps: list[Gap]) -> None:
        self.old = sorted([*self.old, *gaps], key=attrgetter("low"))
        if len(self.old) > OLD_MAX:
            joined = IdRanges((gap.low, gap.high) for gap in self.old)
            joined.shrink(OLD_MAX // 2)
            kept = {(gap.low, gap.high): gap for gap in self.old}
            self.old = [kept.get(span) or Gap(*span) for span in joined]
            for event_id in [event_id for event_id in self.young if event_id in joined]:
                del self.young[event_id]  # ranges stay disjoint when it ages

    # ── what to do next ──

    def wants_holders(self, now: float) -> bool:
        """Tell whether the reader should look at who holds the writers' lock."""
        if any(gap.barrier is None for gap in self.old):
            return True
        if all(gap.is_closing for gap in self.old):
            return False
        quiet = now - self._changed_at > 1.0
        return now - self._watched_at >= (WATCH_IDLE_S if quiet else WATCH_S)

    def watch_now(self) -> None:
        """Somebody has committed, and it may have been one of the holders: look at them next, however quiet it was."""
        self._watched_at = float("-inf")

    def note_holders(self, holders: Holders, now: float) -> None:
        """Give new gaps their barrier, and let the others' shrink."""
        self._watched_at = now
        moved = {
            barrier for barrier in {gap.barrier for gap in self.old} if barrier is not None and barrier.note(holders)
        }
        fresh = Barrier(frozenset() if self._barrier_off else holders.running | holders.prepared)
        for gap in self.old:
            if gap.barrier is None:
                gap.barrier = fresh
            elif gap.barrier not in moved:
                continue
            # From its low end: what an earlier look has passed may have been filled since, and the closing look comes once.
            gap.probe_now, gap.page_from, self._changed_at = True, 0, now

    def to_probe(self, now: float, *, every: bool = False) -> list[Gap]:
        """Return the gaps to look at: those whose barrier moved, and each second all (`every`: now)."""
        if every or now - self._probed_at >= PROBE_EVERY_S:
            for gap in self.old:
                gap.probe_now |= gap.barrier is not None
            if self.old:
                self._probed_at = now
        wanted = []
        for gap in self.old:
            if gap.probe_now and gap.barrier is not None:
                wanted.append(gap)
                if len(wanted) == PROBE_RANGES_MAX:
                    break
        return wanted

    def probe_took(self, found: bool, duration_s: float, now: float) -> None:
        """A look that found nothing is not repeated within ten times its own duration."""
        if not found:
            self._probed_at = max(self._probed_at, now + 10 * duration_s - PROBE_EVERY_S)

    @property
    def is_pending(self) -> bool:
        """Tell whether a look is due now."""
        return any(gap.probe_now for gap in self.old)

    def next_at(self, now: float) -> float:
        """Return when the reader must come back for gaps at the latest."""
        if not self.old:
            return min(self.young.values(), default=float("inf")) + YOUNG_S
        if any(gap.barrier is None or gap.probe_now for gap in self.old):
            return now
        quiet = now - self._changed_at > 1.0
        return self._watched_at + (WATCH_IDLE_S if quiet else WATCH_S)

    def probed(self, gap: Gap, asked: tuple[int, int], was_closing: bool, found: list[int], full: bool) -> None:
        """Take in a look at `asked`, a part of the gap: found ids leave it (at the bound of ranges they stay, and are skipped next time because
        they are settled or in hand); what a closing look passed without finding is closed."""
        at = bisect_right(self.old, gap.low, key=attrgetter("low")) - 1
        if at < 0 or self.old[at] is not gap:
            return  # joined with others meanwhile
        if full and not found:
            return  # its turn hasn't come; it keeps wanting a look
        if was_closing:
            if full:
                self.closed_ids += found[-1] + 1 - gap.low - len(found)
                gap.low = gap.page_from = found[-1] + 1
                rest = [gap] if gap.low <= gap.high else []
            else:
                self.closed_ids += gap.high + 1 - gap.low - len(found)
                rest = []
        elif len(self.old) + len(found) <= OLD_MAX:
            ids = IdRanges([(gap.low, gap.high)])
            for event_id in found:
                ids.remove(event_id, event_id)
            gap.probe_now = full
            rest = [gap] if not found else [Gap(low, high, gap.barrier, full) for low, high in ids]
        else:
            gap.page_from = found[-1] + 1 if full else 0
            gap.probe_now = full
            rest = [gap]
        self.old[at : at + 1] = rest

    def asked(self, gap: Gap) -> tuple[int, int]:
        """Return the ids of the gap to look at next."""
        low = max(gap.low, gap.page_from)
        return (low, gap.high) if low <= gap.high else (gap.low, gap.high)

    def forget_barriers(self) -> None:
        """At a reconnect: nothing is known any more about who held what."""
        for gap in self.old:
            gap.barrier, gap.probe_now = None, False

    def __iter__(self) -> Iterator[Gap]:
        return iter(self.old)
