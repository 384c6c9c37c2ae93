"""The recorder's account of what is in hand, without a store."""

import asyncio

import pytest

from dispatcher.domain.outcome import DELIVER, Outcome
from dispatcher.domain.ranges import IdRanges
from dispatcher.engine import gaps as gaps_module
from dispatcher.engine import recorder as recorder_module
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.recorder import BACKLOG_TURNS, Recorder
from dispatcher.engine.stats import BUCKETS, LONGEST_US, MINUTE_US
from dispatcher.ports import Batch, CheckpointWrite, Recorded
from tests.engine.build import LIMITS, make_endpoint, make_event
from tests.engine.test_runs import spec


@pytest.mark.parametrize(("number", "stays"), [(1, True), (2, False)])
async def test_a_runs_retry_stays_in_hand_when_the_attempt_before_it_is_released(number, stays):
    """A read that took as long as the retry had to wait brings it before what was committed meanwhile is released: it was sent twice."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(runs=(spec(7),)), 0.0, live=True, cursor=10)
    recorder = Recorder(
        None, lanes, Clock(lambda: 1.0), Counters(), epoch=1, position=10, rows_max=10, wait_s=0.01, unrecorded_max=10
    )
    lane.runs[7].hands[5] = None
    lane.retry_hands.add((5, 7))
    recorder._release([Delivery(lambda delivery, outcome: None, lane, make_event(5), 7, number, 0)])
    assert ((5, 7) in lane.retry_hands, 5 in lane.runs[7].hands) == (stays, not stays)


async def test_at_a_stop_the_minute_ends_with_the_last_batch():
    """Ended with the first, its row was there when the others' results came, and they were not counted."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=10)
    recorder = Recorder(
        None, lanes, Clock(lambda: 1.0), Counters(), epoch=1, position=10, rows_max=1, wait_s=0.01, unrecorded_max=10
    )
    results = [delivered(lane, event_id) for event_id in (1, 2)]
    recorder.stop()
    recorder._results = results[1:]
    assert recorder._build(results[:1], checkpoint=True).stats == []
    recorder._results = []
    [row] = recorder._build(results[1:], checkpoint=True).stats
    assert row.delivered == 2


