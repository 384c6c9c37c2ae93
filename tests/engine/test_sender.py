"""The sender against receivers in memory, on virtual time: who waits for what, and where a request may go."""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.domain.breaker import BreakerState
from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.ordering import Ordering
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.run import ORIGINAL
from dispatcher.domain.url import Origin, Target
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.sender import CONNECTS_AT_ONCE, POSTS_AT_ONCE, Sender
from dispatcher.engine.stats import LONGEST_US
from dispatcher.ports import Doubt, DueRetry, Limits
from dispatcher.transport.memory import Dial, MemoryTransport, Reply, Scripted
from tests.engine.build import LIMITS, SECRET, make_endpoint, make_event
from tests.simulation.loop import VirtualLoop


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on virtual time; whatever a callback raises fails it."""

    def run() -> None:
        loop, surprises = VirtualLoop(), []
        loop.on_surprise = surprises.append
        task = loop.create_task(test())
        loop.run(task, callbacks_max=100_000)
        loop.wind_up([])
        task.result()
        assert not surprises

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class Bench:
    """A sender with one lane; `looked` are the lanes that the reader was told of, and when."""

    def __init__(self, *receivers: tuple[str, Scripted], slots: int = 10, **endpoint: Any) -> None:
        loop = asyncio.get_running_loop()
        self.receivers = dict(receivers)
        self.lanes = Lanes(LIMITS, Memory(100, 10_000))
        self.lane = self.lanes.add(
            make_endpoint(**{"target": target_of(receivers[0][0])} | endpoint), 0.0, live=True, cursor=0
        )
        self.looked: list[float] = []
        clock, counters = Clock(loop.time), Counters()
        self.recorder = Recorder(
            None, self.lanes, clock, counters, epoch=1, position=0, rows_max=5_000, wait_s=0.01, unrecorded_max=4
        )
        self.transport = MemoryTransport(Limits(connect_s=10.0), lambda origin: self.receivers[origin.host])
        self.sender = Sender(
            self.transport, self.lanes, self.recorder, clock, counters, slots=slots, rng=random.Random(1), look=self._look,
            disable=lambda lane, reason: None, failing=lambda lane, was_us: None, tell_failing=lambda lane: None,
            failing_after_s=900, disable_after_s=1_000,
        )  # fmt: skip
        self.sender.lease_until = float("inf")

    def _look(self, lane: Lane) -> None:
        self.looked.append(asyncio.get_running_loop().time())

    def offer(self, *event_ids: int) -> None:
        for event_id in event_ids:
            self.lanes.take(self.lane, make_event(event_id), asyncio.get_running_loop().time())
        self.sender.offer(self.lane)


async def most_a_turn(count: Callable[[], int], wanted: int) -> int:
    """Let the loop turn until there are so many; return by how many a turn added to them at the most."""
    most, before = 0, count()
    while before < wanted:
        await asyncio.sleep(0)
        most, before = max(most, count() - before), count()
    return most


def target_of(host: str) -> Target:
    return Target(f"http://{host}/hook", Origin("http", host, 80), "/hook", host, None)


@virtual
async def test_a_turn_of_the_loop_asks_for_few_connections():
    """Each is made in the turn after: hundreds asked for at once held the loop for as long as they took together."""
    bench = Bench(("a.test", Scripted()))
    bench.lane.untried = False  # else one at a time
    bench.lane.in_flight_limit = wanted = 2 * CONNECTS_AT_ONCE
    bench.offer(*range(1, wanted + 1))
    assert await most_a_turn(lambda: bench.lane.connecting, wanted) == CONNECTS_AT_ONCE
    assert bench.lane.in_flight == 0, "no connection is there yet"


@virtual
async def test_a_turn_of_the_loop_begins_few_posts():
    """Others' events wait for the whole of a turn, and answers come in clumps as big as the POSTs went in."""
    wanted = 3 * POSTS_AT_ONCE
    bench = Bench(("a.test", Scripted(*[Reply(head_s=1.0)] * 2 * wanted)), slots=wanted, in_flight_max=wanted)
    bench.lane.in_flight_limit = wanted
    bench.offer(*range(1, wanted + 1))
    await asyncio.sleep(10)
    assert bench.sender.in_flight == 0, "all are answered, and their connections kept"
    bench.offer(*range(wanted + 1, 2 * wanted + 1))
    assert await most_a_turn(lambda: bench.lane.in_flight, wanted) == POSTS_AT_ONCE


