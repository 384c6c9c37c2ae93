"""What the verbs share: settings, a database for as long as a verb runs, and printing."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
import uvloop

from dispatcher import settings as settings_module
from dispatcher.domain.text import clean
from dispatcher.errors import DatabaseAwayError
from dispatcher.settings import Settings
from dispatcher.store import embedded
from dispatcher.store.admin import Admin
from dispatcher.store.migrate import check, migrate
from dispatcher.store.pooling import refuse_transaction_pooling
from dispatcher.store.session import Connection, connect_once, is_away

T = TypeVar("T")

as_json = click.option("--json", "json_out", is_flag=True, help="Print JSON for scripts.")


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A length of time for people: 30s, 90m, 24h, 2d; 0 needs no unit. Becomes seconds."""

    name = "duration"
    UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}  # noqa: RUF012 - a constant

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])|0", value.strip())
        if found is None:
            self.fail(f"{value!r} is not a duration: give a number and a unit, such as 30s, 90m, 24h or 2d", param, ctx)
        return float(found[1]) * self.UNITS[found[2]] if found[1] else 0.0


DURATION = Duration()


class Moment(click.ParamType):  # type: ignore[type-arg]
    """A moment: RFC 3339; without a zone it is UTC, without a time midnight."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time, such as 2026-11-23T18:00:00Z", param, ctx)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


MOMENT = Moment()


class When(click.ParamType):  # type: ignore[type-arg]
    """A moment (RFC 3339; without a zone it is UTC, without a time midnight), or a duration: so long ago by the database's clock."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | timedelta:
        if isinstance(value, datetime | timedelta):
            return value
        if value[-1:] in Duration.UNITS:
            return timedelta(seconds=DURATION.convert(value, param, ctx))
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(
                f"{value!r} is neither a time, such as 2026-11-23T18:00:00Z, nor a time ago, such as 3h or 2d",
                param,
                ctx,
            )
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


WHEN = When()


class Id(click.types.IntParamType):
    """An id that the database can hold: a larger one would be an error of its driver's, not a sentence."""

    name = "integer"

    def __init__(self, bits: int) -> None:
        self._highest = 2 ** (bits - 1) - 1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if not 0 <= number <= self._highest:
            self.fail(f"{number} is not an id: they go up to {self._highest}", param, ctx)
        return number


ID = Id(64)
RUN_ID = Id(32)


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
    """Yield a connection that is a session of its own: behind a transaction pooler it is refused (it costs another connect, 3 ms). To lose
    it on the way is a sentence."""
    connection = await connect_once(dsn, f"dispatcher {what}")
    try:
        await refuse_transaction_pooling(connection, dsn)
        yield connection
        await connection.close()
    except Exception as exc:
        if not is_away(exc) or isinstance(exc, BrokenPipeError):  # that one is our output's
            raise
        raise DatabaseAwayError(
            f"the database went away on the way ({exc or type(exc).__name__}); see what was done, then repeat the command"
        ) from exc
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    """Yield a connection to a checked database."""
    async with database(settings) as dsn, connection_to(dsn, "cli") as connection:
        await check(connection, settings)
        yield connection


def with_connection(settings: Settings, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run one verb's work on a connection."""

    async def go() -> T:
        async with connected(settings) as connection:
            return await work(connection)

    return run_async(go())


@contextlib.asynccontextmanager
async def admin(settings: Settings) -> AsyncIterator[Admin]:
    """Yield the people's side of a checked database."""
    async with connected(settings) as connection:
        yield Admin(connection, settings)


def with_admin(settings: Settings, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Run one verb's work against the database."""

    async def go() -> T:
        async with admin(settings) as opened:
            return await work(opened)

    return run_async(go())


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end. What that was is what counts: closing the loop needs descriptors, and where none is to be had, its failure must
    not hide that another dispatcher took over."""
    results: list[T] = []
    errors: list[BaseException] = []

    async def watched() -> T:
        try:
            results.append(await work)
        except BaseException as exc:
            errors.append(exc)
            raise
        return results[0]

    try:
        return uvloop.run(watched())
    except (OSError, RuntimeError):  # the second, if the first came in the middle of it
        if errors:
            raise errors[0] from None
        if results:
            return results[0]
        raise


def say(text: str = "", *, err: bool = False) -> None:
    """Print text for people, with nothing in it that a terminal would obey. What comes from outside may stand in any line."""
    click.echo(clean(text, keep="\n"), err=err)


# What JSON may hold as it is, and a terminal obeys or a reader is misled by. It can only stand in strings, where an escape means the same.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def print_json(value: Any, *, indent: bool = True) -> None:
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None, default=str).decode()
    click.echo(_UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


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
    return clean(",".join(map(str, value)) if isinstance(value, list) else str(value))
