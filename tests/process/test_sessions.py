"""One of the dispatcher's sessions ends, or falls silent, under load: it is made again, and nothing is sent twice."""

import time

from dispatcher.sink import Behaviour
from tests.process.support import (
    SESSIONS,
    Dispatcher,
    Load,
    Watch,
    backends,
    dispatching,
    frozen,
    longest_silence,
    settle,
    standbys,
    standing_by,
    terminate,
)
from tests.rig import rig, until

PATHS = {"/steady": "acct", "/flaky": "acct"}
# Who holds an advisory lock of ours: 1 doorbell (while it sleeps), 2 owner.
HOLDER = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND classid = 9324665 AND objid = $1 AND mode = 'ExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
LIGHT = {"producers": 2, "pace_s": 0.05}
RETRY = {"retry_schedule_s": "1,1,1,1,1,1,1,1,1,1"}


async def test_each_session_is_terminated_under_load(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        await r.endpoint("/flaky", behaviour=Behaviour(delay_s=0.005, fail_rate=0.1))
        async with Watch(dsn) as watch, Load(dsn) as load, dispatching(dsn, **RETRY) as d:
            await load.more(100)
            stalls = {}
            for session in SESSIONS:
                killed = await backends(r.db, session)
                assert len(killed) == 1
                began = time.time()
                await terminate(r.db, session)

                async def made_again() -> bool:
                    now = await backends(r.db, session)  # noqa: B023
                    return bool(now) and now != killed  # noqa: B023

                await until(made_again, what=session)
                await load.more(100)
                await until(lambda: r.received[-1].received_at > began + 0.1)  # noqa: B023
                stalls[session] = longest_silence(r, began)
            print({session: f"{stall:.3f} s" for session, stall in stalls.items()})
            assert max(stalls.values()) < 1.0, stalls
            for _ in range(3):
                await load.more(100)
                for session in SESSIONS:  # all at once
                    await terminate(r.db, session)
            r.sink.set_behaviour("/flaky", Behaviour())
            assert await settle(r, load, PATHS, d) == 0
            assert watch.checks > 20
            assert len(d.all("started")) == 1, "a terminated session is no crash: the state in memory is kept"
            assert d.errors == ""


async def test_asleep_with_a_silent_listener(dsn: str) -> None:
    """No notification arrives, as if a middlebox had dropped the connection: the one-second poll delivers."""
    async with rig(dsn, start=False) as r, dispatching(dsn):
        await r.endpoint("/steady")
        await r.emit(1, payload='{"number": 1}')
        await r.settled()

        async def asleep() -> bool:
            return await r.db.fetchval(HOLDER, 1) is not None

        with frozen(await backends(r.db, "listener")):
            for number in (2, 3):
                await until(asleep, what="the doorbell armed")
                began = time.time()
                await r.emit(1, payload=f'{{"number": {number}}}')
                await until(lambda: len(r.received) == number, within_s=10)  # noqa: B023
                assert r.received[-1].received_at - began < 5, "the poll of a second finds it"
        await terminate(r.db, "listener")
        await r.emit(1, payload='{"number": 4}')  # it rings, and nobody listens
        await until(lambda: len(r.received) == 4, within_s=10)


async def test_a_session_that_does_not_answer(dsn: str) -> None:
    """Its backend is frozen for longer than a statement may take: the session is given up and made again."""
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        async with Watch(dsn), Load(dsn, **LIGHT) as load, dispatching(dsn, statement_timeout_s=0.5) as d:
            for session, away in {"recorder": "record.away", "reader": "reader.away", "config": "config.away"}.items():
                await load.more(50)
                began = time.time()
                with frozen(await backends(r.db, session)):
                    line = await d.said(away, within_s=20)
                    assert "no answer in time" in line["error"]
                    if session != "recorder":  # a frozen batch may hold the fence: until it ends, nothing is recorded
                        await until(lambda: r.received[-1].received_at > began + 0.8)  # noqa: B023
                await load.more(50)
                await until(lambda: r.received[-1].received_at > began + 0.8)  # noqa: B023
                print(f"{session} frozen: {longest_silence(r, began):.3f} s without a POST")
            assert await settle(r, load, {"/steady": "acct"}, d) == 0


async def test_the_recorder_does_not_answer_in_the_middle_of_a_batch(dsn: str) -> None:
    """A ROLLBACK would wait for it; hanging up doesn't."""
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        async with Load(dsn) as load, dispatching(dsn, statement_timeout_s=0.5) as d:
            await load.more(100)
            [recorder] = await until(lambda: backends(r.db, "recorder"))
            transaction = r.db.transaction()
            await transaction.start()
            await r.db.execute("SELECT FROM webhook.checkpoint FOR UPDATE")

            async def waits() -> bool:
                return await r.db.fetchval(
                    "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1", recorder
                )

            await until(waits)
            with frozen([recorder]):
                await d.said("record.away", within_s=20)
            await transaction.rollback()
            assert await settle(r, load, {"/steady": "acct"}, d) == 0


async def test_the_owner_session_ends_while_another_waits(dsn: str) -> None:
    """Whoever gets the lock rules, and only one does."""
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        async with Watch(dsn), Load(dsn) as load, dispatching(dsn) as first:
            await load.more(100)
            second = await Dispatcher(dsn).launch()
            try:
                await standing_by(r.db)
                [waiting] = await standbys(r.db)

                async def has_it() -> bool:
                    holder = await r.db.fetchval(HOLDER, 2)
                    if holder not in (None, waiting):  # the first, which is quick to connect again
                        await r.db.execute("SELECT pg_terminate_backend($1)", holder)
                    return bool(holder == waiting)

                await until(has_it, within_s=30, what="the second gets the lock")
                await second.said("started")
                assert await first.ended() == 7, first
                assert "another dispatcher took over" in first.errors
                await settle(r, load, {"/steady": "acct"}, second)
            finally:
                await second.kill()
