"""webhook.emit: the INSERT as a function, and once for each key."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.conftest import connected
from tests.rig import until

EMIT = "SELECT webhook.emit('acct', 'message.sent', $1::text::json, event_key => $2)"
OTHER = "SELECT webhook.emit('other', 'message.sent', '{}', event_key => $1)"


@pytest.fixture
async def producers(dsn: str) -> AsyncIterator[tuple[asyncpg.Connection, asyncpg.Connection]]:
    """Two connections with webhook_producer's privileges and no others."""
    async with connected(dsn) as one, connected(dsn) as two:
        for connection in (one, two):
            await connection.execute("SET SESSION AUTHORIZATION webhook_producer")
        yield one, two


async def rows(db: asyncpg.Connection) -> list[dict[str, Any]]:
    return [
        dict(row)
        for row in await db.fetch("SELECT id, account_id, payload::text AS payload FROM webhook.outbox ORDER BY id")
    ]


async def wait_for_a_waiter(db: asyncpg.Connection, waiting: asyncio.Task[Any]) -> None:
    """Return when somebody waits for another transaction's end."""

    async def waits() -> bool:
        assert not waiting.done(), waiting.result()
        return bool(
            await db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'transactionid')")
        )

    await until(waits, what="the second caller waits for the first")


async def test_without_a_key_it_is_the_insert(db: asyncpg.Connection, producers: Any) -> None:
    one, _ = producers
    first = await one.fetchval("SELECT webhook.emit('acct', 'message.sent', '{\"n\":   1}')")
    second = await one.fetchval(
        "SELECT webhook.emit(account_id => 'acct', type => 'message.sent', payload => '{}', occurred_at => '2026-01-02', "
        "ordering_key => 'k', expires_at => '2027-01-02', priority => 3, traceparent => 't')"
    )
    assert second > first
    assert (await rows(db))[0]["payload"] == '{"n":   1}', "byte for byte"
    row = await db.fetchrow("SELECT * FROM webhook.outbox WHERE id = $1", second)
    assert (row["ordering_key"], row["priority"], row["traceparent"]) == ("k", 3, "t")
    assert (row["occurred_at"].year, row["expires_at"].year) == (2026, 2027)
    assert await db.fetchval("SELECT count(*) FROM webhook.event_key") == 0, "unused, it costs nothing"


async def test_a_key_inserts_once_an_account(db: asyncpg.Connection, producers: Any) -> None:
    one, two = producers
    first = await one.fetchval(EMIT, '{"n": 1}', "order-7")
    assert await two.fetchval(EMIT, '{"n": 2}', "order-7") == first
    other = await two.fetchval(OTHER, "order-7")
    assert other != first
    async with one.transaction():
        third = await one.fetchval(EMIT, "{}", "order-8")
        assert await one.fetchval(EMIT, "{}", "order-8") == third, "in one transaction too"
    assert [(row["id"], row["payload"]) for row in await rows(db)] == [
        (first, '{"n": 1}'),
        (other, "{}"),
        (third, "{}"),
    ]


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_a_second_caller_waits_for_the_first(db: asyncpg.Connection, producers: Any, ends: str) -> None:
    one, two = producers
    await one.execute("BEGIN")
    first = await one.fetchval(EMIT, '{"n": 1}', "k")
    second = asyncio.create_task(two.fetchval(EMIT, '{"n": 2}', "k"))
    await wait_for_a_waiter(db, second)
    await one.execute(ends)
    got = await asyncio.wait_for(second, 15)
    if ends == "COMMIT":
        assert got == first
        assert [row["payload"] for row in await rows(db)] == ['{"n": 1}']
    else:
        assert [(row["id"], row["payload"]) for row in await rows(db)] == [(got, '{"n": 2}')]


