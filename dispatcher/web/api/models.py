"""What the API takes and gives. These models validate, and the OpenAPI document is made from them: what isn't here isn't there.

Bodies and queries refuse what they don't know. Answers are cut to their model: a field that nobody listed, such as a
secret, can't slip out.

An option of endpoints is added in one place, `EndpointOptions`; a test holds it to store/admin.py's.
"""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from dispatcher.store import access, event_types, search
from dispatcher.store.admin import OVERLAP_MAX_S, OVERLAP_S

T = TypeVar("T")

Id = Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
RunId = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
AccountId = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
EventTypeName = Annotated[str, StringConstraints(max_length=128, pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)+$")]
Pattern = Annotated[
    str, StringConstraints(max_length=128, pattern=r"^(\*|[a-z0-9_]+(\.[a-z0-9_]+)*\.\*|[a-z0-9_]+(\.[a-z0-9_]+)+)$")
]
EventRef = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,18}|evt_[0-9a-f]{32})$")]
Line = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Cursor = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$")]
# PostgreSQL's years; what is earlier or later than there were phones is a slip
Moment = Annotated[
    AwareDatetime,
    Field(ge=datetime.fromisoformat("1970-01-01T00:00:00Z"), le=datetime.fromisoformat("9999-01-01T00:00:00Z")),
]
Choice = Literal["send", "skip"]


class Given(BaseModel):
    """What comes in."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)


class Answer(BaseModel):
    """What goes out."""

    model_config = ConfigDict(extra="ignore", from_attributes=True)


class Page(Answer, Generic[T]):
    """A page of a list. `next`: the cursor of the following page; null at the end."""

    data: list[T]
    next: str | None = None


class Paged(Given):
    cursor: Cursor | None = Field(None, description="Where to go on: `next` of the page before.")
    limit: int = Field(50, ge=1, le=search.LIMIT_MAX, description="Rows of a page at most.")


class ProblemAnswer(Answer):
    """An error, as RFC 9457 says it. `code` is for programs, `detail` for people, `field` says what of the request is to blame."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: str | None


# ── endpoints ──

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


# ── alerts ──


class NewRecipient(Given):
    address: Annotated[str, StringConstraints(min_length=3, max_length=254)] = Field(
        description="A mail address, in ASCII."
    )
    account_id: AccountId | None = Field(
        None, description="Whose endpoints. With an account's own key: that. Null, by an operator: everybody's."
    )


class RecipientAnswer(Answer):
    id: int
    account_id: str | None
    address: str
    created_at: datetime
    created_by: str


class AlertAnswer(Answer):
    id: int
    account_id: str
    to_operators: bool = Field(description="Told to operators; else to the account's recipients.")
    endpoint_id: int
    type: str
    at: datetime
    state: str = Field(
        description="waiting, held (the hour's mails are used up: told later, in one mail), mailed, given_up."
    )
    mailed_at: datetime | None


class OperatorAccount(Given):
    account_id: AccountId | None


class OperatorAccountAnswer(Answer):
    account_id: str | None


# ── receivers ──

ReceiverKind = Literal["ok", "slow", "error", "throttle", "gone"]


class NewReceiver(Given):
    account_id: AccountId | None = Field(None, description="Whose. May be left out with an account's own key.")


class ReceiverChange(Given):
    answer: ReceiverKind = Field(
        description="ok: 200; slow: 200 after 5 s; error: 500; throttle: 429 with Retry-After; gone: 410."
    )


class ReceiverAnswer(Answer):
    id: int
    account_id: str
    url: str | None = Field(description="Null: the settings don't say any more where receivers are.")
    answer: str
    created_at: datetime
    expires_at: datetime


class ReceivedFilter(Paged):
    after: int = Field(0, ge=0, le=(1 << 63) - 1, description="Only those with a higher id: what came since.")


class ReceivedAnswer(Answer):
    """A request that a receiver got."""

    id: int
    at: datetime
    headers: list[HeaderAnswer]
    body: str = Field(description="The first 16 kB.")
    body_is_whole: bool = Field(description="`body` is what came, byte by byte: not longer than that, and UTF-8.")
    body_bytes: int = Field(description="Of all of it.")
    signature: str = Field(
        description="valid, missing, old (its time is off by more than five minutes), wrong; unknown: no endpoint has this address."
    )
    endpoint_id: int | None = Field(description="Whose keys it was held against.")
    status: int = Field(description="What was answered.")


