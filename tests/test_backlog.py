"""Lanes far behind, and what that costs the others: nothing but their share of reads."""

import asyncio
import resource
import time
from pathlib import Path

import pytest

from dispatcher.engine import recorder
from dispatcher.sink import Behaviour
from tests.rig import SECRET, Rig, rig, until

HELD = 2_000_000
CAUGHT_UP = 60_000  # of those: enough to see it go on; the rest takes minutes and shows nothing new


def rss_bytes() -> int:
    """What this process holds in memory now (Linux: proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def set_state(r: Rig, state: str, account: str) -> None:
    await r.db.execute(
        "UPDATE webhook.endpoint SET state = $1, paused_at_id = webhook.last_id() WHERE account_id = $2", state, account
    )


async def latency_of_one(r: Rig, path: str, account: str) -> float:
    """Commit one event; return how long it took to arrive."""
    before = r.by_path()[path]
    began = time.monotonic()
    await r.emit(account=account)
    await until(lambda: r.by_path()[path] > before, within_s=10)
    return time.monotonic() - began


async def test_two_million_events_held_by_a_paused_endpoint(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost a row. Resumed, they come back in order, in bounded memory, beside fresh events of others, also of the same account."""
    monkeypatch.setattr(recorder, "BACKLOG_TURNS", 1)  # counted to the event, not once a minute only
    async with rig(dsn, memory_events_max=20_000) as r:
        await r.endpoint("/big", account="big", rate_per_s=4_000.0)
        await r.endpoint("/sibling", account="big", types=("other.*",))
        await r.endpoint("/other", account="other")
        await set_state(r, "paused", "big")
        lanes = r.engine.incarnation.lanes
        [big, sibling] = list(lanes.of_account("big"))
        await until(lambda: big.held and sibling.held)
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", sibling.id)
        await r.db.execute(
            "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'big', 'message.sent', '{\"n\": 1}' FROM generate_series(1, $1::int)",
            HELD, timeout=120,
        )  # fmt: skip
        await until(lambda: r.engine.incarnation.reader.head >= HELD, within_s=120, what="the head has passed them")
        # Most of them were a gap while their transaction ran, and are found in it page by page.
        await until(lambda: big.backlog == HELD, within_s=120, what="all are counted")
        held = "SELECT position >= $1 AND isempty(gaps) AND (SELECT array_agg(backlog) = ARRAY[$1] FROM webhook.lane) FROM webhook.checkpoint"
        await until(lambda: r.db.fetchval(held, HELD), what="two million held events are one row")
        assert lanes.memory.events == 0
        await latency_of_one(r, "/other", "other")
        before = rss_bytes()
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live' WHERE id = $1", big.id)
        waits, most, arrived = [], 0, 0
        while arrived < CAUGHT_UP:
            waits.append(await latency_of_one(r, "/other", "other"))
            most = max(most, lanes.memory.events)
            arrived += r.by_path()["/big"]
            r.received.clear()  # what the test keeps is not to be measured
            await asyncio.sleep(0.1)  # the pace of the others' events
        assert most <= 1_200, f"{most} events in memory for one lane's queue of 1,000"
        grown = rss_bytes() - before
        assert grown < 20_000_000, f"{grown / 1e6:.1f} MB more"
        waits.sort()
        median, late = waits[len(waits) // 2], waits[-max(1, len(waits) // 20)]
        assert median < 0.25, f"others' events took {median:.3f} s at the median of {len(waits)}"
        assert late < 1.0, f"one in twenty of the others' events took {late:.3f} s or longer"
        await latency_of_one(r, "/other", "other")
        in_log_order = [row["event_id"] for row in await r.attempts(endpoint_id=big.id)]
        assert in_log_order[:50_000] == list(range(in_log_order[0], in_log_order[0] + 50_000)), "none is left out"
        assert r.engine.counters.crowded_out == 0


async def test_a_lanes_row_is_written_when_there_is_news(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand endpoints that wait would else be ten thousand rows to update each second, for nothing."""
    monkeypatch.setattr(recorder, "CHECKPOINT_S", 0.02)
    row = "SELECT xmin::text::bigint FROM webhook.lane WHERE backlog = $1"
    async with rig(dsn) as r:
        await r.endpoint()
        await set_state(r, "paused", "acct")
        await until(lambda: next(iter(r.engine.incarnation.lanes)).held)
        await r.emit(3)
        written = await until(lambda: r.db.fetchval(row, 3))
        checkpoints = r.engine.counters.checkpoints
        await until(lambda: r.engine.counters.checkpoints > checkpoints + 5)
        assert await r.db.fetchval(row, 3) == written, "nobody touched it"
        await r.emit(1)
        assert await until(lambda: r.db.fetchval(row, 4)) > written
        await r.db.execute("UPDATE webhook.endpoint SET state = 'live'")
        await r.settled()
        await until(lambda: r.db.fetchval("SELECT count(*) = 0 FROM webhook.lane"), what="it speaks for itself no more")


async def test_a_thousand_endpoints_of_one_account_lag_at_once(dsn: str) -> None:
    """They share their reads; each gets every event once."""
    endpoints, events = 1_000, 40
    async with rig(dsn) as r:
        await r.db.execute(
            "WITH made AS (INSERT INTO webhook.endpoint (account_id, url, state, paused_at_id) "
            "SELECT 'acct', $1 || '/e' || n, 'paused', 0 FROM generate_series(1, $2) n RETURNING id), "
            "signed AS (INSERT INTO webhook.endpoint_secret (endpoint_id, secret) SELECT id, $3 FROM made) "
            "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT id, '*', 0 FROM made",
            r.sink.url, endpoints, SECRET,
        )  # fmt: skip
        lanes = r.engine.incarnation.lanes
        await until(lambda: len(lanes) == endpoints and not lanes.taking_up)
        ids = await r.emit(events)
        await until(lambda: r.engine.incarnation.reader.head >= ids[-1])
        assert all(not lane.live and lane.cursor < ids[0] for lane in lanes)
        reads = r.engine.counters.lag_reads
        await set_state(r, "live", "acct")
        await r.settled(within_s=90)
        assert r.engine.counters.lag_reads - reads < 4 * endpoints, "far fewer reads than lanes × events"
        # On a machine that is busy otherwise a POST may time out; that is a failed attempt, and a repeat.
        got = {(event.path, event.webhook_id) for event in r.received}
        assert len(got) == endpoints * events
        rows = await r.db.fetchrow(
            "SELECT count(*) AS all, count(*) FILTER (WHERE fault IS NULL) AS good FROM webhook.attempt"
        )
        assert rows["good"] == endpoints * events
        assert rows["all"] - rows["good"] >= len(r.received) - len(got), "every repeat is explained by a failure"


async def test_a_lane_behind_a_dead_receiver_keeps_nothing_in_memory(dsn: str) -> None:
    async with rig(dsn, breaker_wait_s=5.0) as r:
        dead = await r.endpoint("/dead", behaviour=Behaviour(status=500))
        await r.endpoint("/well", account="other")
        await r.emit(5_000)
        lane = r.engine.incarnation.lanes.get(dead)
        await until(
            lambda: not lane.live and not lane.queue and not lane.in_flight,
            what="its breaker is open, its queue let go",
        )
        assert r.engine.incarnation.lanes.memory.events == 0
        await latency_of_one(r, "/well", "other")
