"""Erasure of an account or of one event: payloads, answers, secrets and addresses go; ids, times and counts stay.

Irrevocable, and logged in webhook.erasure. It is done in pages, each a transaction that also counts what it did there,
so an interrupted erasure is a row without an end, and asking for it again completes it.

POSTs that are in flight can't be recalled, and what comes back of them is still recorded. So where a dispatcher is at
work, erasure waits for as long as a POST may take and then passes over everything once more: what was recorded
meanwhile goes too. Events that are inserted after it began are not erased: stop their producer first.

What is erased leaves the tables at once and the server's files with the next vacuum; backups keep it for as long as
they live.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

from dispatcher.errors import InputError, NotFoundError
from dispatcher.settings import Settings
from dispatcher.store.admin import Admin
from dispatcher.store.reference import event_reference
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

ERASURE = load(Path(__file__).with_name("erasure.sql"))

PAGE = 2_000  # rows of one transaction: the recorder may wait for one of them
COUNT_TIMEOUT_S = 30

Step = Callable[[str, float], None]  # what, and how much more of it is done


@dataclass(frozen=True, slots=True)
class AccountData:
    """What there is of an account. A count is None where counting took too long."""

    account_id: str
    endpoints: int
    events: int | None
    response_heads: int | None
    dead_letters: int | None
    tests: int | None
    began: bool  # an erasure was interrupted

    @property
    def is_empty(self) -> bool:
        return not any(
            count is None or count
            for count in (self.endpoints, self.events, self.response_heads, self.dead_letters, self.tests)
        )


@dataclass(frozen=True, slots=True)
class EventData:
    """What there is of an event. `owed`: deliveries that will not be made. `began`: its erasure was interrupted."""

    id: int
    account_id: str
    in_log: bool
    response_heads: int
    dead_letters: int
    owed: int
    began: int | None


@dataclass(frozen=True, slots=True)
class Erased:
    """A row of the log of erasures."""

    id: int
    account_id: str
    event_id: int | None
    events: int
    response_heads: int
    dead_letters: int
    tests: int
    endpoints: int
    erased_by: str
    began_at: datetime
    ended_at: datetime | None


async def find(
    connection: Connection, *, account_id: str | None = None, after: int = 0, limit: int = 1_000
) -> list[Erased]:
    """Return the log of erasures in order."""
    return [Erased(*row) for row in await connection.fetch(ERASURE.erasures, None, account_id, after, limit)]


# ── an account ──


async def look_at_account(connection: Connection, account_id: str) -> AccountData:
    """Count what erasing the account would take. Raises NotFoundError if there is nothing."""
    if not account_id or len(account_id.encode(errors="surrogatepass")) > 255 or "\x00" in account_id:
        raise InputError("an account id has 1 to 255 bytes")
    rows = await connection.fetch(ERASURE.endpoints, account_id)
    ids = [row["id"] for row in rows]
    data = AccountData(
        account_id,
        sum(not row["erased"] for row in rows),
        await _count(connection, ERASURE.count_events, account_id),
        await _count(connection, ERASURE.count_response_heads, ids),
        await _count(connection, ERASURE.count_dead_letters, account_id),
        await _count(connection, ERASURE.count_tests, ids),
        await connection.fetchval(ERASURE.unfinished, account_id) is not None,
    )
    if data.is_empty and not data.began:
        raise NotFoundError(
            f"there is nothing of account {account_id}: no endpoint, event or dead letter; account ids are exact, capitals and spaces included"
        )
    return data


async def erase_account(
    connection: Connection, settings: Settings, account_id: str, *, step: Step = lambda what, n: None
) -> Erased:
    """End its keys and logins, delete the account's endpoints, then erase what there is of it. Repeating it completes what was interrupted."""
    erasure_id = (await begin_account(connection, account_id)).id
    await connection.execute(ERASURE.end_access, account_id)
    await connection.execute(ERASURE.delete_recipients, account_id)
    admin = Admin(connection, settings)
    endpoint_ids = []
    for row in await connection.fetch(ERASURE.endpoints, account_id):
        endpoint_ids.append(row["id"])
        if row["state"] != "deleted":
            await admin.delete(row["id"])
        if not row["erased"]:
            await _scrub(connection, erasure_id, row["id"])
            step("endpoints", 1)
    in_flight_s = await connection.fetchval(ERASURE.in_flight_s, account_id)
    upto = await connection.fetchval(ERASURE.last_id)
    await _erase_rows(connection, erasure_id, account_id, endpoint_ids, upto, step)
    await connection.execute(ERASURE.note, endpoint_ids)
    if in_flight_s:
        await _wait(in_flight_s, step)
        await _erase_rows(connection, erasure_id, account_id, endpoint_ids, upto, step)
    await connection.execute(ERASURE.delete_alerts, account_id)
    await connection.execute(ERASURE.delete_receivers, account_id)
    await connection.execute(ERASURE.finish, erasure_id)
    return await _get(connection, erasure_id)


