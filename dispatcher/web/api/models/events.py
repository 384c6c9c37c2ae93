"""Events and deliveries."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from dispatcher.web.api.models.base import (
    AccountId,
    Answer,
    EventRef,
    EventTypeName,
    FaultName,
    Given,
    Id,
    Moment,
    Page,
    Paged,
    Pattern,
)
from dispatcher.web.api.models.endpoints import Short


class Ranged(Paged):
    account_id: AccountId | None = None
    type: list[Pattern] = Field([], max_length=20, description="Repeat it for several.")
    since: Moment | None = None
    until: Moment | None = None


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
