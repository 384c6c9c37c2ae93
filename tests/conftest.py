"""One embedded PostgreSQL for the whole run, one database a test."""

import asyncio
import contextlib
import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import uvloop

from dispatcher.store import embedded, event_types

LONGEST_S = 300.0  # a test's

SCHEMA = (Path(__file__).parent.parent / "schema.sql").read_text()


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every async test runs on the loop that the product runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that waits for ever fails where it waits, and what it began is ended. (What holds the loop: pyproject.toml.)"""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _within(item.obj)


def _within(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(LONGEST_S):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> None:
    for name in [name for name in os.environ if name.startswith("DISPATCHER_")]:
        del os.environ[name]


def make_server(**options: str) -> tuple[embedded.EmbeddedServer, Path]:
    # Not pytest's tmp_path: for root that lies below a directory that PostgreSQL's user can't enter.
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-test-", dir="/tmp"))
    defaults = {"max_prepared_transactions": "16", "fsync": "off", "max_connections": "200"}
    return embedded.start(directory / "pg" if os.geteuid() else directory, options=defaults | options), directory


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.EmbeddedServer]:
    server, directory = make_server()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
async def template(server: embedded.EmbeddedServer) -> str:
    """A database with the schema in it, to be copied for each test: 30 ms instead of 150."""
    async with connected(server.dsn) as connection:
        await connection.execute("CREATE DATABASE template_webhook")
    async with connected(dsn_of(server.dsn, "template_webhook")) as connection:
        await connection.execute(SCHEMA)
        await event_types.install(
            connection, event_types.DEFAULT_CATALOGUE.read_bytes()
        )  # as `dispatcher migrate` does
    return "template_webhook"


_databases = 0


@pytest.fixture
async def dsn(server: embedded.EmbeddedServer, template: str) -> AsyncIterator[str]:
    """A fresh database with the schema installed."""
    global _databases
    _databases += 1
    name = f"test_{_databases}"
    async with connected(server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield dsn_of(server.dsn, name)
    async with connected(server.dsn) as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def dsn_of(dsn: str, database: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{database}"))


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(dsn) as connection:
        yield connection