@virtual
async def test_connections_that_come_together_begin_few_posts_a_turn_too():
    wanted = 3 * POSTS_AT_ONCE
    scripted = Scripted(*[Reply(head_s=5.0)] * wanted, dials=[Dial(1.0)] * wanted)
    bench = Bench(("a.test", scripted), slots=wanted, in_flight_max=wanted)
    bench.lane.untried = False  # else it has a quarter of the slots
    bench.lane.in_flight_limit = wanted
    bench.offer(*range(1, wanted + 1))
    while bench.lane.connecting < wanted:
        await asyncio.sleep(0)
    assert bench.lane.in_flight == 0
    await asyncio.sleep(1.0)  # the instant at which they are there
    most = await most_a_turn(lambda: bench.lane.in_flight, wanted)
    assert most <= 2 * POSTS_AT_ONCE, "as many as are answered, and as many of the line"
    assert bench.lane.connecting == 0


@virtual
async def test_connections_that_were_closed_together_are_opened_again_a_few_a_turn():
    """A receiver's load balancer ended, with all that it had kept."""
    wanted = 5 * CONNECTS_AT_ONCE
    scripted = Scripted(*[Reply(head_s=1.0)] * wanted, *[Reply(204, then="stale")] * wanted)
    bench = Bench(("a.test", scripted), slots=wanted, in_flight_max=wanted)
    bench.lane.in_flight_limit = wanted
    bench.offer(*range(1, wanted + 1))
    await asyncio.sleep(10)
    bench.offer(*range(wanted + 1, 2 * wanted + 1))
    await asyncio.sleep(10)
    asked: list[int] = []
    connect = bench.transport.connect

    def counted(*args: Any, **options: Any) -> None:
        asked[-1] += 1
        connect(*args, **options)

    bench.transport.connect = counted
    bench.offer(*range(2 * wanted + 1, 3 * wanted + 1))
    for _ in range(100):
        asked.append(0)
        await asyncio.sleep(0)
    await asyncio.sleep(10)
    assert sum(asked) == wanted == bench.sender._counters.stale
    assert max(asked) <= 2 * CONNECTS_AT_ONCE, "as they are told, and in the turn of the line"
    assert (bench.sender.in_flight, bench.lane.queued()) == (0, 0)


@virtual
async def test_a_lane_that_waited_for_a_token_is_looked_at_when_retry_after_is_over():
    """The timer for the token comes first, and finds a queue that was let go of: nobody else would set the one for Retry-After."""
    bench = Bench(("a.test", Scripted(Reply(429, "3", head_s=0.1))), rate_per_s=1.0, rate_burst=1)
    bench.offer(1, 2)
    await asyncio.sleep(0.5)
    assert bench.lane.blocked_until == pytest.approx(3.1)
    assert not bench.lane.queue, "it reads on when it can"
    await asyncio.sleep(2.4)
    bench.looked.clear()
    await asyncio.sleep(0.3)
    assert bench.looked == [pytest.approx(3.1)]


@virtual
async def test_a_lane_that_is_behind_reads_on_when_the_last_connect_has_ended():
    """Its breaker's wait was over before, and while it connects it reads nothing to probe with: nobody looked again, it stood still for ever."""
    refused = Dial(0.1, Outcome(Fault.CONNECT))
    bench = Bench(("a.test", Scripted(dials=[refused, refused, refused, Dial(8.0, Outcome(Fault.CONNECT))])))
    bench.lane.untried = False  # else one at a time
    bench.lane.in_flight_limit = 4
    bench.offer(1, 2, 3, 4, 5)
    await asyncio.sleep(7.0)
    assert (bench.lane.live, bench.lane.connecting, bench.lane.breaker.state) == (False, 1, BreakerState.OPEN)
    assert bench.lane.breaker.until == pytest.approx(5.1)
    assert not bench.lane.accepts(7.0)
    bench.looked.clear()
    await asyncio.sleep(1.5)
    assert bench.lane.accepts(8.5)
    assert bench.looked == [pytest.approx(8.0)]


