"""One HTTP/1.1 connection that POSTs ready-made requests, one at a time.

    IDLE ──post()──▶ BUSY ──whole answer──▶ IDLE          answer says close, bytes left over, request not all written ──▶ CLOSED
      │                │
      └─ any byte, EOF ┴─ timeout, reset, not HTTP, a bound reached ──▶ CLOSED

A request is sent once. Whatever ends it becomes one `Outcome`, told to one callback, after the connection has gone back to its pool or was
closed. Bytes that arrive while it is idle, or after the end of an answer, close it: an unasked 200 would otherwise be taken for the next
event's answer. (What reached our kernel after the loop's last look and before post() can't be told from an answer. Asking the kernel first,
FIONREAD, made 9.8 µs per POST 11.4, and would still miss what is on its way: rejected.) Redirects are not followed, bodies not decompressed;
the body is thrown away as it comes.

Two bounds on bytes: the head (all 1xx heads and the final one) within `header_bytes_max`, wherever reads are cut; the answer as a whole,
chunk framing and trailers included, within `header_bytes_max + body_bytes_max`. Beyond that we hang up, but the status stands.

`httptools` (llhttp) parses; header callbacks aren't even registered. A failure reads the head's raw bytes a second time for what it needs of
it, so that a 204 costs nothing for it. A connection has no task and no timer: deadlines are looked at by the pool's sweep.
"""

import asyncio
import re
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import httptools

from dispatcher.domain.outcome import COMMAND_HEADER, Command, Fault, Outcome, command_of, outcome_of_answer
from dispatcher.domain.url import Origin
from dispatcher.ports import TRACED_BODY_BYTES, Limits, Trace

if TYPE_CHECKING:
    from dispatcher.transport.room import Room

RETRY_AFTER_CHARS_MAX = 64  # an HTTP-date takes 29


class HttpConnection(asyncio.Protocol):
    """Owned by its pool. `deadline` is what the sweep looks at: of the answer while BUSY, of idling while IDLE.

    `kept`: it has been back in the pool since it was opened, so the peer may have closed it for its age.
    """

    __slots__ = (
        "_bytes", "_commands", "_complete", "_keep", "_limits", "_loop", "_on_done", "_parser", "_raw", "_status", "_total_deadline",
        "_transport", "closed", "deadline", "kept", "origin", "pool",
    )  # fmt: skip

    def __init__(self, pool: "Room", origin: Origin, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.origin = origin
        self.kept = False
        self.closed = False
        self.deadline = 0.0
        self._limits = limits
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._on_done: Callable[[Outcome], None] | None = None  # set while BUSY
        self._total_deadline = 0.0
        self._commands = False
        # Of the answer under way:
        self._status = 0  # of the final head, once it is whole
        self._raw = b""  # its beginning, 1xx answers included; at least the whole head
        self._bytes = 0
        self._complete = False
        self._keep = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "busy" if self._on_done else "idle"
        return f"HttpConnection({self.origin.host}:{self.origin.port} {state}{', kept' if self.kept else ''})"

    @property
    def busy(self) -> bool:
        return self._on_done is not None

    def post(
        self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None], commands: bool = False
    ) -> None:
        assert self._on_done is None, "one request at a time"
        self._on_done = on_done
        self._commands = commands
        now = self._loop.time()
        headers_s = self._limits.headers_s
        self._total_deadline = now + timeout_s
        self.deadline = now + (timeout_s if timeout_s < headers_s else headers_s)
        self._status = 0
        self._raw = b""
        self._bytes = 0
        self._complete = False
        transport = self._transport
        if self.closed or transport is None or transport.is_closing():
            self._loop.call_soon(self._finish_broken)
        else:
            transport.write(request)

    def close(self) -> None:
        """Hang up; a request in flight ends as a reset."""
        if self._on_done is not None:
            self._finish(Outcome(Fault.RESET, detail="we closed the connection"), keep=False)
        else:
            self._drop()

    def expire(self) -> None:
        """Called by the sweep when `deadline` has passed."""
        if self._on_done is None:
            self._drop()
            return
        what = "answer" if self._status else "headers of an answer"
        self._fail(Fault.TIMEOUT, f"no complete {what} in time")

    # ── asyncio.Protocol ──

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._on_done is None:  # unasked
            self.pool.unasked_bytes += 1
            self._drop()
            return
        head_max = self._limits.header_bytes_max
        if not self._raw:
            self._raw = data
        elif self._bytes < head_max:
            self._raw += data
        self._bytes += len(data)
        try:
            if self._bytes > head_max:
                data = self._beyond_head_bound(data)
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, _HeadTooLongError) as exc:
            if not self._complete:
                self._fail(Fault.PROTOCOL, self._protocol_detail(exc))
                return
            self._keep = False  # a whole answer, then something else
        if self._complete:
            assert self._transport is not None
            self._finish(self._answered(), keep=self._keep and self._transport.get_write_buffer_size() == 0)
        elif self._bytes > head_max + self._limits.body_bytes_max:
            self._finish(self._answered(), keep=False)  # the status is known, more body than we read

    def eof_received(self) -> None:
        self._ended("closed before a whole answer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(f"reset before a whole answer ({exc})" if exc else "closed before a whole answer")
        self._drop()
        self._transport = self._parser = None  # they know us: the collector would have each to find

    # ── httptools callbacks ──

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False  # the beginning of another answer that nobody asked for

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self._complete:  # 1xx answers come before the final one
            self._status = status
            self.deadline = self._total_deadline

    def on_message_complete(self) -> None:
        if self._status and not self._complete:
            self._complete = True
            self._keep = self._parser.should_keep_alive()  # only here: the parser forgets the headers with the message

    # ── ending ──

    def _beyond_head_bound(self, data: bytes) -> bytes:
        """Feed what still belongs within the head's bound, and return the rest if the head ended there."""
        bound = self._limits.header_bytes_max
        self._raw = self._raw[:bound]
        if not self._status:
            cut = len(data) - (self._bytes - bound)
            self._parser.feed_data(data[:cut])
            data = data[cut:]
        if not self._status:
            raise _HeadTooLongError
        return data

    def _ended(self, detail: str) -> None:
        if self._on_done is None:
            self._drop()
        elif self._status and not Head(self._raw).framed:
            self._finish(
                self._answered(), keep=False
            )  # without a length it ends with the connection, however (RFC 9112, 8)
        elif not self._raw and self.kept:
            self._finish(Outcome(Fault.STALE, detail="the kept-alive connection was closed"), keep=False)
        else:
            self._fail(Fault.RESET, detail)

    def _finish_broken(self) -> None:
        if self._on_done is not None:  # the loss may have been told meanwhile
            self._ended("closed before the request was sent")

    def _answered(self) -> Outcome:
        if 200 <= self._status <= 299:
            return outcome_of_answer(self._status, command=Head(self._raw).command if self._commands else None)
        head = Head(self._raw)
        return outcome_of_answer(self._status, head.retry_after, self._kept_head(), head.command)

    def _fail(self, fault: Fault, detail: str) -> None:
        self._finish(Outcome(fault, self._status or None, None, self._kept_head(), detail), keep=False)

    def _finish(self, outcome: Outcome, *, keep: bool) -> None:
        on_done, self._on_done = self._on_done, None
        assert on_done is not None
        if keep:
            self.pool.release(self)
        else:
            self._drop()
        on_done(outcome)

    def _drop(self) -> None:
        if not self.closed:
            self.closed = True
            if self._transport is not None:
                self._transport.abort()  # nothing we still want is in its buffer
            else:
                self._parser = None  # never connected, or no handshake: connection_lost() won't come, see there
            self.pool.closed(self)

    def _kept_head(self) -> bytes | None:
        return self._raw[: self._limits.head_kept_bytes] or None

    def _protocol_detail(self, exc: Exception) -> str:
        if isinstance(exc, _HeadTooLongError):
            return "the head of the answer is too long"
        if self._parser.get_status_code() == 101:
            return "101 Switching Protocols, which nobody asked for"
        return f"not HTTP/1.1: {exc}"


class TracedConnection(HttpConnection):
    """A connection for one test: it says when what happened, keeps the answer's beginning, and is never used again."""

    __slots__ = ("_trace",)

    def __init__(
        self, pool: "Room", origin: Origin, limits: Limits, loop: asyncio.AbstractEventLoop, trace: Trace
    ) -> None:
        super().__init__(pool, origin, limits, loop)
        self._trace = trace

    def post(
        self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None], commands: bool = False
    ) -> None:
        self._trace.sent = perf_counter()
        super().post(request, timeout_s, on_done, commands)

    def data_received(self, data: bytes) -> None:
        if self._trace.answered is None and self.busy:
            self._trace.answered = perf_counter()
        super().data_received(data)

    def _finish(self, outcome: Outcome, *, keep: bool) -> None:
        self._trace.ended = perf_counter()
        self._trace.head, self._trace.body = read_answer(self._raw)
        super()._finish(outcome, keep=False)


