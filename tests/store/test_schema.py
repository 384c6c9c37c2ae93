"""schema.sql on a real server: what producers may and may not do, what is refused under which name, and what the triggers do."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dispatcher.store import embedded
from dispatcher.store.postgres import PgStore
from tests.conftest import SCHEMA, connected, dsn_of
from tests.rig import until
from tests.store.worlds import SETTINGS

SCHEMA_FILE = Path(__file__).parents[2] / "schema.sql"
INSERT = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ($1, $2, $3::text::json) RETURNING id"
EVENT = ("acct", "message.sent", "{}")
PAYLOAD_BYTES_MAX = 262_144

OBJECTS = """
SELECT c.relname, c.relkind::text, c.relpersistence::text, c.reloptions::text, c.relacl::text FROM pg_class c
WHERE c.relnamespace = 'webhook'::regnamespace
UNION ALL
SELECT conrelid::regclass || '.' || conname, 'constraint', pg_get_constraintdef(oid), NULL, NULL FROM pg_constraint
WHERE connamespace = 'webhook'::regnamespace
UNION ALL
SELECT tgrelid::regclass || '.' || tgname, 'trigger', pg_get_triggerdef(oid), NULL, NULL FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'instance', 'row', id_key::text, NULL, NULL FROM webhook.instance
UNION ALL
SELECT 'checkpoint', 'row', checkpoint::text, NULL, NULL FROM webhook.checkpoint
UNION ALL
SELECT 'schema_version', 'row', schema_version::text, NULL, NULL FROM webhook.schema_version
ORDER BY 1, 2, 3
"""


@pytest.fixture
async def producer(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection with webhook_producer's privileges and no others."""
    async with connected(dsn) as connection:
        await connection.execute("SET SESSION AUTHORIZATION webhook_producer")
        yield connection


async def emit(db: asyncpg.Connection, *event: str) -> int:
    event_id: int = await db.fetchval(INSERT, *(event or EVENT))
    return event_id


# ── applying it ──


