"""A streaming replica is promoted under load, and a backup is restored.

Synchronous: nothing that was acknowledged is lost. Asynchronous, or from a backup: what it hadn't got never happened, also where
it was delivered; what comes then goes on, under other public ids.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import asyncpg
import orjson
import pytest

from bench.network import Network
from dispatcher.store import embedded
from tests.cluster import Cluster
from tests.conftest import SCHEMA, connected
from tests.process.support import dispatching
from tests.rig import Rig, rig, until

INSERT = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', $1::text::json) RETURNING id"
STREAMS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = 'replica'"


@pytest.fixture
def pair(server: embedded.EmbeddedServer) -> Iterator[tuple[Cluster, Cluster]]:
    primary, replica = Cluster(server), Cluster(server)
    try:
        primary.initialize()
        primary.start(fsync="off")
        replica.copy_of(primary, "replica")
        replica.start(fsync="off")
        yield primary, replica
    finally:
        replica.remove()
        primary.remove()


@contextlib.asynccontextmanager
async def producing(dsn: str, acknowledged: list[str], *, again: bool = False) -> AsyncIterator[None]:
    """Insert events one by one until the server is gone, or `again` once it is back; keep what it acknowledged."""

    async def produce(name: str) -> None:
        numbers = iter(range(100_000))
        while True:
            try:
                async with connected(dsn) as db:
                    for n in numbers:
                        payload = f'"{name} {n}"'
                        await db.fetchval(INSERT, payload)
                        acknowledged.append(payload)
                        await asyncio.sleep(0.002)  # the load's pace
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                if not again:
                    return  # the server went away: that insert was not acknowledged
                await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(produce(name)) for name in "ab"]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def payloads(db: asyncpg.Connection) -> set[str]:
    return {row[0] for row in await db.fetch("SELECT payload::text FROM webhook.outbox")}


async def test_a_synchronous_replica_loses_nothing(pair: tuple[Cluster, Cluster]) -> None:
    primary, replica = pair
    async with connected(primary.dsn) as db:
        await db.execute(SCHEMA)
        await db.execute("ALTER SYSTEM SET synchronous_standby_names = 'replica'")
        await db.execute("SELECT pg_reload_conf()")
        await until(lambda: db.fetchval(STREAMS), within_s=60, what="the replica streams")
    acknowledged: list[str] = []
    async with rig(primary.dsn) as r:
        await r.endpoint()
        async with producing(primary.dsn, acknowledged):
            await until(lambda: len(acknowledged) > 200 and len(r.received) > 100, within_s=60)
            await asyncio.to_thread(primary.stop, "immediate")
        await r.kill()
        await asyncio.to_thread(replica.promote)
        async with rig(replica.dsn) as after:  # reads on from the replica's checkpoint, to the same sink
            assert set(acknowledged) - await payloads(after.db) == set(), "an acknowledged event is on the replica"
            await after.settled(within_s=60)
            assert await after.undelivered() == []
            delivered = {orjson.dumps(orjson.loads(event.body)["data"]).decode() for event in r.received}
            assert set(acknowledged) - delivered == set(), "… and was delivered, before or after"


async def test_an_asynchronous_replica_forgets_and_goes_on(pair: tuple[Cluster, Cluster]) -> None:
    primary, replica = pair
    async with connected(primary.dsn) as db:
        await db.execute(SCHEMA)
    async with rig(primary.dsn) as r:
        await r.endpoint()
        await r.emit(20)
        await r.settled()
        async with connected(replica.dsn) as copy:

            async def has_all() -> bool:
                return bool(await copy.fetchval("SELECT count(*) FROM webhook.attempt") == 20)

            await until(has_all, within_s=60, what="the replica has what was before")
            await copy.execute("ALTER SYSTEM SET primary_conninfo = ''")
            await copy.execute("SELECT pg_reload_conf()")
        await until(lambda: _none(r), within_s=60, what="the replica is cut off")
        forgotten = await r.emit(200, payload='{"forgotten": true}')
        await until(lambda: len(r.received) == 220, within_s=60)
        await asyncio.to_thread(primary.stop, "immediate")
        await r.kill()
        await asyncio.to_thread(replica.promote)
        async with rig(replica.dsn) as after:
            assert await after.db.fetchval("SELECT count(*) FROM webhook.outbox") == 20, (
                "what was delivered, and never happened"
            )
            again = await after.emit(300)
            await until(lambda: len(r.received) >= 520, within_s=60)
            await after.settled()
            assert set(forgotten) & set(again), "ids that the log forgot may come again"
            assert len({event.webhook_id for event in r.received}) == 520, "the customers' ids don't"


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "asynchronous"])
async def test_a_live_dispatcher_notices_that_the_server_is_another_one(
    pair: tuple[Cluster, Cluster], synchronous: bool
) -> None:
    """The address moves, under load; the process stays, begins anew on the replica, and sends all that is in its log."""
    primary, replica = pair
    async with connected(primary.dsn) as db:
        await db.execute(SCHEMA)
        if synchronous:
            await db.execute("ALTER SYSTEM SET synchronous_standby_names = 'replica'")
            await db.execute("SELECT pg_reload_conf()")
        await until(lambda: db.fetchval(STREAMS), within_s=60, what="the replica streams")
    acknowledged: list[str] = []
    async with rig(primary.dsn, start=False) as r, Network(primary.dsn) as network:
        await r.endpoint()
        async with dispatching(network.dsn) as dispatcher:
            async with producing(network.dsn, acknowledged, again=True):
                await until(lambda: len(acknowledged) > 200 and len(r.received) > 100, within_s=60)
                await asyncio.to_thread(primary.stop, "immediate")
                before = len(acknowledged)
                await asyncio.to_thread(replica.promote)
                network.lead_to(replica.dsn)
                network.sever()
                await until(lambda: len(acknowledged) > before + 200, within_s=60, what="producers go on")
            async with connected(replica.dsn) as db:
                await until(lambda: _all_delivered(db, r), within_s=60, what="what the replica has is delivered")
                kept = await payloads(db)
            assert dispatcher.process.returncode is None, dispatcher
    if synchronous:
        assert set(acknowledged) <= kept, "an acknowledged event is on the replica"
    assert set(acknowledged[before:]) <= kept


async def _all_delivered(db: asyncpg.Connection, r: Rig) -> bool:
    return await payloads(db) <= {orjson.dumps(orjson.loads(event.body)["data"]).decode() for event in r.received}


async def test_a_backup_is_restored_and_goes_on_where_it_was(pair: tuple[Cluster, Cluster]) -> None:
    primary, elsewhere = pair
    async with connected(primary.dsn) as db:
        await db.execute(SCHEMA)
    async with rig(primary.dsn) as r:
        await r.endpoint()
        await r.emit(20)
        await r.settled()
        await r.kill()
        await r.emit(10)  # nobody has seen these
        await asyncio.to_thread(primary.run, "pg_dump", "-Fc", "-f", str(primary.directory / "dump"), "-d", primary.dsn)
        await asyncio.to_thread(elsewhere.promote)
        await asyncio.to_thread(
            elsewhere.run,
            "createdb",
            "-h",
            str(elsewhere.directory),
            "-p",
            str(elsewhere.port),
            "-U",
            "postgres",
            "back",
        )
        restored = elsewhere.dsn.replace("/postgres?", "/back?")
        await asyncio.to_thread(
            elsewhere.run, "pg_restore", "--exit-on-error", "-d", restored, str(primary.directory / "dump")
        )
        async with rig(restored) as after:
            await until(lambda: len(r.received) == 30, within_s=60)
            await after.settled()
            assert len({event.webhook_id for event in r.received}) == 30, (
                "what was delivered isn't sent again, under its id"
            )


async def _none(r: Rig) -> bool:
    return bool(await r.db.fetchval(STREAMS) == 0)
