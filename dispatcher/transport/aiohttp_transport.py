"""The other transport: aiohttp's ClientSession says the request and reads the answer, on the connections of a `Pool`.

    post() ──task──▶ session.request() ──connect()──▶ Lender ──lends──▶ Handler of our socket ──answer──▶ back to the room, or closed

Everything below HTTP is the pool's: look-ups, the address guard, proxies, TLS, bounds, waiting lines, deadlines. aiohttp's own connector takes
an unasked 200 for the next event's answer, counts idle sockets in no bound, and connects only as it posts. So its session gets one that opens
nothing: it lends a connection of the pool, to the task that posts on it, once; hence no request is sent twice, whatever aiohttp thinks may be
repeated. Everything of HTTP is aiohttp's: it writes head and body, parses heads, lengths and chunks, and says when an answer is whole. It
doesn't decompress, follow redirects, keep cookies or look at the environment.

`Handler` is aiohttp's protocol with an ear at the socket, which hears bytes before the parser does: those that nobody asked for close the
connection, all are counted against the bounds, and the beginning of the answer is kept as it came.

It is here as a second opinion: one suite of conformance tests and hostile receivers holds both transports to the same outcomes, and who
mistrusts our client has another. It costs several times as much CPU (`python -m bench --only transport`). What it does otherwise, none of it
unsafe:

| the receiver sends                            | thin              | aiohttp                                         |
|-----------------------------------------------|-------------------|-------------------------------------------------|
| junk in the same read as the answer's end     | delivered, closed | protocol fault, closed: the event is sent again |
| lines that end without CR, folded headers     | protocol fault    | taken as they are meant, closed                 |
| a trailer longer than the bound on heads      | delivered, closed | protocol fault, closed: the event is sent again |
| an answer longer than the bound on heads      | delivered, kept   | delivered, closed                               |
| a status below 100                            | reset or timeout  | protocol fault, closed                          |
| bytes between post() and the write            | writes in post()  | stale or reset, closed: they are no answer      |
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import aiohttp
import structlog
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection as Loan
from aiohttp.payload import BytesPayload, Payload
from yarl import URL

from dispatcher.domain.outcome import Fault, Outcome, outcome_of_answer
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits, Trace
from dispatcher.transport.connection import Head, read_answer
from dispatcher.transport.pool import Pool
from dispatcher.transport.room import Kept

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ClientRequest, ConnectionKey
    from aiohttp.tracing import Trace as AiohttpTrace

_log = structlog.get_logger(room="transport")

READ_BUFFER_BYTES = 65_536  # twice that and aiohttp stops reading until we have thrown some away


class AiohttpTransport(Pool):
    """A `Pool` whose connections speak through one ClientSession."""

    session: aiohttp.ClientSession | None = None  # made with the first connection, because it needs the loop

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tasks: set[asyncio.Task[None]] = set()  # one a POST; owned here, ended by close()

    async def close(self) -> None:
        await super().close()
        for task in self.tasks:
            task.cancel()
        while self.tasks:
            await asyncio.gather(*self.tasks, return_exceptions=True)
            # They leave the set in a turn of the loop, and from Python 3.12 on gather() of what is done makes none.
            await asyncio.sleep(0)
        if self.session is not None:
            await self.session.close()
            self.session = None

    def _make(self, origin: Origin, trace: Trace | None = None) -> tuple[Kept, asyncio.Protocol]:
        if self.session is None:
            self.session = _make_session(self._limits)
        loop = asyncio.get_running_loop()
        if trace is None:
            connection = AiohttpConnection(self, origin, self._limits, loop)
        else:
            connection = TracedAiohttpConnection(self, origin, self._limits, loop, trace)
        return connection, connection.handler


class AiohttpConnection:
    """One connection, and the task that posts on it. `kept` and `deadline` as in `HttpConnection`."""

    def __init__(self, pool: AiohttpTransport, origin: Origin, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.origin = origin
        self.kept = False
        self.closed = False
        self.deadline = 0.0
        self.handler = Handler(self, loop)
        self.transport: asyncio.Transport | None = None
        self._limits = limits
        self._loop = loop
        self._on_done: Callable[[Outcome], None] | None = None  # set while a request is under way
        self._task: asyncio.Task[None] | None = None
        self._commands = False
        self._total_deadline = 0.0
        # Of the answer under way:
        self._status = 0  # once aiohttp has handed the final head to the task
        self._raw = b""  # its beginning, 1xx answers included; at least the whole head
        self._bytes = 0
        self._lent = False
        self._asked = False  # the request is being written: bytes before that are no answer to it
        self._given_back = False  # aiohttp has seen the answer's end, or given up
        self._keep = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "busy" if self.busy else "idle"
        return f"AiohttpConnection({self.origin.host}:{self.origin.port} {state}{', kept' if self.kept else ''})"

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
        self._total_deadline = now + timeout_s
        self.deadline = now + min(timeout_s, self._limits.headers_s)
        self._status = 0
        self._raw = b""
        self._bytes = 0
        self._lent = self._asked = self._given_back = self._keep = False
        if self.closed or self.transport is None or self.transport.is_closing():
            self._loop.call_soon(self._finish_broken)
        else:
            self._task = self._loop.create_task(self._exchange(request))
            self.pool.tasks.add(self._task)
            self._task.add_done_callback(self._done)

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

    # ── the task ──

    async def _exchange(self, request: bytes) -> None:
        """Have the session post, and throw the body away as it comes."""
        session = self.pool.session
        assert session is not None
        method, target, headers, body = _take_apart(request)
        _posting.set(self)
        try:
            response = await session.request(
                method, _url(self.origin, target), headers=headers, data=_Body(body, self), allow_redirects=False
            )
            try:
                if response.status < 200:  # it lets 101 and what is below 100 pass for final
                    self._fail(Fault.PROTOCOL, f"an answer with status {response.status}, which nobody asked for")
                    return
                self._status = response.status
                self.deadline = self._total_deadline
                # Without a task all is told: readany() lets the parser go on, which may have met nonsense in what it had held back.
                while self._task is not None and not response.content.at_eof() and not self._beyond_all_bounds:
                    await response.content.readany()
            finally:
                response.release()
        except (aiohttp.ClientError, OSError):
            # That it wasn't HTTP has been told by `fed`; so it is the connection that was lost.
            if self._task is not None:
                self._ended("closed before a whole answer")
            return
        if self._task is None:
            return
        # aiohttp doesn't tell of another answer's beginning in the same read. A second parser does, at a fiftieth of what the POST costs.
        keep = self._keep and not self.handler.should_close and self._bytes == len(self._raw) and Head(self._raw).exact
        self._finish(self._answered(), keep=keep)

    def _done(self, task: asyncio.Task[None]) -> None:
        """Take what the task left: nothing, unless somebody has a bug."""
        self.pool.tasks.discard(task)
        if task.cancelled() or (exc := task.exception()) is None:
            return
        if self._task is task:
            _log.error("post.surprise", host=self.origin.host, exc_info=exc)
            self._fail(Fault.RESET, f"{type(exc).__name__}: {exc}")
        else:  # of `on_done`
            context = {"message": "a callback of the transport raised", "exception": exc, "task": task}
            self._loop.call_exception_handler(context)

    def lend(self) -> "Handler":
        if self._lent:
            raise aiohttp.ClientConnectionError("a request is sent once")
        self._lent = True
        return self.handler

    def asked(self) -> None:
        self._asked = self._on_done is not None

    def given_back(self, *, keep: bool) -> None:
        """aiohttp lets go: after a whole answer, or because something went wrong."""
        transport = self.transport
        self._given_back = True
        self._keep = keep and transport is not None and transport.get_write_buffer_size() == 0

    # ── what the handler hears ──

    def heard(self, data: bytes) -> bool:
        """Judge bytes before aiohttp has them; False if it mustn't."""
        if not self._asked:
            if not self.closed:
                self.pool.unasked_bytes += 1
            self._lose("bytes came before the request was sent")
            return False
        if self._given_back:  # after the end of the answer
            self._keep = False
            return False
        head_max = self._limits.header_bytes_max
        if self._bytes < head_max:
            self._raw += data
        self._bytes += len(data)
        if self._bytes > head_max >= self._bytes - len(data):
            self._raw = self._raw[:head_max]
            if not self._status and not Head(self._raw).status:
                self._fail(Fault.PROTOCOL, "the head of the answer is too long")
                return False
        return True

    def fed(self) -> None:
        """Look what aiohttp made of the bytes. Not in the task: that isn't always woken."""
        if self._on_done is None:
            return
        if (exc := self.handler.exception()) is not None:
            self._fail(Fault.PROTOCOL, f"not HTTP/1.1: {getattr(exc, 'message', exc)!s:.100}".partition("\n")[0])
        elif self._status and self._beyond_all_bounds:
            self._finish(self._answered(), keep=False)

    @property
    def _beyond_all_bounds(self) -> bool:
        return self._bytes > self._limits.header_bytes_max + self._limits.body_bytes_max

    def lost(self) -> None:
        """The peer has closed. A request on its way ends when aiohttp has told its task."""
        if not self._asked:
            self._lose("closed before the request was sent")

    # ── ending ──

    def _lose(self, detail: str) -> None:
        if self._on_done is None:
            self._drop()
        else:
            self._ended(detail)

    def _ended(self, detail: str) -> None:
        if not self._raw and self.kept:
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

    def _kept_head(self) -> bytes | None:
        return self._raw[: self._limits.head_kept_bytes] or None

    def _fail(self, fault: Fault, detail: str) -> None:
        status = self._status or Head(self._raw).status  # the task may not have run since the head came
        self._finish(Outcome(fault, status or None, None, self._kept_head(), detail), keep=False)

    def _finish(self, outcome: Outcome, *, keep: bool) -> None:
        on_done, self._on_done, self._asked = self._on_done, None, False
        task, self._task = self._task, None
        assert on_done is not None
        if keep:
            self.pool.release(self)
        else:
            self._drop()
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        on_done(outcome)

    def _drop(self) -> None:
        if not self.closed:
            self.closed = True
            if self.transport is not None:
                self.transport.abort()  # nothing we still want is in its buffer
            self.pool.closed(self)


