"""Pages of lists that are in the order of ids: the cursor is the last one's id."""

from collections.abc import Sequence
from typing import Any

from dispatcher.web.problems import ProblemError

_MAX = (1 << 63) - 1


def after_id(cursor: str | None) -> int:
    return 0 if cursor is None else _number(cursor)


def before_id(cursor: str | None) -> int:
    return _MAX if cursor is None else _number(cursor)


def page(rows: Sequence[Any], limit: int, by: str) -> dict[str, Any]:
    """Return rows as a page. One that is full may be the last: the next is empty then."""
    last = rows[-1] if len(rows) == limit else None
    position = None if last is None else last[by] if isinstance(last, dict) else getattr(last, by)
    return {"data": rows, "next": None if position is None else str(position)}


def _number(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= 18):
        raise ProblemError(400, "this is no cursor; take it from the `next` of a page", field="cursor")
    return int(cursor)
