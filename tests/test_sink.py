"""The sink over real sockets: what it counts, how it checks signatures, how it misbehaves, and that it always stops."""

import asyncio
import base64
import json
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pytest
import trustme
import uvloop
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from dispatcher import sink as sink_module
from dispatcher.domain.signing import make_signer, new_private_key, public_key
from dispatcher.errors import InputError
from dispatcher.sink import MAX_BODY_BYTES, Behaviour, Received, Sink, decode_secret, read_key, sink_command, verify

SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(24, 48))).decode()
BODY = b'{"id":"msg_1","type":"message.delivered","data":{"text":"\xe2\x9c\x93"}}'
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
DEADLINE_S = 10.0

# What differs between loops is what the hostile modes use: aborts, write buffers, TLS.
both_loops = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


def run(new_loop: Callable[[], asyncio.AbstractEventLoop], scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(within_deadline())


@asynccontextmanager
async def started(sink: Sink, **options: Any) -> AsyncIterator[Sink]:
    await sink.start(**options)
    try:
        yield sink
    finally:
        async with asyncio.timeout(DEADLINE_S):
            await sink.stop()


class Client:
    """A raw connection: the tests decide on every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer framed by Content-Length."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """Read until the sink closes."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()


@asynccontextmanager
async def client(sink: Sink, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", sink.port, ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


def request(path: str = "/hook", body: bytes = BODY, headers: dict[str, str] | None = None) -> bytes:
    lines = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def signed(secret: str = SECRET, webhook_id: str = "msg_1", age_s: int = 0, body: bytes = BODY) -> dict[str, str]:
    at = int(time.time()) - age_s
    signature = Webhook(secret).sign(webhook_id, datetime.fromtimestamp(at, tz=UTC), body.decode())
    return {"Webhook-Id": webhook_id, "Webhook-Timestamp": str(at), "Webhook-Signature": signature}


# Answers.


async def test_answers_204_and_counts() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        peer.send(request())
        assert await peer.answer() == (204, {}, b"")
        assert (sink.received, dict(sink.by_status)) == (1, {204: 1})


async def test_one_connection_serves_many_requests() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        for number in range(1, 4):
            peer.send(request())
            await peer.answer()
            assert (sink.received, sink.connections) == (number, 1)


async def test_a_request_may_come_byte_by_byte() -> None:
    async with started(Sink(keep=1)) as sink, client(sink) as peer:
        peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request("/a/long/path"):
            peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await peer.answer())[0] == 204
        assert (sink.kept[0].path, sink.kept[0].body) == ("/a/long/path", BODY)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        sink.set_behaviour("/slow", Behaviour(status=200, delay_s=0.05))
        sink.set_behaviour("/fast", Behaviour(status=201))
        peer.send(request("/fast") + request("/slow") + request("/fast") + request("/slow?q=1"))
        assert [(await peer.answer())[0] for _ in range(4)] == [201, 200, 201, 200]
        assert dict(sink.by_status) == {200: 2, 201: 2}


async def test_more_pipelined_requests_than_we_owe_answers_for_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sink_module, "MAX_OWED", 3)
    async with started(Sink(behaviour=Behaviour(mode="hang"))) as sink, client(sink) as peer:
        peer.send(request() * 3)
        await until(lambda: sink.received == 3)
        assert sink.connections == 1
        peer.send(request())
        await until(lambda: sink.connections == 0)


async def test_chunked_bodies_and_trailers_are_understood() -> None:
    async with started(Sink(keep=1)) as sink, client(sink) as peer:
        peer.send(
            b"POST /hook HTTP/1.1\r\nHost: x\r\nwebhook-id: msg_1\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n2\r\nde\r\n0\r\nwebhook-id: from-a-trailer\r\n\r\n"
        )
        assert (await peer.answer())[0] == 204
        assert (sink.kept[0].body, sink.kept[0].webhook_id) == (b"abcde", "msg_1")


