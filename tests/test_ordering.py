"""Ordering by key, expiry and priority, by the whole engine on a real PostgreSQL."""

from pathlib import Path

import orjson
import pytest

from dispatcher.engine import recorder as recorder_module
from dispatcher.sink import Behaviour
from dispatcher.store.admin import Admin
from tests.conftest import connected
from tests.rig import Rig, rig, until

INVARIANT = (Path(__file__).parent / "invariant.sql").read_text()
LATE = """INSERT INTO webhook.outbox (account_id, type, payload, ordering_key) VALUES ('acct', 'a.b', '{"e": "a2"}', 'a')"""
WELL, ILL = Behaviour(), Behaviour(fail_rate=1.0)
PATIENT = {"retry_schedule_s": "1,1,1,1,1,1", "breaker_failures": 1_000}


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "CHECKPOINT_S", 0.1)


def delivered(r: Rig) -> list[str]:
    """The payloads' `e` in the order in which the sink answered well."""
    return [orjson.loads(event.body)["data"]["e"] for event in r.received if event.status == 204]


async def emit(r: Rig, *names: str, **options) -> None:
    """Append events; the first letter of a name is its key."""
    for name in names:
        await r.emit(payload=f'{{"e": "{name}"}}', key=name[0], **options)


async def holds(r: Rig) -> list[str]:
    return [row["ordering_key"] for row in await r.db.fetch("SELECT ordering_key FROM webhook.retry ORDER BY event_id")]


async def with_a_failed_head(r: Rig, ordering: str = "block") -> int:
    """An endpoint of which `a1` has failed, and is well again."""
    endpoint_id = await r.endpoint(ordering=ordering, behaviour=ILL)
    await emit(r, "a1")
    await until(lambda: holds(r))
    r.sink.set_behaviour("/hook", WELL)
    return endpoint_id


async def test_a_failing_head_holds_back_its_own_key_only(dsn: str) -> None:
    async with rig(dsn, **PATIENT) as r:
        await with_a_failed_head(r)
        await emit(r, "b1", "a2", "b2", "a3", "c1")
        await until(lambda: {"b1", "b2", "c1"} <= set(delivered(r)))
        await r.settled()
        assert [name for name in delivered(r) if name[0] == "a"] == ["a1", "a2", "a3"]
        assert [name for name in delivered(r) if name[0] == "b"] == ["b1", "b2"]
        assert await r.db.fetch(INVARIANT) == []


async def test_what_is_held_back_lies_in_the_log(dsn: str) -> None:
    """Not in memory; and it holds neither the checkpoint nor the lane."""
    async with rig(dsn, retry_schedule_s="600", breaker_failures=1_000) as r:
        await with_a_failed_head(r)
        ids = await r.emit(3_000, key="a")
        others = await r.emit(5, key="b")

        async def written() -> bool:
            row = await r.db.fetchrow(
                "SELECT c.position, l.settled, l.holes::text AS holes FROM webhook.checkpoint c, webhook.lane l"
            )
            return row is not None and tuple(row) == (others[-1], others[-1], f"{{[{ids[0]},{ids[-1] + 1})}}")

        await until(written)
        lane = next(iter(r.engine.incarnation.lanes))
        assert (lane.live, lane.queued(), len(lane.keys), r.engine.incarnation.lanes.memory.events) == (True, 0, 1, 0)
        assert await r.db.fetchval("SELECT backlog FROM webhook.lane") == 3_000
        assert r.engine.lane_health(lane.id)[0]["held_back_ids"] == 3_000


async def test_a_key_is_free_when_the_event_that_held_it_is_gone(dsn: str) -> None:
    """Erased while it was in flight, and then it failed: its retry is nobody's, and the next of its key waited for it until the next start."""
    async with rig(dsn, **PATIENT) as r:
        await with_a_failed_head(r)
        await emit(r, "a2", "b1")
        await r.db.execute("DELETE FROM webhook.outbox WHERE payload->>'e' = 'a1'")
        await until(lambda: sorted(delivered(r)) == ["a2", "b1"])
        assert await holds(r) == []


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_key_is_held_over_a_restart(dsn: str, end: str) -> None:
    async with rig(dsn, **PATIENT) as r:
        await with_a_failed_head(r)
        await emit(r, "a2", "b1")
        await until(lambda: "b1" in delivered(r))
        await (r.stop() if end == "stop" else r.kill())
        await emit(r, "a3", "b2")
        await r.start()
        await r.settled()
        assert list(dict.fromkeys(name for name in delivered(r) if name[0] == "a")) == ["a1", "a2", "a3"]
        assert await r.db.fetch(INVARIANT) == []


