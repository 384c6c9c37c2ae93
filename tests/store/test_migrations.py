"""Every released schema, brought up to date, is the schema of a fresh installation; and keeps its data."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dispatcher import settings as settings_module
from dispatcher.domain.event import PublicIds
from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.store import embedded, migrate, online
from tests.conftest import connected, dsn_of
from tests.rig import SECRET, rig, until

RELEASED = Path(__file__).parent.parent / "schemas"
SETTINGS = settings_module.Settings()

# What a schema is, but for the leaves of partitioned tables: they differ with age.
STRUCTURE = """
SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull::text, pg_get_expr(d.adbin, d.adrelid),
       a.attidentity::text || a.attstorage::text
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'webhook'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
UNION ALL
SELECT 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid), '', '', '' FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
WHERE k.connamespace = 'webhook'::regnamespace AND NOT c.relispartition
UNION ALL
SELECT 'index', c.relname, i.relname, pg_get_indexdef(x.indexrelid), '', '', '' FROM pg_index x
JOIN pg_class c ON c.oid = x.indrelid JOIN pg_class i ON i.oid = x.indexrelid
WHERE c.relnamespace = 'webhook'::regnamespace AND NOT c.relispartition
UNION ALL
SELECT 'trigger', c.relname, t.tgname, pg_get_triggerdef(t.oid), '', '', '' FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace = 'webhook'::regnamespace AND NOT c.relispartition AND NOT t.tgisinternal
UNION ALL
SELECT 'function', p.proname, p.oid::regprocedure::text, regexp_replace(p.prosrc, '\\s+', ' ', 'g'), p.prosecdef::text, p.proconfig::text,
       CASE WHEN p.proacl IS NULL THEN '' ELSE (SELECT string_agg(a.grantee::regrole::text || a.privilege_type, ',' ORDER BY 1)
                                               FROM aclexplode(p.proacl) a WHERE a.grantee <> p.proowner) END
FROM pg_proc p WHERE p.pronamespace = 'webhook'::regnamespace
UNION ALL
SELECT 'grant', c.relname, a.grantee::regrole::text, a.privilege_type, '', '', '' FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
WHERE c.relnamespace = 'webhook'::regnamespace AND NOT c.relispartition
"""

WAITS = "SELECT wait_event = 'relation' FROM pg_stat_activity WHERE pid = $1"  # asked from without: a snapshot of theirs would be waited for


@pytest.fixture
async def empty(server: embedded.EmbeddedServer) -> AsyncIterator[str]:
    async with connected(server.dsn) as connection:
        await connection.execute("CREATE DATABASE migrations")
    yield dsn_of(server.dsn, "migrations")
    async with connected(server.dsn) as connection:
        await connection.execute("DROP DATABASE migrations WITH (FORCE)")


@pytest.fixture(params=sorted(RELEASED.glob("*.sql")), ids=lambda path: f"version {path.stem}")
async def old(request: pytest.FixtureRequest, empty: str) -> str:
    """A database with a released schema and something in it."""
    async with connected(empty) as connection:
        await connection.execute(request.param.read_text())
        await connection.execute(
            "INSERT INTO webhook.endpoint (account_id, url, state) VALUES ('acct', 'https://a.example/hook', 'live');"
            "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'acct', 'a.b', '{}' FROM generate_series(1, 5);"
            "INSERT INTO webhook.dead_letter"
            " (endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, reason, fault)"
            " VALUES (1, 1, 0, 'acct', 'a.b', '{\"kept\": 1}', now(), 3, now(), 'the last', 'status')"
        )
    return empty


async def structure(connection: asyncpg.Connection) -> set[tuple[object, ...]]:
    return {tuple(row) for row in await connection.fetch(STRUCTURE)}


async def test_an_old_schema_becomes_todays(old: str, db: asyncpg.Connection) -> None:
    async with connected(old) as connection:
        before = await connection.fetchval("SELECT max(version) FROM webhook.schema_version")
        migrated = await migrate.migrate(connection, SETTINGS)
        assert len(migrated.done) == migrate.SCHEMA_VERSION - before + 1
        assert migrated.done[-1] == "installed the default catalogue, 20 event types"
        today, upgraded = await structure(db), await structure(connection)
        assert today - upgraded == set(), "missing after the upgrade"
        assert upgraded - today == set(), "more than a fresh installation has"
        assert await migrate.check(connection, SETTINGS) == []
        assert (await migrate.migrate(connection, SETTINGS)).done == (), "nothing is left to do"
        row = await connection.fetchrow("SELECT state, payload::text AS payload FROM webhook.dead_letter")
        assert (row["state"], row["payload"]) == ("open", '{"kept": 1}')
        assert await connection.fetchval("SELECT count(*) FROM webhook.outbox") == 5


UNDER_WAY = """
UPDATE webhook.endpoint SET url = '{url}/first' WHERE id = 1;
INSERT INTO webhook.endpoint (account_id, url, state) VALUES ('acct', '{url}/second', 'live');
INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES (1, '{secret}'), (2, '{secret}');
INSERT INTO webhook.subscription (endpoint_id, pattern, since_id, taken_up) VALUES (1, '*', 0, true), (2, 'a.*', 0, true);
INSERT INTO webhook.attempt (event_id, endpoint_id, started_at, run, duration_us, number, status, fault)
    VALUES (1, 1, now(), 0, 900, 1, 200, NULL), (2, 1, now(), 0, 900, 1, 200, NULL), (3, 1, now(), 0, 900, 1, 500, 'status'),
           (1, 2, now(), 0, 900, 1, 200, NULL), (3, 2, now(), 0, 900, 1, 200, NULL);
