"""`dispatcher settings`: effective values, their sources, and no secret."""

import json
from pathlib import Path

import pytest

from dispatcher.settings import SECRETS, Settings
from tests.test_cli import Cli
from tests.test_settings import FILED, own_environment

__all__ = ["own_environment"]


@pytest.fixture
def run() -> Cli:
    made = Cli("")
    made.env = {}
    return made


def rows(text: str) -> dict[str, dict[str, str]]:
    return {row["setting"]: row for row in json.loads(text)}


def test_values_and_where_they_come_from(run: Cli, tmp_path: Path) -> None:
    config, secret = tmp_path / "d.toml", tmp_path / "smtp"
    secret.write_text(FILED["smtp_url"])
    config.write_text(
        f'slots = 7\npoll_ms = 9\nsmtp_url_file = "{secret}"\nmail_from = "a@b.example"\nretry_schedule_s = [5, 6]\n'
    )
    env = {"DISPATCHER_SLOTS": "8", "DISPATCHER_DATABASE_URL": FILED["database_url"]}
    found = rows(run.ok("--config", str(config), "settings", "--json", env=env))
    assert list(found) == [f"DISPATCHER_{name.upper()}" for name in Settings.model_fields]
    assert (found["DISPATCHER_SLOTS"]["value"], found["DISPATCHER_SLOTS"]["source"]) == (8, "environment")
    assert (found["DISPATCHER_POLL_MS"]["value"], found["DISPATCHER_POLL_MS"]["source"]) == (9, f"file {config}")
    assert found["DISPATCHER_GRACE_S"]["source"] == "default"
    assert found["DISPATCHER_SMTP_URL"]["source"] == "the file of DISPATCHER_SMTP_URL_FILE"
    assert found["DISPATCHER_RETRY_SCHEDULE_S"]["value"] == [5, 6]
    changed = rows(run.ok("--config", str(config), "settings", "--json", "--changed", env=env))
    assert len(changed) == 7
    text = run.ok("--config", str(config), "settings", env=env)
    assert "5,6" in text
    for shown in (text, json.dumps(found)):
        assert "hunter2" not in shown
        assert "***" in shown


def test_every_secret_is_hidden(run: Cli) -> None:
    keys = "aHVudGVyMmh1bnRlcjJodW50ZXIyaHVudGVyMmh1bnQ="
    env = {f"DISPATCHER_{name.upper()}": value for name, value in (FILED | {"encryption_keys": keys}).items()}
    assert len(env) == len(SECRETS)
    found = rows(run.ok("settings", "--json", env=env | {"DISPATCHER_MAIL_FROM": "a@b.example"}))
    for name in SECRETS:
        assert found[f"DISPATCHER_{name.upper()}"]["value"] == "***"


def test_a_bad_one_is_refused_as_a_start_would(run: Cli) -> None:
    assert "DISPATCHER_SLOTS" in run.refused("settings", env={"DISPATCHER_SLOTS": "0"})


def test_nothing_changed(run: Cli) -> None:
    assert "defaults" in run.ok("settings", "--changed")
