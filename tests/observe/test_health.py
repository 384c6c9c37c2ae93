"""Alive whatever the database does; ready as an owner that delivers, or as a standby."""

import orjson

from dispatcher.engine.counters import Counters
from dispatcher.engine.engine import State
from dispatcher.observe.health import judge
from dispatcher.observe.pulse import Pulse
from tests.observe.build import observed
from tests.process.support import frozen, server_pids
from tests.rig import rig, until


class FakeEngine:
    state = State.OWNER
    incarnation = None

    def __init__(self):
        self.counters = Counters()


class FakeObserver:
    silent_s = 0.0


async def test_an_owner_is_ready_and_an_idle_one_stays_so(dsn):
    async with rig(dsn) as r, observed(r) as o:

        async def ready():
            return (await o.ask("/readyz"))[0] == 200

        await until(ready, what="ready")
        _, text = await o.ask("/readyz")
        assert orjson.loads(text) == {"ready": True, "role": "owner", "problems": []}
        assert await o.ask("/livez") == (200, '{"alive": true}')
        reads = r.engine.counters.head_reads
        checkpoints = r.engine.counters.checkpoints
        await until(lambda: r.engine.counters.head_reads > reads and r.engine.counters.checkpoints > checkpoints)
        assert (await o.ask("/nothing"))[0] == 404


async def test_a_database_that_is_away_makes_it_unready_and_leaves_it_alive(dsn, server, monkeypatch):
    monkeypatch.setattr("dispatcher.observe.health.DATABASE_SILENT_S", 0.5)
    monkeypatch.setattr("dispatcher.store.observe.ANSWER_S", 0.3)
    async with rig(dsn) as r, observed(r) as o:
        await until(lambda: o.observer.silent_s < 0.5, what="it has answered")
        with frozen(server_pids(server)):

            async def unready():
                status, text = await o.ask("/readyz")
                return status == 503 and "the database does not answer" in text

            await until(unready, what="unready")
            assert (await o.ask("/livez"))[0] == 200
            assert (await o.ask("/metrics"))[0] == 200

        async def ready_again():
            return (await o.ask("/readyz"))[0] == 200

        await until(ready_again, what="ready again", within_s=30)


def judged(engine, pulse, observer=None):
    return judge(engine, pulse, observer or FakeObserver())


def test_what_does_not_move_is_named():
    engine, now = FakeEngine(), [100.0]
    pulse = Pulse(engine, now=lambda: now[0])
    engine.counters.head_reads, engine.counters.checkpoints = 1, 1
    pulse.look(now[0])
    assert judged(engine, pulse).is_ready
    now[0] += 20
    engine.counters.checkpoints += 1
    pulse.look(now[0])
    assert judged(engine, pulse).problems == ("the reader has not moved for 20 s",)
    engine.counters.memory_waits += 1  # at the memory bound it waits, and is well
    pulse.look(now[0])
    assert judged(engine, pulse).is_ready
    now[0] += 16
    engine.counters.head_reads += 1
    pulse.look(now[0])
    assert judged(engine, pulse).problems == ("the recorder has not moved for 16 s",)


def test_a_standby_is_ready_and_whoever_begins_is_not():
    engine, now = FakeEngine(), [0.0]
    pulse = Pulse(engine, now=lambda: now[0])
    engine.state = State.STANDBY
    now[0] = 1_000.0  # nothing has moved, and nothing has to
    assert judged(engine, pulse).as_dict() == {"ready": True, "role": "standby", "problems": []}
    engine.state = State.STARTING
    assert "starting" in judged(engine, pulse).problems[0]
    # Its time as a standby doesn't count against it once it owns.
    engine.state = State.STANDBY
    pulse.look(now[0])
    engine.state = State.OWNER
    now[0] += 2
    assert judged(engine, pulse).is_ready
