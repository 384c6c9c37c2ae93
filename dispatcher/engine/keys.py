"""Ordering by key in a lane (domain/ordering.py): which keys are held, and what was passed over because of that.

A key is **held** by a delivery of it that is in the lane's hands, or that waits for a retry. An event that the lane meets
while its key is held is not taken: it is `held_back`, one more kind of hole, and lies in the log. When the key is free
again, the lane reads what is next of that key, which is the same operation as ever over another range: from the lowest
id that was held back, skipping what has an attempt or is in hand. So a key has at most one event in memory, however many
wait, and a lane goes on with its other keys, its mark and its head meanwhile.

Memory: a few words for each key that is held, at most `KEYS_MAX` of them (then the lane falls behind, and takes nothing
from the log until some are free); and `held_back`, ranges of ids that are only written into the lane's row. Joined at
their bound they say too much, and then more is read again after a start than must be.

After a start, and whenever retries may have gone without our doing, what holds keys is read from the retry table before
the lane takes anything (`are_known`). State and arithmetic only; owned by its lane.
"""

from collections.abc import Iterable

from dispatcher.domain.event import Event
from dispatcher.domain.ranges import IdRanges

KEYS_MAX = 5_000
HELD_BACK_MAX = 1_000  # ranges
NEVER = 1 << 62


class Hold:
    """`by`: event ids in hand, or waiting for a retry; none: free. `next_id`: the lowest id that was held back, or NEVER."""

    __slots__ = ("by", "next_id")

    def __init__(self) -> None:
        self.by: set[int] = set()
        self.next_id = NEVER


class Keys:
    __slots__ = ("_holds", "are_known", "free", "held_back")

    def __init__(self) -> None:
        self.are_known = False  # False: take nothing before the retries have been read
        self.held_back = IdRanges()
        self.free: dict[str, None] = {}  # keys of which the next is to be read, in turn
        self._holds: dict[str, Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def __repr__(self) -> str:
        return f"Keys({len(self)} held or free, {len(self.free)} free, {self.held_back.count()} ids held back)"

    @property
    def are_full(self) -> bool:
        return len(self._holds) >= KEYS_MAX

    def holds(self, key: str) -> bool:
        return key in self._holds

    def hold(self, event: Event) -> None:
        """Take note that an event was taken: its key is held by it."""
        assert event.ordering_key is not None
        hold = self._holds.get(event.ordering_key)
        if hold is None:
            hold = self._holds[event.ordering_key] = Hold()
        hold.by.add(event.id)
        self.free.pop(event.ordering_key, None)

    def hold_back(self, event: Event) -> None:
        """Pass over an event whose key is held, or free and not read yet."""
        assert event.ordering_key is not None
        hold = self._holds[event.ordering_key]
        hold.next_id = min(hold.next_id, event.id)
        self.held_back.add(event.id, event.id)
        self.held_back.shrink(HELD_BACK_MAX)

    def read_from(self, key: str, event_id: int) -> None:
        """Of a key that is held, something below what was held back may wait as a hole."""
        self._holds[key].next_id = min(self._holds[key].next_id, event_id)

    def take(self, event: Event, next_id: int) -> None:
        """Take the next event of a free key; the one after it is at or above `next_id`, or there is none (NEVER)."""
        assert event.ordering_key is not None
        self.hold(event)
        self._holds[event.ordering_key].next_id = next_id
        self.held_back.remove(event.id, event.id)
        self.held_back.shrink(HELD_BACK_MAX)

    def release(self, key: str, event_id: int) -> None:
        """The event holds its key no more."""
        hold = self._holds.get(key)
        if hold is None or event_id not in hold.by:
            return
        hold.by.discard(event_id)
        if not hold.by:
            if hold.next_id == NEVER:
                del self._holds[key]
            else:
                self.free[key] = None

    def give_back(self, event: Event) -> None:
        """An event was taken and let go of: it is the next of its key to be read."""
        assert event.ordering_key is not None
        hold = self._holds.setdefault(event.ordering_key, Hold())  # none: it was taken before ordering was asked for
        self.hold_back(event)
        hold.by.discard(event.id)
        if not hold.by:
            self.free[event.ordering_key] = None

    def to_read(self, count: int) -> list[tuple[str, int]]:
        """Return free keys, each with the id from which to read."""
        return [(key, self._holds[key].next_id) for key, _ in zip(self.free, range(count), strict=False)]

    def pass_over(self, key: str, next_id: int) -> None:
        """Of a free key nothing below `next_id` (NEVER: nothing at all) is to be sent any more."""
        del self.free[key]
        if next_id == NEVER:
            del self._holds[key]
        else:
            self._holds[key].next_id = next_id
            self.free[key] = None  # to the end of the line

    def know(self, retrying: Iterable[tuple[str, int]], in_hand: Iterable[int]) -> None:
        """Believe the retry table, but for what is in hand: its results are younger."""
        in_hand = set(in_hand)
        for hold in self._holds.values():
            hold.by &= in_hand
        for key, event_id in retrying:
            self._holds.setdefault(key, Hold()).by.add(event_id)
        for key, hold in list(self._holds.items()):
            if hold.by:
                self.free.pop(key, None)
            elif hold.next_id == NEVER:
                del self._holds[key]
                self.free.pop(key, None)
            else:
                self.free[key] = None
        self.are_known = True

    def trim(self) -> None:
        """Forget ids that say no more: below everything that is held back. Called once a checkpoint."""
        if self.held_back:
            lowest = min((hold.next_id for hold in self._holds.values()), default=NEVER)
            if self.held_back.lows[0] < lowest:
                self.held_back.remove(self.held_back.lows[0], lowest - 1)
