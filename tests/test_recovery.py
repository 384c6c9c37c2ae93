"""Recovery end to end: what people ask for in the database, and what a dispatcher then does. Real PostgreSQL, real sockets."""

from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg

from dispatcher.sink import Behaviour
from dispatcher.store import dead_letters, erasure, runs
from dispatcher.store.dead_letters import Filter
from dispatcher.store.runs import RunView
from tests.rig import Rig, rig, until
from tests.store import people

QUICK: dict[str, Any] = {
    "retry_schedule_s": (1,), "breaker_failures": 1000, "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.4,
}  # fmt: skip
DOWN, UP = Behaviour(status=500), Behaviour()
INVARIANT = (Path(__file__).parent / "invariant.sql").read_text()


async def ended(r: Rig, run: RunView, within_s: float = 30) -> RunView:
    async def done() -> bool:
        return not (await runs.get(r.db, run.id)).is_open

    await until(done, within_s=within_s, what=f"run {run.id} ended")
    return await runs.get(r.db, run.id)


async def given_up(r: Rig, count: int) -> None:
    async def done() -> bool:
        return await r.db.fetchval("SELECT count(*) FROM webhook.dead_letter") >= count

    await until(done, what=f"{count} dead letters")


async def states(db: asyncpg.Connection) -> Counter[str]:
    return Counter(row["state"] for row in await db.fetch("SELECT state FROM webhook.dead_letter"))


async def holds(r: Rig) -> None:
    assert await r.db.fetch(INVARIANT) == []


