"""A lane: everything in memory about delivering to one endpoint. State and arithmetic only; reader, sender and recorder
move it.

**Towards the log.** A live lane takes events from the head as the reader passes them; its cursor *is* the head. A
lagging lane doesn't: the reader reads pages for it from `cursor` until it meets the head again. What it took and hasn't
settled is in `hands` (id → when taken), in queue, in flight, unrecorded alike. `settled mark` = the oldest in hand − 1,
else the cursor. Ids that were taken from a gap at or below a position already written are `late`: they don't hold the
mark, they stand in the lane's holes (or the checkpoint's gaps) until they are settled. `moved` counts changes of cursor
or queue that make a page which is under way worthless.

Where events are ordered by key, one whose key is held is passed over, and is one more kind of hole (`keys`, see keys.py).

**Again.** Retries that are due and what runs (resends, replays) have to send are of a lower class: they share one queue,
get one turn in five while fresh events wait, and never all of the lane's POSTs in flight. Fresh events with priority
are of a higher class, the highest first: they get four turns in five while others wait, and a lane that is behind reads
them ahead of its cursor. An id above the cursor that is in hand, or has an attempt, is skipped when the cursor comes.

**Towards the endpoint.** Token bucket, breaker, adaptive limit of POSTs in flight (starts at 2, +1 a success, halved by
a failure, 1 after the breaker closes), and the turn between fresh events and retries. A receiver that asks for less is
met with a pace as well (domain/pace.py), and while there is one, POSTs in flight grow by one a round, not one a success.

Every method is atomic (no await). One instance per endpoint lives at a time, owned by `Lanes`.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from dispatcher.domain.breaker import CLOSED, BreakerLimits, BreakerState, CircuitBreaker
from dispatcher.domain.bucket import TokenBucket
from dispatcher.domain.endpoint import Endpoint, EndpointState
from dispatcher.domain.event import Event
from dispatcher.domain.filters import Payloads
from dispatcher.domain.outcome import RetryPolicy
from dispatcher.domain.pace import Pace
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.run import RunState
from dispatcher.domain.url import Origin
from dispatcher.engine.keys import Keys
from dispatcher.engine.request import Requests, make_requests
from dispatcher.engine.runs import LaneRun
from dispatcher.engine.stats import Stat
from dispatcher.ports import Doubt, DueRetry, LaneRow
from dispatcher.settings import Settings

HOLES_MAX = 1_000
RETRIES_MAX = 50  # retries in memory a lane; the rest wait in their table
RETRY_TURN = 5  # retries get one turn in five while fresh events wait
RETRY_SHARE = 0.75  # of the POSTs in flight at most, so that a fresh event finds room at once
RUNS_DONE_MAX = 1_000
URGENT_MAX = 100  # events with priority that are read ahead
URGENT_TURN = 5  # one turn in five is not theirs while others wait
KEYS_PAGE = 100  # keys of which the next event is read at a time
IN_FLIGHT_START = 2
SLOW_S = 1.0
RECENT_S = 30.0  # a success within so long makes up for a failure or two
OLDEST_QUEUED_MAX_S = 5.0
AHEAD_MIN = 50  # events of a backlog in memory, however slowly a lane sends: a page each would cost the head its reads
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
        "backlog", "blocked_until", "breaker", "bucket", "connecting", "cursor", "endpoint", "failing_since_us", "failing_told",
        "gone", "hands", "held", "holes", "id", "in_flight", "in_flight_limit",
        "in_flight_max", "in_ready", "key_policy", "keys", "last_success", "late", "latency_s", "limits", "live",
        "look_at", "low_in_flight", "may_expire", "moved", "next_retry_at", "pace", "paced_successes", "payloads", "queue",
        "requests", "retries", "retry_hands", "retry_policy", "row", "runs", "runs_done", "said_in", "stalled", "stat", "timer_at",
        "turn", "unreached", "untried", "urgent", "urgent_after", "urgent_turns", "waits_for", "way",
    )  # fmt: skip

    queue: deque[Event]  # fresh events without priority
    late: set[int]
    retries: deque[DueRetry]  # in memory
    retry_hands: set[tuple[int, int]]  # (event id, run)
    runs_done: deque[int]  # a look at the configuration may still know them
    requests: Requests

    def __getattr__(self, name: str) -> Any:
        """Make, at its first use, what an endpoint that rests never needs: with it an idle lane took 5.7 kB, without it 1.2."""
        if name not in _MADE_WHEN_USED:
            raise AttributeError(f"a lane has no {name}")
        made = _MADE_WHEN_USED[name](self)
        setattr(self, name, made)
        return made

    def __init__(
        self,
        endpoint: Endpoint,
        limits: LaneLimits,
        now: float,
        *,
        live: bool,
        cursor: int,
        payloads: Payloads | None = None,
    ) -> None:
        self.id: int = endpoint.id
        self.limits = limits
        self.payloads = Payloads() if payloads is None else payloads  # shared by all lanes: a page may be for several
        # towards the log
        self.live = live
        self.cursor = cursor  # means nothing while live
        self.urgent: list[tuple[int, int, Event]] = []  # a heap of those with priority: (-priority, id, event)
        self.urgent_after: int | None = None if live else cursor  # more of them may lie above; None: none does
        self.urgent_turns = 0
        self.may_expire = False  # it has had an event that expires: from then on it is looked for
        self.hands: dict[int, float] = {}
        self.holes = IdRanges()
        self.keys = None if endpoint.ordering is None else Keys()
        self.moved = 0
        self.row: LaneRow | None = None  # as the database has it; the recorder's
        self.said_in: IdRanges | None = None  # the holes of a row that said all of hands and holes, until these change
        self.gone = False
        self.stalled = False  # the janitor's: takes nothing that is read again, while a leaf of the log is expired
        self.backlog = 0
        # retries in memory
        self.next_retry_at: float | None = None  # earliest retry that is not in hand, as far as known
        # resends and replays; what they take stands among the retries
        self.runs: dict[int, LaneRun] = {}
        self.look_at = float("-inf")  # when the reader was last asked to look for a run's page
        self.stat: Stat | None = None  # the recorder's
        # towards the endpoint
        self.breaker = CircuitBreaker(limits.breaker)
        self.bucket: TokenBucket | None = None
        self.pace: Pace | None = None  # None: it has not asked for less
        self.paced_successes = 0
        self.in_flight = 0
        self.low_in_flight = 0  # of those, retries and runs
        self.way = 0  # how many times it began anew: connections that were asked for before the last time are no longer counted
        self.connecting = 0
        self.in_flight_limit = IN_FLIGHT_START
        self.blocked_until = 0.0
        self.last_success = float("-inf")
        self.latency_s = 0.0
        self.turn = 0
        # No outcome since it was made, and it isn't known to have failed before.
        self.untried = endpoint.failing_since_us is None
        self.unreached = not self.untried  # the last connection that was asked for did not come, as far as is known
        self.in_ready = False
        self.waits_for: object = None  # the share in whose line it is
        self.timer_at = float("inf")
        self.failing_since_us = endpoint.failing_since_us
        self.failing_told = endpoint.failing_told
        self.endpoint = endpoint
        self.configure(endpoint, now)

    def __repr__(self) -> str:
        where = "live" if self.live else f"lagging at {self.cursor}"
        return (
            f"Lane({self.id} {self.endpoint.state.value} {where}, {self.queued()} queued, "
            f"{self.in_flight} in flight of {self.in_flight_limit}, "
            f"{len(self.hands)} in hand, {len(self.holes)} holes, {self.breaker.state.value})"
        )

    def configure(self, endpoint: Endpoint, now: float) -> None:
        """Adopt a new version of the endpoint."""
        if _origin(endpoint) != _origin(self.endpoint):
            self._begin_anew()
        self.endpoint = endpoint
        # Paused, disabled, or unusable: its events wait in the log.
        self.held = endpoint.state is not EndpointState.LIVE or endpoint.target is None
        self.in_flight_max = endpoint.in_flight_max or self.limits.in_flight_max
        self.in_flight_limit = min(self.in_flight_limit, self.in_flight_max)
        schedule = endpoint.retry_schedule_s
        self.retry_policy = (
            self.limits.retry if schedule is None else RetryPolicy(schedule, self.limits.retry.age_max_s)
        )
        # Of deliveries that hold back their key.
        self.key_policy = self.retry_policy
        if endpoint.ordering is not None and endpoint.ordering.give_up_after is not None:
            waits = self.retry_policy.schedule_s[: endpoint.ordering.give_up_after - 1]
            if len(waits) < len(self.retry_policy.schedule_s):
                self.key_policy = RetryPolicy(waits, self.retry_policy.age_max_s, "that its key waits for")
        if endpoint.rate_per_s is None:
            self.bucket = None
        else:
            burst = endpoint.rate_burst or max(1, round(endpoint.rate_per_s))
            if self.bucket is None:
                self.bucket = TokenBucket(endpoint.rate_per_s, burst, now)
            elif (self.bucket.rate_per_s, self.bucket.burst) != (endpoint.rate_per_s, burst):
                self.bucket.change(endpoint.rate_per_s, burst, now)
        for spec in endpoint.runs:
            run = self.runs.get(spec.id)
            if run is not None:
                if spec.state is RunState.RUNNING and not run.is_running:
                    self.next_retry_at = 0.0  # its retries were passed over meanwhile
                if spec.rate_per_s != run.spec.rate_per_s:
                    run.next_at = float("-inf")  # it was for the rate before
                run.spec = spec
            elif spec.id not in self.runs_done:
                self.runs[spec.id] = LaneRun(spec)
        with suppress(AttributeError):  # not made yet
            del self.requests

    def put_live_again(self) -> None:
        """Somebody resumed or enabled it: how it did before that says nothing, least of all for how long it has been failing."""
        self.failing_since_us = self.endpoint.failing_since_us
        self.failing_told = self.endpoint.failing_told
        self._begin_anew()
        if not self.in_flight:  # their results belong to the breaker that let them start
            self.breaker = CircuitBreaker(self.limits.breaker)
            self.in_flight_limit = min(IN_FLIGHT_START, self.in_flight_max)

    def _begin_anew(self) -> None:
        """Wait for no connection that was asked for before: its turn may be among those of all that can't be reached."""
        self.way += 1
        self.connecting, self.unreached = 0, False

    # ── towards the log ──

    def is_for(self, event: Event) -> bool:
        """Tell whether a subscription is valid for the event."""
        return any(s.is_for(event, self.payloads) for s in self.endpoint.subscriptions)

    def pass_over(self, head: int) -> None:
        """Move a lagging lane's cursor over ids for which no subscription is valid, unread: ten million that were skipped cost nothing."""
        cursor = min(
            (max(s.since_id, self.cursor) for s in self.endpoint.subscriptions if s.until_id > self.cursor),
            default=head,
        )
        if not self.live and self.cursor < min(cursor, head):
            self.cursor = min(cursor, head)
            self.moved += 1

    def takes(self, now: float) -> bool:
        """Tell whether a live lane has room for one more event, or must fall behind."""
        queue = self.queue
        if len(queue) >= self.limits.queue_max or self.cant_send(now):
            return False
        if self.urgent and self.queued() >= self.limits.queue_max:
            return False
        if self.keys is not None and (not self.keys.are_known or self.keys.are_full):
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
        if event.priority is not None and event.priority > 0:
            heappush(self.urgent, (-event.priority, event.id, event))
        else:
            self.queue.append(event)
        if event.expires_us is not None:
            self.may_expire = True
        self.hands[event.id] = now
        self.said_in = None

    def put_back(self, event: Event) -> None:
        """It was about to be sent: it is the first of its class again."""
        if event.priority is not None and event.priority > 0:
            heappush(self.urgent, (-event.priority, event.id, event))
        else:
            self.queue.appendleft(event)

    def queued(self) -> int:
        return len(self.queue) + len(self.urgent)

    def fresh(self) -> list[Event]:
        """Return what is queued of fresh events."""
        return [*self.queue, *(event for _, _, event in self.urgent)]

    def passed_by(self, event: Event) -> None:
        """The head, or a gap, brought an event that a lagging lane will read for itself: at once, if it has priority."""
        self.backlog += 1
        if event.priority is not None and event.priority > 0:
            self.look_ahead(event.id - 1)

    def passed_by_many(self, events: int, after: int, *, urgent: bool) -> None:
        """Count events above `after`, of types that it wants, that it will read for itself; so many at most, if it has filters."""
        self.backlog += events
        if urgent:
            self.look_ahead(after)

    def look_ahead(self, after: int) -> None:
        """There may be events with priority above `after` to read before all others."""
        self.urgent_after = after if self.urgent_after is None else min(self.urgent_after, after)

    def fall_behind(self, cursor: int) -> None:
        """Stop taking from the head; the reader will read on after `cursor`."""
        if self.live:
            self.live, self.cursor = False, cursor
            self.moved += 1

    def go_back(self, cursor: int) -> None:
        """Read again what lies above `cursor`. Holes above it are met on the way."""
        assert not self.live
        if cursor < self.cursor:
            self.cursor = cursor
            self.holes.clip(cursor)
            self.look_ahead(cursor)
        self.said_in = None
        self.moved += 1

    def set_ordered(self, ordered: bool) -> None:
        """Begin to order by key, or to do so no more. Only a lagging lane with nothing queued may."""
        assert not self.live
        assert not self.queued()
        if self.keys is not None:
            self.holes.update(self.keys.held_back)
            self.holes.shrink(HOLES_MAX)
            self.holes.clip(self.cursor)
        self.said_in = None
        self.keys = Keys() if ordered else None
        self.moved += 1

    def trim_keys(self) -> None:
        """Forget what is held back no more. Called once a checkpoint."""
        if self.keys is not None:
            self.keys.trim()
            if self.live and not self.keys.held_back:
                self.backlog = 0

    def drop_queue(self) -> list[Event]:
        """Let go of what is queued but not in flight; it will be read again. Only a lagging lane may."""
        assert not self.live
        dropped = self.fresh()
        cursor = self.cursor
        for event in dropped:
            del self.hands[event.id]
            if self.keys is not None and event.ordering_key is not None:
                self.late.discard(event.id)
                self.keys.give_back(event)
            elif event.id in self.late:
                self.late.discard(event.id)
                self.add_hole(event.id)
            else:
                cursor = min(cursor, event.id - 1)
                if event.priority is not None and event.priority > 0:
                    self.look_ahead(event.id - 1)
        self.queue.clear()
        self.urgent.clear()
        self.go_back(cursor)
        return dropped

    def drop_retries(self, *, idle_runs_only: bool = False) -> list[DueRetry]:
        """Let go of retries that are not in flight (`idle_runs_only`: those of runs that are paused or canceled); they will be read again."""
        kept: deque[DueRetry] = deque()
        dropped = []
        for retry in self.retries:
            run = self.runs.get(retry.run)
            if idle_runs_only and (run is None or run.is_running):
                kept.append(retry)
                continue
            dropped.append(retry)
            if retry.number == 1 and run is not None:
                run.give_back(retry.event.id)
            else:
                self.retry_hands.discard((retry.event.id, retry.run))
                self.next_retry_at = 0.0  # due at once, as soon as it can send
        self.retries = kept
        return dropped

    def next_run(self, now: float) -> "LaneRun | None":
        """Return the run whose page is next, in turn; None if none may have one now."""
        for run in self.runs.values():
            if run.wants_page and run.next_at <= now:
                self.runs[run.spec.id] = self.runs.pop(run.spec.id)
                return run
        return None

    def next_run_at(self) -> float:
        """Return when a run may have its next page; inf if none wants one."""
        return min((run.next_at for run in self.runs.values() if run.wants_page), default=float("inf"))

    def idle_runs(self) -> list[int]:
        return [run_id for run_id, run in self.runs.items() if not run.is_running]

    def add_hole(self, event_id: int) -> None:
        self.holes.add(event_id, event_id)
        self.holes.shrink(HOLES_MAX)
        self.said_in = None

    def fill_holes(self, low: int, high: int) -> bool:
        """Take low … high out of the holes; False if there are none."""
        before = self.holes.count()
        self.holes.remove(low, high)
        self.said_in = None
        return self.holes.count() < before

    def mark(self, head: int, done: AbstractSet[int] = NOTHING) -> int:
        """Return the settled mark, counting `done` as settled."""
        cursor = head if self.live else self.cursor
        hands: AbstractSet[int] = self.hands.keys()
        if self.late:
            hands = hands - self.late
        if done:
            hands = hands - done
        return min(min(hands) - 1, cursor) if hands else cursor

    def open_late(self, done: AbstractSet[int] = NOTHING) -> IdRanges:
        """Return the ids at or below the mark that aren't settled."""
        held_back = None if self.keys is None or not self.keys.held_back else self.keys.held_back
        if not self.late and held_back is None:
            return self.holes
        late = self.late_ids(done)
        ranges = self.holes.copy()
        ranges.update((*(held_back or ()), *zip(late, late, strict=True)))
        return ranges

    def late_ids(self, done: AbstractSet[int]) -> AbstractSet[int]:
        """Return those at or below the mark that are in hand."""
        late = self.late & self.hands.keys()
        return late - done if done else late

    def settle(self, event_id: int) -> None:
        """Its result is committed, and no read that began before that is still to be processed."""
        self.hands.pop(event_id, None)
        self.late.discard(event_id)
        self.said_in = None

    @property
    def is_settled(self) -> bool:
        """Nothing to say about it in a checkpoint."""
        return (
            self.live
            and not self.hands
            and self.row is None
            and not self.holes
            and (self.keys is None or not self.keys.held_back)
        )

    def rests_on(self, row: LaneRow) -> bool:
        """Tell whether its row still says where it is and what is open: it lags, and takes nothing meanwhile."""
        if self.live or self.keys is not None or row.settled != self.cursor:
            return False
        if self.said_in is not row.holes and self._is_open_in(row.holes):
            self.said_in = row.holes
        return self.said_in is row.holes

    def is_off(self, row: LaneRow, *, exactly: bool) -> bool:
        """Tell whether more or less waits than its row says. Unless `exactly`, an eighth is none: thousands that are parked would be written
        each second for it."""
        off = abs(row.backlog - self.backlog)
        return off > 0 and (exactly or 8 * off > row.backlog)

    def _is_open_in(self, said: IdRanges) -> bool:
        """Tell whether these are the holes and what is in hand, no more and no less."""
        hands, holes = self.hands, self.holes
        if not hands:
            return said == holes
        if not hands.keys() <= self.late or said.count() != holes.count() + len(hands):
            return False
        return all(event_id in said for event_id in hands) and said.covers_all(holes)

    # ── towards the endpoint ──

    def work(self) -> int:
        """Return how many deliveries could start, for all that the lane itself knows."""
        fresh = len(self.queue) + len(self.urgent)
        return fresh + len(self.retries) if self.retries and self.low_is_open() else fresh

    def low_is_open(self) -> bool:
        """Tell whether one more of the lower class may be in flight."""
        return self.low_in_flight < max(1, int(self.limit() * RETRY_SHARE))

    def retry_turn(self) -> bool:
        """Tell whether a retry, of which there are some, goes before a fresh event."""
        if not self.queue and not self.urgent:
            return True
        self.turn += 1
        return self.turn % RETRY_TURN == 0 and self.low_is_open()

    def next_fresh(self) -> Event:
        """Take the next fresh event out of the queue."""
        if self.urgent:
            self.urgent_turns += 1
            if not self.queue or self.urgent_turns % URGENT_TURN:
                return heappop(self.urgent)[2]
        return self.queue.popleft()

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
        if self.pace is not None:
            at = max(at, self.pace.ready_at(now))
        return at

    def lacks_token(self, now: float) -> bool:
        """Tell whether nothing but its rate, or its pace, keeps it from a POST that `ready_at` put off."""
        return not self.held and self.blocked_until <= now and self.breaker.state is not BreakerState.OPEN

    def take_token(self, now: float) -> None:
        """A POST starts; `ready_at` said that it may."""
        if self.bucket is not None:
            taken = self.bucket.try_take(now)
            assert taken, "ready_at() said there is a token"
        if self.pace is not None:
            self.pace.take(now)

    def throttled(self, started: float, now: float, latency_s: float) -> None:
        """The receiver asked for less, in its answer to a POST that began at `started`."""
        if self.pace is not None:
            cut = self.pace.throttled(started, now)
        else:
            # What it was sent, by Little's law: this POST is no longer counted among those in flight.
            rate_per_s = (self.in_flight + 1) / max(self.latency_s, latency_s, 0.001)
            if self.endpoint.rate_per_s is not None:
                rate_per_s = min(rate_per_s, self.endpoint.rate_per_s)
            self.pace, cut = Pace(rate_per_s, now), True
        if cut:
            self.in_flight_limit = max(1, self.in_flight_limit // 2)

    def health(self, now: float) -> dict[str, Any]:
        """Return how it stands towards its endpoint, for people."""
        return {
            "endpoint_id": self.id, "live": self.live, "queued": self.queued(), "in_flight": self.in_flight,
            "in_flight_limit": self.limit(), "connecting": self.connecting, "breaker": self.breaker.state.value,
            "pace_per_s": None if self.pace is None or self.pace.is_over(now) else round(self.pace.rate_at(now), 2),
            "waits_s": round(max(0.0, self.blocked_until - now), 3), "probe_in_s": self._probe_in_s(now), "latency_s": round(self.latency_s, 4),
            "keys_held": 0 if self.keys is None else len(self.keys),
            "held_back_ids": 0 if self.keys is None else self.keys.held_back.count(),
        }  # fmt: skip

    def _probe_in_s(self, now: float) -> float | None:
        """Return how long the breaker lets nothing start; None unless it is open."""
        breaker = self.breaker
        return round(max(0.0, breaker.until - now), 3) if breaker.state is BreakerState.OPEN else None

    def limit(self) -> int:
        return self.in_flight_limit if self.breaker.state is CLOSED else 1

    def failing(self, now: float) -> bool:
        """Tell whether it has failed lately without a recent success; a quiet lane whose last POST went well is not failing."""
        failed = self.breaker.consecutive
        has_failed = failed > 0 or self.failing_since_us is not None
        return failed >= 3 or (has_failed and now - self.last_success > RECENT_S)

    @property
    def is_ordinary(self) -> bool:
        """Neither new, failing nor slow: most lanes, most of the time."""
        return (
            not self.untried
            and not self.breaker.consecutive
            and self.failing_since_us is None
            and self.latency_s <= SLOW_S
        )

    @property
    def doubt(self) -> Doubt | None:
        """Why a connection to its endpoint may never come, if it may not."""
        if self.unreached:
            return Doubt.UNREACHED
        return Doubt.UNTRIED if self.untried else None

    def accepts(self, now: float) -> bool:
        """Tell whether one more event that was read again may be queued: while a breaker isn't closed, only one to probe with."""
        if self.stalled or self.cant_send(now):
            return False
        if self.breaker.state is not CLOSED:
            return self.work() + self.in_flight + self.connecting == 0
        return self.queued() < self.limits.queue_max

    def room(self, now: float) -> int:
        """Return how many events the reader should fetch for a lane that lags: 0 unless it can send and is half empty."""
        if not self.accepts(now) or (self.keys is not None and (not self.keys.are_known or self.keys.are_full)):
            return 0
        if self.breaker.state is not CLOSED:
            return 1
        ahead = self._ahead()
        return ahead - self.queued() if self.queued() <= ahead // 2 else 0

    def _ahead(self) -> int:
        """Return how many events of its backlog a lane keeps in memory: what it can send in OLDEST_QUEUED_MAX_S. Forty that may send one a
        second, each with five hundred, would leave no memory to others."""
        per_s = self.limit() / max(self.latency_s, 0.01) if self.bucket is None else self.bucket.rate_per_s
        if self.pace is not None:
            per_s = min(per_s, self.pace.rate_per_s)
        return min(self.limits.queue_max, max(AHEAD_MIN, int(per_s * OLDEST_QUEUED_MAX_S)))

    def urgent_room(self, now: float) -> int:
        """The same for what is read ahead: it has room of its own, and needs none in the queue."""
        if self.live or self.urgent_after is None or self.stalled or self.cant_send(now):
            return 0
        if self.keys is not None and not self.keys.are_known:
            return 0
        if self.breaker.state is not CLOSED:
            return int(self.accepts(now))
        return URGENT_MAX - len(self.urgent) if len(self.urgent) <= URGENT_MAX // 2 else 0

    def keys_room(self, now: float) -> int:
        """The same for the next events of keys that are free."""
        if self.keys is None or not self.keys.are_known or not self.keys.free or not self.accepts(now):
            return 0
        return 1 if self.breaker.state is not CLOSED else min(KEYS_PAGE, self.limits.queue_max - self.queued())

    def retry_room(self, now: float) -> int:
        """The same for its due retries."""
        if not self.accepts(now):
            return 0
        if self.breaker.state is not CLOSED:
            return 1
        return RETRIES_MAX - len(self.retries) if len(self.retries) <= RETRIES_MAX // 2 else 0

    def succeeded(self, now: float, latency_s: float, probe: bool) -> None:
        self.last_success = now
        self._took(latency_s)
        if self.breaker.succeeded(now, probe):
            self.in_flight_limit = 1
        elif self.pace is not None:
            self._grow_paced(now)
        elif self.in_flight_limit < self.in_flight_max:
            self.in_flight_limit += 1

    def _took(self, latency_s: float) -> None:
        """Note how long a POST took. The first is the average: with one from 0 on, endpoints that take two seconds were quick for their first
        four, and had all of their origin's sockets meanwhile."""
        self.latency_s = latency_s if self.untried else self.latency_s + 0.2 * (latency_s - self.latency_s)
        self.untried = False

    def _grow_paced(self, now: float) -> None:
        """One more in flight for as many successes as may be in flight: one a round."""
        assert self.pace is not None
        self.paced_successes += 1
        if self.paced_successes >= self.in_flight_limit:
            self.paced_successes = 0
            self.in_flight_limit = min(self.in_flight_limit + 1, self.in_flight_max)
        if self.pace.is_over(now):
            self.pace = None

    def failed(self, now: float, latency_s: float, probe: bool, *, throttled: bool = False) -> bool:
        """Note a failure that counts; return whether it opened the breaker. `throttled`: its rate and POSTs in flight were cut for it."""
        self._took(latency_s)
        if not throttled:
            self.in_flight_limit = max(1, self.in_flight_limit // 2)
        return self.breaker.failed(now, probe)


def _origin(endpoint: Endpoint) -> Origin | None:
    return None if endpoint.target is None else endpoint.target.origin


def _requests_of(lane: Lane) -> Requests:
    endpoint = lane.endpoint
    assert endpoint.target is not None, "a lane without a target is held"
    return make_requests(endpoint.target, lane.limits.user_agent, endpoint.secrets, endpoint.shape)


_MADE_WHEN_USED: dict[str, Callable[[Lane], Any]] = {
    "queue": lambda lane: deque(),
    "late": lambda lane: set(),
    "retries": lambda lane: deque(),
    "retry_hands": lambda lane: set(),
    "runs_done": lambda lane: deque(maxlen=RUNS_DONE_MAX),
    "requests": _requests_of,
}
