"""Who may: API keys, login links, logins, and the trail of what they changed.

A key or a link is 256 random bits, shown once; the database has its SHA-256, which is enough where nothing can be
guessed. A login is a row: it ends at its time, when somebody logs out, and when the key or link that it came by is
revoked. Whose a row is, is in the statement: an account's principal finds its own.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.errors import InputError, NotFoundError
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

ACCESS = load(Path(__file__).with_name("access.sql"))

KEY_PREFIX = "whkey_"
SHOWN = len(KEY_PREFIX) + 6  # characters that tell keys apart; 214 bits are left to guess
LINK_USES_MAX = 100
LINK_S_MAX = 604_800
SWEPT = 1_000  # rows of a kind at a time

_MAX_ID = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Key:
    """`account_id` None: an operator's. `prefix` is what may be shown of it."""

    id: int
    account_id: str | None
    name: str
    prefix: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Link:
    id: int
    account_id: str | None
    uses_left: int
    created_at: datetime
    created_by: str
    expires_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Login:
    id: int
    principal: Principal
    expires_at: datetime
    proxy_user: str | None = None
    by_link: bool = False
    key_expires_at: datetime | None = None  # of the key that it was made with


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the audit. `status`: as HTTP says; None if it was interrupted, or is under way."""

    id: int
    at: datetime
    actor: str
    account_id: str | None
    action: str
    subject: str
    address: str
    status: int | None


def check_account_id(account_id: str) -> str:
    if not account_id or len(account_id.encode(errors="surrogatepass")) > 255 or not account_id.isprintable():
        raise InputError("an account id has 1 to 255 bytes of printable characters", field="account_id")
    return account_id


# ── keys ──


async def create_key(
    db: Connection, principal: Principal, *, account_id: str | None, name: str = "", ttl_s: float | None = None,
    until: datetime | None = None,
) -> tuple[Key, str]:  # fmt: skip
    """Make a key of an account, or without one an operator's; return it with its text, which is not to be had again. `until`: when the key
    ends with which it is made, which it may not outlive."""
    if account_id is not None:
        check_account_id(account_id)
    if len(name) > 200 or not name.isprintable():
        raise InputError("a key's name has at most 200 printable characters", field="name")
    if ttl_s is not None and not 0 < ttl_s <= 10 * 365 * 86_400:
        raise InputError("a key lives for ten years at most, or for ever", field="ttl_s")
    if until is not None and (ttl_s is None or datetime.now(UTC) + timedelta(seconds=ttl_s) > until):
        raise InputError(
            f"the key that makes it ends at {until:%Y-%m-%d %H:%M:%S} UTC; give it a life that is over by then",
            field="ttl_s",
        )
    text = KEY_PREFIX + secrets.token_urlsafe(32)
    row = await db.fetchrow(
        ACCESS.insert_key, principal.within(account_id), name, text[:SHOWN], _hash(text), principal.actor, ttl_s
    )
    return Key(**row), text


async def keys(
    db: Connection, principal: Principal, *, account_id: str | None = None, revoked: bool = False, after: int = 0, limit: int = 100
) -> list[Key]:  # fmt: skip
    rows = await db.fetch(ACCESS.keys, principal.within(account_id), None, revoked, after, limit)
    return [Key(**row) for row in rows]


async def key(db: Connection, principal: Principal, key_id: int) -> Key:
    row = await db.fetchrow(ACCESS.keys, principal.account_id, key_id, True, 0, 1)
    if row is None:
        raise NotFoundError(f"there is no key {key_id}")
    return Key(**row)


async def revoke_key(db: Connection, principal: Principal, key_id: int) -> Key:
    """End a key and the logins by it, at once and for good. Safe to repeat."""
    row = await db.fetchrow(ACCESS.revoke_key, principal.account_id, key_id)
    if row is None:
        raise NotFoundError(f"there is no key {key_id}")
    return Key(**row)


async def bearer(db: Connection, text: str) -> tuple[int, Principal, datetime | None] | None:
    """Return the key's id, whose it is and when it ends; None if it is no key, or none any more."""
    row = await db.fetchrow(ACCESS.key_by_hash, _hash(text))
    if row is None:
        return None
    if row["is_stale"]:
        await db.execute(ACCESS.note_use, row["id"])
    named = f" ({row['name']})" if row["name"] else ""
    return row["id"], Principal(f"key {row['id']}{named}", row["account_id"]), row["expires_at"]


# ── links ──


