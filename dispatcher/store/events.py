"""What people do to events, and ask of them: append as a producer would, show what became of one, follow what is attempted."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import orjson

from dispatcher.domain.event import PublicIds, check_event_type
from dispatcher.domain.moment import to_us
from dispatcher.domain.principal import Principal
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.settings import Settings
from dispatcher.store.fates import deliveries
from dispatcher.store.migrate import ADMIN
from dispatcher.store.reference import event_reference
from dispatcher.store.session import Connection
from dispatcher.store.sql import SQL

_REFUSED = (
    asyncpg.InvalidTextRepresentationError, asyncpg.CheckViolationError, asyncpg.StatementTooComplexError,
    asyncpg.UntranslatableCharacterError, asyncpg.DatetimeFieldOverflowError,
)  # fmt: skip
_CHECKS = {
    "outbox_payload_size": "the payload is larger than the outbox accepts ({bytes} bytes, DISPATCHER_PAYLOAD_BYTES_MAX)",
    "outbox_account_id_length": "an account id has 1 to 255 bytes",
    "outbox_type_form": "the event type is malformed",
    "outbox_ordering_key_length": "an ordering key has 1 to 255 bytes",
}


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What a producer that can't INSERT sends, but for its data."""

    account_id: str
    type: str
    occurred_at: datetime | None = None
    ordering_key: str | None = None
    expires_at: datetime | None = None
    priority: int | None = None
    traceparent: str | None = None