async def test_expect_100_continue_gets_its_go_ahead() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        head, _, body = request(headers={"Expect": "100-Continue"}).partition(b"\r\n\r\n")
        peer.send(head + b"\r\n\r\n")
        assert (await peer.answer())[0] == 100
        assert sink.received == 0
        peer.send(body)
        assert (await peer.answer())[0] == 204


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_closes_when_the_peer_wants_no_more(version: str) -> None:
    async with started(Sink(behaviour=Behaviour(status=200, body=b"ok"))) as sink, client(sink) as peer:
        peer.send(request(headers={"Connection": "close"}).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        assert await peer.rest() == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def test_a_path_has_its_own_behaviour() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        sink.set_behaviour("/limited", Behaviour(status=429, retry_after="7", body=b"slow down"))
        peer.send(request("/limited") + request("/limited/not") + request("/limited?x=1"))
        limited = (429, {"retry-after": "7", "content-length": "9"}, b"slow down")
        assert [await peer.answer() for _ in range(3)] == [limited, (204, {}, b""), limited]
        sink.set_behaviour("/limited", Behaviour())
        peer.send(request("/limited"))
        assert (await peer.answer())[0] == 204


async def test_a_share_of_the_requests_fails() -> None:
    flaky = Behaviour(fail_rate=0.25, fail_status=503)
    async with started(Sink(behaviour=flaky, rng=random.Random(1))) as sink, client(sink) as peer:
        peer.send(request() * 400)
        answers = [(await peer.answer())[0] for _ in range(400)]
        assert 70 < answers.count(503) < 130
        assert answers.count(503) == sink.by_status[503]
        assert answers.count(204) == sink.by_status[204] == 400 - sink.by_status[503]


async def test_delay_and_jitter_pass_before_the_answer() -> None:
    slow = Behaviour(delay_s=0.05, delay_jitter_s=0.05)
    async with started(Sink(behaviour=slow)) as sink, client(sink) as peer:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        peer.send(request())
        await until(lambda: sink.received == 1)
        assert not sink.by_status
        await peer.answer()
        assert loop.time() - begun >= 0.049  # a timer may fire by the clock's resolution early


# Refusals.


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x00 not HTTP\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413),
        (b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n200000\r\n" + b"x" * (MAX_BODY_BYTES + 1), 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx-trailer: " + b"x" * (3 * MAX_BODY_BYTES), 413),
        (b"POST / HTTP/1.1\r\nx-long: " + b"x" * (1 << 20), 431),
    ],
    ids=["not-http", "upgrade", "length", "length-expect", "chunked", "trailer", "head"],
)
async def test_refuses_and_closes(data: bytes, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "LINGER_S", 0.01)
    async with started(Sink(keep=9)) as sink, client(sink) as peer:
        peer.send(data)
        got, headers, _ = await peer.answer()
        assert (got, headers["connection"]) == (status, "close")
        await until(lambda: sink.connections == 0)
        assert (sink.received, dict(sink.by_status)) == (0, {status: 1})


async def test_a_body_of_the_limit_is_taken() -> None:
    async with started(Sink(keep=1)) as sink, client(sink) as peer:
        peer.send(request(body=b"x" * MAX_BODY_BYTES))
        assert (await peer.answer())[0] == 204
        assert len(sink.kept[0].body) == MAX_BODY_BYTES


async def test_what_was_asked_before_the_nonsense_is_answered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "LINGER_S", 0.01)
    async with started(Sink(behaviour=Behaviour(delay_s=0.02))) as sink, client(sink) as peer:
        peer.send(request() + b"nonsense\r\n\r\n")
        assert [(await peer.answer())[0] for _ in range(2)] == [204, 400]
        assert await peer.rest() == b""
        assert sink.received == 1


# Hostile modes.


@both_loops
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_reset(new_loop: Callable[[], asyncio.AbstractEventLoop], tls: bool) -> None:
    server, trusting = contexts() if tls else (None, None)

    async def scenario() -> None:
        async with started(Sink(behaviour=Behaviour(mode="reset")), ssl=server) as sink, client(sink, trusting) as peer:
            peer.send(request())
            with pytest.raises(ConnectionResetError):
                await peer.rest()
            await until(lambda: sink.connections == 0)
            assert (sink.received, dict(sink.by_status)) == (1, {})

    run(new_loop, scenario)