async def create_link(
    db: Connection, principal: Principal, *, account_id: str | None, ttl_s: int, session_s: int, uses: int = 1
) -> tuple[Link, str]:
    """Make a link that lets its bearer in as the account; without one, as an operator (only the command line does that). Return its token."""
    if account_id is None:
        assert principal is OPERATOR, "a link is an account's"
    else:
        check_account_id(account_id)
    if not 1 <= uses <= LINK_USES_MAX:
        raise InputError(f"a link can be opened 1 to {LINK_USES_MAX} times", field="uses")
    if not 10 <= ttl_s <= LINK_S_MAX:
        raise InputError(f"a link lives for 10 to {LINK_S_MAX} seconds", field="ttl_s")
    token = secrets.token_urlsafe(32)
    row = await db.fetchrow(
        ACCESS.insert_link, principal.within(account_id), _hash(token), uses, session_s, principal.actor, ttl_s
    )
    return Link(**row), token


async def links(
    db: Connection, principal: Principal, *, account_id: str | None = None, after: int = 0, limit: int = 100
) -> list[Link]:
    return [Link(**row) for row in await db.fetch(ACCESS.links, principal.within(account_id), after, limit)]


async def revoke_link(db: Connection, principal: Principal, link_id: int) -> Link:
    row = await db.fetchrow(ACCESS.revoke_link, principal.account_id, link_id)
    if row is None:
        raise NotFoundError(f"there is no portal link {link_id}")
    return Link(**row)


# ── logins ──


async def login_by_key(db: Connection, text: str, session_s: int) -> Login | None:
    found = await bearer(db, text)
    if found is None:
        return None
    key_id, principal, _ = found
    return await _insert_login(db, principal, session_s, key_id=key_id)


async def login_by_link(db: Connection, token: str) -> Login | None:
    """Use a link up, or one of its uses."""
    async with db.transaction():
        row = await db.fetchrow(ACCESS.use_link, _hash(token))
        if row is None:
            return None
        principal = Principal(f"link {row['id']} (of {row['created_by']})", row["account_id"])
        return await _insert_login(db, principal, row["session_s"], link_id=row["id"])


async def login_by_proxy(db: Connection, user: str, session_s: int) -> Login:
    return await _insert_login(db, Principal(f"proxy user {user}"), session_s, proxy_user=user)


async def login(db: Connection, login_id: int) -> Login | None:
    row = await db.fetchrow(ACCESS.login, login_id) if 0 < login_id <= _MAX_ID else None
    if row is None:
        return None
    return Login(
        row["id"], Principal(row["actor"], row["account_id"]), row["expires_at"], row["proxy_user"], row["by_link"], row["key_expires_at"]
    )  # fmt: skip


async def end_login(db: Connection, login_id: int) -> None:
    await db.execute(ACCESS.end_login, login_id)


async def web_key(db: Connection) -> bytes:
    """Return what cookies are signed with; all processes on a database share it."""
    secret: bytes = await db.fetchval(ACCESS.web_key)
    return secret


async def _insert_login(
    db: Connection, principal: Principal, session_s: int, *, key_id: int | None = None, link_id: int | None = None,
    proxy_user: str | None = None,
) -> Login:  # fmt: skip
    row = await db.fetchrow(
        ACCESS.insert_login, principal.account_id, principal.actor, key_id, link_id, proxy_user, session_s
    )
    return Login(row["id"], principal, row["expires_at"], proxy_user)


# ── the trail ──


async def begin_change(db: Connection, principal: Principal, action: str, subject: str, address: str) -> int:
    """Write down what is about to be changed, by whom."""
    change_id: int = await db.fetchval(
        ACCESS.begin_change, principal.actor, principal.account_id, action, subject, address
    )
    return change_id


async def end_change(db: Connection, change_id: int, status: int, subject: str) -> None:
    await db.execute(ACCESS.end_change, change_id, status, subject)


async def changes(
    db: Connection, principal: Principal, *, account_id: str | None = None, before: int = _MAX_ID, limit: int = 100
) -> list[Change]:
    """Return entries of the audit, the newest first."""
    rows = await db.fetch(ACCESS.audit, principal.within(account_id), before, limit)
    return [Change(**row) for row in rows]


async def sweep(db: Connection) -> int:
    """Delete what has expired, a page of each kind; return how many rows."""
    done = 0
    for statement in (
        ACCESS.sweep_logins,
        ACCESS.sweep_links,
        ACCESS.sweep_idempotency_keys,
        ACCESS.sweep_audit,
        ACCESS.sweep_alerts,
        ACCESS.sweep_receivers,
    ):
        status: str = await db.execute(statement, SWEPT)
        done += int(status.rpartition(" ")[2])
    return done


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
