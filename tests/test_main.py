"""The composition root: what it does besides joining the rooms."""

import asyncio
import gc

from structlog.testing import capture_logs

from dispatcher.main import log_unhandled


async def test_an_exception_that_nobody_fetched_is_a_line_of_the_log() -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(log_unhandled)
    try:
        with capture_logs() as logs:
            loop.create_future().set_exception(ConnectionError("closed"))
            gc.collect()
            loop.call_exception_handler({"message": "without an exception"})
    finally:
        loop.set_exception_handler(before)
    assert [(line["event"], line["problem"], line["error"]) for line in logs] == [
        ("loop.unhandled", "Future exception was never retrieved", "ConnectionError('closed')"),
        ("loop.unhandled", "without an exception", None),
    ]
    assert all(line["log_level"] == "error" for line in logs)