async def begin_account(connection: Connection, account_id: str) -> Erased:
    """Write down that the account is to be erased, or return the one that was interrupted; `erase_account` goes on with it."""
    erasure_id = await connection.fetchval(ERASURE.unfinished, account_id)
    if erasure_id is None:
        erasure_id = await connection.fetchval(ERASURE.begin, account_id, None)
    return await _get(connection, erasure_id)


async def _scrub(connection: Connection, erasure_id: int, endpoint_id: int) -> None:
    async with connection.transaction():
        await connection.execute(ERASURE.delete_secrets, endpoint_id)
        await connection.execute(ERASURE.clear_notes, endpoint_id)
        tests = await connection.fetchval(ERASURE.delete_tests, endpoint_id)
        await connection.execute(ERASURE.scrub_endpoint, endpoint_id)
        await connection.execute(ERASURE.add, erasure_id, 0, 0, 0, tests, 1)


async def _erase_rows(
    connection: Connection, erasure_id: int, account_id: str, endpoint_ids: list[int], upto: int, step: Step
) -> None:
    """The log first: a dead letter copies its payload from there. Each page is counted in its own transaction."""
    after = 0
    while (bound := await connection.fetchval(ERASURE.events_bound, account_id, after, upto, PAGE)) is not None:
        async with connection.transaction():
            done = await connection.fetchval(ERASURE.delete_events, account_id, after, bound)
            await connection.execute(ERASURE.add, erasure_id, done, 0, 0, 0, 0)
        after = bound
        step("events", done)
    after = 0
    while (bound := await connection.fetchval(ERASURE.dead_letters_bound, account_id, after, PAGE)) is not None:
        async with connection.transaction():
            done = await connection.fetchval(ERASURE.erase_dead_letters, account_id, after, bound)
            await connection.execute(ERASURE.add, erasure_id, 0, 0, done, 0, 0)
        after = bound
        step("dead letters", done)
    for endpoint_id in endpoint_ids:
        after = 0
        while (bound := await connection.fetchval(ERASURE.retries_bound, endpoint_id, after, PAGE)) is not None:
            await connection.execute(ERASURE.delete_retries, endpoint_id, after, bound)
            after = bound
        after = 0
        while (bound := await connection.fetchval(ERASURE.response_heads_bound, endpoint_id, after, PAGE)) is not None:
            async with connection.transaction():
                done = await connection.fetchval(ERASURE.erase_response_heads, endpoint_id, after, bound)
                await connection.execute(ERASURE.add, erasure_id, 0, done, 0, 0, 0)
            after = bound
            step("answers", done)


# ── one event ──


