"""Lines: one JSON object each, with a priority for journald where it reads them, and nothing secret in them."""

import io
import logging
import os

import orjson
import pytest
import structlog

from dispatcher import log
from dispatcher.settings import Settings


@pytest.fixture
def lines():
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, write_through=True)
    before, bound = structlog.get_config(), log.repeats.per_minute
    yield stream, lambda: buffer.getvalue().splitlines()
    structlog.configure(**before)
    log.repeats.per_minute = bound
    stream.detach()


def test_journald_gets_a_priority_before_each_line(lines):
    stream, said = lines
    log.configure(Settings(log_format="journal", log_level="debug"), stream=stream)
    for level in ("debug", "info", "warning", "error"):
        getattr(log.get("tests"), level)("said", n=1)
    assert [line[:3] for line in said()] == [b"<7>", b"<6>", b"<4>", b"<3>"]
    assert orjson.loads(said()[2][3:])["level"] == "warning"


def test_what_libraries_say_by_the_standard_librarys_logging_is_a_line_too(lines):
    stream, said = lines
    log.configure(Settings(log_format="json"), stream=stream)
    log.configure(Settings(log_format="json"), stream=stream)
    logging.getLogger("aiohttp.server").warning("can't use %s", "postgresql://u:hunter2@h/d")
    (line,) = map(orjson.loads, said())
    assert (line["event"], line["room"], line["level"]) == ("library", "aiohttp.server", "warning")
    assert line["said"].startswith("can't use postgresql://")
    assert "hunter2" not in line["said"]
    logging.getLogger("aiohttp.access").info("GET /")
    assert len(said()) == 1


def test_what_a_library_says_is_redacted_in_values_and_traces(lines):
    stream, said = lines
    log.configure(Settings(log_format="json"), stream=stream)
    try:
        raise ValueError("can't use postgresql://u:hunter2@h/d")
    except ValueError as exc:
        log.get("tests").exception("failed", error=str(exc))
    (line,) = said()
    assert b"hunter2" not in line
    assert b"ValueError" in line


def test_the_level_changes_while_it_runs_also_for_loggers_that_are_made(lines):
    stream, said = lines
    made = log.get("tests")
    settings = Settings(log_format="json", log_level="warning")
    log.configure(settings, stream=stream)
    made.info("a")
    log.configure(settings, stream=stream, level="debug")
    made.debug("b")
    log.configure(settings, stream=stream)
    made.info("c")
    assert [orjson.loads(line)["event"] for line in said()] == ["b"]


def test_repeats_are_bounded_but_on_debug(lines):
    stream, said = lines
    settings = Settings(log_format="json", log_repeats_per_minute=4)
    log.configure(settings, stream=stream)
    for _ in range(10):
        log.get("tests").info("test_repeats_are_bounded", endpoint_id=1)
    assert len(said()) == 4
    log.configure(settings, stream=stream, level="debug")
    for _ in range(10):
        log.get("tests").info("test_repeats_are_bounded", endpoint_id=1)
    assert len(said()) == 14


def test_the_journal_is_recognised_by_its_socket(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert log._fitting(stream) == "journal"
        assert log.priority("error", stream) == "<3>", "the sentence at an end is an error to journalctl -p too"
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:1")
        assert log._fitting(stream) == "json"
        assert log.priority("error", stream) == ""
        monkeypatch.delenv("JOURNAL_STREAM")
        assert log._fitting(stream) == "json"
