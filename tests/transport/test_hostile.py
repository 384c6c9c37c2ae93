"""Receivers that don't answer as they should, on real sockets; and the parser, fed cut by cut."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.domain.outcome import Command, Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.sink import Behaviour, Sink
from dispatcher.transport.aiohttp_transport import AiohttpTransport
from dispatcher.transport.connection import HttpConnection
from tests.transport.peers import OK, REQUEST, connected, make_peer, make_pool, new_pool, post, start, until

pytestmark = pytest.mark.usefixtures("each_transport")

SMALL = Limits(headers_s=0.2, header_bytes_max=1_000, body_bytes_max=2_000, head_kept_bytes=100)


class Wire:
    """A connection without a socket: the test is the loop that feeds it. `settle` lets aiohttp's tasks have their turns."""

    class Socket:
        aborted = False
        unwritten = 0
        written = b""

        def write(self, data: bytes) -> None:
            self.written += data

        def writelines(self, data: Any) -> None:
            self.written += b"".join(data)

        def is_closing(self) -> bool:
            return self.aborted

        def abort(self) -> None:
            self.aborted = True

        close = abort

        def get_write_buffer_size(self) -> int:
            return self.unwritten

        def get_extra_info(self, name: str) -> None:
            return None

        def pause_reading(self) -> None:
            pass

        resume_reading = pause_reading

    def __init__(self, limits: Limits = SMALL) -> None:
        self.room = new_pool(limits)
        connection, self.protocol = self.room._make(Origin("http", "localhost", 80))
        self.connection: Any = connection
        self.socket = self.Socket()
        self.protocol.connection_made(self.socket)  # type: ignore[arg-type]
        self.outcomes: list[Outcome] = []

    async def settle(self) -> None:
        if not isinstance(self.connection, HttpConnection):
            for _ in range(5):
                await asyncio.sleep(0)

    async def post(self, *, commands: bool = False) -> None:
        self.connection.post(REQUEST, 10, self.outcomes.append, commands)
        await self.settle()
        assert self.socket.written == REQUEST
        self.socket.written = b""

    async def feed(self, *pieces: bytes, settle: bool = True) -> None:
        """Feed pieces as the loop would: each in a turn of its own, or all in one."""
        for piece in pieces:
            if not self.connection.closed and not self.socket.aborted:
                self.protocol.data_received(piece)
                if settle:
                    await self.settle()
        await self.settle()
        await self._lost_if_aborted()

    async def eof(self) -> None:
        self.protocol.eof_received()
        await self._lost_if_aborted()

    async def close(self) -> None:
        if isinstance(self.room, AiohttpTransport):  # of the pool itself nothing was used
            self.connection.close()
            await self.room.close()

    async def _lost_if_aborted(self) -> None:
        if self.socket.aborted:
            self.protocol.connection_lost(None)
            await self.settle()


@contextlib.asynccontextmanager
async def make_wire(limits: Limits = SMALL) -> AsyncIterator[Wire]:
    wire = Wire(limits)
    try:
        yield wire
    finally:
        await wire.close()


