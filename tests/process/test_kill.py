"""kill -9, freezes and rivals: what the next one, or the other one, makes of it."""

import signal
import socket
import time

from dispatcher.sink import Behaviour
from tests.process.support import (
    Dispatcher,
    Load,
    Watch,
    arrivals,
    backends,
    dispatching,
    frozen,
    no_backends,
    settle,
    taken_up,
    terminate,
    unrecorded,
)
from tests.rig import Rig, rig, until

RETRY = {"retry_schedule_s": "1,1,1,1,1,1,1,1,1,1", "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.5}
LIGHT = {"producers": 2, "pace_s": 0.05}
PATHS = {"/steady": "acct", "/flaky": "acct", "/slow": "acct", "/other": "other"}


async def receivers(r: Rig) -> None:
    await r.endpoint("/steady")
    await r.endpoint("/flaky", behaviour=Behaviour(fail_rate=0.1, delay_s=0.002))
    await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.1), in_flight_max=5)  # so that it lags
    await r.endpoint("/other", account="other")


def heal(r: Rig) -> None:
    for path in PATHS:
        r.sink.set_behaviour(path, Behaviour())


async def test_kill_9_under_load(dsn: str) -> None:
    """Three times over. Only what had arrived and wasn't recorded arrives again."""
    async with rig(dsn, start=False) as r:
        await receivers(r)
        async with Watch(dsn) as watch, Load(dsn, accounts=("acct", "acct", "other")) as load:
            may_repeat = set()
            repeats = 0
            for _ in range(3):
                async with dispatching(dsn, **RETRY) as d:
                    await taken_up(r.db)
                    await load.more(200)
                    await d.kill()
                    await no_backends(r.db)
                    await until(lambda: r.sink.connections == 0, what="all that it had written has come")
                    left = await unrecorded(r)
                    may_repeat |= left
                    repeats += len(left)
            heal(r)
            async with dispatching(dsn, **RETRY) as d:
                assert await settle(r, load, PATHS, d) <= repeats
            assert twice(r) <= may_repeat
            assert repeats > 0, "nothing was in flight or unrecorded at any of the three kills"
            assert watch.checks > 20


async def test_pauses_while_another_wants_its_place(dsn: str) -> None:
    """A pause holds from one second after it returned; and at once, where the process was frozen when it came.

    The freeze is longer than the lease, and too short for the standby to take over.
    """
    async with rig(dsn, start=False) as r:
        paused = await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.02))
        await r.endpoint("/steady")
        async with Watch(dsn), Load(dsn, **LIGHT) as load, dispatching(dsn, in_flight_max=20) as d:
            await load.more(100)
            second = await Dispatcher(dsn).launch()
            try:
                returned = await pause(r, paused)
                await until(lambda: time.time() > returned + 2)
                print(f"the last POST arrived {of(r, '/slow')[-1].received_at - returned:.3f} s after the pause")
                assert of(r, "/slow")[-1].received_at < returned + 1
                await resume(r, paused)
                seen = len(of(r, "/slow"))
                await until(lambda: len(of(r, "/slow")) > seen + 50)
                with frozen([d.process.pid]):
                    returned = await pause(r, paused)
                    await until(lambda: time.time() > returned + 0.5, what="what was on its way has arrived")
                    seen = len(of(r, "/slow"))
                    await until(lambda: time.time() > returned + 1.5)
                others = len(of(r, "/steady"))
                await until(lambda: len(of(r, "/steady")) > others + 50)
                assert len(of(r, "/slow")) == seen
                await resume(r, paused)
                await load.stop()
                assert await second.stop() == 0, second
            finally:
                await second.kill()
            assert second.errors == ""
            assert [line["owner"] for line in second.all("standby.waiting")] == [
                f"{socket.gethostname()}:{d.process.pid}"
            ]
            assert second.all("started") == []
            assert await settle(r, load, {"/slow": "acct", "/steady": "acct"}, d) == 0