def read_answer(raw: bytes) -> tuple[bytes, bytes]:
    """Return the final answer's head and the beginning of its body, of an answer's raw beginning. Without a whole head: none, and what came."""
    rest = raw
    while (end := _HEAD_ENDS.search(rest)) is not None:
        head, rest = rest[: end.start()], rest[end.end() :]
        if not _INTERIM.match(head):
            body = _Body(raw)
            return head, (rest if body.broken and not body.text else body.text)[:TRACED_BODY_BYTES]
    return b"", raw[:TRACED_BODY_BYTES]


_HEAD_ENDS = re.compile(rb"\r?\n\r?\n")
_INTERIM = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9]\b")


class _Body:
    """An answer's body without its chunk framing, as far as the raw bytes go. `broken`: our parser doesn't take it for HTTP."""

    def __init__(self, raw: bytes) -> None:
        self.text = b""
        self.broken = False
        try:
            httptools.HttpResponseParser(self).feed_data(raw)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.broken = True

    def on_body(self, data: bytes) -> None:
        if len(self.text) < TRACED_BODY_BYTES:
            self.text += data


class _HeadTooLongError(Exception):
    """No final head within the bound on its bytes."""


class Head:
    """What can be told of an answer from its raw bytes, or their beginning.

    `status`: 0 while the final head isn't whole. `framed`: it says where the answer ends. `exact`: it is one, to its last byte."""

    def __init__(self, raw: bytes) -> None:
        self.status = 0
        self.framed = False
        self.exact = False
        self._ended = False
        self.retry_after: str | None = None
        self.command: Command | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        try:
            self._parser.feed_data(raw)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.exact = False  # but what follows the head doesn't matter otherwise
        self._parser = None  # which knows us too

    def on_message_begin(self) -> None:
        self.exact = False
        if not self.status:  # the one before was a 1xx
            self.framed = False
            self.retry_after = self.command = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer, or another answer
        name = name.lower()
        if name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self.framed = True
        elif name == b"retry-after" and self.retry_after is None:
            self.retry_after = value.decode("latin-1").strip()[:RETRY_AFTER_CHARS_MAX]
        elif name == COMMAND_HEADER and self.command is None:
            self.command = command_of(value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        if not self.status and self._parser.get_status_code() >= 200:
            self.status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        self.exact = bool(self.status) and not self._ended
        self._ended = bool(self.status)
