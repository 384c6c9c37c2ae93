"""Resends and replays: what people ask for, see and change. The dispatcher carries them out (engine/runs.py).

A run is a range of ids that an endpoint's lane reads once more. People see how many deliveries it will be before it is
made, and that range is what is sent: its end is fixed then. What has gone through the log's retention can be sent again
only from a dead letter's own copy.

A dead letter is *open* until a run takes care of it: any run does whose range and types cover it, so that what a replay
delivers doesn't stand in the list of failures for ever. If the run gives the delivery up too, that is another dead
letter; if the run is canceled before it came to it, the first one is open again.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import asyncpg

from dispatcher.domain.endpoint import check_patterns
from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.domain.run import RunSource
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.store.reference import EventReference, event_reference
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

RUNS = load(Path(__file__).with_name("runs.sql"))

UNFINISHED_MAX = 20  # of one endpoint: each costs its lane a page in turn, and has a row in every checkpoint
COUNT_MAX = 10_000_000  # deliveries of one run
COUNT_TIMEOUT_S = 60
RATE_MAX = 100_000
SHORTER = "with --since and --until"
# How far ids and times may disagree: an id is taken a moment before the time is, and moments can be long on a busy
# server.
SKEW = timedelta(seconds=5)
PAGE = 5_000  # dead letters marked at once
_ID_MAX = (1 << 31) - 1

Step = Callable[[int], None]  # called with how many more are done


@dataclass(frozen=True, slots=True)
class Target:
    """The endpoint that a run goes to. `backlog`: events that wait for their first attempt."""

    id: int
    account_id: str
    url: str
    state: str
    event_types: tuple[str, ...]
    rate_per_s: float | None
    backlog: int
    rule: str | None  # what its filters come to


@dataclass(frozen=True, slots=True)
class Selection:
    """What a replay would send: ids in (after_id, upto_id] whose type matches, all of them or those that failed; `total` deliveries. A
    replay sends what passes the endpoint's filters; what a person names, a resend, is not filtered."""

    target: Target
    after_id: int
    upto_id: int
    patterns: tuple[str, ...]
    only_failed: bool
    total: int
    rule: str | None


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as people see it. `state`: running, paused, canceled or finished. Counts are of deliveries, not of attempts."""

    id: int
    endpoint_id: int
    account_id: str
    url: str
    endpoint_state: str
    source: str
    after_id: int
    upto_id: int
    patterns: tuple[str, ...]
    only_failed: bool
    rate_per_s: float | None
    total: int
    note: str
    created_at: datetime
    settled: int
    attempted: int
    delivered: int
    dead: int
    finished_at: datetime | None
    state: str

    @property
    def kind(self) -> str:
        return kind(self.source, self.after_id, self.upto_id)

    @property
    def retrying(self) -> int:
        """How many were attempted and wait for a retry."""
        return self.attempted - self.delivered - self.dead if self.is_open else 0

    @property
    def is_open(self) -> bool:
        return self.state in ("running", "paused")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind, "retrying": self.retrying}


def kind(source: str, after_id: int, upto_id: int) -> str:
    """Name a run for people: `resend` of one delivery or of dead letters, `replay` of a range."""
    return "resend" if source == RunSource.DEAD_LETTER.value or upto_id - after_id == 1 else "replay"


# ── making one ──


async def target(connection: Connection, endpoint_id: int, *, by: Principal = OPERATOR) -> Target:
    """Return an endpoint that a run may go to; else raise what says why not."""
    row = await connection.fetchrow(RUNS.target, endpoint_id)
    if row is None or not by.sees(row["account_id"]):
        raise NotFoundError(
            f"there is no endpoint {endpoint_id}", remedy="`dispatcher endpoint list` shows which there are"
        )
    if row["state"] == "deleted":
        raise NotFoundError(f"endpoint {endpoint_id} was deleted; nothing can be sent to it any more")
    if row["state"] == "draft":
        raise StateError(
            f"endpoint {endpoint_id} is a draft, which gets nothing",
            remedy=f"`dispatcher endpoint test {endpoint_id}` and `go-live` first",
        )
    if row["unfinished"] >= UNFINISHED_MAX:
        raise StateError(
            f"endpoint {endpoint_id} has {row['unfinished']} resends and replays that haven't finished, and {UNFINISHED_MAX} is the most",
            remedy=f"`dispatcher replay list --endpoint {endpoint_id}` shows them, `dispatcher replay cancel RUN` ends one",
        )
    return Target(
        row["id"], row["account_id"], row["url"], row["state"], tuple(row["event_types"]), row["rate_per_s"], row["backlog"],
        row["rule"],
    )  # fmt: skip


async def select(
    connection: Connection,
    endpoint_id: int,
    *,
    since: datetime | timedelta | None = None,
    until: datetime | timedelta | None = None,
    after_id: int | None = None,
    upto_id: int | None = None,
    patterns: Sequence[str] = (),
    only_failed: bool = True,
    by: Principal = OPERATOR,
    timeout_s: float = COUNT_TIMEOUT_S,
) -> Selection:
    """Count what a replay would send. Times are moments or so long ago, both inclusive; ids are (after_id, upto_id]; an open end is now.

    Without `patterns`, the types that the endpoint gets now. Events from before the endpoint, or before it subscribed,
    are in the range too.
    """
    to = await target(connection, endpoint_id, by=by)
    if (since is not None and after_id is not None) or (until is not None and upto_id is not None):
        raise InputError("give the beginning of the range as a time or as an id, and so its end")
    for given in (after_id, upto_id):
        if given is not None and given < 0:
            raise InputError(f"{given} is not an outbox id")
    last_id: int = await connection.fetchval(RUNS.last_id)
    now: datetime = await connection.fetchval(RUNS.now)
    low = after_id if after_id is not None else 0
    high = min(upto_id, last_id) if upto_id is not None else last_id
    if since is not None:
        low = await id_before(connection, to.account_id, moment(since, now), last_id)
    if until is not None:
        high = min(high, await id_upto(connection, to.account_id, moment(until, now), last_id))
    wanted = check_patterns(patterns) if patterns else to.event_types
    if low >= high:
        return Selection(to, high, high, wanted, only_failed, 0, to.rule)
    total = await _count(connection, to, low, high, wanted, only_failed, timeout_s)
    return Selection(to, low, high, wanted, only_failed, total, to.rule)


async def create(
    connection: Connection, chosen: Selection, rate_per_s: float | None, note: str = "", *, step: Step = lambda n: None
) -> RunView:
    """Make the run that `select` counted. `step` hears of the dead letters that it looked at on the way."""
    check_rate(rate_per_s)
    if chosen.total == 0:
        raise InputError("there is nothing to send in this range")
    endpoint_id = chosen.target.id
    exact, prefixes = split(chosen.patterns)
    async with connection.transaction():
        run_id = await connection.fetchval(RUNS.new_run_id)
        after, upto = chosen.after_id, chosen.upto_id
        while (bound := await connection.fetchval(RUNS.dead_letters_bound, endpoint_id, after, upto, PAGE)) is not None:
            await connection.execute(
                RUNS.take_dead_letters,
                run_id,
                endpoint_id,
                after,
                bound,
                exact,
                prefixes,
                chosen.only_failed,
                chosen.rule,
            )
            after = bound
            step(PAGE)
        await insert(
            connection, run_id, endpoint_id, RunSource.LOG, chosen.after_id, upto, chosen.total,
            rate_per_s=rate_per_s, patterns=chosen.patterns, only_failed=chosen.only_failed, note=note, rule=chosen.rule,
        )  # fmt: skip
    return await get(connection, run_id)


async def resend(
    connection: Connection, reference: str, endpoint_id: int, note: str = "", *, by: Principal = OPERATOR
) -> RunView:
    """Send one event to one endpoint again: from the log, or if retention has taken it there, from its dead letter's copy."""
    to = await target(connection, endpoint_id, by=by)
    event = await event_reference(connection, reference)
    row = await connection.fetchrow(RUNS.event, event.id)
    if row is None or not event.fits(row["created_at"]):
        return await _resend_dead_letter(connection, event, to, note)
    if row["account_id"] != to.account_id:
        if not by.sees(row["account_id"]):
            raise NotFoundError(f"there is no event {reference}")
        raise InputError(
            f"event {reference} belongs to account {row['account_id']}, endpoint {endpoint_id} to account {to.account_id}; "
            "an event is sent to endpoints of its own account only"
        )
    if not await connection.fetchval(RUNS.may_have, event.id, to.id, to.rule):
        raise InputError(
            f"endpoint {endpoint_id} has field filters that leave event {reference} out, and has never been sent it; "
            "change the filters, or send it to another endpoint"
        )
    return await create(connection, Selection(to, event.id - 1, event.id, ("*",), False, 1, None), None, note)


