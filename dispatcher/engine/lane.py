"""A lane: everything in memory about delivering to one endpoint. State and arithmetic only; reader, sender and recorder
move it.

**Towards the log.** A live lane takes events from the head as the reader passes them; its cursor *is* the head. A
lagging lane doesn't: the reader reads pages for it from `cursor` until it meets the head again. What it took and hasn't
settled is in `hands` (id → when taken), in queue, in flight, unrecorded alike. `settled mark` = the oldest in hand − 1,
else the cursor. Ids that were taken from a gap at or below a position already written are `late`: they don't hold the
mark, they stand in the lane's holes (or the checkpoint's gaps) until they are settled. `moved` counts changes of cursor
or queue that make a page which is under way worthless.

**Towards the endpoint.** Token bucket, breaker, adaptive limit of POSTs in flight (starts at 2, +1 a success, halved by
a failure, 1 after the breaker closes), and the turn between fresh events and retries.

Every method is atomic (no await). One instance per endpoint lives at a time, owned by `Lanes`.
"""

from collections import deque
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from dispatcher.domain.breaker import CLOSED, BreakerLimits, BreakerState, CircuitBreaker
from dispatcher.domain.bucket import TokenBucket
from dispatcher.domain.endpoint import Endpoint, EndpointState
from dispatcher.domain.event import Event
from dispatcher.domain.outcome import RetryPolicy
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.signing import Signer
from dispatcher.engine.request import render_head
from dispatcher.ports import DueRetry
from dispatcher.settings import Settings

HOLES_MAX = 1_000
RETRIES_MAX = 50  # retries in memory a lane; the rest wait in their table
RETRY_TURN = 5  # retries get one turn in five while fresh events wait
IN_FLIGHT_START = 2
SLOW_S = 1.0
RECENT_S = 30.0  # a success within so long makes up for a failure or two
OLDEST_QUEUED_MAX_S = 5.0
CANT_SEND_MAX_S = 1.0
NOTHING: AbstractSet[int] = frozenset()


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """The settings a lane needs, and what endpoints may override."""

    queue_max: int
    in_flight_max: int
    retry: RetryPolicy
    breaker: BreakerLimits
    user_agent: str

    @classmethod
    def of(cls, settings: Settings) -> "LaneLimits":
        return cls(
            queue_max=settings.queue_events_max,
            in_flight_max=settings.in_flight_max,
            retry=RetryPolicy(settings.retry_schedule_s, settings.retry_age_max_s),
            breaker=BreakerLimits(settings.breaker_failures, settings.breaker_wait_s, settings.breaker_wait_max_s),
            user_agent=settings.user_agent,
        )