async def test_a_snapshot_that_can_not_see_the_first_is_refused(db: asyncpg.Connection, producers: Any) -> None:
    """REPEATABLE READ: the id can't be seen, so the caller is told to begin again."""
    one, two = producers
    async with two.transaction(isolation="repeatable_read"):
        await two.fetchval("SELECT count(id) FROM webhook.outbox")
        first = await one.fetchval(EMIT, "{}", "k")
        with pytest.raises(asyncpg.SerializationError):
            async with two.transaction():
                await two.fetchval(EMIT, "{}", "k")
    assert await two.fetchval(EMIT, "{}", "k") == first


async def test_many_callers_at_once_insert_one(dsn: str, db: asyncpg.Connection) -> None:
    async def call() -> list[int]:
        async with connected(dsn) as connection:
            return [await connection.fetchval(EMIT, "{}", f"k{n}") for n in range(20)]

    got = await asyncio.gather(*[call() for _ in range(8)])
    assert all(ids == got[0] for ids in got)
    assert [row["id"] for row in await rows(db)] == sorted(got[0])
    assert len(set(got[0])) == 20


async def test_a_key_is_free_again_after_a_day(db: asyncpg.Connection, producers: Any) -> None:
    one, two = producers
    first = await one.fetchval(EMIT, "{}", "k")
    await db.execute("UPDATE webhook.event_key SET created_at = clock_timestamp() - interval '23 hours 59 minutes'")
    assert await one.fetchval(EMIT, "{}", "k") == first
    await db.execute("UPDATE webhook.event_key SET created_at = clock_timestamp() - interval '24 hours'")
    second = await one.fetchval(EMIT, "{}", "k")
    assert second > first, "also where nobody has swept it"
    assert await two.fetchval(EMIT, "{}", "k") == second
    assert len(await rows(db)) == 2


async def test_an_event_that_is_refused_leaves_no_key(db: asyncpg.Connection, producers: Any) -> None:
    one, _ = producers
    with pytest.raises(asyncpg.CheckViolationError, match="outbox_type_form"):
        await one.fetchval("SELECT webhook.emit('acct', 'No Type', '{}', event_key => 'k')")
    for key in ("", "x" * 256):
        with pytest.raises(asyncpg.CheckViolationError, match="event_key_length"):
            await one.fetchval(EMIT, "{}", key)
    with pytest.raises(asyncpg.NumericValueOutOfRangeError):
        await one.fetchval("SELECT webhook.emit('acct', 'a.b', '{}', priority => 40000)")
    assert await db.fetchval("SELECT count(*) FROM webhook.event_key") == 0


async def test_producers_see_no_keys_and_others_may_not_emit(dsn: str, producers: Any) -> None:
    one, _ = producers
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await one.fetchval("SELECT count(*) FROM webhook.event_key")
    async with connected(dsn) as connection:
        await connection.execute("CREATE ROLE test_emit_nobody; GRANT USAGE ON SCHEMA webhook TO test_emit_nobody")
        try:
            await connection.execute("SET ROLE test_emit_nobody")
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="emit"):
                await connection.fetchval(EMIT, "{}", None)
        finally:
            await connection.execute("RESET ROLE; DROP OWNED BY test_emit_nobody; DROP ROLE test_emit_nobody")


async def test_a_producer_can_make_nothing_of_the_schemas_triggers(producers: Any) -> None:
    """A trigger function is the schema's owner while it runs: on a table of one's own it would write whatever that says."""
    one, _ = producers
    await one.execute("CREATE TEMPORARY TABLE mine (endpoint_id bigint)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="note_config_change"):
        await one.execute(
            "CREATE TRIGGER x AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change()"
        )


async def test_a_temporary_table_of_the_callers_is_not_in_its_way(db: asyncpg.Connection, producers: Any) -> None:
    """SECURITY DEFINER: what a caller has on its own search path means nothing."""
    one, _ = producers
    await one.execute("CREATE TEMPORARY TABLE outbox (id bigint); CREATE TEMPORARY TABLE event_key (key text)")
    await one.execute("SET search_path = pg_temp, public")
    event_id = await one.fetchval(EMIT, "{}", "k")
    assert [row["id"] for row in await rows(db)] == [event_id]
