"""What people do to endpoints, as transactions: for the command line, the API and the panel. To events: store/events.py.

An endpoint's *configuration* is a plain dict: `CONFIG_FIELDS`, and what shapes its requests (domain/shape.py), of which the
credentials are sealed in the database and opened only where they are needed: without their key an endpoint can still be
shown, paused and deleted. A draft endpoint is edited in place; an edit of any
other is kept in `draft` beside the configuration in force until its own test has passed and it goes live. A passed test
belongs to one exact configuration, by its hash, the newest secret included.

What an endpoint is owed is decided by its subscriptions' bounds alone. A pause leaves them open: events are held. To skip
is to close them where the pause began and to open new ones now; what was handed out before the pause is owed in either
case. A pause that skips closes them at once, and that is how it is known later. What is skipped, or waits when an
endpoint is deleted, is counted and kept as a discard in the same transaction. Counts come before changes: a change of
configuration is appended under a lock that every other one waits for.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import orjson

from dispatcher.domain.endpoint import FORCED, FOREVER, check_patterns, config_hash
from dispatcher.domain.filters import check_filters
from dispatcher.domain.ordering import OFF, parse_ordering
from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.domain.sealing import Keyring, credentials_place, draft_place, secret_place
from dispatcher.domain.shape import CREDENTIALS, SHAPE, checked, merged, shown
from dispatcher.domain.signing import SCHEMES, check_key, new_key, public_key, scheme_of, signing_in
from dispatcher.domain.text import amount
from dispatcher.domain.url import parse_url, receiver_token
from dispatcher.errors import InputError, NotFoundError, SealedError, StateError
from dispatcher.settings import Settings
from dispatcher.store import access, receivers
from dispatcher.store.credentials import open_credentials, seal_credentials
from dispatcher.store.events import Events
from dispatcher.store.migrate import ADMIN
from dispatcher.store.session import Connection

CONFIG_FIELDS = (
    "name",
    "url",
    "event_types",
    "timeout_ms",
    "rate_per_s",
    "rate_burst",
    "in_flight_max",
    "retry_schedule_s",
    "ordering",
    "filters",
    "response_control",
)
# What an endpoint has that asks for nothing; not part of the configuration's hash, as in hashes from before there was a choice.
OPTIONS: dict[str, Any] = {"ordering": OFF, "filters": {}, "response_control": False}
DEFAULTS: dict[str, Any] = {
    "name": "", "event_types": ["*"], "timeout_ms": 10_000, "rate_per_s": None, "rate_burst": None, "in_flight_max": None,
    "retry_schedule_s": None, **OPTIONS,
}  # fmt: skip
_PLAIN_FIELDS = (*CONFIG_FIELDS, *SHAPE)
_RANGES = {
    "timeout_ms": (100, 60_000, "milliseconds"),
    "rate_per_s": (0.001, 100_000, "POSTs a second"),
    "rate_burst": (1, 100_000, "POSTs"),
    "in_flight_max": (1, 4_000, "POSTs"),
}
WHICH = "`dispatcher endpoint list` shows which there are"
RETRIES_SHOWN_MAX = 10_000  # on a live page; who asks once, is told them all
COUNTED_MAX = 1_000_000  # what a person is told before deciding; a discard is counted to its end
SECRETS_MAX = 5  # of a scheme that sign at a time: each costs a signature and 48 bytes of header a POST
OVERLAP_S = 86_400.0  # a day to bring a receiver to its new secret
OVERLAP_MAX_S = 30 * 86_400.0
STOPPED_S = 1.2  # no POST starts later than a second after a pause, and its result is recorded soon after it ended

Choice = Literal["send", "skip"]
Interval = tuple[str, int, int, str | None]  # pattern, since_id, until_id, what its filters come to

# What a row of `details` has of each, in order.
_SUBSCRIPTION = ("pattern", "since_id", "until_id", "taken_up", "rule")
_OPEN_RUN = ("id", "source", "state", "total", "attempted", "delivered", "dead", "created_at")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Stands:
    """How an endpoint stands: what changes from one second to the next. `retries` beyond RETRIES_SHOWN_MAX are one more than that."""

    endpoint_id: int
    account_id: str
    state: str
    failing_since: datetime | None
    backlog: int
    retries: int
    next_retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret, or private key, that signs now; until `expires_at`, if it was rotated."""

    keyring: Keyring
    place: str
    scheme: str
    stored: str = field(repr=False)
    public_key: str | None
    created_at: datetime
    expires_at: datetime | None

    @property
    def secret(self) -> str:
        """Open it. Raises SealedError."""
        return self.keyring.open(self.stored, self.place)