INSERT INTO webhook.retry (endpoint_id, event_id, run, number, first_attempt_at, due_at, reason) VALUES (1, 3, 0, 2, now(), now(), 'HTTP 500');
INSERT INTO webhook.lane (endpoint_id, settled, holes, backlog) VALUES (2, 3, '{{[2,3)}}', 1);
UPDATE webhook.checkpoint SET position = 3
"""


async def test_what_was_under_way_goes_on_after_the_upgrade(old: str) -> None:
    """The first endpoint waits to be tried again with 3, the second one lacks 2; 4 and 5 nobody has seen."""
    async with rig(old, start=False) as r:
        await r.db.execute(UNDER_WAY.format(url=r.sink.url, secret=SECRET))
        await migrate.migrate(r.db, SETTINGS)
        await r.start()
        await until(lambda: len(r.received) >= 6, within_s=60, what="what is owed is sent")
        await r.settled()
        ids = PublicIds(await r.db.fetchval("SELECT id_key FROM webhook.instance"))
        assert sorted((got.path, ids.decode(str(got.webhook_id))[1], got.attempt) for got in r.received) == [
            ("/first", 3, 2), ("/first", 4, 1), ("/first", 5, 1), ("/second", 2, 1), ("/second", 4, 1), ("/second", 5, 1),
        ]  # fmt: skip
        assert all(got.signature_ok for got in r.received)


async def migrated(dsn: str) -> tuple[str, ...]:
    async with connected(dsn) as connection:
        return (await migrate.migrate(connection, SETTINGS)).done


async def applied(dsn: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute(migrate.schema_sql())


async def test_several_at_once_install_it_once(empty: str) -> None:
    """`dispatcher run &` and the next command, on an embedded server that is new; or two machines of one deployment."""
    done = await asyncio.gather(*(migrated(empty) for _ in range(4)))
    [words] = filter(None, done)
    assert words[0] == f"installed schema version {migrate.SCHEMA_VERSION}"


async def test_who_waits_for_another_gives_up_in_the_end(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "PAUSE_S", 0.01)
    async with connected(empty) as other, connected(empty) as connection:
        await other.execute("SELECT pg_advisory_lock(9324665, 4)")
        with pytest.raises(DatabaseAwayError, match="another `dispatcher migrate` is at work"):
            await migrate.migrate(connection, SETTINGS)


@pytest.mark.parametrize("change", [{"payload_bytes_max": 4_096}, {"doorbell": "off"}])
async def test_a_setting_of_the_outbox_waits_for_its_lock_by_moments(
    empty: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Behind one who waits for it all producers wait: it gives up, and changes nothing."""
    monkeypatch.setattr(online, "PAUSE_S", 0.01)
    monkeypatch.setattr(online, "PAUSES_MAX", 3)
    settings, said = settings_module.Settings(**change), list[str]()
    await migrated(empty)
    async with connected(empty) as other, connected(empty) as connection:
        async with other.transaction():
            await other.execute("SELECT FROM webhook.outbox LIMIT 1")
            with pytest.raises(DatabaseAwayError, match="transactions have held the outbox"):
                await migrate.migrate(connection, settings, said.append)
            assert any("waiting for transactions" in one for one in said)
            await other.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'b.c', '{}')")
        assert len((await migrate.migrate(connection, settings)).done) == 1