@virtual
async def test_a_corrected_url_is_not_kept_waiting_for_the_connect_to_the_wrong_one():
    """It counted as the one that may be in flight, until the wrong host's timeout, or its turn among all that can't be reached."""
    bench = Bench(("old.test", Scripted(dials=[Dial(8.0, Outcome(Fault.CONNECT))])), ("new.test", Scripted()))
    bench.lane.in_flight_limit = 1
    bench.offer(1)
    await asyncio.sleep(0.5)
    assert (bench.lane.connecting, bench.lane.doubt) == (1, Doubt.UNTRIED)
    bench.lanes.configure(replace(bench.lane.endpoint, target=target_of("new.test")), 0.5, 0)
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.5)
    assert (bench.lane.connecting, bench.lane.doubt, bench.lane.queued(), bench.lane.in_flight) == (0, None, 0, 0)
    await asyncio.sleep(10)
    assert (bench.lane.connecting, bench.lane.doubt, bench.lane.breaker.consecutive) == (0, None, 0)


@virtual
async def test_an_endpoint_that_was_enabled_again_is_in_no_doubt():
    """Its owner has mended it: it does not wait for all that can't be reached."""
    bench = Bench(("a.test", Scripted(dials=[Dial(0.1, Outcome(Fault.CONNECT))])))
    bench.offer(1)
    await asyncio.sleep(0.5)
    assert bench.lane.doubt is Doubt.UNREACHED
    bench.lane.connecting = 1  # it waits for its turn among them
    bench.lane.put_live_again()
    assert (bench.lane.doubt, bench.lane.connecting) == (None, 0)


@virtual
async def test_who_is_in_doubt_asks_for_one_connection_at_a_time_until_one_has_come():
    scripted = Scripted(*[Reply(head_s=3.0)] * 4, dials=[Dial(1.0, Outcome(Fault.CONNECT)), Dial(1.0)])
    bench = Bench(("a.test", scripted), slots=40)
    bench.lane.in_flight_limit = 4
    bench.offer(1, 2, 3, 4)
    await asyncio.sleep(0.5)
    assert (bench.lane.connecting, bench.lane.doubt) == (1, Doubt.UNTRIED)
    await asyncio.sleep(1.0)
    assert (bench.lane.connecting, bench.lane.doubt) == (1, Doubt.UNREACHED)
    bench.lane.in_flight_limit = 4
    await asyncio.sleep(1.0)
    assert (bench.lane.connecting, bench.lane.in_flight, bench.lane.doubt) == (0, 3, None)


@pytest.mark.parametrize("first", [Reply(204), Reply(204, then="stale")], ids=["first", "once more"])
def test_no_request_goes_to_the_old_host_when_the_url_has_changed(first):
    @virtual
    async def run():
        old, new = Scripted(first), Scripted()
        bench = Bench(("old.test", old), ("new.test", new))
        if first.then == "stale":
            bench.offer(1)
            await asyncio.sleep(0.1)
        old.next_dial = Dial(1.0)
        before = len(old.requests)
        bench.offer(2)
        await asyncio.sleep(0.5)
        bench.lanes.configure(replace(bench.lane.endpoint, target=target_of("new.test")), 0.0, 0)
        bench.sender.offer(bench.lane)
        await asyncio.sleep(2.0)
        assert (len(old.requests) - before, len(new.requests)) == (0, 1)
        assert bench.sender.in_flight == 0
        assert bench.lane.connecting == 0

    run()


@virtual
async def test_what_waited_for_a_retry_that_is_put_back_goes_on():
    """A retry on a stale connection, and no new one to its URL: nobody offered what was queued behind it."""
    old, new = Scripted(Reply(204, then="stale")), Scripted()
    bench = Bench(("old.test", old), ("new.test", new), in_flight_max=1)
    bench.offer(1)
    await asyncio.sleep(0.1)
    old.next_dial = Dial(1.0)
    retry = DueRetry(make_event(2), ORIGINAL, 2, 0)
    bench.lanes.memory.hold(retry.event)
    bench.lane.retries.append(retry)
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.1)
    bench.offer(3)
    assert (bench.lane.in_flight, bench.lane.queued()) == (1, 1)
    bench.lanes.configure(replace(bench.lane.endpoint, target=target_of("new.test")), 0.0, 0)
    await asyncio.sleep(2.0)
    assert (len(old.requests), len(new.requests), bench.lane.queued()) == (1, 1, 0)


