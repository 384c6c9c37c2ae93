"""Resends and replays end to end: real PostgreSQL, real sockets. Every run delivers what it should once, beside whatever else goes on."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dispatcher.engine.engine import Engine, State
from dispatcher.sink import Behaviour
from dispatcher.store import recording
from dispatcher.store.postgres import PgStore
from tests.rig import Rig, rig, until

QUICK = {"retry_schedule_s": (1, 1), "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.4}
INVARIANT = (Path(__file__).parent / "invariant.sql").read_text()


async def start_run(r: Rig, endpoint: int, ids: list[int], **columns: Any) -> int:
    """Ask for a run over the ids, as `dispatcher replay` does."""
    columns = {"after_id": min(ids) - 1, "upto_id": max(ids), "total": len(ids)} | columns
    names, places = ", ".join(columns), ", ".join(f"${n}" for n in range(2, 2 + len(columns)))
    async with r.db.transaction():
        run: int = await r.db.fetchval(
            f"INSERT INTO webhook.run (endpoint_id, {names}) VALUES ($1, {places}) RETURNING id",
            endpoint,
            *columns.values(),
        )
        await r.db.execute(
            "INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, $2)", run, columns["after_id"]
        )
    return run


async def change(r: Rig, run: int, state: str) -> None:
    await r.db.execute("UPDATE webhook.run SET state = $2 WHERE id = $1", run, state)


async def progress(r: Rig, run: int) -> asyncpg.Record:
    return await r.db.fetchrow("SELECT * FROM webhook.run_progress WHERE run_id = $1", run)


async def finished(r: Rig, *runs: int, within_s: float = 30) -> None:
    async def done() -> bool:
        return all([(await progress(r, run))["finished_at"] is not None for run in runs])

    await until(done, within_s=within_s, what=f"runs {runs} finished")


async def delivered_in(r: Rig, run: int) -> list[int]:
    """The ids that the run delivered, from the attempts."""
    rows = await r.db.fetch(
        "SELECT event_id FROM webhook.attempt WHERE run = $1 AND fault IS NULL ORDER BY event_id", run
    )
    return [row["event_id"] for row in rows]


async def holds(r: Rig) -> None:
    assert await r.db.fetch(INVARIANT) == []


async def test_a_resend_is_the_same_event_once_more(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        ids = await r.emit(3)
        await r.settled()
        run = await start_run(r, endpoint, ids[1:2])
        await finished(r, run)
        assert await delivered_in(r, run) == ids[1:2]
        assert sorted(Counter(e.webhook_id for e in r.received).values()) == [1, 1, 2]
        assert [e.attempt for e in r.received] == [1, 1, 1, 1], "attempts are numbered within their run"
        row = await progress(r, run)
        assert (row["attempted"], row["delivered"], row["dead"], row["settled"]) == (1, 1, 0, ids[1])
        await holds(r)


async def test_a_replay_sends_its_range_and_types_and_counts(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await r.emit(20)
        wanted = await r.emit(300)
        other = await r.emit(40, type="link.clicked")
        await r.emit(20)
        await r.settled()
        run = await start_run(r, endpoint, [*wanted, *other], patterns=["message.*"])
        await finished(r, run)
        assert await delivered_in(r, run) == wanted
        row = await progress(r, run)
        assert (row["attempted"], row["delivered"], row["dead"], row["settled"]) == (300, 300, 0, other[-1])
        assert r.by_path()["/hook"] == 380 + 300
        await holds(r)


async def test_a_replay_keeps_to_its_rate(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        ids = await r.emit(60)
        await r.settled()
        began = time.monotonic()
        run = await start_run(r, endpoint, ids, rate_per_s=50.0)
        await finished(r, run)
        assert time.monotonic() - began > 60 / 50 - 0.1 - 0.1, "a page of a tenth of a second comes at once"
        assert await delivered_in(r, run) == ids


async def test_a_paused_run_stops_and_goes_on(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        ids = await r.emit(400)
        await r.settled()
        run = await start_run(r, endpoint, ids, rate_per_s=200.0)
        await until(lambda: len(r.received) > 450)
        await change(r, run, "paused")
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: not lane.runs[run].is_running and not lane.in_flight)
        await asyncio.sleep(0.05)  # the last answers
        stopped_at = len(r.received)
        await asyncio.sleep(0.5)  # nothing may come
        assert len(r.received) == stopped_at < 800
        fresh = await r.emit(5)
        await until(lambda: len(r.received) == stopped_at + 5)
        await change(r, run, "running")
        await finished(r, run)
        assert await delivered_in(r, run) == ids
        assert fresh[0] not in ids
        await holds(r)


@pytest.mark.parametrize("at_once", [5_000, 1])
async def test_a_canceled_run_ends_with_its_retries_and_nothing_else(
    dsn: str, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Also where it has more retries than a batch ends."""
    monkeypatch.setattr(recording, "CANCELED_RETRIES", at_once)
    async with rig(dsn, retry_schedule_s=(60,)) as r:
        endpoint = await r.endpoint(in_flight_max=5)
        ids = await r.emit(100)
        await r.settled()
        r.sink.set_behaviour("/hook", Behaviour(fail_rate=0.3))
        run = await start_run(r, endpoint, ids, rate_per_s=100.0)
        await until(lambda: r.db.fetchval("SELECT count(*) > 3 FROM webhook.retry WHERE run = $1", run))
        await change(r, run, "canceled")
        await finished(r, run)
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0
        row = await progress(r, run)
        attempts = await r.db.fetchval("SELECT count(DISTINCT event_id) FROM webhook.attempt WHERE run = $1", run)
        assert row["attempted"] == attempts < 100
        assert row["delivered"] == len(await delivered_in(r, run)) < attempts
        before = len(r.received)
        await asyncio.sleep(0.3)  # nothing more may come
        assert len(r.received) == before


