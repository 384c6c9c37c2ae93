"""Lanes against real PostgreSQL and real sockets: failures, limits, pauses, falling behind and catching up."""

import asyncio
import itertools

import orjson
import pytest

from dispatcher.domain.breaker import BreakerState
from dispatcher.errors import DatabaseRefusedError
from dispatcher.sink import Behaviour
from tests.rig import rig, until

QUICK = {"retry_schedule_s": (1, 1, 1), "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.4}


def lane(r, endpoint_id):
    return r.engine.incarnation.lanes.get(endpoint_id)


async def test_a_failure_is_retried_and_its_row_goes(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500, body=b"broken"))
        [event_id] = await r.emit()
        [retry] = await until(lambda: r.db.fetch("SELECT * FROM webhook.retry"))
        assert (retry["endpoint_id"], retry["event_id"], retry["number"]) == (endpoint, event_id, 2)
        r.sink.set_behaviour("/hook", Behaviour())
        await r.settled()
        first, second = await r.attempts()
        assert (first["number"], first["status"], first["fault"]) == (1, 500, "status")
        assert b"broken" in first["response_head"]
        assert (second["number"], second["status"], second["fault"], second["response_head"]) == (2, 204, None, None)
        assert [event.attempt for event in r.received] == [1, 2]
        assert len({event.webhook_id for event in r.received}) == 1


async def test_an_exhausted_schedule_ends_in_a_dead_letter_with_its_own_copy(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        await r.endpoint(behaviour=Behaviour(status=400))
        [event_id] = await r.emit(payload='{"keep": "me"}')
        [dead] = await until(
            lambda: r.db.fetch("SELECT *, payload::text AS copy FROM webhook.dead_letter"), within_s=20
        )
        assert (dead["event_id"], dead["attempts"], dead["status"], dead["copy"]) == (
            event_id,
            4,
            400,
            '{"keep": "me"}',
        )
        await until(lambda: r.db.fetchval("SELECT NOT EXISTS (SELECT FROM webhook.retry)"))
        assert [row["number"] for row in await r.attempts()] == [1, 2, 3, 4]


async def test_410_disables_the_endpoint_and_tells_the_others(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        gone = await r.endpoint("/gone", types=("message.*",), behaviour=Behaviour(status=410))
        await r.endpoint("/other", types=("endpoint.*",))
        await r.emit()
        await until(
            lambda: r.db.fetchval(
                "SELECT state = 'disabled' AND state_reason = 'gone' FROM webhook.endpoint WHERE id = $1", gone
            )
        )
        await until(lambda: [e for e in r.received if e.path == "/other"])
        [notice] = [orjson.loads(e.body) for e in r.received if e.path == "/other"]
        assert notice["type"] == "endpoint.disabled"
        assert notice["data"]["endpoint"]["id"] == gone
        assert notice["data"]["reason"] == "gone"
        await until(lambda: r.db.fetchval("SELECT count(*) = 1 FROM webhook.dead_letter WHERE endpoint_id = $1", gone))
        await until(lambda: lane(r, gone).held)
        await r.emit(3)
        await until(lambda: lane(r, gone).backlog >= 3)
        assert r.by_path()["/gone"] == 1


async def test_the_breaker_opens_and_its_probes_go_one_at_a_time(dsn: str) -> None:
    async with rig(dsn, **QUICK | {"retry_schedule_s": (60,)}) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500), in_flight_max=1)
        await r.emit(50)
        await until(lambda: lane(r, endpoint).breaker.state is not BreakerState.CLOSED)
        await until(lambda: lane(r, endpoint).breaker.opened_times >= 3)
        probed = len(r.received)
        assert probed <= 7 + lane(r, endpoint).breaker.opened_times + 1, "more than seven failures and one probe a wait"
        r.sink.set_behaviour("/hook", Behaviour())
        await until(lambda: lane(r, endpoint).breaker.state is BreakerState.CLOSED)
        await until(lambda: len(r.received) >= 50)
        await until(lambda: r.db.fetchval("SELECT count(DISTINCT event_id) = 50 FROM webhook.attempt"))
        await until(lambda: lane(r, endpoint).live)


