"""A run under way in its lane: a resend or a replay (domain/run.py).

The same operation as a lane that catches up, over another range and of a lower class: the reader reads pages above
`cursor`, what was taken and isn't recorded is in `hands`, and the settled mark is the oldest in hand − 1. What it takes
stands in the lane's queue of retries, and later retries of the run live in the retry table like any other's. It has
ended when its range is read and its hands are empty; it is *finished*, and forgotten here, once the recorder has found
no retry of it left.

State and arithmetic only; every method is atomic. Owned by its lane.
"""

from collections.abc import Set as AbstractSet

from dispatcher.domain.run import Run, RunState
from dispatcher.ports import RunRow

PAGES_PER_S = 10  # of a run with a rate: a page for each event would cost a read each
NOTHING: AbstractSet[int] = frozenset()


class LaneRun:
    __slots__ = ("attempted", "cursor", "dead", "delivered", "hands", "moved", "next_at", "spec", "written")

    def __init__(self, spec: Run) -> None:
        self.spec = spec
        self.cursor = spec.settled
        self.hands: dict[int, None] = {}
        self.moved = 0  # changes of cursor that make a page which is under way worthless
        self.next_at = float("-inf")  # no page earlier, because of the rate
        self.attempted = spec.attempted
        self.delivered = spec.delivered
        self.dead = spec.dead
        self.written: RunRow | None = None

    def __repr__(self) -> str:
        return (
            f"LaneRun({self.spec.id} {self.spec.state.value} at {self.cursor} of {self.spec.upto_id}, {len(self.hands)} in hand, "
            f"{self.attempted} attempted, {self.delivered} delivered, {self.dead} dead)"
        )

    @property
    def is_running(self) -> bool:
        return self.spec.state is RunState.RUNNING

    @property
    def wants_page(self) -> bool:
        return self.is_running and self.cursor < self.spec.upto_id

    def page_rows(self, room: int) -> int:
        """Return how many events the next page may bring."""
        rate = self.spec.rate_per_s
        return room if rate is None else min(room, max(1, round(rate / PAGES_PER_S)))

    def took(self, events: int, now: float) -> None:
        """Pace the next page. Time in which nothing was taken isn't made up for."""
        if self.spec.rate_per_s is not None:
            self.next_at = max(self.next_at, now) + events / self.spec.rate_per_s

    def give_back(self, event_id: int) -> None:
        """It was taken and not sent: it will be read again."""
        self.hands.pop(event_id, None)
        self.cursor = min(self.cursor, event_id - 1)
        self.moved += 1

    def mark(self, done: AbstractSet[int] = NOTHING) -> int:
        """Return the settled mark, counting `done` as settled."""
        open_hands = self.hands.keys() - done
        return min(min(open_hands) - 1, self.cursor) if open_hands else self.cursor

    def row(self, endpoint_id: int, done: AbstractSet[int], *, is_busy: bool = False) -> RunRow:
        """Say how far it is, once the results of `done` are recorded. `is_busy`: it was canceled, and a retry of it is under way, of which no
        row is left to tell."""
        mark, canceled = self.mark(done), self.spec.state is RunState.CANCELED
        ended = not is_busy and (mark >= self.spec.upto_id or (canceled and not self.hands.keys() - done))
        return RunRow(
            self.spec.id, endpoint_id, mark, self.attempted, self.delivered, self.dead, ended=ended, canceled=canceled
        )
