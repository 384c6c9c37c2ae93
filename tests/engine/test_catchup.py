"""When a lane stands in the line for a page."""

import pytest

from dispatcher.engine.catchup import RELOOK_US, CatchUp, ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.lane import RETRIES_MAX
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.ports import RetryPage
from tests.engine.build import LIMITS, make_endpoint, make_retry
from tests.engine.test_runs import spec


def test_a_run_that_is_looked_at_just_before_its_time_is_looked_at_again():
    """A look in the µs of the run's time, but before it, used to be its last."""
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
    assert catch_up.next_at() <= clock.now()
    catch_up.look_again()
    assert catch_up.is_wanted


def test_a_retry_that_was_due_is_still_due_when_the_databases_clock_steps_back():
    """By the wall clock it would wait for what nothing wakes it for: its time had come, and it had no room then."""
    now = [1.0]
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    clock = Clock(lambda: now[0])
    clock.sync(1_000_000)
    catch_up = CatchUp(
        None, lanes, clock, Counters(), Gaps(), ReadGate(), head=lambda: 0, offered=lambda lane: None, wake=lambda: None
    )
    lane.retries.extend(make_retry(n) for n in range(RETRIES_MAX))
    catch_up.note_retry(lane, 2_000_000)
    now[0] = 2.0
    catch_up.look_again()
    assert not catch_up.is_wanted
    clock.align(2.0, 500_000, 2.0)
    lane.retries.clear()
    catch_up.look(lane)
    assert catch_up.is_wanted


@pytest.mark.parametrize(
    "page",
    [RetryPage([], False, 999_999), RetryPage([make_retry(5)], True, None)],
    ids=["due by our clock only", "in hand"],
)
async def test_retries_that_a_look_did_not_bring_are_not_asked_for_again_at_once(page):
    """The server's clock may be behind ours, or a page be cut by its bytes with all of it in hand: that spun."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    lane.retry_hands.add((5, 0))
    clock, looks = Clock(lambda: 1.0), []
    clock.sync(1_000_000)

    class Retries:
        async def due_retries(self, *args, **options):
            looks.append(args)
            return [page]

    catch_up = CatchUp(
        Retries(), lanes, clock, Counters(), Gaps(), ReadGate(), head=lambda: 0, offered=lambda lane: None, wake=lambda: None
    )  # fmt: skip
    catch_up.note_retry(lane, 900_000)
    catch_up.look_again()
    assert not await catch_up.read_retries()
    catch_up.look_again()
    assert (len(looks), catch_up.is_wanted, catch_up.next_at()) == (1, False, 1 + RELOOK_US / 1e6)