async def test_retry_after_stops_the_lane_and_does_not_count_for_the_breaker(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=429, retry_after="3600"), in_flight_max=1)
        await r.emit(20)
        await until(lambda: r.db.fetch("SELECT FROM webhook.retry"))
        await until(lambda: lane(r, endpoint).backlog or not lane(r, endpoint).live)
        assert len(r.received) == 1
        assert lane(r, endpoint).breaker.state is BreakerState.CLOSED
        assert lane(r, endpoint).breaker.consecutive == 0
        due_in = await r.db.fetchval("SELECT extract(epoch FROM due_at - now()) FROM webhook.retry")
        assert 3500 < due_in <= 3600


async def test_a_rate_limit_is_never_exceeded(dsn: str) -> None:
    rate, burst = 100.0, 5
    async with rig(dsn) as r:
        await r.endpoint("/limited", rate_per_s=rate, rate_burst=burst)
        await r.endpoint("/free")
        await r.emit(150)
        await r.settled()
        times = sorted(e.received_at for e in r.received if e.path == "/limited")
        assert len(times) == 150
        # In any span of t seconds at most rate·t + burst; two more for arrivals that the sockets bunched up.
        for first, last in itertools.combinations(range(0, 150, 7), 2):
            assert last - first + 1 <= rate * (times[last] - times[first]) + burst + 2
        assert times[-1] - times[0] < 2 * (150 - burst) / rate, "and it is used"
        assert max(e.received_at for e in r.received if e.path == "/free") < times[-1]


async def test_a_pause_holds_events_and_a_resume_sends_them(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await r.emit(5)
        await until(lambda: len(r.received) == 5)
        await r.db.execute(
            "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1", endpoint
        )
        await until(lambda: lane(r, endpoint).held, within_s=1.0)
        await r.emit(3_000)
        await until(lambda: lane(r, endpoint).backlog == 3_000)
        assert len(r.received) == 5
        assert r.engine.incarnation.lanes.memory.events == 0
        row = await until(lambda: r.db.fetchrow("SELECT * FROM webhook.lane"))
        assert row["endpoint_id"] == endpoint
        await until(
            lambda: r.db.fetchval("SELECT position FROM webhook.checkpoint"),
            what="the checkpoint moves past a paused lane",
        )
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live', paused_at_id = NULL WHERE id = $1", endpoint)
        await r.settled()
        assert len(r.received) == 3_005
        assert len({e.webhook_id for e in r.received}) == 3_005


async def test_a_full_queue_makes_the_lane_lag_and_it_catches_up_without_doubles(dsn: str) -> None:
    async with rig(dsn, queue_events_max=20) as r:
        slow = await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.01), in_flight_max=4)
        await r.endpoint("/fast")
        await r.emit(2_000)
        await until(lambda: not lane(r, slow).live)
        await until(lambda: r.by_path()["/fast"] == 2_000)
        assert r.by_path()["/slow"] < 2_000, "the fast one waited for the slow one"
        await r.settled()
        assert r.by_path() == {"/slow": 2_000, "/fast": 2_000}
        assert r.engine.counters.caught_up >= 1
        await until(lambda: r.engine.incarnation.lanes.memory.events == 0)


