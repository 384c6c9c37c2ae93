"""One HTTP/1.1 connection that POSTs ready-made requests, one at a time.

    IDLE ──post()──▶ BUSY ──whole answer──▶ IDLE          answer says close, bytes left over, request not all written ──▶ CLOSED
      │                │
      └─ any byte, EOF ┴─ timeout, reset, not HTTP, a bound reached ──▶ CLOSED

A request is sent once. Whatever ends it becomes one `Outcome`, told to one callback, after the connection has gone back to its pool or was
closed. Bytes that arrive while it is idle, or after the end of an answer, close it: an unasked 200 would otherwise be taken for the next
event's answer. Redirects are not followed, bodies not decompressed; the body is counted and thrown away.

`httptools` (llhttp) parses; header callbacks aren't even registered. What a failure needs of the head is cut out of
the raw bytes then, so that a
204 costs nothing for it. One connection costs a task nothing: deadlines are looked at by the pool's sweep.
"""

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools

from dispatcher.domain.outcome import Fault, Outcome, outcome_of_answer
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits

if TYPE_CHECKING:
    from dispatcher.transport.pool import Pool

_RETRY_AFTER = re.compile(rb"\r?\nretry-after:[ \t]*([^\r\n]{1,64})", re.IGNORECASE)
_FRAMED = re.compile(rb"\r?\n(content-length|transfer-encoding):", re.IGNORECASE)


class HttpConnection(asyncio.Protocol):
    """Owned by its pool. `deadline` is what the sweep looks at: of the answer while BUSY, of idling while IDLE."""

    __slots__ = (
        "_body_bytes", "_complete", "_head_bytes", "_headers_done", "_limits", "_loop", "_on_done", "_parser", "_raw", "_status",
        "_surplus", "_total_deadline", "_transport", "closed", "deadline", "origin", "pool", "posts",
    )  # fmt: skip

    def __init__(self, pool: "Pool", origin: Origin, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.origin = origin
        self.posts = 0
        self.closed = False
        self.deadline = 0.0
        self._limits = limits
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._on_done: Callable[[Outcome], None] | None = None  # set while BUSY
        self._total_deadline = 0.0
        self._status = 0
        self._raw = b""
        self._head_bytes = 0
        self._body_bytes = 0
        self._headers_done = False
        self._complete = False
        self._surplus = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "busy" if self._on_done else "idle"
        return f"HttpConnection({self.origin.host}:{self.origin.port} {state}, {self.posts} posts)"

    @property
    def busy(self) -> bool:
        return self._on_done is not None

    def post(self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None]) -> None:
        assert self._on_done is None, "one request at a time"
        self._on_done = on_done
        self.posts += 1
        now = self._loop.time()
        self._total_deadline = now + timeout_s
        self.deadline = now + min(timeout_s, self._limits.headers_s)
        self._forget_answer()
        if self.closed or self._transport is None or self._transport.is_closing():
            self._loop.call_soon(self._finish_broken)
            return
        self._transport.write(request)

    def close(self) -> None:
        """Hang up; a request in flight ends as a reset."""
        if self._on_done is not None:
            self._finish(Outcome(Fault.RESET, detail="we closed the connection"), keep=False)
        else:
            self._drop()

    def expire(self, now: float) -> None:
        """Called by the sweep when `deadline` has passed."""
        if self._on_done is None:
            self._drop()
            return
        what = "answer" if self._headers_done else "headers of an answer"
        self._finish(
            Outcome(Fault.TIMEOUT, self._status_so_far(), None, self._head(), f"no complete {what} in time"), keep=False
        )

    # ── asyncio.Protocol ──

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._on_done is None:  # unasked
            self.pool.unasked_bytes += 1
            self._drop()
            return
        if not self._headers_done:
            self._head_bytes += len(data)
        kept = len(self._raw)
        if not kept:
            self._raw = data
        elif kept < self._limits.header_bytes_max:
            self._raw += data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self._complete:
                self._finish(
                    Outcome(Fault.PROTOCOL, self._status_so_far(), None, self._head(), f"not HTTP/1.1: {exc}"),
                    keep=False,
                )
                return
            self._surplus = True  # a whole answer, then something else
        if self._complete:
            assert self._transport is not None
            written = self._transport.get_write_buffer_size() == 0
            keep = written and not self._surplus and self._parser.should_keep_alive()
            self._finish(self._answered(), keep=keep)
        elif not self._headers_done:
            if self._head_bytes > self._limits.header_bytes_max:
                self._finish(
                    Outcome(Fault.PROTOCOL, None, None, self._head(), "the head of the answer is too long"), keep=False
                )
        elif self._body_bytes > self._limits.body_bytes_max:
            self._finish(self._answered(), keep=False)  # the status is known, more body than we read

    def eof_received(self) -> None:
        self._ended("closed before a whole answer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(f"reset before a whole answer ({exc})" if exc else "closed before a whole answer")
        self._drop()

    # ── httptools callbacks ──

    def on_message_begin(self) -> None:
        if self._complete:
            self._surplus = True

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx answers come before the final one and count against the head's bound
            self._status = status
            self._headers_done = True
            self.deadline = self._total_deadline

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._headers_done:
            self._complete = True

    # ── ending ──

    def _ended(self, detail: str) -> None:
        if self._on_done is None:
            self._drop()
        elif self._headers_done and not _FRAMED.search(self._raw.partition(b"\r\n\r\n")[0]):
            self._finish(self._answered(), keep=False)  # an answer without a length ends with the connection
        elif not self._raw and self.posts > 1:
            self._finish(Outcome(Fault.STALE, detail="the kept-alive connection was closed"), keep=False)
        else:
            self._finish(Outcome(Fault.RESET, self._status_so_far(), None, self._head(), detail), keep=False)

    def _finish_broken(self) -> None:
        if self._on_done is not None:  # the loss may have been told meanwhile
            self._ended("closed before the request was sent")

    def _answered(self) -> Outcome:
        if 200 <= self._status <= 299:
            return outcome_of_answer(self._status)
        found = _RETRY_AFTER.search(self._raw.partition(b"\r\n\r\n")[0])
        return outcome_of_answer(self._status, found[1].decode("latin-1") if found else None, self._head())

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
            self.pool.closed(self)

    def _status_so_far(self) -> int | None:
        return self._status or None

    def _head(self) -> bytes | None:
        return bytes(self._raw[: self._limits.head_kept_bytes]) or None

    def _forget_answer(self) -> None:
        self._status = 0
        self._raw = b""
        self._head_bytes = 0
        self._body_bytes = 0
        self._headers_done = False
        self._complete = False
        self._surplus = False
