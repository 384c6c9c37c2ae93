"""Endpoints, their tests, secrets and figures.

An option of endpoints is added in one place, `EndpointOptions`; a test holds it to store/endpoint.py's."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from dispatcher.store.admin import OVERLAP_MAX_S, OVERLAP_S
from dispatcher.web.api.models.base import AccountId, Answer, Choice, EventTypeName, Given, Line, Moment, Paged, Pattern

Url = Annotated[
    str, StringConstraints(min_length=8, max_length=2_048, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://[^\x00-\x20\x7f]+$")
]
Short = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Credential = Annotated[str, StringConstraints(min_length=1, max_length=4_096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Pem = Annotated[str, StringConstraints(min_length=1, max_length=32_768, pattern=r"^[^\x00]+$")]


class PlainOptions(BaseModel):
    """What an endpoint can be configured to, and may be shown. Null: the default of the installation."""

    name: Line = Field("", description="A name for people.")
    event_types: list[Pattern] = Field(
        ["*"], min_length=1, max_length=100, description="Exact types, prefixes (message.*), or * for all."
    )
    timeout_ms: int = Field(10_000, ge=100, le=60_000, description="Bound on one POST.")
    rate_per_s: float | None = Field(None, ge=0.001, le=100_000, description="POSTs a second at most.")
    rate_burst: int | None = Field(
        None, ge=1, le=100_000, description="POSTs at once after a quiet time; needs rate_per_s."
    )
    in_flight_max: int | None = Field(None, ge=1, le=4_000, description="POSTs in flight at most.")
    retry_schedule_s: list[Annotated[int, Field(ge=1, le=2_592_000)]] | None = Field(
        None, min_length=1, max_length=50, description="Waits between attempts in seconds."
    )
    ordering: Annotated[str, StringConstraints(pattern=r"^(off|block|give_up_after [1-9][0-9]?)$")] = Field(
        "off", description="Of events with an ordering key: off, block, or give_up_after N attempts."
    )
    filters: dict[Short, Annotated[list[Short], Field(min_length=1, max_length=100)]] = Field(
        {}, max_length=10, description="Field of the catalogue's → values: any of a list, and all of the fields."
    )
    response_control: bool = Field(False, description="Obey webhook-delivery: disable | abort-message in answers.")
    signing: Literal["v1", "v1a", "v1,v1a"] = Field("v1", description="Signature schemes: v1 HMAC, v1a Ed25519.")
    body_format: Literal["envelope", "payload"] = "envelope"
    omit: list[Short] = Field([], max_length=32, description="JSON pointers to what `data` is sent without.")
    extra_signature: Short | None = Field(
        None,
        description="A signature of the receiver's own kind besides: hex:HEADER, hex:HEADER:PREFIX or timestamped:HEADER.",
    )


class Credentials(BaseModel):
    """What requests are authenticated with. Kept encrypted where the installation has a key for it, and never shown again."""

    headers: dict[Short, Credential | None] | None = Field(
        None,
        max_length=40,
        description="Custom headers, changed one by one; null takes one out, and null for all of them takes all out.",
    )
    basic: Credential | None = Field(None, description="Basic authentication, user:password.")
    bearer: Credential | None = Field(None, description="A bearer token.")
    client_certificate: Pem | None = Field(None, description="For TLS, in PEM form, with its client_key.")
    client_key: Pem | None = None
    extra_signature_key: Credential | None = Field(None, description="Left out: a new one.")


class EndpointOptions(PlainOptions, Credentials, Given):
    """What comes in."""


class EndpointConfig(PlainOptions, Answer):
    """A configuration as it is kept. Of what is secret, names only."""

    url: str
    headers: dict[str, str] | None = Field(None, description="Names; the values are hidden.")
    basic: str | None = None
    bearer: str | None = None
    client_certificate: Any = Field(None, description="What the certificate says of itself.")
    client_key: str | None = None
    extra_signature_key: str | None = None


class NewEndpoint(EndpointOptions):
    account_id: AccountId | None = Field(None, description="Whose it is. May be left out with an account's own key.")
    url: Url = Field(description="Where it receives: https://…")
    secret: Annotated[str, StringConstraints(max_length=200, pattern=r"^wh[a-z]+_[A-Za-z0-9+/]+={0,2}$")] | None = (
        Field(None, description="Signing secret (whsec_…) or private key (whsk_…); left out: a new one.")
    )
    live: bool = Field(False, description="Live at once, without a test. Operators only.")


class EndpointChange(EndpointOptions):
    """What isn't named stays as it is."""

    url: Url | None = None
    live: bool = Field(False, description="In force at once, without a test. Operators only.")


class StatsAnswer(Answer):
    """Counts of attempts; `dead`: deliveries given up. Percentiles are the upper ends of buckets in powers of two."""

    delivered: int
    failed: int
    dead: int
    success_rate: float | None
    mean_ms: float | None
    p50_ms: int | None
    p95_ms: int | None
    p99_ms: int | None


class EndpointRow(Answer):
    """An endpoint in a list."""

    id: int
    account_id: str
    name: str
    url: str
    event_types: list[str]
    state: str
    state_reason: str | None
    failing: bool = Field(description="Live, and without a success since `failing_since`.")
    failing_since: datetime | None
    has_draft: bool = Field(description="An edit waits for its test.")
    backlog: int
    stats_24h: StatsAnswer | None = Field(None, description="With ?stats=true.")


