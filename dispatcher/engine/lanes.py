"""The lanes of all endpoints, the routes from events to them, and the account of events in memory.

Routing is a look-up: account → type → the lanes whose subscriptions match, computed once per account and type and
forgotten when one of the account's endpoints changes.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from dispatcher.domain.endpoint import Endpoint, EndpointState, Subscription, pattern_matches
from dispatcher.domain.event import TOLD_TO_OTHERS, Event
from dispatcher.domain.filters import Condition, Payloads
from dispatcher.engine.lane import Lane, LaneLimits

HEAD_EVENTS_MIN = 250
CROWD = 64  # so many events of a lane's are no crowd, however few the others have
TYPES_CACHED_MAX = 1_000  # per account; producers may invent types without end

Route = tuple[Lane, int, int, Condition | None]  # lane, since_id, until_id, what its filters ask


class Memory:
    """Counts events and payload bytes in memory. An event counts once, however many lanes hold it."""

    __slots__ = ("bytes", "bytes_max", "events", "events_max", "head_bytes", "head_events")

    def __init__(self, events_max: int, bytes_max: int) -> None:
        self.events = 0
        self.bytes = 0
        self.events_max = events_max
        self.bytes_max = bytes_max
        # What the head reads at the least: a read for a handful of rows costs what one for hundreds costs.
        self.head_events = max(1, min(HEAD_EVENTS_MIN, events_max // 8))
        self.head_bytes = bytes_max // 32

    def hold(self, event: Event) -> None:
        if event.holders == 0:
            assert event.payload, "an event that was let go of is read again, not taken again"
            self.events += 1
            self.bytes += len(event.payload)
        event.holders += 1

    def let_go(self, event: Event) -> None:
        event.holders -= 1
        if event.holders == 0:
            self.events -= 1
            self.bytes -= len(event.payload)
            event.payload, event.body = (
                b"",
                None,
            )  # a result that waits to be recorded keeps the event's id alive, not its bytes

    @property
    def is_full(self) -> bool:
        return self.events >= self.events_max or self.bytes >= self.bytes_max

    def leaves(self, times: int) -> bool:
        """Tell whether so much is free, in what the head needs at the least. Who reads old events stops earlier than it: lanes that are behind
        and slow would take each place that it waits for, and nobody would get a new event for as long as they have a backlog."""
        events, size = self.events + times * self.head_events, self.bytes + times * self.head_bytes
        return events < self.events_max and size < self.bytes_max


class Lanes:
    """Owned by the engine; one lane per endpoint that isn't deleted."""

    def __init__(self, limits: LaneLimits, memory: Memory) -> None:
        self.memory = memory
        self.unsettled: dict[Lane, None] = {}  # lanes that the next checkpoint must look at
        self.rows_gone: set[int] = set()  # endpoints that are gone but may have a lane row
        self.running: dict[Lane, None] = {}  # lanes with runs
        self.taking_up: set[int] = set()  # subscriptions whose lane went back to since_id; to be written
        self._long: dict[Lane, None] = {}  # lanes with a queue that might be a crowd, and some that had one
        self._limits = limits
        self._payloads = Payloads()
        self._by_id: dict[int, Lane] = {}
        self._accounts: dict[str, dict[int, Lane]] = {}
        self._routes: dict[str, dict[str, tuple[Route, ...]]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._by_id.values())

    def get(self, endpoint_id: int) -> Lane | None:
        return self._by_id.get(endpoint_id)

    def of_account(self, account_id: str) -> Iterable[Lane]:
        return self._accounts.get(account_id, {}).values()

    def routes(self, account_id: str, event_type: str) -> tuple[Route, ...]:
        """Return the lanes that an event of this account and type may concern; the caller compares ids, and fields if any are asked for."""
        by_type = self._routes.get(account_id)
        if by_type is not None:
            found = by_type.get(event_type)
            if found is not None:
                return found
        lanes = self._accounts.get(account_id)
        if not lanes:
            return ()
        found = tuple(
            (
                lane,
                subscription.since_id,
                subscription.until_id,
                None if subscription.rule is None else subscription.rule.condition(event_type),
            )
            for lane in lanes.values()
            for subscription in lane.endpoint.subscriptions
            if pattern_matches(subscription.pattern, event_type)
        )
        if by_type is None or len(by_type) >= TYPES_CACHED_MAX:
            by_type = self._routes[account_id] = {}
        by_type[event_type] = found
        return found

    def wanting(self, event: Event) -> Sequence[Lane]:
        """Return each lane once that the event is for."""
        lanes = wanting(self.routes(event.account_id, event.type), event, self._payloads)
        if event.type in TOLD_TO_OTHERS:
            return [lane for lane in lanes if not event.is_about(lane.id)]
        return lanes

    def add(self, endpoint: Endpoint, now: float, *, live: bool, cursor: int) -> Lane:
        lane = Lane(endpoint, self._limits, now, live=live, cursor=cursor, payloads=self._payloads)
        if lane.runs:
            self.running[lane] = None
        self._by_id[lane.id] = lane
        self._accounts.setdefault(endpoint.account_id, {})[lane.id] = lane
        self._routes.pop(endpoint.account_id, None)
        return lane

    def configure(self, endpoint: Endpoint, now: float, head: int) -> Lane:
        """Adopt a new or changed endpoint. Subscriptions that aren't taken up send its lane back to where they begin."""
        lane = self._by_id.get(endpoint.id)
        if lane is not None and lane.endpoint.account_id != endpoint.account_id:
            self._accounts[lane.endpoint.account_id].pop(lane.id, None)
            self._routes.pop(lane.endpoint.account_id, None)
            self._accounts.setdefault(endpoint.account_id, {})[lane.id] = lane
        if lane is None:
            since = min((s.since_id for s in endpoint.subscriptions), default=head)
            lane = self.add(endpoint, now, live=False, cursor=min(since, head))
            self.unsettled[lane] = None
        else:
            was_held, were = lane.held, lane.endpoint.subscriptions
            lane.configure(endpoint, now)
            if was_held and not lane.held:
                lane.put_live_again()
            if (lane.keys is not None) is not (endpoint.ordering is not None):
                self.fall_behind(lane, head, drop=True)
                lane.set_ordered(endpoint.ordering is not None)
            if _ended(were, endpoint.subscriptions) and not all(lane.is_for(event) for event in lane.fresh()):
                # Something queued is not for it any more: it reads on by the new subscriptions.
                self.fall_behind(lane, head, drop=True)
            if lane.runs:
                self.running[lane] = None
                for retry in lane.drop_retries(idle_runs_only=True):
                    self.memory.let_go(retry.event)
            self._routes.pop(endpoint.account_id, None)
        self.take_up(lane, head)
        if lane.held:
            self.fall_behind(lane, head, drop=True)
        return lane

    def take_up(self, lane: Lane, head: int) -> None:
        fresh = [s for s in lane.endpoint.subscriptions if not s.taken_up and s.id not in self.taking_up]
        if not fresh:
            return
        since = min(s.since_id for s in fresh)
        self.go_back(lane, since, head)
        self.taking_up.update(s.id for s in fresh)

    def go_back(self, lane: Lane, after: int, head: int) -> None:
        """Make a lane read again what lies above `after`."""
        lane.fall_behind(head)
        lane.go_back(after)
        self.unsettled[lane] = None

    def remove(self, endpoint_id: int) -> Lane | None:
        """Forget a deleted endpoint. POSTs in flight still end and are recorded."""
        lane = self._by_id.pop(endpoint_id, None)
        if lane is None:
            return None
        self._accounts[lane.endpoint.account_id].pop(endpoint_id, None)
        self._routes.pop(lane.endpoint.account_id, None)
        lane.gone = True
        self.unsettled.pop(lane, None)
        self.running.pop(lane, None)
        self.rows_gone.add(endpoint_id)
        for event in lane.fresh():
            self.memory.let_go(event)
        for retry in lane.retries:
            self.memory.let_go(retry.event)
        lane.queue.clear()
        lane.urgent.clear()
        lane.retries.clear()
        self.taking_up.difference_update(s.id for s in lane.endpoint.subscriptions)
        return lane

    def fall_behind(self, lane: Lane, cursor: int, *, drop: bool) -> None:
        """Make a lane lag after `cursor` (if it is live), and let go of its queue if asked."""
        lane.fall_behind(cursor)
        self.unsettled[lane] = None
        if drop:
            for event in lane.drop_queue():
                self.memory.let_go(event)
                lane.backlog += 1
            for retry in lane.drop_retries():
                self.memory.let_go(retry.event)

    def stall(self, lane: Lane) -> None:
        """Let it take nothing that is read again, and let go of what is not in flight, until `stalled` is taken back. A live lane goes on with
        fresh events."""
        lane.stalled = True
        lane.moved += 1
        if not lane.live:
            self.fall_behind(lane, lane.cursor, drop=True)
        else:
            for retry in lane.drop_retries():
                self.memory.let_go(retry.event)

    def take(self, lane: Lane, event: Event, now: float) -> bool:
        """Put an event into a lane's hands; False if it must be passed over for now, because its key is held."""
        if lane.keys is not None and event.ordering_key is not None:
            if lane.keys.holds(event.ordering_key):
                lane.keys.hold_back(event)
                self.unsettled[lane] = None
                return False
            lane.keys.hold(event)
        self.unsettled[lane] = None  # take_held, without a call for each delivery
        self.memory.hold(event)
        lane.take(event, now)
        if len(lane.queue) > CROWD or lane.urgent:
            self._long[lane] = None
        return True

    def take_held(self, lane: Lane, event: Event, now: float) -> None:
        """Put an event into a lane's hands; if its endpoint orders by key, it holds its key already."""
        self.unsettled[lane] = None
        self.memory.hold(event)
        lane.take(event, now)
        if len(lane.queue) > CROWD or lane.urgent:
            self._long[lane] = None

    def crowds(self) -> list[Lane]:
        """Return the lanes whose queues are far longer than the others', the longest first. Looking at ten thousand takes 12 ms, so it isn't
        done where none can be one."""
        self._long = {lane: None for lane in self._long if lane.queued() > CROWD}
        if not self._long:
            return []
        queued = [(count, lane) for lane in self.unsettled if (count := len(lane.queue) + len(lane.urgent))]
        mean = sum(count for count, _ in queued) // max(1, len(queued))
        return [lane for count, lane in sorted(queued, key=itemgetter(0), reverse=True) if count > 4 * mean + CROWD]


def _ended(before: Sequence[Subscription], after: Sequence[Subscription]) -> bool:
    """Tell whether a subscription ends earlier than it did."""
    ends = {subscription.id: subscription.until_id for subscription in after}
    return any(ends.get(subscription.id, -1) < subscription.until_id for subscription in before)


def is_wanted(endpoint: Endpoint) -> bool:
    """A draft has no subscriptions, so its lane would idle for ever; it costs nothing not to have one."""
    return endpoint.state is not EndpointState.DRAFT


def wanting(routes: Sequence[Route], event: Event, payloads: Payloads) -> Sequence[Lane]:
    """Return each lane once whose subscription is valid for the event. Its payload is parsed only if a filter asks, and once."""
    event_id = event.id
    if len(routes) == 1:  # mostly: one endpoint an account
        lane, since_id, until_id, condition = routes[0]
        if not since_id < event_id <= until_id:
            return ()
        return (lane,) if condition is None or condition.holds(payloads.of(event)) else ()
    return list(
        dict.fromkeys(
            lane
            for lane, since_id, until_id, condition in routes
            if since_id < event_id <= until_id and (condition is None or condition.holds(payloads.of(event)))
        )
    )
