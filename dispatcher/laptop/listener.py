"""Deliveries of an installation, sent on to a server on this machine.

A laptop has no address that the dispatcher could POST to, and shouldn't have one. So an address of the installation's own receives for
it, the built-in receiver; this verb asks the API what came there, once a second, and POSTs each to the local server: the same body,
byte by byte, under the same headers, so that the signature fits as it will later.

What the local server answers is shown here and nowhere else: the delivery was answered by the receiver, and isn't tried again. What the
receiver didn't keep whole (longer than 16 kB, or not UTF-8) is shown and not sent on, for its signature couldn't fit.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from dispatcher.errors import DispatcherError, NotFoundError, UnreachableError
from dispatcher.laptop.api import ApiClient

POLL_S = 1.0
AWAY_MAX_S = 10.0  # between tries while the API is away
LOCAL_TIMEOUT_S = 30.0
KEPT = 100  # as many as the receiver keeps
SHOWN_CHARS = 200  # of an answer
# What belongs to the connection on which it came, not to the request.
HOP_BY_HOP = {
    "host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization",
    "proxy-authenticate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What became of a request: the local server's status and the beginning of its answer; or no status, and why."""

    id: int
    at: str
    type: str
    webhook_id: str
    body_bytes: int
    signature: str
    again: bool
    status: int | None
    answer: str
    duration_ms: float


class Listener:
    """One receiver's requests, sent on in the order in which they came."""

    def __init__(
        self, api: ApiClient, receiver_id: int, forward_to: str, *, show: Callable[[Forwarded], None], warn: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._api = api
        self._path = f"/receivers/{receiver_id}/requests"
        self._forward_to = forward_to
        self._show = show
        self._warn = warn
        self._kept: dict[int, dict[str, Any]] = {}

    async def follow(self, after: int) -> None:
        """Send on what comes, for ever; raises NotFoundError when the receiver has ended."""
        away_s = 0.0
        while True:
            try:
                page = await self._api.ask("GET", self._path, after=after, limit=KEPT)
            except UnreachableError as exc:
                if not away_s:
                    self._warn(f"{exc}; trying again")
                away_s = min(away_s * 2 or POLL_S, AWAY_MAX_S)
                await asyncio.sleep(away_s)
                continue
            if away_s:
                self._warn("the API is back")
            away_s = 0.0
            for request in reversed(page["data"]):
                after = request["id"]
                await self.forward(request)
            await asyncio.sleep(POLL_S)

    async def newest(self) -> int:
        """Return the id of what came last, 0 if nothing did; what came so far can be sent again."""
        page = await self._api.ask("GET", self._path, limit=KEPT)
        for request in reversed(page["data"]):
            self._keep(request)
        return max(self._kept, default=0)

    async def again(self, request_id: int | None) -> bool:
        """Send one that came before on once more, the last if it isn't named; return whether the local server took it."""
        if request_id is None and self._kept:
            request_id = max(self._kept)
        request = self._kept.get(request_id or 0)
        if request is None:
            raise NotFoundError(
                "there is nothing to send again"
                if request_id is None
                else f"there is no request {request_id}, or none any more"
            )
        return await self.forward(request, again=True)

    async def forward(self, request: dict[str, Any], *, again: bool = False) -> bool:
        """POST one to the local server and show what it answered."""
        self._keep(request)
        status, said, began = None, "", time.monotonic()
        if not request["body_is_whole"]:
            said = "not sent on: the receiver keeps the first 16 kB, as UTF-8, so its signature couldn't fit"
        else:
            try:
                status, said = await self._post(request)
            except (TimeoutError, aiohttp.ClientError, OSError) as exc:
                said = f"no answer: {exc or type(exc).__name__}"
        duration_ms = round((time.monotonic() - began) * 1_000, 1)
        self._show(
            Forwarded(
                request["id"], request["at"], _type(request["body"]), _header(request, "webhook-id"), request["body_bytes"],
                request["signature"], again, status, said, duration_ms,
            )
        )  # fmt: skip
        return status is not None and 200 <= status < 300

    async def _post(self, request: dict[str, Any]) -> tuple[int, str]:
        headers = [(one["name"], one["value"]) for one in request["headers"] if one["name"].lower() not in HOP_BY_HOP]
        async with self._api.http.post(
            self._forward_to, data=request["body"].encode(), headers=headers, allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=LOCAL_TIMEOUT_S),
        ) as response:  # fmt: skip
            answer = await response.content.read(SHOWN_CHARS * 4)
            return response.status, answer.decode("utf-8", "replace")[:SHOWN_CHARS]

    def _keep(self, request: dict[str, Any]) -> None:
        self._kept[request["id"]] = request
        while len(self._kept) > KEPT:
            del self._kept[min(self._kept)]


def _header(request: dict[str, Any], name: str) -> str:
    return next((one["value"] for one in request["headers"] if one["name"].lower() == name), "–")


def _type(body: str) -> str:
    """Return the event's type; a bare payload has none to show."""
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "–"
    return str(event["type"]) if isinstance(event, dict) and "type" in event else "–"


@asynccontextmanager
async def temporary_endpoint(
    api: ApiClient, account_id: str | None, types: tuple[str, ...], warn: Callable[[str], None]
) -> AsyncIterator[int]:
    """Yield a receiver with a live endpoint on it, for as long as it is needed."""
    whose = {} if account_id is None else {"account_id": account_id}
    receiver = await api.ask("POST", "/receivers", whose)
    try:
        wanted = whose | {"url": receiver["url"], "event_types": list(types)}
        endpoint = await api.ask("POST", "/endpoints", wanted)
        try:
            warn(
                f"endpoint {endpoint['id']} of account {receiver['account_id']}, receiver {receiver['id']}; its secret: {endpoint['secret']}"
            )
            tested = await api.ask("POST", f"/endpoints/{endpoint['id']}/test", {})
            if not tested["passed"]:
                raise DispatcherError(f"the installation can't reach its own receiver: {tested['verdict']}")
            await api.ask("POST", f"/endpoints/{endpoint['id']}/go-live", {})
            yield receiver["id"]
        finally:
            await _tidy(api, warn, f"/endpoints/{endpoint['id']}")
    finally:
        await _tidy(api, warn, f"/receivers/{receiver['id']}")


async def _tidy(api: ApiClient, warn: Callable[[str], None], path: str) -> None:
    try:
        await api.ask("DELETE", path)
    except NotFoundError:
        pass  # somebody else did
    except DispatcherError as exc:
        warn(
            f"{path[1:]} was left behind: {exc}. A receiver ends by itself after a day, and that disables its endpoint"
        )
