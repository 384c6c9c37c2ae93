"""The janitor beside a working dispatcher: real PostgreSQL, real sockets. What is old goes, what is lost is counted once, nothing else moves."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from dispatcher.domain.retention import Span
from dispatcher.engine import janitor, provision, recorder
from dispatcher.ports import Expired, FencedError, LogShape, StoreAwayError
from dispatcher.sink import Behaviour
from dispatcher.store import partitions as partitions_module
from dispatcher.store.partitions import PgPartitions
from tests.conftest import connected
from tests.rig import Rig, rig, until

INVARIANT = (Path(__file__).parent / "invariant.sql").read_text()
FIRST_LEAF = 100_000  # ids
END = 40_000_000  # of the first leaves


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "TURN_S", 0.1)
    monkeypatch.setattr(janitor, "BUSY_S", 0.01)
    for module, name in ((provision, "TRY_S"), (janitor, "TRY_S"), (janitor, "EXPIRE_S")):
        monkeypatch.setattr(module, name, 0.1)
    monkeypatch.setattr(recorder, "CHECKPOINT_S", 0.2)


@contextlib.asynccontextmanager
async def kept(dsn: str, *, start: bool = True, **settings: Any) -> AsyncIterator[Rig]:
    """A rig with a janitor, and DESIGN §4's invariant asked all the while."""
    async with rig(dsn, start=False, **settings) as r:
        r.make_partitions = lambda: PgPartitions(r.dsn, timeout_s=10)
        if start:
            await r.start()
        async with connected(dsn) as watch:
            watching = asyncio.create_task(_watch(watch))
            try:
                yield r
            finally:
                watching.cancel()
                result = (await asyncio.gather(watching, return_exceptions=True))[0]
                assert isinstance(result, asyncio.CancelledError), result
                assert await r.db.fetch(INVARIANT) == []


async def _watch(db: asyncpg.Connection) -> None:
    while True:
        violations = await db.fetch(INVARIANT)
        assert violations == []
        await asyncio.sleep(0.05)


async def skip_to(r: Rig, last_id: int) -> None:
    await r.db.execute("SELECT setval('webhook.outbox_id_seq', $1)", last_id)


async def grow_old(r: Rig, upto: int, days: float = 8) -> None:
    """Let the events up to `upto` have happened days ago."""
    await r.db.execute(
        "UPDATE webhook.outbox SET created_at = created_at - $2 * interval '1 day' WHERE id <= $1", upto, days
    )


async def leaves(r: Rig, parent: str = "outbox") -> list[int]:
    rows = await r.db.fetch(
        "SELECT low FROM webhook.leaves() WHERE parent = $1 AND low IS NOT NULL ORDER BY low", parent
    )
    return [row["low"] for row in rows]


async def lost(r: Rig) -> dict[int, int]:
    """Deliveries that expired, by endpoint."""
    rows = await r.db.fetch(
        "SELECT endpoint_id, sum(deliveries)::integer AS n FROM webhook.discard WHERE reason = 'expired' GROUP BY 1"
    )
    return {row["endpoint_id"]: row["n"] for row in rows}


async def put_behind(r: Rig, endpoint: int, settled: int = 0, holes: str = "{}") -> None:
    """Let an earlier dispatcher have come to the second leaf, but for this endpoint."""
    async with r.db.transaction():
        await r.db.execute("UPDATE webhook.subscription SET taken_up = true")
        await r.db.execute("UPDATE webhook.checkpoint SET position = $1", FIRST_LEAF + 1)
        await r.db.execute(
            "INSERT INTO webhook.lane (endpoint_id, settled, holes) VALUES ($1, $2, $3::text::int8multirange)",
            endpoint,
            settled,
            holes,
        )


async def is_expired(r: Rig, low: int = 0, high: int = FIRST_LEAF) -> bool:
    return not await r.db.fetchval("SELECT EXISTS (SELECT FROM webhook.outbox WHERE id >= $1 AND id < $2)", low, high)


