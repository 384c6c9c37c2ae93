"""The reader's decisions about one event, without a store."""

import pytest

from dispatcher.domain.ordering import Ordering
from dispatcher.engine.catchup import ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.reader import POLL_S, POLLS_AT_ONCE, POLLS_BEFORE_SLEEP, Reader
from tests.engine.build import LIMITS, make_endpoint, make_event


@pytest.mark.parametrize("ordering", [None, Ordering()])
def test_what_came_late_waits_for_an_earlier_hole_of_a_lane_that_orders_by_key(ordering):
    """After a start, an old gap may be looked at before the lane's holes are read: taken at once, it went before an earlier event of its key."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(ordering=ordering), 0.0, live=False, cursor=200)
    if lane.keys is not None:
        lane.keys.know([], [])
    lane.add_hole(67)
    offered = []
    reader = Reader(
        None, lanes, Clock(lambda: 1.0), Counters(), offered=offered.append, position=lambda: 200, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.head = 200
    reader._found(make_event(160, ordering_key="k"), (), 1.0)
    if ordering is None:
        assert (offered, [event.id for event in lane.queue], 160 in lane.holes) == ([lane], [160], False)
    else:
        assert (offered, list(lane.queue), list(lane.holes)) == ([], [], [(67, 67), (160, 160)])


async def test_with_the_doorbell_off_it_polls_as_it_does_with_it_on_before_it_would_sleep(monkeypatch):
    """What comes one after another is read at once, not each after the time that an idle dispatcher waits."""
    reader = Reader(
        None, Lanes(LIMITS, Memory(100, 10_000)), Clock(lambda: 1.0), Counters(), offered=None, position=lambda: 0, configured=None,
        doorbell=False, poll_s=0.25, gate=ReadGate(),
    )  # fmt: skip
    reads_before_wait: list[int] = []
    waits: list[float] = []

    class EnoughError(Exception):
        pass

    async def head() -> bool:
        reads_before_wait.append(len(waits))
        return len(reads_before_wait) == 1

    async def other() -> bool:
        return False

    async def wait(longest_s: float) -> None:
        waits.append(longest_s)
        if len(waits) == POLLS_BEFORE_SLEEP:
            raise EnoughError

    monkeypatch.setattr(reader, "_read_head_to_end", head)
    monkeypatch.setattr(reader, "_read_other", other)
    monkeypatch.setattr(reader, "_wait", wait)
    with pytest.raises(EnoughError):
        await reader.run()
    assert reads_before_wait.count(0) == 1 + POLLS_AT_ONCE + 1
    polled = POLLS_BEFORE_SLEEP - POLLS_AT_ONCE - 1
    assert waits == [POLL_S] * polled + [0.25] * (POLLS_BEFORE_SLEEP - polled)
