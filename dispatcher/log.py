"""Logs: structlog to stdout, JSON by orjson; readable lines on a terminal. Configured by the composition root, and again when the level changes.

Every line goes the same way: below the level it is left out, repeats are counted instead of shown (repeats.py), secrets that a
library's words may carry are taken out (domain/redact.py), and it is written as one line. Payloads and answers are no part of any line.
"""

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

import orjson
import structlog

from dispatcher.domain.redact import redact
from dispatcher.domain.text import clean
from dispatcher.repeats import Repeats

if TYPE_CHECKING:
    from dispatcher.settings import Settings

Logger = Any  # structlog's bound loggers are typed by their configuration, which is only known at run time

# What journald takes from the beginning of a line, and `journalctl -p` filters by (sd-daemon(3)).
_PRIORITIES = {"debug": b"<7>", "info": b"<6>", "warning": b"<4>", "error": b"<3>", "critical": b"<2>"}

_JSON: Any = structlog.processors.JSONRenderer(serializer=orjson.dumps)

repeats = Repeats()  # of this process; told how many to show by `configure`


def configure(settings: "Settings", *, stream: Any = None, level: str | None = None) -> None:
    """Send every log line to `stream` (stdout) in the settings' format and from their level up, or from `level`. May be called again."""
    stream = stream or sys.stdout
    level = level or settings.log_level
    # Who asks for debug wants to see everything.
    repeats.per_minute = 0 if level == "debug" else settings.log_repeats_per_minute
    root = logging.getLogger()
    if not any(isinstance(handler, _Forward) for handler in root.handlers):
        root.addHandler(_Forward())
    kind = settings.log_format if settings.log_format != "auto" else _fitting(stream)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        repeats,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if kind == "console":
        structlog.configure(
            # Plain tracebacks: the pretty ones print local variables, and passwords among them.
            processors=[
                *shared,
                _redact,
                _clean,
                structlog.dev.ConsoleRenderer(
                    colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_level(level)),
            logger_factory=structlog.PrintLoggerFactory(stream),
            cache_logger_on_first_use=False,
        )
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.format_exc_info,
                _redact,
                _render_for_journal if kind == "journal" else _JSON,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_level(level)),
            logger_factory=structlog.BytesLoggerFactory(stream.buffer),
            cache_logger_on_first_use=False,
        )


def priority(level: str, stream: TextIO) -> str:
    """Return what stands before a line of this level where systemd's journal reads it; else nothing."""
    return _PRIORITIES[level].decode() if _fitting(stream) == "journal" else ""


class _Forward(logging.Handler):
    """What libraries say by the standard library's logging goes the same way as every other line."""

    def emit(self, record: logging.LogRecord) -> None:
        method = record.levelname.lower() if record.levelname.lower() in _PRIORITIES else "warning"
        said = {"room": record.name, "said": record.getMessage()}
        if record.exc_info:
            said["exc_info"] = record.exc_info  # type: ignore[assignment]
        getattr(structlog.get_logger(), method)("library", **said)


def _fitting(stream: Any) -> str:
    """Choose the format by where the lines go. systemd names the journal's socket by its inode, so that a pipe in between is told apart."""
    if stream.isatty():
        return "console"
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "json"
    return "journal" if os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}" else "json"


def _render_for_journal(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    line: bytes = _JSON(logger, method, event)
    return _PRIORITIES.get(event.get("level", "info"), b"<6>") + line


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take secrets out of the values: an error of a library may show the address that it was given."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}


def _clean(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take from the values what a terminal would obey: an answer's words may be among them."""
    return {key: clean(value) if isinstance(value, str) else value for key, value in event.items()}


def _level(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def get(name: str) -> Logger:
    return structlog.get_logger(room=name)
