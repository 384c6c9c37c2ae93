"""The sender: gives ready lanes their turns, and takes each POST from slot to outcome to decision.

Lanes with something to send stand in a line (line.py) and get a few POSTs a turn. Turns bound how often slots are
granted, not how long they are held: that is bounded by shares (shares.py). Who waits for time (tokens, breaker,
Retry-After) stands in a heap of instants; who waits for room stands in the line of what it lacks. Waiting for a name, a
connection or room at an origin holds no slot.

No task per delivery: a POST is a call to the connection and a call back. All methods are atomic.

Nothing starts unless `lease_until` lies ahead: it is moved by whoever has just seen that this process still rules and
what is paused (engine/config.py), so that a frozen process, a lost database and a pause all stop deliveries within a
second by the same rule.
"""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from dispatcher.domain.event import Event
from dispatcher.domain.outcome import (
    BY_RECEIVER,
    DELIVER,
    Command,
    Decision,
    Fault,
    Outcome,
    Verdict,
    decide,
    describe,
    heeding,
)
from dispatcher.domain.pace import THROTTLING
from dispatcher.domain.run import ORIGINAL
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes
from dispatcher.engine.line import Line
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.shares import Shares
from dispatcher.engine.stats import LONGEST_US
from dispatcher.ports import Connection, Transport

_log = structlog.get_logger(room="sender")

TURN_POSTS = 4  # a lane's POSTs per turn
TURNS_AT_ONCE = 200  # then answers have their turn: ten thousand new lanes in the line, of which none got a slot, took 130 ms at once
# One costs 0.3 ms, most of it in the next turn: three thousand that cannot be reached, tried again in clumps, held the loop for 50 to 90 ms.
CONNECTS_AT_ONCE = 4
# What waits for the loop (others' events, answers, pages) waits for these, and their answers come as they went, in one turn again: a hundred
# at once made the p50 of others 11 to 15 ms beside an endpoint that catches up, where it is 3.8 now, and each POST cost a tenth more.
POSTS_AT_ONCE = 16
_EXPIRED, _SETTLE_EXPIRED = Outcome(Fault.EXPIRED), Decision(Verdict.EXPIRED)