@dataclass(frozen=True, slots=True)
class EndpointView:
    """One endpoint as people see it. `config` is in force; `proposed` is an edit that waits for its test. Both without credentials, which
    are opened when they are asked for; that, as all that needs them, raises SealedError without their key."""

    id: int
    account_id: str
    state: str
    state_reason: str | None
    state_changed_at: datetime
    paused_at_id: int | None
    config: dict[str, Any]
    proposed: dict[str, Any] | None
    signing: tuple[Secret, ...]  # the newest first
    tested_hash: str | None
    failing_since: datetime | None
    backlog: int
    retries: int
    dead_letters: int
    expired: int  # in the last 24 hours, because their events' expires_at had passed
    created_at: datetime
    next_retry_at: datetime | None
    read_at: datetime
    keyring: Keyring = field(repr=False)
    stored_credentials: str | None = field(repr=False)
    stored_proposal: str | None = field(repr=False)  # its credentials

    @property
    def stands(self) -> Stands:
        return Stands(
            self.id, self.account_id, self.state, self.failing_since, self.backlog, self.retries, self.next_retry_at
        )

    @property
    def held_since_id(self) -> int | None:
        """The id after which its events are held, or skipped; None if neither."""
        return (self.paused_at_id or 0) if self.state in ("paused", "disabled") else None

    @property
    def secrets(self) -> tuple[str, ...]:
        return tuple(secret.secret for secret in self.signing)

    @property
    def public_keys(self) -> tuple[str, ...]:
        """What receivers check asymmetric signatures with, the newest first."""
        return tuple(secret.public_key for secret in self.signing if secret.public_key is not None)

    @property
    def credentials(self) -> dict[str, Any]:
        return open_credentials(self.stored_credentials, credentials_place(self.id), self.keyring)

    @property
    def proposed_credentials(self) -> dict[str, Any]:
        return open_credentials(self.stored_proposal, draft_place(self.id), self.keyring)

    @property
    def extra_keys(self) -> tuple[str | None, str | None]:
        """The key of the extra signature that is in force, and that of the edit that waits, where it has another."""
        now = self.credentials["extra_signature_key"]
        then = None if self.proposed is None else self.proposed_credentials["extra_signature_key"]
        return now, None if then == now else then

    @property
    def to_test(self) -> dict[str, Any]:
        """The configuration that a test is about, with its credentials."""
        if self.proposed is None:
            return self.config | self.credentials
        return self.proposed | self.proposed_credentials

    @property
    def test_hash(self) -> str:
        """Of what decides what is sent where. Of the secrets the newest only: that an older one expires takes nothing back. Nobody who can
        read the hash can try out passwords on it: the secrets are in it."""
        config = self.to_test
        usual = SHAPE | CREDENTIALS | OPTIONS
        given = {name: value for name, value in config.items() if name not in usual or value != usual[name]}
        newest = [next(iter(signing_in(self.secrets, scheme)), None) for scheme in config["signing"].split(",")]
        return config_hash(given | {"secrets": newest})

    @property
    def tested(self) -> bool:
        return self.tested_hash is not None and self.tested_hash == self.test_hash

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What the proposed edit changes: field → (in force, proposed), as they may be shown."""
        if self.proposed is None:
            return {}
        changed = {
            name: (self.config[name], value) for name, value in self.proposed.items() if value != self.config[name]
        }
        now, new = self.credentials, self.proposed_credentials
        now_shown, new_shown = shown(now), shown(new)
        return changed | {name: (now_shown[name], new_shown[name]) for name in CREDENTIALS if now[name] != new[name]}

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything but the secrets. Where they can't be opened, `sealed` says why, and what needs them is None."""
        known: dict[str, Any] = dict.fromkeys((*CREDENTIALS, "changes", "tested"))
        proposed, sealed = self.proposed, None
        try:
            known |= shown(self.credentials) | {"changes": self.changes, "tested": self.tested}
            if proposed is not None:
                proposed = proposed | shown(self.proposed_credentials)
        except SealedError as exc:
            sealed = str(exc)
        return {
            "id": self.id, "account_id": self.account_id, "state": self.state, "state_reason": self.state_reason,
            "state_changed_at": self.state_changed_at, "paused_at_id": self.paused_at_id, **self.config, "proposed": proposed,
            **known, "public_keys": self.public_keys, "failing_since": self.failing_since, "backlog": self.backlog,
            "retries": self.retries, "dead_letters": self.dead_letters, "expired_24h": self.expired,
            "created_at": self.created_at, "sealed": sealed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Waiting:
    """Deliveries without an attempt: `held` since it was paused or disabled, `before` from before that (or at all, if it is neither), each
    counted up to a million and one; and those that wait for a retry. `skipping`: since it was paused, events are not held."""

    held: int
    before: int
    retries: int
    skipping: bool


@dataclass(frozen=True, slots=True)
class EndpointDetails:
    """What `show` adds to the view. `waiting` only where it is held: what a live one has before it is its backlog."""

    waiting: Waiting | None
    subscriptions: list[dict[str, Any]]
    discards: dict[str, int]  # reason → deliveries
    runs: list[dict[str, Any]]  # that haven't finished

    def as_dict(self) -> dict[str, Any]:
        waiting = self.waiting
        return {
            "held": None if waiting is None else waiting.held, "held_before": None if waiting is None else waiting.before,
            "skipping": waiting is not None and waiting.skipping, "discards": self.discards, "runs": self.runs,
            "subscriptions": self.subscriptions,
        }  # fmt: skip


class Admin:
    """`principal`: who asks. What is another account's isn't there for it."""

    def __init__(self, connection: Connection, settings: Settings, principal: Principal = OPERATOR) -> None:
        self._db = connection
        self._settings = settings
        self._keyring = settings.keyring
        self._principal = principal
        self.events = Events(connection, settings, principal)
        self._by = "by operator" if principal.is_operator else "by its account"  # reason of a state

    # ── endpoints: configuration and the gate before going live ──

    async def create(
        self, account_id: str, config: dict[str, Any], *, secret: str | None = None, live: bool = False
    ) -> EndpointView:
        """Make a draft (or, with `live`, an endpoint that gets events from now on, without a test)."""
        if not account_id or len(account_id.encode()) > 255 or _CONTROL.search(account_id):
            raise InputError("an account id has 1 to 255 bytes, and no control characters", field="account_id")
        self._principal.within(account_id)
        full = await self._checked(merged(DEFAULTS | SHAPE | CREDENTIALS, config))
        await self._check_receiver(full["url"], account_id)
        if secret is not None:
            check_key(secret, scheme_of(secret))
            if scheme_of(secret) not in full["signing"].split(","):
                raise InputError(
                    f"the secret is for scheme {scheme_of(secret)}, and this endpoint signs in {full['signing']}"
                )
        async with self._db.transaction():
            endpoint_id = await self._db.fetchval(ADMIN.insert_endpoint, account_id, *_columns(full))
            if any(full[name] != default for name, default in (SHAPE | CREDENTIALS).items()):
                await self._put_shape(endpoint_id, full)
            if secret is not None:
                await self._put_secret(endpoint_id, secret)
            await self._put_missing_keys(endpoint_id, full["signing"], () if secret is None else (scheme_of(secret),))
            if live:
                await self._put_live(endpoint_id, full, "created live", await self._last_id())
            # The insert's trigger has the configuration's lock until the commit: nobody else's is missed here.
            most = self._settings.endpoints_per_account_max
            if (
                not self._principal.is_operator
                and await self._db.fetchval(ADMIN.endpoints_of, account_id, most + 1) > most
            ):
                raise StateError(
                    f"account {account_id} has {amount(most, 'endpoint')}, the most it may have; delete one, or ask the operator"
                )
        return await self.get(endpoint_id)

    async def reveal(self, endpoint_id: int) -> EndpointView:
        """Return what `get` does to somebody who is about to show its secrets; the audit has it. Raises where they can't be opened."""
        view = await self.get(endpoint_id)
        about = f"endpoint_id={endpoint_id} account_id={view.account_id}"
        change = await access.begin_change(self._db, self._principal, "endpoint.reveal_secrets", about, "")
        status = 500
        try:
            tuple(known.secret for known in view.signing)  # each is opened when it is asked for
            status = 200
        finally:
            await access.end_change(self._db, change, status, about)
        return view

    async def get(self, endpoint_id: int) -> EndpointView:
        row = await self._db.fetchrow(ADMIN.endpoint, endpoint_id)
        if row is None or not self._principal.sees(row["account_id"]):
            raise NotFoundError(f"there is no endpoint {endpoint_id}", remedy=WHICH)
        draft: dict[str, Any] = {} if row["draft"] is None else orjson.loads(row["draft"])
        stored_proposal = draft.pop("credentials", None)
        place = secret_place(endpoint_id)
        return EndpointView(
            id=row["id"], account_id=row["account_id"], state=row["state"], state_reason=row["state_reason"],
            state_changed_at=row["state_changed_at"], paused_at_id=row["paused_at_id"], config=_config(row),
            proposed=SHAPE | {name: _config(row)[name] for name in OPTIONS} | draft if draft else None,
            signing=tuple(Secret(self._keyring, place, *s) for s in row["secrets"]),
            tested_hash=row["tested_hash"], failing_since=row["failing_since"], backlog=row["backlog"], retries=row["retries"],
            dead_letters=row["dead_letters"], expired=row["expired"], created_at=row["created_at"],
            next_retry_at=row["next_retry_at"], read_at=row["read_at"], keyring=self._keyring,
            stored_credentials=row["credentials"], stored_proposal=stored_proposal,
        )  # fmt: skip

    async def deleted(self, endpoint_id: int) -> dict[str, Any] | None:
        """Return what an endpoint was that is deleted, None if there never was one; its name and URL are kept until they are erased."""
        row = await self._db.fetchrow(ADMIN.deleted_endpoint, endpoint_id)
        return dict(row) if row is not None and self._principal.sees(row["account_id"]) else None

    async def details(self, view: EndpointView) -> EndpointDetails:
        """Read what else there is to tell of an endpoint. Counts what is held: seconds, where it is millions."""
        waiting = None if view.held_since_id is None else await self.waiting(view)
        row = await self._db.fetchrow(ADMIN.details, view.id)
        return EndpointDetails(
            waiting=waiting,
            subscriptions=[dict(zip(_SUBSCRIPTION, one, strict=True)) for one in row["subscriptions"]],
            discards=dict(row["discards"]),
            runs=[dict(zip(_OPEN_RUN, one, strict=True)) for one in row["runs"]],
        )

    async def stands(self, endpoint_ids: Sequence[int]) -> list[Stands]:
        """Return how endpoints stand now, but those that are deleted; whose they are, was asked before."""
        return [Stands(**row) for row in await self._db.fetch(ADMIN.stands, endpoint_ids, RETRIES_SHOWN_MAX + 1)]

    async def expired_24h(self, endpoint_ids: Sequence[int]) -> dict[int, int]:
        """Return how many deliveries were settled unsent in 24 hours, of those endpoints that had any attempt."""
        return {row["endpoint_id"]: row["expired"] for row in await self._db.fetch(ADMIN.expired_24h, endpoint_ids)}

    async def now(self) -> datetime:
        now: datetime = await self._db.fetchval(ADMIN.now)
        return now

    async def endpoints(
        self, account_id: str | None, state: str | None, *, after: int = 0, limit: int = 1_000
    ) -> list[dict[str, Any]]:
        return [
            dict(row)
            for row in await self._db.fetch(ADMIN.endpoints, self._principal.within(account_id), state, after, limit)
        ]

    async def update(self, endpoint_id: int, changes: dict[str, Any], *, live: bool = False) -> EndpointView:
        """Edit a draft in place; propose the edit of any other endpoint, or with `live` put it in force at once. An edit that leads back to
        what is in force is withdrawn."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            full = await self._checked(merged(view.to_test, changes))
            if full["url"] != view.to_test["url"]:
                await self._check_receiver(full["url"], view.account_id)
            await self._put_missing_keys(endpoint_id, full["signing"], [secret.scheme for secret in view.signing])
            if view.state == "draft":
                await self._put_config(endpoint_id, full)
            elif live:
                await self._apply(view, full, "edited live")
            elif full == view.config | view.credentials:
                await self._db.execute(ADMIN.put_draft, endpoint_id, None)
            else:
                draft = {name: full[name] for name in _PLAIN_FIELDS}
                draft["credentials"] = await self._sealed_credentials(full, draft_place(endpoint_id))
                await self._db.execute(ADMIN.put_draft, endpoint_id, orjson.dumps(draft).decode())
        return await self.get(endpoint_id)

    async def go_live(self, endpoint_id: int, *, force: bool = False) -> EndpointView:
        """Put a draft, or a proposed edit, in force, if its exact configuration has passed its test. `force`: if not, say so in its record."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state != "draft" and view.proposed is None:
                raise StateError(
                    f"endpoint {endpoint_id} is {view.state} and has no edit that waits; there is nothing to put live"
                )
            if not view.tested and not force:
                raise StateError(
                    f"this configuration of endpoint {endpoint_id} has not passed a test",
                    remedy=f"run `dispatcher endpoint test {endpoint_id}` first",
                )
            if view.state == "draft":
                reason = None if view.tested else FORCED
                await self._put_live(endpoint_id, view.config, reason, await self._last_id())
            else:
                await self._apply(view, view.to_test, None if view.tested else f"edit {FORCED}")
        return await self.get(endpoint_id)

    async def record_test(
        self, view: EndpointView, *, passed: bool, duration_us: int, status: int | None, fault: str | None, verdict: str, request: bytes,
        response_head: bytes | None, event_type: str = "endpoint.test", at_fault: str | None = None,
        timing: dict[str, float | None] | None = None, response_body: bytes | None = None,
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
                event_type,
                at_fault,
                orjson.dumps(timing or {}).decode(),
                response_body,
            )
            if passed:
                await self._db.execute(ADMIN.put_tested, view.id, view.test_hash)

    async def rotate_secret(
        self, endpoint_id: int, *, overlap_s: float = OVERLAP_S, secret: str | None = None, scheme: str | None = None
    ) -> EndpointView:
        """Give an endpoint a new secret, or key, for `scheme` (that of `secret`, else the first it signs in). The old ones sign too for
        `overlap_s` from now, or until they expire if that is sooner."""
        if not 0 <= overlap_s <= OVERLAP_MAX_S:
            raise InputError(f"the overlap is {overlap_s:g} s; it must be 0 to {OVERLAP_MAX_S / 86_400:g} days")
        if scheme not in (None, *SCHEMES):
            raise InputError(f"{scheme!r} is not a signature scheme; use {' or '.join(SCHEMES)}")
        if secret is not None:
            scheme = scheme or scheme_of(secret)
            check_key(secret, scheme)
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            scheme = scheme or view.config["signing"].split(",")[0]
            signing = [known for known in view.signing if known.scheme == scheme]
            if secret is not None and secret in [known.secret for known in signing]:
                raise InputError(
                    f"endpoint {endpoint_id} has this secret already", remedy="leave out --secret for a new one"
                )
            if overlap_s and len(signing) >= SECRETS_MAX:
                raise StateError(
                    f"endpoint {endpoint_id} has {len(signing)} secrets that sign, which is the most; "
                    "wait until one of them expires, or end them all at once with an overlap of 0",
                    remedy="`endpoint show --secret` tells when they expire",
                )
            await self._db.execute(ADMIN.expire_secrets, endpoint_id, overlap_s, scheme)
            await self._put_secret(endpoint_id, secret or new_key(scheme))
            await self._db.execute(ADMIN.forget_expired_secrets, endpoint_id)
        return await self.get(endpoint_id)

    # ── endpoints: holding, sending, skipping ──

    async def pause(self, endpoint_id: int, *, skip: bool = False) -> EndpointView:
        """Stop deliveries within a second. Events are held from now on, and sent on resume; or with `skip`, never sent."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state != "live":
                raise StateError(f"endpoint {endpoint_id} is {view.state}; only live endpoints can be paused")
            at = await self._last_id()
            await self._db.execute(ADMIN.put_state, endpoint_id, "paused", self._by, at)
            if skip:
                await self._db.execute(ADMIN.close_subscriptions, endpoint_id, [], at)
        return await self.get(endpoint_id)

    async def resume(self, endpoint_id: int, choice: Choice | None = None) -> tuple[EndpointView, int]:
        """Go on after a pause: send what was held, oldest first, or skip it. Return how many deliveries were skipped."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state == "disabled":
                raise StateError(
                    f"endpoint {endpoint_id} is disabled", remedy=f"use `dispatcher endpoint enable {endpoint_id}`"
                )
            if view.state != "paused":
                raise StateError(f"endpoint {endpoint_id} is {view.state}; only paused endpoints can be resumed")
            skipped = await self._put_live_again(view, choice)
        return await self.get(endpoint_id), skipped

    async def disable(self, endpoint_id: int, reason: str | None = None) -> EndpointView:
        """Stop deliveries as if it had failed for days: events are held until somebody enables it, and its account is told."""
        if reason is not None and (not reason.isprintable() or not 1 <= len(reason) <= 200):
            raise InputError("a reason has 1 to 200 printable characters")
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state not in ("live", "paused"):
                raise StateError(
                    f"endpoint {endpoint_id} is {view.state}; only live and paused endpoints can be disabled"
                )
            at = await self._last_id()
            await self._db.execute(ADMIN.put_state, endpoint_id, "disabled", reason or self._by, at)
            await self._tell(view, "endpoint.disabled", "by_operator")
        return await self.get(endpoint_id)

    async def enable(self, endpoint_id: int, choice: Choice | None = None) -> tuple[EndpointView, int]:
        """Put a disabled endpoint live again and tell its account. Where events were held somebody must choose: send or skip them."""
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            if view.state != "disabled":
                remedy = {"draft": "go-live", "paused": "resume"}.get(view.state)
                raise StateError(
                    f"endpoint {endpoint_id} is {view.state}; only disabled endpoints can be enabled",
                    remedy=f"use `dispatcher endpoint {remedy} {endpoint_id}`" if remedy else None,
                )
            if choice is None:
                waiting = await self.waiting(view)
                if waiting.held:
                    raise StateError(
                        f"endpoint {endpoint_id} has held events since it was disabled ({counted(waiting.held)}): "
                        "choose whether to send or to skip them",
                        remedy="say --send to send them, oldest first, or --skip never to send them",
                    )
            skipped = await self._put_live_again(view, choice)
            await self._tell(view, "endpoint.recovered", "enabled")
        return await self.get(endpoint_id), skipped

    async def waiting(self, view: EndpointView) -> Waiting:
        """Count what an endpoint is owed and has not had; each count stops after a million."""
        at = await self._last_id()
        intervals = await self._intervals(view.id)
        skipping = _is_skipping(view, intervals)
        held, before_id = 0, at
        if view.held_since_id is not None:
            before_id = view.held_since_id
            held, _ = await self._count(view, _above(before_id, at), intervals, COUNTED_MAX + 1)
        unsettled = await self._db.fetchval(ADMIN.unsettled, view.id, before_id)
        before, _ = await self._count(view, unsettled, intervals, COUNTED_MAX + 1)
        return Waiting(held, before, view.retries, skipping)

    async def delete(self, endpoint_id: int) -> int:
        """Delete an endpoint; what waits for it is never sent. Return how many deliveries that were, with those in flight at that moment.

        A live one for which something waits is paused first: else what is sent while it is counted would count as discarded too."""
        if (view := await self.get(endpoint_id)).state == "live" and await self._is_owed(view):
            await self.pause(endpoint_id)
            await asyncio.sleep(STOPPED_S)
        async with self._db.transaction():
            view = await self._locked(endpoint_id)
            at = await self._last_id()
            intervals = await self._intervals(endpoint_id)
            unsettled = await self._db.fetchval(ADMIN.unsettled, endpoint_id, at)
            waiting, first_id = await self._count(view, unsettled, intervals, None)
            retries = await self._db.fetchrow(ADMIN.retries, endpoint_id)
            if _is_skipping(view, intervals):
                await self._skip_unheld(view, at)
            await self._db.execute(ADMIN.put_state, endpoint_id, "deleted", self._by, at)
            await self._db.execute(ADMIN.cancel_runs, endpoint_id)
            await self._db.execute(ADMIN.delete_subscriptions, endpoint_id)
            await self._db.execute(ADMIN.delete_secrets, endpoint_id)
            await self._db.execute(ADMIN.forget_credentials, endpoint_id)
            discarded: int = waiting + retries["deliveries"]
            lowest = min((i for i in (first_id, retries["first_id"]) if i is not None), default=at)
            await self._discard(view, "deleted", lowest - 1, at, discarded)
        return discarded

    async def _is_owed(self, view: EndpointView) -> bool:
        unsettled = await self._db.fetchval(ADMIN.unsettled, view.id, await self._last_id())
        deliveries, _ = await self._count(view, unsettled, await self._intervals(view.id), 1)
        return deliveries > 0

    async def _put_live_again(self, view: EndpointView, choice: Choice | None) -> int:
        """Open what is closed, skip what was held if that is the choice; return how many deliveries were skipped."""
        at, since = await self._last_id(), view.held_since_id
        assert since is not None, "it is paused or disabled"
        intervals = await self._intervals(view.id)
        skipped = 0
        if _is_skipping(view, intervals):
            if choice == "send":
                raise StateError(
                    f"endpoint {view.id} was paused so that events since then were not held: there is nothing to send",
                    remedy="leave out --send",
                )
            skipped = await self._skip_unheld(view, at)
        elif choice == "skip":
            skipped, _ = await self._count(view, _above(since, at), intervals, None)
            await self._discard(view, "skipped", since, at, skipped)
            await self._db.execute(ADMIN.skip_held, view.id, since)
        await self._put_live(view.id, view.config, None, at)
        return skipped

    async def _skip_unheld(self, view: EndpointView, at: int) -> int:
        """Count what nobody was subscribed to because the pause said so."""
        since = view.held_since_id
        assert since is not None, "it is paused or disabled"
        rule = await self._db.fetchval(ADMIN.rule, view.id)
        would_have = [(pattern, since, at, rule) for pattern in view.config["event_types"]]
        skipped, _ = await self._count(view, _above(since, at), would_have, None)
        await self._discard(view, "skipped", since, at, skipped)
        return skipped

    async def _count(
        self, view: EndpointView, ids: str, intervals: Sequence[Interval], limit: int | None
    ) -> tuple[int, int | None]:
        """Count events without an attempt in a multirange of ids; return the lowest too."""
        *columns, rules = [list(column) for column in zip(*intervals, strict=True)] or [[], [], [], []]
        row = await self._db.fetchrow(ADMIN.held, view.account_id, view.id, ids, *columns, limit, rules)
        return row["deliveries"], row["first_id"]

    async def _discard(self, view: EndpointView, reason: str, after_id: int, upto_id: int, deliveries: int) -> None:
        if deliveries:
            await self._db.execute(ADMIN.insert_discard, view.id, reason, after_id, upto_id, deliveries)

    async def _intervals(self, endpoint_id: int) -> list[Interval]:
        rows = await self._db.fetch(ADMIN.subscriptions, endpoint_id)
        return [
            (row["pattern"], row["since_id"], FOREVER if row["until_id"] is None else row["until_id"], row["rule"])
            for row in rows
        ]

    async def _tell(self, view: EndpointView, event_type: str, reason: str) -> None:
        """Tell the account's other endpoints."""
        await self._db.execute(ADMIN.tell_of_endpoint, view.id, event_type, reason, view.failing_since)

    async def _last_id(self) -> int:
        last_id: int = await self._db.fetchval(ADMIN.last_id)
        return last_id

    async def _locked(self, endpoint_id: int) -> EndpointView:
        await self._db.fetchval(ADMIN.lock_endpoint, endpoint_id)
        return await self.get(endpoint_id)

    async def _put_live(self, endpoint_id: int, config: dict[str, Any], reason: str | None, at: int) -> None:
        await self._db.execute(ADMIN.put_state, endpoint_id, "live", reason, at)
        await self._db.execute(ADMIN.open_subscriptions, endpoint_id, config["event_types"], at)

    async def _apply(self, view: EndpointView, config: dict[str, Any], reason: str | None) -> None:
        """Put an edit in force. A state other than live keeps its reason, with this one behind it."""
        at = await self._last_id()
        skipping = _is_skipping(view, await self._intervals(view.id))
        await self._put_config(view.id, config)
        if view.state == "live":
            await self._db.execute(ADMIN.put_reason, view.id, reason)
        elif reason is not None:
            await self._db.execute(ADMIN.put_reason, view.id, f"{view.state_reason or view.state}; {reason}")
        # Other filters are other subscriptions: what was handed out up to now is still owed by the old ones.
        kept = config["event_types"] if config["filters"] == view.config["filters"] else []
        await self._db.execute(ADMIN.close_subscriptions, view.id, kept, at)
        if not skipping:
            await self._db.execute(ADMIN.open_subscriptions, view.id, config["event_types"], at)

    async def _put_config(self, endpoint_id: int, config: dict[str, Any]) -> None:
        await self._db.execute(ADMIN.put_config, endpoint_id, *_columns(config))
        await self._put_shape(endpoint_id, config)

    async def _put_shape(self, endpoint_id: int, config: dict[str, Any]) -> None:
        credentials = await self._sealed_credentials(config, credentials_place(endpoint_id))
        await self._db.execute(ADMIN.put_shape, endpoint_id, *(config[name] for name in SHAPE), credentials)

    async def _put_secret(self, endpoint_id: int, secret: str) -> None:
        scheme = scheme_of(secret)
        await self._check_may_store()
        sealed = self._keyring.seal(secret, secret_place(endpoint_id))
        public = public_key(secret) if scheme == "v1a" else None
        await self._db.execute(ADMIN.insert_secret, endpoint_id, scheme, sealed, public)

    async def _sealed_credentials(self, config: dict[str, Any], place: str) -> str | None:
        stored = seal_credentials(config, place, self._keyring)
        if stored is not None:
            await self._check_may_store()
        return stored

    async def _check_may_store(self) -> None:
        """Refuse to put plain text beside what is encrypted: this process has not been given the key."""
        if self._keyring.first_id is None and await self._db.fetchval(ADMIN.has_sealed):
            raise SealedError(
                "the secrets in this database are encrypted, and this command has no key: set DISPATCHER_ENCRYPTION_KEYS or "
                "DISPATCHER_ENCRYPTION_KEYS_FILE as the dispatcher has it"
            )

    async def _put_missing_keys(self, endpoint_id: int, signing: str, has: Sequence[str]) -> None:
        """Give the endpoint a key for each scheme that it is to sign in and has none for: its receiver needs it before it goes live."""
        for scheme in signing.split(","):
            if scheme not in has:
                await self._put_secret(endpoint_id, new_key(scheme))

    async def _checked(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration in its one form, or refuse it with a sentence."""
        config = dict(config)
        if "url" not in config:
            raise InputError("an endpoint needs a URL")
        try:
            config["url"] = parse_url(config["url"], self._settings.address_policy).url
        except InputError as exc:
            raise InputError(exc.message, field="url") from exc
        config["event_types"] = list(check_patterns(config["event_types"]))
        if len(config["name"]) > 200 or not config["name"].isprintable():
            raise InputError("an endpoint's name has at most 200 printable characters")
        if config["filters"]:
            known = [row["name"] for row in await self._db.fetch(ADMIN.filter_names)]
            config["filters"] = check_filters(config["filters"], known)
        for name, (low, high, unit) in _RANGES.items():
            value = config[name]
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value}; it must be {low:g} to {high:g} {unit}")
        if config["rate_burst"] is not None and config["rate_per_s"] is None:
            raise InputError("rate_burst means nothing without rate_per_s; give both", field="rate_burst")
        parse_ordering(config["ordering"])
        schedule = config["retry_schedule_s"]
        if schedule is not None and not (1 <= len(schedule) <= 50 and all(1 <= wait <= 2_592_000 for wait in schedule)):
            raise InputError("a retry schedule has 1 to 50 waits of 1 second to 30 days, such as 5,30,120")
        return config | checked(config)

    async def _check_receiver(self, url: str, account_id: str) -> None:
        """Refuse the address of a built-in receiver that isn't this account's, or has ended."""
        policy = self._settings.address_policy
        token = receiver_token(parse_url(url, policy), policy.receiver)
        if token is None:
            return
        found = await receivers.by_token(self._db, token)
        if found is None or found[1] != account_id:
            raise InputError(
                "this is the address of a built-in receiver that has ended, or of none of this account", field="url"
            )


def _columns(config: dict[str, Any]) -> list[Any]:
    """Return a configuration as the statements take it."""
    return [orjson.dumps(config[field]).decode() if field == "filters" else config[field] for field in CONFIG_FIELDS]


def _config(row: Any) -> dict[str, Any]:
    return {field: orjson.loads(row[field]) if field == "filters" else row[field] for field in _PLAIN_FIELDS}


def counted(deliveries: int) -> str:
    """Say a count that stops after a million."""
    return f"more than {COUNTED_MAX:,}" if deliveries > COUNTED_MAX else f"{deliveries:,}"


def _is_skipping(view: EndpointView, intervals: Sequence[Interval]) -> bool:
    """Tell whether the pause closed the subscriptions. One that holds leaves at least one open: an endpoint has some event type."""
    return view.held_since_id is not None and all(until_id < FOREVER for _, _, until_id, _ in intervals)


def _above(after_id: int, upto_id: int) -> str:
    return f"{{({after_id},{max(after_id, upto_id)}]}}"


__all__ = ["Admin", "Choice", "EndpointDetails", "EndpointView", "Waiting", "counted"]
