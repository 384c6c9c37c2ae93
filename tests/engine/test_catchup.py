"""When a lane stands in the line for a page."""

from dispatcher.engine.catchup import CatchUp, ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.lanes import Lanes, Memory
from tests.engine.build import LIMITS, make_endpoint
from tests.engine.test_runs import spec


def test_a_run_that_is_looked_at_in_the_microsecond_of_its_time_is_looked_at_again():
    """The wall clock counts whole µs: a look in that µs, but before the run's time, used to be its last."""
    now = [0.0]
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(runs=(spec(rate_per_s=5.0),)), 0.0, live=True, cursor=0)
    clock = Clock(lambda: now[0])
    clock.sync(0)
    catch_up = CatchUp(
        None, lanes, clock, Counters(), Gaps(), ReadGate(), head=lambda: 0, offered=lambda lane: None, wake=lambda: None
    )
    lane.runs[1].next_at = 1.0000008
    catch_up.look(lane)
    now[0] = 1.0000004
    catch_up.look_again()
    assert not catch_up.is_wanted
    now[0] = 1.000002
    assert catch_up.look_at_us() <= clock.wall_us()
    catch_up.look_again()
    assert catch_up.is_wanted
