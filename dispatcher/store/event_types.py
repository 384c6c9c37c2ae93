"""The catalogue of event types. It is data: an SMS platform's is installed by default (catalogue.json), another platform
imports its own.

`json_schema` and `sample` are of the envelope's `data`, for people and their code generators; nothing that a producer
inserts is held against them. `filter_fields` says where customers' filters look: a filter's name → JSON pointers, so that
"from" can be another place in another type.
"""

from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from dispatcher.domain.event import check_event_type
from dispatcher.errors import InputError, NotFoundError
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

TYPES = load(Path(__file__).with_name("event_types.sql"))
DEFAULT_CATALOGUE = Path(__file__).with_name("catalogue.json")

DOCUMENT_BYTES_MAX = 65_536  # of a schema or a sample
TYPES_MAX = 10_000
READ_KEPT = 200  # types as they were read
FILTERS_MAX = 32
POINTERS_MAX = 8
_FIELDS = {"name", "title", "description", "default_on", "sample", "json_schema", "filter_fields"}


@dataclass(frozen=True, slots=True)
class EventType:
    """One type. `json_schema` is a JSON Schema (2020-12), `sample` an example of `data`; None: nobody has given one."""

    name: str
    title: str
    description: str
    default_on: bool
    sample: Any
    json_schema: Any
    filter_fields: dict[str, list[str]]
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in fields(self)
        }  # asdict copies each schema: 30 ms for a catalogue of 20


async def find(db: Connection, *, after: str = "", limit: int = 1_000) -> list[EventType]:
    return [_read(row) for row in await db.fetch(TYPES.page, after, limit)]


async def get(db: Connection, name: str) -> EventType:
    row = await db.fetchrow(TYPES.one, name)
    if row is None:
        raise NotFoundError(f"there is no event type {name!r} in the catalogue")
    return _read(row)


async def put(db: Connection, given: EventType) -> bool:
    """Add a type, or replace it; return whether it is new. Raises InputError."""
    check(given)
    is_new: bool = await db.fetchval(
        TYPES.put, given.name, given.title, given.description, given.default_on, _text(given.sample), _text(given.json_schema),
        _text(given.filter_fields),
    )  # fmt: skip
    return is_new


async def delete(db: Connection, name: str) -> None:
    """Take a type out of the catalogue. Its events are delivered as before."""
    if await db.fetchval(TYPES.delete, name) is None:
        raise NotFoundError(f"there is no event type {name!r} in the catalogue")


async def install(db: Connection, catalogue: bytes, *, only: bool = False) -> int:
    """Add or replace every type of a catalogue, all or none; return how many. Types that it doesn't name stay, unless `only` these shall be."""
    types = parse(catalogue)
    async with db.transaction():
        if only:
            await db.execute(TYPES.delete_others, [one.name for one in types])
        for one in types:
            await put(db, one)
    return len(types)


async def is_empty(db: Connection) -> bool:
    return not await db.fetchval(TYPES.has_any)


def default_catalogue() -> list[EventType]:
    return parse(DEFAULT_CATALOGUE.read_bytes())


def parse(catalogue: bytes) -> list[EventType]:
    """Read a catalogue: a JSON array of types as the API has them. Raises InputError that says which one is wrong."""
    try:
        rows = orjson.loads(catalogue)
    except orjson.JSONDecodeError as exc:
        raise InputError(f"the catalogue is not JSON: {exc}") from exc
    if not isinstance(rows, list) or len(rows) > TYPES_MAX:
        raise InputError(f"a catalogue is a JSON array of at most {TYPES_MAX:,} event types")
    types = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "name" not in row or "title" not in row:
            raise InputError(f"number {number} of the catalogue needs a name and a title")
        if unknown := sorted(row.keys() - _FIELDS):
            raise InputError(
                f"number {number} of the catalogue has {unknown[0]!r}, which is not a field of an event type"
            )
        defaults: dict[str, Any] = {
            "description": "",
            "default_on": True,
            "sample": None,
            "json_schema": None,
            "filter_fields": {},
        }
        one = EventType(**(defaults | row))
        check(one)
        types.append(one)
    names = [one.name for one in types]
    if len(set(names)) < len(names):
        raise InputError(f"the catalogue has {next(name for name in names if names.count(name) > 1)!r} twice")
    return types


def check(given: EventType) -> None:
    """Refuse what isn't an event type, with a sentence."""
    for field, most in (("name", 128), ("title", 200), ("description", 10_000)):
        value = getattr(given, field)
        if not isinstance(value, str) or len(value) > most or "\x00" in value:
            raise InputError(f"event type {given.name!r}: {field} is a text of at most {most} characters", field=field)
    check_event_type(given.name)
    if not given.title.strip():
        raise InputError(f"event type {given.name!r} needs a title", field="title")
    if not isinstance(given.default_on, bool):
        raise InputError(f"event type {given.name!r}: default_on is true or false", field="default_on")
    if given.json_schema is not None and not isinstance(given.json_schema, dict | bool):
        raise InputError(
            f"event type {given.name!r}: a JSON Schema is an object, or true or false", field="json_schema"
        )
    for field in ("sample", "json_schema"):
        if len(_text(getattr(given, field)) or "") > DOCUMENT_BYTES_MAX:
            raise InputError(f"event type {given.name!r}: {field} has at most {DOCUMENT_BYTES_MAX} bytes", field=field)
    _check_filters(given)


def _check_filters(given: EventType) -> None:
    filters = given.filter_fields
    is_good = isinstance(filters, dict) and len(filters) <= FILTERS_MAX and all(
        isinstance(name, str) and name.isidentifier() and len(name) <= 64 and isinstance(pointers, list) and 1 <= len(pointers) <= POINTERS_MAX
        and all(isinstance(pointer, str) and pointer.startswith("/") and len(pointer) <= 256 and pointer.isprintable() for pointer in pointers)
        for name, pointers in filters.items()
    )  # fmt: skip
    if not is_good:
        raise InputError(
            f"event type {given.name!r}: filter_fields has up to {FILTERS_MAX} names, each with 1 to {POINTERS_MAX} JSON pointers into data: "
            '{"from": ["/message/from"]}',
            field="filter_fields",
        )


def _read(row: Any) -> EventType:
    return _read_values(tuple(row.keys()), tuple(row.values()))


@lru_cache(maxsize=READ_KEPT)
def _read_values(names: tuple[str, ...], values: tuple[Any, ...]) -> EventType:
    """Types hardly ever change, and pages ask for all of them: to read twenty takes a millisecond. Nobody changes what one is made of."""
    given = dict(zip(names, values, strict=True))
    parsed = {
        field: None if given[field] is None else orjson.loads(given[field])
        for field in ("sample", "json_schema", "filter_fields")
    }
    return EventType(**(given | parsed))


def _text(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as exc:
        raise InputError(f"this can't be written as JSON: {exc}") from exc
