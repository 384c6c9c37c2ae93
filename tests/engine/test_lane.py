"""One lane: what it says is settled, what it lets go, and when it may send.

Towards the log the judge is a set of ids: whatever is done, an id that was given to the lane and isn't settled is above the mark or in its
holes. That is DESIGN §4's invariant as far as one lane can break it.
"""

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dispatcher.domain.breaker import BreakerLimits, BreakerState
from dispatcher.domain.endpoint import EndpointState, Subscription
from dispatcher.domain.outcome import RetryPolicy
from dispatcher.domain.ranges import IdRanges
from dispatcher.engine.keys import Keys
from dispatcher.engine.lane import AHEAD_MIN, HOLES_MAX, RECENT_S, RETRIES_MAX, SLOW_S, Lane, LaneLimits
from dispatcher.ports import LaneRow
from dispatcher.settings import Settings
from tests.engine.build import LIMITS, make_endpoint, make_event, make_lane, make_retry

INF = float("inf")


def take(lane: Lane, *event_ids: int, now: float = 0.0) -> None:
    for event_id in event_ids:
        lane.take(make_event(event_id), now)


def open_breaker(lane: Lane, now: float = 100.0) -> None:
    for _ in range(LIMITS.breaker.failures):
        lane.failed(now, 0.1, probe=False)
    assert lane.breaker.state is BreakerState.OPEN
    assert lane.breaker.until == now + 5.0


def half_open(lane: Lane, now: float = 100.0) -> None:
    open_breaker(lane, now - 5.0)
    assert lane.breaker.may_start(now)


# Marks


def test_with_nothing_in_hand_the_mark_is_where_the_lane_stands():
    assert make_lane(live=True, cursor=3).mark(head=9) == 9  # a live lane stands at the head
    assert make_lane(live=False, cursor=3).mark(head=9) == 3


@pytest.mark.parametrize(
    ("in_hand", "late", "done", "mark"),
    [
        ([5, 7], [], [], 4),
        ([7, 5], [], [], 4),  # taken out of order, from a gap
        ([5, 7], [], [5], 6),
        ([5, 7], [], [7], 4),
        ([5, 7], [], [5, 7], 9),
        ([5, 7], [5], [], 6),
        ([5, 7], [5, 7], [], 9),
        ([5, 7], [5], [7], 9),
        ([5, 7], [], [1, 2], 4),
    ],
)
def test_the_mark_lies_before_the_oldest_in_hand_that_is_not_late(in_hand, late, done, mark):
    lane = make_lane()
    take(lane, *in_hand)
    lane.late.update(late)
    assert lane.mark(head=9, done=set(done)) == mark


def test_a_mark_is_never_above_where_a_lagging_lane_stands():
    lane = make_lane(live=False, cursor=3)
    take(lane, 7)  # from a gap
    assert lane.mark(head=9) == 3


def test_late_ids_in_hand_are_holes_until_their_result_is_written():
    lane = make_lane()
    lane.add_hole(2)
    take(lane, 4, 5, 9)
    lane.late.update([4, 5])
    assert lane.open_late() == IdRanges([(2, 2), (4, 5)])
    assert lane.open_late(done={4}) == IdRanges([(2, 2), (5, 5)])
    assert lane.open_late(done={4, 5}) == IdRanges([(2, 2)])
    assert lane.holes == IdRanges([(2, 2)])  # asking changes nothing
    lane.settle(4)
    lane.settle(5)
    assert lane.open_late() == IdRanges([(2, 2)])


def test_settling_ends_everything_about_an_id():
    lane = make_lane()
    take(lane, 4)
    lane.late.add(4)
    lane.settle(4)
    lane.settle(4)  # whoever deleted the lane's events may have been first
    assert (lane.hands, lane.late) == ({}, set())


def test_holes_are_bounded():
    lane = make_lane()
    for n in range(HOLES_MAX + 50):
        lane.add_hole(10 * n)
    assert len(lane.holes) == HOLES_MAX
    assert all(10 * n in lane.holes for n in range(HOLES_MAX + 50))


