"""Who waits for a connection, and whose turn is next."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from dispatcher.domain.outcome import Outcome
from dispatcher.ports import Connection, Trace

Ready = Callable[[Connection | Outcome], None]
Line = TypeVar("Line", bound=Hashable)


@dataclass(slots=True)
class Waiter:
    """`apart`: it was asked for in such a doubt, and let in; `holds`: it is being opened, or waits for nothing but room in all."""

    on_ready: Ready
    fresh: bool
    turn_of: Hashable
    trace: Trace | None
    apart: "Apart[Any] | None" = None
    holds: bool = False


class Waiting:
    """Who waits at an origin. Its endpoints take turns: one that wants a hundred connections doesn't keep another from its first."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Waiter]] = {}  # whose turn is next comes first

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[Waiter]:
        return chain.from_iterable(self._lines.values())

    def append(self, waiter: Waiter) -> None:
        self._lines.setdefault(waiter.turn_of, deque()).append(waiter)

    def extend(self, others: "Waiting") -> None:
        for turn_of, line in others._lines.items():
            self._lines.setdefault(turn_of, deque()).extend(line)

    def first(self) -> Waiter:
        return next(iter(self._lines.values()))[0]

    def popleft(self) -> Waiter:
        turn_of, line = next(iter(self._lines.items()))
        waiter = line.popleft()
        del self._lines[turn_of]
        if line:
            self._lines[turn_of] = line
        return waiter


class Apart(Generic[Line]):
    """One kind of doubt: at most `limit` are `held` (and some who get room at their origin, for which they had waited); the others wait, and
    their origins take turns. `is_paced`: the next one comes in a moment."""

    __slots__ = ("held", "is_paced", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.is_paced = False
        self.waiting: dict[Line, Waiting] = {}  # whose turn is next comes first

    @property
    def has_next(self) -> bool:
        """Tell whether somebody waits, and there is room."""
        return bool(self.waiting) and self.held < self.limit

    def append(self, line: Line, waiter: Waiter) -> None:
        self.waiting.setdefault(line, Waiting()).append(waiter)

    def popleft(self) -> tuple[Line, Waiter]:
        line, waiting = next(iter(self.waiting.items()))
        waiter = waiting.popleft()
        del self.waiting[line]
        if waiting:
            self.waiting[line] = waiting
        return line, waiter