@both_loops
def test_reset_midway(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def scenario() -> None:
        async with started(Sink(behaviour=Behaviour(mode="reset_midway"))) as sink, client(sink) as peer:
            peer.send(request())
            assert (await peer.reader.readuntil(b"half")).startswith(b"HTTP/1.1 200 OK")
            with pytest.raises(ConnectionResetError):
                await peer.rest()

    run(new_loop, scenario)


@both_loops
@pytest.mark.parametrize("reading", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_endless_ends_when_the_peer_leaves(
    new_loop: Callable[[], asyncio.AbstractEventLoop], reading: bool, tls: bool
) -> None:
    server, trusting = contexts() if tls else (None, None)

    async def scenario() -> None:
        async with started(Sink(behaviour=Behaviour(mode="endless")), ssl=server) as sink:
            async with client(sink, trusting) as peer:
                peer.send(request())
                assert b"chunked" in await peer.reader.readuntil(b"\r\n\r\n")
                (connection,) = sink._connections
                if reading:
                    await peer.reader.readexactly(8 << 20)  # more than any buffer between us
                else:
                    await until(lambda: stopped(connection))  # the buffers are full
                assert sink.connections == 1
            await until(lambda: sink.connections == 0)
            assert stopped(connection)

    run(new_loop, scenario)


def stopped(connection: Any) -> bool:
    return connection._timer is None or bool(connection._timer.cancelled())


@both_loops
@pytest.mark.parametrize("mode", ["hang", "slow_headers"])
def test_a_stuck_answer_ends_when_the_peer_leaves(new_loop: Callable[[], asyncio.AbstractEventLoop], mode: Any) -> None:
    async def scenario() -> None:
        async with started(Sink(behaviour=Behaviour(mode=mode, drip_s=3600))) as sink:
            async with client(sink) as peer:
                peer.send(request())
                await until(lambda: sink.received == 1)
            await until(lambda: sink.connections == 0)
            assert not sink.by_status

    run(new_loop, scenario)


async def test_close_says_nothing() -> None:
    async with started(Sink(behaviour=Behaviour(mode="close"))) as sink, client(sink) as peer:
        peer.send(request())
        assert await peer.rest() == b""
        assert sink.received == 1


async def test_garbage_is_not_http() -> None:
    async with started(Sink(behaviour=Behaviour(mode="garbage"))) as sink, client(sink) as peer:
        peer.send(request())
        answer = await peer.rest()
        assert answer
        assert not answer.startswith(b"HTTP/")


async def test_redirect_points_at_a_path_that_tells_who_followed() -> None:
    async with started(Sink(behaviour=Behaviour(mode="redirect"))) as sink, client(sink) as peer:
        peer.send(request())
        assert (await peer.answer())[:2] == (302, {"location": "/redirected", "content-length": "0"})


async def test_slow_headers_come_byte_by_byte_and_are_an_answer_in_the_end() -> None:
    async with started(Sink(behaviour=Behaviour(mode="slow_headers", drip_s=0))) as sink, client(sink) as peer:
        peer.send(request() * 2)
        assert await peer.reader.readexactly(2 * len(NO_CONTENT)) == 2 * NO_CONTENT
        await until(lambda: sink.by_status[204] == 2)


async def test_huge_headers_are_a_megabyte() -> None:
    async with started(Sink(behaviour=Behaviour(mode="huge_headers"))) as sink, client(sink) as peer:
        peer.send(request(headers={"Connection": "close"}))
        answer = await peer.rest()
        assert len(answer) > 1 << 20
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("junk_after", NO_CONTENT + sink_module.GARBAGE),
        ("informational", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + NO_CONTENT),
        (
            "trailers",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nx-trailer: one\r\nx-trailer: two\r\n\r\n",
        ),
    ],
)
async def test_odd_but_whole_answers(mode: Any, answer: bytes) -> None:
    async with started(Sink(behaviour=Behaviour(mode=mode))) as sink, client(sink) as peer:
        peer.send(request(headers={"Connection": "close"}))
        assert await peer.rest() == answer
        assert sum(sink.by_status.values()) == 1


async def test_a_hostile_path_leaves_the_others_alone() -> None:
    async with started(Sink()) as sink, client(sink) as stuck, client(sink) as peer:
        sink.set_behaviour("/endless", Behaviour(mode="endless"))
        stuck.send(request("/endless"))
        await stuck.reader.readuntil(b"\r\n\r\n")
        peer.send(request())
        assert (await peer.answer())[0] == 204


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay_s": -1},
        {"drip_s": float("nan")},
        {"fail_rate": 1.5},
        {"status": 99},
        {"fail_status": 600},
        {"body": b"x"},
        {"retry_after": "1\r\nx-injected: 1"},
        {"mode": "bogus"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_behaviours_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Behaviour(**wrong)


# Signatures.


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"Webhook-Signature": "v1,AAAA"}, False),
        ({"Webhook-Signature": "gibberish"}, False),
        ({"Webhook-Signature": ""}, False),
        ({"Webhook-Id": "msg_2"}, False),
        ({"Webhook-Timestamp": "soon"}, False),
        ({"Webhook-Timestamp": "9" * 5000}, False),
        (signed(OTHER), False),
    ],
)
async def test_signatures_are_checked_and_bad_ones_counted(change: dict[str, str], ok: bool) -> None:
    async with started(Sink(secrets=SECRET, keep=1)) as sink, client(sink) as peer:
        peer.send(request(headers=signed() | change))
        assert (await peer.answer())[0] == 204  # counted, not answered for
        assert sink.kept[0].signature_ok is ok
        assert sink.bad_signature == (not ok)


