"""All lanes: the routes to them, the memory they hold, and what becomes of a lane when its endpoint changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.breaker import BreakerState
from dispatcher.domain.endpoint import FOREVER, EndpointState, Subscription
from dispatcher.domain.filters import Payloads
from dispatcher.domain.ranges import IdRanges
from dispatcher.engine import lanes as lanes_module
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import CROWD, Lanes, Memory, is_wanted, wanting
from tests.engine.build import LIMITS, make_endpoint, make_event, make_retry

no_deadline = settings(deadline=None)  # a busy machine is no defect


def make_lanes(*endpoints, live: bool = True) -> Lanes:
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    for endpoint in endpoints:
        lanes.add(endpoint, 0.0, live=live, cursor=0)
    return lanes


def routed(lanes: Lanes, event_type: str, event_id: int = 1, account_id: str = "acc") -> list[int]:
    return [lane.id for lane in wanting(lanes.routes(account_id, event_type), make_event(event_id), Payloads())]


# Routes


def test_events_go_to_the_lanes_whose_patterns_match():
    lanes = make_lanes(
        make_endpoint(1, "*"),
        make_endpoint(2, "a.*"),
        make_endpoint(3, "a.b", "c.d"),
        make_endpoint(4, "*", account_id="other"),
    )
    for event_type, ids in {"a.b": [1, 2, 3], "a.x": [1, 2], "c.d": [1, 3], "x.y": [1]}.items():
        assert routed(lanes, event_type) == ids
        assert routed(lanes, event_type) == ids  # from the cache
    assert routed(lanes, "a.b", account_id="other") == [4]
    assert routed(lanes, "a.b", account_id="nobody") == []


def test_a_lane_gets_an_event_once_however_many_subscriptions_match():
    lanes = make_lanes(make_endpoint(1, "*", "a.*", "a.b"), make_endpoint(2, "a.b", "*"))
    assert routed(lanes, "a.b") == [1, 2]


def test_a_subscription_counts_for_its_ids_only():
    lanes = make_lanes(
        make_endpoint(1, Subscription(1, "*", 10, 20), Subscription(2, "*", 30, FOREVER)),
        make_endpoint(2, Subscription(3, "a.*", 15)),
    )
    assert {event_id: routed(lanes, "a.b", event_id) for event_id in (10, 11, 15, 16, 20, 21, 30, 31)} == {
        10: [], 11: [1], 15: [1], 16: [1, 2], 20: [1, 2], 21: [2], 30: [2], 31: [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("event_type", "payload", "ids"),
    [
        ("endpoint.disabled", b'{"endpoint": {"id": 1}}', [2]),
        ("endpoint.recovered", b'{"endpoint": {"id": 2}}', [1]),
        ("endpoint.recovered", b'{"endpoint": {"id": 3}}', [1, 2]),
        ("endpoint.events_expired", b'{"endpoint": {"id": 1}}', [1, 2]),
    ],
)
def test_an_endpoint_is_not_told_of_itself(event_type, payload, ids):
    lanes = make_lanes(make_endpoint(1), make_endpoint(2))
    assert [lane.id for lane in lanes.wanting(make_event(5, "acc", event_type, payload))] == ids


def test_changed_endpoints_are_routed_anew():
    lanes = make_lanes(make_endpoint(1, "a.b"))
    assert (routed(lanes, "a.b"), routed(lanes, "c.d")) == ([1], [])
    lanes.configure(make_endpoint(1, "c.d"), 0.0, head=0)
    assert (routed(lanes, "a.b"), routed(lanes, "c.d")) == ([], [1])
    lanes.configure(make_endpoint(2, "*"), 0.0, head=0)
    assert (routed(lanes, "a.b"), routed(lanes, "c.d")) == ([2], [1, 2])
    lanes.remove(1)
    assert routed(lanes, "c.d") == [2]
    lanes.remove(2)
    assert routed(lanes, "c.d") == []


def test_an_endpoint_that_changes_its_account_is_routed_there():
    lanes = make_lanes(make_endpoint(1), make_endpoint(2))
    assert (routed(lanes, "a.b"), routed(lanes, "a.b", account_id="other")) == ([1, 2], [])
    lanes.configure(make_endpoint(1, account_id="other"), 0.0, head=0)
    assert (routed(lanes, "a.b"), routed(lanes, "a.b", account_id="other")) == ([2], [1])
    assert [lane.id for lane in lanes.of_account("acc")] == [2]
    assert [lane.id for lane in lanes.of_account("other")] == [1]


def test_types_without_end_are_forgotten():
    lanes = make_lanes(make_endpoint(1, "a.b"))
    for n in range(lanes_module.TYPES_CACHED_MAX + 10):
        assert routed(lanes, f"type.x{n}") == []
        assert len(lanes._routes["acc"]) <= lanes_module.TYPES_CACHED_MAX
    assert routed(lanes, "a.b") == [1]


def test_accounts_without_endpoints_are_not_remembered():
    lanes = make_lanes(make_endpoint(1))
    for n in range(10):
        lanes.routes(f"nobody {n}", "a.b")
    assert not lanes._routes


patterns = st.sampled_from(["*", "a.*", "a.b", "c.*", "c.d"])
subscriptions = st.builds(Subscription, st.integers(1, 99), patterns, st.integers(0, 5), st.integers(3, 9))


@no_deadline
@given(st.lists(st.lists(subscriptions, min_size=1, max_size=3), max_size=4), st.sampled_from(["a.b", "c.d", "c.x"]))
def test_routes_are_what_subscriptions_match(subscribed, event_type):
    endpoints = [make_endpoint(n, *them) for n, them in enumerate(subscribed)]
    lanes = make_lanes(*endpoints)
    for event_id in range(11):
        assert routed(lanes, event_type, event_id) == [
            endpoint.id
            for endpoint in endpoints
            if any(s.matches(event_type, event_id) for s in endpoint.subscriptions)
        ]


# Memory


def test_an_event_counts_once_however_many_lanes_hold_it():
    lanes = make_lanes(make_endpoint(1), make_endpoint(2))
    event = make_event(1, payload=b"12345")
    for lane in lanes:
        lanes.take(lane, event, 0.0)
    assert (lanes.memory.events, lanes.memory.bytes, event.holders) == (1, 5, 2)
    lanes.memory.let_go(event)
    assert (lanes.memory.events, lanes.memory.bytes) == (1, 5)
    lanes.memory.let_go(event)
    assert (lanes.memory.events, lanes.memory.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("payloads", "full"), [([1] * 2, False), ([1] * 3, True), ([99], False), ([100], True), ([60, 40], True)]
)
def test_memory_has_two_bounds(payloads, full):
    memory = Memory(events_max=3, bytes_max=100)
    for n, size in enumerate(payloads):
        memory.hold(make_event(n, payload=bytes(size)))
    assert memory.is_full is full


def test_taking_an_event():
    lanes = make_lanes(make_endpoint(1))
    (lane,) = lanes
    lanes.take(lane, make_event(7), 3.0)
    assert ([event.id for event in lane.queue], lane.hands) == ([7], {7: 3.0})
    assert list(lanes.unsettled) == [lane]


@pytest.mark.parametrize(
    ("queues", "crowds"),
    [([], []), ([0, 0], []), ([4 * 50 + CROWD, 0, 1], []), ([1] * 20 + [200, 0, 300], [22, 20]), ([200, 201], [])],
)
def test_the_lanes_with_crowds(queues, crowds):
    lanes = make_lanes(*(make_endpoint(n) for n in range(len(queues))))
    for lane, length in zip(list(lanes), queues, strict=True):
        for n in range(length):
            lanes.take(lane, make_event(100 * lane.id + n), 0.0)
    assert [lane.id for lane in lanes.crowds()] == crowds


# Falling behind


def busy(live: bool = True) -> tuple[Lanes, Lane]:
    """Two events in the queue, one of them late, one in flight, and two retries."""
    lanes = make_lanes(make_endpoint(1), live=live)
    (lane,) = lanes
    for event_id in (3, 5, 8):
        lanes.take(lane, make_event(event_id, payload=b"1234567890"), 0.0)
    lane.queue.popleft()
    lane.late.add(5)
    for retry in (make_retry(1), make_retry(2, run=4)):
        lanes.memory.hold(retry.event)
        lane.retries.append(retry)
        lane.retry_hands.add((retry.event.id, retry.run))
    lane.retry_hands.add((99, 0))  # in flight
    lane.next_retry_at = 123
    assert lanes.memory.events == 5
    return lanes, lane


def test_a_lane_that_falls_behind_may_keep_what_it_has():
    lanes, lane = busy()
    lanes.unsettled.clear()
    lanes.fall_behind(lane, 20, drop=False)
    assert (lane.live, lane.cursor, len(lane.queue), len(lane.retries)) == (False, 20, 2, 2)
    assert (lanes.memory.events, list(lanes.unsettled), lane.next_retry_at) == (5, [lane], 123)


@pytest.mark.parametrize(("live", "cursor"), [(True, 7), (False, 0)])
def test_a_lane_that_lets_go_reads_all_of_it_again(live, cursor):
    lanes, lane = busy(live)
    lanes.fall_behind(lane, 20, drop=True)
    assert (lane.live, lane.cursor, lane.holes) == (False, cursor, IdRanges([(5, 5)]))
    assert (lane.work(), list(lane.hands), lane.retry_hands) == (0, [3], {(99, 0)})
    assert lane.next_retry_at == 0
    assert (lanes.memory.events, lanes.memory.bytes) == (1, 10)  # what is in flight


def test_without_retries_in_hand_their_next_time_stays():
    lanes = make_lanes(make_endpoint(1))
    (lane,) = lanes
    lane.next_retry_at = 123
    lanes.fall_behind(lane, 20, drop=True)
    assert lane.next_retry_at == 123


# Configuration


def test_a_new_endpoint_begins_where_its_first_subscription_does():
    lanes = make_lanes()
    lane = lanes.configure(make_endpoint(1, Subscription(7, "a.*", 30), Subscription(8, "c.*", 20)), 0.0, head=50)
    assert lanes.get(1) is lane
    assert (lane.live, lane.cursor) == (False, 20)
    assert (list(lanes.unsettled), lanes.taking_up) == ([lane], set())


@pytest.mark.parametrize("subscriptions", [(), (Subscription(7, "*", 90),)])
def test_a_new_endpoint_begins_no_later_than_the_head(subscriptions):
    lane = make_lanes().configure(make_endpoint(1, subscriptions=subscriptions), 0.0, head=50)
    assert (lane.live, lane.cursor) == (False, 50)


@pytest.mark.parametrize(
    ("live", "cursor", "since", "after"),
    [(True, 0, 30, 30), (False, 40, 30, 30), (False, 20, 30, 20), (True, 0, 90, 50)],
)
def test_a_subscription_that_is_not_taken_up_sends_its_lane_back(live, cursor, since, after):
    lanes = make_lanes()
    lane = lanes.add(make_endpoint(1), 0.0, live=live, cursor=cursor)
    moved = lane.moved
    changed = make_endpoint(
        1, "*", Subscription(7, "a.*", since, taken_up=False), Subscription(8, "b.*", 95, taken_up=False)
    )
    lanes.configure(changed, 0.0, head=50)
    assert (lane.live, lane.cursor) == (False, after)
    assert lane.moved > moved  # a page under way must be thrown away
    assert (lanes.taking_up, list(lanes.unsettled)) == ({7, 8}, [lane])


def test_a_subscription_that_is_being_taken_up_sends_nobody_back_again():
    lanes = make_lanes(make_endpoint(1))
    changed = make_endpoint(1, Subscription(7, "*", 30, taken_up=False))
    lane = lanes.configure(changed, 0.0, head=50)
    lane.cursor = 45
    lanes.configure(changed, 0.0, head=50)
    assert lane.cursor == 45
    lanes.taking_up.clear()  # written
    lanes.configure(make_endpoint(1, Subscription(7, "*", 30)), 0.0, head=50)
    assert (lane.cursor, lanes.taking_up) == (45, set())


def test_a_change_that_adds_no_subscription_moves_nobody():
    lanes, lane = busy()
    lanes.unsettled.clear()
    assert lanes.configure(make_endpoint(1, rate_per_s=3.0), 0.0, head=50) is lane
    assert (lane.live, lane.moved, len(lane.queue), lane.bucket is not None) == (True, 0, 2, True)
    assert not lanes.unsettled


@pytest.mark.parametrize(
    "changes", [{"state": EndpointState.PAUSED}, {"state": EndpointState.DISABLED}, {"target": None}]
)
def test_a_lane_that_is_held_lets_go_of_everything(changes):
    lanes, lane = busy()
    lanes.configure(make_endpoint(1, **changes), 0.0, head=50)
    assert (lane.live, lane.cursor, lane.work(), lanes.memory.events) == (False, 7, 0, 1)
    lanes.configure(make_endpoint(1), 0.0, head=60)
    assert (lane.live, lane.cursor, lane.held) == (False, 7, False)  # reads on from there


def test_a_lane_that_is_put_live_again_begins_anew():
    lanes = make_lanes(make_endpoint(1, failing_since_us=7))
    lane = lanes.get(1)
    assert lane is not None
    for _ in range(3):
        lane.failed(0.0, 0.1, probe=False)
    lanes.configure(make_endpoint(1, failing_since_us=7, rate_per_s=3.0), 0.0, head=50)
    assert (lane.failing_since_us, lane.breaker.state) == (7, BreakerState.OPEN), "an edit changes nothing"
    lanes.configure(make_endpoint(1, state=EndpointState.DISABLED, failing_since_us=7), 0.0, head=50)
    assert lane.failing_since_us == 7
    lanes.configure(make_endpoint(1), 0.0, head=50)
    assert (lane.failing_since_us, lane.breaker.state, lane.in_flight_limit) == (None, BreakerState.CLOSED, 2)


def test_a_breaker_outlives_a_pause_while_its_posts_are_in_flight():
    lanes = make_lanes(make_endpoint(1))
    lane = lanes.get(1)
    assert lane is not None
    breaker, lane.in_flight = lane.breaker, 1
    lanes.configure(make_endpoint(1, state=EndpointState.PAUSED), 0.0, head=50)
    lanes.configure(make_endpoint(1), 0.0, head=50)
    assert lane.breaker is breaker


def test_what_is_queued_and_no_longer_subscribed_is_let_go_of():
    lanes = make_lanes(make_endpoint(1, Subscription(7, "a.*", 0), Subscription(8, "c.*", 0)))
    lane = lanes.get(1)
    assert lane is not None
    for event_id in (5, 6, 9):
        lanes.take(lane, make_event(event_id), 0.0)
    lanes.configure(make_endpoint(1, Subscription(7, "a.*", 0, 9), Subscription(8, "c.*", 0, 5)), 0.0, head=50)
    assert (lane.live, len(lane.queue)) == (True, 3), "all of it is still owed"
    lanes.configure(make_endpoint(1, Subscription(7, "a.*", 0, 6), Subscription(8, "c.*", 0, 5)), 0.0, head=50)
    assert (lane.live, len(lane.queue), lane.cursor, lanes.memory.events) == (False, 0, 4, 0)


def test_a_removed_endpoint_keeps_only_what_is_in_flight():
    lanes, lane = busy()
    other = lanes.configure(make_endpoint(2, Subscription(9, "*", 0, taken_up=False)), 0.0, head=50)
    lanes.configure(make_endpoint(1, Subscription(7, "*", 30, taken_up=False)), 0.0, head=50)
    assert lanes.remove(1) is lane
    assert (lane.gone, lane.work(), lanes.memory.events) == (True, 0, 1)
    assert lanes.get(1) is None
    assert (list(lanes), len(lanes), list(lanes.of_account("acc"))) == ([other], 1, [other])
    assert list(lanes.unsettled) == [other]
    assert (lanes.rows_gone, lanes.taking_up) == ({1}, {9})
    assert lanes.remove(1) is None


def test_lanes_are_found_by_their_id():
    lanes = make_lanes(make_endpoint(1), make_endpoint(2))
    assert [lane.id for lane in lanes] == [1, 2]
    found = lanes.get(2)
    assert found is not None
    assert found.id == 2
    assert list(lanes.of_account("nobody")) == []


@pytest.mark.parametrize("state", EndpointState)
def test_a_draft_wants_no_lane(state):
    assert is_wanted(make_endpoint(state=state)) == (state is not EndpointState.DRAFT)


def test_who_reads_old_events_leaves_room_for_the_head():
    memory = Memory(events_max=80, bytes_max=3_200)
    assert (memory.head_events, memory.head_bytes) == (10, 100)
    for held, leaves in ((39, 4), (40, 3), (59, 2), (60, 1), (79, 0)):
        memory.events = held
        assert (memory.leaves(leaves), memory.leaves(leaves + 1)) == (True, False)
    memory.events, memory.bytes = 0, 2_900
    assert (memory.leaves(2), memory.leaves(3)) == (True, False)
    memory.bytes = 3_200
    assert not memory.leaves(0)
    assert memory.is_full
