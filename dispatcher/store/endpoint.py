"""An endpoint as people see it: its configuration, how it stands, and what else there is to tell. What is done to it: store/admin.py.

An endpoint's *configuration* is a plain dict: `CONFIG_FIELDS`, and what shapes its requests (domain/shape.py), of which the
credentials are sealed in the database and opened only where they are needed: without their key an endpoint can still be
shown, paused and deleted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from dispatcher.domain.endpoint import config_hash
from dispatcher.domain.ordering import OFF
from dispatcher.domain.sealing import Keyring, credentials_place, draft_place, secret_place
from dispatcher.domain.shape import CREDENTIALS, SHAPE, shown
from dispatcher.domain.signing import signing_in
from dispatcher.errors import SealedError
from dispatcher.store.credentials import open_credentials

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
PLAIN_FIELDS = (*CONFIG_FIELDS, *SHAPE)
RETRIES_SHOWN_MAX = 10_000  # on a live page; who asks once, is told them all
COUNTED_MAX = 1_000_000  # what a person is told before deciding; a discard is counted to its end


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

    @classmethod
    def of(cls, row: Mapping[str, Any], keyring: Keyring) -> "EndpointView":
        """Make it of a row of `endpoint` (store/admin.sql)."""
        draft: dict[str, Any] = {} if row["draft"] is None else orjson.loads(row["draft"])
        stored_proposal = draft.pop("credentials", None)
        place, config = secret_place(row["id"]), _config(row)
        return cls(
            id=row["id"], account_id=row["account_id"], state=row["state"], state_reason=row["state_reason"],
            state_changed_at=row["state_changed_at"], paused_at_id=row["paused_at_id"], config=config,
            proposed=SHAPE | {name: config[name] for name in OPTIONS} | draft if draft else None,
            signing=tuple(Secret(keyring, place, *s) for s in row["secrets"]),
            tested_hash=row["tested_hash"], failing_since=row["failing_since"], backlog=row["backlog"], retries=row["retries"],
            dead_letters=row["dead_letters"], expired=row["expired"], created_at=row["created_at"],
            next_retry_at=row["next_retry_at"], read_at=row["read_at"], keyring=keyring,
            stored_credentials=row["credentials"], stored_proposal=stored_proposal,
        )  # fmt: skip

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


def columns_of(config: dict[str, Any]) -> list[Any]:
    """Return a configuration as the statements take it."""
    return [orjson.dumps(config[field]).decode() if field == "filters" else config[field] for field in CONFIG_FIELDS]


def _config(row: Any) -> dict[str, Any]:
    return {field: orjson.loads(row[field]) if field == "filters" else row[field] for field in PLAIN_FIELDS}


def counted(deliveries: int) -> str:
    """Say a count that stops after a million."""
    return f"more than {COUNTED_MAX:,}" if deliveries > COUNTED_MAX else f"{deliveries:,}"