async def test_an_unsigned_request_is_bad_and_an_unknown_secret_is_none() -> None:
    async with started(Sink(secrets={"/known": SECRET}, keep=3)) as sink, client(sink) as peer:
        peer.send(request("/known") + request("/unknown") + request("/known?x", headers=signed()))
        for _ in range(3):
            await peer.answer()
        assert [event.signature_ok for event in sink.kept] == [False, None, True]
        assert sink.bad_signature == 1


KEYS = st.binary(min_size=24, max_size=64)


@settings(deadline=None)
@given(
    key=KEYS,
    other=KEYS,
    webhook_id=st.text("abcdef0123456789_", min_size=1, max_size=40),
    body=st.text(max_size=200),
    age_s=st.integers(-700, 700).filter(lambda age_s: abs(abs(age_s) - 300) > 5),  # two clocks are read below
    signers=st.lists(st.sampled_from(["key", "other", "v1a", "garbled"]), min_size=1, max_size=4),
    tamper=st.booleans(),
)
def test_accepts_exactly_what_the_official_package_accepts(
    key: bytes, other: bytes, webhook_id: str, body: str, age_s: int, signers: list[str], tamper: bool
) -> None:
    now = time.time()
    at = int(now) - age_s
    moment = datetime.fromtimestamp(at, tz=UTC)
    right = Webhook(key).sign(webhook_id, moment, body)
    signatures = {
        "key": right,
        "other": Webhook(other).sign(webhook_id, moment, body),
        "v1a": "v1a," + right.removeprefix("v1,"),
        "garbled": "v1," + base64.b64encode(bytes(32)).decode(),
    }
    header = " ".join(signatures[signer] for signer in signers)
    arrived = body + "!" if tamper else body
    headers = {"webhook-id": webhook_id, "webhook-timestamp": str(at), "webhook-signature": header}
    try:
        Webhook(key).verify(arrived, headers, json_parse=False)
        official = True
    except WebhookVerificationError:
        official = False
    ours = verify(key, webhook_id.encode(), str(at).encode(), header.encode(), arrived.encode(), now)
    assert ours == official
    assert official == (not tamper and abs(age_s) < 300 and ("key" in signers or (key == other and "other" in signers)))


@pytest.mark.parametrize(("age_s", "ok"), [(300, True), (301, False), (-300, True), (-301, False)])
def test_the_tolerance_has_two_edges(age_s: int, ok: bool) -> None:
    headers = signed(age_s=age_s)
    at = headers["Webhook-Timestamp"].encode()
    signature = headers["Webhook-Signature"].encode()
    assert verify(decode_secret(SECRET), b"msg_1", at, signature, BODY, float(at) + age_s) is ok


def test_secrets_may_lack_prefix_and_padding() -> None:
    key = b"\xff" * 25
    encoded = base64.b64encode(key).decode()
    for secret in (f"whsec_{encoded}", encoded, encoded.rstrip("=")):
        assert decode_secret(secret) == key == Webhook(secret)._whsecret


@pytest.mark.parametrize("secret", ["whsec_", "", "whsec_not base64!", "whsec_ü", "whsec_A"])
def test_a_malformed_secret_is_refused_with_a_remedy(secret: str) -> None:
    with pytest.raises(InputError, match="copy it whole"):
        Sink(secrets={"/": secret})


# What is remembered.


