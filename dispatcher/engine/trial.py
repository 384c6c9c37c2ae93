"""A trial of an endpoint: one real, signed POST through the real transport, outside of the log. Sent once, never
retried, marked `test`."""

import asyncio
import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from dispatcher.domain.event import Event, envelope
from dispatcher.domain.outcome import Outcome
from dispatcher.domain.shape import Shape, redacted
from dispatcher.domain.signing import signing_in
from dispatcher.domain.url import Target
from dispatcher.domain.verdict import at_fault, verdict
from dispatcher.engine.request import make_requests
from dispatcher.ports import Connection, Trace, Transport

TEST_TYPE = "endpoint.test"


@dataclass(frozen=True, slots=True)
class Trial:
    """What was sent, what came back, and how long it took, connecting included. `request` is without the values of the endpoint's own
    headers: it is kept and shown."""

    outcome: Outcome
    request: bytes
    duration_us: int
    trace: Trace

    @property
    def passed(self) -> bool:
        return self.outcome.delivered

    @property
    def verdict(self) -> str:
        return verdict(self.outcome, header(self.trace.head, "location"))

    @property
    def at_fault(self) -> str | None:
        return at_fault(self.outcome)


def headers_of(head: bytes) -> list[tuple[str, str]]:
    """Return the headers of an answer's head, as they came and in their order."""
    pairs = (line.partition(":") for line in head.decode("latin-1").splitlines()[1:])
    return [(name.strip(), value.strip()) for name, colon, value in pairs if colon]


def header(head: bytes, wanted: str) -> str | None:
    return next((value for name, value in headers_of(head) if name.lower() == wanted), None)


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
    shape: Shape,
) -> Trial:
    """POST one test event, by the same path as every other, and wait for its outcome."""
    request = render_test(
        target, signing_secrets, account_id, user_agent=user_agent, event_type=event_type, data=data, shape=shape
    )
    trace = Trace()
    began = time.monotonic()
    outcome = await _post(transport, shape.aimed(target), request, timeout_s, trace)
    return Trial(outcome, redacted(request, shape), int((time.monotonic() - began) * 1e6), trace)


def render_test(
    target: Target, signing_secrets: tuple[str, ...], account_id: str, *, user_agent: str, event_type: str, data: dict[str, Any], shape: Shape
) -> bytes:  # fmt: skip
    """Return a test's request, signed now, with an id of its own. To be shown it must be redacted."""
    now = time.time()
    event = TestEvent(account_id, event_type, orjson.dumps(data), int(now * 1e6))
    requests = make_requests(target, user_agent, signing_in(signing_secrets, shape.signing), shape)
    return requests.render(event, b"%d" % int(now), 1)


class TestEvent(Event):
    """An event that is in no log. Its envelope says so; a bare payload can't."""

    __slots__ = ()
    __test__ = False  # not one of pytest's

    def __init__(self, account_id: str, event_type: str, payload: bytes, now_us: int) -> None:
        public_id = b"evt_" + secrets.token_hex(16).encode()
        super().__init__(0, account_id, event_type, payload, now_us, None, public_id)

    def wrap(self, data: bytes) -> bytes:
        return envelope(self.public_id, self.type, self.created_us, self.account_id, data, test=True)


async def _post(transport: Transport, target: Target, request: bytes, timeout_s: float, trace: Trace) -> Outcome:
    loop = asyncio.get_running_loop()
    connected: asyncio.Future[Connection | Outcome] = loop.create_future()
    transport.connect(target.origin, partial(_resolve, connected), fresh=True, trace=trace)
    result = await connected
    if isinstance(result, Outcome):
        return result
    answered: asyncio.Future[Outcome] = loop.create_future()
    result.post(request, timeout_s, partial(_resolve, answered))
    return await answered


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)
