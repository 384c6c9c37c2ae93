"""Built-in receivers, and what they got."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from dispatcher.web.api.models.base import AccountId, Answer, Given, Paged
from dispatcher.web.api.models.endpoints import HeaderAnswer

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
