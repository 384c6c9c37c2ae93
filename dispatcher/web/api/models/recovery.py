"""Resends, replays and dead letters."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from dispatcher.web.api.models.base import AccountId, Answer, FaultName, Given, Id, Moment, Noted, Paged, Pattern
from dispatcher.web.api.models.events import AttemptAnswer

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
