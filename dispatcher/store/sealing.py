"""Which keys the database's secrets are under, and putting all of them under the first key (`dispatcher rotate-key`).

A page is a transaction, and takes what is not under the first key yet: so it may be interrupted and repeated, and run beside dispatchers,
which notice nothing. What can't be opened is left as it is and told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dispatcher.domain.sealing import (
    MAKE_A_KEY,
    PREFIX,
    Keyring,
    credentials_place,
    draft_place,
    missing_keys,
    secret_place,
)
from dispatcher.domain.text import amount
from dispatcher.errors import InputError, SealedError
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

SEALING = load(Path(__file__).with_name("sealing.sql"))

PAGE_ROWS = 500  # 10 ms

NO_KEY = (
    "secrets are stored in plain text: whoever can read the database or a backup has them. Set DISPATCHER_ENCRYPTION_KEYS "
    f"({MAKE_A_KEY}) for every dispatcher and command, then run `dispatcher rotate-key`"
)


@dataclass(frozen=True, slots=True)
class KeyUse:
    """How many texts are under a key, and what it is to this process: `first`, `known`, `missing`; or `plain` text."""

    key_id: str | None
    role: str
    texts: int


@dataclass(slots=True)
class Rotated:
    """How many texts were put under the first key, of how many; and why others were not."""

    total: int
    texts: int
    failed: list[str]


async def keys_in_use(connection: Connection, keyring: Keyring) -> list[KeyUse]:
    found = await connection.fetch(SEALING.in_use)
    return [KeyUse(row["key_id"] or None, _role(row["key_id"], keyring), row["texts"]) for row in found]


async def check_keys(connection: Connection, keyring: Keyring) -> list[str]:
    """Raise SealedError if a key is missing that secrets are under; return warnings for what isn't under the first."""
    in_use = await keys_in_use(connection, keyring)
    if missing := [use.key_id for use in in_use if use.role == "missing" and use.key_id is not None]:
        raise SealedError(missing_keys(missing))
    if keyring.first_id is None:
        return [NO_KEY]
    if left := sum(use.texts for use in in_use if use.role != "first"):
        return [
            f"{amount(left, 'secret is', 'secrets are')} in plain text or under an older key; run `dispatcher rotate-key`"
        ]
    return []


async def rotate_key(connection: Connection, keyring: Keyring, progress: Callable[[Rotated], None]) -> Rotated:
    """Put every secret under the first key; `progress` is told after each page. Raises InputError without a key, SealedError before anything
    is changed if one is missing."""
    if keyring.first_id is None:
        raise InputError(
            f"there is no key to encrypt with: set DISPATCHER_ENCRYPTION_KEYS or DISPATCHER_ENCRYPTION_KEYS_FILE ({MAKE_A_KEY})"
        )
    in_use = await keys_in_use(connection, keyring)
    await check_keys(connection, keyring)
    rotated = Rotated(sum(use.texts for use in in_use if use.role != "first"), 0, [])
    current = f"{PREFIX}{keyring.first_id}:"
    after: int | None = 0
    while after is not None:
        after = await _secrets_page(connection, keyring, rotated, after, current)
        progress(rotated)
    after = 0
    while after is not None:
        after = await _credentials_page(connection, keyring, rotated, after, current)
        progress(rotated)
    return rotated


async def _secrets_page(
    connection: Connection, keyring: Keyring, rotated: Rotated, after: int, current: str
) -> int | None:
    async with connection.transaction():
        rows = await connection.fetch(SEALING.secrets, after, current, PAGE_ROWS)
        ids, sealed = [], []
        for row in rows:
            again = _again(keyring, row["secret"], secret_place(row["endpoint_id"]), rotated)
            if again is not None:
                ids.append(row["id"])
                sealed.append(again)
        await connection.execute(SEALING.put_secrets, ids, sealed)
    return rows[-1]["id"] if len(rows) == PAGE_ROWS else None


async def _credentials_page(
    connection: Connection, keyring: Keyring, rotated: Rotated, after: int, current: str
) -> int | None:
    async with connection.transaction():
        rows = await connection.fetch(SEALING.credentials, after, current, PAGE_ROWS)
        columns: tuple[list[int], list[str | None], list[str | None]] = ([], [], [])
        for row in rows:
            in_force = _again(keyring, row["credentials"], credentials_place(row["id"]), rotated)
            proposal = _again(keyring, row["proposal"], draft_place(row["id"]), rotated)
            columns[0].append(row["id"])
            columns[1].append(in_force or row["credentials"])
            columns[2].append(proposal)
        await connection.execute(SEALING.put_credentials, *columns)
    return rows[-1]["id"] if len(rows) == PAGE_ROWS else None


def _again(keyring: Keyring, stored: str | None, place: str, rotated: Rotated) -> str | None:
    """Seal a text anew; None if there is nothing to do, or nothing that can be done."""
    if stored is None or keyring.is_current(stored):
        return None
    try:
        sealed = keyring.seal(keyring.open(stored, place), place)
    except SealedError as exc:
        rotated.failed.append(str(exc))
        return None
    rotated.texts += 1
    return sealed


def _role(key_id: str, keyring: Keyring) -> str:
    if not key_id:
        return "plain"
    if key_id == keyring.first_id:
        return "first"
    return "known" if key_id in keyring else "missing"