class Events:
    """`principal`: who asks. What is another account's isn't there for it."""

    def __init__(self, connection: Connection, settings: Settings, principal: Principal) -> None:
        self._db = connection
        self._settings = settings
        self._principal = principal
        self._key: bytes | None = None

    async def send(
        self,
        account_id: str,
        event_type: str,
        payload: str,
        occurred_at: datetime | None = None,
        *,
        ordering_key: str | None = None,
        expires_at: datetime | None = None,
        priority: int | None = None,
    ) -> tuple[int, str]:
        """Append one event as a producer would; return its outbox id and its public id."""
        self._principal.within(account_id)
        check_event_type(event_type)
        try:
            payload.encode()
        except UnicodeEncodeError as exc:
            raise InputError("the payload is not valid UTF-8") from exc
        if "\x00" in payload:
            raise InputError("the payload holds a NUL byte, which JSON does not allow")
        try:
            row = await self._db.fetchrow(
                ADMIN.insert_event, account_id, event_type, payload, occurred_at, ordering_key, expires_at, priority
            )
        except _REFUSED as exc:
            raise self._refusal(exc) from exc
        return row["id"], await self._public_id(row["id"], row["created_at"])

    async def send_many(
        self, events: Sequence[NewEvent], text: str, *, within: str | None = None
    ) -> list[tuple[int, str]]:
        """Append events in one statement; return (outbox id, public id) of each, in order. `text` is the JSON array that they were read
        from, or an object that has it as `within`: what is there as `data` goes in byte by byte."""
        for event in events:
            self._principal.within(event.account_id)
            check_event_type(event.type)
        try:
            rows = await self._db.fetch(
                ADMIN.insert_events,
                text,
                within,
                [event.account_id for event in events],
                [event.type for event in events],
                [event.occurred_at for event in events],
                [event.ordering_key for event in events],
                [event.expires_at for event in events],
                [event.priority for event in events],
                [event.traceparent for event in events],
            )
        except _REFUSED as exc:
            raise self._refusal(exc) from exc
        public_ids = PublicIds(await self._id_key()).encode([(to_us(row["created_at"]), row["id"]) for row in rows])
        return [(row["id"], public_id.decode()) for row, public_id in zip(rows, public_ids, strict=True)]

    async def once(
        self, key: str | None, request: bytes, act: Callable[[], Awaitable[dict[str, Any]]]
    ) -> tuple[dict[str, Any], bool]:
        """Do something that changes the database, and answer; or under a key that was there before, answer as then, having done nothing.
        Return the answer and whether it is an earlier one's. The key and what it did are one transaction."""
        if key is None:
            return await act(), False
        scope = "operator" if self._principal.is_operator else f"account {self._principal.account_id}"
        request_hash = hashlib.sha256(request).digest()
        async with self._db.transaction():
            if await self._db.fetchval(ADMIN.insert_idempotency_key, scope, key, request_hash):
                answer = await act()
                await self._db.execute(ADMIN.put_idempotent_answer, scope, key, orjson.dumps(answer).decode())
                return answer, False
        row = await self._db.fetchrow(ADMIN.idempotency_key, scope, key)
        if row is None or row["request_hash"] != request_hash:
            raise StateError("this Idempotency-Key was used for another request; a new request needs a new key")
        return orjson.loads(row["answer"]), True

    def _refusal(self, exc: asyncpg.PostgresError) -> InputError:
        """Say what PostgreSQL didn't take."""
        if isinstance(exc, asyncpg.CheckViolationError):
            said = _CHECKS.get(exc.constraint_name, str(exc)).format(bytes=self._settings.payload_bytes_max)
            return InputError(
                said,
                field={"outbox_payload_size": "data", "outbox_ordering_key_length": "ordering_key"}.get(
                    exc.constraint_name
                ),
            )
        if isinstance(exc, asyncpg.StatementTooComplexError):
            return InputError("the payload is nested too deeply", field="data")
        return InputError(f"the payload is not JSON: {exc.detail or exc}", field="data")

    async def show(
        self, reference: str, endpoint_id: int | None = None, *, after: int = 0, limit: int | None = None
    ) -> dict[str, Any]:
        """Tell what happened to one event: each endpoint that should have had it (or only `endpoint_id`), run by run. `reference` is an outbox
        id or evt_…. With `limit` so many of the account's endpoints are looked at, from `after` on; `next` is where the following begin.

        Of an event that retention has taken from the log, what a dead letter and the attempts still tell (`in_log` false).
        """
        event = await event_reference(self._db, reference)
        row, in_log = await self._db.fetchrow(ADMIN.event, event.id), True
        if row is None:
            row, in_log = await self._db.fetchrow(ADMIN.event_copy, event.id), False
        if row is None or not event.fits(row["created_at"]) or not self._principal.sees(row["account_id"]):
            raise NotFoundError(
                f"there is no event {reference}: it was never committed, or was erased, or retention has taken it"
            )
        upto = endpoint_id
        if endpoint_id is not None:
            after = endpoint_id - 1
        elif limit is not None:
            upto = await self._db.fetchval(ADMIN.endpoints_bound, row["account_id"], after, limit)
        return {
            "next": None if endpoint_id is not None else upto,
            "id": event.id, "event_id": await self._public_id(event.id, row["created_at"]), "account_id": row["account_id"],
            "type": row["type"], "occurred_at": row["occurred_at"], "created_at": row["created_at"], "payload": row["payload"],
            "ordering_key": row["ordering_key"], "expires_at": row["expires_at"], "priority": row["priority"],
            "traceparent": row["traceparent"], "in_log": in_log,
            "deliveries": deliveries(
                await self._db.fetch(ADMIN.event_deliveries, event.id, row["account_id"], row["type"], row["payload"] or "null", after, upto),
                await self._db.fetch(ADMIN.event_attempts, event.id, after, upto),
            ),
        }  # fmt: skip

    async def tail(
        self,
        since: datetime | timedelta,
        endpoint_ids: Sequence[int] | None,
        window_ids: int,
        limit: int = 1_000,
        *,
        failures: bool = False,
    ) -> list[dict[str, Any]]:
        """Return attempts (`failures`: only those that failed) of the log's newest `window_ids` that began after `since`, or less than so long
        ago; the newest `limit` of them, oldest first. Whose the endpoints are, was asked before."""
        at, back = (None, since) if isinstance(since, timedelta) else (since, None)
        last_id = await self._db.fetchval(ADMIN.last_id)
        rows = await self._db.fetch(ADMIN.tail, at, endpoint_ids, last_id - window_ids, back, limit, failures)
        return [dict(row) for row in reversed(rows)]

    async def account_for(self) -> list[dict[str, Any]]:
        """Count, for each endpoint, the deliveries owed by committed events and how they ended. Reads the whole log: for demos and tests."""
        return [dict(row) for row in await self._db.fetch(ADMIN.account_for)]

    async def emit_many(self, rows: list[tuple[str, str, str, datetime | None]]) -> list[str]:
        """Append many events (account, type, payload, occurred_at) in one statement; return their public ids."""
        inserted = await self._db.fetch(ADMIN.emit_many, *(list(column) for column in zip(*rows, strict=True)))
        public_ids = PublicIds(await self._id_key()).encode([(to_us(row["created_at"]), row["id"]) for row in inserted])
        return [public_id.decode() for public_id in public_ids]

    async def _public_id(self, event_id: int, created_at: datetime) -> str:
        [public_id] = PublicIds(await self._id_key()).encode([(to_us(created_at), event_id)])
        return public_id.decode()

    async def _id_key(self) -> bytes:
        if self._key is None:
            self._key = await self._db.fetchval(SQL.id_key)
        assert self._key is not None
        return self._key
