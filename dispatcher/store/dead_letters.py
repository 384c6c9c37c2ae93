"""Dead letters: deliveries that were given up, each with its own copy of the event.

open → resent (a run took it up; if that run gives the delivery up too, there is another letter of that run) · open →
discarded (its payload given up) · any → erased (store/erasure.py). Only open ones are resent or discarded.

A choice may be a million letters. They are marked in pages of ids: a resend in one transaction for each endpoint, with
the run's row as its last statement, so that a run either has all of its letters or isn't there; a discard page by page,
each page for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dispatcher.domain.endpoint import check_patterns
from dispatcher.domain.event import PublicIds
from dispatcher.domain.moment import to_us
from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.domain.run import RunSource
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.store import runs
from dispatcher.store.runs import RUNS, RunView, Step
from dispatcher.store.search import Found, fill, searched
from dispatcher.store.session import Connection
from dispatcher.store.sql import SQL, load

LETTERS = load(Path(__file__).with_name("dead_letters.sql"))

STATES = ("open", "resent", "discarded", "erased")
PAGE = 5_000  # letters marked at once
IDS_MAX = 1_000  # named one by one
LOOKED_AT = 2_000  # letters a page
_ID_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters. Times are when they died, moments or so long ago, both inclusive; `reason` is looked for within it."""

    ids: tuple[int, ...] | None = None
    endpoint_id: int | None = None
    account_id: str | None = None
    patterns: tuple[str, ...] = ()
    since: datetime | timedelta | None = None
    until: datetime | timedelta | None = None
    fault: str | None = None
    status: int | None = None
    reason: str | None = None
    state: str | None = "open"
    upto_id: int | None = None

    def values(self, after: int) -> list[Any]:
        """Return $1 … $13 of the statements. Moments must have been settled."""
        exact, prefixes = runs.split(self.patterns or ("*",))
        ids = None if self.ids is None else list(self.ids)
        return [
            ids, self.endpoint_id, self.account_id, exact, prefixes, self.since, self.until, self.fault, self.status, self.reason,
            self.state, after, self.upto_id,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Total:
    """What a choice comes to at one endpoint. `why_not`: nothing can be sent to it."""

    endpoint_id: int
    endpoint_state: str
    url: str
    rate_per_s: float | None
    letters: int
    events: int
    last_id: int

    @property
    def why_not(self) -> str | None:
        if self.endpoint_state in ("deleted", "draft"):
            return "was deleted" if self.endpoint_state == "deleted" else "is a draft"
        return None


async def find(
    connection: Connection, chosen: Filter, *, after: int = 0, limit: int = 100, by: Principal = OPERATOR
) -> list[dict[str, Any]]:
    """Return a page of dead letters in the order in which they died, without payloads."""
    settled = await _settle(connection, chosen, by)
    async with connection.transaction():
        await connection.execute(LETTERS.plan_each)
        rows = await connection.fetch(LETTERS.page, *settled.values(after), limit)
    return await _described(connection, rows)


async def newest(
    connection: Connection,
    *,
    endpoint_id: int | None = None,
    account_id: str | None = None,
    patterns: Sequence[str] = (),
    state: str | None = "open",
    before: int = _ID_MAX,
    limit: int = 50,
    by: Principal = OPERATOR,
) -> Found:
    """Find dead letters from new to old. A page looks at LOOKED_AT of them and no more, and says how far it came."""
    chosen = await _settle(
        connection,
        Filter(endpoint_id=endpoint_id, account_id=account_id, patterns=tuple(patterns), state=None),
        by,
    )
    types = runs.split(chosen.patterns or ("*",))
    walk = partial(connection.fetch, LETTERS.walk, chosen.account_id, before)
    values: tuple[Any, ...] = (endpoint_id, state, *types)
    if endpoint_id is not None and state == "open":
        walk, values = partial(connection.fetch, LETTERS.walk_open, endpoint_id, before), types
    matching, met, complete = await fill(lambda looked_at: walk(looked_at, *values), limit, LOOKED_AT)
    ids = tuple(row["id"] for row in matching)
    rows = await find(connection, Filter(ids=ids, state=None), limit=limit, by=by) if ids else []
    return Found(rows[::-1], *searched(met, "died_at", complete))


async def show(connection: Connection, letter_id: int, *, by: Principal = OPERATOR) -> dict[str, Any]:
    """Return one dead letter with its payload (None when it was given up) and the attempts that retention has left."""
    found = await find(connection, Filter(ids=(letter_id,), state=None), limit=1, by=by)
    if not found:
        raise NotFoundError(
            f"there is no dead letter {letter_id}", remedy="`dispatcher dead-letter list` shows which there are"
        )
    [shown] = found
    attempts = [
        {key: value for key, value in dict(row).items() if key != "response_head"}
        | {"response": None if row["response_head"] is None else row["response_head"].decode("utf-8", "replace")}
        for row in await connection.fetch(LETTERS.attempts, shown["event_id"], shown["endpoint_id"])
    ]
    return shown | {"payload": await connection.fetchval(LETTERS.payload, letter_id), "made": attempts}


async def total(
    connection: Connection, chosen: Filter, *, by: Principal = OPERATOR, timeout_s: float = runs.COUNT_TIMEOUT_S
) -> tuple[Filter, list[Total]]:
    """Count a choice of open dead letters, endpoint by endpoint; return it with its end fixed, so that what is counted is what is done.

    Ids that aren't there or aren't open are an error that names one, and nothing is done.
    """
    settled = await _settle(connection, replace(chosen, state="open"), by)
    if settled.ids is not None:
        await _check_ids(connection, settled.ids, settled.account_id)
    async with runs.counting(connection, timeout_s):
        totals = [Total(*row) for row in await connection.fetch(LETTERS.totals, *settled.values(0))]
    return replace(settled, upto_id=max((one.last_id for one in totals), default=0)), totals


async def resend(
    connection: Connection, chosen: Filter, endpoint_id: int, rate_per_s: float | None, note: str = "", *, step: Step = lambda n: None
) -> RunView | None:  # fmt: skip
    """Send the chosen open dead letters of one endpoint again, as one run; None if none is open any more."""
    runs.check_rate(rate_per_s)
    await runs.target(connection, endpoint_id)  # before a million rows are marked; looked at again at the end
    async with connection.transaction():
        await connection.execute(LETTERS.plan_each)
        run_id = await connection.fetchval(RUNS.new_run_id)
        async for ids in _pages(connection, replace(chosen, endpoint_id=endpoint_id)):
            step(await connection.fetchval(LETTERS.mark_resent, ids, run_id))
        taken = await connection.fetchrow(LETTERS.resent_range, run_id)
        if not taken["events"]:
            return None
        await runs.insert(
            connection, run_id, endpoint_id, RunSource.DEAD_LETTER, taken["first_id"] - 1, taken["last_id"], taken["events"],
            rate_per_s=rate_per_s, note=note,
        )  # fmt: skip
    return await runs.get(connection, run_id)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An endpoint to which nothing was sent again, and why: a sentence."""

    endpoint_id: int
    letters: int
    why: str


async def resend_each(
    connection: Connection, chosen: Filter, totals: Sequence[Total], rate_per_s: float | None, note: str = "", *, step: Step = lambda n: None
) -> tuple[list[RunView], list[Skipped]]:  # fmt: skip
    """Send what was counted again, a run for each endpoint. One that can't have its own doesn't stop the others; StateError if none can."""
    made, skipped = list[RunView](), list[Skipped]()
    for one in totals:
        try:
            if one.why_not is not None:
                raise StateError(f"endpoint {one.endpoint_id} {one.why_not}")
            run = await resend(connection, chosen, one.endpoint_id, rate_per_s, note, step=step)
        except (StateError, NotFoundError) as exc:
            skipped.append(Skipped(one.endpoint_id, one.letters, exc.message))
        else:
            made += [] if run is None else [run]
    if skipped and not made:
        raise StateError(f"none of these dead letters can be sent: {skipped[0].why}")
    return made, skipped


async def discard(connection: Connection, chosen: Filter, *, step: Step = lambda n: None) -> int:
    """Give up the chosen open dead letters with their payloads, irrevocably. Return how many; what was done before an interruption stays."""
    count, after = 0, 0
    while True:
        async with connection.transaction():
            await connection.execute(LETTERS.plan_each)
            ids = await _page(connection, chosen, after)
            if not ids:
                return count
            done = await connection.fetchval(LETTERS.discard, ids)
        count, after = count + done, ids[-1]
        step(done)


async def _pages(connection: Connection, chosen: Filter) -> Any:
    after = 0
    while ids := await _page(connection, chosen, after):
        yield ids
        after = ids[-1]


async def _page(connection: Connection, chosen: Filter, after: int) -> list[int]:
    ids: list[int] = await connection.fetchval(LETTERS.ids, *chosen.values(after), PAGE)
    return ids


async def _settle(connection: Connection, chosen: Filter, by: Principal = OPERATOR) -> Filter:
    """Check a filter, hold it to whom it is for, and turn times ago into moments."""
    if chosen.patterns:
        check_patterns(chosen.patterns)
    for letter_id in chosen.ids or ():
        if not 0 < letter_id < 1 << 63:
            raise InputError(f"{letter_id} is not the id of a dead letter")
    if chosen.ids is not None and len(chosen.ids) > IDS_MAX:
        raise InputError(f"these are more than {IDS_MAX} ids: choose by a filter", remedy="such as --endpoint")
    account_id = by.within(chosen.account_id)
    if chosen.endpoint_id is not None:
        found = await connection.fetchval(LETTERS.account_of, chosen.endpoint_id)
        if found is None or not by.sees(found):
            raise NotFoundError(
                f"there is no endpoint {chosen.endpoint_id}", remedy="`dispatcher endpoint list` shows which there are"
            )
        if chosen.state != "open" and account_id is None:
            account_id = found  # else there would be no index in the order of ids
    now: datetime = await connection.fetchval(RUNS.now)
    since, until = (None if at is None else runs.moment(at, now) for at in (chosen.since, chosen.until))
    return replace(chosen, account_id=account_id, since=since, until=until)


async def _check_ids(connection: Connection, ids: Sequence[int], account_id: str | None) -> None:
    found = {row["id"]: row for row in await connection.fetch(LETTERS.states, list(ids))}
    for letter_id in ids:
        row = found.get(letter_id)
        if row is None or account_id not in (None, row["account_id"]):
            raise NotFoundError(
                f"there is no dead letter {letter_id}", remedy="`dispatcher dead-letter list` shows which there are"
            )
        if row["state"] != "open":
            how = f"was resent by run {row['resent_run']}" if row["state"] == "resent" else f"was {row['state']}"
            raise StateError(f"dead letter {letter_id} {how}; only open ones can be resent or discarded")


async def _described(connection: Connection, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Add the public ids."""
    public = PublicIds(await connection.fetchval(SQL.id_key)).encode(
        [(to_us(row["created_at"]), row["event_id"]) for row in rows]
    )
    return [dict(row) | {"public_id": text.decode()} for row, text in zip(rows, public, strict=True)]
