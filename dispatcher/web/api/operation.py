"""An operation of the API: a row of the table that serves it, validates it and documents it.

The handler's name is the operation's id, its docstring the documentation; `query`, `body` and `answer` are the models that
are both enforced and published. A handler is given a `Call`, where everything has been validated, and returns what its
`answer` is made from.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aiohttp import web
from aiohttp.web import StreamResponse
from pydantic import BaseModel, TypeAdapter, ValidationError

from dispatcher.domain.principal import Principal
from dispatcher.web.api.models import base
from dispatcher.web.problems import ProblemError, problem_of_validation
from dispatcher.web.visit import BODY_BYTES_MAX, Route, Visit, Who

PREFIX = "/api/v1"
BATCH_BYTES_MAX = 1 << 19  # to validate twice as much holds the loop for 5 to 9 ms

PATH_TYPES: dict[str, Any] = {
    "endpoint_id": base.Id,
    "run_id": base.RunId,
    "letter_id": base.Id,
    "key_id": base.Id,
    "link_id": base.Id,
    "recipient_id": base.Id,
    "receiver_id": base.Id,
    "event": base.EventRef,
    "name": base.EventTypeName,
}
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")

Work = Callable[["Call"], Awaitable[Any]]


class Call:
    """A validated request. `body` and `query` are of the operation's models."""

    def __init__(self, visit: Visit, path: dict[str, Any], query: Any, body: Any) -> None:
        self.visit = visit
        self.path = path
        self.query = query
        self.body = body

    @property
    def principal(self) -> Principal:
        return self.visit.principal

    @property
    def endpoint_id(self) -> int:
        value: int = self.path["endpoint_id"]
        return value

    @property
    def idempotency_key(self) -> str | None:
        key = self.visit.request.headers.get("Idempotency-Key")
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise ProblemError(
                400, "an Idempotency-Key has 1 to 255 printable ASCII characters", field="Idempotency-Key"
            )
        return key


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    handler: Work
    tag: str
    answer: type[BaseModel]
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    status: int = 200
    who: Who = Who.SIGNED_IN
    change: str | None = None
    body_bytes_max: int = BODY_BYTES_MAX
    is_idempotent: bool = False  # takes an Idempotency-Key
    body_is_optional: bool = False
    parameters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = tuple(re.findall(r"\{(\w+)\}", self.path))
        assert all(name in PATH_TYPES for name in names), self.path
        assert self.handler.__doc__, f"{self.id} says nothing"
        object.__setattr__(self, "parameters", names)

    @property
    def id(self) -> str:
        return self.handler.__name__

    @property
    def route(self) -> Route:
        return Route(
            self.method, PREFIX + self.path, self.serve, self.who, self.change, body_bytes_max=self.body_bytes_max, is_api=True
        )  # fmt: skip

    async def serve(self, visit: Visit) -> StreamResponse:
        call = Call(visit, self._path(visit), self._query(visit), self._body(visit))
        made = await self.handler(call)
        status = self.status
        if isinstance(made, tuple):
            made, status = made
        answer = self.answer.model_validate(made)
        return web.Response(body=answer.model_dump_json().encode(), status=status, content_type="application/json")

    def _path(self, visit: Visit) -> dict[str, Any]:
        values = {}
        for name in self.parameters:
            text = visit.path[name]
            try:
                values[name] = _adapter(name).validate_strings(text)
            except ValidationError as exc:
                raise ProblemError(400, f"{text!r} is no {name}", field=name) from exc
        return values

    def _query(self, visit: Visit) -> Any:
        given = visit.request.query
        if self.query is None:
            if given:
                raise ProblemError(400, "this takes no query", field=next(iter(given)))
            return None
        lists = {name for name, info in self.query.model_fields.items() if _is_list(info.annotation)}
        values: dict[str, Any] = {}
        for name in given:
            found = given.getall(name)
            if name not in lists and len(found) > 1:
                raise ProblemError(400, f"{name} is given more than once", field=name)
            values[name] = found if name in lists else found[0]
        try:
            return self.query.model_validate(values)
        except ValidationError as exc:
            raise problem_of_validation(exc, "query") from exc

    def _body(self, visit: Visit) -> Any:
        if self.body is None:
            if visit.body:
                raise ProblemError(400, "this takes no body")
            return None
        if not visit.body and self.body_is_optional:
            return self.body()
        if visit.request.content_type != "application/json":
            raise ProblemError(415, "send application/json")
        try:
            return self.body.model_validate_json(visit.body, strict=True)
        except ValidationError as exc:
            raise problem_of_validation(exc, "body") from exc


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(PATH_TYPES[name])


def _is_list(annotation: Any) -> bool:
    return str(annotation).startswith(("list[", "typing.List["))
