"""Endpoints, events and limits for tests of the engine's parts, with only what a test cares about spelled out."""

from itertools import pairwise
from typing import Any

from dispatcher.domain.breaker import BreakerLimits
from dispatcher.domain.endpoint import Endpoint, EndpointId, EndpointState, Subscription
from dispatcher.domain.event import Event
from dispatcher.domain.outcome import RetryPolicy
from dispatcher.domain.url import Origin, Target
from dispatcher.engine.lane import Lane, LaneLimits
from dispatcher.ports import DueRetry, LogShape

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TARGET = Target("https://a.example/hook?x=1", Origin("https", "a.example", 443), "/hook?x=1", "a.example", None)
LIMITS = LaneLimits(
    queue_max=8,
    in_flight_max=16,
    retry=RetryPolicy((10, 100), 1_000),
    breaker=BreakerLimits(failures=3, wait_s=5.0, wait_max_s=60.0),
    user_agent="tests",
)


def make_endpoint(endpoint_id: int = 1, *patterns: str | Subscription, **changes: Any) -> Endpoint:
    """Patterns become subscriptions valid for every id, numbered from 100·endpoint_id on."""
    subscriptions = tuple(
        pattern if isinstance(pattern, Subscription) else Subscription(100 * endpoint_id + n, pattern, 0)
        for n, pattern in enumerate(patterns or ("*",))
    )
    values: dict[str, Any] = {
        "account_id": "acc",
        "target": TARGET,
        "state": EndpointState.LIVE,
        "secrets": (SECRET,),
        "subscriptions": subscriptions,
    }
    return Endpoint(EndpointId(endpoint_id), **(values | changes))


def make_event(
    event_id: int, account_id: str = "acc", event_type: str = "a.b", payload: bytes = b"{}", **options: Any
) -> Event:
    """Options: ordering_key, expires_us, priority, traceparent."""
    return Event(event_id, account_id, event_type, payload, 0, None, b"evt_%032x" % event_id, **options)


def make_retry(event_id: int, run: int = 0) -> DueRetry:
    return DueRetry(make_event(event_id), run, 2, 0)


def make_lane(*, live: bool = True, cursor: int = 0, now: float = 0.0, **changes: Any) -> Lane:
    return Lane(make_endpoint(**changes), LIMITS, now, live=live, cursor=cursor)


def check_bounds(shape: LogShape) -> None:
    """Every event has a leaf, and its attempts are in leaves wholly within it. Where nothing was ever handed out may be a hole."""
    outbox, attempt = shape.outbox, shape.attempt
    assert (outbox.outside, outbox.fence, attempt.fence) == ([], None, None)
    for leaf in outbox.leaves:
        parts = [part for part in attempt.leaves if leaf.overlaps(part)]
        assert (parts[0].low, parts[-1].high) == (leaf.low, leaf.high)
        assert all(a.high == b.low for a, b in pairwise(parts))
    assert attempt.leaves[-1].high >= outbox.leaves[-1].high