class TracedAiohttpConnection(AiohttpConnection):
    """As `TracedConnection`: for one test."""

    def __init__(
        self, pool: AiohttpTransport, origin: Origin, limits: Limits, loop: asyncio.AbstractEventLoop, trace: Trace
    ) -> None:
        super().__init__(pool, origin, limits, loop)
        self._trace = trace

    def post(
        self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None], commands: bool = False
    ) -> None:
        self._trace.sent = perf_counter()
        super().post(request, timeout_s, on_done, commands)

    def heard(self, data: bytes) -> bool:
        if self._trace.answered is None and self._asked:
            self._trace.answered = perf_counter()
        return super().heard(data)

    def _finish(self, outcome: Outcome, *, keep: bool) -> None:
        self._trace.ended = perf_counter()
        self._trace.head, self._trace.body = read_answer(self._raw)
        super()._finish(outcome, keep=False)


class Handler(ResponseHandler):
    """aiohttp's protocol, which tells its connection what comes."""

    def __init__(self, connection: AiohttpConnection, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connection.transport = self.transport

    def data_received(self, data: bytes) -> None:
        # aiohttp calls this itself, without data, to go on parsing what it has held back.
        if not data or self.connection.heard(data):
            super().data_received(data)
            self.connection.fed()

    def eof_received(self) -> None:
        super().eof_received()
        if self.connection.transport is not None:
            self.connection.transport.abort()  # not close(), which would first write what nobody will read

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.connection.lost()


# ── the session ──

_posting: ContextVar[AiohttpConnection] = ContextVar("posting")  # each task posts on one connection


class Lender(aiohttp.BaseConnector):
    """A connector that opens nothing: it lends the connection that its task posts on."""

    async def connect(self, req: "ClientRequest", traces: "list[AiohttpTrace]", timeout: aiohttp.ClientTimeout) -> Loan:
        return Loan(self, req.connection_key, _posting.get().lend(), self._loop)

    def _release(self, key: "ConnectionKey", protocol: ResponseHandler, *, should_close: bool = False) -> None:
        assert isinstance(protocol, Handler)
        protocol.connection.given_back(keep=not should_close and not protocol.should_close)


def _make_session(limits: Limits) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # Bounds on sockets and idling are the room's: a connector's own leave out the idle ones.
        connector=Lender(
            limit=0, limit_per_host=0, keepalive_timeout=None, force_close=False, enable_cleanup_closed=False
        ),
        connector_owner=True,
        # So are deadlines: one sweep looks at all, where aiohttp sets timers for each.
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        version=aiohttp.HttpVersion11,
        skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE),
        cookie_jar=aiohttp.DummyCookieJar(),
        raise_for_status=False,
        auto_decompress=False,
        trust_env=False,
        trace_configs=None,
        read_bufsize=READ_BUFFER_BYTES,
        # The bound on the head as a whole is kept by `heard`; nothing in it can be longer, and the shortest header has 4 bytes.
        max_line_size=limits.header_bytes_max,
        max_field_size=limits.header_bytes_max,
        max_headers=limits.header_bytes_max // 4,
    )


# ── the request ──


class _Body(BytesPayload):
    """The body as it is, which tells its connection when it is written: in one go with the head.

    aiohttp's own class warns of more than 1 MiB, for the sake of the loop; ours are bounded by a setting."""

    def __init__(self, body: bytes, connection: AiohttpConnection) -> None:
        Payload.__init__(self, body, content_type="application/json")
        self._size = len(body)
        self._connection = connection

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._connection.asked()
        await super().write_with_length(writer, content_length)


def _take_apart(request: bytes) -> tuple[str, str, list[tuple[str, str]], bytes]:
    """Return method, target, headers and body of a request that we rendered ourselves."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    method, target, _ = first.split(" ")
    headers = []
    for line in lines:
        name, _, value = line.partition(": ")
        headers.append((name, value))
    return method, target, headers, body


@lru_cache(maxsize=20_000)
def _url(origin: Origin, target: str) -> URL:
    """Return the URL in yarl's form. All of the target goes into the path: as a query yarl would drop an empty one's "?"."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return URL.build(scheme=origin.scheme, host=host, port=origin.port, path=target, encoded=True)
