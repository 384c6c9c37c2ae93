"""Gaps: ids at or below the head that are not visible (yet).

Ids are taken in order, but rows become visible in commit order, and a rolled-back id never does. A *young* gap is one
id, looked at again with every head read: with many producers most events are first seen so. After 100 ms it becomes
part of an *old* gap, a range, which is closed as "never" only when no transaction is left that could fill it:

    NEW ──holders noted──▶ WATCHED ──every holder gone──▶ CLOSING ──a later read found nothing more──▶ gone
                              │
                              └─ looked at again when a holder has left

A *barrier* is the set of transactions that held the writers' lock on the log at a moment when the gap was known; it
only shrinks. But a prepared transaction changes its name when the server restarts, so when a member has left,
the prepared holders of that moment join. Two tempting rules are wrong: snapshots' xmax is no bound on transactions that
have yet to take an xid, and an id can be taken before an xid. Barriers that have become equal are one from then on.

Nothing else makes an old gap worth a look: a transaction is visible before its lock is gone, so as long as no member
has left, nothing came. (A look at everything each second scanned the uncommitted rows of a load over and over: others'
p99 beside one of a million rows was 237 ms, against 8 ms beside the same load elsewhere. Looking at every range in each
turn for its first 100 ms made it 43 to 56 ms.)

What one large transaction left is looked at by summaries once all of it has come: who has how much of it, not the rows.
A lane with a crowd of it goes back and reads it for itself, as a lane that is behind does anyway. (By rows, 200 a look,
others' p99 was 6 times as long for as long as two million were looked at, and is 1.2 times now.)

At the bound of ranges neighbours of one barrier are joined; only if these are too few, any, which begin again as NEW.
No I/O here: the reader asks what to read, and tells what it saw.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from operator import attrgetter

from dispatcher.domain.ranges import IdRanges, runs
from dispatcher.ports import Holders

YOUNG_S = 0.1
YOUNG_MAX = 2_000  # ids looked at with every head read; more are ranges at once
YOUNG_RUN_MAX = 100  # a longer run of missing ids is a load under way, not a neighbour about to commit
OLD_MAX = 10_000
LOOK_RANGES_MAX = 1_000
LOOK_IDS_MAX = 20_000  # in all ranges of a look: a load's rows that nobody can see yet cost 0.1 µs each
# In all ranges of a look at what is there of whom, to begin with; where little is, twice as many with each, up to LOOK_IDS_MAX.
SUMMARY_IDS = 1_000
SUMMARY_REST, SUMMARY_REST_MAX_S = 3, 0.1  # how many times what such a look took nothing is summed up after it
WATCH_S = 0.02  # how often holders are looked at while a gap is watched
WATCH_IDLE_S = 0.25  # … and once nothing has changed for a second

_low = attrgetter("low")


@dataclass(slots=True, eq=False)
class Barrier:
    """`members` only shrinks, but for prepared transactions that join when one of the `first` members leaves."""

    members: frozenset[str]
    first: frozenset[str] = field(init=False)
    gaps: "dict[Gap, None]" = field(default_factory=dict)  # which wait for it

    def __post_init__(self) -> None:
        self.first = self.members

    @property
    def is_open(self) -> bool:
        return not self.members

    @property
    def future(self) -> tuple[frozenset[str], frozenset[str]]:
        """All that what becomes of it depends on."""
        return self.members, self.members & self.first

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
    page_from: int = 0  # where the next page of a look begins, when the one before has not reached the end
    by_rows_to: int = 0  # up to here a summary was no use

    @property
    def is_closing(self) -> bool:
        return self.barrier is not None and self.barrier.is_open

    @property
    def wants_summary(self) -> bool:
        return self.is_closing and max(self.low, self.page_from) > self.by_rows_to


@dataclass(frozen=True, slots=True)
class Look:
    """A range to read. Whether it closes is decided before the read: only a statement that begins after the barrier opened may close.
    `sums`: by a summary."""

    gap: Gap
    low: int
    high: int
    closes: bool
    sums: bool = False


class Gaps:
    """Owned by the reader. `old` is ascending and disjoint; young ids lie outside of it."""

    def __init__(self, *, barrier_off: bool = False) -> None:
        self.young: dict[int, float] = {}  # id → seen missing at
        self.old: list[Gap] = []
        self.closed_ids = 0
        self.joined: list[tuple[int, int]] | None = None  # what has become one gap, while somebody wants to know
        self._barrier_off = barrier_off  # only for the control run that must lose events
        self._new: dict[Gap, None] = {}  # have no barrier yet
        self._barriers: dict[Barrier, None] = {}
        self._wanting: dict[Gap, None] = {}  # a look, in turn
        self._bulk: dict[Gap, None] = {}  # … and those that many rows may have come in, which take long
        self._bulk_first = False
        self._rest_until = -inf
        self._summary_ids = SUMMARY_IDS
        self._watched_at = -inf
        self._changed_at = -inf

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def __contains__(self, event_id: int) -> bool:
        return event_id in self.young or self._at(event_id) is not None

    def __iter__(self) -> Iterator[Gap]:
        return iter(self.old)

    def ranges(self) -> IdRanges:
        """Return all gaps as one set."""
        ranges = IdRanges()
        ranges.lows, ranges.highs = [gap.low for gap in self.old], [gap.high for gap in self.old]
        ranges.update(runs(sorted(self.young)))
        return ranges

    # ── learning ──

    def restore(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.old = [Gap(low, high) for low, high in ranges]
        self._new = dict.fromkeys(self.old)

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
        for gap in gaps:
            insort(self.old, gap, key=_low)
            self._new[gap] = None
        if len(self.old) > OLD_MAX:
            self._join()

    def _join(self) -> None:
        """Join the closest neighbours, down to half of the bound: those of one barrier, which stays theirs, or else any."""
        excess, young = len(self.old) - OLD_MAX // 2, sorted(self.young)
        closest = [n for _, n in sorted((b.low - a.high, n) for n, (a, b) in enumerate(pairwise(self.old), 1))]
        # Of what is young between two, the holder may be one that their barrier doesn't know.
        alike = [
            n for n in closest
            if self.old[n].barrier is not None and self.old[n].barrier is self.old[n - 1].barrier
            and bisect_left(young, self.old[n - 1].low) == bisect_left(young, self.old[n].low)
        ]  # fmt: skip
        stays = len(alike) >= excess
        joined = set((alike if stays else closest)[:excess])
        parts: list[list[Gap]] = []
        for n, gap in enumerate(self.old):
            if n in joined:
                parts[-1].append(gap)
            else:
                parts.append([gap])
        self.old = []
        for gaps in parts:
            one = gaps[0]
            if len(gaps) > 1:  # another one, so that a look under way at a part of it changes nothing
                one = Gap(one.low, gaps[-1].high)
                if self.joined is not None:
                    self.joined.append((one.low, one.high))
                wants = any(gap in self._wanting or gap in self._bulk for gap in gaps)
                self._put(one, gaps[0].barrier if stays else None, self._bulk if wants else None)
                for gap in gaps:
                    self._forget(gap)
            self.old.append(one)
        for event_id in [event_id for event_id in young if self._at(event_id) is not None]:
            del self.young[event_id]  # ranges stay disjoint when it ages

    def _at(self, event_id: int) -> int | None:
        """Return where in `old` the gap is that has this id."""
        at = bisect_right(self.old, event_id, key=_low) - 1
        return at if at >= 0 and event_id <= self.old[at].high else None

    def _put(self, gap: Gap, barrier: Barrier | None, line: dict[Gap, None] | None) -> None:
        gap.barrier = barrier
        (self._new if barrier is None else barrier.gaps)[gap] = None
        if line is not None:
            line[gap] = None

    def _forget(self, gap: Gap) -> None:
        (self._new if gap.barrier is None else gap.barrier.gaps).pop(gap, None)
        self._wanting.pop(gap, None)
        self._bulk.pop(gap, None)

    # ── what to do next ──

    def wants_holders(self, now: float) -> bool:
        """Tell whether the reader should look at who holds the writers' lock."""
        if self._new:
            return True
        if not self._is_watching():
            return False
        quiet = now - self._changed_at > 1.0
        return now - self._watched_at >= (WATCH_IDLE_S if quiet else WATCH_S)

    def watch_now(self) -> None:
        """Somebody has committed, and it may have been one of the holders: look at them next, however quiet it was."""
        self._watched_at = -inf

    def note_holders(self, holders: Holders, now: float) -> None:
        """Give new gaps their barrier, and let the others' shrink."""
        self._watched_at = now
        moved = [barrier for barrier in self._barriers if barrier.note(holders)]
        if self._new:
            fresh = Barrier(frozenset() if self._barrier_off else holders.running | holders.prepared)
            fresh.gaps, self._new = self._new, {}
            for gap in fresh.gaps:
                gap.barrier = fresh
            moved.append(fresh)
            self._barriers[fresh] = None
        for barrier in moved:
            ids = sum(gap.high - gap.low + 1 for gap in barrier.gaps)
            line, other = (self._wanting, self._bulk) if ids <= LOOK_IDS_MAX else (self._bulk, self._wanting)
            for gap in barrier.gaps:
                # From its low end: what an earlier look has passed may have been filled since, and the closing look comes once.
                gap.page_from, self._changed_at = 0, now
                other.pop(gap, None)
                line[gap] = None
        if moved:
            self._unite()

    def _unite(self) -> None:
        """Make one of barriers that have become equal; forget those that nobody waits for."""
        by_future: dict[tuple[frozenset[str], frozenset[str]], Barrier] = {}
        for barrier in self._barriers:
            if barrier.gaps:
                one = by_future.setdefault(barrier.future, barrier)
                if one is not barrier:
                    one.gaps |= barrier.gaps
                    for gap in barrier.gaps:
                        gap.barrier = one
        self._barriers = dict.fromkeys(by_future.values())

    def rest(self, now: float, took_s: float, events: int) -> None:
        """A look by a summary took so long: what one large transaction left waits a while for the next one, so that others don't wait for it."""
        self._rest_until = now + min(SUMMARY_REST_MAX_S, SUMMARY_REST * took_s)
        has_little = events <= SUMMARY_IDS // 2  # of forty million ids that were skipped nothing is there
        self._summary_ids = min(LOOK_IDS_MAX, 2 * self._summary_ids) if has_little else SUMMARY_IDS

    def looks(self, now: float = inf) -> list[Look]:
        """Return what to read, if anything, in turn; bounded in ranges and ids, and all of it by rows or all by summaries. What one large
        transaction left comes in every other look, so that a neighbour's event doesn't wait for five million of its rows; and by summaries, once
        all of it has come."""
        self._bulk_first = not self._bulk_first
        has_bulk = bool(self._bulk) and now >= self._bulk_at()
        line = self._bulk if has_bulk and (self._bulk_first or not self._wanting) else self._wanting
        looks: list[Look] = []
        ids = LOOK_IDS_MAX
        for gap in line:
            low = max(gap.low, gap.page_from)
            sums = line is self._bulk and gap.wants_summary
            if not looks and sums:
                ids = self._summary_ids
            if ids <= 0 or len(looks) == LOOK_RANGES_MAX or (looks and looks[0].sums is not sums):
                break
            high = min(gap.high, low + ids - 1)
            if not sums and low <= gap.by_rows_to:
                high = min(high, gap.by_rows_to)
            ids -= high - low + 1
            looks.append(Look(gap, low, high, gap.is_closing, sums))
        return looks

    @property
    def is_pending(self) -> bool:
        """Tell whether a look is due now."""
        return bool(self._wanting or self._bulk)

    def next_at(self, now: float) -> float:
        """Return when the reader must come back for gaps at the latest."""
        if not self.old:
            return min(self.young.values(), default=inf) + YOUNG_S
        if self._new or self._wanting:
            return now
        at = max(now, self._bulk_at()) if self._bulk else inf
        if self._is_watching():
            quiet = now - self._changed_at > 1.0
            at = min(at, self._watched_at + (WATCH_IDLE_S if quiet else WATCH_S))
        return at

    def _bulk_at(self) -> float:
        """Return when what one large transaction left may be looked at."""
        return self._rest_until if next(iter(self._bulk)).wants_summary else -inf

    def _is_watching(self) -> bool:
        """Tell whether somebody is left who may still fill a gap."""
        return any(barrier.gaps and not barrier.is_open for barrier in self._barriers)

    def by_rows(self, looks: Iterable[Look]) -> None:
        """A summary was no use: these are to be read by their rows, next."""
        for look in looks:
            look.gap.by_rows_to = look.high

    def summed(self, looks: Iterable[Look], events: int) -> None:
        """Take in what a summary saw of ranges that close: all that came in them is read by whoever wants it."""
        self.closed_ids -= events
        for look in looks:
            self.looked(look, [], full=False)

    def looked(self, look: Look, found: list[int], full: bool) -> None:
        """Take in what a look saw: found ids leave the gap (at the bound of ranges they stay, and are skipped next time because they are
        settled or in hand); what a closing look passed without finding is closed. The rest wants its turn again, after the others."""
        gap = look.gap
        at = self._at(gap.low)
        if at is None or self.old[at] is not gap or (full and not found):
            return  # joined with others meanwhile; or its turn hasn't come
        passed = found[-1] if full else look.high
        rest = [gap]
        if look.closes:
            self.closed_ids += passed + 1 - gap.low - len(found)
            gap.low = passed + 1
            rest = [gap] if gap.low <= gap.high else []
        elif found and len(self.old) + len(found) <= OLD_MAX:
            ids = IdRanges([(gap.low, gap.high)])
            for event_id in found:
                ids.remove(event_id, event_id)
            rest = [Gap(low, high) for low, high in ids]
        barrier, line = gap.barrier, self._bulk if gap in self._bulk else self._wanting
        self._forget(gap)
        for part in rest:
            wants = part.high > passed
            part.page_from = passed + 1 if wants else 0
            self._put(part, barrier, line if wants else None)
        self.old[at : at + 1] = rest

    def forget_barriers(self) -> None:
        """At a reconnect: nothing is known any more about who held what."""
        for gap in self.old:
            gap.barrier, gap.page_from = None, 0
        self._new = dict.fromkeys(self.old)
        self._barriers, self._wanting, self._bulk = {}, {}, {}