async def test_a_replay_of_what_failed_takes_the_dead_letters_along(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(behaviour=DOWN)
        ids = await r.emit(8)  # too few for the breaker to mind
        await given_up(r, 8)
        r.sink.set_behaviour("/hook", UP)
        fine = await r.emit(20)
        await until(lambda: len([e for e in r.received if e.status == 204]) == 20)
        selection = await runs.select(r.db, endpoint)
        assert selection.total == 8
        run = await ended(r, await runs.create(r.db, selection, None))
        assert (run.state, run.attempted, run.delivered, run.dead) == ("finished", 8, 8, 0)
        assert [row["event_id"] for row in await r.attempts(run=run.id)] == ids
        assert not set(ids) & set(fine)
        assert await states(r.db) == {"resent": 8}
        assert (await runs.select(r.db, endpoint)).total == 0
        await holds(r)


async def test_what_fails_again_is_a_new_dead_letter(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(behaviour=DOWN)
        await r.emit(3)
        await given_up(r, 3)
        fixed, _ = await dead_letters.total(r.db, Filter())
        made = await dead_letters.resend(r.db, fixed, endpoint, None)
        assert made is not None
        run = await ended(r, made)
        assert (run.attempted, run.delivered, run.dead) == (3, 0, 3)
        assert await states(r.db) == {"resent": 3, "open": 3}
        await holds(r)


async def test_dead_letters_are_sent_from_their_copies_after_retention(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(behaviour=DOWN)
        await r.emit(5, payload='{"n": "the bytes"}')
        await given_up(r, 5)
        first = {e.webhook_id for e in r.received}
        await r.stop()
        await r.db.execute("TRUNCATE webhook.outbox, webhook.attempt")
        await r.start()
        r.sink.set_behaviour("/hook", UP)
        r.received.clear()
        event = await r.db.fetchval("SELECT min(event_id) FROM webhook.dead_letter")
        one = await ended(r, await runs.resend(r.db, str(event), endpoint))
        fixed, [total] = await dead_letters.total(r.db, Filter(endpoint_id=endpoint))
        assert total.letters == 4
        made = await dead_letters.resend(r.db, fixed, endpoint, 100)
        assert made is not None
        rest = await ended(r, made)
        assert (one.delivered, rest.delivered) == (1, 4)
        assert {e.webhook_id for e in r.received} == first, "under the same ids"
        assert await states(r.db) == {"resent": 5}


async def test_pause_resume_and_cancel_while_it_runs(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint()
        await r.emit(60)
        await r.settled()
        r.received.clear()
        run = await runs.create(r.db, await runs.select(r.db, endpoint, only_failed=False), 20)
        await until(lambda: len(r.received) >= 5)
        assert (await runs.pause(r.db, run.id)).state == "paused"

        async def at_rest() -> bool:
            """What has arrived is recorded."""
            return (await runs.get(r.db, run.id)).attempted == len(r.received)

        await until(at_rest)
        assert len(r.received) < 60
        await runs.set_rate(r.db, run.id, None)
        await runs.resume(r.db, run.id)
        finished = await ended(r, run)
        assert (finished.delivered, len(r.received)) == (60, 60)
        again = await runs.create(r.db, await runs.select(r.db, endpoint, only_failed=False), 20)
        await until(lambda: len(r.received) >= 65)
        canceled = await runs.cancel(r.db, again.id)
        assert canceled.state == "canceled"

        async def told() -> bool:
            return (await runs.get(r.db, again.id)).finished_at is not None

        await until(told, what="the dispatcher has let go of it")
        assert len(r.received) < 120
        await holds(r)


async def test_a_canceled_resend_of_dead_letters_gives_back_the_rest(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(types=("nothing.of_it",))
        await people.died(r.db, endpoint, await r.emit(40))
        fixed, _ = await dead_letters.total(r.db, Filter())
        run = await dead_letters.resend(r.db, fixed, endpoint, 20)
        assert run is not None
        await until(lambda: len([e for e in r.received if e.status == 204]) >= 5)
        await runs.pause(r.db, run.id)
        incarnation = r.engine.incarnation
        assert incarnation is not None
        lane = incarnation.lanes.get(endpoint)
        assert lane is not None
        await until(lambda: not lane.runs[run.id].is_running, what="the dispatcher knows of the pause")

        async def recorded() -> bool:
            row = await runs.get(r.db, run.id)
            return row.delivered == len([e for e in r.received if e.status == 204])

        await until(recorded)
        await runs.cancel(r.db, run.id)
        view = await runs.get(r.db, run.id)
        assert await states(r.db) == {"resent": view.delivered, "open": 40 - view.delivered}


# ── erasure ──


async def test_an_erased_event_in_a_backlog_is_never_sent(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(rate_per_s=10.0, rate_burst=1, timeout_ms=500)
        ids = await r.emit(20)
        await until(lambda: len(r.received) >= 2)
        gone = ids[-1]
        done = await erasure.erase_event(r.db, await erasure.look_at_event(r.db, str(gone)))
        assert done.events == 1
        await until(lambda: len(r.received) == 19)

        async def position() -> bool:
            return await r.db.fetchval("SELECT position FROM webhook.checkpoint") >= gone

        await until(position, what="the checkpoint passes the hole")
        assert [row["event_id"] for row in await r.attempts(endpoint_id=endpoint)] == ids[:-1]
        rows = await r.db.fetch("SELECT endpoint_id, deliveries FROM webhook.discard WHERE reason = 'erased'")
        assert [tuple(row) for row in rows] == [(endpoint, 1)]
        await holds(r)


async def test_an_erased_event_that_waits_for_a_retry_is_not_tried_again(dsn: str) -> None:
    async with rig(dsn, **QUICK | {"retry_schedule_s": (2, 2)}) as r:
        endpoint = await r.endpoint(behaviour=DOWN, timeout_ms=500)
        [event] = await r.emit(1)

        async def retrying() -> bool:
            return await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 1

        await until(retrying)
        found = await erasure.look_at_event(r.db, str(event))
        assert (found.owed, found.response_heads) == (1, 1)
        await erasure.erase_event(r.db, found)
        other = await r.emit(1)
        await given_up(r, 1)  # that one's schedule is over, so the erased one's would be too
        assert Counter(row["event_id"] for row in await r.attempts(endpoint_id=endpoint)) == {event: 1, other[0]: 3}
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0


async def test_an_event_that_is_erased_in_flight_leaves_nothing_behind(dsn: str) -> None:
    async with rig(dsn, **QUICK | {"retry_schedule_s": (30,)}) as r:
        await r.endpoint(behaviour=Behaviour(status=500, delay_s=0.8, body=b"you said so"), timeout_ms=1500)
        [event] = await r.emit(1)
        await until(lambda: r.engine.incarnation is not None and r.engine.incarnation.sender.in_flight == 1)
        done = await erasure.erase_event(r.db, await erasure.look_at_event(r.db, str(event)))
        assert (done.events, done.response_heads) == (1, 1), "its answer was recorded meanwhile"
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0
        assert await r.db.fetchval("SELECT count(response_head) FROM webhook.attempt") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.attempt") == 1


async def test_an_account_is_erased_while_its_deliveries_are_under_way(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        await r.endpoint("/slow", behaviour=Behaviour(status=500, delay_s=0.3), timeout_ms=1000, in_flight_max=5)
        await r.endpoint("/limited", rate_per_s=20.0, rate_burst=1, timeout_ms=1000)
        await r.endpoint("/other", account="other")
        await r.emit(200)
        theirs = await r.emit(50, account="other")
        await until(lambda: r.by_path()["/limited"] >= 3)
        done = await erasure.erase_account(r.db, r.settings, "acct")
        assert done.ended_at is not None
        assert (done.endpoints, done.events) == (2, 200)
        sent = r.by_path()
        assert await r.db.fetchval("SELECT count(*) FROM webhook.outbox WHERE account_id = 'acct'") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.dead_letter WHERE payload IS NOT NULL") == 0
        assert await r.db.fetchval("SELECT count(response_head) FROM webhook.attempt") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.endpoint_secret") == 1
        late = await r.emit(30, account="other")
        await until(lambda: r.by_path()["/other"] == 80)
        assert len(theirs) + len(late) == 80
        assert (r.by_path()["/slow"], r.by_path()["/limited"]) == (sent["/slow"], sent["/limited"])

        async def at_the_end() -> bool:
            return await r.db.fetchval("SELECT position >= $1 AND isempty(gaps) FROM webhook.checkpoint", late[-1])

        await until(at_the_end, what="the checkpoint passes what is gone")
        await holds(r)
