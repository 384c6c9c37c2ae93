"""Looking for events and deliveries: from new to old, in pages that are bounded by what they *look at*.

The log has no index for every question, and needs none: a page looks at so many events and no more, says how far it came,
and the next page goes on there. So a search for something rare answers as fast as any other, and whoever asks sees it
make progress. Times are bounds on the walk, found by halving; the other filters decide about what it meets.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dispatcher.domain.endpoint import check_patterns
from dispatcher.domain.event import PublicIds
from dispatcher.domain.moment import to_us
from dispatcher.domain.principal import Principal
from dispatcher.errors import InputError, NotFoundError
from dispatcher.store import runs
from dispatcher.store.reference import event_reference
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

SEARCH = load(Path(__file__).with_name("search.sql"))

LIMIT_MAX = 100  # rows of a page: to make an answer of twice as many holds the loop for 4 to 7 ms
LOOKED_AT = 2_000  # events a page; a look at an event's attempts takes 10 to 20 µs
LOOKED_AT_TEXT = 500  # where payloads are read
LOOKED_AT_FIRST = 2  # for each row of a page: where most events match it is full then, and 2,000 take 5 ms of the server and 3 of the loop
PAIRS_MAX = 2_000  # of event and endpoint a page: an account's events are each looked at for all of its endpoints
STATES = ("delivered", "retrying", "dead", "expired", "failed", "waiting")
_FAILING = {"retrying", "dead", "expired", "failed"}  # each has an attempt with a fault
_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Searched:
    """How far a page came: it looked at `events`, back to the one made at `back_to`. `complete`: there are no older ones in the range."""

    events: int
    back_to: datetime | None
    complete: bool


@dataclass(frozen=True, slots=True)
class Found:
    """`next` is where the following page begins, None at the end."""

    rows: list[dict[str, Any]]
    searched: Searched
    next: str | None


async def events(
    db: Connection,
    principal: Principal,
    *,
    account_id: str | None = None,
    types: Sequence[str] = (),
    text: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Found:
    """Find events. `text` is looked for in the payload, as it was written."""
    account_id = principal.within(account_id)
    before, _ = _parse(cursor)
    begin = await db.fetchrow(SEARCH.begin, None)
    low, high = await _range(db, account_id, since, until, begin["last_id"])
    exact, prefixes = runs.split(check_patterns(types) if types else ("*",))
    walk = partial(db.fetch, SEARCH.events, account_id, min(before, high), low)
    rows, met, complete = await fill(
        lambda looked_at: walk(looked_at, exact, prefixes, text),
        limit,
        LOOKED_AT if text is None else LOOKED_AT_TEXT,
    )
    shown = [{k: v for k, v in dict(row).items() if k != "matches"} for row in rows]
    found = _with_public_ids(begin["id_key"], shown, "id")
    return Found(found, *searched(met, "created_at", complete))


async def deliveries(
    db: Connection,
    principal: Principal,
    *,
    account_id: str | None = None,
    endpoint_id: int | None = None,
    states: Sequence[str] = (),
    types: Sequence[str] = (),
    status: tuple[int, int] | None = None,
    fault: str | None = None,
    event: str | None = None,
    text: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Found:
    """Find deliveries, of runs of all kinds: one row for each event and endpoint, with its last attempt. `event` is an outbox id or evt_…;
    `text` is looked for in the payload, as it was written."""
    account_id = principal.within(account_id)
    begin = await db.fetchrow(SEARCH.begin, endpoint_id)
    if endpoint_id is not None:
        if begin["account_id"] is None or not principal.sees(begin["account_id"]):
            raise NotFoundError(f"there is no endpoint {endpoint_id}")
        if account_id is not None and begin["account_id"] != account_id:
            raise NotFoundError(f"account {account_id} has no endpoint {endpoint_id}")
        account_id = begin["account_id"]
    if unknown := set(states) - set(STATES):
        raise InputError(f"{unknown.pop()!r} is not a state of a delivery: {', '.join(STATES)}", field="state")
    before_event, before_endpoint = _parse(cursor)
    low, high = await _range(db, account_id, since, until, begin["last_id"])
    reference = None if event is None else await event_reference(db, event)
    if reference is not None:
        low, high = max(low, reference.id), min(high, reference.id + 1)
    top = min(high, before_event + 1 if before_endpoint else before_event)
    matching = (*runs.split(check_patterns(types) if types else ("*",)), text)
    is_failing = (states and set(states) <= _FAILING) or fault is not None
    walk = partial(db.fetch, SEARCH.candidates, account_id, top, low)
    if endpoint_id is not None and is_failing:
        walk = partial(db.fetch, SEARCH.failed_candidates, endpoint_id, top, low)
    lowest, highest = status or (None, None)
    for looked_at in looks(limit, LOOKED_AT if text is None else LOOKED_AT_TEXT):
        seen = await walk(looked_at, *matching)
        if reference is not None:
            seen = [row for row in seen if row["created_at"] is not None and reference.fits(row["created_at"])]
        candidates = await _affordable(db, seen, endpoint_id)
        is_whole = len(seen) < looked_at and len(candidates) == len(seen)
        # A single event may have more endpoints than a page may look at: then it is a page of them, from the highest down.
        floor = None
        if endpoint_id is None and len(candidates) == 1 and candidates[0]["matches"]:
            below = before_endpoint if before_endpoint and candidates[0]["id"] == before_event else _END
            floor = await db.fetchval(SEARCH.endpoints_floor, candidates[0]["account_id"], below, PAIRS_MAX)
        ids = [row["id"] for row in candidates if row["matches"]]
        rows = ids and await db.fetch(
            SEARCH.deliveries, account_id, ids, endpoint_id, list(states) or None, lowest, highest, fault, before_event, before_endpoint, limit,
            0 if floor is None else floor + 1, min(ids), max(ids),
        )  # fmt: skip
        if len(rows) == limit or len(candidates) < looked_at:
            break
    is_cut = len(rows) == limit
    complete = is_whole and not is_cut and floor is None
    back_to = candidates[-1]["created_at"] if candidates else None
    position = None if complete or not candidates else str(candidates[-1]["id"])
    met = len(candidates)
    if floor is not None:
        position = f"{candidates[0]['id']}-{floor + 1}"
    if is_cut:
        back_to, position = rows[-1]["created_at"], f"{rows[-1]['event_id']}-{rows[-1]['endpoint_id']}"
        met = sum(row["id"] >= rows[-1]["event_id"] for row in candidates)
    found_rows = _with_public_ids(begin["id_key"], [dict(row) for row in rows], "event_id")
    return Found(found_rows, Searched(met, back_to, complete), position)


def looks(limit: int, most: int) -> tuple[int, ...]:
    """Return at how many a page of `limit` rows looks, and at how many if those don't fill it."""
    first = LOOKED_AT_FIRST * limit
    return (first, most) if first < most else (most,)


