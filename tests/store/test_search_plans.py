"""What the panel's pages ask for is found by indexes, and a bounded number of rows of it, however much there is: plans as its sessions get
them, for the values that are given (`force_custom_plan`)."""

from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest

from dispatcher.store import search
from dispatcher.store.dead_letters import LETTERS, LOOKED_AT
from dispatcher.store.embedded import EmbeddedServer
from dispatcher.store.migrate import ADMIN
from dispatcher.store.runs import RUNS
from dispatcher.store.search import SEARCH
from dispatcher.store.stats import STATS
from tests.conftest import connected, dsn_of

EVENTS, ENDPOINTS = 50_000, 4_000  # one of ten events is of account a0, which has one of ten endpoints
FILL = f"""
SET session_replication_role = replica;
INSERT INTO webhook.endpoint (id, account_id, url, state) OVERRIDING SYSTEM VALUE
SELECT n, 'a' || n % 10, 'https://x.test/', 'live' FROM generate_series(1, {ENDPOINTS}) AS n;
INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT n, '*', 0 FROM generate_series(1, {ENDPOINTS}) AS n;
INSERT INTO webhook.outbox (id, account_id, type, payload) OVERRIDING SYSTEM VALUE
SELECT n, 'a' || n % 10, 't.x', '{{}}' FROM generate_series(1, {EVENTS}) AS n;
INSERT INTO webhook.attempt SELECT n, 10, now(), 0, 1, 1, NULL, 'timeout' FROM generate_series(1, {EVENTS}) AS n;
INSERT INTO webhook.attempt SELECT n, 20, now(), 0, 1, 1, 200 FROM generate_series(1, {EVENTS}) AS n;
INSERT INTO webhook.retry SELECT 10, n, 0, 2, now(), now() + n * interval '1 s', 'x' FROM generate_series(1, 20000) AS n;
INSERT INTO webhook.retry SELECT 12 + n % 200, n, 0, 2, now(), now() + n * interval '1 s', 'x' FROM generate_series(1, 20000) AS n;
INSERT INTO webhook.dead_letter
    (endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, reason, fault, state, resent_run)
SELECT n % 40 + 1, n, 0, 'a' || (n % 40 + 1) % 10, 't.x', '{{}}', now(), 1, now(), 'last', 'timeout',
       CASE WHEN n % 7 = 0 THEN 'open' ELSE 'resent' END, CASE WHEN n % 7 <> 0 THEN 1 END
FROM generate_series(1, 40000) AS n;
INSERT INTO webhook.run (id, endpoint_id, source, after_id, upto_id, patterns, only_failed, total, note) OVERRIDING SYSTEM VALUE
SELECT n, n % 40 + 1, 'log', n, n + 1, '{{*}}', false, 1, '' FROM generate_series(1, 20000) AS n;
INSERT INTO webhook.run_progress (run_id, settled, finished_at) SELECT n, n, now() FROM generate_series(1, 20000) AS n;
INSERT INTO webhook.endpoint_stat (minute, endpoint_id, epoch, delivered, failed, dead, duration_ms, durations)
SELECT date_trunc('minute', now()) - n % 1440 * interval '1 min', 10 + n % 30, 1, 1, 0, 0, 1, array_fill(1, ARRAY[20])
FROM generate_series(1, 30000) AS n
ON CONFLICT DO NOTHING;
SELECT setval('webhook.outbox_id_seq', {EVENTS});
RESET session_replication_role;
ANALYZE;
"""
BIG = (
    "outbox",
    "attempt",
    "retry",
    "dead_letter",
    "run",
    "endpoint_stat",
    "subscription",
)  # endpoints are some ten thousand at most
ALL: list[Any] = [None, [], None]  # every type, any text
# name → statement, values, how many rows of tables it may touch
ASKED: dict[str, tuple[str, list[Any], int]] = {
    "events": (SEARCH.events, ["a0", 40_000, 0, search.LOOKED_AT, None, [], None], 2_000),
    "events of all": (SEARCH.events, [None, 40_000, 0, search.LOOKED_AT, ["no.such"], [], None], 2_000),
    "events with a text": (SEARCH.events, ["a0", 40_000, 0, search.LOOKED_AT_TEXT, None, [], "none"], 500),
    "candidates": (SEARCH.candidates, ["a0", 40_000, 0, search.LOOKED_AT, *ALL], 2_000),
    "candidates of a rare type": (SEARCH.candidates, ["a0", 40_000, 0, search.LOOKED_AT, ["no.such"], [], None], 2_000),
    "candidates of all": (SEARCH.candidates, [None, 40_000, 0, search.LOOKED_AT, *ALL], 2_000),
    "failed candidates": (SEARCH.failed_candidates, [10, 40_000, 0, search.LOOKED_AT, *ALL], 4_000),
    "endpoints of": (SEARCH.endpoints_of, [["a0", "a1"]], 800),
    "deliveries of one": (
        SEARCH.deliveries, ["a0", list(range(30_000, 40_000, 10)), 10, None, None, None, None, 1 << 62, 0, 50, 0, 30_000, 39_990], 20_000,
    ),
    "deliveries of many": (
        SEARCH.deliveries, ["a0", [30_000, 30_010, 30_020, 30_030, 30_040], None, None, None, None, None, 1 << 62, 0, 50, 0, 30_000, 30_040],
        20_000,
    ),
    "retries of a delivery": (SEARCH.retries_of, [10, 777], 1),
    "how some stand": (ADMIN.stands, [[11, 12, 13], 10_001], 400),
    "the newest attempts of some": (ADMIN.tail, [None, [10, 20], EVENTS - 2_000, timedelta(days=1), 500, False], 2 * 2_000 + 500),
    "letters": (LETTERS.walk, ["a1", 39_000, LOOKED_AT, None, "open", None, []], 2_000),
    "letters of all": (LETTERS.walk, [None, 39_000, LOOKED_AT, 7, "open", ["no.such"], []], 2_000),
    "letters open": (LETTERS.walk_open, [10, 39_000, LOOKED_AT, None, []], 2_000),
    "runs of an endpoint": (RUNS.newest, [10, 19_000, 50], 50),
    "runs of all": (RUNS.newest, [None, 19_000, 50], 50),
    "runs of an account": (RUNS.newest_of_account, ["a1", 19_000, 50], ENDPOINTS + 4 * 50),
    "runs by id": (RUNS.runs, [list(range(100, 150)), None, None, None, 0, 50], 200),
    "an event's delivery": (ADMIN.event_deliveries, [30_000, "a0", "t.x", "{}", 9, 10], 600),
    "an event at a page of endpoints": (ADMIN.event_deliveries, [30_000, "a0", "t.x", "{}", 2_000, 2_300], 1_000),
    "where that page ends": (ADMIN.endpoints_bound, ["a0", 2_000, 30], ENDPOINTS),
    "where a page of deliveries ends": (SEARCH.endpoints_floor, ["a0", 3_000, 100], ENDPOINTS),
    "its attempts": (ADMIN.event_attempts, [30_000, 9, 10], 2),
    "a day's series": (STATS.series, [10, "DAY AGO", "NOW", 5], 1_000),
}  # fmt: skip

