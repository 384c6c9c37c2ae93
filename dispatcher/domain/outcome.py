"""What one POST saw, and what we do about it.

An `Outcome` is a value: a 500, a timeout and a refused connection are expected. `decide` is the policy, DESIGN §9's
table, as a pure function: `now` and `rng` come in. It follows Standard Webhooks 1.0.0 ("2xx is success", 410 disables,
429/502/504 slow down) completed where the standard is silent.
"""

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum


class Fault(Enum):
    """Why an attempt did not deliver. The value is what `attempt.fault` holds."""

    STATUS = "status"  # an answer, but not 2xx
    TIMEOUT = "timeout"
    CONNECT = "connect"  # refused, unreachable, or too slow to accept
    DNS = "dns"
    TLS = "tls"
    PROTOCOL = "protocol"  # not HTTP, or beyond our bounds on heads
    RESET = "reset"  # closed before the answer was whole
    BLOCKED = "blocked"  # the address guard refused it
    EXPIRED = "expired"  # no attempt at all: the event's expires_at had passed
    STALE = "stale"  # a kept-alive connection that turned out to be closed; sent again at once, never recorded


class Command(Enum):
    """What a receiver may ask in an answer's `webhook-delivery` header. Obeyed only where its endpoint says so."""

    DISABLE = "disable"  # send nothing more to this endpoint
    ABORT = "abort-message"  # don't try this event again


COMMAND_HEADER = b"webhook-delivery"


@dataclass(frozen=True, slots=True)
class Outcome:
    """status: of the final answer, if its head arrived. response_head: the raw beginning of a failed answer. detail: for people."""

    fault: Fault | None
    status: int | None = None
    retry_after: str | None = None
    response_head: bytes | None = None
    detail: str = ""
    command: Command | None = None  # of a whole answer, a success too

    @property
    def delivered(self) -> bool:
        return self.fault is None


def outcome_of_answer(
    status: int, retry_after: str | None = None, response_head: bytes | None = None, command: Command | None = None
) -> Outcome:
    """Return the outcome of a whole answer. Redirects are never followed: a 3xx is a failure."""
    if 200 <= status <= 299:
        if command is not None:
            return Outcome(None, status, command=command)
        return _DELIVERED.get(status) or Outcome(None, status)
    return Outcome(Fault.STATUS, status, retry_after, response_head, command=command)


def command_of(value: str) -> Command | None:
    """Read a `webhook-delivery` header; None if it says nothing that we know."""
    return _COMMANDS.get(value.strip().lower())


_COMMANDS = {command.value: command for command in Command}


_DELIVERED = {
    status: Outcome(None, status) for status in (200, 201, 202, 204)
}  # immutable, so shared: no allocation per delivery


class Verdict(Enum):
    DELIVERED = "delivered"
    RETRY = "retry"
    DEAD = "dead"  # dead letter
    EXPIRED = "expired"  # settled, unsent


@dataclass(frozen=True, slots=True)
class Decision:
    """due_in_s: of a retry, from now. lane_wait_s: the lane starts nothing for so long. counts: the breaker and the health see a failure."""

    verdict: Verdict
    due_in_s: float = 0.0
    lane_wait_s: float = 0.0
    counts: bool = True
    disable_reason: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """schedule_s[n-1] is the wait after attempt n. age_max_s counts from the first attempt. `last`: what the last attempt was the last of."""

    schedule_s: tuple[int, ...] = (5, 30, 120, 600, 1_800, 3_600, 10_800, 21_600, 43_200, 86_400)
    age_max_s: int = 259_200
    last: str = "of the schedule"


BY_RECEIVER = "by_receiver"  # why an endpoint was disabled
RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 3_600.0
JITTER_LOW, JITTER_HIGH = 0.8, 1.2  # so that deliveries that failed together don't come back together

DELIVER = Decision(Verdict.DELIVERED)


def decide(
    outcome: Outcome, number: int, age_s: float, policy: RetryPolicy, now: datetime, rng: random.Random
) -> Decision:
    """Turn the outcome of attempt `number` into a decision. age_s: since the delivery's first attempt began."""
    if outcome.fault is None:
        return DELIVER
    if outcome.status == 410:
        return Decision(Verdict.DEAD, disable_reason="gone", reason="410 Gone")
    asked = retry_after_s(outcome.retry_after, now) if outcome.status in (429, 503) else None
    wait_s = (
        policy.schedule_s[number - 1] * rng.uniform(JITTER_LOW, JITTER_HIGH)
        if number <= len(policy.schedule_s)
        else None
    )
    polite = asked is not None
    if wait_s is None:
        return Decision(
            Verdict.DEAD,
            lane_wait_s=asked or 0.0,
            counts=not polite,
            reason=f"attempt {number} was the last {policy.last}",
        )
    if asked is not None:
        wait_s = asked
    if age_s + wait_s > policy.age_max_s:
        return Decision(
            Verdict.DEAD,
            lane_wait_s=asked or 0.0,
            counts=not polite,
            reason=f"older than {policy.age_max_s} s at its next attempt",
        )
    return Decision(
        Verdict.RETRY, due_in_s=wait_s, lane_wait_s=asked or 0.0, counts=not polite, reason=describe(outcome)
    )


def heeding(decision: Decision, command: Command) -> Decision:
    """Return what becomes of a failure whose receiver may ask for more than HTTP's statuses say.

    An aborted delivery is a dead letter at once, not something less: it is shown, and may be resent when its receiver has
    learnt better. It says nothing about the endpoint's health. A delivery whose answer disables the endpoint keeps its retry,
    which is held like the endpoint's other events."""
    if command is Command.ABORT:
        return replace(decision, verdict=Verdict.DEAD, due_in_s=0.0, counts=False, reason="aborted by its receiver")
    return replace(decision, disable_reason=decision.disable_reason or BY_RECEIVER)


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Read a Retry-After header (RFC 9110 §10.2.3: seconds or an HTTP-date), clamped to 1 s … 1 h; None if absent or unreadable."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:10])
    else:
        try:
            at = parsedate_to_datetime(value)
        except (ValueError, OverflowError):  # a year or a zone of twenty digits overflows
            return None
        if at.tzinfo is None:  # "-0000" and asctime dates: HTTP dates are UTC
            at = at.replace(tzinfo=UTC)
        seconds = (at - now).total_seconds()
    return min(max(seconds, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)


def describe(outcome: Outcome) -> str:
    """Say in a few words what happened, for logs, retry rows and people."""
    if outcome.fault is None:
        return f"delivered ({outcome.status})"
    if outcome.fault is Fault.STATUS:
        return f"answered {outcome.status}"
    return f"{outcome.fault.value}: {outcome.detail}" if outcome.detail else outcome.fault.value
