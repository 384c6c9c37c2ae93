"""The built-in receiver: an address of ours for people who have no server yet. It shows what it gets, and ends after a day.

Everything is bounded: receivers an account, requests that each keeps, what is kept of a body. Whose a receiver is, is in the statement.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from dispatcher.domain.principal import Principal
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.store.access import check_account_id
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

RECEIVERS = load(Path(__file__).with_name("receivers.sql"))

LIFE_S = 86_400
OF_ACCOUNT_MAX = 5
KEPT_MAX = 100  # requests of a receiver
BODY_KEPT_BYTES = 16_384
ENDPOINTS_MAX = 5  # whose keys a signature is held against
ANSWERS = {  # what a receiver answers, in words
    "ok": "200, at once",
    "slow": "200, after 5 seconds",
    "error": "500: it fails, and is tried again later",
    "throttle": "429 with Retry-After: it wants fewer",
    "gone": "410: it is no more, which disables an endpoint",
}

_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Receiver:
    id: int
    account_id: str
    token: str
    answer: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Received:
    """One request. `signature`: valid, or why not (domain/verify.py); unknown: no endpoint has this address."""

    id: int
    at: datetime
    headers: list[tuple[str, str]]
    body: bytes
    body_bytes: int
    signature: str
    endpoint_id: int | None
    status: int


async def create(db: Connection, principal: Principal, account_id: str | None) -> Receiver:
    """Make an address that nobody can guess."""
    account_id = principal.within(account_id)
    if account_id is None:
        raise InputError("say whose receiver it is", field="account_id")
    check_account_id(account_id)
    async with db.transaction():
        await db.execute(RECEIVERS.lock_account, account_id)
        if await db.fetchval(RECEIVERS.count_of_account, account_id) >= OF_ACCOUNT_MAX:
            raise StateError(
                f"an account has {OF_ACCOUNT_MAX} receivers at most; delete one that isn't needed any more"
            )
        token = secrets.token_urlsafe(32)
        return Receiver(**await db.fetchrow(RECEIVERS.insert, account_id, token, principal.actor, LIFE_S))


async def find(
    db: Connection, principal: Principal, *, account_id: str | None = None, after: int = 0, limit: int = 100
) -> list[Receiver]:
    rows = await db.fetch(RECEIVERS.receivers, principal.within(account_id), None, after, limit)
    return [Receiver(**row) for row in rows]


async def get(db: Connection, principal: Principal, receiver_id: int) -> Receiver:
    return _found(await db.fetchrow(RECEIVERS.receivers, principal.account_id, receiver_id, 0, 1), receiver_id)


async def put_answer(db: Connection, principal: Principal, receiver_id: int, answer: str) -> Receiver:
    if answer not in ANSWERS:
        raise InputError(f"{answer!r} is no answer: {', '.join(ANSWERS)}", field="answer")
    return _found(await db.fetchrow(RECEIVERS.put_answer, principal.account_id, receiver_id, answer), receiver_id)


async def delete(db: Connection, principal: Principal, receiver_id: int) -> Receiver:
    """End a receiver. Endpoints that still have its address are told 410, which disables them."""
    return _found(await db.fetchrow(RECEIVERS.delete, principal.account_id, receiver_id), receiver_id)


def _found(row: Any, receiver_id: int) -> Receiver:
    if row is None:
        raise NotFoundError(f"there is no receiver {receiver_id}, or none any more")
    return Receiver(**row)


# ── what it gets ──


async def by_token(db: Connection, token: str) -> tuple[int, str, str] | None:
    """Return (id, account, answer) of the receiver, if it has not ended."""
    row = await db.fetchrow(RECEIVERS.by_token, token)
    return None if row is None else (row["id"], row["account_id"], row["answer"])


async def endpoints_of_url(db: Connection, account_id: str, url: str) -> list[int]:
    return [row["id"] for row in await db.fetch(RECEIVERS.endpoints_of_url, account_id, url, ENDPOINTS_MAX)]


async def keep(
    db: Connection, receiver_id: int, headers: Sequence[tuple[str, str]], body: bytes, *, signature: str, endpoint_id: int | None, status: int
) -> None:  # fmt: skip
    """Keep a request, and of the receiver's requests the newest."""
    said = orjson.dumps(headers).decode()
    async with db.transaction():
        await db.execute(
            RECEIVERS.insert_received,
            receiver_id,
            said,
            body[:BODY_KEPT_BYTES],
            len(body),
            signature,
            endpoint_id,
            status,
        )
        await db.execute(RECEIVERS.trim_received, receiver_id, KEPT_MAX - 1)


async def received(
    db: Connection, receiver_id: int, *, before: int = _END, after: int = 0, limit: int = KEPT_MAX
) -> list[Received]:
    """Return what a receiver got, the newest first. Whose it is, was asked before."""
    rows = await db.fetch(RECEIVERS.received, receiver_id, before, after, limit)
    return [
        Received(
            row["id"], row["at"], [(name, value) for name, value in orjson.loads(row["headers"])], row["body"], row["body_bytes"],
            row["signature"], row["endpoint_id"], row["status"],
        )
        for row in rows
    ]  # fmt: skip
