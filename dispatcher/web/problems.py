"""What can go wrong, as RFC 9457 says it: application/problem+json with a code for programs, a sentence for people and
the field to blame. The one place where our errors get an HTTP status."""

from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from pydantic import ValidationError

from dispatcher.errors import (
    BusyError,
    DatabaseAwayError,
    DatabaseRefusedError,
    DispatcherError,
    ForbiddenError,
    InputError,
    NotFoundError,
    StateError,
)

CONTENT_TYPE = "application/problem+json"

STATUS: dict[type[DispatcherError], int] = {
    InputError: 400,
    ForbiddenError: 403,
    NotFoundError: 404,
    StateError: 409,
    BusyError: 503,
    DatabaseAwayError: 503,
    DatabaseRefusedError: 503,
}
CODES = {  # of what isn't one of our errors
    400: "bad_input", 401: "login_needed", 403: "forbidden", 404: "not_found", 405: "wrong_method", 409: "wrong_state",
    411: "length_required", 413: "too_large", 415: "wrong_content_type", 429: "too_many_requests", 500: "internal", 503: "busy",
}  # fmt: skip


class ProblemError(Exception):
    """An answer that isn't what was asked for."""

    def __init__(
        self, status: int, detail: str, *, code: str | None = None, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code or CODES.get(status, "error")
        self.field = field
        self.headers = headers or {}

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase

    def as_dict(self) -> dict[str, Any]:
        return {
            "type": "about:blank", "title": self.title, "status": self.status, "code": self.code, "detail": self.detail, "field": self.field,
        }  # fmt: skip

    def response(self) -> web.Response:
        return web.Response(
            body=orjson.dumps(self.as_dict()), status=self.status, content_type=CONTENT_TYPE, headers=self.headers
        )


def problem_of(exc: DispatcherError) -> ProblemError:
    """Return what an error of ours is to somebody who asked over HTTP."""
    status = next((status for kind, status in STATUS.items() if isinstance(exc, kind)), 500)
    headers = {"Retry-After": "2"} if status == 503 else {}
    field = exc.field if isinstance(exc, InputError) else None
    return ProblemError(status, exc.message, code=exc.code, field=field, headers=headers)


def problem_of_validation(exc: ValidationError, where: str) -> ProblemError:
    """Return the first thing that is wrong with a body or a query."""
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    said = f"{field}: {message}" if field else f"the {where} is not what is wanted: {message}"
    return ProblemError(400, said, field=field or None)


def problem_of_http(exc: web.HTTPException) -> ProblemError:
    """Return what aiohttp itself refuses: no such path, another method."""
    details = {404: "there is nothing at this address", 405: "this address does not take this method"}
    headers = {"Allow": exc.headers["Allow"]} if "Allow" in exc.headers else {}
    return ProblemError(exc.status, details.get(exc.status, exc.reason), headers=headers)
