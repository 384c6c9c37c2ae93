"""Plans of the hot statements, as the server makes them for 30 partitions: generic, on empty tables and on full ones.

A generic plan is made once and kept, so it must be right for whatever the tables become. Held here: nothing is read but by an index; nothing is
sorted before a LIMIT has cut it; and only those partitions are touched that can have the ids.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import orjson
import pytest

from dispatcher.store.embedded import EmbeddedServer
from dispatcher.store.postgres import _READER_PARAMETERS, _RECORDER_PARAMETERS
from dispatcher.store.sql import SQL
from tests.conftest import connected, dsn_of

PARTITIONS = 30
WIDTH = 10_000_000
ROWS = 500  # per partition
HEAD = (PARTITIONS - 1) * WIDTH + ROWS  # the last row's id
LIMIT, BYTES = 50, 1 << 22
ACCOUNTS = 10
DUE, NOT_DUE = 1_000, 20_000  # of one endpoint

PARTITION = "CREATE TABLE webhook.{0}_p{1} PARTITION OF webhook.{0} FOR VALUES FROM ({2}) TO ({3})"
FILL = f"""
SET session_replication_role = replica;
INSERT INTO webhook.outbox (id, account_id, type, payload, ordering_key, priority) OVERRIDING SYSTEM VALUE
SELECT p * {WIDTH}::bigint + n, 'a' || n % {ACCOUNTS}, 't.x', '{{}}', CASE WHEN n % 10 = 5 THEN 'k' || n % 20 END,
       CASE WHEN n % 20 = 5 THEN 1 END
FROM generate_series(0, {PARTITIONS - 1}) AS p, generate_series(1, {ROWS}) AS n;
INSERT INTO webhook.attempt SELECT id, 1, now(), 0, 1, 1, 200 FROM webhook.outbox;
INSERT INTO webhook.attempt SELECT id, 2, now(), 0, 1, 1, NULL, 'timeout' FROM webhook.outbox;
INSERT INTO webhook.dead_letter
    (endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, reason, fault, state, resent_run)
