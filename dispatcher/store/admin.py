"""What people do to endpoints and events, as transactions: the command line's verbs today, the API's tomorrow.

An endpoint's *configuration* is a plain dict (`CONFIG_FIELDS`). A draft endpoint is edited in place; an edit of any
other is kept in `draft` beside the configuration in force until its own test has passed and it goes live. A passed test
belongs to one exact configuration, by its hash, secrets included.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from dispatcher.domain.endpoint import check_patterns, config_hash
from dispatcher.domain.event import PublicIds, check_event_type
from dispatcher.domain.signing import new_secret, secret_key
from dispatcher.domain.url import parse_url
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.settings import Settings
from dispatcher.store.migrate import ADMIN
from dispatcher.store.session import Connection
from dispatcher.store.sql import SQL

CONFIG_FIELDS = (
    "name",
    "url",
    "event_types",
    "timeout_ms",
    "rate_per_s",
    "rate_burst",
    "in_flight_max",
    "retry_schedule_s",
)
DEFAULTS: dict[str, Any] = {
    "name": "", "event_types": ["*"], "timeout_ms": 10_000, "rate_per_s": None, "rate_burst": None, "in_flight_max": None,
    "retry_schedule_s": None,
}  # fmt: skip
_RANGES = {
    "timeout_ms": (100, 60_000, "milliseconds"),
    "rate_per_s": (0.001, 100_000, "POSTs a second"),
    "rate_burst": (1, 100_000, "POSTs"),
    "in_flight_max": (1, 4_000, "POSTs"),
}


@dataclass(frozen=True, slots=True)
class EndpointView:
    """One endpoint as people see it. `config` is in force; `proposed` is an edit that waits for its test."""

    id: int
    account_id: str
    state: str
    state_reason: str | None
    config: dict[str, Any]
    proposed: dict[str, Any] | None
    secrets: tuple[str, ...]
    tested: bool
    failing_since: datetime | None
    backlog: int
    retries: int
    dead_letters: int
    created_at: datetime

    @property
    def to_test(self) -> dict[str, Any]:
        """The configuration that a test is about."""
        return self.proposed or self.config

    @property
    def test_hash(self) -> str:
        return config_hash(self.to_test | {"secrets": list(self.secrets)})

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything but the secrets."""
        return {
            "id": self.id, "account_id": self.account_id, "state": self.state, "state_reason": self.state_reason, **self.config,
            "proposed": self.proposed, "tested": self.tested, "failing_since": self.failing_since, "backlog": self.backlog,
            "retries": self.retries, "dead_letters": self.dead_letters, "created_at": self.created_at,
        }  # fmt: skip