async def test_what_arrived_is_told() -> None:
    told: list[Received] = []
    async with started(Sink(secrets=SECRET, on_event=told.append)) as sink, client(sink) as peer:
        headers = signed()
        before = time.time()
        peer.send(request("/hook?token=1", headers=headers | {"X-Attempt": "3"}))
        await peer.answer()
        (event,) = told
        assert before <= event.received_at <= time.time()
        assert event == Received(
            path="/hook",
            webhook_id="msg_1",
            timestamp=int(headers["Webhook-Timestamp"]),
            attempt=3,
            received_at=event.received_at,
            body=BODY,
            signature_ok=True,
            status=204,
        )


async def test_a_request_without_the_headers_is_told_too() -> None:
    async with started(Sink(behaviour=Behaviour(mode="hang"), keep=1)) as sink, client(sink) as peer:
        peer.send(request(headers={"X-Attempt": "many"}))
        await until(lambda: sink.received == 1)
        event = sink.kept[0]
        assert (event.webhook_id, event.timestamp, event.attempt, event.signature_ok, event.status) == (None,) * 5


async def test_keeps_the_last_ones_only() -> None:
    async with started(Sink(keep=2)) as sink, client(sink) as peer:
        for number in range(4):
            peer.send(request(f"/{number}"))
            await peer.answer()
        assert [event.path for event in sink.kept] == ["/2", "/3"]


async def test_duplicates_are_counted_by_path_and_id() -> None:
    async with started(Sink()) as sink, client(sink) as peer:
        for path, webhook_id in [("/a", "1"), ("/a", "2"), ("/a", "1"), ("/b", "1"), ("/b?x", "1")]:
            peer.send(request(path, headers={"webhook-id": webhook_id}))
            await peer.answer()
        peer.send(request("/a"))  # without an id it is neither
        await peer.answer()
        assert (sink.received, sink.distinct, sink.duplicates) == (6, 3, 2)


async def test_ids_are_forgotten_after_a_while() -> None:
    async with started(Sink(max_ids=10)) as sink, client(sink) as peer:
        for number in [*range(11), 0, *range(100, 140), 0]:
            peer.send(request(headers={"webhook-id": str(number)}))
            await peer.answer()
            assert len(sink._ids | sink._older_ids) <= 20
        assert sink.duplicates == 1  # the 0 that came ten ids later, not the one that came forty later


async def test_an_error_of_the_listener_is_reported_and_ends_that_connection() -> None:
    def fail(event: Received) -> None:
        raise ZeroDivisionError

    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    try:
        async with started(Sink(on_event=fail)) as sink, client(sink) as peer:
            peer.send(request())
            await until(lambda: sink.connections == 0 and sink.received == 1)
            assert isinstance(reported[0]["exception"].__context__, ZeroDivisionError)
    finally:
        loop.set_exception_handler(None)


# Listening and stopping.


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return server, trusting