async def test_what_ends_an_installation_is_what_is_told(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = migrate.schema_sql()
    broken = whole.replace(
        "CREATE TABLE IF NOT EXISTS webhook.outbox", "SELECT 1 / 0; CREATE TABLE IF NOT EXISTS webhook.outbox", 1
    )
    monkeypatch.setattr(migrate, "schema_sql", lambda: broken)
    async with connected(empty) as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate.migrate(connection, SETTINGS)
        assert await connection.fetchval("SELECT to_regnamespace('webhook') IS NULL"), "nothing of it is left"
        monkeypatch.setattr(migrate, "schema_sql", lambda: whole)
        assert (await migrate.migrate(connection, SETTINGS)).done, "nobody holds the lock any more"


async def test_psql_beside_it_installs_nothing_twice(empty: str) -> None:
    await asyncio.gather(applied(empty), migrated(empty), applied(empty))
    assert await migrated(empty) == ()


async def test_several_at_once_upgrade_it_once(old: str) -> None:
    said: list[str] = []
    async with connected(old) as first, connected(old) as second:
        done = await asyncio.gather(*(migrate.migrate(one, SETTINGS, said.append) for one in (first, second)))
    [upgraded, nothing] = sorted((one.done for one in done), key=len, reverse=True)
    assert upgraded
    assert nothing == ()
    assert [text for text in said if text.startswith("another `dispatcher migrate` is at work")]


async def test_schema_sql_refuses_to_pass_over_an_older_one(old: str) -> None:
    async with connected(old) as connection:
        with pytest.raises(asyncpg.RaiseError, match="older version"):
            await connection.execute(migrate.schema_sql())


async def version_of(connection: asyncpg.Connection) -> int:
    version: int = await connection.fetchval("SELECT max(version) FROM webhook.schema_version")
    return version


async def test_an_upgrade_that_finds_a_lock_can_be_repeated(old: str, db: asyncpg.Connection) -> None:
    async with connected(old) as other, connected(old) as connection:
        async with other.transaction():
            await other.execute("LOCK TABLE webhook.dead_letter IN ACCESS SHARE MODE")
            with pytest.raises(DatabaseAwayError, match="changes nothing yet"):
                await migrate.migrate(connection, SETTINGS)
        assert await version_of(connection) == 1
        assert await connection.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'run'") == 0
        await migrate.migrate(connection, SETTINGS)
        assert await structure(connection) == await structure(db)


async def test_an_upgrade_takes_its_locks_after_the_running_dispatchers(old: str, db: asyncpg.Connection) -> None:
    """A batch of the recorder holds the checkpoint's row and asks for more on the way: whoever took those first would be its deadlock."""
    async with connected(old) as recorder, connected(old) as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        async with recorder.transaction():
            await recorder.execute("SELECT FROM webhook.checkpoint FOR UPDATE")
            migrating = asyncio.create_task(migrate.migrate(connection, SETTINGS))
            await until(lambda: db.fetchval(WAITS, pid), within_s=60, what="it waits for the batch")
            await recorder.execute("DELETE FROM webhook.retry; UPDATE webhook.lane SET backlog = 0")
            await recorder.execute("SELECT FROM webhook.endpoint")
        await migrating
        assert await structure(connection) == await structure(db)


async def test_a_deadlock_with_others_is_told_as_what_it_is(old: str, db: asyncpg.Connection) -> None:
    """Somebody's transaction that reads the one thing and then the other: PostgreSQL ends who waited first, and that is the upgrade."""
    async with connected(old) as other, connected(old) as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        async with other.transaction():
            await other.execute("LOCK TABLE webhook.retry IN ROW SHARE MODE")
            migrating = asyncio.create_task(migrate.migrate(connection, SETTINGS))
            await until(lambda: db.fetchval(WAITS, pid), within_s=60, what="it waits for the other")
            await other.execute("LOCK TABLE webhook.endpoint IN ROW SHARE MODE")
            with pytest.raises(DatabaseAwayError, match="changes nothing yet, run it again"):
                await migrating
        assert await version_of(connection) == 1


async def test_producers_go_on_while_the_log_is_read_through(old: str, db: asyncpg.Connection) -> None:
    """An old snapshot makes CREATE INDEX CONCURRENTLY wait, for as long as we like: meanwhile events are inserted. Then it is interrupted, which
    leaves an index that is not valid; repeated, it goes on."""
    insert = "INSERT INTO webhook.outbox (account_id, type, payload, priority) VALUES ('acct', 'a.b', '{}', 1)"
    told: list[str] = []
    async with connected(old) as reader, connected(old) as producer, connected(old) as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        async with reader.transaction(isolation="repeatable_read"):
            await reader.fetch("SELECT FROM webhook.checkpoint")
            migrating = asyncio.create_task(migrate.migrate(connection, SETTINGS, tell=told.append))
            waits = "SELECT wait_event = 'virtualxid' FROM pg_stat_activity WHERE pid = $1"
            await until(lambda: producer.fetchval(waits, pid), within_s=60, what="it waits for the old snapshot")
            for _ in range(50):
                await producer.execute(insert)
            assert not migrating.done()
            with pytest.raises(DatabaseAwayError, match="another"):
                await migrate.migrate(producer, SETTINGS)
            assert await producer.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
            with pytest.raises(asyncpg.PostgresError):
                await migrating
        assert "index outbox_ordering_key: outbox_p0, 1 of 5" in told
        unfinished = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
        assert {row[0] for row in await producer.fetch(unfinished)} == {
            "webhook.outbox_ordering_key",
            "webhook.outbox_p0_ordering_key",
        }
        await migrate.migrate(producer, SETTINGS)
        assert await producer.fetch(unfinished) == []
        assert await structure(producer) == await structure(db)
        assert await producer.fetchval("SELECT count(*) FROM webhook.outbox") == 55


async def test_an_open_transaction_holds_the_upgrade_up_and_not_the_others(old: str, db: asyncpg.Connection) -> None:
    insert = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'a.b', '{}')"
    told: list[str] = []
    async with connected(old) as slow, connected(old) as producer, connected(old) as connection:
        async with slow.transaction():
            await slow.execute(insert)
            migrating = asyncio.create_task(migrate.migrate(connection, SETTINGS, tell=told.append))
            await until(
                lambda: "outbox_ordering_key: waiting for transactions that hold the outbox" in told, within_s=60
            )
            for _ in range(50):  # each behind the try for a lock, if there is one at that moment
                await producer.execute(insert)
            assert not migrating.done()
        await migrating
        assert await structure(connection) == await structure(db)