@pytest.mark.parametrize("what", ["nothing", "lags", "hand", "row", "hole"])
def test_a_lane_with_nothing_to_say_is_settled(what):
    lane = make_lane(live=what != "lags")
    if what == "hand":
        take(lane, 1)
    elif what == "row":
        lane.row = LaneRow(lane.id, 0, IdRanges(), 0)
    elif what == "hole":
        lane.add_hole(1)
    assert lane.is_settled == (what == "nothing")


def lagging_with_a_row() -> Lane:
    """One that is behind at 10 with an event that takes long and one that it left out, as its row says."""
    lane = make_lane(live=False, cursor=10)
    take(lane, 7)
    lane.late.add(7)
    lane.add_hole(3)
    lane.backlog = 16
    lane.row = LaneRow(lane.id, 10, lane.open_late().copy(), 16)
    return lane


def test_the_row_of_a_lane_that_is_behind_stands_while_nothing_changes():
    lane = lagging_with_a_row()
    assert lane.row is not None
    assert lane.rests_on(lane.row)
    lane.settle(7)
    assert not lane.rests_on(lane.row)
    lane.row = LaneRow(lane.id, 10, lane.holes.copy(), 16)
    assert lane.rests_on(lane.row)


def it_lives(lane: Lane) -> None:
    lane.live = True


def it_orders(lane: Lane) -> None:
    lane.keys = Keys()


def it_read_on(lane: Lane) -> None:
    lane.cursor = 12


def it_went_back(lane: Lane) -> None:
    lane.go_back(5)


def it_ordered_and_held_one_back(lane: Lane) -> None:
    lane.queue.clear()  # 7 is in flight
    lane.set_ordered(True)
    assert lane.keys is not None
    lane.keys.hold(make_event(4, ordering_key="k"))
    lane.keys.hold_back(make_event(5, ordering_key="k"))
    lane.set_ordered(False)


def it_went_back_and_on(lane: Lane) -> None:
    lane.go_back(2)  # 3 isn't left out any more
    lane.cursor = 10


def it_took_more(lane: Lane) -> None:
    take(lane, 8)


def what_it_took_is_late_too(lane: Lane) -> None:
    take(lane, 8)
    lane.late.add(8)


def another_is_in_hand(lane: Lane) -> None:
    lane.settle(7)
    take(lane, 8)
    lane.late.add(8)


def it_left_out_one_more(lane: Lane) -> None:
    lane.add_hole(5)


def it_left_out_another(lane: Lane) -> None:
    lane.fill_holes(3, 3)
    lane.add_hole(4)


def a_hole_is_closed(lane: Lane) -> None:
    lane.fill_holes(3, 3)


@pytest.mark.parametrize("before", [True, False], ids=["once it did", "not looked at before"])
@pytest.mark.parametrize(
    "change",
    [
        it_lives, it_orders, it_ordered_and_held_one_back, it_read_on, it_went_back, it_went_back_and_on, it_took_more,
        what_it_took_is_late_too, another_is_in_hand, it_left_out_one_more, it_left_out_another, a_hole_is_closed,
    ],
)  # fmt: skip
def test_the_row_of_a_lane_doesnt_stand_when(change, before):
    lane = lagging_with_a_row()
    assert lane.row is not None
    if before:
        assert lane.rests_on(lane.row)
    change(lane)
    assert not lane.rests_on(lane.row)


@pytest.mark.parametrize(
    ("backlog", "off", "exactly_off"),
    [
        (16, False, False),
        (17, False, True),
        (18, False, True),
        (14, False, True),
        (19, True, True),
        (13, True, True),
        (0, True, True),
    ],
)
def test_what_waits_for_one_that_is_parked_is_written_when_it_is_off_by_an_eighth(backlog, off, exactly_off):
    lane = lagging_with_a_row()
    lane.backlog = backlog
    assert lane.row is not None
    assert lane.rests_on(lane.row)
    assert (lane.is_off(lane.row, exactly=False), lane.is_off(lane.row, exactly=True)) == (off, exactly_off)


# Falling behind


def test_a_live_lane_falls_behind_once():
    lane = make_lane(live=True)
    lane.fall_behind(7)
    assert (lane.live, lane.cursor, lane.moved) == (False, 7, 1)
    lane.fall_behind(20)  # it lags already: its place in the log is its own
    assert (lane.live, lane.cursor, lane.moved) == (False, 7, 1)


