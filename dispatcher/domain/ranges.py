"""Sets of event ids as ascending, disjoint, inclusive ranges.

Gaps and holes are sets of ids that are mostly neighbours; a range costs the same whether it covers one id or five
million. The set can be bounded: `shrink` joins the closest neighbours, which makes the set larger, never smaller. That
is always safe here, because a range only says "look again", and looking again skips what is settled (DESIGN §1).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IdRanges:
    """A mutable set of ids. Parallel lists of lows and highs; every method without a loop over ids is O(log n) or O(n) in ranges."""

    __slots__ = ("highs", "lows")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.lows: list[int] = []
        self.highs: list[int] = []
        for low, high in ranges:
            self.add(low, high)

    def __len__(self) -> int:
        """How many ranges, not how many ids."""
        return len(self.lows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.lows, self.highs, strict=True)

    def __contains__(self, event_id: int) -> bool:
        at = bisect_right(self.lows, event_id) - 1
        return at >= 0 and event_id <= self.highs[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdRanges) and self.lows == other.lows and self.highs == other.highs

    def __repr__(self) -> str:
        return "IdRanges(" + ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in self) + ")"

    def count(self) -> int:
        """How many ids."""
        return sum(self.highs) - sum(self.lows) + len(self.lows)

    def add(self, low: int, high: int) -> None:
        """Include low … high; neighbours join."""
        assert low <= high, (low, high)
        first = bisect_left(self.highs, low - 1)
        last = bisect_right(self.lows, high + 1)
        if first < last:
            low, high = min(low, self.lows[first]), max(high, self.highs[last - 1])
        self.lows[first:last] = [low]
        self.highs[first:last] = [high]

    def remove(self, low: int, high: int) -> None:
        """Exclude low … high; a range that reaches over both ends is split."""
        assert low <= high, (low, high)
        first = bisect_left(self.highs, low)
        last = bisect_right(self.lows, high)
        if first >= last:
            return
        kept = []
        if self.lows[first] < low:
            kept.append((self.lows[first], low - 1))
        if self.highs[last - 1] > high:
            kept.append((high + 1, self.highs[last - 1]))
        self.lows[first:last] = [a for a, _ in kept]
        self.highs[first:last] = [b for _, b in kept]

    def update(self, other: Iterable[tuple[int, int]]) -> None:
        """Include ranges, in any order: one pass over all of them, which costs a thousand a third of adding each."""
        lows: list[int] = []
        highs: list[int] = []
        last = None
        for low, high in sorted([*zip(self.lows, self.highs, strict=True), *other]):
            if last is None or low > last + 1:
                lows.append(low)
                highs.append(high)
                last = high
            elif high > last:
                highs[-1] = last = high
        self.lows, self.highs = lows, highs

    def covers(self, low: int, high: int) -> bool:
        """Tell whether every id of low … high is in the set."""
        at = bisect_right(self.lows, low) - 1
        return at >= 0 and high <= self.highs[at]

    def covers_all(self, other: "IdRanges") -> bool:
        return all(self.covers(low, high) for low, high in other)

    def page(self, count: int) -> list[tuple[int, int]]:
        """Return the lowest `count` ranges."""
        return list(zip(self.lows[:count], self.highs[:count], strict=True))

    def shrink(self, ranges_max: int) -> None:
        """Join the closest neighbours until at most `ranges_max` ranges are left, in one pass over the distances."""
        excess = len(self.lows) - ranges_max
        if excess <= 0:
            return
        distances = sorted((self.lows[i + 1] - self.highs[i], i) for i in range(len(self.lows) - 1))
        joined = {i for _, i in distances[:excess]}
        self.highs = [high for i, high in enumerate(self.highs) if i not in joined]
        self.lows = [low for i, low in enumerate(self.lows) if i - 1 not in joined]

    def copy(self) -> "IdRanges":
        twin = IdRanges()
        twin.lows, twin.highs = self.lows[:], self.highs[:]
        return twin

    def clip(self, high: int) -> None:
        """Drop everything above `high`."""
        if self.highs and self.highs[-1] > high:
            self.remove(high + 1, self.highs[-1])


def runs(ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Turn ascending ids into inclusive ranges."""
    low = high = None
    for i in ids:
        if high is not None and i == high + 1:
            high = i
            continue
        if low is not None and high is not None:
            yield low, high
        low = high = i
    if low is not None and high is not None:
        yield low, high