# (answer, ended by EOF) → fault, status, kept. The same however it is cut.
FRAMED = b"content-length: 2\r\n"
ANSWERS: dict[str, tuple[bytes, bool, Fault | None, int | None, bool]] = {
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", False, None, 204, True),
    "no reason phrase": (b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", False, None, 200, True),
    "length": (OK, False, None, 200, True),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\n\r\n", False, None, 200, True),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\na: b\r\nc: d\r\n\r\n", False, None, 200, True),
    "1xx first": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, False, None, 200, True),
    "only 1xx, then EOF": (b"HTTP/1.1 100 Continue\r\n\r\n", True, Fault.RESET, None, False),
    "1xx, then a part": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", True, Fault.RESET, 200, False),
    "1xx with a length, then no length": (b"HTTP/1.1 103 X\r\ncontent-length: 9\r\n\r\nHTTP/1.1 200 OK\r\n\r\nall", True, None, 200, False),
    "101": (b"HTTP/1.1 101 X\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", False, Fault.PROTOCOL, None, False),
    "101 without upgrade": (b"HTTP/1.1 101 X\r\n\r\n", False, Fault.PROTOCOL, None, False),
    "200 that offers an upgrade": (b"HTTP/1.1 200 OK\r\nupgrade: h2c\r\nconnection: upgrade\r\n" + FRAMED + b"\r\nok", False, None, 200, True),
    "status below 100": (b"HTTP/1.1 000 OK\r\n" + FRAMED + b"\r\nok", True, Fault.RESET, None, False),
    "1.0": (b"HTTP/1.0 200 OK\r\n" + FRAMED + b"\r\nok", False, None, 200, False),
    "1.0 keep-alive": (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n" + FRAMED + b"\r\nok", False, None, 200, True),
    "1.0 to the end": (b"HTTP/1.0 200 OK\r\n\r\nok", True, None, 200, False),
    "close": (b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + FRAMED + b"\r\nok", False, None, 200, False),
    "close, no body": (b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n", False, None, 204, False),
    "no length, to the end": (b"HTTP/1.1 200 OK\r\n\r\nok", True, None, 200, False),
    "no length, failure": (b"HTTP/1.1 500 X\r\n\r\ncontent-length: 5", True, Fault.STATUS, 500, False),
    "unknown coding, to the end": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nzz", True, None, 200, False),
    "304": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", False, Fault.STATUS, 304, True),
    "truncated length": (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", True, Fault.RESET, 200, False),
    "truncated chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf", True, Fault.RESET, 200, False),
    "no last chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", True, Fault.RESET, 200, False),
    "truncated head": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", True, Fault.RESET, None, False),
    "nothing": (b"", True, Fault.RESET, None, False),
    "garbage": (b"\x00\xff\x16\x03 this is not HTTP", False, Fault.PROTOCOL, None, False),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2p1\r\n", False, Fault.PROTOCOL, None, False),
    "lines without CR": (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", False, Fault.PROTOCOL, None, False),
    "folded header": (b"HTTP/1.1 200 OK\r\nx: y\r\n z\r\n\r\n", False, Fault.PROTOCOL, None, False),
    "NUL in a header": (b"HTTP/1.1 200 OK\r\nx: \x00\r\n\r\n", False, Fault.PROTOCOL, None, False),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok", False, Fault.PROTOCOL, None, False),
    "length and chunks": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n", False, Fault.PROTOCOL, None, False),
    "bad length": (b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok", False, Fault.PROTOCOL, None, False),
    "bad chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nok\r\n", False, Fault.PROTOCOL, 200, False),
    "junk after": (OK + b"\x00junk", False, None, 200, False),
    "another answer after": (OK + OK, False, None, 200, False),
    "another answer begun": (OK + b"HTTP/1.1 2", False, None, 200, False),
    "a body that 204 can't have": (b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nok", False, None, 204, False),
}  # fmt: skip


# What aiohttp makes of some of them, as a set: with "together" it depends on what the loop reads at once. None of it is unsafe: the connection
# ends in each case, and what isn't taken for an answer is sent again.
DELIVERED, REFUSED = (None, 200, False), (Fault.PROTOCOL, 200, False)
AIOHTTP: dict[str, tuple[bool, set[tuple[Fault | None, int | None, bool]]]] = {  # name: ended by EOF, outcomes
    "status below 100": (False, {(Fault.PROTOCOL, None, False)}),
    "lines without CR": (False, {DELIVERED}),
    "folded header": (True, {DELIVERED}),
    "junk after": (False, {DELIVERED, REFUSED}),
    "a body that 204 can't have": (False, {(None, 204, False), (Fault.PROTOCOL, 204, False)}),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_is_read_the_same_however_it_is_cut(name: str, each_transport: str) -> None:
    answer, eof, fault, status, kept = ANSWERS[name]
    expected = {(fault, status, kept)}
    if each_transport == "aiohttp" and name in AIOHTTP:
        eof, expected = AIOHTTP[name]
    cuts = [[answer], [bytes([byte]) for byte in answer]]
    cuts += [[answer[:at], answer[at:]] for at in range(1, len(answer))]
    seen = set()
    for pieces in cuts:
        for settle in (True, False):
            async with make_wire() as wire:
                await wire.post()
                await wire.feed(*pieces, settle=settle)
                if eof and not wire.connection.closed:
                    assert not wire.outcomes
                    await wire.eof()
                assert len(wire.outcomes) == 1, pieces
                outcome, closed = wire.outcomes[0], wire.connection.closed
                assert closed is wire.socket.aborted
                seen.add((outcome.fault, outcome.status, not closed))
                assert seen <= expected, pieces
                wire.protocol.connection_lost(None)
                await wire.settle()
                assert len(wire.outcomes) == 1
    assert seen == expected


async def test_a_connection_reads_answer_after_answer() -> None:
    async with make_wire() as wire:
        for answer, _, _, status, kept in ANSWERS.values():
            if kept:
                await wire.post()
                await wire.feed(answer)
                assert wire.outcomes[-1].status == status
        assert not wire.connection.closed


@pytest.mark.parametrize("piece_bytes", [1, 7, 1_000, 100_000])
async def test_the_bound_on_the_head_is_exact(piece_bytes: int) -> None:
    for extra, fits in ((0, True), (1, False)):
        hints = b"HTTP/1.1 103 X\r\n\r\n"
        head = hints + b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nx: "
        head += b"x" * (SMALL.header_bytes_max - len(head) - 4 + extra) + b"\r\n\r\n"
        answer = head + b"!"
        async with make_wire() as wire:
            await wire.post()
            await wire.feed(*(answer[at : at + piece_bytes] for at in range(0, len(answer), piece_bytes)))
            outcome = wire.outcomes[0]
            assert (outcome.fault, outcome.status) == ((None, 200) if fits else (Fault.PROTOCOL, None))
            if not fits:
                assert wire.connection.closed
                assert "too long" in outcome.detail
                assert outcome.response_head == answer[: SMALL.head_kept_bytes]


async def test_what_is_kept_of_an_answer_is_bounded() -> None:
    async with make_wire() as wire:
        await wire.post()
        await wire.feed(b"HTTP/1.1 500 X\r\n\r\n" + b"x" * 1_500, b"x" * 1_000)
        assert len(wire.connection._raw) == SMALL.header_bytes_max
        await wire.eof()
        assert wire.outcomes[0].response_head == (b"HTTP/1.1 500 X\r\n\r\n" + b"x" * 1_500)[: SMALL.head_kept_bytes]


@pytest.mark.parametrize(
    "endless",
    [
        b"HTTP/1.1 %d X\r\n\r\n",
        b"HTTP/1.1 %d X\r\ncontent-length: 99999999\r\n\r\n",
        b"HTTP/1.1 %d X\r\ntransfer-encoding: chunked\r\n\r\nffffff\r\n",
        b"HTTP/1.1 %d X\r\ntransfer-encoding: chunked\r\n\r\n1;",  # an endless chunk extension
        b"HTTP/1.1 %d X\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ",  # an endless trailer
    ],
)
@pytest.mark.parametrize(("status", "fault"), [(200, None), (500, Fault.STATUS)])
@pytest.mark.parametrize("settle", [True, False])
async def test_an_endless_answer_is_cut_off_and_its_status_stands(
    endless: bytes, status: int, fault: Fault | None, settle: bool, each_transport: str
) -> None:
    least = SMALL.body_bytes_max
    if each_transport == "aiohttp" and endless.endswith(b"x: "):
        fault, least = Fault.PROTOCOL, SMALL.header_bytes_max - 1  # its bound on one header holds for a trailer too
    async with make_wire() as wire:
        await wire.post()
        most = SMALL.header_bytes_max + SMALL.body_bytes_max
        if not settle:  # all of it in one read
            wire.protocol.data_received(endless % status + b"x" * most)
            await wire.settle()
        else:
            await wire.feed(endless % status)
            fed = 0
            while not wire.outcomes:
                await wire.feed(b"x" * 100)
                fed += 100
                assert fed < most + 200
            assert fed > least
        assert (wire.outcomes[0].fault, wire.outcomes[0].status) == (fault, status)
        assert wire.socket.aborted


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        (b"Retry-After: 120\r\n", "120"),
        (b"retry-after:\t Wed, 21 Oct 2015 07:28:00 GMT  \r\n", "Wed, 21 Oct 2015 07:28:00 GMT"),
        (b"x-retry-after: 5\r\n", None),
        (b"x: y\r\nRETRY-AFTER: 1\r\nretry-after: 2\r\n", "1"),
        (b"retry-after: " + b"9" * 100 + b"\r\n", "9" * 64),
        (b"retry-after: \xff\r\n", "ÿ"),
        (b"", None),
    ],
)
async def test_retry_after(headers: bytes, value: str | None) -> None:
    for before in (b"", b"HTTP/1.1 103 X\r\nretry-after: 77\r\n\r\n"):
        async with make_wire() as wire:
            await wire.post()
            await wire.feed(before + b"HTTP/1.1 429 X\r\n" + headers + b"content-length: 16\r\n\r\n\r\nretry-after: 3")
            assert (wire.outcomes[0].status, wire.outcomes[0].retry_after) == (429, value)


@pytest.mark.parametrize(
    ("headers", "command"),
    [
        (b"webhook-delivery: disable\r\n", Command.DISABLE), (b"WEBHOOK-Delivery:\tAbort-Message \r\n", Command.ABORT),
        (b"webhook-delivery: disable\r\nwebhook-delivery: abort-message\r\n", Command.DISABLE), (b"x-webhook-delivery: disable\r\n", None),
        (b"webhook-delivery: disable now\r\n", None), (b"webhook-delivery:\r\n", None), (b"webhook-delivery: \xff\r\n", None), (b"", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 500])
async def test_commands(headers: bytes, command: Command | None, status: int) -> None:
    """In the final head only: not in a 1xx, and not in the body."""
    for before in (b"", b"HTTP/1.1 103 X\r\nwebhook-delivery: disable\r\n\r\n"):
        async with make_wire() as wire:
            await wire.post(commands=True)
            await wire.feed(
                before
                + b"HTTP/1.1 %d X\r\n" % status
                + headers
                + b"content-length: 27\r\n\r\n\r\nwebhook-delivery: disable"
            )
            assert (wire.outcomes[0].status, wire.outcomes[0].command) == (status, command)


@pytest.mark.parametrize(
    ("nonsense", "thin", "aiohttp"),
    [(b"zz\r\n", Fault.PROTOCOL, Fault.PROTOCOL), (b"0\r\n\r\njunk", None, Fault.PROTOCOL), (b"0\r\n\r\n" + OK, None, None)],
)  # fmt: skip
async def test_nonsense_in_what_the_parser_has_held_back_is_told_once(
    nonsense: bytes, thin: Fault | None, aiohttp: Fault | None, each_transport: str
) -> None:
    """aiohttp parses on when its task has made room; then it is within the task that the connection ends."""
    async with make_wire(Limits(body_bytes_max=1_000_000)) as wire:
        await wire.post()
        chunk = b"40000\r\n" + b"x" * 0x40000 + b"\r\n"
        await wire.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk, chunk + nonsense)
        for _ in range(5):
            await wire.settle()
        expected = thin if each_transport == "thin" else aiohttp
        assert [(outcome.fault, outcome.status) for outcome in wire.outcomes] == [(expected, 200)]
        assert wire.connection.closed


async def test_a_trailer_is_no_header() -> None:
    async with make_wire() as wire:
        await wire.post()
        await wire.feed(b"HTTP/1.1 503 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\nretry-after: 9\r\n\r\n")
        assert (wire.outcomes[0].status, wire.outcomes[0].retry_after) == (503, None)


async def test_an_answer_before_the_request_was_all_written_stands_but_ends_the_connection() -> None:
    async with make_wire() as wire:
        wire.socket.unwritten = 10
        await wire.post()
        await wire.feed(OK)
        assert wire.outcomes == [Outcome(None, 200)]
        assert wire.socket.aborted


async def test_a_lost_connection_is_told_once_whatever_else_ends_it() -> None:
    for first in ("eof", "expire", "close"):
        async with make_wire() as wire:
            await wire.post()
            if first == "eof":
                await wire.eof()
            else:
                getattr(wire.connection, first)()
            wire.protocol.connection_lost(ConnectionResetError())
            wire.connection.close()
            wire.connection.expire()
            await wire.settle()
            assert len(wire.outcomes) == 1


async def test_bytes_that_come_before_the_request_is_written_are_no_answer_to_it() -> None:
    """aiohttp writes some turns of the loop after post(); the thin transport at once, so there nothing can come between."""
    async with make_wire() as wire:
        if isinstance(wire.connection, HttpConnection):
            await wire.post()
            return
        for turns in range(5):
            async with make_wire() as wire:
                wire.connection.kept = True
                wire.connection.post(REQUEST, 10, wire.outcomes.append)
                for _ in range(turns):
                    await asyncio.sleep(0)
                written = bool(wire.socket.written)
                wire.protocol.data_received(OK)
                await wire.settle()
                assert [outcome.fault for outcome in wire.outcomes] == [None if written else Fault.STALE]
                assert wire.room.unasked_bytes == (not written)
                assert wire.socket.written == (REQUEST if written else b"")
        assert written


# ── on sockets ──


async def test_a_real_early_answer() -> None:
    """413 as soon as the head is there, while we still write megabytes that nobody reads."""
    async with make_peer() as peer, make_pool() as pool:
        peer.on_open = lambda talk: talk.transport.pause_reading()
        connection = await connected(pool, peer.origin)
        await until(lambda: peer.talks)
        done = start(connection, REQUEST.replace(b"4", b"20000000") + b"x" * 19_999_996)
        for _ in range(5):
            await asyncio.sleep(0)  # aiohttp writes some turns later
        peer.talks[0].send(b"HTTP/1.1 413 X\r\ncontent-length: 0\r\n\r\n")
        assert (await done).status == 413
        assert connection.closed
        assert pool.count == 0


async def test_a_long_answer_is_delivered_and_its_connection_kept_if_its_end_can_be_checked(
    each_transport: str,
) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + b"x" * 2_000
    async with make_peer(answer) as peer, make_pool(SMALL) as pool:
        assert await post(pool, peer.origin) == Outcome(None, 200)
        assert pool.count == (0 if each_transport == "aiohttp" else 1)


async def test_half_closed_before_the_answer() -> None:
    async with make_peer() as peer, make_pool() as pool:
        peer.on_request = lambda talk: talk.half_close()
        assert (await post(pool, peer.origin)).fault is Fault.RESET
        assert pool.count == 0
        await until(lambda: peer.talks[0].lost)


async def test_half_closed_after_the_answer() -> None:
    async with make_peer() as peer, make_pool() as pool:
        peer.on_request = lambda talk: talk.half_close(OK)
        assert (await post(pool, peer.origin)).delivered
        await until(lambda: pool.count == 0)
        await until(lambda: peer.talks[0].lost)


async def test_half_closed_while_idle() -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        assert (await post(pool, peer.origin)).delivered
        peer.talks[0].half_close()
        await until(lambda: pool.count == 0)
        assert pool.try_acquire(peer.origin) is None
        assert pool.unasked_bytes == 0


@pytest.mark.parametrize("ending", ["close", "half_close", "reset"])
async def test_an_answer_without_length_ends_with_the_connection(ending: str) -> None:
    async with make_peer(b"HTTP/1.1 200 OK\r\n\r\nsome") as peer, make_pool() as pool:
        connection = await connected(pool, peer.origin)
        done = start(connection)
        await until(lambda: connection._status)
        getattr(peer.talks[0], ending)()
        assert await done == Outcome(None, 200)
        assert pool.count == 0


@pytest.mark.parametrize("ending", ["close", "half_close", "reset"])
@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\nconte", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"])
async def test_broken_off_mid_answer(ending: str, part: bytes) -> None:
    async with make_peer(OK, part) as peer, make_pool() as pool:
        assert (await post(pool, peer.origin)).delivered
        connection: Any = pool.try_acquire(peer.origin)
        done = start(connection)
        await until(lambda: connection._raw)
        getattr(peer.talks[0], ending)()
        outcome = await done
        assert (outcome.fault, outcome.status) == (Fault.RESET, 200 if b"half" in part else None)
        assert outcome.response_head == part
        assert pool.count == 0