class EndpointAnswer(EndpointConfig):
    """An endpoint. Its configuration in force is beside `proposed`, an edit that waits for its test."""

    id: int
    account_id: str
    state: str = Field(description="draft, live, paused, disabled.")
    state_reason: str | None
    state_changed_at: datetime
    proposed: EndpointConfig | None
    tested: bool | None = Field(
        description="What would go live has passed its test, in exactly this configuration. Null: it can't be told, see sealed."
    )
    public_keys: list[str] = Field(description="What receivers check v1a signatures with, the newest first.")
    sealed: str | None = Field(description="Why its secrets can't be opened, if they can't.")
    failing_since: datetime | None
    backlog: int
    retries: int
    dead_letters: int
    expired_24h: int = Field(description="Deliveries settled unsent in 24 hours, because their events had expired.")
    created_at: datetime


class CreatedEndpoint(EndpointAnswer):
    secret: str | None = Field(description="What its receiver verifies v1 signatures with.")


class Discards(Answer):
    expired: int = 0
    skipped: int = 0
    deleted: int = 0
    erased: int = 0


class Subscription(Answer):
    pattern: str
    since_id: int
    until_id: int | None


class EndpointDetails(EndpointAnswer):
    held: int | None = Field(
        description="Events held since it was paused or disabled; counted up to a million and one. Null: it isn't."
    )
    held_before: int | None = Field(description="From before that, and not tried yet.")
    skipping: bool = Field(description="Since it was paused, its events are not held.")
    discards: Discards = Field(description="What is never sent, by reason.")
    subscriptions: list[Subscription]


class EndpointFilter(Paged):
    account_id: AccountId | None = None
    state: Literal["draft", "live", "paused", "disabled"] | None = None
    stats: bool = Field(False, description="With the figures of 24 hours.")


class Pausing(Given):
    skip: bool = Field(False, description="Events from now on are not held: they are never sent.")


class Resuming(Given):
    choice: Choice | None = Field(
        None, description="What to do with what was held. Enabling needs it where something was."
    )


class Disabling(Given):
    reason: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = (
        None
    )


class GoingLive(Given):
    force: bool = Field(False, description="Without a passed test. Operators only; its record says so.")


class ResumedEndpoint(EndpointAnswer):
    skipped: int = Field(description="Deliveries that were held and are never sent.")


class DeletedEndpoint(Answer):
    id: int
    discarded: int = Field(description="Deliveries that waited and are never sent.")


class Rotating(Given):
    overlap_s: float = Field(OVERLAP_S, ge=0, le=OVERLAP_MAX_S, description="How long the old secret signs too.")


class SecretAnswer(Answer):
    scheme: str
    secret: str | None = Field(description="Of v1; a private key is not revealed.")
    public_key: str | None = Field(description="Of v1a.")
    created_at: datetime
    expires_at: datetime | None


class SecretsAnswer(Answer):
    """All that sign now, the newest first."""

    secrets: list[SecretAnswer]
    extra_signature_key: str | None = Field(description="Of the extra signature, where there is one.")
    proposed_extra_signature_key: str | None = Field(description="Of the edit that waits, where it has another.")


class Testing(Given):
    type: EventTypeName = Field("endpoint.test", description="Send the sample of this event type.")


class Timing(Answer):
    """Milliseconds of each part, one after another; null: it was not come to, or isn't needed."""

    dns: float | None
    connect: float | None
    tls: float | None
    first_byte: float | None = Field(description="From the request to the answer's first byte.")
    total: float | None


class HeaderAnswer(Answer):
    name: str
    value: str


class TestAnswer(Answer):
    """One real, signed POST, marked as a test."""

    type: str
    passed: bool
    verdict: str = Field(description="In words that one can act on.")
    at_fault: str | None = Field(
        description="redirect, certificate, address, timeout, receiver, answer. Null: it passed."
    )
    status: int | None
    fault: str | None
    duration_ms: float = Field(description="All of it, waiting for room to connect included.")
    timing: Timing
    request: str
    response: str | None = Field(description="The answer's head and the first 4 kB of its body, of a success too.")
    response_headers: list[HeaderAnswer]
    response_body: str | None = Field(description="The first 4 kB.")


class TypesTested(Answer):
    passed: bool = Field(
        description="Every chosen type that has a sample has passed, in exactly this configuration, now or before."
    )
    left: list[str] = Field(description="Types that have not passed yet.")
    tests: list[TestAnswer] = Field(description="Made now, in their order.")


class PastTest(TestAnswer):
    id: int
    started_at: datetime


class StatsFilter(Given):
    since: Moment | None = Field(None, description="24 hours before `until`, if left out.")
    until: Moment | None = None
    step_min: int | None = Field(
        None,
        ge=1,
        le=1_440,
        description="Minutes a point. Left out: as few as give 300 points at most, which is the most.",
    )


class StatsPoint(StatsAnswer):
    at: datetime
    backlog: int = Field(description="The most events that waited for their first attempt.")


class Series(Answer):
    """Only steps in which there were attempts."""

    data: list[StatsPoint]