async def test_a_key_goes_on_after_so_many_attempts(dsn: str) -> None:
    async with rig(dsn, retry_schedule_s="600,600,600", breaker_failures=1_000) as r:
        await r.endpoint(ordering="give_up_after 1", behaviour=ILL)
        await emit(r, "a1")
        reason = await until(lambda: r.db.fetchval("SELECT reason FROM webhook.dead_letter"))
        assert reason == "attempt 1 was the last that its key waits for"
        r.sink.set_behaviour("/hook", WELL)
        await emit(r, "a2", "a3")
        await until(lambda: delivered(r) == ["a2", "a3"])


async def test_keys_wait_while_their_lane_is_behind(dsn: str) -> None:
    async with rig(dsn, queue_events_max=10, memory_events_max=100, **PATIENT) as r:
        endpoint_id = await with_a_failed_head(r)
        await r.db.execute("UPDATE webhook.endpoint SET state = 'paused', paused_at_id = 0 WHERE id = $1", endpoint_id)
        for n in range(2, 60):
            await emit(r, f"a{n}", f"b{n}")
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", endpoint_id)
        await r.settled()
        assert [name for name in delivered(r) if name[0] == "a"] == [f"a{n}" for n in range(1, 60)]
        assert [name for name in delivered(r) if name[0] == "b"] == [f"b{n}" for n in range(2, 60)]


async def test_an_event_that_commits_late_goes_next(dsn: str) -> None:
    """Ids say the order, of what can be seen: what was committed later by a longer transaction comes after what was sent meanwhile."""
    async with rig(dsn, **PATIENT) as r:
        await with_a_failed_head(r)
        async with connected(dsn) as other:
            async with other.transaction():
                await other.execute(LATE)
                await emit(r, "a3", "a4")
            await r.settled()
        assert delivered(r) == ["a1", "a2", "a3", "a4"], "it was there before the key was free"


async def test_what_has_expired_is_settled_unsent_and_shown(dsn: str) -> None:
    async with rig(dsn, retry_schedule_s="600", breaker_failures=1_000) as r:
        endpoint_id = await r.endpoint(behaviour=ILL, ordering="block")
        stale = await r.emit(payload='{"e": "stale"}', expires_s=-1)
        await r.emit(payload='{"e": "a1"}', key="a", expires_s=1.0)
        await until(lambda: holds(r))
        r.sink.set_behaviour("/hook", WELL)
        await emit(r, "a2")
        await until(lambda: delivered(r) == ["a2"], what="the head expires, and its key goes on")

        async def recorded() -> bool:
            return len(await r.attempts()) == 4

        await until(recorded)
        rows = [(row["event_id"] - stale[0], row["number"], row["fault"]) for row in await r.attempts()]
        assert rows == [(0, 0, "expired"), (1, 0, "expired"), (1, 1, "status"), (2, 1, None)]
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0
        assert r.engine.counters.expired == 2
        assert await r.db.fetch(INVARIANT) == []
        admin = Admin(r.db, r.settings)
        fates = [(await admin.events.show(str(stale[0] + n)))["deliveries"][0]["fate"] for n in range(3)]
        assert fates == ["expired, unsent", "expired after 1 failed", "delivered"]
        await r.stop()  # the minute under way is written
        assert (await admin.get(endpoint_id)).expired == 2


async def test_what_has_priority_overtakes_a_backlog(dsn: str) -> None:
    async with rig(dsn, queue_events_max=5, memory_events_max=100) as r:
        endpoint_id = await r.endpoint(rate_per_s=40.0, rate_burst=1)
        await r.emit(200, payload='{"e": "receipt"}')
        lane = r.engine.incarnation.lanes.get(endpoint_id)
        await until(lambda: not lane.live)
        await r.emit(2, payload='{"e": "reply"}', priority=1)
        await r.emit(1, payload='{"e": "stop"}', priority=9)
        await until(lambda: delivered(r).count("reply") == 2)
        before = delivered(r)
        assert before.count("receipt") < 60, "of two hundred"
        assert "stop" in before
        assert r.engine.counters.urgent_reads < 10, "nobody looks ahead for nothing"
