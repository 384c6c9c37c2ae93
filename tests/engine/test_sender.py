"""The sender against receivers in memory, on virtual time: who waits for what, and where a request may go."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.domain.url import Origin, Target
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.sender import Sender
from dispatcher.ports import Limits
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

    def __init__(self, *receivers: tuple[str, Scripted], **endpoint: Any) -> None:
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
        self.transport = MemoryTransport(Limits(), lambda origin: self.receivers[origin.host])
        self.sender = Sender(
            self.transport, self.lanes, self.recorder, clock, counters, slots=10, rng=random.Random(1), look=self._look,
            disable=lambda lane, reason: None, failing=lambda lane, was_us: None, disable_after_s=1_000,
        )  # fmt: skip
        self.sender.lease_until = float("inf")

    def _look(self, lane: Lane) -> None:
        self.looked.append(asyncio.get_running_loop().time())

    def offer(self, *event_ids: int) -> None:
        for event_id in event_ids:
            self.lanes.take(self.lane, make_event(event_id), asyncio.get_running_loop().time())
        self.sender.offer(self.lane)


def target_of(host: str) -> Target:
    return Target(f"http://{host}/hook", Origin("http", host, 80), "/hook", host, None)


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