async def test_one_hanging_post_does_not_hold_the_checkpoint(dsn: str) -> None:
    async with rig(dsn, headers_timeout_s=30) as r:
        hung = await r.endpoint("/hung", behaviour=Behaviour(mode="hang"), timeout_ms=30_000)
        await r.endpoint("/fast")
        [first] = await r.emit()
        await r.emit(100)
        await until(lambda: r.by_path()["/fast"] == 101)
        # After five seconds the hung ids are holes, and the position passes them.
        await until(lambda: r.db.fetchval("SELECT position > $1 FROM webhook.checkpoint", first + 50), within_s=12)
        row = await r.db.fetchrow(
            "SELECT l.*, c.gaps, c.position FROM webhook.checkpoint c LEFT JOIN webhook.lane l ON l.endpoint_id = $1",
            hung,
        )
        kept = row["gaps"] if row["holes"] is None else [*row["gaps"], *row["holes"]]
        assert (row["settled"] is not None and row["settled"] < first) or any(
            first in range(g.lower, g.upper) for g in kept
        )


async def test_lanes_not_tried_yet_and_failing_lanes_hold_a_quarter_of_the_slots_each(dsn: str) -> None:
    async with rig(dsn, slots=40, headers_timeout_s=1, retry_schedule_s=(1,), breaker_wait_s=0.1) as r:
        good = await r.endpoint("/good", account="good")
        await r.emit(5, account="good")
        await until(lambda: not lane(r, good).untried)
        for n in range(30):
            await r.endpoint(f"/hang{n}", behaviour=Behaviour(mode="hang"), account="bad")
        await r.emit(20, account="bad")
        sender = r.engine.incarnation.sender
        await until(lambda: sender.in_flight == 10, what="the hanging fill the quarter of the untried")
        await r.emit(500, account="good")
        await until(lambda: r.by_path()["/good"] == 505, within_s=2, what="a proven lane isn't touched")
        # The good one's last requests may have reached the sink, and their answers not have been read.
        assert sender.in_flight - lane(r, good).in_flight <= 20
        await until(lambda: sender.shares.failing.held > 0, what="they failed, and count as failing now")
        highest = 0
        for _ in range(20):
            sent = r.by_path()["/good"]
            await r.emit(50, account="good")
            await until(lambda sent=sent: r.by_path()["/good"] == sent + 50, within_s=2)
            highest = max(highest, sender.shares.failing.held)
        assert highest <= 10


async def test_retries_get_their_turn_while_fresh_events_wait(dsn: str) -> None:
    async with rig(dsn, **QUICK) as r:
        # Fails its first ten, then is well but slow: a backlog of fresh events stands while the retries come due.
        endpoint = await r.endpoint(behaviour=Behaviour(status=500), in_flight_max=2, rate_per_s=100, rate_burst=1)
        await r.emit(5)
        await until(lambda: len(r.received) == 5)
        r.sink.set_behaviour("/hook", Behaviour())
        await r.emit(400)
        await r.settled()
        attempts = [e.attempt for e in r.received]
        last_retry = max(n for n, attempt in enumerate(attempts) if attempt == 2)
        assert last_retry < len(attempts) - 50, "retries waited for the end of the queue"
        assert lane(r, endpoint).live


