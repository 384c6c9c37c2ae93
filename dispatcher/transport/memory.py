"""The in-memory twin of `Pool`: the same room and lines, with receivers that follow a script instead of sockets.

    connect() → Receiver.dial() → MemoryConnection.post() ─latency→ Receiver.take(request) → Reply → Outcome

Nothing here looks at a clock but the loop's, and nothing is random but through the rng that is passed in: under virtual time a seed gives
the same run each time. A request that was written reaches its receiver whatever becomes of our side meanwhile, which is the worse case:
the receiver has it, and we don't know.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dispatcher.domain.outcome import Command, Fault, Outcome, outcome_of_answer
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits, Trace
from dispatcher.transport.room import Room


@dataclass(frozen=True, slots=True)
class Dial:
    """What becomes of one attempt to connect: after `after_s` a connection, or the outcome. Beyond `connect_s` it is a timeout."""

    after_s: float = 0.0
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a receiver does with one request. `status` None and no fault: silence.

    The head comes `head_s` after the request, the rest of the answer `body_s` after the head. A fault, RESET or PROTOCOL, comes instead of
    the head if there is no status, else instead of the rest. After a whole answer the peer keeps the connection, closes it and says so,
    or ("stale") closes it in silence just as the next request arrives.
    """

    status: int | None = 204
    retry_after: str | None = None
    command: Command | None = None
    head_s: float = 0.0
    body_s: float = 0.0
    fault: Fault | None = None
    then: Literal["keep", "close", "stale"] = "keep"


class Receiver(Protocol):
    def dial(self) -> Dial: ...

    def take(self, request: bytes) -> Reply:
        """Called when the request has arrived, whoever still waits for the answer."""


class Scripted:
    """Follow `dials` and `replies` while they last, then `dial` and `reply`. Keeps what arrived in `requests`."""

    def __init__(self, *replies: Reply, dials: Sequence[Dial] = ()) -> None:
        self.replies = deque(replies)
        self.dials = deque(dials)
        self.reply = Reply()
        self.next_dial = Dial()
        self.requests: list[bytes] = []

    def dial(self) -> Dial:
        return self.dials.popleft() if self.dials else self.next_dial

    def take(self, request: bytes) -> Reply:
        self.requests.append(request)
        return self.replies.popleft() if self.replies else self.reply


class Dice:
    """Draw each dial and each reply from weighted choices; `heal()` makes it well. Tells `on_request` what arrived."""

    def __init__(
        self,
        rng: random.Random,
        replies: Sequence[tuple[float, Reply]],
        dials: Sequence[tuple[float, Dial]] = ((1.0, Dial()),),
        *,
        on_request: Callable[[bytes], None] = lambda request: None,
    ) -> None:
        self._rng = rng
        self._replies = replies
        self._dials = dials
        self._on_request = on_request

    def heal(self) -> None:
        self._replies = ((1.0, Reply()),)
        self._dials = ((1.0, Dial()),)

    def dial(self) -> Dial:
        return self._rng.choices([d for _, d in self._dials], [w for w, _ in self._dials])[0]

    def take(self, request: bytes) -> Reply:
        self._on_request(request)
        return self._rng.choices([r for _, r in self._replies], [w for w, _ in self._replies])[0]