@virtual
async def test_a_stale_connection_of_an_endpoint_whose_url_cannot_be_used_any_more():
    old = Scripted(Reply(204, then="stale"))
    bench = Bench(("old.test", old), secrets=(SECRET,))
    bench.offer(1)
    await asyncio.sleep(0.1)
    bench.offer(2)
    bench.lanes.configure(replace(bench.lane.endpoint, target=target_of("old.test")), 0.0, 0)
    await asyncio.sleep(0)  # on its way
    bench.lanes.configure(replace(bench.lane.endpoint, target=None), 0.0, 0)
    await asyncio.sleep(1.0)
    assert (len(old.requests), bench.sender.in_flight, bench.lanes.memory.events) == (1, 0, 0)


@virtual
async def test_results_pile_up_at_their_bound_however_large_a_batch_may_be():
    bench = Bench(("a.test", Scripted()))
    told: list[bool] = []
    bench.recorder.piled_up = told.append
    for event_id in range(1, 4):
        bench.offer(event_id)
        await asyncio.sleep(0.1)
    assert (bench.recorder.unrecorded, told) == (3, [])
    bench.offer(4)
    await asyncio.sleep(0.1)
    assert (bench.recorder.unrecorded, told) == (4, [True])


# What has expired


def results(bench: Bench) -> list[tuple[int, int, str]]:
    return [(r.event.id, r.number, r.decision.verdict.value) for r in bench.recorder._results]


@virtual
async def test_what_has_expired_is_settled_unsent_and_takes_no_token():
    receiver = Scripted()
    bench = Bench(("a.test", receiver), rate_per_s=0.01, rate_burst=1)
    wall_us = bench.sender._clock.wall_us()
    for event_id, in_s, priority in ((1, -1, None), (2, 0, 3), (3, 60, None), (4, -5, None), (5, None, None)):
        expires_us = None if in_s is None else wall_us + in_s * 1_000_000
        event = make_event(event_id, expires_us=expires_us, priority=priority)
        bench.lanes.take(bench.lane, event, asyncio.get_running_loop().time())
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.1)
    assert results(bench) == [(1, 1, "expired"), (2, 1, "expired"), (4, 1, "expired"), (3, 1, "delivered")]
    assert len(receiver.requests) == 1
    assert [event.id for event in bench.lane.queue] == [5]
    assert bench.sender._counters.expired == 3
    assert bench.lanes.memory.events == 1
    batch = bench.recorder._build(bench.recorder._results, checkpoint=False)
    assert [(row.event_id, row.number, row.fault and row.fault.value) for row in batch.attempts] == [
        (1, 0, "expired"), (2, 0, "expired"), (4, 0, "expired"), (3, 1, None),
    ]  # fmt: skip
    assert (bench.lane.stat.expired, bench.lane.stat.delivered, sum(bench.lane.stat.durations)) == (3, 1, 1)


@virtual
async def test_a_retry_is_due_when_its_event_expires_at_the_latest_and_then_ends():
    bench = Bench(("a.test", Scripted(Reply(500))))
    expires_us = bench.sender._clock.wall_us() + 2_000_000
    bench.lanes.take(bench.lane, make_event(1, expires_us=expires_us), asyncio.get_running_loop().time())
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.1)
    [row] = bench.recorder._build(bench.recorder._results, checkpoint=False).retries
    assert row.due_us == expires_us, "the schedule says ten seconds"
    bench.recorder._results.clear()
    assert bench.lane.may_expire
    await asyncio.sleep(2)
    for run in (0, 9):
        bench.lane.retries.append(DueRetry(make_event(1, expires_us=expires_us), run, 2, row.first_attempt_us))
        bench.lanes.memory.hold(bench.lane.retries[-1].event)
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.1)
    assert [r.decision.verdict.value for r in bench.recorder._results] == ["expired", "delivered"], (
        "run 9 was asked for"
    )
    batch = bench.recorder._build(bench.recorder._results[:1], checkpoint=False)
    assert (batch.attempts[0].number, batch.settled_retries) == (0, [(1, 1, 0)])


# Ordering by key


@virtual
async def test_a_delivery_that_holds_back_its_key_is_given_up_after_its_attempts():
    bench = Bench(("a.test", Scripted(*[Reply(500)] * 3)), ordering=Ordering(1))
    bench.lane.keys.know([], [])
    for event in (make_event(1, ordering_key="k"), make_event(2)):
        bench.lanes.take(bench.lane, event, asyncio.get_running_loop().time())
    bench.sender.offer(bench.lane)
    await asyncio.sleep(0.1)
    assert {r.event.id: r.decision.verdict.value for r in bench.recorder._results} == {1: "dead", 2: "retry"}
    first = next(r for r in bench.recorder._results if r.event.id == 1)
    assert first.decision.reason == "attempt 1 was the last that its key waits for"


