"""SIGTERM: what is in flight ends and is recorded, the process ends with 0, and the next start has nothing to repeat."""

import signal
import time

from dispatcher.sink import Behaviour
from tests.process.support import (
    Dispatcher,
    Load,
    Watch,
    backends,
    dispatching,
    frozen,
    settle,
    standing_by,
    unrecorded,
)
from tests.rig import rig, until


async def test_idle(dsn: str) -> None:
    async with rig(dsn, start=False) as r, dispatching(dsn) as d:
        await r.endpoint()
        await r.emit(3)
        await r.settled()
        began = time.monotonic()
        assert await d.stop() == 0, d
        assert time.monotonic() - began < 2
        assert d.errors == ""
        assert d.all("stopped")[0]["cut_off"] == 0


async def test_under_load(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.05, delay_jitter_s=0.1))
        await r.endpoint("/flaky", behaviour=Behaviour(delay_s=0.01, fail_rate=0.1))
        async with Watch(dsn), Load(dsn) as load:
            async with dispatching(dsn, retry_schedule_s="1,1,1,1,1,1,1,1") as d:
                await load.more(500)
                assert await d.stop() == 0, d
                assert d.all("stopping")[0]["in_flight"] > 0
                assert d.all("stopped")[0]["cut_off"] == 0
                assert d.errors == ""
            assert await unrecorded(r) == set()
            r.sink.set_behaviour("/flaky", Behaviour())
            async with dispatching(dsn, retry_schedule_s="1,1,1,1,1,1,1,1") as d:
                assert await settle(r, load, {"/slow": "acct", "/flaky": "acct"}, d) == 0


async def test_a_receiver_that_hangs_is_left_when_the_grace_ends(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        await r.endpoint("/hangs", behaviour=Behaviour(mode="hang"), timeout_ms=60_000)
        await r.endpoint("/fast")
        async with Load(dsn) as load, dispatching(dsn, grace_s=1) as d:
            await load.more(200)
            await load.stop()
            await until(lambda: any(got.path == "/hangs" for got in r.received))
            began = time.monotonic()
            assert await d.stop() == 0, d
            assert 0.9 < time.monotonic() - began < 3
            cut_off = d.all("stopped")[0]["cut_off"]
            assert cut_off > 0
        lost = await unrecorded(r)
        assert {path for path, _, _ in lost} == {"/hangs"}
        assert len(lost) == cut_off
        r.sink.set_behaviour("/hangs", Behaviour())
        async with dispatching(dsn) as d:
            assert await settle(r, load, {"/hangs": "acct", "/fast": "acct"}, d) == cut_off


async def test_a_second_signal_forces(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        await r.endpoint("/hangs", behaviour=Behaviour(mode="hang"), timeout_ms=60_000)
        async with Load(dsn) as load, dispatching(dsn, grace_s=60) as d:
            await load.more(50)
            await load.stop()
            await until(lambda: r.received)
            d.signal(signal.SIGTERM)
            await d.said("stopping")
            began = time.monotonic()
            d.signal(signal.SIGTERM)
            assert await d.ended() == 128 + signal.SIGTERM, d
            assert time.monotonic() - began < 1
            assert "Traceback" not in d.errors
        r.sink.set_behaviour("/hangs", Behaviour())
        async with dispatching(dsn) as d:
            await settle(r, load, {"/hangs": "acct"}, d)


async def test_a_second_signal_forces_also_while_the_database_does_not_answer(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        await r.endpoint(behaviour=Behaviour(delay_s=0.02))
        async with Load(dsn) as load, dispatching(dsn, grace_s=60) as d:
            await load.more(200)
            await load.stop()
            with frozen(await backends(r.db)):
                d.signal(signal.SIGTERM)
                await d.said("stopping")
                began = time.monotonic()
                d.signal(signal.SIGINT)
                assert await d.ended() == 128 + signal.SIGINT, d
                assert time.monotonic() - began < 1
        async with dispatching(dsn) as d:
            await settle(r, load, {"/hook": "acct"}, d)


async def test_while_it_stands_by(dsn: str) -> None:
    async with rig(dsn, start=False) as r, dispatching(dsn):
        second = await Dispatcher(dsn).launch()
        try:
            await standing_by(r.db)
            began = time.monotonic()
            assert await second.stop() == 0, second
            assert time.monotonic() - began < 1
        finally:
            await second.kill()