async def test_timeouts_of_the_role_do_not_end_it(old: str, db: asyncpg.Connection) -> None:
    name = old.partition("?")[0].rpartition("/")[2]
    async with connected(old) as other:
        await other.execute(
            f"ALTER DATABASE {name} SET statement_timeout = '1s'; ALTER DATABASE {name} SET lock_timeout = '10ms'"
        )
        async with other.transaction(isolation="repeatable_read"):
            await other.fetch("SELECT FROM webhook.checkpoint")
            async with connected(old) as connection:
                assert await connection.fetchval("SHOW statement_timeout") == "1s"
                pid = await connection.fetchval("SELECT pg_backend_pid()")
                migrating = asyncio.create_task(migrate.migrate(connection, SETTINGS))
                late = "SELECT wait_event = 'virtualxid' AND clock_timestamp() - query_start > '1.5s' FROM pg_stat_activity WHERE pid = $1"
                await until(lambda: other.fetchval(late, pid), within_s=60, what="it waits for longer than the timeout")
                await other.execute("COMMIT; BEGIN")
                await migrating
                assert await connection.fetchval("SHOW statement_timeout") == "1s", "as it was"
                assert await structure(connection) == await structure(db)


async def test_events_that_break_a_new_rule_are_named(old: str) -> None:
    async with connected(old) as connection:
        await connection.execute(
            "INSERT INTO webhook.outbox (account_id, type, payload, ordering_key) VALUES ('acct', 'a.b', '{}', '')"
        )
        with pytest.raises(DatabaseRefusedError, match="outbox_ordering_key_length"):
            await migrate.migrate(connection, SETTINGS)
        await connection.execute("UPDATE webhook.outbox SET ordering_key = NULL WHERE ordering_key = ''")
        await migrate.migrate(connection, SETTINGS)
