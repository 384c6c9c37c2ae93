"""A JSON Schema as a table of fields, for people: each with its path, its kind, and what else is said of it.

It shows what schemas of event types are made of (objects, arrays, references within the document, enumerations, bounds); what it doesn't know it
leaves out, and the whole schema stands beside. Schemas are operators' data, so references may lead in circles: depth and rows are bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

FIELDS_MAX = 200
DEPTH_MAX = 6
_BOUNDS = (
    ("format", "{}"), ("const", "always {!r}"), ("minimum", "≥ {}"), ("maximum", "≤ {}"), ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"), ("pattern", "like {}"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    path: str  # message.segments.count; items of an array: links[].url
    kind: str
    words: str
    required: bool


def fields(schema: Any) -> list[Field]:
    """Return the fields of the schema, a parent before its own, at most FIELDS_MAX."""
    return list(islice(_walk(schema, schema, "", DEPTH_MAX), FIELDS_MAX))


def _walk(root: Any, schema: Any, path: str, depth: int) -> Iterator[Field]:
    given = _resolve(root, schema)
    properties = given.get("properties")
    if depth == 0 or not isinstance(properties, dict):
        return
    required = given.get("required")
    for name, of in properties.items():
        one = _resolve(root, of)
        here = f"{path}.{name}" if path else str(name)
        yield Field(here, _kind(one), _words(one), isinstance(required, list) and name in required)
        items = one.get("items")
        yield from (
            _walk(root, items, f"{here}[]", depth - 1) if items is not None else _walk(root, one, here, depth - 1)
        )


def _resolve(root: Any, schema: Any) -> dict[str, Any]:
    """Follow references within the document; what leads nowhere, or in a circle, is an empty schema."""
    for _ in range(DEPTH_MAX):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found: Any = root if reference.startswith("#") else None
        for step in reference.removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        schema = found
    return {}


def _kind(schema: dict[str, Any]) -> str:
    kind = schema.get("type", "")
    return " or ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _words(schema: dict[str, Any]) -> str:
    said = [str(schema["description"])] if "description" in schema else []
    choices = schema.get("enum")
    if isinstance(choices, list):
        said.append("one of " + ", ".join(str(choice) for choice in choices))
    said += [words.format(schema[name]) for name, words in _BOUNDS if name in schema]
    return "; ".join(said)
