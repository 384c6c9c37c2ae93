"""The event catalogue."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from dispatcher.store import event_types
from dispatcher.web.api.models.base import Answer, Given

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
    filter_fields: dict[FilterName, Pointers] = Field(
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
