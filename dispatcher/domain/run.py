"""Runs: a delivery's original (run 0), and each resend or replay of it.

A run is a range of the log that its endpoint's lane reads once more, skipping the ids that have an attempt in this run.
A resend is a range of one id. Dead letters that are resent are read from their own copies, because the log may have
forgotten the events.
"""

from dataclasses import dataclass
from enum import Enum

from dispatcher.domain.event import Event
from dispatcher.domain.filters import Payloads, Rule

ORIGINAL = 0


class RunSource(Enum):
    LOG = "log"
    DEAD_LETTER = "dead_letter"


class RunState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class Run:
    """One resend or replay that hasn't finished: ids in (after_id, upto_id] whose type matches a pattern, and which pass the field filters
    that the endpoint had when it was made (`rule`; a resend has none).

    `only_failed`: of those, deliveries with a failed attempt, none that succeeded in any run, and no retry to come.
    `settled`, `attempted`, `delivered`, `dead`: how far it was when it was read; who runs it knows better.
    """

    id: int
    source: RunSource
    after_id: int
    upto_id: int
    patterns: tuple[str, ...]
    only_failed: bool
    rate_per_s: float | None
    state: RunState
    settled: int
    attempted: int = 0
    delivered: int = 0
    dead: int = 0
    rule: Rule | None = None

    def is_for(self, event: Event, payloads: Payloads) -> bool:
        """Tell whether an event of its range, of a type that matches, passes."""
        condition = None if self.rule is None else self.rule.condition(event.type)
        return condition is None or condition.holds(payloads.of(event))