async def fill(
    look: Callable[[int], Awaitable[Sequence[Any]]], limit: int, most: int
) -> tuple[list[Any], Sequence[Any], bool]:
    """Look until `limit` rows match, or at `most`. Return those that match, all that were met on the way, and whether there are no others."""
    for looked_at in looks(limit, most):
        seen = await look(looked_at)
        rows: list[Any] = []
        met = 0
        for row in seen:
            met += 1
            if row["matches"]:
                rows.append(row)
                if len(rows) == limit:
                    break
        if len(rows) == limit or len(seen) < looked_at:
            break
    return rows, seen[:met], len(seen) < looked_at and met == len(seen)


def searched(met: Sequence[Any], at: str, complete: bool) -> tuple[Searched, str | None]:
    """Say how far a walk came that met these, and where the next one begins."""
    last = met[-1] if met else None
    return (
        Searched(len(met), None if last is None else last[at], complete),
        None if complete or last is None else str(last["id"]),
    )


async def _affordable(db: Connection, seen: Sequence[Any], endpoint_id: int | None) -> Sequence[Any]:
    """Return as many of the events as may be looked at endpoint by endpoint; one at least."""
    if endpoint_id is not None:
        return seen
    accounts = list({row["account_id"] for row in seen if row["matches"]})
    endpoints = {row["account_id"]: row["endpoints"] for row in await db.fetch(SEARCH.endpoints_of, accounts)}
    pairs = 0
    for met, row in enumerate(seen):
        pairs += endpoints.get(row["account_id"], 0) if row["matches"] else 0
        if pairs > PAIRS_MAX:
            return seen[: max(1, met)]
    return seen


async def retries_of(db: Connection, event_id: int, endpoint_id: int) -> list[datetime]:
    """Return when the retries of a delivery are due. Whose it is, was asked before."""
    return [row["due_at"] for row in await db.fetch(SEARCH.retries_of, endpoint_id, event_id)]


async def accounts(db: Connection, *, after: str = "", limit: int = 100) -> list[dict[str, Any]]:
    """Return the accounts that have endpoints, in order, and how these are. For operators."""
    return [dict(row) for row in await db.fetch(SEARCH.accounts, after, limit)]


async def past_tests(db: Connection, endpoint_id: int, *, before: int = _END, limit: int = 20) -> list[dict[str, Any]]:
    """Return an endpoint's tests, the newest first. Whose it is, was asked before."""
    return [dict(row) for row in await db.fetch(SEARCH.tests, endpoint_id, before, limit)]


async def tested_types(db: Connection, endpoint_id: int, config_hash: str) -> dict[str, dict[str, Any]]:
    """Return how the last test of each event type ended, for this configuration. Whose it is, was asked before."""
    rows = await db.fetch(SEARCH.tested_types, endpoint_id, config_hash)
    return {row["event_type"]: dict(row) for row in rows}


async def tests_lately(db: Connection, endpoint_id: int) -> int:
    """Return how many tests of the endpoint were made in the last minute."""
    count: int = await db.fetchval(SEARCH.tests_lately, endpoint_id)
    return count


async def _range(
    db: Connection, account_id: str | None, since: datetime | None, until: datetime | None, last_id: int
) -> tuple[int, int]:
    """Return the ids [low, high) that a walk is within."""
    low = 0 if since is None else await runs.id_before(db, account_id, since, last_id) + 1
    high = last_id + 1 if until is None else await runs.id_upto(db, account_id, until, last_id) + 1
    return low, high


def _with_public_ids(id_key: bytes, rows: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    public = PublicIds(id_key).encode([(to_us(row["created_at"]), row[field]) for row in rows])
    return [row | {"public_id": text.decode()} for row, text in zip(rows, public, strict=True)]


def _parse(cursor: str | None) -> tuple[int, int]:
    """Return (event, endpoint) below which a page begins; endpoint 0: below the whole event."""
    if cursor is None:
        return _END, 0
    event, _, endpoint = cursor.partition("-")
    parts = [
        int(part) if part.isascii() and part.isdecimal() and len(part) <= 18 else -1
        for part in (event, endpoint or "0")
    ]
    if min(parts) < 0:
        raise InputError("this is no cursor; take it from the `next` of a page", field="cursor")
    return parts[0], parts[1]
