"""A reload changes what can change, names the rest, hides secrets, and a bad file changes nothing."""

import base64
from pathlib import Path
from typing import Any

import structlog

from dispatcher.errors import InputError
from dispatcher.observe.reload import AT_ONCE, reload
from dispatcher.settings import Settings, load
from dispatcher.sink import Behaviour
from tests.rig import rig, until

SECRET = "postgresql://u:hunter2@h/d"


def test_what_may_change_changes_and_the_rest_is_named() -> None:
    current = load()
    with structlog.testing.capture_logs() as logged:
        after = reload(current, lambda: load(slots=7, log_level="debug", poll_ms=9, database_url=SECRET))
    assert (after.slots, after.log_level) == (7, "debug")
    assert (after.poll_ms, after.database_url) == (current.poll_ms, current.database_url)
    (line,) = logged
    assert line["changed"] == {"DISPATCHER_SLOTS": 7, "DISPATCHER_LOG_LEVEL": "debug"}
    assert line["need_restart"] == ["DISPATCHER_DATABASE_URL", "DISPATCHER_POLL_MS"]
    assert "hunter2" not in str(logged)
    with structlog.testing.capture_logs() as logged:
        assert reload(after, lambda: after) == after
    assert (logged[0]["changed"], logged[0]["need_restart"]) == ({}, [])


def test_other_keys_in_the_same_file_need_a_restart(tmp_path: Path) -> None:
    """What is sealed meanwhile is sealed with the keys that every part of the process has."""
    file = tmp_path / "keys"
    old, new = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
    file.write_text(old)
    current = load(encryption_keys_file=file)
    before = current.keyring.ids
    file.write_text(f"{new}\n{old}")
    assert current.keyring.ids == before
    with structlog.testing.capture_logs() as logged:
        after = reload(current, lambda: load(encryption_keys_file=file))
    assert logged[0]["need_restart"] == ["DISPATCHER_ENCRYPTION_KEYS_FILE"]
    assert after.keyring.ids == before


def test_a_bad_file_changes_nothing() -> None:
    def bad() -> Settings:
        raise InputError("setting DISPATCHER_SLOTS: no")

    current = load()
    with structlog.testing.capture_logs() as logged:
        assert reload(current, bad) is current
    assert logged[0]["event"] == "reload.refused"
    assert "DISPATCHER_SLOTS" in logged[0]["error"]


def test_every_name_is_a_setting_and_no_secret() -> None:
    assert set(AT_ONCE) <= set(Settings.model_fields)
    assert not any("url" in name or "key" in name for name in AT_ONCE)


async def test_a_running_engine_adopts_them_and_its_next_life_too(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.endpoint()
        settings = r.settings.model_copy(
            update={"slots": 40, "memory_events_max": 500, "memory_bytes_max": 2_000_000, "grace_s": 0.5}
        )
        r.engine.adopt(settings)

        def bounds() -> tuple[Any, ...]:
            life = r.engine.incarnation
            assert life is not None
            sender = life.sender
            return (
                sender._slots, sender.shares.failing.limit, sender.shares.untried.limit, sender.shares.slow.limit,
                life.lanes.memory.events_max, life.lanes.memory.bytes_max, life._settings.grace_s,
            )  # fmt: skip

        wanted = (40, 10, 10, 20, 500, 2_000_000, 0.5)
        assert bounds() == wanted
        before = r.engine.incarnation
        await r.db.execute("UPDATE webhook.life SET token = gen_random_uuid()")
        await r.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'dispatcher reader'"
        )
        await until(lambda: r.engine.incarnation is not before, what="a new life")
        assert bounds() == wanted
        await r.emit(30)
        await until(lambda: r.engine.counters.delivered == 30)


async def test_more_slots_let_what_waited_go(dsn: str) -> None:
    async with rig(dsn, slots=1) as r:
        await r.endpoint("/hangs", behaviour=Behaviour(mode="hang"), timeout_ms=60_000)
        await r.endpoint("/good", account="other")
        await r.emit(1)
        await until(lambda: r.engine.incarnation is not None and r.engine.incarnation.sender.in_flight == 1)
        await r.emit(1, account="other")
        r.engine.adopt(r.settings.model_copy(update={"slots": 4}))
        await until(lambda: r.engine.counters.delivered == 1)