async def look_at_event(connection: Connection, reference: str) -> EventData:
    """Say what erasing the event would take. Raises NotFoundError if there is nothing of it, or no more."""
    event = await event_reference(connection, reference)
    logged = await connection.fetchrow(ERASURE.event, event.id)
    if logged is not None and not event.fits(logged["created_at"]):
        logged = None
    account_id = None if logged is None else logged["account_id"]
    letters = [
        row
        for row in await connection.fetch(ERASURE.dead_letters_of_event, event.id, account_id)
        if event.fits(row["created_at"])
    ]
    if account_id is None and letters:
        account_id = letters[0]["account_id"]
    attempts = await connection.fetch(ERASURE.attempts_of_event, event.id)
    if account_id is None and attempts and event.created_us is None:
        account_id = attempts[0]["account_id"]
    earlier = await connection.fetchrow(ERASURE.erasure_of_event, event.id)
    began = None if earlier is None or earlier["ended_at"] is not None else earlier["id"]
    if began is not None:
        account_id = earlier["account_id"]
    heads = sum(row["response_heads"] for row in attempts)
    dead_letters = sum(row["has_payload"] for row in letters)
    if account_id is None or not (logged or heads or dead_letters or began):
        if earlier is not None:
            raise NotFoundError(f"event {reference} was erased on {earlier['ended_at']:%Y-%m-%d %H:%M:%S} UTC")
        raise NotFoundError(
            f"there is no event {reference}: it was never committed, or retention has taken it, and no dead letter and no answer is left"
        )
    owed = await connection.fetch(ERASURE.owed_of_event, event.id, account_id)
    return EventData(
        event.id, account_id, logged is not None, heads, dead_letters, sum(row["owed"] for row in owed), began
    )


async def erase_event(connection: Connection, found: EventData, *, step: Step = lambda what, n: None) -> Erased:
    """Erase what `look_at_event` found; deliveries that were still owed are counted as discarded."""
    async with connection.transaction():
        owed = await connection.fetch(ERASURE.owed_of_event, found.id, found.account_id)
        ids = [row["id"] for row in owed]
        await connection.execute(ERASURE.discard_owed, found.id, ids, [row["owed"] for row in owed])
        erasure_id = found.began or await connection.fetchval(ERASURE.begin, found.account_id, found.id)
        await _erase_event_rows(connection, erasure_id, found)
        await connection.execute(ERASURE.note, ids)  # last: it takes the configuration's lock
    if found.began or any(row["owed"] or row["running"] for row in owed):
        in_flight_s = await connection.fetchval(ERASURE.in_flight_s, found.account_id)
        if in_flight_s:
            await _wait(in_flight_s, step)
            async with connection.transaction():
                await _erase_event_rows(connection, erasure_id, found)
    await connection.execute(ERASURE.delete_received, found.account_id)  # whichever of them were of this event
    await connection.execute(ERASURE.finish, erasure_id)
    return await _get(connection, erasure_id)


async def _erase_event_rows(connection: Connection, erasure_id: int, found: EventData) -> None:
    gone = await connection.fetchval(ERASURE.delete_event, found.id)
    await connection.execute(ERASURE.delete_retries_of_event, found.id, found.account_id)
    heads = await connection.fetchval(ERASURE.erase_response_heads_of_event, found.id)
    letters = await connection.fetchval(ERASURE.erase_dead_letters_of_event, found.id, found.account_id)
    await connection.execute(ERASURE.add, erasure_id, int(gone is not None), heads, letters, 0, 0)


# ── both ──


async def in_flight_s(connection: Connection, account_id: str) -> float:
    """Return how long a POST of the account that is in flight may still take, 0 if no dispatcher is at work."""
    seconds: float = await connection.fetchval(ERASURE.in_flight_s, account_id)
    return seconds


async def _wait(seconds: float, step: Step) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    passed = 0.0
    while passed < seconds:
        await asyncio.sleep(min(0.2, seconds - passed))
        before, passed = passed, min(loop.time() - began, seconds)
        step("waiting", passed - before)


async def _count(connection: Connection, statement: str, value: Any) -> int | None:
    try:
        async with connection.transaction():
            await connection.execute(ERASURE.limit_time, str(COUNT_TIMEOUT_S * 1000))
            count: int = await connection.fetchval(statement, value)
    except asyncpg.QueryCanceledError:
        return None
    return count


async def _get(connection: Connection, erasure_id: int) -> Erased:
    return Erased(*await connection.fetchrow(ERASURE.erasures, erasure_id, None, 0, 1))
