"""What people do to endpoints, as transactions: for the command line, the API and the panel. To events: store/events.py.

What an endpoint is: store/endpoint.py. A draft endpoint is edited in place; an edit of any other is kept in `draft` beside
the configuration in force until its own test has passed and it goes live. A passed test belongs to one exact configuration,
by its hash, the newest secret included.

What an endpoint is owed is decided by its subscriptions' bounds alone. A pause leaves them open: events are held. To skip
is to close them where the pause began and to open new ones now; what was handed out before the pause is owed in either
case. A pause that skips closes them at once, and that is how it is known later. What is skipped, or waits when an
endpoint is deleted, is counted and kept as a discard in the same transaction. Counts come before changes: a change of
configuration is appended under a lock that every other one waits for.
"""

import asyncio
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from dispatcher.domain.endpoint import FORCED, FOREVER, check_patterns
from dispatcher.domain.filters import check_filters
from dispatcher.domain.ordering import parse_ordering
from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.domain.sealing import credentials_place, draft_place, secret_place
from dispatcher.domain.shape import CREDENTIALS, SHAPE, checked, merged
from dispatcher.domain.signing import SCHEMES, check_key, new_key, public_key, scheme_of
from dispatcher.domain.text import amount
from dispatcher.domain.url import parse_url, receiver_token
from dispatcher.errors import InputError, NotFoundError, SealedError, StateError
from dispatcher.settings import Settings
from dispatcher.store import access, receivers
from dispatcher.store.credentials import seal_credentials
from dispatcher.store.endpoint import (
    COUNTED_MAX,
    DEFAULTS,
    PLAIN_FIELDS,
    RETRIES_SHOWN_MAX,
    EndpointDetails,
    EndpointView,
    Stands,
    Waiting,
    columns_of,
    counted,
)
from dispatcher.store.events import Events
from dispatcher.store.migrate import ADMIN
from dispatcher.store.session import Connection

_RANGES = {
    "timeout_ms": (100, 60_000, "milliseconds"),
    "rate_per_s": (0.001, 100_000, "POSTs a second"),
    "rate_burst": (1, 100_000, "POSTs"),
    "in_flight_max": (1, 4_000, "POSTs"),
}
WHICH = "`dispatcher endpoint list` shows which there are"
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
            endpoint_id = await self._db.fetchval(ADMIN.insert_endpoint, account_id, *columns_of(full))
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
        return EndpointView.of(row, self._keyring)

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
                self._check_credentials_may_follow(view.to_test, full, changes)
            await self._put_missing_keys(endpoint_id, full["signing"], [secret.scheme for secret in view.signing])
            if view.state == "draft":
                await self._put_config(endpoint_id, full)
            elif live:
                await self._apply(view, full, "edited live")
            elif full == view.config | view.credentials:
                await self._db.execute(ADMIN.put_draft, endpoint_id, None)
            else:
                draft = {name: full[name] for name in PLAIN_FIELDS}
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
        await self._db.execute(ADMIN.put_config, endpoint_id, *columns_of(config))
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

    def _check_credentials_may_follow(
        self, before: dict[str, Any], full: dict[str, Any], changes: dict[str, Any]
    ) -> None:
        """Refuse to send what nobody is shown to a server that whoever edits has chosen: it would be shown there. Operators may."""
        if self._principal.is_operator or _server(before["url"]) == _server(full["url"]):
            return
        given = {name.lower() for name in changes.get("headers") or ()}
        kept = [name for name in full["headers"] if name not in given]
        kept += [name for name in ("basic", "bearer") if full[name] is not None and changes.get(name) is None]
        if kept:
            raise InputError(
                f"the URL leads to another server, which would be sent what the endpoint has of {', '.join(sorted(kept))}: give that again, "
                "or take it out",
                field="url",
            )

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


def _server(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.lower()


def _is_skipping(view: EndpointView, intervals: Sequence[Interval]) -> bool:
    """Tell whether the pause closed the subscriptions. One that holds leaves at least one open: an endpoint has some event type."""
    return view.held_since_id is not None and all(until_id < FOREVER for _, _, until_id, _ in intervals)


def _above(after_id: int, upto_id: int) -> str:
    return f"{{({after_id},{max(after_id, upto_id)}]}}"