async def test_each_minute_has_its_own_counts():
    """They are of one instance: a row that waits to be written must not change with it, nor a minute begin with another's. A clock that is set
    back begins a row too, and takes none that is with the writer already."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=10)
    recorder, rows = make_recorder(lanes), []
    for minute, count, checkpoint in ((1, 3, False), (2, 2, False), (3, 0, True), (2, 1, False), (4, 0, True)):
        recorder._clock.sync(minute * MINUTE_US)
        rows += recorder._build([delivered(lane, n) for n in range(count)], checkpoint=checkpoint).stats
    assert [(row.minute, row.delivered, sum(row.durations)) for row in rows] == [(1, 3, 3), (2, 2, 2), (2, 1, 1)]


def delivered(lane: Lane, event_id: int) -> Delivery:
    result = Delivery(lambda delivery, outcome: None, lane, make_event(event_id), 0, 1, 0)
    result.started_us, result.duration_us, result.outcome, result.decision = 0, 1_000, Outcome(None, 204), DELIVER
    return result


def make_recorder(lanes: Lanes, *, head: int = 20, position: int = 15) -> Recorder:
    recorder = Recorder(
        None,
        lanes,
        Clock(lambda: 1.0),
        Counters(),
        epoch=1,
        position=position,
        rows_max=10,
        wait_s=0.01,
        unrecorded_max=10,
    )
    recorder.head = lambda: head
    return recorder


async def commit_a_checkpoint(recorder: Recorder) -> CheckpointWrite:
    write = await recorder._checkpoint([])
    recorder._committed([], Batch(1, checkpoint=write), Recorded([], []))
    return write


async def turns_of_a_checkpoint(lanes: Lanes) -> tuple[int, CheckpointWrite]:
    checkpoint = asyncio.create_task(make_recorder(lanes)._checkpoint([]))
    turns = 0
    while not checkpoint.done():
        await asyncio.sleep(0)
        turns += 1
    return turns, checkpoint.result()


async def test_what_waits_for_a_parked_lane_is_written_in_its_turn_and_at_the_end():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=False, cursor=10)
    lanes.unsettled[lane] = None
    recorder = make_recorder(lanes)
    lane.backlog = 16
    assert [row.backlog for row in (await commit_a_checkpoint(recorder)).lanes] == [16]
    written = []
    for _ in range(2 * BACKLOG_TURNS):
        lane.backlog = 17 + len(written)
        written += [row.backlog for row in (await commit_a_checkpoint(recorder)).lanes]
    assert written == [17, 18], "once each time that all have had their turn"
    lane.backlog = 20
    recorder.stop()
    assert [row.backlog for row in (await commit_a_checkpoint(recorder)).lanes] == [20]


@pytest.mark.parametrize(("lanes", "turns"), [(4, 4), (20, 5), (100, 20)])
async def test_a_checkpoints_turns_grow_with_the_lanes_up_to_five_times(monkeypatch, lanes, turns):
    monkeypatch.setattr(recorder_module, "CHECKPOINT_TURN", 1)
    many = Lanes(LIMITS, Memory(100, 10_000))
    for n in range(lanes):
        many.unsettled[many.add(make_endpoint(n + 1), 0.0, live=True, cursor=10)] = None
    assert (await turns_of_a_checkpoint(many))[0] == turns


async def test_what_many_lanes_say_is_compared_in_turns_too(monkeypatch):
    monkeypatch.setattr(recorder_module, "CHECKPOINT_TURN", 5)
    many = Lanes(LIMITS, Memory(100, 10_000))
    for n in range(4):  # 5 of the work each to look at, and 2 to compare
        many.unsettled[many.add(make_endpoint(n + 1), 0.0, live=False, cursor=10)] = None
    turns, write = await turns_of_a_checkpoint(many)
    assert (turns, len(write.lanes)) == (6, 4)


async def test_a_lane_that_has_settled_is_looked_at_once_more():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    settled, busy, late = (lanes.add(make_endpoint(n), 0.0, live=True, cursor=10) for n in (1, 2, 3))
    for lane in (settled, busy, late):
        lanes.unsettled[lane] = None
    lanes.take(busy, make_event(16), 0.5)
    recorder = make_recorder(lanes)
    write = await recorder._checkpoint([])
    lanes.take(late, make_event(21), 0.5)  # while it is being written
    recorder._committed([], Batch(1, checkpoint=write), Recorded([], []))
    assert (write.position, list(lanes.unsettled)) == (15, [busy, late])
    busy.settle(16)
    assert (await commit_a_checkpoint(recorder)).position == 20
    assert list(lanes.unsettled) == [late]


async def test_ids_between_gaps_that_are_joined_while_lanes_are_looked_at_are_gaps_of_the_checkpoint(monkeypatch):
    """A page that is read meanwhile passes over them because they are in a gap; its lane, looked at later, relies on that."""
    monkeypatch.setattr(gaps_module, "OLD_MAX", 2)
    monkeypatch.setattr(recorder_module, "CHECKPOINT_TURN", 1)
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    for n in (1, 2):
        lanes.unsettled[lanes.add(make_endpoint(n), 0.0, live=True, cursor=10)] = None
    recorder = make_recorder(lanes)
    gaps = recorder.gaps
    gaps.restore([(2, 3), (5, 6)])
    checkpoint = asyncio.create_task(recorder._checkpoint([]))
    await asyncio.sleep(0)  # it has looked at one of them
    gaps.passed(20, 200, range(150, 201), 0.5)  # one more than there may be
    assert gaps.ranges() == IdRanges([(2, 149)])
    assert (await checkpoint).gaps.covers(2, 6)
    assert gaps.joined is None, "nobody wants to know any more"


def test_no_duration_is_beyond_the_last_bucket():
    assert (LONGEST_US // 1_000).bit_length() == BUCKETS - 1