SELECT 2, {HEAD} - n, 0, 'a5', 't.x', '{{}}', now(), 1, now(), 'last', 'timeout', 'resent', n % 100 FROM generate_series(1, 10000) AS n;
INSERT INTO webhook.retry
SELECT 1, {HEAD} - n % {ROWS}, n, 2, now(), now() + interval '1 s' * CASE WHEN n <= {DUE} THEN -n ELSE n END, 'HTTP 500'
FROM generate_series(1, {DUE + NOT_DUE}) AS n;
INSERT INTO webhook.retry SELECT 9, n, 0, 2, now(), now(), 'HTTP 500', 'k' || n FROM generate_series(1, {LIMIT}) AS n;
RESET session_replication_role;
ANALYZE webhook.outbox, webhook.attempt, webhook.retry, webhook.dead_letter;
"""
# name → parameter types, arguments, how many outbox partitions may be read for these arguments
NEAR = f"'{{{HEAD - 100},{HEAD - 5}}}', '{{{HEAD - 91},{HEAD - 4}}}'"  # two ranges: lows, highs
OF = "'{1,2,77}'"  # endpoints
RUN = "text, bigint, bigint, text[], bigint, bigint, integer, bigint"
STATEMENTS: dict[str, tuple[str, str, int]] = {
    # The young ids of head are looked for in every partition: `= ANY ($n)` of a generic plan isn't pruned. 0.1 ms at 30; LATERAL costs the same.
    "head": ("bigint, bigint, bigint, bigint[]", f"{HEAD - 200}, {LIMIT}, {BYTES}, '{{}}'", 2),
    "head_attempted": ("bigint, bigint, bigint, bigint[]", f"{HEAD - 200}, {LIMIT}, {BYTES}, '{{}}'", 2),
    "probe": ("bigint[], bigint[], bigint, bigint, text[], text[]", f"{NEAR}, {LIMIT}, {BYTES}, NULL, NULL", 1),
    "summary": ("bigint[], bigint[]", f"{NEAR}", 1),
    "holes": ("text, bigint[], bigint[], bigint, bigint, bigint[]", f"'a5', {NEAR}, {LIMIT}, {BYTES}, {OF}", 1),
    "account": ("text, bigint, bigint, text[], bigint, bigint, bigint[]", f"'a5', {HEAD - 300}, {HEAD}, NULL, {LIMIT}, {BYTES}, {OF}", 1),
    "urgent": ("text, bigint, bigint, bigint, bigint, bigint[]", f"'a5', {HEAD - 300}, {HEAD}, {LIMIT}, {BYTES}, {OF}", 1),
    "keys": (
        "text, text[], bigint[], bigint, bigint, bigint, bigint[]",
        f"'a5', '{{k5,k15}}', '{{{HEAD - 300},{HEAD - 100}}}', {HEAD}, 3, {BYTES}, {OF}",
        1,
    ),
    "held_keys": ("bigint", "9", 0),
    "due_retries": ("bigint[], bigint[], bigint, integer[]", f"'{{1,3}}', '{{{LIMIT},{LIMIT}}}', {BYTES}, '{{}}'", 1),
    "run_page": (RUN, f"'a5', {HEAD - 300}, {HEAD}, '{{%}}', {LIMIT}, 2, 7, {BYTES}", 1),
    "run_page_failed": (RUN, f"'a5', {HEAD - 300}, {HEAD}, '{{%}}', {LIMIT}, 2, 7, {BYTES}", 1),
    "run_page_dead": (RUN, f"'a5', 0, {HEAD}, '{{%}}', {LIMIT}, 2, 7, {BYTES}", 0),
}  # fmt: skip
RETURNED = {
    "probe": 12,
    "summary": 10,  # accounts
    "holes": 2,
    "account": 30,
    "urgent": 15,
    "keys": 6,
    "due_retries": LIMIT + 1,  # a row says that the other endpoint has none
    "run_page": 30,
}  # of full tables; else LIMIT


@pytest.fixture(scope="module")
async def wide_dsn(server: EmbeddedServer, template: str) -> AsyncIterator[str]:
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE test_plans TEMPLATE {template}")
    dsn = dsn_of(server.dsn, "test_plans")
    async with connected(dsn) as connection:
        for parent in ("outbox", "attempt"):
            for low in (0, 100_000, 1_000_000, 10_000_000):
                await connection.execute(f"DROP TABLE webhook.{parent}_p{low}")
            for n in range(PARTITIONS):
                await connection.execute(PARTITION.format(parent, n, n * WIDTH, (n + 1) * WIDTH))
    yield dsn
    async with connected(server.dsn) as connection:
        await connection.execute("DROP DATABASE test_plans WITH (FORCE)")


@pytest.fixture(scope="module", params=["empty", "full", "full, planned while empty"])
async def reader(wide_dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[tuple[asyncpg.Connection, bool]]:
    """A connection with the reader session's parameters and every statement prepared, and whether there are rows."""
    connection = await asyncpg.connect(wide_dsn, server_settings={**_READER_PARAMETERS, "jit": "off"})
    await connection.execute("TRUNCATE webhook.outbox, webhook.attempt, webhook.retry, webhook.dead_letter")
    if request.param == "full":
        await connection.execute(FILL)
    for name, (types, arguments, _) in STATEMENTS.items():
        await connection.execute(f"PREPARE {name} ({types}) AS {getattr(SQL, name)}")
        await connection.execute(f"EXECUTE {name} ({arguments})")
    if request.param == "full, planned while empty":
        await connection.execute(
            FILL.replace("ANALYZE webhook.outbox, webhook.attempt, webhook.retry, webhook.dead_letter;", "")
        )
    yield connection, request.param != "empty"
    await connection.close()


Node = dict[str, Any]


