"""What people fill in above a list: read from the query, and what can't be is refused with the field's name."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from dispatcher.store.session import Connection
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Visit

CHOICES = 100  # endpoints in a list to choose from; where there are more, an id is typed
WANTED_CHARS_MAX = 200  # what is looked for in payloads
TIME = "a time is such as 2026-11-28T14:05, in UTC"


def word(given: Mapping[str, str], name: str) -> str | None:
    return given.get(name, "").strip() or None


def number(given: Mapping[str, str], name: str) -> int | None:
    text = word(given, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ProblemError(400, f"{text!r} is not an id", field=name)
    return int(text)


def one_of(given: Mapping[str, str], name: str, known: tuple[str, ...]) -> str | None:
    text = word(given, name)
    if text is not None and text not in known:
        raise ProblemError(400, f"there is no {name} {text!r}: {', '.join(known)}", field=name)
    return text


def moment(given: Mapping[str, str], name: str) -> datetime | None:
    """Read a time as browsers' fields have it, without a zone: UTC, as the pages say."""
    text = word(given, name)
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise ProblemError(400, f"{text!r} is no time: {TIME}", field=name) from exc


def types(given: Mapping[str, str]) -> list[str]:
    """Read event types and prefixes, separated by commas or spaces."""
    return given.get("type", "").replace(",", " ").split()


def wanted(given: Mapping[str, str]) -> str | None:
    """Read what is looked for in payloads."""
    text = word(given, "reference")
    if text is not None and (len(text) > WANTED_CHARS_MAX or "\x00" in text):
        raise ProblemError(400, f"a reference has at most {WANTED_CHARS_MAX} characters", field="reference")
    return text


def onward(path: str, given: Mapping[str, str], position: str | None) -> str | None:
    """Return the address of the following page: the same filters, and where it begins."""
    if position is None:
        return None
    kept = {name: value for name, value in given.items() if value and name not in ("cursor", "format")}
    return f"{path}?{urlencode(kept | {'cursor': position})}"


async def endpoints_to_choose(visit: Visit, db: Connection) -> list[dict[str, Any]] | None:
    """Return the endpoints that a form lists; None where they are too many to list."""
    rows = await visit.admin(db).endpoints(None, None, limit=CHOICES + 1)
    return None if len(rows) > CHOICES else [{"id": row["id"], "name": row["name"] or row["url"]} for row in rows]