async def test_another_epoch_fences_it(dsn: str) -> None:
    """Whoever raises the epoch rules: the old one stops, says so, and has written nothing since."""
    async with rig(dsn, start=False) as r:
        await receivers(r)
        async with Watch(dsn), Load(dsn, accounts=("acct", "other")) as load:
            async with dispatching(dsn, **RETRY) as d:
                await load.more(300)
                async with r.db.transaction():  # its UPDATE waits for the batch that is being written
                    await r.db.execute("UPDATE webhook.checkpoint SET epoch = epoch + 1, owner = 'another'")
                    before = await state(r)
                began = time.monotonic()
                assert await d.ended() == 7, d
                assert time.monotonic() - began < 2
                assert "another dispatcher took over" in d.errors
                assert "Traceback" not in d.errors
            await no_backends(r.db)
            assert await state(r) == before
            may_repeat = await unrecorded(r)
            heal(r)
            async with dispatching(dsn, **RETRY) as d:
                await settle(r, load, PATHS, d)
            assert twice(r) <= may_repeat


async def test_frozen_in_the_middle_of_a_batch_while_another_takes_over(dsn: str) -> None:
    """The server ends its transaction, so that the next one can start; when it wakes up it sends nothing, and stops."""
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady", behaviour=Behaviour(delay_s=0.02), in_flight_max=20)
        async with Watch(dsn), Load(dsn, **LIGHT) as load, dispatching(dsn) as old:
            await load.more(100)
            [recorder] = await backends(r.db, "recorder")
            holding = r.db.transaction()
            await holding.start()
            await r.db.execute("SELECT FROM webhook.checkpoint FOR UPDATE")

            async def waits() -> bool:
                return await r.db.fetchval(
                    "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1", recorder
                )

            await until(waits)
            with frozen([old.process.pid]):
                await holding.rollback()  # now it has the fence, and doesn't know
                await terminate(r.db, "owner")

                async def ended() -> bool:
                    return not await backends(r.db, "recorder")

                await until(ended, within_s=5, what="the server has ended the frozen transaction")
                may_repeat = await unrecorded(r)
                await load.stop()
                async with dispatching(dsn) as new:
                    epoch = new.all("started")[0]["epoch"]
                    old.signal(signal.SIGCONT)
                    assert await old.ended() == 7, old
                    assert f"epoch {epoch} rules" in old.errors or f"epoch {epoch - 1} is over" in old.errors, old
                    assert await settle(r, load, {"/steady": "acct"}, new) <= len(may_repeat)
                assert twice(r) <= may_repeat


def twice(r: Rig) -> set[tuple[str, int, int]]:
    return {key for key, all_ in arrivals(r.received).items() if len(all_) > 1}


async def state(r: Rig) -> list[object]:
    """Return everything that a dispatcher writes."""
    return [
        await r.db.fetchval("SELECT count(*) FROM webhook.attempt"),
        await r.db.fetch("SELECT * FROM webhook.retry ORDER BY endpoint_id, event_id, run"),
        await r.db.fetch("SELECT * FROM webhook.lane ORDER BY endpoint_id"),
        await r.db.fetch("SELECT position, gaps, epoch, heartbeat_at FROM webhook.checkpoint"),
        await r.db.fetch("SELECT id, taken_up FROM webhook.subscription ORDER BY id"),
        await r.db.fetchval("SELECT count(*) FROM webhook.dead_letter"),
    ]


async def pause(r: Rig, endpoint_id: int) -> float:
    """Pause; return when that had returned (wall clock)."""
    await r.db.execute(
        "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1", endpoint_id
    )
    return time.time()


async def resume(r: Rig, endpoint_id: int) -> None:
    await r.db.execute("UPDATE webhook.endpoint SET state = 'live', paused_at_id = NULL WHERE id = $1", endpoint_id)


def of(r: Rig, path: str) -> list:
    return [got for got in r.received if got.path == path]