class MemoryTransport(Room):
    """The `Transport` port without a network. `find` gives an origin's receiver; None is a name that does not resolve.

    `latency_s`: bounds of what a request takes to arrive; drawn from `rng` if they differ."""

    def __init__(
        self,
        limits: Limits,
        find: Callable[[Origin], Receiver | None],
        *,
        latency_s: tuple[float, float] = (0.0, 0.0),
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(limits)
        assert rng is not None or latency_s[0] == latency_s[1], "a latency that varies needs an rng"
        self._find = find
        self._latency_s = latency_s
        self._rng = rng

    def lose(self, origin: Origin) -> None:
        """Let every connection to an origin break now, as when its receiver crashes."""
        for connection in [c for c in self._connections if c.origin == origin]:
            assert isinstance(connection, MemoryConnection)
            connection.lose()

    async def _establish(self, origin: Origin, trace: Trace | None = None) -> "MemoryConnection | Outcome":
        loop = asyncio.get_running_loop()
        if trace is not None:
            trace.began = loop.time()
        receiver = self._find(origin)
        if receiver is None:
            await asyncio.sleep(0)
            return Outcome(Fault.DNS, detail=f"{origin.host} does not resolve")
        if trace is not None:
            trace.resolved = loop.time()
        dial = receiver.dial()
        connect_s = self._limits.connect_s
        await asyncio.sleep(min(dial.after_s, connect_s))
        if dial.after_s >= connect_s:
            return Outcome(Fault.CONNECT, detail=f"no connection within {connect_s:g} s")
        if dial.outcome is not None:
            return dial.outcome
        if trace is not None:
            trace.connected = loop.time()
        return MemoryConnection(self, origin, receiver, self._limits, self._latency, trace)

    def _latency(self) -> float:
        low, high = self._latency_s
        return low if self._rng is None else self._rng.uniform(low, high)


class MemoryConnection:
    """Owned by its transport. Once it is closed, what was still to happen on it comes to nothing."""

    def __init__(
        self, room: Room, origin: Origin, receiver: Receiver, limits: Limits, latency: Callable[[], float], trace: Trace | None
    ) -> None:  # fmt: skip
        self.origin = origin
        self.closed = False
        self.kept = False
        self.deadline = 0.0
        self._room = room
        self._receiver = receiver
        self._limits = limits
        self._latency = latency
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._on_done: Callable[[Outcome], None] | None = None  # set while a request is under way
        self._commands = False
        self._total_deadline = 0.0
        self._status: int | None = None
        self._peer_gone = False

    def post(
        self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None], commands: bool = False
    ) -> None:
        assert self._on_done is None, "one request at a time"
        self._on_done = on_done
        self._commands = commands
        self._status = None
        now = self._loop.time()
        if self._trace is not None:
            self._trace.sent = now
        self._total_deadline = now + timeout_s
        self.deadline = now + min(timeout_s, self._limits.headers_s)
        if self.closed or self._peer_gone:
            self._loop.call_soon(self._lost)
        else:
            self._loop.call_later(self._latency(), self._arrive, request)

    def close(self) -> None:
        """Hang up; a request in flight ends as a reset."""
        self._drop()
        if self._on_done is not None:
            self._finish(Outcome(Fault.RESET, detail="we closed the connection"), keep=False)

    def lose(self) -> None:
        """Let the peer hang up."""
        self._drop()
        self._lost()

    def expire(self) -> None:
        """Called by the sweep when `deadline` has passed."""
        if self._on_done is None:
            self._drop()
        else:
            what = "headers of an answer" if self._status is None else "answer"
            self._fail(Fault.TIMEOUT, f"no complete {what} in time")

    def _arrive(self, request: bytes) -> None:
        reply = self._receiver.take(request)
        if reply.status is not None or reply.fault is not None:
            self._loop.call_later(reply.head_s, self._head, reply)

    def _head(self, reply: Reply) -> None:
        if self.closed:
            return
        if self._trace is not None and reply.fault is not Fault.RESET:
            self._trace.answered = self._loop.time()
        if reply.status is None:
            if reply.fault is Fault.RESET:
                self._lost()
            else:
                assert reply.fault is not None
                self._fail(reply.fault, "not HTTP/1.1")
            return
        self._status = reply.status
        self.deadline = self._total_deadline
        self._loop.call_later(reply.body_s, self._rest, reply)

    def _rest(self, reply: Reply) -> None:
        if self.closed:
            return
        assert reply.status is not None
        if reply.fault is not None:
            self._fail(reply.fault, "broken off in the middle")
            return
        self._peer_gone = reply.then == "stale"
        head = b"HTTP/1.1 %d\r\n\r\n" % reply.status
        self._finish(self._answered(reply, head), keep=reply.then != "close")

    def _answered(self, reply: Reply, head: bytes) -> Outcome:
        assert reply.status is not None
        is_looked_for = self._commands or not 200 <= reply.status <= 299
        return outcome_of_answer(reply.status, reply.retry_after, head, reply.command if is_looked_for else None)

    def _lost(self) -> None:
        if self._on_done is None:  # told already
            return
        if self.kept and self._status is None:
            self._finish(Outcome(Fault.STALE, detail="the kept-alive connection was closed"), keep=False)
        else:
            self._fail(Fault.RESET, "closed before a whole answer")

    def _fail(self, fault: Fault, detail: str) -> None:
        head = None if self._status is None else b"HTTP/1.1 %d\r\n\r\n" % self._status
        self._finish(Outcome(fault, self._status, None, head, detail), keep=False)

    def _finish(self, outcome: Outcome, *, keep: bool) -> None:
        on_done, self._on_done = self._on_done, None
        assert on_done is not None
        if self._trace is not None:
            self._trace.ended = self._loop.time()
            self._trace.head = b"" if self._status is None else b"HTTP/1.1 %d" % self._status
            keep = False
        if keep:
            self._room.release(self)
        else:
            self._drop()
        on_done(outcome)

    def _drop(self) -> None:
        if not self.closed:
            self.closed = True
            self._room.closed(self)
