"""The documents' examples do what they say: each block that is marked `<!-- run: KIND -->` is run, a document's in their order.

They run as a reader would run them: psql, a Python or a Node of their own, on the database in DATABASE_URL.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner

from dispatcher.cli import cli
from dispatcher.domain.signing import secret_key
from dispatcher.settings import Settings
from dispatcher.store import embedded, migrate
from tests.conftest import connected, dsn_of
from tests.rig import SECRET, rig, until
from tests.web.conftest import site
from tests.web.test_receiver import free_port

ROOT = Path(__file__).parent.parent
DOCUMENTS = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)(?:<!-- run: (\w+) -->\n *)?```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# What isn't run from the document, by how it begins: the test that does the same.
ELSEWHERE = {
    "make demo ": "tests/test_cli.py",
    "python3 -m venv": "tests/test_docs_run.py",  # that of README.md, which goes on with what stands apart here
    "export DISPATCHER_DATABASE_URL='postgresql://dispatcher:secret@db.example.com": "tests/test_managed.py",  # needs a server with TLS
}
NODE_MODULES = ROOT / "tests" / "standard_webhooks" / "node_modules"
DJANGO = """
import os
from urllib.parse import parse_qs, urlsplit
import django
from django.conf import settings
parts = urlsplit(os.environ["DATABASE_URL"])
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": parts.path[1:], "USER": parts.username,
    "HOST": parse_qs(parts.query)["host"][0],
}})
django.setup()
"""
# What a receiver of the documents answers to a request that is signed, and to the same with another body.
RECEIVE_PYTHON = """
import json
headers, body = json.loads(os.environ["SENT"])
print(receive(headers, body.encode()), receive(headers, (body + " ").encode()))
"""
RECEIVE_NODE = """
const [headers, body] = JSON.parse(process.env.SENT);
console.log(receive(headers, body), receive(headers, body + " "));
"""


@dataclass(frozen=True)
class Block:
    kind: str | None  # None: nobody runs it
    text: str
    language: str = ""


def blocks(document: str | Path) -> list[Block]:
    text = (ROOT / document).read_text()
    return [Block(found[2], textwrap.dedent(found[4]), found[3]) for found in FENCED.finditer(text)]


def of_kind(document: str, *kinds: str) -> list[Block]:
    return [block for block in blocks(document) if block.kind in kinds]


MIGRATE = {
    "alembic": """
import os
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine
import migration
engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1))
with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
    migration.upgrade()
""",
    "django_migration": DJANGO
    + """
from django.db import connection
from django.db.migrations.state import ProjectState
import migration
with connection.schema_editor(atomic=True) as editor:
    migration.Migration("0001_webhook", "app").apply(ProjectState(), editor)
