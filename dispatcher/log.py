"""Logs: structlog to stdout, JSON by orjson; readable lines on a terminal. Configured once, by the composition root."""

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from dispatcher.domain.text import clean

if TYPE_CHECKING:
    from dispatcher.settings import Settings

Logger = Any  # structlog's bound loggers are typed by their configuration, which is only known at run time


def configure(settings: "Settings", *, stream: Any = None) -> None:
    """Send every log line to `stream` (stdout) in the settings' format and from their level up."""
    stream = stream or sys.stdout
    console = settings.log_format == "console" or (settings.log_format == "auto" and stream.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if console:
        structlog.configure(
            # Plain tracebacks: the pretty ones print local variables, and passwords among them.
            processors=[
                *shared,
                _clean,
                structlog.dev.ConsoleRenderer(
                    colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_level(settings)),
            logger_factory=structlog.PrintLoggerFactory(stream),
            cache_logger_on_first_use=False,
        )
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(serializer=orjson.dumps),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_level(settings)),
            logger_factory=structlog.BytesLoggerFactory(stream.buffer),
            cache_logger_on_first_use=False,
        )


def _clean(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take from the values what a terminal would obey: an answer's words may be among them."""
    return {key: clean(value) if isinstance(value, str) else value for key, value in event.items()}


def _level(settings: "Settings") -> int:
    return logging.getLevelNamesMapping()[settings.log_level.upper()]


def get(name: str) -> Logger:
    return structlog.get_logger(room=name)