class Sender:
    """`look` tells the reader that a lane may want a page; `disable` asks for an endpoint to be disabled."""

    def __init__(
        self,
        transport: Transport,
        lanes: Lanes,
        recorder: Recorder,
        clock: Clock,
        counters: Counters,
        *,
        slots: int,
        rng: random.Random,
        look: Callable[[Lane], None],
        disable: Callable[[Lane, str], None],
        failing: Callable[[Lane, int | None], None],
        tell_failing: Callable[[Lane], None],
        failing_after_s: int,
        disable_after_s: int,
    ) -> None:
        self.lease_until = float("-inf")
        self.held_by: set[str] = set()  # reasons why nothing may start: stopping, unrecorded results, owner lost
        self.in_flight = 0
        self.abandoned = False  # results mean nothing any more
        self._transport = transport
        self._lanes = lanes
        self._recorder = recorder
        self._clock = clock
        self._counters = counters
        self._rng = rng
        self._look = look
        self._disable = disable
        self._failing_changed = failing
        self._tell_failing = tell_failing
        self._failing_after_us = failing_after_s * 1_000_000
        self._disable_after_us = disable_after_s * 1_000_000
        self._slots = slots
        self.shares = Shares(slots, transport.sockets_per_origin_max)
        self._line = Line()
        self._timers: list[tuple[float, int, Lane]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_when = float("inf")
        self._serial = 0  # ties in the heap
        self._pumping = False
        self._connects = 0  # asked for in this pump
        self._posts = 0  # begun since it
        # What came when a turn had begun as many as it may: connections for lanes, and deliveries that need another one.
        self._arrived: deque[tuple[Lane, int, Connection]] = deque()
        self._stale: deque[Delivery] = deque()
        self._call_soon = asyncio.get_running_loop().call_soon
        self._drained: asyncio.Event = asyncio.Event()
        self._timestamp: tuple[int, bytes] = (0, b"")

    # ── who may be served ──

    def set_slots(self, slots: int) -> None:
        """Bound the POSTs in flight; those above a lower bound end as they would."""
        self._slots = slots
        self.shares.set_slots(slots)
        self._call_next()

    def offer(self, lane: Lane) -> None:
        """A lane has something to send, or something that kept it from sending has changed."""
        if lane.in_ready:
            if lane.waits_for is None or not self.shares.waits_in_vain(lane, self._clock.now()):
                return
            lane.waits_for = None
        elif lane.gone:
            return
        lane.in_ready = True
        self._line.append(lane)
        self.pump_soon()

    def changed(self, lane: Lane) -> None:
        """The lane's configuration has changed: what it has to wait for may be something that was due while it was held, and has no timer."""
        now = self._clock.now()
        if (at := lane.ready_at(now)) > now:
            self._wake_lane_at(lane, at)
        self.offer(lane)

    def pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._call_soon(self._pump)

    def hold(self, reason: str) -> None:
        self.held_by.add(reason)

    def unhold(self, reason: str) -> None:
        self.held_by.discard(reason)
        self.pump_soon()

    def may_start(self, now: float) -> bool:
        return not self.held_by and now < self.lease_until and self.in_flight < self._slots

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            self._drained.clear()
            await self._drained.wait()

    def close(self) -> None:
        """Take no result any more, and start nothing."""
        self.abandoned = True
        self._stale.clear()
        self.hold("closed")
        if self._timer is not None:
            self._timer.cancel()

    def _pump(self) -> None:
        self._pumping = False
        self._connects = self._posts = 0
        # Now, at every turn: a process that was frozen in the middle of this must not finish it as if no time had passed.
        for _ in range(TURNS_AT_ONCE):
            if self._stale:
                self._connect_again(self._stale.popleft())
            if self._arrived:
                self._connected(*self._arrived.popleft())
            if self._line and self.may_start(now := self._clock.now()):
                lane = self._line.popleft()
                lane.in_ready = False
                self._serve(lane, now)
                self._call_next()
            elif not self._arrived and not self._stale:
                return
            if self._connects >= CONNECTS_AT_ONCE or self._posts >= POSTS_AT_ONCE:
                break
        self.pump_soon()

    def _call_next(self) -> None:
        for lane in self.shares.call():
            lane.in_ready = False
            self.offer(lane)

    def _serve(self, lane: Lane, now: float) -> None:
        """Give a lane its turn; it goes back into the line, into another, or nowhere if it has nothing to send."""
        for _ in range(TURN_POSTS):
            if lane.may_expire:
                self._settle_stale(lane)
            if lane.gone or lane.work() <= lane.connecting or lane.in_flight + lane.connecting >= lane.limit():
                return  # whatever ends next offers the lane again
            at = lane.ready_at(now)
            if at > now:
                if lane.lacks_token(now):
                    self._counters.rate_waits += 1
                self._wake_lane_at(lane, at)
                return
            if not lane.breaker.may_start(now):
                return
            share = self.shares.full(lane, now)
            if share is not None:
                lane.in_ready = True
                self.shares.wait(lane, share)
                return
            now = self._clock.now()  # for each POST: a freeze may end in the middle of a turn
            if not self.may_start(now):
                break
            assert lane.endpoint.target is not None
            connection = self._transport.try_acquire(lane.endpoint.target.origin)
            if connection is None:
                doubt = lane.doubt
                if doubt is not None and lane.connecting:
                    return  # one at a time; when it ends the lane is offered again
                lane.connecting += 1
                self._connects += 1
                ready = partial(self._connected, lane, lane.way)
                self._transport.connect(lane.endpoint.target.origin, ready, turn_of=lane.id, doubt=doubt)
            else:
                self._start(lane, connection, now)
        self.offer(lane)

    def _wake_lane_at(self, lane: Lane, at: float) -> None:
        """Offer the lane again at an instant; an earlier wake-up that is already set will do."""
        if at == float("inf") or lane.timer_at <= at:
            return
        lane.timer_at = at
        self._serial += 1
        heapq.heappush(self._timers, (at, self._serial, lane))
        self._set_timer()

    def _set_timer(self) -> None:
        when = self._timers[0][0] if self._timers else float("inf")
        if when < self._timer_when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_when = when
            self._timer = asyncio.get_running_loop().call_later(max(0.0, when - self._clock.now()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer_when = float("inf")
        now = self._clock.now()
        while self._timers and self._timers[0][0] <= now:
            at, _, lane = heapq.heappop(self._timers)
            if lane.timer_at == at:
                lane.timer_at = float("inf")
                # It may have to wait for more by now: the timer was for a token, and since then it was told to stay away, or its breaker
                # opened, and it let go of its queue. Nobody else would come back for it.
                if not lane.gone and (later := lane.ready_at(now)) > now:
                    self._wake_lane_at(lane, later)
                self._look(lane)
                self.offer(lane)
        self._set_timer()

    # ── one POST ──

    def _connected(self, lane: Lane, way: int, result: Connection | Outcome) -> None:
        if self._posts >= POSTS_AT_ONCE and not isinstance(result, Outcome):
            self._arrived.append((lane, way, result))
            self.pump_soon()
            return
        moved = _has_moved(lane, way)
        if lane.way == way:
            lane.connecting -= 1
            lane.unreached = isinstance(result, Outcome)
        now = self._clock.now()
        if self.abandoned:
            if not isinstance(result, Outcome):
                self._transport.release(result)
            return
        if lane.may_expire:
            self._settle_stale(lane)
        if isinstance(result, Outcome):
            # The delivery that asked for it has failed, if it is still there and still due.
            if (
                lane.work()
                and not lane.gone
                and not moved
                and not self.held_by
                and lane.ready_at(now) <= now
                and lane.breaker.may_start(now)
            ):
                delivery = self._next(lane)
                self._occupy(delivery, now)
                self.answered(delivery, result)
            self._offer_or_look(lane)
            return
        can = (
            lane.work()
            and not lane.gone
            and not moved
            and self.may_start(now)
            and lane.in_flight < lane.limit()
            and lane.ready_at(now) <= now
        )
        if can and lane.breaker.may_start(now) and self.shares.full(lane, now) is None:
            self._start(lane, result, now)
        else:
            self._transport.release(result)
        self._offer_or_look(lane)

    def _offer_or_look(self, lane: Lane) -> None:
        """A connect has ended. While it was under way, a lane whose breaker isn't closed read nothing to probe with."""
        if lane.work():
            self.offer(lane)
        else:
            self._look(lane)

    def _next(self, lane: Lane) -> Delivery:
        """Take the next delivery out of the lane."""
        if lane.retries and lane.retry_turn():
            retry = lane.retries.popleft()
            delivery = Delivery(self.answered, lane, retry.event, retry.run, retry.number, retry.first_attempt_us)
        else:
            event = lane.next_fresh() if lane.urgent else lane.queue.popleft()
            delivery = Delivery(self.answered, lane, event, ORIGINAL, 1, 0)
        if not lane.live or lane.next_retry_at is not None or lane.runs or lane.keys is not None:
            self._look(lane)
        return delivery

    def _settle_stale(self, lane: Lane) -> None:
        """Settle, unsent, what is about to be sent and has expired. Looks at what stands first only: the rest comes there. Before a token is
        taken; and a delivery that waits for a retry is looked at when that is due, or when it expires."""
        while lane.queue and lane.queue[0].expires_us is not None and self._is_stale(lane.queue[0]):
            self._settle_unsent(Delivery(self.answered, lane, lane.queue.popleft(), ORIGINAL, 1, 0))
        while lane.urgent and lane.urgent[0][2].expires_us is not None and self._is_stale(lane.urgent[0][2]):
            self._settle_unsent(Delivery(self.answered, lane, heapq.heappop(lane.urgent)[2], ORIGINAL, 1, 0))
        while lane.retries and lane.retries[0].event.expires_us is not None:
            retry = lane.retries[0]
            if retry.run != ORIGINAL or not self._is_stale(retry.event):  # who asks for a resend wants it now
                break
            lane.retries.popleft()
            self._settle_unsent(
                Delivery(self.answered, lane, retry.event, retry.run, retry.number, retry.first_attempt_us)
            )

    def _is_stale(self, event: Event) -> bool:
        return not self.held_by and event.expires_us is not None and event.expires_us <= self._clock.wall_us()

    def _settle_unsent(self, delivery: Delivery) -> None:
        delivery.started_us = self._clock.wall_us()
        delivery.outcome, delivery.decision, delivery.duration_us = _EXPIRED, _SETTLE_EXPIRED, 0
        self._counters.expired += 1
        _log.debug(
            "delivery.expired",
            endpoint_id=delivery.lane.id,
            event_id=delivery.event.public_id.decode(),
            id=delivery.event.id,
            attempts=delivery.number - 1,
        )
        self._lanes.memory.let_go(delivery.event)
        self._recorder.add(delivery)
        self._look(delivery.lane)

    def _start(self, lane: Lane, connection: Connection, now: float) -> None:
        if lane.bucket is not None or lane.pace is not None:
            lane.take_token(now)
        delivery = self._next(lane)
        self._occupy(delivery, now)
        self._post(delivery, connection)

    def _occupy(self, delivery: Delivery, now: float) -> None:
        """Count the delivery into its slot and shares, and begin its attempt."""
        lane = delivery.lane
        delivery.started = now
        delivery.probe = lane.breaker.started()
        delivery.started_us = self._clock.wall_us(now)
        if not delivery.first_attempt_us:
            delivery.first_attempt_us = delivery.started_us
        delivery.shares = self.shares.take(lane, now)
        if not delivery.is_first:
            lane.low_in_flight += 1
        lane.in_flight += 1
        self.in_flight += 1

    def _vacate(self, delivery: Delivery) -> None:
        delivery.lane.in_flight -= 1
        if not delivery.is_first:
            delivery.lane.low_in_flight -= 1
        self.in_flight -= 1
        if delivery.shares:
            self.shares.give_back(delivery.shares)
            self._call_next()
        if self._line:
            self.pump_soon()  # whoever stands there may have found no slot
        if not self.in_flight:
            self._drained.set()

    def _post(self, delivery: Delivery, connection: Connection) -> None:
        self._counters.attempts += 1
        self._posts += 1
        endpoint = delivery.lane.endpoint
        connection.post(self._request(delivery), endpoint.timeout_s, delivery.done, endpoint.response_control)

    def _request(self, delivery: Delivery) -> bytes:
        """Render the request; the timestamp is this attempt's."""
        second = delivery.started_us // 1_000_000
        cached, timestamp = self._timestamp
        if cached != second:
            timestamp = b"%d" % second
            self._timestamp = (second, timestamp)
        return delivery.lane.requests.render(delivery.event, timestamp, delivery.number)

    def answered(self, delivery: Delivery, outcome: Outcome) -> None:
        """Take the outcome of a POST: free its slot, decide, hand the result to the recorder."""
        if self.abandoned:
            return
        lane = delivery.lane
        if outcome.fault is Fault.STALE and not delivery.again:
            self._send_again(delivery)
            return
        now = self._clock.now()
        latency_s = now - delivery.started
        self._vacate(delivery)
        delivery.outcome, delivery.duration_us = outcome, min(int(latency_s * 1e6), LONGEST_US)
        if outcome.fault is None:
            delivery.decision = DELIVER
            self._counters.delivered += 1
            if outcome.command is Command.DISABLE and lane.endpoint.response_control:
                self._disable(lane, BY_RECEIVER)
            lane.succeeded(now, latency_s, delivery.probe)
            if lane.failing_since_us is not None:
                was_us, lane.failing_since_us = lane.failing_since_us, None
                self._failing_changed(lane, was_us)
        else:
            age_s = (delivery.started_us - delivery.first_attempt_us) / 1e6
            policy = lane.key_policy if delivery.holds_key else lane.retry_policy
            decision = decide(outcome, delivery.number, age_s, policy, self._clock.wall(), self._rng)
            if outcome.command is not None and lane.endpoint.response_control:
                decision = heeding(decision, outcome.command)
            delivery.decision = decision
            self._failed(delivery, outcome, decision, now, latency_s)
        self._lanes.memory.let_go(delivery.event)
        self._recorder.add(delivery)
        if not lane.live or lane.next_retry_at is not None or lane.runs or lane.keys is not None:
            self._look(lane)
        if lane.queue or lane.retries or lane.urgent:
            self.offer(lane)

    def _failed(self, delivery: Delivery, outcome: Outcome, decision: Decision, now: float, latency_s: float) -> None:
        lane = delivery.lane
        self._counters.failed += 1
        throttled = outcome.status in THROTTLING
        if throttled:
            self._counters.throttled += 1
            lane.throttled(delivery.started, now, latency_s)
        if decision.counts:
            opened = lane.failed(now, latency_s, delivery.probe, throttled=throttled)
            if lane.failing_since_us is None:
                lane.failing_since_us = delivery.started_us
                self._failing_changed(lane, None)
            elif delivery.started_us - lane.failing_since_us > self._disable_after_us:
                self._disable(lane, "consecutive_failures")
            elif not lane.failing_told and delivery.started_us - lane.failing_since_us >= self._failing_after_us:
                self._tell_failing(lane)
            if opened:
                self._counters.breaker_opened += 1
                _log.warning(
                    "breaker.opened",
                    endpoint_id=lane.id,
                    wait_s=round(lane.breaker.wait_s, 1),
                    outcome=describe(outcome),
                )
                self._wake_lane_at(lane, lane.breaker.until)
        else:
            lane.breaker.abandoned(delivery.probe)
        if decision.lane_wait_s:
            lane.blocked_until = max(lane.blocked_until, now + decision.lane_wait_s)
            self._wake_lane_at(lane, lane.blocked_until)
        if decision.disable_reason is not None:
            self._disable(lane, decision.disable_reason)
        if lane.cant_send(now):
            self._let_queue_go(lane)
        _log.info(
            "delivery.attempted",
            endpoint_id=lane.id,
            event_id=delivery.event.public_id.decode(),
            id=delivery.event.id,
            run=delivery.run,
            attempt=delivery.number,
            outcome=describe(outcome),
            status=outcome.status,
            duration_ms=round(latency_s * 1e3, 1),
            decision=decision.verdict.value,
            retry_in_s=round(decision.due_in_s, 1) if decision.verdict is Verdict.RETRY else None,
        )

    def _let_queue_go(self, lane: Lane) -> None:
        """A lane that can't send for a while keeps nothing in memory: it reads on when it can."""
        if not lane.gone:
            self._lanes.fall_behind(lane, self._recorder.head(), drop=True)

    def _send_again(self, delivery: Delivery) -> None:
        """A kept-alive connection was already closed: once more on a new one, under the same attempt number."""
        self._counters.stale += 1
        if self._connects < CONNECTS_AT_ONCE:
            self._connect_again(delivery)
        else:
            self._stale.append(delivery)
            self.pump_soon()

    def _connect_again(self, delivery: Delivery) -> None:
        target = delivery.lane.endpoint.target
        if target is None:  # its new URL can't be used
            self._put_back(delivery)
            return
        delivery.again = True
        self._connects += 1
        again = partial(self._again_connected, delivery, delivery.lane.way)
        self._transport.connect(target.origin, again, fresh=True, turn_of=delivery.lane.id)

    def _again_connected(self, delivery: Delivery, way: int, result: Connection | Outcome) -> None:
        if isinstance(result, Outcome):
            self.answered(delivery, result)
        elif self.abandoned:
            self._transport.release(result)
        elif (
            delivery.lane.held
            or delivery.lane.gone
            or _has_moved(delivery.lane, way)
            or self.held_by
            or self._clock.now() >= self.lease_until
        ):
            self._transport.release(result)
            self._put_back(delivery)
        else:
            self._post(delivery, result)

    def _put_back(self, delivery: Delivery) -> None:
        """Undo the start of a delivery of which the receiver has seen nothing: its lane will read it again."""
        self._vacate(delivery)
        lane, event = delivery.lane, delivery.event
        lane.breaker.abandoned(delivery.probe)
        if lane.gone:
            self._lanes.memory.let_go(event)
            return
        if delivery.is_first:
            lane.put_back(event)
            if lane.held:
                self._let_queue_go(lane)
        else:
            self._lanes.memory.let_go(event)
            run = lane.runs.get(delivery.run)
            if delivery.number == 1 and run is not None:
                run.give_back(event.id)
            else:
                lane.retry_hands.discard((event.id, delivery.run))
                lane.next_retry_at = 0.0
            self._look(lane)
        self.offer(lane)  # what waited for its place in flight


def _has_moved(lane: Lane, way: int) -> bool:
    """Tell whether the endpoint's URL was changed (or it was enabled again) while a connection was made: no request must go to the old host."""
    return lane.way != way
