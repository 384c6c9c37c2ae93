"""What has priority goes first, but not always; and a lane that is behind reads it ahead."""

from dispatcher.engine.lane import URGENT_MAX, URGENT_TURN
from dispatcher.engine.lanes import Lanes, Memory
from tests.engine.build import LIMITS, make_endpoint, make_event, make_lane


def event(event_id: int, priority: int | None = None):
    return make_event(event_id, priority=priority)


def test_the_highest_goes_first_and_within_it_the_oldest():
    lane = make_lane()
    for n, priority in enumerate((None, 1, 5, 0, -9, 5, 1)):
        lane.take(event(n, priority), 0.0)
    assert (lane.queued(), lane.work()) == (7, 7)
    assert [lane.next_fresh().id for _ in range(7)] == [2, 5, 1, 6, 0, 3, 4]


def test_one_turn_in_five_is_for_the_others():
    lane = make_lane()
    for n in range(20):
        lane.take(event(n, 1), 0.0)
        lane.take(event(100 + n), 0.0)
    turns = [lane.next_fresh().id >= 100 for _ in range(4 * URGENT_TURN)]
    assert turns == [n % URGENT_TURN == 0 for n in range(1, 4 * URGENT_TURN + 1)]


def test_a_full_queue_is_full_of_both():
    lane = make_lane()
    for n in range(LIMITS.queue_max):
        assert lane.takes(0.0)
        lane.take(event(n, n % 2), 0.0)
    assert not lane.takes(0.0)


def test_what_was_about_to_be_sent_is_the_first_again():
    lane = make_lane()
    for n, priority in ((1, None), (2, None), (3, 2), (4, 2)):
        lane.take(event(n, priority), 0.0)
    for expected in (3, 4, 1, 2):
        first = lane.next_fresh()
        lane.put_back(first)
        assert (first.id, lane.next_fresh().id) == (expected, expected)


def test_a_lane_that_is_behind_has_room_for_them_though_its_queue_is_full():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    for n in range(1, LIMITS.queue_max + 1):
        lanes.take(lane, event(n), 0.0)
    lanes.fall_behind(lane, 8, drop=False)
    assert lane.urgent_room(0.0) == 0, "none has passed"
    lane.passed_by(event(9))
    assert lane.urgent_room(0.0) == 0
    lane.passed_by(event(30, 1))
    lane.passed_by(event(20, 1))
    assert (lane.urgent_after, lane.urgent_room(0.0), lane.room(0.0)) == (19, URGENT_MAX, 0)
    lanes.take(lane, event(20, 1), 0.0)
    assert lane.mark(30) == 0, "it is above the cursor, and what is queued below holds the mark"
    for n in range(1, LIMITS.queue_max + 1):
        lane.settle(n)
    assert lane.mark(30) == 8


def test_what_is_let_go_of_is_read_ahead_again():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    for n, priority in ((5, None), (6, 1), (7, None)):
        lanes.take(lane, event(n, priority), 0.0)
    lanes.fall_behind(lane, 9, drop=True)
    assert (lane.cursor, lane.urgent_after, lane.queued(), lanes.memory.events) == (4, 4, 0, 0)


def test_what_was_read_ahead_and_let_go_of_alone_is_read_ahead_again():
    """It is above the cursor, which doesn't move for it: it waited for all that is before it."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=False, cursor=4)
    lane.urgent_after = None
    for n in (40, 30):
        lanes.take(lane, event(n, 1), 0.0)
    lanes.fall_behind(lane, 50, drop=True)
    assert (lane.cursor, lane.urgent_after, lane.queued()) == (4, 29, 0)
