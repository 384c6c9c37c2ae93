"""Two versions of the program at once: the new one migrates beside the old one, stands by, and takes over. And the old one on the newer schema.

The new version is a copy of the package with one more migration, and a statement that needs it. Both are real processes, under load.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.spawn import spawn
from dispatcher.store.migrate import SCHEMA_VERSION
from tests.process.support import ROOT, backends, dispatching, longest_silence, standing_by, terminate
from tests.process.test_standby import RETRY, scene, standby
from tests.rig import PATIENCE_S, until

NEXT = SCHEMA_VERSION + 1
UNFIT = 5  # exit status

# Tables that the recorder, the reader and the configuration are at all the time; in an order that isn't the recorder's, as 2.sql has it.
MIGRATION = f"""
ALTER TABLE webhook.endpoint ADD COLUMN upgraded boolean;
ALTER TABLE webhook.retry ADD COLUMN upgraded boolean;
ALTER TABLE webhook.checkpoint ADD COLUMN upgraded boolean;
ALTER TABLE webhook.attempt ADD COLUMN upgraded boolean;
INSERT INTO webhook.schema_version (version) VALUES ({NEXT});
"""
ONLINE = """
-- name: outbox_upgraded
CREATE INDEX {how} {index} ON {table} (account_id, id) WHERE traceparent IS NOT NULL;
"""


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, found = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert found == 1, f"{pattern!r} is {found} times in {path.name}: the new version can't be made of it"
    path.write_text(text)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A checkout of a version to come."""
    shutil.copytree(ROOT / "dispatcher", tmp_path / "dispatcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "schema.sql", tmp_path)
    store = tmp_path / "dispatcher" / "store"
    edit(store / "migrate.py", rf"^SCHEMA_VERSION = {SCHEMA_VERSION}$", f"SCHEMA_VERSION = {NEXT}")
    edit(
        store / "queries.sql",
        r"^UPDATE webhook\.checkpoint SET epoch = epoch \+ 1,",
        "UPDATE webhook.checkpoint SET upgraded = true, epoch = epoch + 1,",
    )
    (store / "migrations" / f"{NEXT}.sql").write_text(MIGRATION)
    (store / "migrations" / f"{NEXT}.online.sql").write_text(ONLINE)
    return tmp_path


async def verb(root: Path, dsn: str, *words: str) -> tuple[int, str]:
    """Run one verb of the version in `root`; return its exit status and what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
    process = await spawn(
        sys.executable, "-m", "dispatcher", *words,
        cwd=root, env=environment | {"DISPATCHER_DATABASE_URL": dsn},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def migrate(root: Path, dsn: str) -> None:
    """As an operator does: one that found a lock in its way is repeated."""
    for _ in range(5):
        status, said = await verb(root, dsn, "migrate")
        if status != 6:
            break
        print(said)
    assert status == 0, said
    assert f"schema version {SCHEMA_VERSION} → {NEXT}" in said


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
async def test_a_new_version_takes_over_from_the_old_one(dsn: str, new: Path, how: signal.Signals) -> None:
    async with scene(dsn) as s, dispatching(dsn, user_agent="old", **RETRY) as old:
        await s.load.more(100)
        status, said = await verb(new, dsn, "run")
        assert status == UNFIT
        assert f"has version {SCHEMA_VERSION}, this program needs {NEXT}; run `dispatcher migrate`" in said
        began_at = time.time()
        await migrate(new, dsn)
        await s.load.more(100)
        silence = longest_silence(s.r, began_at)
        print(f"beside the migration nothing arrived for {silence:.2f} s at most")
        assert silence < 5
        async with standby(dsn, "new", new) as second:
            await second.said("standby.waiting")
            await standing_by(s.r.db)
            await s.load.more(150)
            assert s.of("new") == []
            assert await s.r.db.fetchval("SELECT upgraded FROM webhook.checkpoint") is None
            assert len(old.all("started")) == 1, "the old one went on as it was"
            old.signal(how)
            assert await old.ended() == (0 if how is signal.SIGTERM else -how), old
            assert old.errors == ""
            ended_at = time.time()
            took = await s.taken_over("new", ended_at)
            print(f"{how.name}: the new version's first POST {took:.2f} s after the old one's end")
            assert took < 2
            assert await s.r.db.fetchval("SELECT upgraded FROM webhook.checkpoint")
            await s.load.more(100)
            await s.settle(second)
            repeats = s.check_repeats("old", "new", ended_at)
            print(f"{repeats} arrived twice")
            if how is signal.SIGTERM:
                assert repeats == 0, "an orderly stop leaves nothing to repeat"


async def test_the_old_version_goes_on_beside_the_newer_schema_and_does_not_start_on_it(dsn: str, new: Path) -> None:
    """The owner keeps its place also where its connections are lost. Whatever starts, or had waited, refuses and says what to do; the log waits
    for the new version, whenever that comes."""
    async with (
        scene(dsn) as s,
        dispatching(dsn, user_agent="old", **RETRY) as old,
        standby(dsn, "waiting") as waiting,
    ):
        await standing_by(s.r.db)
        await migrate(new, dsn)
        for session in (
            "reader",
            "recorder",
            "config",
            "listener",
        ):  # not the owner's: the standby might have its lock first
            assert await terminate(s.r.db, session) == 1
        cut_at = time.time()
        await until(lambda: s.of("old", cut_at + 0.5), what="a POST by the old one on new sessions")
        await s.load.more(100)
        assert waiting.process.returncode is None

        for words in (["run"], ["web"], ["endpoint", "list"], ["migrate"]):
            status, said = await verb(ROOT, dsn, *words)
            assert status == UNFIT, said
            assert f"the schema has version {NEXT}, newer than this program's {SCHEMA_VERSION}" in said
            assert "install the program that belongs to it" in said
            assert "Traceback" not in said

        assert await old.stop() == 0
        assert await waiting.ended() == UNFIT, waiting
        assert f"the schema went from version {SCHEMA_VERSION} to {NEXT} while this standby waited" in waiting.errors
        assert "start the program that belongs to it" in waiting.errors
        assert "Traceback" not in waiting.errors
        assert s.of("waiting") == []
        assert await backends(s.r.db) == [], "nobody holds the log"

        await s.load.more(50)
        started_at = time.time()
        async with standby(dsn, "new", new) as second:
            await second.said("started")
            await s.taken_over("new", started_at)
            await s.load.more(50)
            await s.settle(second)