def nodes(node: Node, under: tuple[Node, ...] = ()) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Yield every node with those above it, the nearest last."""
    yield node, under
    for child in node.get("Plans", ()):
        yield from nodes(child, (*under, node))


async def plan_of(connection: asyncpg.Connection, name: str) -> Node:
    _, arguments, _ = STATEMENTS[name]
    text = await connection.fetchval(
        f"EXPLAIN (ANALYZE, VERBOSE, TIMING OFF, FORMAT JSON) EXECUTE {name} ({arguments})"
    )
    plan: Node = orjson.loads(text)[0]["Plan"]
    return plan


@pytest.mark.parametrize("name", STATEMENTS)
async def test_rows_are_found_by_an_index_and_nothing_else(reader: tuple[asyncpg.Connection, bool], name: str) -> None:
    connection, full = reader
    plan = await plan_of(connection, name)
    partitions = set()
    for node, above in nodes(plan):
        kind, table = node["Node Type"], node.get("Relation Name", "")
        if table:
            assert kind in ("Index Scan", "Index Only Scan"), (kind, table)
            if table == "config_change":  # its newest row: the index's last entry
                assert above[-1]["Node Type"] == "Limit", plan
                assert node["Actual Rows"] <= 1, plan
                continue
            assert "Index Cond" in node, f"{node['Index Name']} is read from end to end"
            # A delivery's attempts, of which there are few, are looked through for one that succeeded.
            looked_through = 1 if name == "run_page_failed" and table.startswith("attempt") else 0
            assert node.get("Rows Removed by Filter", 0) <= looked_through or not node["Actual Loops"], node
        if table.startswith("outbox") and node["Actual Loops"]:
            partitions.add(table)
        if table.startswith(("outbox", "retry")):
            for n, sort in enumerate(above):
                if "Sort" in sort["Node Type"] and not young_ids(node) and name != "summary":  # of few ids, and counted
                    between = [other["Node Type"] for other in above[n:]]
                    assert "Limit" in between, f"the log is sorted: {between}"
        assert kind not in ("Hash Join", "Merge Join", "Materialize"), f"{kind} reads a whole side"
    assert len(partitions - {"outbox_default"}) <= STATEMENTS[name][2] if not reads_young_ids(plan) else True
    if full:
        assert plan["Actual Rows"] == RETURNED.get(name, LIMIT)


def young_ids(node: Node) -> bool:
    """The few ids that are asked for one by one may be sorted."""
    return "= ANY ($4)" in node.get("Index Cond", "")


def reads_young_ids(plan: Node) -> bool:
    return any(young_ids(node) for node, _ in nodes(plan))


@pytest.mark.parametrize("name", ["head", "head_attempted"])
async def test_the_head_is_read_where_it_is(reader: tuple[asyncpg.Connection, bool], name: str) -> None:
    connection, _ = reader
    plan = await plan_of(connection, name)
    above_head = {
        node["Relation Name"]
        for node, _ in nodes(plan)
        if node.get("Relation Name", "").startswith("outbox") and node["Actual Loops"] and not young_ids(node)
    }
    assert above_head <= {f"outbox_p{PARTITIONS - 1}", "outbox_default"}


@pytest.mark.parametrize("name", ["head", "head_attempted"])
async def test_the_last_id_is_asked_for_while_the_statement_runs(
    reader: tuple[asyncpg.Connection, bool], name: str
) -> None:
    """So after its snapshot was taken; folded into the plan it would be as old as the plan."""
    connection, _ = reader
    asked = [
        (node["Node Type"], node["Actual Loops"])
        for node, _ in nodes(await plan_of(connection, name))
        if any("pg_sequence_last_value" in text for text in node.get("Output", ()))
    ]
    assert ("Result", 1) in asked
    await connection.execute("SELECT setval('webhook.outbox_id_seq', 4711)")
    row = await connection.fetchrow(f"EXECUTE {name} ({STATEMENTS[name][1]})")
    assert row["last_id"] == 4711


async def test_attempts_are_looked_up_in_their_partition(reader: tuple[asyncpg.Connection, bool]) -> None:
    connection, full = reader
    if not full:
        return
    for name in ("head_attempted", "probe", "account", "holes"):
        touched = {
            node["Relation Name"]: node["Actual Loops"]
            for node, _ in nodes(await plan_of(connection, name))
            if node.get("Relation Name", "").startswith("attempt") and node["Actual Loops"]
        }
        assert touched == {f"attempt_p{PARTITIONS - 1}": RETURNED.get(name, LIMIT)}, name


async def test_a_rare_type_is_bounded_by_the_range_of_ids(reader: tuple[asyncpg.Connection, bool]) -> None:
    """`account` filters by type while it scans, so what bounds the scan is how far it may go."""
    connection, full = reader
    text = await connection.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE account ('a5', {HEAD - 100}, {HEAD}, '{{no.such}}', 50, 1000, {OF})"
    )
    removed = sum(
        node.get("Rows Removed by Filter", 0) * node["Actual Loops"] for node, _ in nodes(orjson.loads(text)[0]["Plan"])
    )
    assert removed == (100 // ACCOUNTS if full else 0)


# ── recording ──

RECORDING = {
    "end_retries": ("bigint[], bigint[], integer[]", f"'{{1,1}}', '{{{HEAD - 1},{HEAD - 2}}}', '{{1,2}}'"),
    "put_dead_letters": (
        "bigint[], bigint[], integer[], smallint[], timestamptz[], text[], smallint[], text[]",
        f"'{{1}}', '{{{HEAD}}}', '{{0}}', '{{5}}', '{{now}}', '{{x}}', '{{500}}', '{{status}}'",
    ),
}


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("name", RECORDING)
async def test_the_recorder_finds_its_rows_by_an_index(wide_dsn: str, name: str, mode: str) -> None:
    types, arguments = RECORDING[name]
    connection = await asyncpg.connect(wide_dsn, server_settings={**_RECORDER_PARAMETERS, "plan_cache_mode": mode})
    try:
        await connection.execute("TRUNCATE webhook.outbox, webhook.attempt, webhook.retry, webhook.dead_letter")
        await connection.execute(FILL)  # little: a hash over all of it would be cheapest
        await connection.execute(f"PREPARE {name} ({types}) AS {getattr(SQL, name)}")
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE {name} ({arguments})")
    finally:
        await connection.close()
    found = 0
    for node, _ in nodes(orjson.loads(text)[0]["Plan"]):
        table = node.get("Relation Name", "")
        if table.startswith(("outbox", "retry")) and node["Node Type"] != "ModifyTable" and node["Actual Loops"]:
            assert "Index Cond" in node, node
            found += node["Actual Rows"] * node["Actual Loops"]
    assert found == {"put_dead_letters": 1, "end_retries": 2}[name]
