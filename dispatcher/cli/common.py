"""What the verbs share: settings, a database for as long as a verb runs, and printing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
import uvloop

from dispatcher import settings as settings_module
from dispatcher.settings import Settings
from dispatcher.store import embedded
from dispatcher.store.admin import Admin
from dispatcher.store.migrate import check, migrate
from dispatcher.store.session import connect_once

T = TypeVar("T")

as_json = click.option("--json", "json_out", is_flag=True, help="Print JSON for scripts.")


class Context:
    """Made by the group, passed to every verb. Settings are read when a verb asks, so that --help never fails."""

    def __init__(self, config: Path | None) -> None:
        self._config = config

    def settings(self, **overrides: Any) -> Settings:
        return settings_module.load(self._config, **overrides)


@contextlib.asynccontextmanager
async def database(settings: Settings, *, migrated: bool = True) -> AsyncIterator[str]:
    """Yield the DSN of the database in use; the embedded one is started (and installed) if need be, and stopped if nobody else uses it."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    server = await asyncio.to_thread(embedded.start, settings.data_dir / "postgres")
    try:
        if migrated:
            async with connection_to(server.dsn, "install") as connection:
                await migrate(connection, settings)
        yield server.dsn
    finally:
        await asyncio.to_thread(server.stop)


@contextlib.asynccontextmanager
async def connection_to(dsn: str, what: str) -> AsyncIterator[Any]:
    connection = await connect_once(dsn, f"dispatcher {what}")
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def admin(settings: Settings) -> AsyncIterator[Admin]:
    """Yield the people's side of a checked database."""
    async with database(settings) as dsn, connection_to(dsn, "cli") as connection:
        await check(connection, settings)
        yield Admin(connection, settings)


def with_admin(settings: Settings, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Run one verb's work against the database."""

    async def go() -> T:
        async with admin(settings) as opened:
            return await work(opened)

    return run_async(go())


def run_async(work: Coroutine[Any, Any, T]) -> T:
    return uvloop.run(work)


def print_json(value: Any) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], nothing: str) -> None:
    """Print rows as aligned columns; `nothing` if there are none."""
    if not rows:
        click.echo(nothing)
        return
    cells = [[column.upper() for column in columns]] + [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
