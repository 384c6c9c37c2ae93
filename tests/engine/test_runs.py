"""A run in its lane: what it takes, gives back and has settled; and its place among retries and fresh events."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.engine.lane import RETRY_SHARE, Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.runs import LaneRun
from dispatcher.ports import DueRetry
from tests.engine.build import LIMITS, make_endpoint, make_event, make_lane, make_retry

no_deadline = settings(deadline=None)  # a busy machine is no defect


def spec(run_id: int = 1, *, after: int = 0, upto: int = 100, **changes: object) -> Run:
    values = {"patterns": ("*",), "only_failed": False, "rate_per_s": None, "state": RunState.RUNNING, "settled": after}
    return Run(id=run_id, source=RunSource.LOG, after_id=after, upto_id=upto, **(values | changes))  # type: ignore[arg-type]


def take(lane: Lane, run: LaneRun, *ids: int) -> None:
    for event_id in ids:
        run.hands[event_id] = None
        lane.retries.append(DueRetry(make_event(event_id), run.spec.id, 1, 0))
    run.cursor = max(run.cursor, *ids)


def lane_with(*specs: Run) -> Lane:
    return make_lane(runs=specs)


def test_the_mark_is_below_whatever_is_in_hand():
    run = LaneRun(spec(upto=10, settled=3))
    assert run.mark() == 3
    run.cursor = 9
    run.hands = {7: None, 5: None, 9: None}
    assert run.mark() == 4
    assert run.mark({5}) == 6
    assert run.mark({5, 7, 9}) == 9
    assert run.mark({5, 9}) == 6


def test_it_has_ended_when_its_range_is_read_and_its_hands_are_empty():
    run = LaneRun(spec(upto=10, after=3))
    run.hands = {8: None}
    run.cursor = 10
    assert not run.row(1, set()).ended
    row = run.row(1, {8})
    assert (row.ended, row.settled, row.canceled) == (True, 10, False)


def test_a_canceled_one_ends_once_nothing_of_it_is_in_flight():
    run = LaneRun(spec(upto=10, state=RunState.CANCELED))
    run.cursor, run.hands = 6, {6: None}
    assert not run.row(1, set()).ended
    row = run.row(1, {6})
    assert (row.ended, row.canceled, row.settled) == (True, True, 6)


@pytest.mark.parametrize(
    ("rate", "room", "rows"), [(None, 50, 50), (200.0, 50, 20), (200.0, 5, 5), (1.0, 50, 1), (0.1, 50, 1)]
)
def test_a_page_is_a_tenth_of_a_second_of_the_rate(rate, room, rows):
    assert LaneRun(spec(rate_per_s=rate)).page_rows(room) == rows


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 20)), min_size=1, max_size=50))
@no_deadline
def test_it_never_goes_faster_than_its_rate_allows(pages):
    """Pages as they come, each taken no earlier than allowed: at most rate × time and one page ahead."""
    run, now, total = LaneRun(spec(rate_per_s=20.0)), 100.0, 0
    for wait, events in pages:
        now = max(now + wait, run.next_at)
        run.took(events, now)
        total += events
        assert total <= 20.0 * (now - 100.0) + 20 + 1e-6, "what is ahead is the page just taken"


def test_what_is_given_back_is_read_again():
    run = LaneRun(spec())
    run.cursor, run.hands = 50, {30: None, 40: None}
    run.give_back(40)
    assert (run.cursor, list(run.hands), run.moved) == (39, [30], 1)
    run.give_back(30)
    assert (run.cursor, run.mark()) == (29, 29)


def test_runs_take_turns():
    lane = lane_with(spec(1), spec(2), spec(3, state=RunState.PAUSED), spec(4, after=100))
    assert [lane.next_run(0.0).spec.id for _ in range(4)] == [1, 2, 1, 2], "neither paused nor read to its end"
    lane.runs[1].next_at = 5.0
    assert [lane.next_run(0.0).spec.id for _ in range(2)] == [2, 2]
    lane.runs[2].next_at = 7.0
    assert lane.next_run(0.0) is None
    assert lane.next_run_at() == 5.0
    assert lane_with(spec(3, state=RunState.PAUSED)).next_run_at() == float("inf")


def test_a_queue_that_is_dropped_goes_back_to_run_and_table():
    lane = lane_with(spec(7))
    run = lane.runs[7]
    take(lane, run, 11, 12)
    lane.retries.append(make_retry(5))
    lane.retry_hands.add((5, 0))
    lane.retries.append(DueRetry(make_event(6), 7, 2, 1))
    lane.retry_hands.add((6, 7))
    assert [retry.event.id for retry in lane.drop_retries()] == [11, 12, 5, 6]
    assert (run.cursor, run.hands, lane.retry_hands, lane.next_retry_at) == (10, {}, set(), 0)


def test_a_pause_takes_back_the_runs_own_only():
    running, paused = spec(7), spec(8)
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(runs=(running, paused)), 0.0, live=True, cursor=0)
    for run_id, event_id in ((7, 1), (8, 2), (7, 3)):
        take(lane, lane.runs[run_id], event_id)
    for retry in lane.retries:
        lanes.memory.hold(retry.event)
    stopped = dataclasses.replace(paused, state=RunState.PAUSED, attempted=99)
    lanes.configure(make_endpoint(runs=(running, stopped)), 0.0, 0)
    assert [retry.event.id for retry in lane.retries] == [1, 3]
    assert lanes.memory.events == 2
    assert lane.idle_runs() == [8]
    assert lane.runs[8].attempted == 0, "how far it is, its lane knows better"
    lane.next_retry_at = None
    lanes.configure(make_endpoint(runs=(running, paused)), 0.0, 0)
    assert (lane.idle_runs(), lane.next_retry_at) == ([], 0)


def test_a_finished_run_isnt_taken_up_again():
    lane = lane_with(spec(7))
    del lane.runs[7]
    lane.runs_done.append(7)
    lane.configure(make_endpoint(runs=(spec(7), spec(9))), 0.0)
    assert list(lane.runs) == [9]


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 16])
def test_the_lower_class_leaves_room_in_flight(limit):
    lane = lane_with(spec())
    lane.in_flight_limit = limit
    take(lane, lane.runs[1], *range(1, 21))
    lane.queue.append(make_event(50))
    allowed = max(1, int(limit * RETRY_SHARE))
    lane.low_in_flight = allowed - 1
    assert lane.work() == 21
    lane.low_in_flight = allowed
    assert lane.work() == 1, "the fresh one only"
    assert not any(lane.retry_turn() for _ in range(20))


def test_another_rate_holds_at_once():
    """A run of one event in a thousand seconds that was set to a hundred a second waited for what was left of the thousand."""
    lane = lane_with(spec(7, rate_per_s=0.001))
    lane.runs[7].took(1, 100.0)
    lane.configure(make_endpoint(runs=(spec(7, rate_per_s=0.001, attempted=1),)), 101.0)
    assert lane.next_run_at() == 1_100.0
    lane.configure(make_endpoint(runs=(spec(7, rate_per_s=100.0),)), 101.0)
    assert lane.next_run_at() <= 101.0


def test_a_canceled_one_waits_for_its_retry_in_flight():
    """Forgotten before, it did not count what came of it."""
    run = LaneRun(spec(state=RunState.CANCELED))
    assert not run.row(1, set(), is_busy=True).ended
    assert run.row(1, set()).ended
