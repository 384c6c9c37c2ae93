"""Endpoints and subscriptions as the engine sees them: immutable values, replaced as a whole when the configuration
changes.

A subscription is endpoint × pattern × the ids it is valid for, and the endpoint's field filters as they were; an event
matches iff since_id < id ≤ until_id and it passes, on every path and also years later. A pattern is an exact type, a
prefix (`message.*`), or `*`.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NewType

import orjson

from dispatcher.domain.event import Event
from dispatcher.domain.filters import Payloads, Rule
from dispatcher.domain.ordering import Ordering
from dispatcher.domain.run import Run
from dispatcher.domain.shape import PLAIN, Shape
from dispatcher.domain.url import Target
from dispatcher.errors import InputError

EndpointId = NewType("EndpointId", int)

FOREVER = 1 << 62  # an until_id that is not set
FORCED = "forced without a test"  # what `state_reason` says of a configuration that was put live so
PATTERN = re.compile(r"\*|[a-z0-9_]+(\.[a-z0-9_]+)*\.\*|[a-z0-9_]+(\.[a-z0-9_]+)+")


class EndpointState(Enum):
    DRAFT = "draft"
    LIVE = "live"
    PAUSED = "paused"
    DISABLED = "disabled"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Subscription:
    id: int
    pattern: str
    since_id: int
    until_id: int = FOREVER
    taken_up: bool = True
    rule: Rule | None = None  # None: no filters

    def matches(self, event_type: str, event_id: int) -> bool:
        """Tell whether it is valid for an event as far as type and id go."""
        return self.since_id < event_id <= self.until_id and pattern_matches(self.pattern, event_type)

    def is_for(self, event: Event, payloads: Payloads) -> bool:
        if not self.matches(event.type, event.id):
            return False
        condition = None if self.rule is None else self.rule.condition(event.type)
        return condition is None or condition.holds(payloads.of(event))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What it takes to deliver to one endpoint. None in a limit means: the setting's default."""

    id: EndpointId
    account_id: str
    target: Target | None  # None: its saved URL can't be used under the present settings; its events are held
    state: EndpointState
    secrets: tuple[str, ...]  # that sign
    subscriptions: tuple[Subscription, ...]
    timeout_s: float = 10.0
    rate_per_s: float | None = None
    rate_burst: int | None = None
    in_flight_max: int | None = None
    retry_schedule_s: tuple[int, ...] | None = None
    failing_since_us: int | None = None
    failing_told: bool = False  # its account knows that it is failing
    state_reason: str | None = None
    runs: tuple[Run, ...] = ()  # that haven't finished
    shape: Shape = PLAIN
    response_control: bool = False  # an answer's webhook-delivery header is obeyed
    reload_at_us: int | None = None  # a secret expires then, with no change to tell of it
    ordering: Ordering | None = None  # None: off

    def __repr__(self) -> str:
        return f"Endpoint({self.id} {self.state.value} {self.target.url if self.target else 'unusable'})"

    def exact_types(self) -> tuple[str, ...] | None:
        """Return the types it subscribes to, or None if a wildcard is among them."""
        patterns = {subscription.pattern for subscription in self.subscriptions}
        return None if any(pattern.endswith("*") for pattern in patterns) else tuple(sorted(patterns))


def pattern_matches(pattern: str, event_type: str) -> bool:
    """`message.*` matches message.sent and message.sent.late, not message itself; `*` matches all."""
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return event_type.startswith(pattern[:-1])
    return pattern == event_type


def like_pattern(pattern: str) -> str:
    """Return the pattern as SQL's LIKE has it."""
    return pattern.replace("_", r"\_").replace("*", "%")


def check_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns without repeats, in order. Raises InputError that names the bad one."""
    unique = tuple(dict.fromkeys(patterns))
    if not unique:
        raise InputError(
            "subscribe to at least one event type: an exact one (message.delivered), a prefix (message.*), or * for all"
        )
    if len(unique) > 100:
        raise InputError(f"{len(unique)} patterns are more than 100: use a prefix such as message.*")
    for pattern in unique:
        if not PATTERN.fullmatch(pattern) or len(pattern) > 128:
            raise InputError(
                f"{pattern!r} is not an event-type pattern: use an exact type (message.delivered), a prefix (message.*), or * for all"
            )
    return unique


def config_hash(config: dict[str, object]) -> str:
    """Return what a passed test belongs to: the hash of everything that decides what is sent where."""
    return hashlib.sha256(orjson.dumps(config, option=orjson.OPT_SORT_KEYS)).hexdigest()
