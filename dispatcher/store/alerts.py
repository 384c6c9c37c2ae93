"""Who is told by mail what happens to endpoints, and what they are to be told.

An *audience* is an account, told of its own endpoints, or '' for the operators, told of everybody's. Alerts are rows that the database writes in
the transaction that changes the endpoint, beside the event that tells programs the same (schema.sql: tell); `take` hands the mailer the next
mail, within the hour's bound, and what is beyond it is held until one mail tells of all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from dispatcher.domain.mail import check_address
from dispatcher.domain.principal import Principal
from dispatcher.errors import ForbiddenError, NotFoundError, StateError
from dispatcher.store.access import check_account_id
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

ALERTS = load(Path(__file__).with_name("alerts.sql"))

OPERATORS = ""
RECIPIENTS_MAX = 20
TOLD_OF_MAX = 200  # alerts in one mail
HELD_S = 60.0  # until it is asked again whether the hour has room
WAITS_S = (60.0, 300.0, 900.0, 3_600.0, 7_200.0)  # after a try; then it is given up

_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Recipient:
    """`account_id` None: an operator, told of all accounts' endpoints."""

    id: int
    account_id: str | None
    address: str
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that an audience is to be told. `said`: the event's `data`."""

    id: int
    account_id: str
    endpoint_id: int
    type: str
    said: dict[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail. `is_last_try`: when it fails it is given up."""

    audience: str
    alerts: tuple[Alert, ...]
    addresses: tuple[str, ...]
    message_id: str
    is_last_try: bool

    @property
    def ids(self) -> list[int]:
        return [alert.id for alert in self.alerts]


# ── recipients ──


async def add_recipient(db: Connection, principal: Principal, *, account_id: str | None, address: str) -> Recipient:
    """Tell this address of the account's endpoints from now on; without an account, of everybody's."""
    audience = principal.within(account_id) or OPERATORS
    if audience != OPERATORS:
        check_account_id(audience)
    check_address(address)
    async with db.transaction():
        await db.execute(ALERTS.lock_audience, audience)
        row = await db.fetchrow(ALERTS.insert_recipient, audience, address, principal.actor, RECIPIENTS_MAX)
        if row is None:
            if await db.fetchval(ALERTS.recipient_exists, audience, address):
                raise StateError(f"{address} is among the recipients already")
            raise StateError(f"there are {RECIPIENTS_MAX} recipients, which is the most; use a list's address")
    return _recipient(row)


async def recipients(
    db: Connection, principal: Principal, *, account_id: str | None = None, after: int = 0, limit: int = 100
) -> list[Recipient]:
    wanted = principal.within(account_id)
    rows = await db.fetch(ALERTS.recipients, principal.account_id, wanted, after, limit)
    return [_recipient(row) for row in rows]


async def remove_recipient(db: Connection, principal: Principal, recipient_id: int) -> Recipient:
    row = await db.fetchrow(ALERTS.delete_recipient, principal.account_id, recipient_id)
    if row is None:
        raise NotFoundError(f"there is no recipient {recipient_id}")
    return _recipient(row)


def _recipient(row: Any) -> Recipient:
    return Recipient(row["id"], row["audience"] or None, row["address"], row["created_at"], row["created_by"])


# ── what was told ──


async def alerts(
    db: Connection, principal: Principal, *, account_id: str | None = None, before: int = _END, limit: int = 50
) -> list[dict[str, Any]]:
    """Return what an account's recipients were to be told, or all were, the newest first."""
    rows = await db.fetch(ALERTS.alerts, principal.within(account_id), before, limit)
    return [dict(row) for row in rows]


async def operator_account(db: Connection) -> str | None:
    """Return the account whose endpoints get what is told of every account's endpoints."""
    account_id: str | None = await db.fetchval(ALERTS.operator_account)
    return account_id


async def put_operator_account(db: Connection, principal: Principal, account_id: str | None) -> None:
    if not principal.is_operator:
        raise ForbiddenError("this is for operators")
    if account_id is not None:
        check_account_id(account_id)
    await db.execute(ALERTS.put_operator_account, account_id)


# ── mailing ──


async def audiences_due(db: Connection, limit: int) -> list[str]:
    """Return the audiences that have something to be told now, after giving up what is too old to be news."""
    await db.execute(ALERTS.give_up_old)
    return [row["audience"] for row in await db.fetch(ALERTS.audiences_due, limit)]


async def take(db: Connection, audience: str, *, per_hour: int, domain: str) -> Mail | None:
    """Take the next mail for an audience: one alert, or, when some were held, all that there are. None: nothing to send now."""
    async with db.transaction():
        rows = await db.fetch(ALERTS.due, audience, TOLD_OF_MAX)
        if not rows:
            return None
        addresses = tuple(row["address"] for row in await db.fetch(ALERTS.addresses, audience, RECIPIENTS_MAX))
        if not addresses:  # the last was removed since
            await db.execute(ALERTS.give_up, [row["id"] for row in rows])
            return None
        if await db.fetchval(ALERTS.mails_lately, audience) >= per_hour:
            await db.execute(ALERTS.hold, [row["id"] for row in rows], HELD_S)
            return None
        chosen = rows if any(row["state"] == "held" for row in rows) else rows[:1]
        tries = max(row["tries"] for row in chosen)
        # The same each time that it is tried, so that mail systems can tell a repeated one.
        began_us = int(chosen[0]["at"].timestamp() * 1e6)  # another installation may send from the same domain
        message_id = f"<alert-{chosen[0]['id']}-{chosen[-1]['id']}-{began_us}@{domain}>"
        ids = [row["id"] for row in chosen]
        await db.execute(ALERTS.take, ids, message_id, WAITS_S[min(tries, len(WAITS_S) - 1)])
    told = tuple(
        Alert(
            row["id"], row["account_id"], row["endpoint_id"], row["type"], orjson.loads(row["said"]), row["at"]
        )
        for row in chosen
    )  # fmt: skip
    return Mail(audience, told, addresses, message_id, is_last_try=tries + 1 >= len(WAITS_S))


async def note_mailed(db: Connection, ids: Sequence[int]) -> None:
    await db.execute(ALERTS.mailed, list(ids))


async def give_up(db: Connection, ids: Sequence[int]) -> None:
    await db.execute(ALERTS.give_up, list(ids))
