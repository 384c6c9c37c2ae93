"""The documents' examples do what they say: each block that is marked `<!-- run: KIND -->` is run, a document's in their order.

They run as a reader would run them: psql, a Python or a Node of their own, on the database in DATABASE_URL.
"""

import asyncio
import base64
import hmac
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
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

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"^( *)<!-- run: (\w+) -->\n *```\w+\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
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
    kind: str
    text: str


def blocks(document: str) -> list[Block]:
    return [
        Block(found[2], textwrap.dedent(found[3])) for found in MARKED.finditer((ROOT / "docs" / document).read_text())
    ]


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


async def run(block: Block, dsn: str, server: embedded.EmbeddedServer) -> str:
    """Run one block; return what it printed. Fails with what it said."""
    match block.kind:
        case "sql":
            psql = embedded._binaries(server.data_dir, server.version) / "psql"
            command, text = [str(psql), "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"], block.text
        case "sh":
            command, text = ["sh", "-e"], block.text
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
        "DATABASE_URL": dsn,
        "NODE_PATH": str(NODE_MODULES),
        "DISPATCHER_DATABASE_URL": dsn,
        "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8",
        "WEBHOOK_SECRET": SECRET,
        "SENT": json.dumps(sent()),
    }
    done = await asyncio.to_thread(
        subprocess.run, command, input=text, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, f"{block.text}\n{done.stderr}"
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
    insert, emit, table, move = [block for block in blocks("producers.md") if block.kind == "sql"]
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
    found = [block for block in blocks("producers.md") if block.kind == kind]
    assert found
    for block in found:
        await run(block, dsn, server)
    assert await count(db) == events


async def test_receivers_verify_and_remember(dsn: str, db: asyncpg.Connection, server: embedded.EmbeddedServer) -> None:
    seen, *programs = sorted(blocks("receivers.md"), key=lambda block: block.kind != "sql")
    assert await run(seen, dsn, server) == "evt_0ee4da927ccba008cff736c89e3074c0\n"
    assert await run(seen, dsn, server) == "", "the second time there is no row"
    assert len(programs) == 2
    for program in programs:
        assert (await run(program, dsn, server)).splitlines()[-1] == "200 401", program.kind


@pytest.mark.parametrize("kind", ["alembic", "django_migration"])
async def test_the_schema_goes_in_by_the_platforms_own_tool(
    server: embedded.EmbeddedServer, tmp_path: Path, kind: str
) -> None:
    [block] = [block for block in blocks("operations-database.md") if block.kind == kind]
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


async def test_the_first_five_minutes(
    dsn: str, server: embedded.EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [block] = blocks("first-five-minutes.md")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    async with rig(dsn) as r:
        said = await run(Block("sh", block.text.replace("http://127.0.0.1:9000", r.sink.url)), dsn, server)
        assert "whsec_" in said
        await until(lambda: "/hooks" in r.by_path())
    assert "message.delivered" in said