async def test_a_run_survives_restarts(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.01))
        ids = await r.emit(300)
        await r.settled()
        run = await start_run(r, endpoint, ids)
        for mark in (350, 450):
            await until(lambda mark=mark: len(r.received) >= mark)
            await r.kill()
            row = await progress(r, run)
            assert row["attempted"] == await r.db.fetchval("SELECT count(*) FROM webhook.attempt WHERE run = $1", run)
            await r.start()
        await until(lambda: len(r.received) >= 520)
        await r.stop()
        row = await progress(r, run)
        assert row["attempted"] == row["delivered"] == len(await delivered_in(r, run)), "an orderly stop records all"
        await r.start()
        await finished(r, run)
        row = await progress(r, run)
        assert await delivered_in(r, run) == ids
        assert (row["attempted"], row["delivered"]) == (300, 300)
        again = len(r.received) - 600
        assert 0 <= again <= 2 * 100, f"{again} more than explained by what was in flight at two kills"
        await holds(r)


async def test_a_run_survives_a_server_that_lost_its_memory(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.01))
        ids = await r.emit(200)
        await r.settled()
        run = await start_run(r, endpoint, ids, rate_per_s=300.0)
        await until(lambda: len(r.received) >= 250)
        await r.db.execute("UPDATE webhook.life SET token = gen_random_uuid()")
        await r.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'dispatcher %'"
        )
        await finished(r, run)
        assert r.engine.counters.starts == 2
        assert await delivered_in(r, run) == ids
        await holds(r)


async def test_a_standby_goes_on_with_a_replay(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.01))
        ids = await r.emit(300)
        await r.settled()
        run = await start_run(r, endpoint, ids, rate_per_s=200.0)
        await until(lambda: len(r.received) >= 350)
        standby = Engine(PgStore(dsn, r.settings), r.transport, r.settings, owner="standby")
        waiting = asyncio.create_task(standby.run())
        await until(lambda: standby.state is State.STANDBY)
        await r.kill()
        await until(lambda: standby.state is State.OWNER)
        await finished(r, run)
        assert await delivered_in(r, run) == ids
        row = await progress(r, run)
        assert (row["attempted"], row["delivered"]) == (300, 300)
        assert len(r.received) - 600 <= 100, "repeated is what was in flight at the most"
        await holds(r)
        standby.stop()
        await waiting
        await r.start()  # what the rig ends


async def test_a_resend_beside_a_pending_retry(dsn: str) -> None:
    async with rig(dsn, retry_schedule_s=(3,)) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500))
        [event] = await r.emit()
        await until(lambda: r.db.fetchval("SELECT true FROM webhook.retry"))
        r.sink.set_behaviour("/hook", Behaviour())
        run = await start_run(r, endpoint, [event])
        await finished(r, run, within_s=2.5)
        assert await delivered_in(r, run) == [event]
        await holds(r)
        await r.settled()  # the original goes its own way
        assert [(a["run"], a["number"], a["fault"]) for a in await r.attempts()] == [
            (0, 1, "status"),
            (0, 2, None),
            (run, 1, None),
        ]


async def test_overlapping_replays_each_deliver_their_own(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.002))
        ids = await r.emit(300)
        await r.settled()
        first = await start_run(r, endpoint, ids[:200])
        second = await start_run(r, endpoint, ids[100:])
        single = await start_run(r, endpoint, ids[150:151])
        await finished(r, first, second, single)
        assert await delivered_in(r, first) == ids[:200]
        assert await delivered_in(r, second) == ids[100:]
        assert await delivered_in(r, single) == ids[150:151]
        assert len(r.received) == 300 + 200 + 200 + 1
        await holds(r)