async def _resend_dead_letter(connection: Connection, event: EventReference, to: Target, note: str) -> RunView:
    copies = [
        row for row in await connection.fetch(RUNS.dead_letters_of, to.id, event.id) if event.fits(row["created_at"])
    ]
    if not copies:
        raise NotFoundError(
            f"there is no event {event.text}: it was never committed, or was erased, or retention has taken it, "
            f"and no dead letter of endpoint {to.id} kept a copy"
        )
    opened = [row["id"] for row in copies if row["state"] == "open"]
    if not opened:
        newest = copies[0]
        how = f"resent by run {newest['resent_run']}" if newest["state"] == "resent" else newest["state"]
        raise StateError(
            f"event {event.text} is no longer in the outbox, and its dead letter {newest['id']} was {how}; "
            "there is nothing left to send it from"
        )
    async with connection.transaction():
        run_id = await connection.fetchval(RUNS.new_run_id)
        if await connection.fetchval(RUNS.take_dead_letter, opened[0], run_id) is None:
            raise StateError(f"dead letter {opened[0]} was taken up by somebody else just now; look again")
        await insert(connection, run_id, to.id, RunSource.DEAD_LETTER, event.id - 1, event.id, 1, note=note)
    return await get(connection, run_id)


async def insert(
    connection: Connection,
    run_id: int,
    endpoint_id: int,
    source: RunSource,
    after_id: int,
    upto_id: int,
    total: int,
    *,
    rate_per_s: float | None = None,
    patterns: Sequence[str] = ("*",),
    only_failed: bool = False,
    note: str = "",
    rule: str | None = None,
) -> None:
    """Write a run's two rows, as the last thing of a transaction. Raises if the endpoint can't have it (any more)."""
    if len(note) > 500 or not note.isprintable():
        raise InputError("a note has at most 500 printable characters")
    await connection.execute(RUNS.lock_target, endpoint_id)
    await target(connection, endpoint_id)
    await connection.execute(
        RUNS.insert_run, run_id, endpoint_id, source.value, after_id, upto_id, list(patterns), only_failed, rate_per_s, total, note,
        rule,
    )  # fmt: skip


