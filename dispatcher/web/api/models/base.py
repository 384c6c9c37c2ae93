"""What several rooms' models are made of: names, ids, moments, pages, problems."""

from datetime import datetime
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from dispatcher.store import search

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
FaultName = Literal["status", "timeout", "connect", "dns", "tls", "protocol", "reset", "blocked", "expired"]


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


class OfAccount(Paged):
    account_id: AccountId | None = None


class Noted(Given):
    note: Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")] = Field(
        "", description="Why, for whoever looks later."
    )
