"""When a lane stands in the line for a page."""

from typing import Any

import pytest

from dispatcher.domain.ordering import Ordering
from dispatcher.engine.catchup import PAGE_OFFERS, RELOOK_US, CatchUp, ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.lane import RETRIES_MAX
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.ports import Page, RetryPage
from tests.engine.build import LIMITS, make_endpoint, make_event, make_retry
from tests.engine.test_runs import spec


def make_catch_up(lanes: Lanes, clock: Clock, store: Any = None, head: int = 0) -> CatchUp:
    return CatchUp(
        store,
        lanes,
        clock,
        Counters(),
        Gaps(),
        ReadGate(),
        head=lambda: head,
        offered=lambda lane: None,
        wake=lambda: None,
    )


def test_a_run_that_is_looked_at_just_before_its_time_is_looked_at_again():
    """A look in the µs of the run's time, but before it, used to be its last."""
    now = [0.0]
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(runs=(spec(rate_per_s=5.0),)), 0.0, live=True, cursor=0)
    clock = Clock(lambda: now[0])
    clock.sync(0)
    catch_up = make_catch_up(lanes, clock)
    lane.runs[1].next_at = 1.0000008
    catch_up.look(lane)
    now[0] = 1.0000004
    catch_up.look_again()
    assert not catch_up.is_wanted
    now[0] = 1.000002
    assert catch_up.next_at() <= clock.now()
    catch_up.look_again()
    assert catch_up.is_wanted


def test_a_retry_due_in_a_day_has_one_time_however_often_others_are_due_before():
    """Each that came due before it left another entry for it, until that day was over."""
    now = [1.0]
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    clock = Clock(lambda: now[0])
    clock.sync(1_000_000)
    catch_up = make_catch_up(lanes, clock)
    tomorrow_us = 86_400_000_000
    for _ in range(50):
        catch_up.note_retry(lane, tomorrow_us)
        catch_up.note_retry(lane, int(now[0] * 1e6) + 5_000_000)
        assert catch_up.next_at() == pytest.approx(now[0] + 5)
        now[0] += 5
        catch_up.look_again()
        assert catch_up.is_wanted, "it is due"
        catch_up._retrying.clear()
        lane.next_retry_at = None  # read, and in hand
    assert len(catch_up._look_times) == 1
    lane.next_retry_at = None
    catch_up.note_retry(lane, tomorrow_us + 3_000_000)  # that of tomorrow was settled: its time asks for the next
    now[0] = 86_400.0
    catch_up.look_again()
    assert catch_up.next_at() == pytest.approx(86_403, abs=0.1)


def test_a_retry_that_was_due_is_still_due_when_the_databases_clock_steps_back():
    """By the wall clock it would wait for what nothing wakes it for: its time had come, and it had no room then."""
    now = [1.0]
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    clock = Clock(lambda: now[0])
    clock.sync(1_000_000)
    catch_up = make_catch_up(lanes, clock)
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


@pytest.mark.parametrize("kind", ["account", "holes", "keys"])
async def test_a_page_of_keyed_events_ends_at_a_young_id(kind):
    """It has come since the head was read, and what is after it by the same key would go before it."""
    page = Page([make_event(n, ordering_key="k") for n in (10, 11, 12)], [(), (), ()], full=False)

    class Log:
        async def account(self, *args) -> Page:
            return page

        async def holes(self, *args) -> list[Page]:
            return [page]

        keys = holes

    lanes, gaps = Lanes(LIMITS, Memory(100, 10_000)), Gaps()
    lane = lanes.add(make_endpoint(ordering=Ordering()), 0.0, live=False, cursor=9)
    lane.keys.know([], [])
    if kind != "account":
        lane.cursor = 12
    if kind == "holes":
        lane.holes.add(10, 12)
    if kind == "keys":
        lane.keys.know([("k", 5)], [])
        for event in page.events:
            lanes.take(lane, event, 0.0)
        lane.keys.release("k", 5)
    catch_up = CatchUp(
        Log(), lanes, Clock(lambda: 1.0), Counters(), gaps, ReadGate(), head=lambda: 12, offered=lambda lane: None, wake=lambda: None
    )  # fmt: skip

    async def read() -> None:
        catch_up.look(lane)
        await (catch_up.read_keys() if kind == "keys" else catch_up.read_lagging())

    gaps.young[10] = 1.0
    await read()
    assert lane.queued() == 0
    assert {"account": lane.cursor == 9, "holes": 10 in lane.holes, "keys": lane.keys.to_read(1) == [("k", 10)]}[kind]
    gaps.found_young(10)  # by the head
    await read()
    assert ([event.id for event in lane.queue], lane.keys.held_back.count()) == ([10], 2)


async def test_lanes_that_are_behind_leave_the_head_its_room():
    """They took each place that it waited for, and nobody got a new event for as long as they had a backlog."""
    asked = []

    class Log:
        async def account(self, *args) -> Page:
            asked.append("account")
            return Page([make_event(20)], [()], full=False)

        async def due_retries(self, *args, **options) -> list[RetryPage]:
            asked.append("retries")
            return [RetryPage([], False, None)]

    lanes = Lanes(LIMITS, Memory(80, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=False, cursor=9)
    lane.urgent_after = None
    clock = Clock(lambda: 1.0)
    clock.sync(1_000_000)
    catch_up = CatchUp(
        Log(), lanes, clock, Counters(), Gaps(), ReadGate(), head=lambda: 12, offered=lambda lane: None, wake=lambda: None
    )  # fmt: skip
    catch_up.note_retry(lane, 900_000)
    catch_up.look(lane)
    for held, expected in ((65, []), (45, ["retries"]), (39, ["retries", "account"])):
        lanes.memory.events = held
        await catch_up.read_retries()
        await catch_up.read_lagging()
        assert asked == expected


async def test_a_page_that_many_lanes_share_is_short():
    """All of it is applied in one turn of the loop: rows times lanes."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    sharers = 500
    for n in range(1, sharers + 1):
        lanes.add(make_endpoint(n), 0.0, live=False, cursor=0)
    asked = []

    class Log:
        async def account(self, account_id, after, upto, types, limit, bytes_max, of):
            asked.append((limit, len(of)))
            return Page([], [], False)

    clock = Clock(lambda: 1.0)
    clock.sync(1_000_000)
    catch_up = make_catch_up(lanes, clock, Log(), head=10)
    catch_up.look(lanes.get(1))
    await catch_up.read_lagging()
    assert asked == [(PAGE_OFFERS // sharers, sharers)]
