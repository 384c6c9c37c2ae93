"""The recorder's account of what is in hand, without a store."""

import pytest

from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.recorder import Recorder
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
