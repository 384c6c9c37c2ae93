"""The API, asked from elsewhere with a key: no database is needed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from dispatcher.errors import (
    DispatcherError,
    ForbiddenError,
    InputError,
    NotFoundError,
    StateError,
    UnreachableError,
)

TIMEOUT_S = 30
ANSWER_BYTES_MAX = 8_388_608
_ERRORS: dict[int, type[DispatcherError]] = {
    400: InputError, 401: ForbiddenError, 403: ForbiddenError, 404: NotFoundError, 409: StateError,
    429: UnreachableError, 502: UnreachableError, 503: UnreachableError, 504: UnreachableError,
}  # fmt: skip


class ApiClient:
    """`url` is where panel and API are served, without /api/v1."""

    def __init__(self, http: aiohttp.ClientSession, url: str, key: str) -> None:
        self.http = http
        self._base = url.rstrip("/") + "/api/v1"
        self._headers = {"Authorization": f"Bearer {key}"}

    async def ask(self, method: str, path: str, body: Any = None, **query: int) -> Any:
        """Return the answer. Raises UnreachableError where asking again may help, else what the API said."""
        headers = self._headers if body is None else self._headers | {"Content-Type": "application/json"}
        try:
            async with self.http.request(
                method, self._base + path, params=query, headers=headers, data=None if body is None else orjson.dumps(body),
                allow_redirects=False, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            ) as response:  # fmt: skip
                text = await response.content.read(ANSWER_BYTES_MAX)
                while not response.content.at_eof() and len(text) < ANSWER_BYTES_MAX:
                    text += await response.content.read(ANSWER_BYTES_MAX - len(text))
                status = response.status
        except aiohttp.InvalidURL as exc:
            raise InputError(
                f"{self._base} is no URL; set DISPATCHER_API_URL to where the panel is, https://…"
            ) from exc
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            raise UnreachableError(
                f"the API at {self._base} can't be reached ({exc or type(exc).__name__}); check DISPATCHER_API_URL"
            ) from exc
        try:
            answer = orjson.loads(text) if text else None
        except orjson.JSONDecodeError:
            answer = None
        if 200 <= status < 300:
            return answer
        said = answer.get("detail") if isinstance(answer, dict) else None
        if status == 401:
            said = "the API doesn't know this key; set DISPATCHER_API_KEY to one of `dispatcher key create`"
        raise _ERRORS.get(status, DispatcherError)(
            said or f"the API at {self._base} answered {status} without saying why"
        )


@asynccontextmanager
async def connected_api(url: str, key: str) -> AsyncIterator[ApiClient]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        yield ApiClient(http, url, key)