# Receivers that ask for less


@virtual
async def test_a_receiver_that_asks_for_less_gets_less_and_then_slowly_more():
    bench = Bench(("a.test", Scripted(*[Reply(503, head_s=0.1)] * 2)))
    lane, loop = bench.lane, asyncio.get_running_loop()
    bench.offer(1, 2)
    await asyncio.sleep(0.2)
    assert bench.sender._counters.throttled == 2
    assert lane.pace is not None
    assert lane.pace.rate_per_s == pytest.approx(2 / 0.1 / 2, rel=0.1), "half of what it got, cut once"
    assert lane.health(loop.time())["pace_per_s"] == pytest.approx(10, rel=0.1)
    assert lane.in_flight_limit == 1
    before = lane.pace.rate_per_s
    bench.offer(3, 4, 5, 6)
    await asyncio.sleep(5)
    assert lane.pace.rate_at(loop.time()) == pytest.approx(before * 1.5, rel=0.1)
    assert 1 < lane.in_flight_limit <= 3, "one more a round"
    await asyncio.sleep(60)
    bench.offer(7)
    await asyncio.sleep(0.5)
    assert lane.pace is None
    assert lane.health(loop.time())["pace_per_s"] is None


@virtual
async def test_other_failures_set_no_pace():
    bench = Bench(("a.test", Scripted(Reply(500), Reply(404))))
    bench.offer(1, 2)
    await asyncio.sleep(0.2)
    assert (bench.lane.pace, bench.sender._counters.throttled, bench.sender._counters.failed) == (None, 0, 2)


# Configuration


@virtual
async def test_a_lane_that_was_told_to_wait_while_it_was_held_is_looked_at_then():
    """The timer for its token came while it was paused, and nobody set the one for Retry-After: it stood still for ever."""
    bench = Bench(("a.test", Scripted(Reply(429, "100"))), rate_per_s=0.1, rate_burst=1)
    live = bench.lane.endpoint
    bench.offer(1, 2)
    await asyncio.sleep(0.5)
    assert bench.lane.blocked_until == pytest.approx(100.0)
    bench.lanes.configure(replace(live, state=EndpointState.PAUSED), 0.5, 0)
    bench.sender.changed(bench.lane)
    await asyncio.sleep(19.5)
    assert bench.lane.timer_at == math.inf, "the timer for the token has gone by"
    bench.lanes.configure(live, 20.0, 0)
    bench.sender.changed(bench.lane)
    bench.looked.clear()
    await asyncio.sleep(81.0)
    assert bench.looked == [pytest.approx(100.0)]


@virtual
async def test_who_waits_for_a_share_of_an_origin_that_it_has_left_is_served():
    well, shares = Scripted(), []
    bench = Bench(("hangs.test", Scripted()), ("well.test", well))
    while (full := bench.sender.shares.full(bench.lane, 0.0)) is None or full.origin is None:
        shares += bench.sender.shares.take(bench.lane, 0.0)
        bench.sender.shares.set_slots(4 * len(shares))
    bench.offer(1)
    await asyncio.sleep(1.0)
    assert bench.lane.waits_for is full
    bench.lanes.configure(replace(bench.lane.endpoint, target=target_of("well.test")), 0.0, 0)
    bench.sender.changed(bench.lane)
    await asyncio.sleep(1.0)
    assert (len(well.requests), bench.lane.waits_for) == (1, None)


@virtual
async def test_a_post_that_a_suspended_process_found_answered_has_a_duration_that_fits():
    bench = Bench(("a.test", Scripted(Reply(204, head_s=1.0))))
    sent = []
    post = bench.sender._post
    bench.sender._post = lambda delivery, connection: (sent.append(delivery), post(delivery, connection))
    bench.offer(1)
    await asyncio.sleep(0.5)
    sent[0].started -= 3_600.0
    await asyncio.sleep(1.0)
    assert bench.recorder._results[0].duration_us == LONGEST_US
    assert bench.recorder._build(bench.recorder._results, checkpoint=False).attempts[0].duration_us == LONGEST_US