# ── events and deliveries ──


class NewEvent(Given):
    account_id: AccountId
    type: EventTypeName
    data: Any = Field(description="Any JSON; goes out byte by byte as it came in.")
    occurred_at: Moment | None = Field(None, description="When it happened; left out: now.")
    ordering_key: Short | None = Field(
        None, description="Endpoints that ask for it get the events of one key one by one."
    )
    expires_at: Moment | None = Field(None, description="Worth nothing to a receiver afterwards: settled unsent.")
    priority: int | None = Field(
        None, ge=-32_768, le=32_767, description="Above 0: goes first where an endpoint is behind."
    )
    traceparent: str | None = Field(
        None,
        pattern="^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
        description="W3C Trace Context; receivers get it as a header of this name.",
    )


class NewEvents(Given):
    events: list[NewEvent] = Field(min_length=1, max_length=200)


class SentEvent(Answer):
    id: int = Field(description="In the outbox.")
    event_id: str = Field(description="What receivers get as webhook-id.")


class SentEvents(Answer):
    data: list[SentEvent]


class SearchedAnswer(Answer):
    """How far a page looked. `complete`: there is nothing older in the range."""

    events: int
    back_to: datetime | None
    complete: bool


class EventRow(Answer):
    id: int
    public_id: str
    account_id: str
    type: str
    occurred_at: datetime | None
    created_at: datetime
    bytes: int


class EventPage(Page[EventRow]):
    searched: SearchedAnswer


class Ranged(Paged):
    account_id: AccountId | None = None
    type: list[Pattern] = Field([], max_length=20, description="Repeat it for several.")
    since: Moment | None = None
    until: Moment | None = None


Wanted = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]


class EventFilter(Ranged):
    text: Wanted | None = Field(None, description="Somewhere in the payload, as it was written: a reference, a number.")


class AttemptAnswer(Answer):
    """One POST. `number` 0: settled without one."""

    run: int
    number: int
    started_at: datetime
    duration_us: int
    status: int | None
    fault: str | None = Field(description="Null: delivered.")
    response: str | None = Field(description="The beginning of a failed attempt's answer.")


class RunFate(Answer):
    run: int
    kind: str
    fate: str


class EventDelivery(Answer):
    endpoint_id: int
    name: str
    url: str
    state: str = Field(description="The endpoint's.")
    fate: str = Field(description="In a few words.")
    runs: list[RunFate]
    attempts: list[AttemptAnswer]


class NotForEndpoint(Answer):
    endpoint_id: int
    name: str
    state: str
    why: str


class EventAnswer(Answer):
    """An event, and why it did or didn't arrive: each endpoint that was to have it, and each of the account's that was not."""

    id: int
    event_id: str
    account_id: str
    type: str
    occurred_at: datetime | None
    created_at: datetime
    ordering_key: str | None
    expires_at: datetime | None
    priority: int | None
    traceparent: str | None
    in_log: bool = Field(description="False: retention has taken it, and this is what dead letters and attempts tell.")
    data: Any = Field(description="Null if nothing has kept it.")
    deliveries: list[EventDelivery]
    not_for: list[NotForEndpoint]
    next: str | None = Field(description="The `cursor` of the account's following endpoints; null: there are no more.")


class EventPart(Paged):
    """Which of the account's endpoints an event is told of."""


DeliveryState = Literal["delivered", "retrying", "dead", "expired", "failed", "waiting"]
FaultName = Literal["status", "timeout", "connect", "dns", "tls", "protocol", "reset", "blocked", "expired"]


class DeliveryFilter(Ranged):
    endpoint_id: Id | None = None
    state: list[DeliveryState] = Field([], max_length=6, description="Repeat it for several.")
    status: int | None = Field(None, ge=1, le=999, description="Of the last answer: 503, or 5 for all 5xx.")
    fault: FaultName | None = Field(None, description="Of the last attempt.")
    event: EventRef | None = Field(None, description="One event, by its outbox id or evt_….")
    text: Wanted | None = Field(None, description="Somewhere in the payload, as it was written.")