async def test_what_fails_in_a_run_is_retried_in_it_and_dies_in_it(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint()
        ids = await r.emit(6)
        await r.settled()
        r.sink.set_behaviour("/hook", Behaviour(status=500))
        run = await start_run(r, endpoint, ids)
        await until(
            lambda: r.db.fetchval("SELECT count(*) = 6 FROM webhook.dead_letter WHERE run = $1", run), within_s=30
        )
        await finished(r, run)
        row = await progress(r, run)
        assert (row["attempted"], row["delivered"], row["dead"]) == (6, 0, 6)
        assert Counter(a["number"] for a in await r.attempts(run=run)) == {1: 6, 2: 6, 3: 6}
        await holds(r)


async def test_only_failed_recovers_what_was_given_up(dsn: str) -> None:
    async with rig(dsn, **(QUICK | {"retry_schedule_s": (1,)})) as r:
        endpoint = await r.endpoint()
        good = await r.emit(10)
        await r.settled()
        r.sink.set_behaviour("/hook", Behaviour(status=400))
        bad = await r.emit(4)
        await until(lambda: r.db.fetchval("SELECT count(*) = 4 FROM webhook.dead_letter"), within_s=20)
        r.sink.set_behaviour("/hook", Behaviour())
        run = await start_run(r, endpoint, [*good, *bad], only_failed=True)
        await finished(r, run)
        assert await delivered_in(r, run) == bad
        again = await start_run(r, endpoint, [*good, *bad], only_failed=True)
        await finished(r, again)
        assert await delivered_in(r, again) == [], "they are delivered now"


async def resend_dead_letters(r: Rig, endpoint: int, ids: list[int]) -> int:
    """Resend all open dead letters, as `dispatcher dead-letter resend` does."""
    async with r.db.transaction():
        run = await start_run(r, endpoint, ids, source="dead_letter")
        await r.db.execute("UPDATE webhook.dead_letter SET state = 'resent', resent_run = $1 WHERE state = 'open'", run)
    return run


async def test_dead_letters_are_resent_after_the_log_has_forgotten_them(dsn: str) -> None:
    async with rig(dsn, **(QUICK | {"retry_schedule_s": (1,)})) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=400))
        ids = await r.emit(3, payload='{"kept": true}')
        await until(lambda: r.db.fetchval("SELECT count(*) = 3 FROM webhook.dead_letter"), within_s=20)
        public_ids = {e.webhook_id for e in r.received}
        await r.db.execute("DELETE FROM webhook.outbox")
        in_vain = await resend_dead_letters(r, endpoint, ids)
        await finished(r, in_vain)
        row = await progress(r, in_vain)
        assert (row["attempted"], row["delivered"], row["dead"]) == (3, 0, 3)
        assert (
            await r.db.fetchval("SELECT count(*) FROM webhook.dead_letter WHERE state = 'open' AND run = $1", in_vain)
            == 3
        )
        r.sink.set_behaviour("/hook", Behaviour())
        r.received.clear()
        run = await resend_dead_letters(r, endpoint, ids)
        await finished(r, run)
        assert await delivered_in(r, run) == ids
        assert sorted(e.webhook_id for e in r.received) == sorted(public_ids), "once each, under the same public ids"
        await holds(r)


async def test_fresh_events_overtake_a_replay(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.02), in_flight_max=8)
        ids = await r.emit(600)
        await r.settled()
        run = await start_run(r, endpoint, ids)
        await until(lambda: len(r.received) > 650)
        before = len(r.received)
        fresh = await r.emit(20)
        await until(
            lambda: r.db.fetchval(
                "SELECT count(*) = 20 FROM webhook.attempt WHERE event_id = ANY ($1::bigint[])", fresh
            )
        )
        assert len(r.received) - before < 200, "twenty fresh ones went before most of the replay"
        await finished(r, run)
        assert await delivered_in(r, run) == ids


async def test_a_run_waits_for_a_paused_endpoint_and_ends_with_a_deleted_one(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        ids = await r.emit(30)
        await r.settled()
        await r.db.execute("UPDATE webhook.endpoint SET state = 'paused', paused_at_id = 1 WHERE id = $1", endpoint)
        await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)
        run = await start_run(r, endpoint, ids)
        await until(lambda: run in r.engine.incarnation.lanes.get(endpoint).runs)
        await asyncio.sleep(0.2)  # nothing may come
        assert len(r.received) == 30
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", endpoint)
        await finished(r, run)
        assert await delivered_in(r, run) == ids
        last = await start_run(r, endpoint, ids, rate_per_s=10.0)
        await until(lambda: len(r.received) > 60)
        await r.db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", endpoint)
        await until(lambda: r.engine.incarnation.lanes.get(endpoint) is None)
        assert not r.engine.incarnation.lanes.running
        assert (await progress(r, last))["attempted"] < 30


async def test_minutes_are_counted(dsn: str) -> None:
    async with rig(dsn, **(QUICK | {"retry_schedule_s": (1,) * 12})) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(fail_rate=0.5, delay_s=0.003))
        await r.emit(200)
        await until(lambda: r.db.fetchval("SELECT count(DISTINCT event_id) = 200 FROM webhook.attempt"))
        r.sink.set_behaviour("/hook", Behaviour())
        await r.settled()
        await r.stop()
        rows = await r.db.fetch("SELECT * FROM webhook.endpoint_stat WHERE endpoint_id = $1", endpoint)
        attempts = await r.attempts()
        assert sum(row["delivered"] for row in rows) == 200
        assert sum(row["failed"] for row in rows) == len(attempts) - 200 > 0
        assert sum(sum(row["durations"]) for row in rows) == len(attempts)
        exact_ms = sum(a["duration_us"] for a in attempts) / 1000
        assert abs(sum(row["duration_ms"] for row in rows) - exact_ms) <= len(rows)