async def test_configuration_is_learnt_while_running(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint("/old")
        await r.emit()
        await until(lambda: r.by_path()["/old"] == 1)
        await r.db.execute("UPDATE webhook.endpoint SET url = $2 WHERE id = $1", endpoint, r.sink.url + "/new")
        await until(lambda: lane(r, endpoint).endpoint.target.request_target == "/new", within_s=1.0)
        await r.emit()
        await until(lambda: r.by_path()["/new"] == 1)
        late = await r.endpoint("/late", types=("link.*",))
        await until(lambda: lane(r, late) is not None and lane(r, late).live)
        await r.emit(type="link.clicked")
        await until(lambda: r.by_path()["/late"] == 1)
        async with r.db.transaction():
            await r.db.execute("DELETE FROM webhook.subscription WHERE endpoint_id = $1", late)
            await r.db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", late)
        await until(lambda: lane(r, late) is None, within_s=1.0)
        await r.emit(type="link.clicked")
        await r.settled()
        assert r.by_path()["/late"] == 1
        assert await r.db.fetchval("SELECT bool_and(taken_up) FROM webhook.subscription")


async def test_nothing_before_a_subscription_is_sent_and_everything_after(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.endpoint("/first")
        before = await r.emit(10)
        second = await r.endpoint("/second")
        after = await r.emit(10)
        await r.settled()
        sent = [row["event_id"] for row in await r.attempts(endpoint_id=second)]
        assert sent == after
        assert not set(sent) & set(before)


async def test_a_thousand_endpoints_get_one_event(dsn: str) -> None:
    async with rig(dsn) as r:
        async with r.db.transaction():
            for n in range(1_000):
                await r.endpoint(f"/{n}")
        await until(lambda: len(r.engine.incarnation.lanes) == 1_000)
        await r.emit()
        await r.settled()
        assert len(r.by_path()) == 1_000


async def test_memory_is_bounded_in_events_and_nothing_is_lost(dsn: str) -> None:
    async with rig(dsn, memory_events_max=200, queue_events_max=100) as r:
        for n in range(20):
            await r.endpoint(f"/{n}", behaviour=Behaviour(delay_s=0.02), in_flight_max=5)
        memory = r.engine.incarnation.lanes.memory
        highest = 0

        async def watch() -> None:
            nonlocal highest
            while True:
                highest = max(highest, memory.events)
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        await r.emit(1_000)
        await r.settled(within_s=60)
        watcher.cancel()
        assert len(r.received) == 20_000
        assert 0 < highest <= 200 + 200, "the bound, and one page of another kind"


async def test_room_of_a_share_is_not_left_to_lanes_that_cannot_use_it(dsn: str) -> None:
    async with rig(dsn, slots=8, headers_timeout_s=1, retry_schedule_s=(60,)) as r:
        for n in range(4):
            await r.endpoint(f"/hang{n}", behaviour=Behaviour(mode="hang"), account="hang", in_flight_max=1)
        paused = [await r.endpoint(f"/paused{n}", account="paused") for n in range(4)]
        await r.endpoint("/well", account="well")
        await r.emit(account="hang")
        sender = r.engine.incarnation.sender
        await until(lambda: sender.in_flight == 2, what="the untried share is full of hanging POSTs")
        await r.emit(account="paused")
        await until(lambda: len(sender.shares.untried.line) >= 4)
        await r.emit(account="well")
        await until(lambda: len(sender.shares.untried.line) >= 5)
        await r.db.execute("UPDATE webhook.endpoint SET state = 'paused', paused_at_id = 0 WHERE account_id = 'paused'")
        await until(lambda: all(lane(r, one).held for one in paused))
        await until(lambda: r.by_path()["/well"] == 1, within_s=5)


async def test_a_sequence_that_gets_a_cache_stops_the_engine_with_the_remedy(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.db.execute("ALTER SEQUENCE webhook.outbox_id_seq CACHE 50")
        with pytest.raises(DatabaseRefusedError, match="CACHE 1"):
            await asyncio.wait_for(asyncio.shield(r.task), 5)
        r.task = None


async def test_endpoints_that_hang_leave_sockets_to_others_of_their_origin(dsn: str) -> None:
    async with rig(dsn, slots=200, sockets_per_origin_max=8, headers_timeout_s=20, retry_schedule_s=(60,)) as r:
        well = await r.endpoint("/well", account="well")
        await r.emit(account="well")
        await until(lambda: r.by_path()["/well"] == 1)
        for n in range(30):
            await r.endpoint(f"/hang{n}", behaviour=Behaviour(mode="hang"), account="hang")
        await r.emit(account="hang")
        sender = r.engine.incarnation.sender
        await until(lambda: sender.in_flight == 2, what="the origin's share for who has not been tried is full")
        for _ in range(20):
            await r.emit(account="well")
        await until(lambda: r.by_path()["/well"] == 21, within_s=10)
        assert sender.in_flight == 2
        assert lane(r, well).is_ordinary
