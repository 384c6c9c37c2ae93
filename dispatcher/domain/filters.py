"""Field filters: of the events that an endpoint subscribes to, those that have certain values in certain fields.

An endpoint's `filters` are names with lists of values: OR inside a list, AND between names. Where a name is found in a
payload, the catalogue says, by JSON pointers for each event type (`event_type.filter_fields`): "from" is one place in a
receipt and another in a reply. Of several places of a name one is enough. An event that lacks a field hasn't got the
value, so it isn't sent. What the dispatcher itself tells an account (`endpoint.*`) has no fields and is never filtered.

A `Rule` is filters with their names resolved. Subscriptions and replays keep theirs by value: whether an event is for an
endpoint depends on nothing but the event and its id, on every path and also years later. An edit of the filters, or of
the catalogue, closes the subscriptions and opens new ones, so it holds from one id on.

Fields are compared as text. Strings, whole numbers of up to 18 digits and true/false have one; whatever else stands there
has none. `webhook.passes` in schema.sql says the same in SQL, for counts; tests hold the two to each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dispatcher.domain.event import Event
from dispatcher.errors import InputError

NAMES_MAX, VALUES_MAX, VALUE_BYTES_MAX = 10, 100, 255
OWN_TYPES = "endpoint."  # what the dispatcher tells, and nobody else may say
MEMO_EVENTS_MAX, MEMO_BYTES_MAX = 256, 1 << 20  # a page of a read, unless its payloads are large

Path = tuple[str, ...]  # a JSON pointer's names
Filters = dict[str, list[str]]


def check_filters(filters: Mapping[str, Sequence[str]], known: Sequence[str]) -> Filters:
    """Return filters in their one form: names and values sorted, without repeats. Raises InputError that names the bad one."""
    if len(filters) > NAMES_MAX:
        raise InputError(f"{len(filters)} field filters are more than {NAMES_MAX}")
    checked: Filters = {}
    for name in sorted(filters):
        values = sorted(set(filters[name]))
        if name not in known:
            offered = ", ".join(known) or "none: no event type has filter_fields"
            raise InputError(f"{name!r} is not a field that the catalogue lets you filter by; there are: {offered}")
        if not 1 <= len(values) <= VALUES_MAX:
            raise InputError(f"the filter {name} has {len(values)} values; it must have 1 to {VALUES_MAX}")
        for value in values:
            if not value.isprintable() or not 1 <= len(value.encode()) <= VALUE_BYTES_MAX:
                raise InputError(
                    f"a value of the filter {name} has 1 to {VALUE_BYTES_MAX} bytes of printable characters"
                )
        checked[name] = values
    return checked


class Condition:
    """What a rule asks of events of one type."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Sequence[tuple[Sequence[Path], frozenset[str]]]) -> None:
        self._fields = fields

    def holds(self, data: object) -> bool:
        return all(any(_text(data, path) in values for path in paths) for paths, values in self._fields)


class Rule:
    """Filters whose names are resolved: as JSON, `{"values": {name: [value]}, "fields": {type: {name: [[path]]}}}`."""

    __slots__ = ("_conditions", "_fields", "_values")

    def __init__(
        self, values: Mapping[str, Sequence[str]], fields: Mapping[str, Mapping[str, Sequence[Sequence[str]]]]
    ) -> None:
        self._values = {name: frozenset(wanted) for name, wanted in values.items()}
        self._fields = {
            event_type: {name: tuple(tuple(path) for path in paths) for name, paths in of_type.items()}
            for event_type, of_type in fields.items()
        }
        self._conditions: dict[str, Condition] = {}

    @classmethod
    def from_json(cls, text: str) -> "Rule":
        rule = orjson.loads(text)
        return cls(rule["values"], rule["fields"])

    def __repr__(self) -> str:
        return f"Rule({self._values})"

    def condition(self, event_type: str) -> Condition | None:
        """Return what is asked of events of this type; None: nothing."""
        if event_type.startswith(OWN_TYPES):
            return None
        of_type = self._fields.get(event_type)
        if of_type is None:
            return _NEVER  # producers may invent types without end: not kept
        condition = self._conditions.get(event_type)
        if condition is None:
            condition = Condition([(of_type.get(name, ()), wanted) for name, wanted in self._values.items()])
            self._conditions[event_type] = condition
        return condition

    def passes(self, event_type: str, payload: bytes) -> bool:
        condition = self.condition(event_type)
        return condition is None or condition.holds(parsed(payload))


class Payloads:
    """The payloads that were parsed lately, so that one which several endpoints filter is parsed once. Nothing is kept for long."""

    __slots__ = ("_bytes", "_parsed")

    def __init__(self) -> None:
        self._parsed: dict[Event, object] = {}
        self._bytes = 0

    def of(self, event: Event) -> object:
        data = self._parsed.get(event, self)
        if data is not self:
            return data
        self._bytes += len(event.payload)
        if len(self._parsed) >= MEMO_EVENTS_MAX or self._bytes > MEMO_BYTES_MAX:
            self._parsed.clear()
            self._bytes = len(event.payload)
        data = self._parsed[event] = parsed(event.payload)
        return data


def parsed(payload: bytes) -> object:
    """Parse a payload. One that PostgreSQL takes for JSON and orjson doesn't (half a surrogate pair, a thousand levels) has no fields."""
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None


def _text(data: Any, path: Path) -> str | None:
    """Return the field at `path` as text; None if there is none that has one."""
    for name in path:
        if isinstance(data, dict):
            data = data.get(name)
        elif isinstance(data, list) and name.isascii() and name.isdigit() and len(name) <= 9 and int(name) < len(data):
            data = data[int(name)]
        else:
            return None
    if isinstance(data, str):
        return data
    if isinstance(data, bool):
        return "true" if data else "false"
    return str(data) if isinstance(data, int) and abs(data) < 10**18 else None


_NEVER = Condition([((), frozenset())])