async def is_taken_in(r: Rig) -> bool:
    """Tell whether the checkpoint has come to the last id, without a gap."""
    return await r.db.fetchval("SELECT position >= webhook.last_id() AND isempty(gaps) FROM webhook.checkpoint")


async def pause(r: Rig, endpoint: int, state: str = "paused") -> None:
    await r.db.execute(
        "UPDATE webhook.endpoint SET state = $2, paused_at_id = webhook.last_id() WHERE id = $1", endpoint, state
    )
    await until(lambda: held(r, endpoint))


def held(r: Rig, endpoint: int) -> bool:
    assert r.engine.incarnation is not None
    lane = r.engine.incarnation.lanes.get(endpoint)
    return lane is not None and lane.held


def paths_and_ids(r: Rig) -> Counter[tuple[str, str | None]]:
    return Counter((event.path, event.webhook_id) for event in r.received)


# ── age ──


async def test_the_oldest_leaf_goes_while_deliveries_go_on(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        old = await r.emit(500)
        await skip_to(r, FIRST_LEAF)
        young = await r.emit(500)
        await r.settled()
        before = await r.db.fetchval("SELECT sum(pg_total_relation_size(leaf)) FROM webhook.leaves() WHERE low = 0")
        assert await leaves(r) == [0, 100_000, 1_000_000, 10_000_000]
        emitting = asyncio.create_task(emit_for(r, 2.0))
        await grow_old(r, FIRST_LEAF)
        await until(lambda: is_expired(r), what="the first leaf is empty")

        async def dropped() -> bool:
            return (await leaves(r))[0] == 100_000

        await until(dropped, what="and its shell is gone")
        young += await emitting
        await r.settled()
        assert before > 0
        assert await lost(r) == {}
        assert {row["event_id"] for row in await r.attempts()} == set(young)
        assert max(paths_and_ids(r).values()) == 1
        assert len(r.received) == len(old) + len(young)
        assert r.engine.counters.partitions_expired == 1
        assert r.engine.counters.deliveries_expired == 0
        assert (await leaves(r, "attempt"))[0] == 0  # attempts keep their oldest leaf


async def emit_for(r: Rig, seconds: float) -> list[int]:
    ids = []
    loop = asyncio.get_running_loop()
    async with connected(r.dsn) as producer:
        until_s = loop.time() + seconds
        while loop.time() < until_s:
            ids.append(
                await producer.fetchval(
                    "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', '{}') RETURNING id"
                )
            )
            await asyncio.sleep(0.005)
    return ids


async def test_young_events_stay(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        await r.emit(5)
        await skip_to(r, FIRST_LEAF)
        await r.emit(5)
        await r.settled()
        await grow_old(r, 4)  # the newest of the leaf is young
        await skip_turns(r, 5)
        assert len(await leaves(r)) == 4
        assert await r.db.fetchval("SELECT count(*) FROM webhook.outbox") == 10


async def skip_turns(r: Rig, turns: int) -> None:
    """Let the janitor have so many turns from now on."""
    incarnation = r.engine.incarnation
    assert incarnation is not None
    assert incarnation.janitor is not None
    done = incarnation.janitor.turns + turns + 1
    await until(lambda: incarnation.janitor is not None and incarnation.janitor.turns >= done)


async def test_a_log_that_is_too_large_goes_by_its_size(dsn: str) -> None:
    async with kept(dsn, retention_bytes_max=16_777_216) as r:
        await r.endpoint()
        await r.emit(200, payload='"' + "x" * 100_000 + '"')
        await skip_to(r, FIRST_LEAF)
        await r.emit(5)
        await r.settled()
        await until(lambda: is_expired(r), what="the first leaf is empty")
        total = await r.db.fetchval("SELECT sum(pg_total_relation_size(leaf))::bigint FROM webhook.leaves()")
        assert total < 16_777_216
        await skip_turns(r, 3)
        assert await r.db.fetchval("SELECT count(*) FROM webhook.outbox") == 5


async def test_a_log_that_is_too_large_and_has_nothing_to_give_is_told(dsn: str) -> None:
    with capture_logs() as logs:
        async with kept(dsn, retention_bytes_max=16_777_216) as r:
            await r.emit(200, payload='"' + "x" * 100_000 + '"')
            await until(lambda: any(line["event"] == "retention.too_large" for line in logs))
            await skip_turns(r, 3)
    assert sum(line["event"] == "retention.too_large" for line in logs) == 1


# ── what is lost ──


async def test_a_paused_endpoints_losses_are_counted_exactly(dsn: str) -> None:
    async with kept(dsn, log_level="info") as r:
        live = await r.endpoint("/live")
        paused = await r.endpoint("/paused", types=("message.*",), name="was away")
        off = await r.endpoint("/off", account="other")
        await r.emit(10)
        await r.emit(10, account="other")
        await r.settled()
        await pause(r, paused)
        await pause(r, off, "disabled")
        await r.emit(7)
        await r.emit(3, type="link.clicked")
        await r.emit(4, account="other")
        await skip_to(r, FIRST_LEAF)
        young = await r.emit(6)
        await until(lambda: is_taken_in(r))
        with capture_logs() as logs:
            await grow_old(r, FIRST_LEAF)
            await until(lambda: is_expired(r), what="the first leaf is empty")
            await until(lambda: r.engine.counters.partitions_expired == 1)
        assert await lost(r) == {paused: 7, off: 4}
        assert r.engine.counters.deliveries_expired == r.engine.counters.deliveries_expired_held == 11
        told = [
            (line["endpoint_id"], line["deliveries"]) for line in logs if line["event"] == "endpoint.events_expired"
        ]
        assert sorted(told) == [(paused, 7), (off, 4)]
        assert {line["log_level"] for line in logs if line["event"] == "endpoint.events_expired"} == {"warning"}
        event = await r.db.fetchrow(
            "SELECT id, payload->'endpoint'->>'name' AS name, (payload->>'deliveries')::integer AS n, payload->>'from' AS since "
            "FROM webhook.outbox WHERE type = 'endpoint.events_expired' AND account_id = 'acct'"
        )
        assert (event["name"], event["n"]) == ("was away", 7)
        assert event["since"].endswith("Z")
        for endpoint in (paused, off):
            await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", endpoint)
        await r.settled()
        by_path = r.by_path()
        assert by_path["/live"] == 10 + 7 + 3 + 6 + 1  # and what it is told about the other
        assert by_path["/paused"] == 10 + 6
        assert by_path["/off"] == 10 + 1  # it is told of its own loss, for it is the account's only one
        assert {row["event_id"] for row in await r.attempts(endpoint_id=paused)} == set(young)
        backlog = await r.db.fetchval("SELECT count(*) FROM webhook.lane WHERE backlog > 0")
        assert backlog == 0
        assert live != paused


async def test_holes_below_the_settled_mark_are_lost_too(dsn: str) -> None:
    """A lane's row says: all settled up to 10, but for 3 to 5."""
    async with kept(dsn, start=False) as r:
        endpoint = await r.endpoint("/holes", state="paused", paused_at_id=0)
        await r.emit(10)
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await r.db.execute(
            "INSERT INTO webhook.attempt SELECT id, $1, now(), 0, 1, 1, 200 FROM webhook.outbox WHERE id NOT BETWEEN 3 AND 5",
            endpoint,
        )
        await put_behind(r, endpoint, settled=FIRST_LEAF + 1, holes="{[3,6)}")
        await grow_old(r, FIRST_LEAF)
        await r.start()
        await until(lambda: is_expired(r), what="the first leaf is empty")
        assert await lost(r) == {endpoint: 3}
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", endpoint)
        await r.settled()
        assert len(r.received) == 1  # it is told


async def test_deliveries_that_wait_for_a_retry_are_lost_too(dsn: str) -> None:
    async with kept(dsn, retry_schedule_s=(3_600,), breaker_failures=1_000) as r:
        endpoint = await r.endpoint("/failing", behaviour=Behaviour(status=500))
        await r.emit(4)
        await skip_to(r, FIRST_LEAF)
        [young] = await r.emit(1)

        async def failed() -> bool:
            return await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 5 and await is_taken_in(r)

        await until(failed)
        await grow_old(r, FIRST_LEAF)
        await until(lambda: is_expired(r), what="the first leaf is empty")
        assert await lost(r) == {endpoint: 4}
        rows = await r.db.fetch("SELECT event_id FROM webhook.retry")
        assert young in {row["event_id"] for row in rows}
        assert all(row["event_id"] >= young for row in rows)


async def test_losses_of_several_leaves_add_up(dsn: str) -> None:
    async with kept(dsn) as r:
        endpoint = await r.endpoint("/paused")
        await pause(r, endpoint)
        counts = []
        for n, last_id in enumerate((0, FIRST_LEAF, 1_000_000), start=1):
            await skip_to(r, last_id + 1)
            counts.append(len(await r.emit(10 * n)))
        await skip_to(r, 10_000_000)
        await r.emit(1)
        await until(lambda: is_taken_in(r))
        await grow_old(r, 10_000_000)
        await until(lambda: is_expired(r, 0, 10_000_000), what="three leaves are empty")
        assert await lost(r) == {endpoint: sum(counts)}

        async def rows() -> bool:
            return await r.db.fetchval("SELECT count(*) FROM webhook.discard") == 3

        await until(rows)


async def test_a_run_over_what_is_gone_finds_nothing_and_ends(dsn: str) -> None:
    async with kept(dsn) as r:
        endpoint = await r.endpoint("/hook")
        ids = await r.emit(5)
        await skip_to(r, FIRST_LEAF)
        young = await r.emit(5)
        await r.settled()
        await pause(r, endpoint)
        async with r.db.transaction():
            run = await r.db.fetchval(
                "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, total) VALUES ($1, $2, $3, 10) RETURNING id",
                endpoint,
                ids[0] - 1,
                young[-1],
            )
            await r.db.execute("INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, $2)", run, ids[0] - 1)
        await grow_old(r, FIRST_LEAF)
        await until(lambda: is_expired(r), what="the first leaf is empty")
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", endpoint)

        async def finished() -> asyncpg.Record:
            return await r.db.fetchrow(
                "SELECT * FROM webhook.run_progress WHERE run_id = $1 AND finished_at IS NOT NULL", run
            )

        row = await until(finished, what="the run has finished")
        assert (row["attempted"], row["delivered"]) == (5, 5)
        assert await lost(r) == {}  # it had all of them once


async def test_a_dead_letter_is_resent_after_its_event_is_gone(dsn: str) -> None:
    """Its attempts find a leaf, whichever are left."""
    async with kept(dsn, retry_schedule_s=(1,), retry_age_max_s=1, breaker_failures=1_000) as r:
        endpoint = await r.endpoint("/flaky", behaviour=Behaviour(status=500))
        [old] = await r.emit(1)

        async def died() -> int | None:
            return await r.db.fetchval("SELECT id FROM webhook.dead_letter")

        letter = await until(died)
        r.sink.set_behaviour("/flaky", Behaviour())
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await until(lambda: is_taken_in(r))
        await grow_old(r, FIRST_LEAF)

        async def dropped() -> bool:
            return (await leaves(r))[0] > 0 and (await leaves(r, "attempt"))[:2] == [0, 100_000]

        await until(dropped, what="the shell is gone")
        async with r.db.transaction():
            run = await r.db.fetchval(
                "INSERT INTO webhook.run (endpoint_id, source, after_id, upto_id, total) VALUES ($1, 'dead_letter', $2, $3, 1) RETURNING id",
                endpoint,
                old - 1,
                old,
            )
            await r.db.execute(
                "UPDATE webhook.dead_letter SET state = 'resent', resent_run = $2 WHERE id = $1", letter, run
            )
            await r.db.execute("INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, $2)", run, old - 1)
        await until(lambda: any(event.body and event.attempt == 1 for event in r.received[2:]), what="it was resent")

        async def recorded() -> bool:
            return bool(await r.attempts(run=run, event_id=old))

        await until(recorded)
        assert (
            await r.db.fetchval("SELECT tableoid::regclass::text FROM webhook.attempt WHERE run = $1", run)
            == "webhook.attempt_p0"
        )


# ── only what is settled ──


async def test_a_leaf_with_an_open_gap_stays(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        await r.emit(3)
        async with connected(dsn) as producer:
            await producer.execute("BEGIN")
            late = await producer.fetchval(
                "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', '{\"late\": 1}') RETURNING id"
            )
            await skip_to(r, FIRST_LEAF)
            await r.emit(3)
            await grow_old(r, FIRST_LEAF)

            async def passed() -> bool:
                return await r.db.fetchval(
                    "SELECT position > $1 AND gaps @> $2::bigint FROM webhook.checkpoint", FIRST_LEAF, late
                )

            await until(passed, what="the checkpoint has passed the gap")
            await skip_turns(r, 5)
            assert not await is_expired(r)
            await producer.execute("COMMIT")
        await until(
            lambda: any(event.body.endswith(b'{"late": 1}}') for event in r.received), what="the late event arrives"
        )
        await until(lambda: is_taken_in(r))
        assert await r.undelivered() == []
        await grow_old(r, FIRST_LEAF)
        await until(lambda: is_expired(r), what="now the leaf goes")
        assert await lost(r) == {}


async def test_a_leaf_above_the_checkpoint_stays(dsn: str) -> None:
    """A dispatcher that is far behind takes nothing away that it has not looked at."""
    async with kept(dsn, start=False) as r:
        await r.endpoint(behaviour=Behaviour(delay_s=0.3), in_flight_max=1)
        await r.emit(10)
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await grow_old(r, FIRST_LEAF)
        await r.start()
        await until(lambda: len(r.received) == 11)
        await until(lambda: is_expired(r))
        assert await lost(r) == {}
        assert max(paths_and_ids(r).values()) == 1


# ── a lane in the way ──


class Waiting(PgPartitions):
    """Begins when it is told to."""

    go: asyncio.Event

    async def begin(self) -> None:
        await self.go.wait()
        await super().begin()


def waiting(r: Rig) -> asyncio.Event:
    go = asyncio.Event()

    def make() -> PgPartitions:
        made = Waiting(r.dsn, timeout_s=10)
        made.go = go
        return made

    r.make_partitions = make
    return go


async def test_what_is_in_flight_is_waited_for_and_others_go_on(dsn: str) -> None:
    """A POST of the old leaf hangs. The leaf waits for it, the other lanes for nothing."""
    async with kept(dsn, start=False, queue_events_max=2) as r:
        slow = await r.endpoint("/slow", behaviour=Behaviour(delay_s=2), in_flight_max=1)
        await r.endpoint("/fast", account="other")
        await r.db.execute("UPDATE webhook.subscription SET since_id = 0")
        await r.emit(9, payload='{"old": 1}')
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await grow_old(r, FIRST_LEAF)
        await put_behind(r, slow)
        go = waiting(r)
        await r.start()
        assert r.engine.incarnation is not None
        lane = r.engine.incarnation.lanes.get(slow)
        assert lane is not None
        await until(lambda: lane.in_flight > 0)
        go.set()
        await until(lambda: lane.stalled, what="the janitor waits for it")
        began = asyncio.get_running_loop().time()
        for n in range(5):
            await r.emit(1, account="other")
            await until(lambda n=n: r.by_path()["/fast"] > n)
        assert asyncio.get_running_loop().time() - began < 1.5
        assert not await is_expired(r)
        await until(lambda: is_expired(r), what="the leaf goes")
        r.sink.set_behaviour("/slow", Behaviour())
        await r.settled()
        in_time = sum(event.path == "/slow" and event.body.endswith(b'{"old": 1}}') for event in r.received)
        assert 1 <= in_time <= 3
        assert await lost(r) == {slow: 9 - in_time}
        assert r.by_path()["/slow"] == in_time + 1 + 1  # the young one, and what it is told


async def test_it_gives_up_for_a_while_on_a_post_that_takes_too_long(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "SETTLE_MAX_S", 0.3)
    async with kept(dsn, start=False) as r:
        slow = await r.endpoint("/slow", behaviour=Behaviour(delay_s=4), in_flight_max=1)
        await r.emit(2)
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await grow_old(r, FIRST_LEAF)
        await put_behind(r, slow)
        go = waiting(r)
        await r.start()
        assert r.engine.incarnation is not None
        lane = r.engine.incarnation.lanes.get(slow)
        assert lane is not None
        await until(lambda: lane.in_flight > 0)
        with capture_logs() as logs:
            go.set()
            await until(lambda: any(line["event"] == "partition.not_now" for line in logs))
        assert not lane.stalled
        assert not await is_expired(r)
        assert await lost(r) == {}


# ── crashes ──


class Hanging(PgPartitions):
    """Stops at a step of the expiry, for ever."""

    step = ""
    reached: asyncio.Event

    async def retrying_below(self, bound: int) -> list[int]:
        await self._at("before anything")
        return await super().retrying_below(bound)

    async def expire(self, epoch: int, leaf: Span) -> Expired | None:
        await self._at("before the transaction")
        expired = await super().expire(epoch, leaf)
        await self._at("after the commit")
        return expired

    async def _at(self, step: str) -> None:
        if step == self.step:
            self.reached.set()
            await asyncio.Event().wait()


@pytest.mark.parametrize("step", ["before anything", "before the transaction", "before the commit", "after the commit"])
async def test_a_kill_at_any_step_loses_and_counts_nothing_twice(
    dsn: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()
    whole = partitions_module._expire

    async def expire_and_hang(*arguments: Any) -> Expired:
        expired = await whole(*arguments)
        if step == "before the commit":
            reached.set()
            await asyncio.Event().wait()
        return expired

    monkeypatch.setattr(partitions_module, "_expire", expire_and_hang)
    async with kept(dsn) as r:
        live, paused = await r.endpoint("/live"), await r.endpoint("/paused")
        await r.emit(4)
        await r.settled()
        await pause(r, paused)
        await r.emit(5)
        await skip_to(r, FIRST_LEAF)
        await r.emit(3)
        await until(lambda: is_taken_in(r))
        await r.stop()

        def hanging() -> PgPartitions:
            made = Hanging(r.dsn, timeout_s=10)
            made.step, made.reached = step, reached
            return made

        r.make_partitions = hanging
        await grow_old(r, FIRST_LEAF)
        await r.start()
        await asyncio.wait_for(reached.wait(), 15)
        await r.kill()
        done = step == "after the commit"
        assert await is_expired(r) == done
        assert await lost(r) == ({paused: 5} if done else {})
        monkeypatch.setattr(partitions_module, "_expire", whole)
        r.make_partitions = lambda: PgPartitions(r.dsn, timeout_s=10)
        await r.start()
        await until(lambda: is_expired(r), what="the first leaf is empty")
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", paused)
        await r.settled()
        assert await lost(r) == {paused: 5}
        told = await r.db.fetchval("SELECT count(*) FROM webhook.outbox WHERE type = 'endpoint.events_expired'")
        assert told == 1
        once = Counter(
            path for path, _ in {(got.path, got.webhook_id) for got in r.received}
        )  # killed, it may have sent twice
        assert once == {"/live": 4 + 5 + 3 + 1, "/paused": 4 + 3 + 1}
        assert live


async def test_a_fenced_janitor_takes_nothing(dsn: str) -> None:
    async with kept(dsn) as r:
        endpoint = await r.endpoint()
        await pause(r, endpoint)
        await r.emit(5)
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await until(lambda: is_taken_in(r))
        partitions = PgPartitions(dsn, timeout_s=10)
        with pytest.raises(FencedError):
            await partitions.expire(4_711, Span(0, FIRST_LEAF))
        await partitions.close()
        assert not await is_expired(r)


# ── locks ──


async def test_a_producers_long_transaction_does_not_keep_the_disk(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        await r.emit(2_000, payload='"' + "x" * 2_000 + '"')
        await skip_to(r, FIRST_LEAF)
        await r.emit(3)
        await r.settled()
        size = "SELECT sum(pg_total_relation_size(leaf))::bigint FROM webhook.leaves() WHERE low = 0"
        before = await r.db.fetchval(size)
        async with connected(dsn) as producer:
            await producer.execute("BEGIN")
            await producer.execute(
                "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'a.b', '{}')"
            )
            await grow_old(r, FIRST_LEAF)
            await until(lambda: is_expired(r), what="the first leaf is empty")
            after = await r.db.fetchval(size)
            assert after < before / 20
            await r.emit(5)
            await until(lambda: len(r.received) == 2_008)
            await skip_turns(r, 3)
            assert (await leaves(r))[0] == 0  # its shell is there
            await producer.execute("COMMIT")
        await r.settled()


async def test_a_role_that_owns_nothing_runs_it(dsn: str) -> None:
    async with kept(dsn, start=False) as r:
        await r.db.execute("CREATE ROLE retention_dispatcher LOGIN IN ROLE webhook_dispatcher")
        try:
            r.dsn = dsn.replace("postgresql://postgres@", "postgresql://retention_dispatcher@")
            assert r.dsn != dsn
            await r.start()
            endpoint = await r.endpoint("/paused")
            await pause(r, endpoint)
            await r.emit(5)
            await skip_to(r, FIRST_LEAF)
            await r.emit(1)
            await until(lambda: is_taken_in(r))
            await grow_old(r, FIRST_LEAF)
            await until(lambda: is_expired(r), what="the first leaf is empty")
            assert await lost(r) == {endpoint: 5}

            async def dropped() -> bool:
                return (await leaves(r))[0] == 100_000

            await until(dropped)
            await r.kill()
        finally:
            await r.db.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'retention_dispatcher'"
            )
            await r.db.execute("DROP OWNED BY retention_dispatcher; DROP ROLE retention_dispatcher")


# ── ahead ──


async def test_a_log_that_outran_its_leaves_is_put_in_order_and_loses_nothing(dsn: str) -> None:
    """Producers insert into the DEFAULT partition, one of them in a long transaction, while it becomes a leaf."""
    async with kept(dsn, start=False) as r:
        await r.endpoint()
        await skip_to(r, END - 20)
        ids = await r.emit(50)
        assert await r.db.fetchval("SELECT count(*) FROM webhook.outbox_default") == 31
        producing = [asyncio.create_task(emit_for(r, 3.0)) for _ in range(4)]
        async with connected(dsn) as slow:
            await slow.execute("BEGIN")
            ids.append(
                await slow.fetchval(
                    "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'a.b', '{}') RETURNING id"
                )
            )
            await r.start()
            await until(lambda: len(r.received) > 100)
            await slow.execute("COMMIT")
        for producer in producing:
            ids += await producer

        async def in_order() -> bool:
            return END in await leaves(r) and END in await leaves(r, "attempt")

        await until(in_order, within_s=20, what="the DEFAULT partition has become a leaf")
        ids += await r.emit(100)
        await r.settled()
        assert await r.db.fetchval("SELECT count(*) FROM webhook.outbox_default") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.attempt_default") == 0
        stored = [row["id"] for row in await r.db.fetch("SELECT id FROM webhook.outbox ORDER BY id")]
        assert stored == sorted(ids)
        assert len(r.received) == len(ids)
        last_id = await r.db.fetchval("SELECT webhook.last_id()")
        bounds: list[asyncpg.Record] = []

        async def ahead() -> bool:
            nonlocal bounds
            bounds = await r.db.fetch(
                "SELECT low, high FROM webhook.leaves() WHERE parent = 'outbox' AND low IS NOT NULL ORDER BY low"
            )
            return bool(bounds[-1]["high"] - last_id > 1_000_000)

        await until(ahead)
        assert all(a["high"] == b["low"] for a, b in pairwise(bounds))


async def test_leaves_are_there_before_they_are_needed(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        await skip_to(r, END - 1_000_500)
        await r.emit(10)

        async def two_ahead() -> bool:
            return (await leaves(r))[-2:] == [END, END + 10_000]

        await until(two_ahead)
        await skip_turns(r, 3)
        assert await two_ahead()
        await skip_to(r, END - 979_000)
        await r.emit(10)

        async def ahead() -> bool:
            return END + 20_000 in await leaves(r)

        await until(ahead)
        await skip_turns(r, 2)
        assert (await leaves(r))[-3:] == (await leaves(r, "attempt"))[-3:]
        made = r.engine.counters.partitions_made
        await skip_turns(r, 3)
        assert r.engine.counters.partitions_made == made
        await r.settled()


async def test_a_slow_log_gets_narrow_leaves(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        await skip_to(r, 60_000)
        await r.emit(10)

        async def cut() -> bool:
            return 110_000 in await leaves(r) and 110_000 in await leaves(r, "attempt")

        await until(cut)
        assert (await leaves(r))[:7] == [0, 100_000, 110_000, 120_000, 130_000, 140_000, 1_000_000]
        await skip_to(r, 109_995)
        await r.emit(10)
        await r.settled()
        assert await r.undelivered() == []


# ── failures ──


class Broken(PgPartitions):
    failures: Iterator[Exception]

    async def shape(self) -> LogShape:
        for exc in self.failures:
            raise exc
        return await super().shape()


async def test_a_janitor_that_fails_stops_no_delivery(dsn: str) -> None:
    async with kept(dsn, start=False) as r:

        def broken() -> PgPartitions:
            made = Broken(r.dsn, timeout_s=10)
            made.failures = iter([RuntimeError("a surprise"), StoreAwayError("gone"), asyncpg.PostgresError("odd")])
            return made

        r.make_partitions = broken
        await r.start()
        await r.endpoint()
        await r.emit(5)
        await r.settled()
        await until(lambda: r.engine.counters.janitor_failures == 2)
        await skip_turns(r, 2)
        assert r.engine.counters.store_away == 1


async def test_one_part_that_fails_leaves_the_others_their_turn(dsn: str) -> None:
    class NoAttach(PgPartitions):
        async def first_id_since(self, since_us: int, after: int, upto: int) -> tuple[int, int] | None:
            raise RuntimeError("a surprise")

    async with kept(dsn, start=False) as r:
        r.make_partitions = lambda: NoAttach(r.dsn, timeout_s=10)
        await r.start()
        await r.endpoint()
        await r.emit(5)
        await skip_to(r, FIRST_LEAF)
        await r.emit(1)
        await r.settled()
        await grow_old(r, FIRST_LEAF)
        await until(lambda: is_expired(r), what="the first leaf is empty")
        assert r.engine.counters.janitor_failures > 0


async def test_a_janitor_that_is_fenced_ends_the_engine(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        made = Broken(dsn, timeout_s=10)
        made.failures = iter([FencedError("another rules")])
        r.make_partitions = lambda: made
        await r.start()
        assert r.task is not None
        with pytest.raises(FencedError):
            await asyncio.wait_for(r.task, 10)
        r.task = None


async def test_its_connection_may_be_lost_at_any_time(dsn: str) -> None:
    async with kept(dsn) as r:
        await r.endpoint()
        for _ in range(3):
            await r.db.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'dispatcher janitor'"
            )
            await r.emit(2)
            await r.settled()
            await skip_turns(r, 1)
