"""Killed at any moment and started again, in one process and so quickly: the engine believes only what is recorded.

While load, faults, pauses, lagging lanes and late commits go on, DESIGN §4's invariant is asked from outside (tests/invariant.sql). In
tests/process the same is done to real processes.
"""

import asyncio
import random
import threading
import time

import pytest

from dispatcher.sink import Behaviour
from tests.conftest import connected
from tests.process.support import Load, Watch, arrivals, check_invariant, recorded, settle, taken_up, terminate
from tests.rig import Rig, rig, until

PATHS = {"/steady": "acct", "/flaky": "acct", "/slow": "acct", "/polite": "acct", "/paused": "acct", "/other": "other"}
SMALL = {
    "queue_events_max": 20,  # so that lanes lag
    "memory_events_max": 300,
    "record_rows_max": 50,
    "retry_schedule_s": "1,1,1,1,1,1,1,1,1,1,1,1",
    "breaker_wait_s": 0.1,
    "breaker_wait_max_s": 0.3,
}


async def receivers(r: Rig) -> dict[str, int]:
    return {
        "/steady": await r.endpoint("/steady"),
        "/flaky": await r.endpoint("/flaky", behaviour=Behaviour(fail_rate=0.2, delay_s=0.002, delay_jitter_s=0.02)),
        "/slow": await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.05), in_flight_max=4),
        "/polite": await r.endpoint("/polite", behaviour=Behaviour(fail_rate=0.02, fail_status=429, retry_after="1")),
        "/paused": await r.endpoint("/paused", behaviour=Behaviour(delay_s=0.01)),
        "/other": await r.endpoint("/other", account="other", rate_per_s=200.0, rate_burst=5),
    }


def heal(r: Rig) -> None:
    for path in PATHS:
        r.sink.set_behaviour(path, Behaviour())


async def toggle(r: Rig, endpoint_id: int) -> None:
    await r.db.execute(
        "UPDATE webhook.endpoint SET state = CASE state WHEN 'live' THEN 'paused' ELSE 'live' END, paused_at_id = webhook.last_id() "
        "WHERE id = $1",
        endpoint_id,
    )


async def pause_from_elsewhere(dsn: str, endpoint_id: int) -> None:
    async with connected(dsn) as connection:
        await connection.execute(
            "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1", endpoint_id
        )


async def go_live(r: Rig) -> None:
    await r.db.execute("UPDATE webhook.endpoint SET state = 'live', paused_at_id = NULL")


@pytest.mark.parametrize("seed", range(4))
async def test_killed_at_random_moments(dsn: str, seed: int) -> None:
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    async with rig(dsn, **SMALL) as r:
        ids = await receivers(r)
        await taken_up(r.db)
        async with (
            Watch(dsn) as watch,
            Load(dsn, accounts=("acct", "acct", "other"), pace_s=0.05, rows_max=6, seed=seed) as load,
        ):
            for _ in range(12):
                # The moment of the kill is what is random here; nothing is hoped for in the meantime.
                end = loop.time() + rng.choice([0.02, 0.1, 0.4]) * rng.random()
                while loop.time() < end:
                    if rng.random() < 0.02:
                        await toggle(r, ids["/paused"])
                    if rng.random() < 0.02:
                        await terminate(r.db, rng.choice(["reader", "recorder", "config", "listener", "owner"]))
                    await asyncio.sleep(0.005)
                await r.kill()
                await check_invariant(r.db)
                await r.start()
            await load.stop()
            await go_live(r)
            heal(r)
            await settle(r, load, PATHS)
            assert watch.checks > 20
        # The receivers saw every attempt that is recorded, and no number is there twice (the key sees to that).
        assert (await recorded(r.db)).keys() <= arrivals(r.received).keys()


async def test_faults_without_a_kill_send_nothing_twice(dsn: str) -> None:
    """Pauses, lagging lanes, late commits, lost sessions: one life, so everything arrives once per attempt."""
    rng = random.Random(5)
    async with rig(dsn, **SMALL) as r:
        ids = await receivers(r)
        async with (
            Watch(dsn) as watch,
            Load(dsn, accounts=("acct", "acct", "other"), pace_s=0.05, rows_max=6, late=0.2) as load,
        ):
            for _ in range(15):
                await load.more(20)
                await toggle(r, ids[rng.choice(["/paused", "/slow", "/flaky"])])
                await terminate(r.db, rng.choice(["reader", "recorder", "config", "listener", "owner"]))
            await load.stop()
            await go_live(r)
            heal(r)
            assert await settle(r, load, PATHS) == 0
            assert watch.checks > 20
            assert r.engine.counters.starts == 1


async def test_stopped_in_an_orderly_way_again_and_again(dsn: str) -> None:
    async with rig(dsn, **SMALL) as r:
        await receivers(r)
        await taken_up(r.db)
        async with Watch(dsn), Load(dsn, accounts=("acct", "acct", "other"), pace_s=0.05, rows_max=6) as load:
            for _ in range(6):
                await load.more(30)
                await r.stop()
                assert arrivals(r.received).keys() == (await recorded(r.db)).keys()
                await r.start()
            heal(r)
            assert await settle(r, load, PATHS) == 0


async def test_a_loop_that_was_blocked_looks_before_it_sends(dsn: str) -> None:
    """The event loop stands still for longer than the lease; when it moves again, the pause that came meanwhile is seen first."""
    async with rig(dsn) as r:
        endpoint_id = await r.endpoint(behaviour=Behaviour(delay_s=0.2), in_flight_max=5)
        assert r.engine.incarnation is not None
        sender, counters = r.engine.incarnation.sender, r.engine.counters
        async with Load(dsn) as load:  # faster than the receiver, so that there is always something to send
            await load.more(100)
            await until(lambda: sender.in_flight == 5)
            pausing = threading.Thread(target=asyncio.run, args=[pause_from_elsewhere(dsn, endpoint_id)])
            before = counters.attempts
            pausing.start()
            time.sleep(1.0)
            pausing.join()
            lane = r.engine.incarnation.lanes.get(endpoint_id)
            assert lane is not None
            await until(lambda: lane.held)
            assert lane.work() == 0
            assert counters.attempts == before
        r.sink.set_behaviour("/hook", Behaviour())
        await go_live(r)
        assert await settle(r, load, {"/hook": "acct"}) == 0