""",
}


async def run(block: Block, dsn: str, server: embedded.EmbeddedServer, *, cwd: Path = ROOT, **environment: str) -> str:
    """Run one block in `cwd`; return what it printed. Fails with what it said."""
    match block.kind:
        case "sql":
            psql = embedded._binaries(server.data_dir, server.version) / "psql"
            command, text = [str(psql), "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"], block.text
        case "sh" | "bash":
            command, text = [block.kind, "-e"], block.text
        case "python":
            command, text = [sys.executable, "-"], block.text
        case "django":
            command, text = [sys.executable, "-"], DJANGO + block.text
        case "receiver_python":
            command, text = [sys.executable, "-"], block.text + RECEIVE_PYTHON
        case "receiver_node":
            command, text = ["node", "-"], block.text + RECEIVE_NODE
        case "node":
            command, text = ["node", "-"], block.text
        case _:
            raise AssertionError(f"nobody knows how to run {block.kind}")
    if command[0] == "node" and (shutil.which("node") is None or not (NODE_MODULES / "pg").is_dir()):
        pytest.skip("node and its packages are not installed: npm install --prefix tests/standard_webhooks")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DATABASE_URL": dsn,
        "NODE_PATH": str(NODE_MODULES),
        "DISPATCHER_DATABASE_URL": dsn,
        "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8",
        "WEBHOOK_SECRET": SECRET,
        "SENT": json.dumps(sent()),
    } | environment  # fmt: skip
    done = await asyncio.to_thread(
        subprocess.run, command, input=text, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sent() -> tuple[dict[str, str], str]:
    """A request as the dispatcher signs it."""
    now, body = int(time.time()), '{"type":"message.sent","data":{"n":  1}}'
    mac = hmac.digest(secret_key(SECRET), f"evt_1.{now}.{body}".encode(), "sha256")
    signature = f"v1,{base64.b64encode(mac).decode()}"
    return {"webhook-id": "evt_1", "webhook-timestamp": str(now), "webhook-signature": signature}, body


async def count(db: asyncpg.Connection) -> int:
    events: int = await db.fetchval("SELECT count(*) FROM webhook.outbox")
    return events


async def test_producers_sql(dsn: str, db: asyncpg.Connection, server: embedded.EmbeddedServer) -> None:
    grant, insert, emit, table, move = of_kind("docs/producers.md", "sql")
    async with role(db, "my_app"):
        await run(grant, dsn, server)
    assert await run(insert, dsn, server) == "1\n"
    first, again = (await run(emit, dsn, server)).split()
    assert first == again
    await run(table, dsn, server)
    old = "INSERT INTO app_outbox (customer, kind, body, sent_at) VALUES ('acct', 'a.b', '{}', $1::text::timestamptz)"
    for sent_at in ("2026-01-01", None, None):
        await db.execute(old, sent_at)
    before = await count(db)
    assert await run(move, dsn, server) == "2\n", "what wasn't sent is handed over"
    assert await count(db) == before + 2
    await db.execute(old, None)
    assert await count(db) == before + 3, "what comes then follows"
    await run(move, dsn, server)
    assert await count(db) == before + 3, "repeated, it does nothing twice"


@pytest.mark.parametrize(("kind", "events"), [("python", 1 + 1_000 + 5), ("django", 1), ("node", 2)])
async def test_producers_programs(
    dsn: str, db: asyncpg.Connection, server: embedded.EmbeddedServer, kind: str, events: int
) -> None:
    found = of_kind("docs/producers.md", kind)
    assert found
    for block in found:
        await run(block, dsn, server)
    assert await count(db) == events


async def test_receivers_verify_and_remember(dsn: str, db: asyncpg.Connection, server: embedded.EmbeddedServer) -> None:
    [seen] = of_kind("docs/receivers.md", "sql")
    programs = of_kind("docs/receivers.md", "receiver_python", "receiver_node")
    assert await run(seen, dsn, server) == "evt_0ee4da927ccba008cff736c89e3074c0\n"
    assert await run(seen, dsn, server) == "", "the second time there is no row"
    assert len(programs) == 2
    for program in programs:
        assert (await run(program, dsn, server)).splitlines()[-1] == "200 401", program.kind


@pytest.mark.parametrize("kind", ["alembic", "django_migration"])
async def test_the_schema_goes_in_by_the_platforms_own_tool(
    server: embedded.EmbeddedServer, tmp_path: Path, kind: str
) -> None:
    [block] = of_kind("docs/operations-database.md", kind)
    (tmp_path / "migration.py").write_text(block.text)
    (tmp_path / "webhook_2.sql").write_text(CliRunner().invoke(cli, ["migrate", "--sql"]).output)
    async with connected(server.dsn) as db:
        await db.execute(f"CREATE DATABASE of_{kind}")
    try:
        dsn = dsn_of(server.dsn, f"of_{kind}")
        driver = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + MIGRATE[kind]
        await run(Block("python", driver), dsn, server)
        async with connected(dsn) as db:
            assert await migrate.check(db, Settings()) == []
            assert (await migrate.migrate(db, Settings())).done == (), "whole, and committed"
    finally:
        async with connected(server.dsn) as db:
            await db.execute(f"DROP DATABASE of_{kind} WITH (FORCE)")


@contextlib.asynccontextmanager
async def role(db: asyncpg.Connection, *names: str) -> AsyncIterator[None]:
    """Roles are the whole server's: they go when the block has run."""
    for name in names:
        await db.execute(f"CREATE ROLE {name}")
    try:
        yield
    finally:
        for name in names:
            await db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_grants(dsn: str, db: asyncpg.Connection, server: embedded.EmbeddedServer) -> None:
    [insert] = of_kind("README.md", "sql")
    [grants] = of_kind("docs/operations-database.md", "sql")
    async with role(db, "my_app", "dispatcher", "dispatcher_owner"):
        name = await db.fetchval("SELECT current_database()")
        await run(Block("sql", grants.text.replace("DATABASE platform", f"DATABASE {name}")), dsn, server)
        assert await db.fetchval("SELECT has_database_privilege('dispatcher_owner', current_database(), 'CREATE')")
        assert await run(insert, dsn, server) == "1\n"
        await db.execute("SET ROLE my_app")
        assert await run(Block("sql", insert.text[insert.text.index("INSERT") :]), dsn, server) == "2\n"
        await db.execute("RESET ROLE")