def check_rate(rate_per_s: float | None, *, by: Principal = OPERATOR, most: float = RATE_MAX) -> None:
    """Raise InputError for a rate that can't be, or that an account may not have: above `most`, or unlimited."""
    if not by.is_operator and (rate_per_s is None or rate_per_s > most):
        raise InputError(f"at most {most:g} deliveries a second may be asked for here", field="rate_per_s")
    if rate_per_s is not None and not (isfinite(rate_per_s) and 0 < rate_per_s <= RATE_MAX):
        raise InputError(
            f"the rate is {rate_per_s:g}; it must be above 0 and at most {RATE_MAX:,} deliveries a second, or unlimited"
        )


def split(patterns: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """Return patterns as the statements take them: (exact types, prefixes); exact None means every type."""
    if "*" in patterns:
        return None, []
    return [p for p in patterns if not p.endswith(".*")], [p[:-1] for p in patterns if p.endswith(".*")]


# ── ranges ──


def moment(given: datetime | timedelta, now: datetime) -> datetime:
    if isinstance(given, datetime):
        return given
    try:
        return now - given
    except OverflowError:
        raise InputError("that is longer ago than there were years") from None


async def id_before(connection: Connection, account_id: str | None, since: datetime, last_id: int) -> int:
    """Return the id after which no event of the account (None: of any) that was made at or after `since` is missed."""
    low = await _first_from(connection, account_id, _shift(since, -SKEW), last_id)
    high = await _first_from(connection, account_id, _shift(since, SKEW), last_id)
    first: int | None = await connection.fetchval(RUNS.first_since, account_id, low, high, since)
    return (high if first is None else first) - 1


async def id_upto(connection: Connection, account_id: str | None, until: datetime, last_id: int) -> int:
    """Return the id up to which no event of the account (None: of any) that was made at or before `until` is missed."""
    low = await _first_from(connection, account_id, _shift(until, -SKEW), last_id)
    high = await _first_from(connection, account_id, _shift(until, SKEW), last_id)
    last: int | None = await connection.fetchval(RUNS.last_until, account_id, low, high, until)
    return low - 1 if last is None else last


async def _first_from(connection: Connection, account_id: str | None, at: datetime, last_id: int) -> int:
    """Return the lowest id from which on the account's events were made at or after `at`, by a binary search: ids nearly ascend with time."""
    below, above = 0, last_id + 1  # everything at or below is older; everything at or above isn't
    while below + 1 < above:
        middle = (below + above) // 2
        row = await connection.fetchrow(RUNS.first_event_from, account_id, middle)
        if row is None or row["id"] >= above or row["created_at"] >= at:
            above = middle
        else:
            below = row["id"]
    return above


def _shift(at: datetime, by: timedelta) -> datetime:
    try:
        return at + by
    except OverflowError:
        return at


async def _count(
    connection: Connection,
    to: Target,
    after_id: int,
    upto_id: int,
    patterns: Sequence[str],
    only_failed: bool,
    timeout_s: float,
) -> int:
    exact, prefixes = split(patterns)
    values = [to.account_id, after_id, upto_id, exact, prefixes, COUNT_MAX + 1]
    async with counting(connection, timeout_s):
        total: int = (
            await connection.fetchval(RUNS.count_failed, *values, to.id, to.rule)
            if only_failed
            else await connection.fetchval(RUNS.count_all, *values, to.rule)
        )
    if total > COUNT_MAX:
        raise InputError(
            f"these are more than {COUNT_MAX:,} deliveries: choose a shorter range, or by type", remedy=SHORTER
        )
    return total


@asynccontextmanager
async def counting(connection: Connection, timeout_s: float = COUNT_TIMEOUT_S) -> AsyncIterator[None]:
    """Bound a transaction that only counts."""
    try:
        async with connection.transaction():
            await connection.execute(RUNS.limit_time, str(int(timeout_s * 1000)))
            yield
    except asyncpg.QueryCanceledError as exc:
        raise InputError(
            f"counting takes longer than {timeout_s:g} s: choose a shorter range, or by type", remedy=SHORTER
        ) from exc


# ── following and changing one ──


async def get(connection: Connection, run_id: int, *, by: Principal = OPERATOR) -> RunView:
    rows = await connection.fetch(RUNS.runs, [run_id], None, by.account_id, None, 0, 1) if 0 < run_id < 1 << 31 else []
    if not rows:
        raise NotFoundError(
            f"there is no run {run_id}", remedy="`dispatcher replay list --state all` shows which there are"
        )
    return _view(rows[0])


async def find(
    connection: Connection,
    *,
    endpoint_id: int | None = None,
    account_id: str | None = None,
    state: str | None = None,
    after: int = 0,
    limit: int = 1_000,
    by: Principal = OPERATOR,
) -> list[RunView]:
    """Return runs in the order in which they were made. `state` may be `open`: running or paused."""
    rows = await connection.fetch(RUNS.runs, None, endpoint_id, by.within(account_id), state, after, limit)
    return [_view(row) for row in rows]


async def newest(
    connection: Connection,
    *,
    endpoint_id: int | None = None,
    before: int = _ID_MAX,
    limit: int = 50,
    by: Principal = OPERATOR,
) -> list[RunView]:
    """Return runs from new to old. Whose the endpoint is, was asked before."""
    before = min(before, _ID_MAX)
    if endpoint_id is None and by.account_id is not None:
        ids = await connection.fetchval(RUNS.newest_of_account, by.account_id, before, limit)
    else:
        ids = await connection.fetchval(RUNS.newest, endpoint_id, before, limit)
    rows = await connection.fetch(RUNS.runs, ids, None, by.account_id, None, 0, limit)
    return [_view(row) for row in reversed(rows)]


async def next_due(connection: Connection, run_id: int) -> datetime | None:
    """Return when the earliest retry of the run is due."""
    due: datetime | None = await connection.fetchval(RUNS.next_due, run_id)
    return due


async def is_dispatching(connection: Connection) -> bool:
    """Tell whether a dispatcher is at work: it writes its heartbeat once a second."""
    alive: bool = await connection.fetchval(RUNS.is_dispatching)
    return alive


async def pause(connection: Connection, run_id: int, *, by: Principal = OPERATOR) -> RunView:
    """Stop a run within a second, its retries too. POSTs in flight end."""
    return await _put_state(connection, run_id, "running", "paused", by)


async def resume(connection: Connection, run_id: int, *, by: Principal = OPERATOR) -> RunView:
    return await _put_state(connection, run_id, "paused", "running", by)


async def set_rate(
    connection: Connection, run_id: int, rate_per_s: float | None, *, by: Principal = OPERATOR
) -> RunView:
    check_rate(rate_per_s)
    async with connection.transaction():
        await connection.execute(RUNS.lock_run, run_id)
        view = await get(connection, run_id, by=by)
        if not view.is_open:
            raise StateError(f"run {run_id} is {view.state}; its rate means nothing any more")
        await connection.execute(RUNS.put_rate, run_id, rate_per_s)
    return await get(connection, run_id)


async def cancel(
    connection: Connection, run_id: int, *, step: Step = lambda n: None, by: Principal = OPERATOR
) -> RunView:
    """End a run for good: what it hasn't sent is not sent, its retries end too. Safe to repeat, which completes one that was interrupted."""
    async with connection.transaction():
        await connection.execute(RUNS.lock_run, run_id)
        view = await get(connection, run_id, by=by)
        if view.state == "finished":
            raise StateError(f"run {run_id} has finished; there is nothing to cancel")
        await connection.execute(RUNS.put_state, run_id, "canceled")
    await reopen_dead_letters(connection, run_id, step=step)
    return await get(connection, run_id)


async def reopen_dead_letters(connection: Connection, run_id: int, *, step: Step = lambda n: None) -> None:
    """Open the dead letters again that the run took and neither delivered nor gave up; in pages, each a transaction."""
    after = 0
    while (bound := await connection.fetchval(RUNS.reopen_bound, run_id, after, PAGE)) is not None:
        await connection.execute(RUNS.reopen, run_id, after, bound)
        after = bound
        step(PAGE)


async def _put_state(connection: Connection, run_id: int, allowed: str, state: str, by: Principal) -> RunView:
    async with connection.transaction():
        await connection.execute(RUNS.lock_run, run_id)
        view = await get(connection, run_id, by=by)
        if view.state != allowed:
            raise StateError(f"run {run_id} is {view.state}; only one that is {allowed} can become {state}")
        await connection.execute(RUNS.put_state, run_id, state)
    return await get(connection, run_id)


def _view(row: Any) -> RunView:
    return RunView(**(dict(row) | {"patterns": tuple(row["patterns"])}))