def test_a_queue_that_is_dropped_will_be_read_again():
    lane = make_lane(live=True)
    take(lane, 3, 4, 6, 8, 5)
    lane.queue.popleft()  # 3 is in flight
    lane.late.update((4, 6))
    lane.fall_behind(8)
    moved = lane.moved
    assert [event.id for event in lane.drop_queue()] == [4, 6, 8, 5]
    assert (lane.cursor, lane.holes, list(lane.hands)) == (4, IdRanges([(4, 4)]), [3]), "6 is met on the way"
    assert not lane.late
    assert not lane.queue
    assert lane.moved > moved  # a page under way must be thrown away
    assert lane.mark(head=20) == 2


def test_a_live_lanes_queue_is_not_dropped():
    """Its cursor means nothing, so nobody would read the events again."""
    lane = make_lane(live=True)
    take(lane, 3)
    with pytest.raises(AssertionError):
        lane.drop_queue()


class Log(RuleBasedStateMachine):
    """What the reader, the sender and the recorder do to a lane, in any order; ids come in order, or late out of gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = make_lane(live=True)
        self.head = 0
        self.position = 0
        self.gaps: set[int] = set()
        self.settled: set[int] = set()
        self.given: set[int] = set()
        self.in_flight: list[int] = []
        self.done: set[int] = set()

    @rule(missing=st.booleans())
    def head_moves(self, missing):
        self.head += 1
        if missing:
            self.gaps.add(self.head)
            return
        self.given.add(self.head)
        if self.lane.live:
            if self.lane.takes(0.0):
                take(self.lane, self.head)
            else:
                self.lane.fall_behind(self.head - 1)

    @precondition(lambda self: self.gaps)
    @rule(data=st.data(), fits=st.booleans())
    def gap_fills(self, data, fits):
        event_id = data.draw(st.sampled_from(sorted(self.gaps)))
        self.gaps.discard(event_id)
        self.given.add(event_id)
        if event_id in self.lane.holes or (not self.lane.live and event_id > self.lane.cursor):
            return
        if fits and self.lane.takes(0.0):
            take(self.lane, event_id)
            if event_id <= self.position:
                self.lane.late.add(event_id)
        else:
            self.lane.add_hole(event_id)
            self.lane.fall_behind(self.head)

    @precondition(lambda self: not self.lane.live)
    @rule()
    def page(self):
        for event_id in range(self.lane.cursor + 1, self.head + 1):
            if (
                event_id in self.given - self.settled
                and event_id not in self.lane.hands
                and event_id not in self.lane.holes
            ):
                if len(self.lane.queue) >= LIMITS.queue_max:
                    return
                take(self.lane, event_id)
            self.lane.cursor = event_id
        if not self.lane.holes:
            self.lane.live = True

    @precondition(lambda self: self.lane.holes)
    @rule()
    def hole(self):
        low, high = self.lane.holes.page(1)[0]
        for event_id in range(low, high + 1):
            self.lane.fill_holes(event_id, event_id)
            if event_id in self.given - self.settled and event_id not in self.lane.hands:
                take(self.lane, event_id)
                self.lane.late.add(event_id)

    @precondition(lambda self: self.lane.queue)
    @rule()
    def send(self):
        self.in_flight.append(self.lane.queue.popleft().id)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def answer(self, data):
        self.done.add(self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1))))

    @rule()
    def record(self):
        """A batch with its checkpoint: what is done counts as settled, and what the marks say must be true when it is committed."""
        mark, late = self.lane.mark(self.head, self.done), self.lane.open_late(self.done).copy()
        self.settled |= self.done
        self._judge(mark, late)
        self.lane.row = LaneRow(self.lane.id, mark, late, 0)
        for event_id in self.done:
            self.lane.settle(event_id)
        self.done = set()
        self.position = max(self.position, min(mark, self.head))

    @rule()
    def drop(self):
        self.lane.fall_behind(self.head)
        self.lane.drop_queue()

    def _judge(self, mark: int, late: IdRanges) -> None:
        for event_id in self.given - self.settled:
            assert event_id > mark or event_id in late, (event_id, self.lane)
        assert mark <= self.head

    @invariant()
    def nothing_is_settled_that_is_not(self):
        self._judge(self.lane.mark(self.head), self.lane.open_late())

    @invariant()
    def a_row_that_may_stand_is_true(self):
        if self.lane.row is not None and self.lane.rests_on(self.lane.row):
            self._judge(self.lane.row.settled, self.lane.row.holes)

    @invariant()
    def hands_hold_what_is_queued(self):
        assert {event.id for event in self.lane.queue} | set(self.in_flight) | self.done == set(self.lane.hands)
        assert self.lane.late <= set(self.lane.hands)


TestLog = Log.TestCase


@pytest.mark.parametrize(
    ("cursor", "after"),
    [(0, 10), (9, 10), (10, 10), (15, 15), (19, 19), (20, 30), (25, 30), (30, 30), (35, 35), (39, 39), (40, 100), (99, 100), (100, 100)],
)  # fmt: skip
def test_ids_that_no_subscription_is_valid_for_are_passed_over(cursor, after):
    subscriptions = (Subscription(1, "a.b", 10, 20), Subscription(2, "*", 12, 15), Subscription(3, "*", 30, 40))
    lane = make_lane(live=False, cursor=cursor, subscriptions=subscriptions)
    lane.pass_over(100)
    assert (lane.cursor, lane.moved) == (after, int(after != cursor))


def test_nothing_above_the_head_is_passed_over():
    lane = make_lane(live=False, cursor=5, subscriptions=(Subscription(1, "*", 50),))
    lane.pass_over(30)
    assert lane.cursor == 30
    lane = make_lane(live=True, cursor=5, subscriptions=())
    lane.pass_over(30)
    assert (lane.cursor, lane.moved) == (5, 0), "a live lane's cursor means nothing"


# Room for a live lane


def test_a_live_lane_takes_until_its_queue_is_full():
    lane = make_lane()
    take(lane, *range(LIMITS.queue_max - 1))
    assert lane.takes(0.0)
    take(lane, 99)
    assert not lane.takes(0.0)
    assert not lane.cant_send(0.0)  # full, so it lags; but its queue stays


@pytest.mark.parametrize(("now", "takes"), [(14.999, True), (15.0, False)])
def test_a_live_lane_takes_no_more_when_its_oldest_has_waited(now, takes):
    lane = make_lane()
    take(lane, 1, now=2.0)
    lane.queue.popleft()  # what is in flight doesn't count
    take(lane, 2, now=10.0)
    take(lane, 3, now=14.0)
    assert lane.takes(now) is takes


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, False),
        ({"state": EndpointState.PAUSED}, True),
        ({"state": EndpointState.DISABLED}, True),
        ({"state": EndpointState.DRAFT}, True),
        ({"state": EndpointState.DELETED}, True),
        ({"target": None}, True),
    ],
)
def test_a_lane_is_held_unless_it_is_live_and_usable(changes, held):
    lane = make_lane(**changes)
    assert (lane.held, lane.cant_send(0.0), lane.takes(0.0), lane.accepts(0.0)) == (held, held, not held, not held)
    assert lane.ready_at(3.0) == (INF if held else 3.0)
    assert (lane.room(0.0) == 0) == held
    assert (lane.retry_room(0.0) == 0) == held


@pytest.mark.parametrize(("now", "cant_send"), [(100.0, True), (103.999, True), (104.0, False), (105.0, False)])
def test_who_waits_for_more_than_a_second_cant_send(now, cant_send):
    broken, blocked = make_lane(), make_lane()
    open_breaker(broken, now=100.0)
    blocked.blocked_until = 105.0
    for lane in (broken, blocked):
        assert (lane.cant_send(now), lane.takes(now)) == (cant_send, not cant_send)


# Room for what is read again


def test_a_lagging_lane_reads_when_it_is_half_empty():
    lane = make_lane(live=False)
    rooms = []
    for event_id in range(LIMITS.queue_max + 1):
        rooms.append((lane.room(0.0), lane.accepts(0.0)))
        take(lane, event_id)
    assert rooms == [(8, True), (7, True), (6, True), (5, True), (4, True), (0, True), (0, True), (0, True), (0, False)]


@pytest.mark.parametrize(
    ("endpoint", "latency_s", "room"),
    [({}, 0.01, 500), ({}, 1.0, AHEAD_MIN), ({"rate_per_s": 1.0, "rate_burst": 1}, 0.01, AHEAD_MIN), ({"rate_per_s": 40.0}, 0.01, 200)],
    ids=["quick", "slow", "one a second", "forty a second"],
)  # fmt: skip
def test_a_lane_keeps_as_much_of_its_backlog_as_it_sends_in_seconds(endpoint, latency_s, room):
    """Forty that may send one a second had all of the memory that catching up may have, and others waited for minutes."""
    lane = Lane(make_endpoint(**endpoint), dataclasses.replace(LIMITS, queue_max=500), 0.0, live=False, cursor=0)
    lane.succeeded(0.0, latency_s, False)
    assert lane.room(0.0) == room


def test_a_lane_with_a_queue_of_one_still_reads():
    lane = Lane(make_endpoint(), dataclasses.replace(LIMITS, queue_max=1), 0.0, live=False, cursor=0)
    assert lane.room(0.0) == 1
    take(lane, 1)
    assert lane.room(0.0) == 0


def test_retries_are_read_when_few_are_left():
    lane = make_lane()
    rooms = []
    for event_id in range(RETRIES_MAX + 1):
        rooms.append(lane.retry_room(0.0))
        lane.retries.append(make_retry(event_id))
    assert rooms == [RETRIES_MAX - n if n <= RETRIES_MAX // 2 else 0 for n in range(RETRIES_MAX + 1)]


def test_an_open_breaker_wants_nothing_until_a_second_before_its_probe():
    lane = make_lane(live=False)
    open_breaker(lane, now=100.0)
    assert [(lane.accepts(now), lane.room(now), lane.retry_room(now)) for now in (103.9, 104.0, 105.0)] == [
        (False, 0, 0),
        (True, 1, 1),
        (True, 1, 1),
    ]


@pytest.mark.parametrize("has", ["queued", "retry", "in flight", "connecting"])
def test_a_half_open_breaker_wants_one_event_to_probe_with(has):
    lane = make_lane(live=False)
    half_open(lane, now=105.0)
    assert (lane.accepts(105.0), lane.room(105.0), lane.retry_room(105.0)) == (True, 1, 1)
    if has == "queued":
        take(lane, 1)
    elif has == "retry":
        lane.retries.append(make_retry(1))
    elif has == "in flight":
        lane.in_flight = 1
    else:
        lane.connecting = 1
    assert (lane.accepts(105.0), lane.room(105.0), lane.retry_room(105.0)) == (False, 0, 0)


# Turns


@pytest.mark.parametrize(
    ("queued", "retries", "turns"), [(20, 20, "qqqqrqqqqrqqqqr"), (20, 0, "qqqqqqq"), (0, 3, "rrr"), (2, 3, "qqrrr")]
)
def test_retries_take_one_turn_in_five_while_fresh_events_wait(queued, retries, turns):
    lane = make_lane()
    take(lane, *range(queued))
    lane.retries.extend(make_retry(100 + n) for n in range(retries))
    assert lane.work() == queued + retries
    taken = ""
    for _ in turns:
        retry = bool(lane.retries) and lane.retry_turn()
        (lane.retries if retry else lane.queue).popleft()
        taken += "r" if retry else "q"
    assert taken == turns


# When


def test_a_lane_is_ready_now():
    assert make_lane().ready_at(7.0) == 7.0


def test_a_lane_that_was_asked_to_wait_is_ready_then():
    lane = make_lane()
    lane.blocked_until = 30.0
    assert [lane.ready_at(now) for now in (7.0, 30.0, 31.0)] == [30.0, 30.0, 31.0]


def test_behind_an_open_breaker_a_lane_is_ready_when_the_probe_is():
    lane = make_lane()
    open_breaker(lane, now=100.0)
    assert [lane.ready_at(now) for now in (101.0, 106.0)] == [105.0, 106.0]
    lane.blocked_until = 110.0
    assert lane.ready_at(101.0) == 110.0
    lane.blocked_until = 103.0
    assert lane.ready_at(101.0) == 105.0
    assert lane.breaker.may_start(106.0)
    assert lane.ready_at(101.0) == 103.0  # half-open: time decides nothing, `may_start` does


def test_a_rate_limited_lane_is_ready_at_its_token():
    lane = make_lane(rate_per_s=4.0, rate_burst=1)
    assert lane.ready_at(0.0) == 0.0
    assert lane.bucket is not None
    assert lane.bucket.try_take(0.0)
    assert lane.ready_at(0.0) == 0.25
    lane.blocked_until = 30.0
    assert lane.ready_at(0.0) == 30.0


# In flight


def test_the_limit_grows_by_one_a_success_and_halves_at_a_failure():
    lane = make_lane()
    limits = [lane.limit()]
    for good in "++++-+--++":
        if good == "+":
            lane.succeeded(1.0, 0.1, probe=False)
        else:
            lane.failed(1.0, 0.1, probe=False)
        limits.append(lane.limit())
    assert limits == [2, 3, 4, 5, 6, 3, 4, 2, 1, 2, 3]


def test_the_limit_has_its_bounds():
    lane = make_lane(in_flight_max=5)
    for _ in range(20):
        lane.succeeded(1.0, 0.1, probe=False)
    assert lane.limit() == 5
    for _ in range(2):
        lane.failed(1.0, 0.1, probe=False)
    assert lane.limit() == 1


def test_a_breaker_lets_one_go_and_closes_into_a_slow_start():
    lane = make_lane()
    for _ in range(20):
        lane.succeeded(1.0, 0.1, probe=False)
    assert lane.limit() == LIMITS.in_flight_max
    half_open(lane, now=105.0)
    assert lane.limit() == 1
    assert lane.breaker.started()
    lane.succeeded(105.0, 0.1, probe=False)  # of a POST that began before: no news
    assert lane.limit() == 1
    lane.succeeded(105.1, 0.1, probe=True)
    assert (lane.breaker.state, lane.limit()) == (BreakerState.CLOSED, 1)
    lane.succeeded(105.2, 0.1, probe=False)
    assert lane.limit() == 2


def test_a_failure_says_whether_it_opened_the_breaker():
    lane = make_lane()
    assert [lane.failed(1.0, 0.1, probe=False) for _ in range(4)] == [False, False, True, False]


def test_a_quiet_lane_is_not_failing_and_a_failed_one_is_unless_it_succeeded_lately():
    lane = make_lane()
    assert lane.untried
    lane.succeeded(10.0, 0.1, probe=False)
    assert not lane.untried
    assert not lane.failing(10.0 + 100 * RECENT_S)
    lane.failed(20.0, 0.1, probe=False)
    assert not lane.failing(10.0 + RECENT_S)
    assert lane.failing(10.1 + RECENT_S)


def test_a_lane_that_was_failing_before_the_start_is_failing_until_it_succeeds():
    """Else all of them were new after a start, and the healthy, which are new then too, waited for their timeouts."""
    lane = Lane(make_endpoint(failing_since_us=5), LIMITS, 0.0, live=True, cursor=0)
    assert (lane.untried, lane.failing(0.0), lane.is_ordinary) == (False, True, False)
    lane.succeeded(1.0, 0.1, probe=False)
    lane.failing_since_us = None
    assert (lane.failing(1.0), lane.is_ordinary) == (False, True)


def test_a_lane_is_failing_after_three_failures_in_a_row():
    lane = Lane(make_endpoint(), dataclasses.replace(LIMITS, breaker=BreakerLimits()), 0.0, live=True, cursor=0)
    lane.succeeded(10.0, 0.1, probe=False)
    seen = []
    for _ in range(3):
        lane.failed(10.0, 0.1, probe=False)
        seen.append(lane.failing(10.0))
    assert seen == [False, False, True]


def test_slow_is_by_the_average():
    lane = make_lane()
    lane.succeeded(1.0, 2.0, probe=False)
    assert lane.latency_s > SLOW_S, "the first POST is the average"
    lane = make_lane()
    for latency_s in (0.0, 2.0, 2.0, 2.0):
        lane.succeeded(1.0, latency_s, probe=False)
    assert lane.latency_s <= SLOW_S  # 0.4, 0.72, 0.976
    lane.failed(1.0, 2.0, probe=False)
    assert lane.latency_s > SLOW_S
    for _ in range(2):
        lane.succeeded(1.0, 0.0, probe=False)
    assert lane.latency_s <= SLOW_S


# Configuration


def test_a_lane_without_limits_of_its_own_has_the_settings():
    lane = make_lane()
    assert (lane.in_flight_max, lane.retry_policy, lane.bucket) == (16, LIMITS.retry, None)


def test_a_lane_adopts_another_version_of_its_endpoint():
    lane = make_lane()
    for _ in range(20):
        lane.succeeded(1.0, 0.1, probe=False)
    lane.configure(
        make_endpoint(in_flight_max=3, retry_schedule_s=(7,), rate_per_s=5.0, state=EndpointState.PAUSED), now=9.0
    )
    assert (lane.in_flight_max, lane.limit(), lane.held) == (3, 3, True)
    assert lane.retry_policy == RetryPolicy((7,), 1_000)
    assert lane.bucket is not None
    assert (lane.bucket.rate_per_s, lane.bucket.burst, lane.bucket.stamp) == (5.0, 5, 9.0)
    lane.configure(make_endpoint(), now=9.0)
    assert (lane.in_flight_max, lane.retry_policy, lane.bucket, lane.held) == (16, LIMITS.retry, None, False)


@pytest.mark.parametrize(
    ("rate_per_s", "rate_burst", "burst"), [(5.0, None, 5), (0.2, None, 1), (5.0, 1, 1), (5.0, 50, 50)]
)
def test_the_burst_is_a_seconds_worth_unless_it_is_given(rate_per_s, rate_burst, burst):
    lane = make_lane(rate_per_s=rate_per_s, rate_burst=rate_burst)
    assert lane.bucket is not None
    assert lane.bucket.burst == burst


def test_saving_an_endpoint_again_gives_no_new_tokens():
    lane = make_lane(rate_per_s=1.0, rate_burst=2)
    assert lane.bucket is not None
    assert [lane.bucket.try_take(0.0) for _ in range(2)] == [True, True]
    lane.configure(make_endpoint(rate_per_s=1.0, rate_burst=2), now=0.0)
    assert lane.ready_at(0.0) == 1.0
    lane.configure(make_endpoint(rate_per_s=4.0, rate_burst=9), now=0.0)
    assert lane.ready_at(0.0) == 0.25


def test_the_request_head_is_rendered_once():
    assert make_lane().requests._head == (
        b"POST /hook?x=1 HTTP/1.1\r\nhost: a.example\r\nuser-agent: tests\r\ncontent-type: application/json\r\nwebhook-id: "
    )
    assert make_lane(target=None).held


def test_what_an_idle_endpoint_never_needs_is_made_at_its_first_use():
    lane = make_lane()
    made_when_used = ("queue", "late", "retries", "retry_hands", "runs_done", "requests")
    assert not [name for name in made_when_used if has(lane, name)]
    lane.queue.append(make_event(1))
    assert [event.id for event in lane.queue] == [1]
    assert not lane.late
    requests = lane.requests
    assert lane.requests is requests
    lane.configure(lane.endpoint, 0.0)
    assert not has(lane, "requests"), "made anew by the new configuration"
    with pytest.raises(AttributeError, match="no colour"):
        _ = lane.colour


def has(lane: Lane, name: str) -> bool:
    """Tell whether the slot is filled, without filling it."""
    try:
        object.__getattribute__(lane, name)
    except AttributeError:
        return False
    return True


def test_limits_come_from_the_settings():
    settings = Settings(
        queue_events_max=11, in_flight_max=12, retry_schedule_s="13,14", retry_age_max_s=15, breaker_failures=16, breaker_wait_s=17,
        breaker_wait_max_s=18, user_agent="19",
    )  # fmt: skip
    assert LaneLimits.of(settings) == LaneLimits(11, 12, RetryPolicy((13, 14), 15), BreakerLimits(16, 17, 18), "19")


def test_it_reads_well_in_a_failure():
    lane = make_lane(live=False, cursor=3)
    take(lane, 5)
    lane.add_hole(2)
    assert repr(lane) == "Lane(1 live lagging at 3, 1 queued, 0 in flight of 2, 1 in hand, 1 holes, closed)"
    assert "Lane(1 live live," in repr(make_lane())
