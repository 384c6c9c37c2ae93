"""A trial of an endpoint: one real, signed POST through the real transport, outside of the log. Sent once, never
retried, marked `test`."""

import asyncio
import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from dispatcher.domain.event import envelope
from dispatcher.domain.outcome import Outcome
from dispatcher.domain.signing import Signer
from dispatcher.domain.url import Target
from dispatcher.domain.verdict import verdict
from dispatcher.engine.request import render, render_head
from dispatcher.ports import Connection, Transport

TEST_TYPE = "endpoint.test"


@dataclass(frozen=True, slots=True)
class Trial:
    """What was sent, what came back, and how long it took, connecting included."""

    outcome: Outcome
    request: bytes
    duration_us: int

    @property
    def passed(self) -> bool:
        return self.outcome.delivered

    @property
    def verdict(self) -> str:
        return verdict(self.outcome)


async def try_endpoint(
    transport: Transport,
    target: Target,
    signing_secrets: tuple[str, ...],
    account_id: str,
    *,
    timeout_s: float,
    user_agent: str,
    event_type: str,
    data: dict[str, Any],
) -> Trial:
    """POST one test event and wait for its outcome."""
    public_id = b"evt_" + secrets.token_hex(16).encode()
    now = time.time()
    body = envelope(public_id, event_type, int(now * 1e6), account_id, orjson.dumps(data), test=True)
    request = render(render_head(target, user_agent), Signer(signing_secrets), public_id, b"%d" % int(now), 1, body)
    began = time.monotonic()
    outcome = await _post(transport, target, request, timeout_s)
    return Trial(outcome, request, int((time.monotonic() - began) * 1e6))


async def _post(transport: Transport, target: Target, request: bytes, timeout_s: float) -> Outcome:
    loop = asyncio.get_running_loop()
    connected: asyncio.Future[Connection | Outcome] = loop.create_future()
    transport.connect(target.origin, partial(_resolve, connected), fresh=True)
    result = await connected
    if isinstance(result, Outcome):
        return result
    answered: asyncio.Future[Outcome] = loop.create_future()
    result.post(request, timeout_s, partial(_resolve, answered))
    return await answered


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)