class Lane:
    __slots__ = (
        "backlog", "blocked_until", "breaker", "bucket", "connecting", "cursor", "endpoint", "failing_since_us", "gone", "hands",
        "has_row", "head_bytes", "held", "holes", "id", "in_flight", "in_flight_limit", "in_flight_max", "in_ready", "last_success", "late",
        "latency_s", "limits", "live", "moved", "next_retry_us", "queue", "retries", "retry_hands", "retry_policy", "signer", "timer_at",
        "turn",
        "untried",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, limits: LaneLimits, now: float, *, live: bool, cursor: int) -> None:
        self.id: int = endpoint.id
        self.limits = limits
        # towards the log
        self.live = live
        self.cursor = cursor  # means nothing while live
        self.queue: deque[Event] = deque()
        self.hands: dict[int, float] = {}
        self.late: set[int] = set()
        self.holes = IdRanges()
        self.moved = 0
        self.has_row = False
        self.gone = False
        self.backlog = 0
        # retries in memory
        self.retries: deque[DueRetry] = deque()
        self.retry_hands: set[tuple[int, int]] = set()  # (event id, run)
        self.next_retry_us: int | None = None  # earliest retry that is not in hand, as far as known
        # towards the endpoint
        self.breaker = CircuitBreaker(limits.breaker)
        self.bucket: TokenBucket | None = None
        self.in_flight = 0
        self.connecting = 0
        self.in_flight_limit = IN_FLIGHT_START
        self.blocked_until = 0.0
        self.last_success = float("-inf")
        self.latency_s = 0.0
        self.turn = 0
        self.untried = True  # no outcome since it was made
        self.in_ready = False
        self.timer_at = float("inf")
        self.failing_since_us = endpoint.failing_since_us
        self.configure(endpoint, now)

    def __repr__(self) -> str:
        where = "live" if self.live else f"lagging at {self.cursor}"
        return (
            f"Lane({self.id} {self.endpoint.state.value} {where}, {len(self.queue)} queued, "
            f"{self.in_flight} in flight of {self.in_flight_limit}, "
            f"{len(self.hands)} in hand, {len(self.holes)} holes, {self.breaker.state.value})"
        )

    def configure(self, endpoint: Endpoint, now: float) -> None:
        """Adopt a new version of the endpoint."""
        self.endpoint = endpoint
        # Paused, disabled, or unusable: its events wait in the log.
        self.held = endpoint.state is not EndpointState.LIVE or endpoint.target is None
        self.in_flight_max = endpoint.in_flight_max or self.limits.in_flight_max
        self.in_flight_limit = min(self.in_flight_limit, self.in_flight_max)
        schedule = endpoint.retry_schedule_s
        self.retry_policy = (
            self.limits.retry if schedule is None else RetryPolicy(schedule, self.limits.retry.age_max_s)
        )
        if endpoint.rate_per_s is None:
            self.bucket = None
        else:
            burst = endpoint.rate_burst or max(1, round(endpoint.rate_per_s))
            if self.bucket is None:
                self.bucket = TokenBucket(endpoint.rate_per_s, burst, now)
            elif (self.bucket.rate_per_s, self.bucket.burst) != (endpoint.rate_per_s, burst):
                self.bucket.change(endpoint.rate_per_s, burst, now)
        self.signer = Signer(endpoint.secrets)
        target = endpoint.target
        self.head_bytes = b"" if target is None else render_head(target, self.limits.user_agent)

    # ── towards the log ──

    def takes(self, now: float) -> bool:
        """Tell whether a live lane has room for one more event, or must fall behind."""
        queue = self.queue
        if len(queue) >= self.limits.queue_max or self.cant_send(now):
            return False
        return not queue or now - self.hands[queue[0].id] < OLDEST_QUEUED_MAX_S

    def cant_send(self, now: float) -> bool:
        """Tell whether nothing can be sent for over a second."""
        if not self.held and self.breaker.state is CLOSED and self.blocked_until <= now:
            return False  # asked for every event that passes
        soon = now + CANT_SEND_MAX_S
        return (
            self.held
            or self.blocked_until > soon
            or (self.breaker.state is BreakerState.OPEN and self.breaker.until > soon)
        )

    def take(self, event: Event, now: float) -> None:
        self.queue.append(event)
        self.hands[event.id] = now

    def fall_behind(self, cursor: int) -> None:
        """Stop taking from the head; the reader will read on after `cursor`."""
        if self.live:
            self.live, self.cursor = False, cursor
            self.moved += 1

    def drop_queue(self) -> list[Event]:
        """Let go of what is queued but not in flight; it will be read again. Only a lagging lane may."""
        assert not self.live
        dropped = list(self.queue)
        for event in dropped:
            del self.hands[event.id]
            if event.id in self.late:
                self.late.discard(event.id)
                self.add_hole(event.id)
            else:
                self.cursor = min(self.cursor, event.id - 1)
        self.queue.clear()
        self.moved += 1
        return dropped

    def add_hole(self, event_id: int) -> None:
        self.holes.add(event_id, event_id)
        self.holes.shrink(HOLES_MAX)

    def mark(self, head: int, done: AbstractSet[int] = NOTHING) -> int:
        """Return the settled mark, counting `done` as settled."""
        cursor = head if self.live else self.cursor
        hands: AbstractSet[int] = self.hands.keys()
        if done or self.late:
            hands = hands - done - self.late
        return min(min(hands) - 1, cursor) if hands else cursor

    def open_late(self, done: AbstractSet[int] = NOTHING) -> IdRanges:
        """Return the ids at or below the mark that aren't settled."""
        if not self.late:
            return self.holes
        ranges = self.holes.copy()
        for event_id in sorted(self.late & self.hands.keys()):
            if event_id not in done:
                ranges.add(event_id, event_id)
        return ranges

    def settle(self, event_id: int) -> None:
        """Its result is committed, and no read that began before that is still to be processed."""
        self.hands.pop(event_id, None)
        self.late.discard(event_id)

    @property
    def is_settled(self) -> bool:
        """Nothing to say about it in a checkpoint."""
        return self.live and not self.hands and not self.has_row and not self.holes

    # ── towards the endpoint ──

    def work(self) -> int:
        return len(self.queue) + len(self.retries)

    def retry_turn(self) -> bool:
        """Tell whether a retry, of which there are some, goes before a fresh event."""
        self.turn += 1
        return not self.queue or self.turn % RETRY_TURN == 0

    def ready_at(self, now: float) -> float:
        """Return when a POST may start as far as time decides: `now`, later, or never (inf) until something else changes."""
        if self.held:
            return float("inf")
        at = now
        if self.blocked_until > at:
            at = self.blocked_until
        if self.breaker.state is not CLOSED and self.breaker.state is BreakerState.OPEN and self.breaker.until > at:
            at = self.breaker.until
        if self.bucket is not None and at == now:
            at = self.bucket.ready_at(now)
        return at

    def limit(self) -> int:
        return self.in_flight_limit if self.breaker.state is CLOSED else 1

    def failing(self, now: float) -> bool:
        """Tell whether it has failed lately without a recent success; a quiet lane whose last POST went well is not failing."""
        failed = self.breaker.consecutive
        return failed >= 3 or (failed > 0 and now - self.last_success > RECENT_S)

    @property
    def is_ordinary(self) -> bool:
        """Neither new, failing nor slow: most lanes, most of the time."""
        return not self.untried and not self.breaker.consecutive and self.latency_s <= SLOW_S

    def accepts(self, now: float) -> bool:
        """Tell whether one more event that was read again may be queued: while a breaker isn't closed, only one to probe with."""
        if self.cant_send(now):
            return False
        if self.breaker.state is not CLOSED:
            return self.work() + self.in_flight + self.connecting == 0
        return len(self.queue) < self.limits.queue_max

    def room(self, now: float) -> int:
        """Return how many events the reader should fetch for a lane that lags: 0 unless it can send and is half empty."""
        if not self.accepts(now):
            return 0
        if self.breaker.state is not CLOSED:
            return 1
        return self.limits.queue_max - len(self.queue) if len(self.queue) <= self.limits.queue_max // 2 else 0

    def retry_room(self, now: float) -> int:
        """The same for its due retries."""
        if not self.accepts(now):
            return 0
        if self.breaker.state is not CLOSED:
            return 1
        return RETRIES_MAX - len(self.retries) if len(self.retries) <= RETRIES_MAX // 2 else 0

    def succeeded(self, now: float, latency_s: float, probe: bool) -> None:
        self.untried = False
        self.last_success = now
        self.latency_s += 0.2 * (latency_s - self.latency_s)
        if self.breaker.succeeded(now, probe):
            self.in_flight_limit = 1
        elif self.in_flight_limit < self.in_flight_max:
            self.in_flight_limit += 1

    def failed(self, now: float, latency_s: float, probe: bool) -> bool:
        """Note a failure that counts; return whether it opened the breaker."""
        self.untried = False
        self.latency_s += 0.2 * (latency_s - self.latency_s)
        self.in_flight_limit = max(1, self.in_flight_limit // 2)
        return self.breaker.failed(now, probe)
