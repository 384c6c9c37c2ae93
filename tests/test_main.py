"""The composition root: what it does besides joining the rooms."""

import asyncio
import gc
import weakref

import pytest
from structlog.testing import capture_logs

from dispatcher import main
from dispatcher.cli.common import connection_to
from dispatcher.errors import DatabaseAwayError
from dispatcher.main import keep_what_is_there, log_unhandled
from tests.conftest import connected
from tests.rig import until


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


async def test_a_connection_that_the_server_ends_during_the_first_look_is_a_sentence(dsn: str) -> None:
    """`run` ended with 1 and a trace, though the very same a moment earlier is 6: the database is away."""

    async def look() -> None:
        async with connection_to(dsn, "check") as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            async with connected(dsn) as other:
                await other.execute("SELECT pg_terminate_backend($1)", pid)
            await connection.fetchval("SELECT pg_sleep(5)")

    with pytest.raises(DatabaseAwayError, match="went away on the way") as raised:
        await look()
    assert raised.value.exit_code == 6


def test_what_a_start_has_made_is_left_alone_until_the_next() -> None:
    """Else the collector walks ten thousand endpoints, for 80 ms; and what a lost life had made must not stay for ever."""

    class Made:
        def __init__(self) -> None:
            self.itself = self

    try:
        earlier = weakref.ref(Made())
        keep_what_is_there(1)
        gc.collect()
        assert earlier() is not None, "the collector leaves it alone"
        keep_what_is_there(2)
        assert earlier() is None
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


async def test_the_collector_comes_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threshold counts what is made less what is gone: it may hardly be reached, and the young become many. What the first older one would
    walk is left alone: ten thousand endpoints' own, for 94 ms."""

    class Made:
        def __init__(self) -> None:
            self.itself = self

    thresholds = gc.get_threshold()
    monkeypatch.setattr(main, "GC_YOUNG_S", 0.001)
    monkeypatch.setattr(main, "GC_THRESHOLDS", (1_000_000, 5, 5))
    try:
        main.tune_gc()
        young, *older = gc.get_threshold()
        assert young == 1_000_000
        assert min(older) > 100_000_000, "an older one never comes by itself, in the middle of something"
        first, frozen = Made(), gc.get_freeze_count()
        gc.collect(0)
        seen_first = weakref.ref(first)
        del first
        await until(lambda: gc.get_freeze_count() > frozen, what="the first is left alone")
        for generation in range(3):
            made = Made()
            for older in range(generation):
                gc.collect(older)
            seen = weakref.ref(made)
            del made
            await until(lambda seen=seen: seen() is None, what=f"generation {generation} is collected")
        assert seen_first() is not None
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
