"""`dispatcher doctor`: each thing that can be wrong is found, named, and has a remedy; a healthy installation has no finding."""

import contextlib
import json
import resource
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dispatcher import settings as settings_module
from dispatcher.store import doctor as doctor_module
from dispatcher.store.doctor import CHECKS, Finding, Grade, examine
from tests.conftest import connected
from tests.rig import rig
from tests.test_cli import Cli, empty, run

__all__ = ["empty", "run"]


async def findings(dsn: str, **settings: Any) -> dict[str, Finding]:
    async with connected(dsn) as connection:
        found = await examine(connection, settings_module.load(**settings))
    assert all(finding.remedy for finding in found if finding.grade is not Grade.GOOD)
    return {finding.check: finding for finding in found}


async def test_a_healthy_installation(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.endpoint()
        await r.emit(3)
        await r.settled()
        found = await findings(dsn)
        assert list(found) == ["schema", *CHECKS]
        assert found.pop("server").grade is Grade.BAD, "the tests' server runs without fsync"
        assert found.pop("encryption").grade is Grade.WARNING, "the secrets are plain text here"
        assert {name: f.found for name, f in found.items() if f.grade is not Grade.GOOD} == {}


async def test_nobody_delivers(dsn: str, db: asyncpg.Connection) -> None:
    assert (await findings(dsn))["owner"].grade is Grade.BAD
    await db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload, created_at) VALUES ('a', 'a.b', '{}', now() - interval '1 hour')"
    )
    oldest = (await findings(dsn))["oldest event"]
    assert oldest.grade is Grade.BAD
    assert "3,6" in oldest.found


@contextlib.asynccontextmanager
async def writing(dsn: str, end: str = "ROLLBACK") -> AsyncIterator[asyncpg.Connection]:
    async with connected(dsn) as connection:
        await connection.execute("BEGIN")
        await connection.execute("INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('a', 'a.b', '{}')")
        yield connection
        await connection.execute(end)


async def test_a_transaction_that_keeps_the_log_open(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await findings(dsn))["transactions"].grade is Grade.GOOD
    async with writing(dsn) as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        assert (await findings(dsn))["transactions"].grade is Grade.GOOD, "not for long yet"
        monkeypatch.setattr(doctor_module, "WRITER_S", 0)
        found = (await findings(dsn))["transactions"]
        assert found.grade is Grade.WARNING
        assert f"pid {pid}" in found.found
        assert "open for writing" in found.found
    assert (await findings(dsn))["transactions"].grade is Grade.GOOD


