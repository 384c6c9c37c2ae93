"""The built-in receiver's own side: a POST to /r/TOKEN, from deliveries, tests or anywhere.

It is no route like the others: nobody is logged in by it, whatever the request carries, and nothing but a receiver can be reached by it. Whoever
knows the token may send; who sees what came is asked by the pages. Who knows no token, or one that has ended, is told 410 and leaves no trace:
an endpoint that still has the address is disabled by that and says so, rather than fail for days.

Bounded: requests at a time, in all and of each receiver, their rate, and a body's bytes and time. Beyond, 429 or 503 is the answer, and
nothing is kept.
"""

import asyncio
import time
from typing import TYPE_CHECKING

import orjson
import structlog
from aiohttp import web

from dispatcher.domain.bucket import TokenBucket
from dispatcher.domain.principal import Principal
from dispatcher.domain.signing import scheme_of
from dispatcher.domain.url import receiver_url
from dispatcher.domain.verify import judge
from dispatcher.errors import BusyError, DatabaseAwayError, SealedError
from dispatcher.store import receivers
from dispatcher.store.admin import Admin
from dispatcher.store.session import Connection

if TYPE_CHECKING:
    from dispatcher.web.app import Web

_log = structlog.get_logger(room="web")

PATH = "/r/{token:[A-Za-z0-9_-]{43}}"
BODY_BYTES_MAX = 524_288
BODY_S = 10.0
AT_ONCE_MAX = 32  # in all: 16 MB of bodies
AT_ONCE_EACH_MAX = 8
ENTERED_MAX = 200  # in all, slow answers too: each has one of the connections that the panel needs as well
RATE_PER_S, BURST = 10.0, 20  # of one receiver
SLOW_S = 5.0
STATUS = {"ok": 200, "slow": 200, "error": 500, "gone": 410, "throttle": 429}


class Receivers:
    """What the process has to do with receivers at this moment. Touched by the loop's thread only."""

    def __init__(self) -> None:
        self.at_once = 0  # whose bodies are in memory; a slow answer's isn't any more
        self.entered = 0
        self._each: dict[int, int] = {}
        self._buckets: dict[int, TokenBucket] = {}  # of receivers that got something within the last seconds

    def enter(self, receiver_id: int) -> bool:
        """Count a request of this receiver, unless it, or all, have too many."""
        if self.entered >= ENTERED_MAX:
            return False
        now = time.monotonic()
        if len(self._buckets) > 1_000:
            self._buckets = {key: one for key, one in self._buckets.items() if now - one.stamp < BURST / RATE_PER_S}
        bucket = self._buckets.get(receiver_id)
        if bucket is None:
            bucket = self._buckets[receiver_id] = TokenBucket(RATE_PER_S, BURST, now)
        if self._each.get(receiver_id, 0) >= AT_ONCE_EACH_MAX or not bucket.try_take(now):
            return False
        self._each[receiver_id] = self._each.get(receiver_id, 0) + 1
        self.entered += 1
        return True

    def leave(self, receiver_id: int) -> None:
        self.entered -= 1
        self._each[receiver_id] -= 1
        if not self._each[receiver_id]:
            del self._each[receiver_id]


async def receive(shared: "Web", request: web.Request) -> web.Response:
    """Answer a POST to a receiver as it was told to, and keep it for its owner to see."""
    state = shared.receivers
    if state.at_once >= AT_ONCE_MAX:
        return _answer(503, "too many requests at once", retry_after_s=1)
    state.at_once += 1
    entered: int | None = None
    try:
        try:
            async with shared.pool.connection() as db:
                found = await receivers.by_token(db, request.match_info["token"])
            if found is None:
                return _answer(410, "there is no such receiver, or none any more")
            receiver_id, account_id, answer = found
            if not state.enter(receiver_id):
                return _answer(429, f"a receiver takes {RATE_PER_S:g} requests a second", retry_after_s=1)
            entered = receiver_id
            if not await _keep(shared, request, receiver_id, account_id, STATUS[answer]):
                return _answer(
                    413, f"a receiver takes bodies of up to {BODY_BYTES_MAX} bytes, whole and within {BODY_S:g} s"
                )
        finally:
            state.at_once -= 1
        if answer == "slow":
            await asyncio.sleep(SLOW_S)
        retry_after_s = 10 if answer == "throttle" else None
        return _answer(STATUS[answer], "as this receiver was told to", retry_after_s=retry_after_s)
    except (BusyError, DatabaseAwayError) as exc:
        return _answer(503, exc.message, retry_after_s=2)
    finally:
        if entered is not None:
            state.leave(entered)


async def _keep(shared: "Web", request: web.Request, receiver_id: int, account_id: str, status: int) -> bool:
    body = await _read(request)
    if body is None:
        return False
    headers = [(name, value.encode("utf-8", "replace").decode()) for name, value in request.headers.items()]
    async with shared.pool.connection() as db:
        signature, endpoint_id = await _judge(shared, db, account_id, request, body)
        await receivers.keep(
            db, receiver_id, headers, body, signature=signature, endpoint_id=endpoint_id, status=status
        )
    return True


async def _read(request: web.Request) -> bytes | None:
    """Return the body; None if it is too long, or too slow."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.content.iter_chunked(65_536):
                chunks.append(chunk)
                size += len(chunk)
                if size > BODY_BYTES_MAX:
                    return None
    except (TimeoutError, web.RequestPayloadError):
        return None
    return b"".join(chunks)


async def _judge(
    shared: "Web", db: Connection, account_id: str, request: web.Request, body: bytes
) -> tuple[str, int | None]:
    """Hold the signature against the keys of the account's endpoints that have this receiver's address."""
    site = shared.settings.receiver_site
    if site is None:
        return "unknown", None
    admin = Admin(db, shared.settings, Principal("receiver", account_id))
    headers = {name.lower(): value for name, value in request.headers.items()}
    told: tuple[str, int | None] = ("unknown", None)
    for endpoint_id in await receivers.endpoints_of_url(
        db, account_id, receiver_url(site, request.match_info["token"])
    ):
        view = await admin.get(endpoint_id)
        try:
            secrets = [one for one in view.secrets if scheme_of(one) == "v1"]
        except SealedError as exc:
            _log.warning("receiver.sealed", endpoint_id=endpoint_id, error=str(exc))
            continue
        verdict = judge(headers, body, secrets, view.public_keys, time.time())
        if verdict == "valid":
            return verdict, endpoint_id
        told = (verdict, endpoint_id)
    return told


def _answer(status: int, said: str, *, retry_after_s: int | None = None) -> web.Response:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return web.Response(
        body=orjson.dumps({"status": status, "said": said}),
        status=status,
        headers=headers,
        content_type="application/json",
    )