@both_loops
def test_serves_tls(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    server, trusting = contexts()

    async def scenario() -> None:
        async with started(Sink(), ssl=server) as sink, client(sink, trusting) as peer:
            assert sink.url == f"https://127.0.0.1:{sink.port}"
            for _ in range(2):
                peer.send(request())
                assert (await peer.answer())[0] == 204

    run(new_loop, scenario)


@both_loops
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("mode", ["answer", "hang", "endless", "slow_headers", "huge_headers"])
def test_stop_ends_what_is_under_way(new_loop: Callable[[], asyncio.AbstractEventLoop], mode: Any, tls: bool) -> None:
    server, trusting = contexts() if tls else (None, None)

    async def scenario() -> None:
        sink = Sink(behaviour=Behaviour(mode=mode, drip_s=3600, delay_s=3600 if mode == "answer" else 0))
        await sink.start(ssl=server)
        async with client(sink, trusting) as peer, client(sink, trusting) as idle:
            peer.send(request() * 2)
            await until(lambda: sink.received == 2 and sink.connections == 2)
            owners = list(sink._connections)
            await sink.stop()
            assert sink.connections == 0
            assert all(stopped(owner) for owner in owners)
            with suppress(ConnectionResetError):
                assert await idle.rest() == b""
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", sink.port)
            await sink.stop()

    run(new_loop, scenario)


async def test_stop_before_start_and_start_again() -> None:
    sink = Sink()
    await sink.stop()
    for _ in range(2):
        async with started(sink), client(sink) as peer:
            peer.send(request())
            assert (await peer.answer())[0] == 204
    assert sink.received == 2


async def test_a_taken_port_is_an_error() -> None:
    async with started(Sink()) as sink:
        with pytest.raises(OSError, match="in use"):
            await Sink().start(port=sink.port)


async def test_ports_can_be_shared() -> None:
    async with started(Sink(), reuse_port=True) as one, started(Sink(), port=one.port, reuse_port=True) as two:
        assert one.port == two.port


# The command.


@contextmanager
def spawned(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = "from dispatcher.sink import sink_command; sink_command()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "--port", "0", *arguments], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def post(url: str, data: bytes) -> int:
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as peer:
        peer.sendall(data)
        return int(peer.recv(4096).split()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_what_comes_and_sums_up_on_a_signal(number: signal.Signals) -> None:
    with spawned("--secret", SECRET, "--path", "/hook") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert url.endswith("/hook")
        assert post(url, request(headers=signed())) == 204
        assert process.stdout.readline().split()[1:] == ["/hook", "msg_1", "message.delivered", "–", "ok"]
        bad = signed(OTHER) | {"X-Attempt": "2"}
        assert post(url, request(headers=bad)) == 204
        assert process.stdout.readline().split()[1:] == ["/hook", "msg_1", "message.delivered", "2", "BAD"]
        assert post(url, request("/other", b"[]", {"webhook-id": "\x9b"})) == 404
        line = process.stdout.readline()
        assert line.split()[2:] == ["Â?", "–", "–", "–"]
        assert line[:-1].isprintable()
        process.send_signal(number)
        summary = process.stdout.read()
        assert summary == "received 3, distinct 2, duplicates 1, bad signature 1; answered 204 × 2, 404 × 1\n"
        assert process.wait(DEADLINE_S) == 0


def test_the_command_speaks_json() -> None:
    with spawned("--json", "--status", "429", "--retry-after", "3") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["listening"]
        assert post(url, request()) == 429
        event = json.loads(process.stdout.readline())
        assert (event["path"], event["type"], event["status"]) == ("/hook", "message.delivered", 429)
        process.terminate()
        summary = json.loads(process.stdout.read())
        assert summary == {
            "received": 1,
            "distinct": 0,
            "duplicates": 0,
            "bad_signature": 0,
            "by_status": {"429": 1},
        }


def test_the_command_ends_by_itself_and_may_be_quiet() -> None:
    result = CliRunner().invoke(sink_command, ["--port", "0", "--quiet", "--seconds", "0"])
    assert result.exit_code == 0
    first, summary = result.output.splitlines()
    assert first.startswith("listening on http://127.0.0.1:")
    assert summary == "received 0, distinct 0, duplicates 0, bad signature 0; answered nothing"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fail-rate", "2"], "give 0 to 1"),
        (["--secret", "whsec_!"], "copy it whole"),
        (["--tls-key", __file__], "--tls-cert"),
        (["--tls-client-ca", __file__], "--tls-cert"),
        (["--tls-cert", __file__], "PEM"),
        (["--host", "192.0.2.1"], "can't listen on 192.0.2.1"),
    ],
)
def test_the_command_refuses_with_a_remedy(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(sink_command, ["--port", "0", "--seconds", "0", *arguments])
    assert isinstance(result.exception, InputError)
    assert says in str(result.exception)


def test_help_teaches_with_examples() -> None:
    text = CliRunner().invoke(sink_command, ["--help"]).output
    assert text.count("  dispatcher sink --") == 2


# v1a


def test_asymmetric_signatures_are_checked_with_the_public_key():
    private, other = new_private_key(), new_private_key()
    signature = make_signer([other, private]).sign(b"msg_1", b"1000", BODY)
    key = read_key(public_key(private))
    assert verify(key, b"msg_1", b"1000", signature, BODY, 1000.0)
    assert not verify(key, b"msg_1", b"1000", signature, BODY + b" ", 1000.0)
    assert not verify(key, b"msg_1", b"1000", make_signer([other]).sign(b"msg_1", b"1000", BODY), BODY, 1000.0)
    assert not verify(key, b"msg_1", b"1000", signature.replace(b"v1a,", b"v1b,"), BODY, 1000.0)
    for junk in (b"", b"v1a,", b"v1a,????", b"v1a," + b"A" * 88, b"v1," + b"A" * 44):
        assert not verify(key, b"msg_1", b"1000", junk, BODY, 1000.0)


@pytest.mark.parametrize("text", ["whpk_", "whpk_????", "whpk_QUJD"])
def test_what_is_no_public_key(text):
    with pytest.raises(InputError, match="32 bytes"):
        read_key(text)