class DeliveryRow(Answer):
    """One event for one endpoint, with its last attempt."""

    event_id: int
    public_id: str
    account_id: str
    type: str
    created_at: datetime
    endpoint_id: int
    endpoint_name: str
    endpoint_url: str
    endpoint_state: str = Field(description='Of the endpoint now, "deleted" among others.')
    state: DeliveryState
    attempts: int
    run: int | None
    number: int | None
    started_at: datetime | None
    duration_us: int | None
    status: int | None
    fault: str | None
    next_attempt_at: datetime | None
    dead_letter_id: int | None


class DeliveryPage(Page[DeliveryRow]):
    searched: SearchedAnswer


class Noted(Given):
    note: Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")] = Field(
        "", description="Why, for whoever looks later."
    )


# ── resends and replays ──

Rate = Annotated[float, Field(gt=0, le=100_000)]


class ReplayRange(Given):
    since: Moment | None = Field(None, description="Events made then or later.")
    until: Moment | None = Field(None, description="Events made then or earlier.")
    after_id: int | None = Field(
        None, ge=0, le=(1 << 63) - 1, description="Events after this outbox id; instead of `since`."
    )
    upto_id: int | None = Field(
        None, ge=0, le=(1 << 63) - 1, description="Events up to this outbox id; instead of `until`."
    )
    types: list[Pattern] = Field([], max_length=100, description="Left out: those that the endpoint gets.")
    only_failed: bool = Field(True, description="False: every event, delivered or not.")


class NewReplay(ReplayRange, Noted):
    rate_per_s: Rate | None = Field(None, description="Deliveries a second; left out: DISPATCHER_REPLAY_RATE_PER_S.")
    unlimited: bool = Field(False, description="As fast as the endpoint takes it.")


class ReplayCount(Answer):
    """What a replay would send. Give `after_id` and `upto_id` when starting it, and it is these."""

    endpoint_id: int
    after_id: int
    upto_id: int
    patterns: list[str]
    only_failed: bool
    total: int


class RateChange(Given):
    rate_per_s: Rate | None = Field(description="Null: as fast as the endpoint takes it.")


class RunFilter(Paged):
    account_id: AccountId | None = None
    endpoint_id: Id | None = None
    state: Literal["open", "running", "paused", "finished", "canceled"] | None = None


class RunAnswer(Answer):
    """A resend or a replay. Counts are of deliveries, not of attempts."""

    id: int
    kind: str
    endpoint_id: int
    account_id: str
    url: str
    endpoint_state: str
    source: str
    after_id: int
    upto_id: int
    patterns: list[str]
    only_failed: bool
    rate_per_s: float | None
    total: int
    note: str
    created_at: datetime
    attempted: int
    delivered: int
    dead: int
    retrying: int
    finished_at: datetime | None
    state: str
    next_retry_at: datetime | None = None


# ── dead letters ──


class LetterChoice(Given):
    """Which dead letters. Times are when they were given up, both inclusive."""

    account_id: AccountId | None = None
    endpoint_id: Id | None = None
    types: list[Pattern] = Field([], max_length=100)
    since: Moment | None = None
    until: Moment | None = None
    fault: FaultName | None = None
    status: int | None = Field(None, ge=100, le=999)
    reason: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]+$")] | None = Field(
        None, description="With these words in it."
    )


class LetterFilter(LetterChoice, Paged):
    state: Literal["open", "resent", "discarded", "erased", "all"] = "open"


class LetterSelection(LetterChoice):
    """Open dead letters: those named, or, with all true, those that the filters choose."""

    ids: list[Id] = Field([], max_length=1_000)
    all: bool = False


class ResendLetters(LetterSelection, Noted):
    rate_per_s: Rate | None = None
    unlimited: bool = False


class LetterRow(Answer):
    id: int
    endpoint_id: int
    event_id: int
    public_id: str
    run: int
    account_id: str
    type: str
    created_at: datetime
    occurred_at: datetime | None
    attempts: int
    first_attempt_at: datetime
    died_at: datetime
    reason: str
    status: int | None
    fault: str
    state: str
    state_changed_at: datetime | None
    resent_run: int | None
    delivered_since: bool


class LetterAnswer(LetterRow):
    data: Any = Field(description="Null: given up, or erased.")
    made: list[AttemptAnswer] = Field(description="The delivery's attempts, as far as retention has left them.")