@pytest.mark.parametrize("ending", ["close", "half_close", "reset"])
@pytest.mark.parametrize("kept", [False, True])
async def test_no_byte_of_an_answer(ending: str, kept: bool) -> None:
    async with make_peer() as peer, make_pool() as pool:
        if kept:
            peer.answers(OK)
            await post(pool, peer.origin)
        peer.on_request = lambda talk: getattr(talk, ending)()
        assert (await post(pool, peer.origin)).fault is (Fault.STALE if kept else Fault.RESET)
        assert pool.count == 0


async def test_an_unasked_answer_while_idle_closes_the_connection() -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        assert (await post(pool, peer.origin)).delivered
        peer.talks[0].send(OK)
        await until(lambda: pool.count == 0)
        assert pool.unasked_bytes == 1
        peer.answers(b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n")
        assert (await post(pool, peer.origin)).status == 500
        assert (len(peer.talks), peer.requests) == (2, 2)


async def test_an_unasked_answer_on_an_acquired_connection() -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        await post(pool, peer.origin)
        connection: Any = pool.try_acquire(peer.origin)
        peer.talks[0].send(OK)
        await until(lambda: connection.closed)
        assert (await start(connection)).fault is Fault.STALE
        assert peer.requests == 1


async def test_a_peer_that_speaks_first_gets_no_request() -> None:
    async with make_peer() as peer, make_pool() as pool:
        peer.on_open = lambda talk: talk.send(b"220 mail.example.com ESMTP\r\n")
        result = await connected(pool, peer.origin)
        if not isinstance(result, Outcome):
            await until(lambda: result.closed)
            result = await start(result)
        assert result.fault is Fault.RESET
        assert (pool.count, peer.requests) == (0, 0)


@pytest.mark.parametrize("junk", [b"junk", OK, b"HTTP/1.1 200"])
async def test_junk_in_the_segment_of_the_answer(junk: bytes, each_transport: str) -> None:
    async with make_peer(OK + junk) as peer, make_pool() as pool:
        for n in (1, 2):
            outcome = await post(pool, peer.origin)
            assert outcome.fault is (Fault.PROTOCOL if each_transport == "aiohttp" and junk == b"junk" else None)
            assert outcome.status == 200
            assert (pool.count, peer.requests, len(peer.talks)) == (0, n, n)


async def test_headers_one_byte_at_a_time_end_at_the_bound_on_their_time() -> None:
    async with make_pool(SMALL) as pool:
        sink = Sink(behaviour=Behaviour(mode="slow_headers", drip_s=0.01, status=200, body=b"x"))
        await sink.start()
        try:
            outcome = await post(pool, Origin("http", "127.0.0.1", sink.port))
            assert (outcome.fault, outcome.status) == (Fault.TIMEOUT, None)
            assert outcome.response_head is not None
            assert b"HTTP/1.1 200".startswith(outcome.response_head[:12])
        finally:
            await sink.stop()


@pytest.mark.parametrize(
    ("behaviour", "fault", "status", "kept"),
    [
        (Behaviour(mode="hang"), Fault.TIMEOUT, None, False),
        (Behaviour(mode="reset"), Fault.RESET, None, False),
        (Behaviour(mode="reset_midway"), Fault.RESET, 200, False),
        (Behaviour(mode="close"), Fault.RESET, None, False),
        (Behaviour(mode="redirect"), Fault.STATUS, 302, True),
        (Behaviour(mode="endless"), None, 200, False),
        (Behaviour(mode="huge_headers"), Fault.PROTOCOL, None, False),
        (Behaviour(mode="garbage"), Fault.PROTOCOL, None, False),
        (Behaviour(mode="junk_after"), None, 204, False),
        (Behaviour(mode="informational"), None, 204, True),
        (Behaviour(mode="trailers"), None, 200, True),
    ],
    ids=lambda value: value.mode if isinstance(value, Behaviour) else None,
)
async def test_every_mode_of_the_sink(
    behaviour: Behaviour, fault: Fault | None, status: int | None, kept: bool, each_transport: str
) -> None:
    if each_transport == "aiohttp" and behaviour.mode == "junk_after":
        fault = Fault.PROTOCOL  # as above
    async with make_pool(SMALL) as pool:
        sink = Sink(behaviour=behaviour, keep=10)
        await sink.start()
        try:
            outcome = await post(pool, Origin("http", "127.0.0.1", sink.port))
            assert (outcome.fault, outcome.status) == (fault, status)
            assert (pool.count == 1) is kept
            assert [event.path for event in sink.kept] == ["/hook"]  # a redirect isn't followed
        finally:
            await sink.stop()


async def test_a_callback_that_raises_does_not_end_the_deadlines_of_others() -> None:
    async with make_peer() as peer, make_pool(SMALL) as pool:
        first, second = await connected(pool, peer.origin), await connected(pool, peer.origin)
        told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))
        try:

            def fail(outcome: Outcome) -> None:
                raise RuntimeError("a bug of the caller's")

            first.post(REQUEST, 5, fail)
            assert (await start(second)).fault is Fault.TIMEOUT
            assert [str(context["exception"]) for context in told] == ["a bug of the caller's"]
        finally:
            loop.set_exception_handler(None)
        assert pool.count == 0
