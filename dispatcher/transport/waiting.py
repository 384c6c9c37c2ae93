"""Who waits for a connection, and whose turn is next."""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from dispatcher.domain.outcome import Outcome
from dispatcher.ports import Connection, Trace

Ready = Callable[[Connection | Outcome], None]
Line = TypeVar("Line", bound=Hashable)


@dataclass(slots=True)
class Waiter:
    """`apart`: it was asked for in such a doubt, and is being opened."""

    on_ready: Ready
    fresh: bool
    turn_of: Hashable
    trace: Trace | None
    apart: "Apart[Any] | None" = None


class _Lined(Protocol):
    def popleft(self) -> Waiter: ...


Lined = TypeVar("Lined", bound=_Lined)


def _take_turn(lines: dict[Any, Lined]) -> Waiter:
    """Take the first of the line whose turn it is; the rest of that line goes to the end."""
    turn_of, line = next(iter(lines.items()))
    waiter = line.popleft()
    del lines[turn_of]
    if line:
        lines[turn_of] = line
    return waiter


class Waiting:
    """Who waits at an origin. Its endpoints take turns: one that wants a hundred connections doesn't keep another from its first."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Waiter]] = {}  # whose turn is next comes first

    def __bool__(self) -> bool:
        return bool(self._lines)

    def append(self, waiter: Waiter) -> None:
        self._lines.setdefault(waiter.turn_of, deque()).append(waiter)

    def extend(self, others: "Waiting") -> None:
        for turn_of, line in others._lines.items():
            self._lines.setdefault(turn_of, deque()).extend(line)

    def first(self) -> Waiter:
        return next(iter(self._lines.values()))[0]

    def popleft(self) -> Waiter:
        return _take_turn(self._lines)


class Apart(Generic[Line]):
    """One kind of doubt: at most `limit` are `held`, which are being opened; the others wait, and their origins take turns. `parked`: whose
    origin has no room. `is_paced`: the next one comes in a moment."""

    __slots__ = ("held", "is_paced", "limit", "parked", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.is_paced = False
        self.waiting: dict[Line, Waiting] = {}  # whose turn is next comes first
        self.parked: dict[Line, Waiting] = {}

    def __contains__(self, line: Line) -> bool:
        return line in self.waiting or line in self.parked

    @property
    def has_next(self) -> bool:
        """Tell whether somebody waits, and one more may be held."""
        return bool(self.waiting) and self.held < self.limit

    def append(self, line: Line, waiter: Waiter) -> None:
        self.waiting.setdefault(line, Waiting()).append(waiter)

    def first(self) -> Line:
        return next(iter(self.waiting))

    def popleft(self) -> Waiter:
        return _take_turn(self.waiting)

    def park(self, line: Line) -> None:
        """Its origin has no room: others' turn."""
        self._move(line, self.waiting, self.parked)

    def unpark(self, line: Line) -> None:
        """Its origin may have room again."""
        if line in self.parked:
            self._move(line, self.parked, self.waiting)

    def leave(self, line: Line) -> list[Waiting]:
        """Take all who wait for the origin out."""
        return [ways.pop(line) for ways in (self.parked, self.waiting) if line in ways]

    @staticmethod
    def _move(line: Line, source: dict[Line, Waiting], target: dict[Line, Waiting]) -> None:
        waiting = source.pop(line)
        if line in target:
            target[line].extend(waiting)
        else:
            target[line] = waiting