class Admin:
    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._db = connection
        self._settings = settings
        self._key: bytes | None = None

    # ── endpoints ──

    async def create(
        self, account_id: str, config: dict[str, Any], *, secret: str | None = None, live: bool = False
    ) -> EndpointView:
        """Make a draft (or, with `live`, an endpoint that gets events from now on, without a test)."""
        if not account_id or len(account_id.encode()) > 255 or "\x00" in account_id:
            raise InputError("an account id has 1 to 255 bytes")
        full = self._checked(DEFAULTS | config)
        if secret is not None:
            secret_key(secret)
        async with self._db.transaction():
            endpoint_id = await self._db.fetchval(
                ADMIN.insert_endpoint, account_id, *(full[field] for field in CONFIG_FIELDS)
            )
            await self._db.execute(ADMIN.insert_secret, endpoint_id, secret or new_secret())
            if live:
                await self._put_live(endpoint_id, full, "created live")
        return await self.get(endpoint_id)

    async def get(self, endpoint_id: int) -> EndpointView:
        row = await self._db.fetchrow(ADMIN.endpoint, endpoint_id)
        if row is None:
            raise NotFoundError(f"there is no endpoint {endpoint_id}; `dispatcher endpoint list` shows which there are")
        config = {field: row[field] for field in CONFIG_FIELDS}
        proposed = None if row["draft"] is None else orjson.loads(row["draft"])
        secrets = tuple(row["secrets"])
        tested_hash = config_hash((proposed or config) | {"secrets": list(secrets)})
        return EndpointView(
            id=row["id"], account_id=row["account_id"], state=row["state"], state_reason=row["state_reason"], config=config, proposed=proposed,
            secrets=secrets, tested=row["tested_hash"] == tested_hash, failing_since=row["failing_since"], backlog=row["backlog"],
            retries=row["retries"], dead_letters=row["dead_letters"], created_at=row["created_at"],
        )  # fmt: skip

    async def endpoints(
        self, account_id: str | None, state: str | None, *, after: int = 0, limit: int = 1_000
    ) -> list[dict[str, Any]]:
        return [dict(row) for row in await self._db.fetch(ADMIN.endpoints, account_id, state, after, limit)]

    async def update(self, endpoint_id: int, changes: dict[str, Any], *, live: bool = False) -> EndpointView:
        """Edit a draft in place; propose the edit of any other endpoint, or with `live` put it in force at once."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            full = self._checked(view.to_test | changes)
            if view.state == "draft":
                await self._db.execute(ADMIN.put_config, endpoint_id, *(full[field] for field in CONFIG_FIELDS))
            elif live:
                await self._apply(endpoint_id, full)
            else:
                await self._db.execute(ADMIN.put_draft, endpoint_id, orjson.dumps(full).decode())
        return await self.get(endpoint_id)

    async def go_live(self, endpoint_id: int, *, force: bool = False) -> EndpointView:
        """Put a draft, or a proposed edit, in force, if its exact configuration has passed its test."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state != "draft" and view.proposed is None:
                raise StateError(
                    f"endpoint {endpoint_id} is {view.state} and has no edit that waits; there is nothing to put live"
                )
            if not view.tested and not force:
                raise StateError(
                    f"this configuration of endpoint {endpoint_id} has not passed a test; run `dispatcher endpoint test {endpoint_id}` first"
                )
            if view.state == "draft":
                await self._put_live(endpoint_id, view.config, None if view.tested else "forced without a test")
            else:
                await self._apply(endpoint_id, view.to_test)
        return await self.get(endpoint_id)

    async def pause(self, endpoint_id: int) -> EndpointView:
        """Stop deliveries within a second. Events are held, and sent on resume."""
        return await self._change_state(endpoint_id, ("live",), "paused", "by operator")

    async def resume(self, endpoint_id: int) -> EndpointView:
        """Go on with what was held, oldest first."""
        return await self._change_state(endpoint_id, ("paused", "disabled"), "live", None)

    async def delete(self, endpoint_id: int) -> None:
        """Delete an endpoint; what waits for it is never sent."""
        async with self._db.transaction():
            await self._locked(endpoint_id)
            await self._db.execute(ADMIN.put_state, endpoint_id, "deleted", "by operator")
            await self._db.execute(ADMIN.delete_subscriptions, endpoint_id)
            await self._db.execute(ADMIN.delete_secrets, endpoint_id)

    async def record_test(
        self, view: EndpointView, *, passed: bool, duration_us: int, status: int | None, fault: str | None, verdict: str, request: bytes,
        response_head: bytes | None,
    ) -> None:  # fmt: skip
        """Keep a test, and if it passed, that this exact configuration did."""
        async with self._db.transaction():
            await self._db.execute(
                ADMIN.insert_test_attempt,
                view.id,
                view.test_hash,
                duration_us,
                status,
                fault,
                verdict,
                request,
                response_head,
            )
            if passed:
                await self._db.execute(ADMIN.put_tested, view.id, view.test_hash)

    async def _locked(self, endpoint_id: int) -> EndpointView:
        await self._db.fetchval(ADMIN.lock_endpoint, endpoint_id)
        return await self.get(endpoint_id)

    async def _change_state(
        self, endpoint_id: int, allowed: tuple[str, ...], state: str, reason: str | None
    ) -> EndpointView:
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state not in allowed:
                raise StateError(
                    f"endpoint {endpoint_id} is {view.state}; only {' and '.join(allowed)} endpoints can become {state}"
                )
            await self._db.execute(ADMIN.put_state, endpoint_id, state, reason)
        return await self.get(endpoint_id)

    async def _put_live(self, endpoint_id: int, config: dict[str, Any], reason: str | None) -> None:
        await self._db.execute(ADMIN.put_state, endpoint_id, "live", reason)
        await self._db.execute(ADMIN.open_subscriptions, endpoint_id, config["event_types"])

    async def _apply(self, endpoint_id: int, config: dict[str, Any]) -> None:
        await self._db.execute(ADMIN.put_config, endpoint_id, *(config[field] for field in CONFIG_FIELDS))
        await self._db.execute(ADMIN.close_subscriptions, endpoint_id, config["event_types"])
        await self._db.execute(ADMIN.open_subscriptions, endpoint_id, config["event_types"])

    def _checked(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration in its one form, or refuse it with a sentence."""
        config = dict(config)
        if "url" not in config:
            raise InputError("an endpoint needs a URL")
        config["url"] = parse_url(config["url"], self._settings.address_policy).url
        config["event_types"] = list(check_patterns(config["event_types"]))
        if len(config["name"]) > 200 or not config["name"].isprintable():
            raise InputError("an endpoint's name has at most 200 printable characters")
        for field, (low, high, unit) in _RANGES.items():
            value = config[field]
            if value is not None and not low <= value <= high:
                raise InputError(f"{field} is {value}; it must be {low:g} to {high:g} {unit}")
        if config["rate_burst"] is not None and config["rate_per_s"] is None:
            raise InputError("rate_burst means nothing without rate_per_s; give both")
        schedule = config["retry_schedule_s"]
        if schedule is not None and not (1 <= len(schedule) <= 50 and all(1 <= wait <= 2_592_000 for wait in schedule)):
            raise InputError("a retry schedule has 1 to 50 waits of 1 second to 30 days, such as 5,30,120")
        return config

    # ── events ──

    async def send(
        self, account_id: str, event_type: str, payload: str, occurred_at: datetime | None = None
    ) -> tuple[int, str]:
        """Append one event as a producer would; return its outbox id and its public id."""
        check_event_type(event_type)
        try:
            payload.encode()
        except UnicodeEncodeError as exc:
            raise InputError("the payload is not valid UTF-8") from exc
        if "\x00" in payload:
            raise InputError("the payload holds a NUL byte, which JSON does not allow")
        try:
            row = await self._db.fetchrow(ADMIN.insert_event, account_id, event_type, payload, occurred_at)
        except asyncpg.InvalidTextRepresentationError as exc:
            raise InputError(f"the payload is not JSON: {exc.detail or exc}") from exc
        except asyncpg.CheckViolationError as exc:
            raise InputError(
                _CHECKS.get(exc.constraint_name, str(exc)).format(bytes=self._settings.payload_bytes_max)
            ) from exc
        return row["id"], await self._public_id(row["id"], row["created_at"])

    async def show(self, reference: str) -> dict[str, Any]:
        """Tell what happened to one event: each endpoint that should have had it, attempt by attempt. `reference` is an outbox id or evt_…."""
        public_ids = PublicIds(await self._id_key())
        if reference.isascii() and reference.isdigit() and len(reference) < 19:
            event_id, created_us = int(reference), None
        else:
            created_us, event_id = public_ids.decode(reference)
        row = None if event_id >= 1 << 63 else await self._db.fetchrow(ADMIN.event, event_id)
        if row is None or (created_us is not None and _us(row["created_at"]) != created_us):
            raise NotFoundError(f"there is no event {reference}: it was never committed, or retention has taken it")
        attempts: dict[int, list[dict[str, Any]]] = {}
        for attempt in await self._db.fetch(ADMIN.event_attempts, event_id):
            attempts.setdefault(attempt["endpoint_id"], []).append(
                {key: value for key, value in dict(attempt).items() if key not in ("endpoint_id", "response_head")}
                | {
                    "response": None
                    if attempt["response_head"] is None
                    else attempt["response_head"].decode("utf-8", "replace")
                }
            )
        deliveries = []
        for endpoint in await self._db.fetch(ADMIN.event_deliveries, event_id, row["account_id"], row["type"]):
            made = attempts.get(endpoint["endpoint_id"], [])
            deliveries.append(dict(endpoint) | {"fate": _fate(endpoint, made), "attempts": made})
        return {
            "id": event_id, "event_id": await self._public_id(event_id, row["created_at"]), "account_id": row["account_id"],
            "type": row["type"], "occurred_at": row["occurred_at"], "created_at": row["created_at"], "payload": row["payload"],
            "deliveries": deliveries,
        }  # fmt: skip

    async def tail(self, since: datetime, endpoint_id: int | None, window_ids: int) -> list[dict[str, Any]]:
        """Return attempts that began after `since`, oldest first, at most 1,000."""
        return [dict(row) for row in await self._db.fetch(ADMIN.tail, since, endpoint_id, window_ids)]

    async def account_for(self) -> list[dict[str, Any]]:
        """Count, for each endpoint, the deliveries owed by committed events and how they ended. Reads the whole log: for demos and tests."""
        return [dict(row) for row in await self._db.fetch(ADMIN.account_for)]

    async def emit_many(self, rows: list[tuple[str, str, str, datetime | None]]) -> list[str]:
        """Append many events (account, type, payload, occurred_at) in one statement; return their public ids."""
        inserted = await self._db.fetch(ADMIN.emit_many, *(list(column) for column in zip(*rows, strict=True)))
        public_ids = PublicIds(await self._id_key()).encode([(_us(row["created_at"]), row["id"]) for row in inserted])
        return [public_id.decode() for public_id in public_ids]

    async def now(self) -> datetime:
        now: datetime = await self._db.fetchval(ADMIN.now)
        return now

    async def _public_id(self, event_id: int, created_at: datetime) -> str:
        [public_id] = PublicIds(await self._id_key()).encode([(_us(created_at), event_id)])
        return public_id.decode()

    async def _id_key(self) -> bytes:
        if self._key is None:
            self._key = await self._db.fetchval(SQL.id_key)
        assert self._key is not None
        return self._key


_CHECKS = {
    "outbox_payload_size": "the payload is larger than the outbox accepts ({bytes} bytes, DISPATCHER_PAYLOAD_BYTES_MAX)",
    "outbox_account_id_length": "an account id has 1 to 255 bytes",
    "outbox_type_form": "the event type is malformed",
}


def _fate(endpoint: Any, attempts: list[dict[str, Any]]) -> str:
    """Say in a few words how a delivery stands."""
    if any(attempt["fault"] is None for attempt in attempts):
        return "delivered"
    if endpoint["dead"]:
        return "dead letter"
    if endpoint["retry_due_at"] is not None:
        return f"waiting for attempt {len(attempts) + 1}, due {endpoint['retry_due_at']:%Y-%m-%d %H:%M:%S} UTC"
    if endpoint["state"] != "live":
        return f"held: the endpoint is {endpoint['state']}"
    return "waiting" if not attempts else "in progress"


def _us(at: datetime) -> int:
    return round(at.timestamp() * 1_000_000)


__all__ = ["Admin", "EndpointView"]
