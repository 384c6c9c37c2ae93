"""One POST on its way: from being taken out of its lane, over its outcome and the decision, until it is recorded."""

from collections.abc import Callable, Sequence

from dispatcher.domain.event import Event
from dispatcher.domain.outcome import Decision, Outcome
from dispatcher.domain.run import ORIGINAL
from dispatcher.engine.lane import Lane
from dispatcher.engine.shares import Share


class Delivery:
    """Plain and mutable, and the same object all the way: thousands are made a second.

    `outcome`, `decision` and `duration_us` are there once it was answered; from then on it is the recorder's.
    """

    __slots__ = (
        "_answered",
        "again",
        "decision",
        "duration_us",
        "event",
        "first_attempt_us",
        "lane",
        "number",
        "outcome",
        "probe",
        "run",
        "shares",
        "started",
        "started_us",
    )

    outcome: Outcome
    decision: Decision
    duration_us: int
    first_attempt_us: int
    started: float  # monotonic
    started_us: int  # the database's clock
    probe: bool
    shares: Sequence[Share]

    def __init__(
        self,
        answered: "Callable[[Delivery, Outcome], None]",
        lane: Lane,
        event: Event,
        run: int,
        number: int,
        first_attempt_us: int,
    ) -> None:
        self._answered = answered
        self.lane = lane
        self.event = event
        self.run = run
        self.number = number
        self.first_attempt_us = first_attempt_us  # 0: this is the first
        self.again = False  # sent once more after `stale`

    def __repr__(self) -> str:
        return f"Delivery({self.event.id} to {self.lane.id}, run {self.run}, attempt {self.number})"

    @property
    def holds_key(self) -> bool:
        """It is an original of an endpoint that orders by key, and no other of its key is sent before it is settled for good."""
        return self.event.ordering_key is not None and self.lane.keys is not None and self.run == ORIGINAL

    @property
    def is_first(self) -> bool:
        """The original run's first attempt: what settles the event for its lane."""
        return self.number == 1 and self.run == ORIGINAL

    def done(self, outcome: Outcome) -> None:
        self._answered(self, outcome)