Node = dict[str, Any]


def nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.get("Plans", ()):
        yield from nodes(child)


@pytest.fixture(scope="module")
async def full(server: EmbeddedServer, template: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE test_search_plans TEMPLATE {template}")
    parameters = {"plan_cache_mode": "force_custom_plan", "jit": "off", "random_page_cost": "1.1"}  # as store/pool.py
    connection = await asyncpg.connect(dsn_of(server.dsn, "test_search_plans"), server_settings=parameters)
    await connection.execute(FILL)
    yield connection
    await connection.close()
    async with connected(server.dsn) as other:
        await other.execute("DROP DATABASE test_search_plans WITH (FORCE)")


@pytest.mark.parametrize("name", ASKED)
async def test_a_page_finds_its_rows_by_an_index_and_touches_few(full: asyncpg.Connection, name: str) -> None:
    """After everything that is asked by the same statement has been asked often enough for the server to keep a plan, if it wants to."""
    statement, values, most = ASKED[name]
    now = await full.fetchval("SELECT clock_timestamp()")
    moments = {"NOW": now, "DAY AGO": now - timedelta(days=1)}
    await full.execute(f"PREPARE asked AS {statement}")
    try:
        for other, others_values, _ in ASKED.values():
            for _ in range(6 if other == statement else 0):
                await full.execute(f"EXECUTE asked ({_literals(others_values, moments)})")
        text = await full.fetchval(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE asked ({_literals(values, moments)})"
        )
    finally:
        await full.execute("DEALLOCATE asked")
    touched = 0.0
    for node in nodes(orjson.loads(text)[0]["Plan"]):
        table = node.get("Relation Name", "")
        if not table or not node["Actual Loops"]:
            continue
        met = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        if table.startswith(BIG) and met:  # a partition that is empty may be read any way
            assert node["Node Type"] != "Seq Scan", f"{table} is read from end to end"
        touched += met
    assert touched <= most, f"{touched:,.0f} rows are touched"


def _literals(values: list[Any], moments: dict[str, datetime]) -> str:
    return ", ".join(_literal(moments.get(value, value) if isinstance(value, str) else value) for value in values)


def _literal(value: Any) -> str:
    if value is None or isinstance(value, int):
        return "NULL" if value is None else str(value)
    if isinstance(value, list):
        return "'{" + ",".join(str(item) for item in value) + "}'"
    return f"'{value}'"