async def test_a_transaction_that_keeps_vacuum_from_its_work(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(dsn) as connection, connection.transaction():
        await connection.fetchval("SELECT 1")
        monkeypatch.setattr(doctor_module, "TRANSACTION_S", 0)
        found = (await findings(dsn))["transactions"]
        assert found.grade is Grade.WARNING
        assert "vacuum" in found.found


async def test_a_prepared_transaction_that_was_forgotten(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with writing(dsn, "PREPARE TRANSACTION 'forgotten'"):
        pass
    assert (await findings(dsn))["prepared transactions"].grade is Grade.GOOD
    monkeypatch.setattr(doctor_module, "PREPARED_S", 0)
    found = (await findings(dsn))["prepared transactions"]
    assert found.grade is Grade.WARNING
    assert "'forgotten'" in found.found
    async with connected(dsn) as connection:
        await connection.execute("ROLLBACK PREPARED 'forgotten'")


async def test_gaps_partitions_and_lanes(dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(dsn, start=False) as r:
        endpoint_id = await r.endpoint()
        await r.emit(3)
        await db.execute(
            "INSERT INTO webhook.lane (endpoint_id, settled, holes, backlog) VALUES ($1, 1, '{}', 2)", endpoint_id
        )
        behind = (await findings(dsn))["endpoints behind"]
        assert behind.grade is Grade.WARNING
        assert f"endpoint {endpoint_id} of acct" in behind.found
        assert "the oldest was made 0 s ago" in behind.found
        assert (await findings(dsn))["gaps"].grade is Grade.GOOD
        await db.execute("UPDATE webhook.checkpoint SET position = 3, gaps = '{[1,2),[3,4)}'")
        monkeypatch.setattr(doctor_module, "GAP_RANGES", 1)
        gaps = (await findings(dsn))["gaps"]
        assert gaps.grade is Grade.WARNING
        assert gaps.found.startswith("2 ids in 2 ranges")
        await db.execute(
            "INSERT INTO webhook.outbox (id, account_id, type, payload) OVERRIDING SYSTEM VALUE VALUES (1000000000000, 'a', 'a.b', '{}')"
        )
        partitions = (await findings(dsn))["partitions"]
        assert partitions.grade is Grade.WARNING
        assert "DEFAULT partition holds events" in partitions.found


async def test_a_notification_that_is_lost(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a pooler that gives the listener's server connection away."""
    monkeypatch.setattr(doctor_module, "NOTIFY_S", 0.05)
    monkeypatch.setattr(doctor_module.DOCTOR, "notify", "SELECT $1::text")
    found = (await findings(dsn))["listen"]
    assert found.grade is Grade.BAD
    assert "pool_mode=session" in (found.remedy or "")


async def test_clocks_that_disagree(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "SKEW_S", -1.0)
    assert (await findings(dsn))["clock"].grade is Grade.WARNING


async def test_what_may_not_be_looked_at_keeps_nothing_else_from_it(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module.DOCTOR, "prepared", "SELECT * FROM pg_catalog.pg_authid, webhook.nothing")
    found = await findings(dsn)
    assert "can't be looked at" in found["prepared transactions"].found
    assert list(found) == ["schema", *CHECKS]


async def test_a_retention_that_is_too_short(dsn: str) -> None:
    assert (await findings(dsn, retention_days=4))["retention"].grade is Grade.WARNING
    found = await findings(dsn, retention_days=2)
    assert [*found] == ["schema"]
    assert found["schema"].grade is Grade.BAD
    assert "DISPATCHER_RETENTION_DAYS" in found["schema"].found


async def test_a_log_whose_size_keeps_it_shorter_than_retries_last(dsn: str, db: asyncpg.Connection) -> None:
    await db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload) "
        "SELECT 'a', 'a.b', to_json(repeat('x', 1000)) FROM generate_series(1, 20000)"
    )
    assert (await findings(dsn, retention_bytes_max=1 << 30))["retention"].grade is Grade.GOOD
    found = (await findings(dsn, retention_bytes_max=1 << 24))["retention"]
    assert found.grade is Grade.WARNING
    assert "its oldest event is 0.0 days old" in found.found
    assert "DISPATCHER_RETENTION_BYTES_MAX" in (found.remedy or "")
    await db.execute("UPDATE webhook.outbox SET created_at = now() - interval '6 days' WHERE id = 1")
    assert (await findings(dsn, retention_bytes_max=1 << 24))["retention"].grade is Grade.GOOD


async def test_a_sequence_with_a_cache_and_a_role_without_privileges(dsn: str, db: asyncpg.Connection) -> None:
    await db.execute("ALTER SEQUENCE webhook.outbox_id_seq CACHE 5")
    found = (await findings(dsn))["schema"]
    assert found.grade is Grade.BAD
    assert "CACHE 5" in found.found
    await db.execute("ALTER SEQUENCE webhook.outbox_id_seq CACHE 1")
    await db.execute("DO $$ BEGIN CREATE ROLE doctor_nobody LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    async with connected(dsn.replace("postgres@", "doctor_nobody@")) as nobody:
        (finding,) = await examine(nobody, settings_module.load())
    assert finding.grade is Grade.BAD
    assert "GRANT webhook_dispatcher" in (finding.remedy or "")


# The command


def test_the_command_says_it_in_lines_and_in_json(run: Cli) -> None:
    result = run("doctor")
    assert result.exit_code == 1
    assert "BAD  owner" in result.output
    assert "→ start `dispatcher run`" in result.output
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["grade"] == "bad"
    assert {finding["check"] for finding in found["findings"]} == {"schema", "descriptors", *CHECKS}
    assert all((finding["remedy"] is None) == (finding["grade"] == "good") for finding in found["findings"])


def test_descriptors(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_024, 1_024))
    (found,) = [f for f in json.loads(run("doctor", "--json").output)["findings"] if f["check"] == "descriptors"]
    assert found["grade"] == "warning"
    assert "LimitNOFILE" in found["remedy"]


def test_warnings_count_when_asked(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    async def a_warning(*_: object) -> list[Finding]:
        return [Finding("x", Grade.WARNING, "a", "b")]

    monkeypatch.setattr(sys.modules["dispatcher.cli.doctor"], "examine", a_warning)
    assert run("doctor").exit_code == 0
    assert run("doctor", "--strict").exit_code == 1


def test_a_database_without_the_schema(empty: str) -> None:
    result = Cli(empty)("doctor")
    assert result.exit_code == 1
    assert "run `dispatcher migrate`" in result.output


def test_no_database_at_all(tmp_path: Any) -> None:
    result = Cli(f"postgresql://postgres@/x?host={tmp_path}")("doctor")
    assert result.exit_code == 1
    assert "can't be reached" in result.output
