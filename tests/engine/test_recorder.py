"""The recorder's account of what is in hand, without a store."""

import pytest

from dispatcher.domain.outcome import DELIVER, Outcome
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.stats import BUCKETS, LONGEST_US
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
    results = []
    for event_id in (1, 2):
        result = Delivery(lambda delivery, outcome: None, lane, make_event(event_id), 0, 1, 0)
        result.started_us, result.duration_us, result.outcome, result.decision = 0, 1_000, Outcome(None, 204), DELIVER
        results.append(result)
    recorder.stop()
    recorder._results = results[1:]
    assert recorder._build(results[:1], checkpoint=True).stats == []
    recorder._results = []
    [row] = recorder._build(results[1:], checkpoint=True).stats
    assert row.delivered == 2


def test_no_duration_is_beyond_the_last_bucket():
    assert (LONGEST_US // 1_000).bit_length() == BUCKETS - 1