async def test_applying_the_schema_again_changes_nothing(server: embedded.EmbeddedServer) -> None:
    async with connected(server.dsn) as connection:
        await connection.execute("CREATE DATABASE test_schema_again")
    try:
        dsn = dsn_of(server.dsn, "test_schema_again")
        psql = embedded._binaries(server.data_dir, server.version) / "psql"
        # "host" in the dsn's query is libpq's own way; ON_ERROR_STOP turns the first error into an exit status.
        command = [str(psql), "-X", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", str(SCHEMA_FILE)]
        first = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        async with connected(dsn) as db:
            made = await db.fetch(OBJECTS)
            await emit(db)
            await db.execute(SCHEMA)
            again = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            assert "ERROR" not in again.stderr
            assert await db.fetch(OBJECTS) == made
            assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 1
    finally:
        async with connected(server.dsn) as connection:
            await connection.execute("DROP DATABASE test_schema_again WITH (FORCE)")


async def test_what_the_design_needs_is_there(db: asyncpg.Connection) -> None:
    assert await db.fetchval("SELECT seqcache FROM pg_sequence WHERE seqrelid = 'webhook.outbox_id_seq'::regclass") == 1
    assert await db.fetchval("SELECT relpersistence::text FROM pg_class WHERE oid = 'webhook.life'::regclass") == "u"
    storage = await db.fetch(
        "SELECT attrelid::regclass::text, attstorage::text FROM pg_attribute WHERE attname = 'payload' AND attrelid IN "
        "(SELECT inhrelid FROM pg_inherits WHERE inhparent = 'webhook.outbox'::regclass UNION SELECT 'webhook.outbox'::regclass)"
    )
    assert len(storage) == 6
    assert {row["attstorage"] for row in storage} == {"e"}, (
        "compressed, a page's size would not be known before it is read"
    )
    assert await db.fetchval("SELECT webhook.last_id()") == 0, "a fresh sequence has handed out nothing"
    assert await emit(db) == 1
    assert await db.fetchval("SELECT webhook.last_id()") == 1


# ── producers ──


async def test_producers_insert_in_every_way(producer: asyncpg.Connection, db: asyncpg.Connection) -> None:
    assert await emit(producer) == 1
    rows = await producer.fetch(
        "INSERT INTO webhook.outbox (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent) "
        "VALUES ('a', 'b.c', '1', now(), 'k', now(), 3, 't'), ('a', 'b.c', '2', NULL, NULL, NULL, NULL, NULL) RETURNING id"
    )
    assert [row["id"] for row in rows] == [2, 3]
    columns = ["account_id", "type", "payload"]
    copied = await producer.copy_records_to_table(
        "outbox", schema_name="webhook", columns=columns, records=[("a", "b.c", "[1,  2]"), ("a", "b.c", "null")]
    )
    assert copied == "COPY 2"
    assert await producer.fetchval("SELECT count(id) FROM webhook.outbox") == 5
    stored = await db.fetch("SELECT id, payload::text FROM webhook.outbox ORDER BY id")
    assert [tuple(row) for row in stored] == [(1, "{}"), (2, "1"), (3, "2"), (4, "[1,  2]"), (5, "null")]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT payload FROM webhook.outbox",
        "SELECT account_id FROM webhook.outbox",
        "SELECT * FROM webhook.outbox",
        "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}') RETURNING payload",
        "INSERT INTO webhook.outbox (id, account_id, type, payload) OVERRIDING SYSTEM VALUE VALUES (7, 'a', 'b.c', '{}')",
        "INSERT INTO webhook.outbox (account_id, type, payload, created_at) VALUES ('a', 'b.c', '{}', now())",
        "UPDATE webhook.outbox SET type = 'x.y'",
        "UPDATE webhook.outbox SET priority = 1 WHERE id = 1",
        "DELETE FROM webhook.outbox",
        "TRUNCATE webhook.outbox",
        "SELECT id FROM webhook.outbox FOR UPDATE",
        "INSERT INTO webhook.outbox_p0 (account_id, type, payload) VALUES ('a', 'b.c', '{}')",
        "SELECT nextval('webhook.outbox_id_seq')",
        "SELECT setval('webhook.outbox_id_seq', 1)",
        "SELECT FROM webhook.endpoint",
        "SELECT FROM webhook.endpoint_secret",
        "SELECT FROM webhook.instance",
        "SELECT FROM webhook.checkpoint",
        "SELECT FROM webhook.attempt",
        "CREATE TABLE webhook.mine (n int)",
    ],
)
async def test_producers_may_do_nothing_else(producer: asyncpg.Connection, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await producer.execute(statement)


async def test_an_id_is_never_given(db: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.GeneratedAlwaysError):
        await db.execute("INSERT INTO webhook.outbox (id, account_id, type, payload) VALUES (7, 'a', 'b.c', '{}')")


async def test_the_dispatchers_role_may_do_its_work(dsn: str) -> None:
    async with connected(dsn) as connection:
        await emit(connection)
        await connection.execute("SET SESSION AUTHORIZATION webhook_dispatcher")
        await emit(connection)
        assert await connection.fetchval("SELECT count(payload::text) FROM webhook.outbox") == 2
        await connection.execute("UPDATE webhook.checkpoint SET position = 1")
        await connection.execute("INSERT INTO webhook.endpoint (account_id, url) VALUES ('a', 'https://x.test/')")
        await connection.execute("DELETE FROM webhook.endpoint")
        assert await connection.fetchval("SELECT webhook.last_id()") == 2


async def test_a_rolled_back_row_leaves_a_gap_only(db: asyncpg.Connection) -> None:
    transaction = db.transaction()
    await transaction.start()
    await emit(db)
    await transaction.rollback()
    async with db.transaction():
        savepoint = db.transaction()
        await savepoint.start()
        await emit(db)
        with pytest.raises(asyncpg.CheckViolationError):
            await emit(db, "", "a.b", "{}")
        await savepoint.rollback()
        await emit(db)
    assert [row["id"] for row in await db.fetch("SELECT id FROM webhook.outbox")] == [4]
    assert await db.fetchval("SELECT webhook.last_id()") == 4


async def test_ids_beyond_the_last_partition_go_to_the_default_one(db: asyncpg.Connection) -> None:
    for last, table in ((99_998, "p0"), (99_999, "p100000"), (39_999_998, "p10000000"), (39_999_999, "default")):
        await db.execute(f"SELECT setval('webhook.outbox_id_seq', {last})")
        await emit(db)
        where = "SELECT tableoid::regclass::text FROM webhook.{} WHERE {} = $1"
        assert await db.fetchval(where.format("outbox", "id"), last + 1) == f"webhook.outbox_{table}"
        await db.execute("INSERT INTO webhook.attempt VALUES ($1, 1, now(), 0, 1, 1, 200)", last + 1)
        assert await db.fetchval(where.format("attempt", "event_id"), last + 1) == f"webhook.attempt_{table}"


# ── CHECKs ──


NOT_TYPES = ("", "message", "Message.sent", "a..b", ".a.b", "a.b.", "a.b\n", "a.*", "a.é", "a b.c")


def text_of(length: int) -> str:
    return '"' + "x" * (length - 2) + '"'


@pytest.mark.parametrize(
    ("event", "constraint"),
    [
        (("a", "b.c", text_of(PAYLOAD_BYTES_MAX)), None),
        (("a", "b.c", text_of(PAYLOAD_BYTES_MAX + 1)), "outbox_payload_size"),
        (("a", "b.c", '"' + "ü" * (PAYLOAD_BYTES_MAX // 2) + '"'), "outbox_payload_size"),
        (("", "b.c", "{}"), "outbox_account_id_length"),
        (("a" * 255, "b.c", "{}"), None),
        (("a" * 256, "b.c", "{}"), "outbox_account_id_length"),
        (("ü" * 128, "b.c", "{}"), "outbox_account_id_length"),
        (("a", "message.sent.v_2", "{}"), None),
        (("a", "x." + "y" * 126, "{}"), None),
        (("a", "x." + "y" * 127, "{}"), "outbox_type_form"),
        *((("a", type, "{}"), "outbox_type_form") for type in NOT_TYPES),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(v[:12] for v in value or ("fine",)),
)  # fmt: skip
async def test_an_event_that_is_refused_is_told_why(
    db: asyncpg.Connection, event: tuple[str, str, str], constraint: str | None
) -> None:
    if constraint is None:
        await emit(db, *event)
        return
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await emit(db, *event)
    assert refused.value.constraint_name == constraint


@pytest.mark.parametrize("payload", ["", "{", "{'a': 1}", "nul", '{"a": 1,}', '"\x01"'])
async def test_a_payload_is_json(db: asyncpg.Connection, payload: str) -> None:
    with pytest.raises(asyncpg.InvalidTextRepresentationError):
        await emit(db, "a", "b.c", payload)


async def test_a_compressed_payload_is_measured_by_its_text(dsn: str, db: asyncpg.Connection) -> None:
    await db.execute("CREATE TEMP TABLE elsewhere (payload json)")
    await db.execute("INSERT INTO elsewhere VALUES ($1::text::json)", text_of(2 * PAYLOAD_BYTES_MAX))
    assert await db.fetchval("SELECT pg_column_size(payload) FROM elsewhere") < PAYLOAD_BYTES_MAX // 10
    copy = "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'a', 'b.c', payload FROM elsewhere"
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute(copy)
    assert refused.value.constraint_name == "outbox_payload_size"
    await db.execute("TRUNCATE elsewhere")
    await db.execute("INSERT INTO elsewhere VALUES ($1::text::json)", text_of(200_000))
    assert await db.fetchval("SELECT pg_column_size(payload) FROM elsewhere") < 20_000
    for _ in range(3):
        await db.execute(copy)
    assert await db.fetchval("SELECT max(pg_column_size(payload)) FROM webhook.outbox") < 20_000, "stored as it came"
    store = PgStore(dsn, SETTINGS)
    await store.start("test")
    page = await store.head(0, 100, 200_001, [], attempted=False)
    assert ([len(event.payload) for event in page.events], page.full) == ([200_000, 200_000], True)
    await store.close()


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("INSERT INTO webhook.attempt VALUES (1, 1, now(), 0, 1, -1, 200)", "attempt_number_counts"),
        ("INSERT INTO webhook.attempt VALUES (1, 1, now(), 0, -1, 1, 200)", "attempt_number_counts"),
        ("INSERT INTO webhook.attempt VALUES (1, 1, now(), 0, 1, 1, 302)", "attempt_delivered_is_2xx"),
        ("INSERT INTO webhook.retry VALUES (1, 1, 0, 1, now(), now(), '')", "retry_number_follows"),
        ("INSERT INTO webhook.checkpoint (only_row) VALUES (false)", "checkpoint_one_row"),
        ("UPDATE webhook.checkpoint SET position = -1", "checkpoint_position_counts"),
        ("INSERT INTO webhook.lane VALUES (1, -1)", "lane_settled_counts"),
        ("INSERT INTO webhook.life (only_row) VALUES (false)", "life_one_row"),
        ("UPDATE webhook.instance SET id_key = '\\x00'", "instance_id_key_is_aes128"),
        ("INSERT INTO webhook.endpoint (account_id, url, state) VALUES ('a', 'https://x', 'on')", "endpoint_state_known"),
        ("INSERT INTO webhook.endpoint (account_id, url, state) VALUES ('a', 'https://x', 'paused')", "endpoint_paused_knows_where"),
        ("INSERT INTO webhook.endpoint (account_id, url, timeout_ms) VALUES ('a', 'https://x', 99)", "endpoint_timeout_range"),
        ("INSERT INTO webhook.endpoint (account_id, url, rate_per_s) VALUES ('a', 'https://x', 0)", "endpoint_rate_range"),
        ("INSERT INTO webhook.endpoint (account_id, url, retry_schedule_s) VALUES ('a', 'https://x', '{0}')", "endpoint_retry_schedule_range"),
    ],
)  # fmt: skip
async def test_invariants_have_names(db: asyncpg.Connection, statement: str, constraint: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute(statement)
    assert refused.value.constraint_name == constraint


ENDPOINT = "INSERT INTO webhook.endpoint (account_id, url, {}) VALUES ('a', 'https://x', {})"


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        pytest.param("INSERT INTO webhook.attempt VALUES (1, 1, now(), 0, 1, 1)", "attempt_delivered_is_2xx"),
        pytest.param(ENDPOINT.format("retry_schedule_s", "'{5,NULL}'"), "endpoint_retry_schedule_range"),
        (ENDPOINT.format("rate_per_s", "'NaN'"), "endpoint_rate_range"),
    ],
    ids=["attempt", "schedule", "rate"],
)  # fmt: skip
async def test_invariants_hold_for_odd_values(db: asyncpg.Connection, statement: str, constraint: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute(statement)
    assert refused.value.constraint_name == constraint


# ── configuration changes ──


async def test_configuration_changes_commit_in_the_order_of_their_numbers(dsn: str, db: asyncpg.Connection) -> None:
    one, two = [
        await db.fetchval("INSERT INTO webhook.endpoint (account_id, url) VALUES ('a', 'https://x.test/') RETURNING id")
        for _ in range(2)
    ]
    update = "UPDATE webhook.endpoint SET timeout_ms = timeout_ms + 1 WHERE id = $1"
    for end in ("COMMIT", "ROLLBACK"):
        before = await db.fetchval("SELECT max(seq) FROM webhook.config_change")
        async with connected(dsn) as first, connected(dsn) as second:
            await first.execute("BEGIN")
            await first.execute(update, one)
            waiting = asyncio.create_task(second.execute(update, two))
            blocked = "SELECT cardinality(pg_blocking_pids($1)) > 0"
            await until(lambda: db.fetchval(blocked, second.get_server_pid()), what="second waits")  # noqa: B023
            assert await db.fetchval("SELECT max(seq) FROM webhook.config_change") == before
            await first.execute(end)
            await waiting
        rows = await db.fetch("SELECT endpoint_id FROM webhook.config_change WHERE seq > $1 ORDER BY seq", before)
        assert [row["endpoint_id"] for row in rows] == ([one, two] if end == "COMMIT" else [two])


async def test_what_the_engine_needs_to_know_is_a_change_and_nothing_else(db: asyncpg.Connection) -> None:
    async def changes(statement: str) -> int:
        before = await db.fetchval("SELECT coalesce(max(seq), 0) FROM webhook.config_change")
        await db.execute(statement)
        count: int = await db.fetchval("SELECT count(*) FROM webhook.config_change WHERE seq > $1", before)
        return count

    assert await changes("INSERT INTO webhook.endpoint (account_id, url) VALUES ('a', 'https://x.test/')") == 1
    assert await changes("INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES (1, 'whsec_QUJD')") == 1
    assert await changes("UPDATE webhook.endpoint_secret SET expires_at = now()") == 1
    assert await changes("INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES (1, '*', 0)") == 1
    assert await changes("UPDATE webhook.subscription SET until_id = 7") == 1
    assert await changes("UPDATE webhook.endpoint SET state = 'live'") == 1
    assert await changes("UPDATE webhook.endpoint SET failing_since = now()") == 0
    assert await changes("UPDATE webhook.endpoint SET name = 'x', draft = '{}'") == 0
    assert await changes("UPDATE webhook.subscription SET taken_up = true") == 0
    assert await changes("DELETE FROM webhook.subscription") == 1


# ── the doorbell ──


class Ears:
    """A listener that can tell when there was no ring: notifications come in the order of commits, so a sentinel's says so."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._heard: list[str] = []

    async def listen(self) -> None:
        await self._connection.add_listener("webhook_doorbell", lambda *args: self._heard.append(args[3]))

    async def rings(self, db: asyncpg.Connection) -> int:
        """Count the rings since the last call."""
        await db.execute("SELECT pg_notify('webhook_doorbell', 'sentinel')")
        await until(lambda: "sentinel" in self._heard)
        heard, self._heard[:] = list(self._heard), []
        return len(heard) - 1


@pytest.fixture
async def ears(dsn: str) -> AsyncIterator[Ears]:
    async with connected(dsn) as connection:
        ears = Ears(connection)
        await ears.listen()
        yield ears


@pytest.fixture
async def sleeper(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A dispatcher that sleeps: it holds the doorbell's lock."""
    async with connected(dsn) as connection:
        assert await connection.fetchval("SELECT pg_try_advisory_lock(9324665, 1)")
        yield connection


async def insert_single(db: asyncpg.Connection) -> None:
    await emit(db)


async def insert_many(db: asyncpg.Connection) -> None:
    await db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'a', 'b.c', '{}' FROM generate_series(1, 100)"
    )


async def insert_copy(db: asyncpg.Connection) -> None:
    columns = ["account_id", "type", "payload"]
    await db.copy_records_to_table("outbox", schema_name="webhook", columns=columns, records=[("a", "b.c", "{}")] * 100)


async def insert_in_a_savepoint(db: asyncpg.Connection) -> None:
    async with db.transaction(), db.transaction():
        await emit(db)


@pytest.mark.parametrize("way", [insert_single, insert_many, insert_copy, insert_in_a_savepoint])
async def test_who_sleeps_is_rung_once_a_statement(
    producer: asyncpg.Connection, db: asyncpg.Connection, ears: Ears, sleeper: asyncpg.Connection, way: Any
) -> None:
    await way(producer)
    assert await ears.rings(db) == 1
    await sleeper.fetchval("SELECT pg_advisory_unlock(9324665, 1)")
    await way(producer)
    assert await ears.rings(db) == 0


async def test_a_statement_in_a_rolled_back_savepoint_neither_rings_nor_keeps_silent(
    db: asyncpg.Connection, ears: Ears, sleeper: asyncpg.Connection
) -> None:
    async def roll_back() -> None:
        savepoint = db.transaction()
        await savepoint.start()
        await emit(db)
        await savepoint.rollback()

    async with db.transaction():
        await roll_back()
    assert await ears.rings(db) == 0
    await sleeper.fetchval("SELECT pg_advisory_unlock(9324665, 1)")
    async with db.transaction():
        await roll_back()
        # Its silence ended with the savepoint, so the dispatcher may fall asleep, and then the next statement rings.
        assert await sleeper.fetchval("SELECT pg_try_advisory_lock(9324665, 1)")
        await emit(db)
    assert await ears.rings(db) == 1


async def test_nobody_falls_asleep_over_a_transaction_that_chose_silence(dsn: str, db: asyncpg.Connection) -> None:
    async with connected(dsn) as sleepy:
        arm = "SELECT pg_try_advisory_lock(9324665, 1)"
        async with db.transaction():
            await emit(db)
            assert not await sleepy.fetchval(arm)
        assert await sleepy.fetchval(arm)


async def test_a_prepared_transaction_keeps_its_silence(dsn: str, db: asyncpg.Connection, ears: Ears) -> None:
    await db.execute("BEGIN")
    await emit(db)
    await db.execute("PREPARE TRANSACTION 'silent'")
    async with connected(dsn) as sleepy:
        assert not await sleepy.fetchval("SELECT pg_try_advisory_lock(9324665, 1)")
        await db.execute("COMMIT PREPARED 'silent'")
        assert await sleepy.fetchval("SELECT pg_try_advisory_lock(9324665, 1)")
    assert await ears.rings(db) == 0


async def test_two_phase_commit_is_refused_while_the_dispatcher_sleeps(
    db: asyncpg.Connection, ears: Ears, sleeper: asyncpg.Connection
) -> None:
    await db.execute("BEGIN")
    await emit(db)
    with pytest.raises(asyncpg.FeatureNotSupportedError):  # after a NOTIFY; hence the setting doorbell = off
        await db.execute("PREPARE TRANSACTION 'ringing'")
    assert await ears.rings(db) == 0
    assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 0


async def test_every_function_has_a_search_path_of_its_own(db: asyncpg.Connection) -> None:
    """Else whoever calls it, or makes a schema that comes first, says what its names mean."""
    bare = await db.fetch(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'webhook'::regnamespace "
        "AND NOT coalesce(proconfig @> ARRAY['search_path=pg_catalog, pg_temp'], false)"
    )
    assert bare == []