class Discarded(Answer):
    discarded: int


class SkippedAnswer(Answer):
    endpoint_id: int
    letters: int
    why: str


class Runs(Answer):
    data: list[RunAnswer]
    skipped: list[SkippedAnswer] = Field(description="Endpoints to which none of theirs can be sent.")


# ── catalogue ──


FilterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Pointer = Annotated[str, StringConstraints(max_length=256, pattern=r"^/[!-~]*$")]
Pointers = Annotated[list[Pointer], Field(min_length=1, max_length=event_types.POINTERS_MAX)]


class EventTypeGiven(Given):
    title: Annotated[
        str,
        StringConstraints(
            min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$"
        ),
    ]
    description: Annotated[str, StringConstraints(max_length=10_000, pattern=r"^[^\x00]*$")] = ""
    default_on: bool = Field(True, description="Ticked when somebody makes an endpoint.")
    sample: Any = Field(None, description="An example of `data`.")
    json_schema: dict[str, Any] | bool | None = Field(
        None, description="JSON Schema (2020-12) of `data`. Told, not enforced."
    )
    filter_fields: dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")],
        Annotated[
            list[Annotated[str, StringConstraints(max_length=256, pattern=r"^/[!-~]*$")]],
            Field(min_length=1, max_length=event_types.POINTERS_MAX),
        ],
    ] = Field(
        {}, max_length=event_types.FILTERS_MAX, description="What one may filter by: name → JSON pointers into `data`."
    )


class EventTypeAnswer(Answer):
    name: str
    title: str
    description: str
    default_on: bool
    sample: Any
    json_schema: Any
    filter_fields: dict[str, list[str]]
    created_at: datetime
    updated_at: datetime


# ── accounts, keys, links, erasures ──


class AccountRow(Answer):
    account_id: str
    endpoints: int
    live: int
    disabled: int
    failing: int
    backlog: int


class AccountFilter(Paged):
    pass


class Me(Answer):
    """Who asks."""

    actor: str
    account_id: str | None = Field(description="Null: an operator.")
    is_operator: bool


class NewKey(Given):
    account_id: AccountId | None = Field(
        None, description="Left out: an operator's, or with an account's key another of its own."
    )
    name: Line = ""
    ttl_s: int | None = Field(None, ge=60, le=10 * 365 * 86_400, description="Left out: until it is revoked.")


class KeyAnswer(Answer):
    id: int
    account_id: str | None
    name: str
    prefix: str = Field(description="Its first characters.")
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class CreatedKey(KeyAnswer):
    key: str = Field(description="Shown now, and never again.")


class KeyFilter(Paged):
    account_id: AccountId | None = None
    revoked: bool = Field(False, description="Revoked ones too.")


class NewLink(Given):
    account_id: AccountId
    uses: int = Field(1, ge=1, le=access.LINK_USES_MAX, description="How often it can be opened.")
    ttl_s: int | None = Field(None, ge=10, le=access.LINK_S_MAX, description="Left out: DISPATCHER_PORTAL_LINK_S.")


class LinkAnswer(Answer):
    id: int
    account_id: str
    uses_left: int
    created_at: datetime
    created_by: str
    expires_at: datetime
    revoked_at: datetime | None


class CreatedLink(LinkAnswer):
    url: str = Field(description="Send the customer's browser there. Shown now, and never again.")


class OfAccount(Paged):
    account_id: AccountId | None = None


class NewErasure(Given):
    account_id: AccountId | None = Field(None, description="The whole account; or")
    event: EventRef | None = Field(None, description="one event.")


class ErasureAnswer(Answer):
    """What was erased. `ended_at` null: it is under way, or was interrupted; then ask for it again."""

    id: int
    account_id: str
    event_id: int | None
    events: int
    response_heads: int
    dead_letters: int
    tests: int
    endpoints: int
    erased_by: str
    began_at: datetime
    ended_at: datetime | None


class ChangeAnswer(Answer):
    """Who changed what through panel and API. `status` null: it was interrupted, or is under way."""

    id: int
    at: datetime
    actor: str
    account_id: str | None
    action: str
    subject: str
    address: str
    status: int | None


class SourceAddresses(Answer):
    data: list[str] = Field(description="Networks that POSTs come from; empty if nobody has said.")
