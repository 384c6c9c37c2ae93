"""A managed PostgreSQL as they are: TLS that is verified, a role that owns nothing but its schema, timeouts that somebody set, and business
tables beside."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from dispatcher.store import embedded
from tests.cluster import Cluster
from tests.conftest import connected
from tests.rig import rig, until
from tests.test_cli import Cli

WHAT_IS_THERE = """
SELECT n.nspname || '.' || c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname NOT IN ('information_schema', 'webhook')
"""


SSL_REQUEST = (8).to_bytes(4, "big") + (80_877_103).to_bytes(4, "big")


class Front:
    """TLS before a server, as PostgreSQL begins it: the embedded programs are built without. Who doesn't ask for it is hung up on."""

    def __init__(self, behind: Path, context: ssl.SSLContext) -> None:
        self._behind = behind
        self._context = context
        self.connections = 0
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readexactly(8) == SSL_REQUEST:
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(self._context)
                self.connections += 1
                back, forth = await asyncio.open_unix_connection(self._behind)
                await asyncio.gather(self._pump(reader, forth), self._pump(back, writer))
        except (OSError, EOFError):
            pass  # whoever came doesn't trust us, or has gone
        finally:
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture(scope="module")
def cluster(server: embedded.EmbeddedServer) -> Iterator[Cluster]:
    made = Cluster(server)
    try:
        made.initialize()
        rules = made.write("hba", "local all postgres trust\nlocal all all scram-sha-256\n")
        made.start(hba_file=str(rules), fsync="off")
        yield made
    finally:
        made.remove()


@pytest.fixture
async def front(cluster: Cluster) -> AsyncIterator[tuple[Front, Path]]:
    """The way in, and its authority's certificate."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    made = Front(cluster.directory / f".s.PGSQL.{cluster.port}", context)
    listening = await made.start()
    yield made, cluster.write("ca.pem", authority.cert_pem.bytes())
    listening.close()


@pytest.fixture
async def app(cluster: Cluster, front: tuple[Front, Path]) -> AsyncIterator[str]:
    """The URL of a role that has a database of the platform's to work in: no superuser, no CREATEROLE, and not the database's owner."""
    way, ca = front
    async with connected(cluster.dsn) as db:
        await db.execute("CREATE ROLE app LOGIN PASSWORD 'p%ss'")
        await db.execute(
            "ALTER ROLE app SET statement_timeout = '20s'; ALTER ROLE app SET idle_in_transaction_session_timeout = '30s'"
        )
        await db.execute("CREATE DATABASE platform")
        await db.execute("GRANT CREATE ON DATABASE platform TO app")
    async with connected(cluster.dsn.replace("/postgres?", "/platform?")) as db:
        await db.execute("CREATE TABLE public.orders (id bigint); GRANT INSERT ON public.orders TO app")
    yield f"postgresql://app:p%25ss@localhost:{way.port}/platform?sslmode=verify-full&sslrootcert={ca}"
    async with connected(cluster.dsn) as db:
        await db.execute("DROP DATABASE platform WITH (FORCE)")
        await db.execute("DROP ROLE app")


async def cli(url: str, *args: str) -> Any:
    return await asyncio.to_thread(Cli(url), *args)


async def test_a_role_of_no_rank_installs_delivers_and_leaves_the_rest_alone(
    cluster: Cluster, front: tuple[Front, Path], app: str
) -> None:
    async with connected(cluster.dsn.replace("/postgres?", "/platform?")) as owner:
        before = await owner.fetch(WHAT_IS_THERE)
        migrated = await cli(app, "migrate")
        assert migrated.exit_code == 0, migrated.exception
        assert await owner.fetch(WHAT_IS_THERE) == before, "schema webhook, and nothing beside it"
        assert await owner.fetchval("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'webhook%'") == 0, (
            "it may not make roles"
        )
        assert "webhook_producer was not created (no CREATEROLE)" in migrated.stderr
        # Somebody who may makes them, as the document says, and migrate, run again, grants.
        await owner.execute("CREATE ROLE webhook_producer NOLOGIN; CREATE ROLE webhook_dispatcher NOLOGIN")
        try:
            again = await cli(app, "migrate")
            assert "granted webhook_producer and webhook_dispatcher what they need" in again.stdout
            assert "up to date" in (await cli(app, "migrate")).stdout
            async with owner.transaction():
                await owner.execute("SET LOCAL ROLE webhook_producer")
                await owner.execute(
                    "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('nobody', 'a.b', '{}')"
                )
            async with owner.transaction():
                await owner.execute("SET LOCAL ROLE webhook_dispatcher")
                assert await owner.fetchval("SELECT count(*) FROM webhook.outbox") == 1
        finally:
            await owner.execute(
                "DROP OWNED BY webhook_producer, webhook_dispatcher; DROP ROLE webhook_producer, webhook_dispatcher"
            )
    async with rig(app) as r:
        assert front[0].connections > 1, "all sessions go by TLS"
        await r.endpoint()
        async with r.db.transaction():
            await r.db.execute("INSERT INTO public.orders VALUES (7)")
            await r.emit()
        transaction = r.db.transaction()
        await transaction.start()
        await r.emit()
        await transaction.rollback()
        await until(lambda: len(r.received) == 1)
        await r.settled()
        assert len(r.received) == 1, "with the order, or not at all"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda url, other: url.replace("@localhost:", "@127.0.0.1:"),
            "certificate",
        ),  # not the name in the certificate
        (lambda url, other: url.partition("&sslrootcert")[0] + f"&sslrootcert={other}", "certificate"),
        (lambda url, other: url.partition("?")[0] + "?sslmode=disable", "can't be reached"),
    ],
    ids=["another name", "another authority", "no TLS"],
)
async def test_a_connection_that_can_not_be_trusted_is_none(app: str, tmp_path: Path, change: Any, said: str) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    result = await cli(change(app, other), "migrate")
    assert said in str(result.exception)


async def test_the_printed_schema_goes_in_by_any_driver(server: embedded.EmbeddedServer) -> None:
    """`migrate --sql`, as Alembic and Django execute it: plain DB-API, within a transaction of theirs or with one of its own."""
    psycopg = pytest.importorskip("psycopg")
    text = (await cli("", "migrate", "--sql")).output
    async with connected(server.dsn) as db:
        await db.execute("CREATE DATABASE printed")
    try:
        dsn = server.dsn.replace("/postgres?", "/printed?")

        def install() -> None:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(text)

        await asyncio.to_thread(install)
        done = await cli(dsn, "migrate")
        assert done.output.startswith("up to date")
    finally:
        async with connected(server.dsn) as db:
            await db.execute("DROP DATABASE printed WITH (FORCE)")
