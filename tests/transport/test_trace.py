"""What a test is told of its POST: when what happened, and the answer's beginning, of a success too."""

import asyncio
import ssl
from typing import Any

import pytest
import trustme

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.ports import TRACED_BODY_BYTES, Limits, Trace, Transport
from dispatcher.transport.connection import HttpConnection, TracedConnection, read_answer
from tests.transport.peers import OK, Names, connected, make_peer, make_pool, start

pytestmark = pytest.mark.usefixtures("each_transport")


async def traced(transport: Transport, origin: Any, timeout_s: float = 5.0) -> tuple[Outcome, Trace, Any]:
    trace = Trace()
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    transport.connect(origin, ready.set_result, fresh=True, trace=trace)
    connection = await asyncio.wait_for(ready, 30)
    if isinstance(connection, Outcome):
        return connection, trace, None
    return await asyncio.wait_for(start(connection, timeout_s=timeout_s), 30), trace, connection


async def test_a_success_is_told_of_and_its_connection_never_used_again() -> None:
    answer = (
        b"HTTP/1.1 201 Made\r\nX-A: 1\r\nx-a: 2\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    async with make_peer(b"HTTP/1.1 100 Continue\r\n\r\n" + answer) as peer, make_pool() as pool:
        outcome, trace, connection = await traced(pool, peer.origin)
        assert outcome == Outcome(None, 201)
        assert trace.head == b"HTTP/1.1 201 Made\r\nX-A: 1\r\nx-a: 2\r\ntransfer-encoding: chunked"
        assert (trace.body, trace.address) == (b"abcde", "127.0.0.1")
        timing = trace.timing_ms()
        assert timing.pop("tls") is None
        assert all(took is not None and took >= 0 for took in timing.values()), timing
        assert connection.closed
        assert pool.try_acquire(peer.origin) is None


async def test_the_parts_follow_each_other_over_tls() -> None:
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("hooks.example.com").configure_cert(context)
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    names = Names(hooks_example_com=("127.0.0.1",))
    async with (
        make_peer(OK, tls=context, name="hooks.example.com") as peer,
        make_pool(tls=trusting, resolver=names) as pool,
    ):
        outcome, trace, _ = await traced(pool, peer.origin)
        assert (outcome.fault, trace.body) == (None, b"ok")
        points = [trace.began, trace.resolved, trace.connected, trace.secured, trace.sent, trace.answered, trace.ended]
        assert points == sorted(point for point in points if point is not None), "each came, in this order"


async def test_only_the_beginning_of_a_body_is_kept() -> None:
    body = b"x" * 20_000
    async with make_peer(b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n" + body) as peer, make_pool() as pool:
        _, trace, _ = await traced(pool, peer.origin)
        assert trace.body == body[:TRACED_BODY_BYTES]


async def test_what_is_not_http_is_told_as_it_came() -> None:
    async with make_peer(b"SSH-2.0-OpenSSH_9.9\r\n") as peer, make_pool() as pool:
        outcome, trace, _ = await traced(pool, peer.origin)
        assert outcome.fault is Fault.PROTOCOL
        assert (trace.head, trace.body) == (b"", b"SSH-2.0-OpenSSH_9.9\r\n")


async def test_silence_has_no_first_byte_and_a_refusal_no_connection() -> None:
    async with make_peer() as peer, make_pool(Limits(headers_s=0.1)) as pool:
        outcome, trace, _ = await traced(pool, peer.origin)
        timing = trace.timing_ms()
        assert (outcome.fault, timing["first_byte"]) == (Fault.TIMEOUT, None)
        assert timing["total"] is not None
        # Its own clock may begin later than the loop's, by as much as the turn lasts in which the request began.
        assert timing["total"] >= 50
        peer.server.close()
        outcome, trace, _ = await traced(pool, peer.origin)
        timing = trace.timing_ms()
        assert outcome.fault is Fault.CONNECT
        assert timing["dns"] is not None
        assert (timing["connect"], timing["total"], trace.head) == (None, None, b"")


async def test_a_delivery_runs_the_lines_it_always_did() -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        connection = await connected(pool, peer.origin)
        assert "Traced" not in type(connection).__name__
        pool.release(connection)
    assert TracedConnection.__mro__[1] is HttpConnection


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        (b"", (b"", b"")),
        (b"HTTP/1.1 200 OK\r\nx: 1", (b"", b"HTTP/1.1 200 OK\r\nx: 1")),
        (b"HTTP/1.1 200 OK\nx: 1\n\nabc", (b"HTTP/1.1 200 OK\nx: 1", b"abc")),
        (b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 302 F\r\nlocation: /\r\n\r\n", (b"HTTP/1.1 302 F\r\nlocation: /", b"")),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz", (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked", b"zz")),
    ],
)  # fmt: skip
def test_an_answer_is_read_as_far_as_it_came(raw: bytes, read: tuple[bytes, bytes]) -> None:
    assert read_answer(raw) == read