SHELL = [
    ("README.md", 0, "up to date"),
    ("README.md", 1, "whkey_"),
    ("docs/api.md", 0, '"url":"'),
    ("docs/api.md", 1, "/enter/"),
    ("docs/endpoints.md", 0, "first  1"),
    ("docs/first-five-minutes.md", 0, "message.delivered"),
    ("docs/first-five-minutes.md", 1, "up to date"),
    ("docs/operations-database.md", 0, ""),
    ("docs/ordering.md", 0, "block"),
    ("docs/receivers.md", 0, "fits"),
    ("docs/receivers.md", 1, "signature valid"),
    ("docs/runbooks.md", 0, "owner"),
]


@pytest.mark.parametrize(("document", "nth", "says"), SHELL)
async def test_in_a_shell(
    dsn: str, server: embedded.EmbeddedServer, tmp_path: Path, document: str, nth: int, says: str
) -> None:
    """As a reader pastes it, beside a service with a panel; names and addresses that are theirs, not the reader's, are put in."""
    block = of_kind(document, "sh")[nth]
    headers, body = sent()
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "headers.txt").write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))
    (tmp_path / "body.json").write_text(body)
    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    port = free_port()
    async with rig(dsn, web_connect=f"127.0.0.1:{port}") as r, site(dsn, web_listen=f"127.0.0.1:{port}") as web:
        if document != "docs/first-five-minutes.md":  # which makes its own, number 1
            assert await r.endpoint(account="acct_42") == 1
        key = await web.key()
        theirs = {
            "postgresql://user:password@host/db": f"'{dsn}'",
            "http://127.0.0.1:9000": r.sink.url,
            "http://localhost:3000": r.sink.url,
            "127.0.0.1:8080 dispatcher": "127.0.0.1:0 dispatcher",
            "http://127.0.0.1:8080": web.url,
            "https://hooks.example.com": web.url,
            "whkey_…": key,
            "API_KEY=…": f"API_KEY={await web.key('acct_42')}",
            "update 7": "update 1",
            "dispatcher doctor": "! dispatcher doctor",  # a server that doesn't flush is bad
            # These go on until they are told to stop.
            "dispatcher run": "timeout --foreground --preserve-status --signal TERM 12 dispatcher run",
            "dispatcher listen": "timeout --foreground --preserve-status --signal TERM 12 dispatcher listen",
        }
        text = block.text
        for written, meant in theirs.items():
            text = text.replace(written, meant)
        said = await run(Block("sh", text), dsn, server, cwd=tmp_path)
        assert says in said
        if document == "docs/first-five-minutes.md" and nth == 0:
            assert "whsec_" in said
            await until(lambda: "/hooks" in r.by_path())
        if document == "docs/operations-database.md":
            assert "CREATE TABLE" in (tmp_path / "migrations" / "versions" / "webhook_2.sql").read_text()


async def test_the_first_look_as_it_is_pasted(dsn: str, server: embedded.EmbeddedServer, tmp_path: Path) -> None:
    """The README's whole block but for the installation, of which tests/test_packaging.py is."""
    [block] = of_kind("README.md", "first_look")
    install, rest = block.text.split("\n", 1)
    assert install.startswith("python3 -m venv")
    port = free_port()
    text = f"unset DISPATCHER_DATABASE_URL; trap 'kill $(jobs -p); wait' EXIT\n{rest.replace('9000', str(port))}"
    with tempfile.TemporaryDirectory(prefix="dispatcher-test-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        said = await run(Block("bash", text), "", server, cwd=tmp_path, DISPATCHER_DATA_DIR=f"{directory}/data")
    assert "whsec_" in said
    assert "message.delivered" in said


ASKED_FOR = {
    ("README.md", "first_look"), ("README.md", "sql"), ("docs/operations-database.md", "sql"),
    ("docs/operations-database.md", "alembic"), ("docs/operations-database.md", "django_migration"),
    *(("docs/producers.md", kind) for kind in ("sql", "python", "django", "node")),
    *(("docs/receivers.md", kind) for kind in ("sql", "receiver_python", "receiver_node")),
}  # fmt: skip


def test_every_example_is_run_or_it_is_said_where() -> None:
    run_in_a_shell = {(document, nth) for document, nth, _ in SHELL}
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language and block.kind is None:
                [test] = {test for begin, test in ELSEWHERE.items() if block.text.startswith(begin)}
                assert (ROOT / test).is_file()
            elif block.kind not in (None, "sh"):
                assert (str(document), block.kind) in ASKED_FOR, f"no test runs it: {block.text[:60]}"
        here = {(str(document), nth) for nth in range(len(of_kind(str(document), "sh")))}
        assert here <= run_in_a_shell
