"""One database for the folder's tests, made new before each: copying a database takes up to 0.3 s, emptying this one 15 ms."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from dispatcher.ports import Store
from dispatcher.store.embedded import EmbeddedServer
from tests.conftest import connected, dsn_of
from tests.store.worlds import MemoryWorld, PgWorld, World

# Without triggers and foreign keys, but for the sequences, which are as new: they have handed out nothing.
EMPTY = """
SET session_replication_role = replica;
DELETE FROM webhook.outbox;
DELETE FROM webhook.event_key;
DELETE FROM webhook.attempt;
DELETE FROM webhook.retry;
DELETE FROM webhook.dead_letter;
DELETE FROM webhook.lane;
DELETE FROM webhook.run_progress;
DELETE FROM webhook.run;
DELETE FROM webhook.endpoint_stat;
DELETE FROM webhook.discard;
DELETE FROM webhook.erasure;
DELETE FROM webhook.life;
DELETE FROM webhook.subscription;
DELETE FROM webhook.endpoint_secret;
DELETE FROM webhook.test_attempt;
DELETE FROM webhook.endpoint;
DELETE FROM webhook.event_type;
DELETE FROM webhook.config_change;
DELETE FROM webhook.checkpoint;
INSERT INTO webhook.checkpoint DEFAULT VALUES;
RESET session_replication_role;
SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S' AND relnamespace = 'webhook'::regnamespace;
"""


@pytest.fixture(scope="session")
async def shared_dsn(server: EmbeddedServer, template: str) -> str:
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE test_store TEMPLATE {template}")
    return dsn_of(server.dsn, "test_store")


@pytest.fixture
async def dsn(shared_dsn: str) -> str:
    """An empty database with the schema installed."""
    async with connected(shared_dsn) as connection:
        await _end_leftovers(connection)
        await connection.execute(EMPTY)
    return shared_dsn


async def _end_leftovers(connection: asyncpg.Connection) -> None:
    """End what a failed test left behind."""
    await connection.fetch(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for row in await connection.fetch("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
        await connection.execute(f"ROLLBACK PREPARED '{row['gid']}'")


# ── a Store in two worlds ──


@pytest.fixture(params=["postgres", "memory"])
def made(request: pytest.FixtureRequest) -> World:
    return PgWorld(request.getfixturevalue("dsn")) if request.param == "postgres" else MemoryWorld()


@pytest.fixture
async def world(made: World) -> AsyncIterator[World]:
    yield made
    await made.close()


@pytest.fixture
async def store(world: World) -> Store:
    store = world.store()
    await store.start("first")
    return store
