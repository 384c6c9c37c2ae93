"""Who gets a socket, and when: the bounds and waiting lines that every transport here shares.

    connect() ──room?──▶ opening ──▶ acquired ⇄ idle ──▶ closed        room is counted from the moment a connection is being opened
        └──no──▶ waits in its origin's line

Bounds: sockets in all, sockets an origin, idle time. Who finds no room waits in its origin's line, where endpoints take turns and each is
served in order; an idle connection makes way for whoever needs its room. So while anybody waits for room in all, nothing is idle anywhere
(but for some turns of the loop, when many get it at once), and while anybody waits at an origin, nothing is idle there. A connection that
becomes free goes to its origin's line first, else to the top of the origin's idle stack, so that a quiet origin's surplus sockets grow old
and are closed.

Origins that wait for room in all take turns for what becomes free. One that has fewer connections also gets those of one that has more,
until they are even; there each goes on using its own, because moving a socket costs a handshake.

A connection that may never come holds its room for as long as connecting may take. So of what is asked for in doubt (`ports.Doubt`), at an
origin where nothing is open, no more than a part of all sockets is being opened at a time; the rest waits apart, where it is in nobody's way,
until its turn comes or the origin has let anybody in.

Nothing here knows what a connection is made of: `Pool` opens sockets, `MemoryTransport` doesn't. All methods but `close` are atomic, and
all state is touched by the loop's thread only. One sweep looks at every deadline, because a timer a POST would cost more than the POST's
share of it; it runs while there are connections. Order is that of dicts, never of sets: a simulation must see the same twice.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Protocol

import structlog

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Connection, Doubt, Limits, Trace
from dispatcher.transport.waiting import Apart, Ready, Waiter, Waiting

_log = structlog.get_logger(room="transport")

EXPIRE_AT_ONCE, EXPIRE_EVERY_S = 6, 0.002  # each is a failed delivery, and mostly a connection to open: 0.8 ms of 2
SWEEP_S = 0.05  # how late a deadline may be noticed; one look at 5,000 connections costs 0.2 ms
# How many of the sockets, at the most, are being opened in such a doubt. Who is untried is so once; who wasn't reached is tried again and again.
DOUBTED = {Doubt.UNTRIED: 3 / 4, Doubt.UNREACHED: 1 / 8}
ADMIT_EVERY_S = 0.002  # let in at once as others end, a thousand end together again: beside 30 % bad ones others' p99 was twice as long
GRANTS_AT_ONCE = 4  # connections to open, as the engine asks for in a turn of the loop

_STOPPING = Outcome(Fault.CONNECT, detail="stopping")


class Kept(Connection, Protocol):
    """A connection as the room sees it. It tells `Room.closed` when it is gone, and `Room.release` when a whole answer left it usable."""

    origin: Origin
    closed: bool
    kept: bool
    deadline: float

    def expire(self) -> None: ...

    def close(self) -> None: ...


class _Line:
    """What the room knows of one origin. `count`: open and opening. `in_turn`: it is in the queue for room in all."""

    __slots__ = ("count", "idle", "in_turn", "opening", "origin", "waiting")

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.count = 0
        self.opening = 0
        self.idle: list[Kept] = []  # by deadline, as they came
        self.waiting = Waiting()
        self.in_turn = False


class Room:
    """The `Transport` port but for `_establish`, which makes a connection."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lines: dict[Origin, _Line] = {}  # has a connection, or waits for one
        self._connections: dict[Kept, None] = {}  # open; it is what makes a connection count
        self._opening: dict[asyncio.Task[Kept | Outcome], None] = {}  # owned here, ended by close()
        self._turns: deque[_Line] = deque()  # wait for room in all; entries whose need has gone are skipped
        self._admitting = False  # room is being taken for one who waits apart
        self._short = False  # one who waits apart found no room in all
        self._doubt_first = False
        self._granting = False  # room is being given to them, or will be in the loop's next turn
        self._apart = {doubt: Apart[_Line](max(1, int(limits.sockets_max * part))) for doubt, part in DOUBTED.items()}
        # What became idle, oldest first, with its deadline then. It is written at the bound only, where it is needed, and is not let grow;
        # `_idled`: more has become idle since, to be found by a look at all origins.
        self._aging: deque[tuple[float, Kept]] = deque()
        self._idled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._over: list[Kept] = []  # their time is over, and they are to be ended
        self._closing = False
        # The loop's, known once a connection is asked for: to ask for the loop at each answer took 2 µs.
        self._now: Callable[[], float]
        self.count = 0  # open and opening, in all
        self.opened = 0
        self.reused = 0
        self.unasked_bytes = 0
        self.connect_failures = 0

    @property
    def sockets_max(self) -> int:
        return self._limits.sockets_max

    @property
    def sockets_per_origin_max(self) -> int:
        return self._limits.sockets_per_origin_max

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count} sockets, {len(self._lines)} origins, {self.opened} opened, {self.reused} reused)"

    async def _establish(self, origin: Origin, trace: Trace | None = None) -> Kept | Outcome:
        """Open a connection, or say why there is none. When it raises or is cancelled it leaves nothing open."""
        raise NotImplementedError

    # ── the port ──

    def try_acquire(self, origin: Origin) -> Connection | None:
        line = self._lines.get(origin)
        if line is None or not line.idle:
            return None
        self.reused += 1
        return line.idle.pop()

    def release(self, connection: Connection) -> None:
        kept: Kept = connection  # type: ignore[assignment]  # the port promises that it is one of ours
        line = self._lines.get(kept.origin)
        if kept.closed or line is None:
            return
        kept.kept = True
        kept.deadline = self._now() + self._limits.idle_s
        if line.waiting or self._turns:
            self._pass_on(line, kept)
        else:
            self._set_idle(line, kept)
        if self._short:
            self._admit_all()

    def connect(
        self,
        origin: Origin,
        on_ready: Ready,
        *,
        fresh: bool = False,
        turn_of: Hashable = None,
        doubt: Doubt | None = None,
        trace: Trace | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._now = loop.time
        if self._closing:
            loop.call_soon(on_ready, _STOPPING)
            return
        line = self._lines.get(origin)
        if line is None:
            line = self._lines[origin] = _Line(origin)
        waiter = Waiter(on_ready, fresh, turn_of, trace)
        if line.idle and not fresh:
            self.reused += 1
            loop.call_soon(on_ready, line.idle.pop())
        elif doubt is not None and line.count == line.opening:
            self._apart[doubt].append(line, waiter)
            self._admit(self._apart[doubt])
        else:
            self._open_or_wait(line, waiter)

    async def close(self) -> None:
        """Close every connection; requests in flight end as resets, who waits is told. Call it after draining."""
        self._closing = True
        for task in self._opening:
            task.cancel()
        while self._opening:
            await asyncio.gather(*self._opening, return_exceptions=True)
            # _opened() comes in a turn of the loop, and from Python 3.12 on gather() of what is done makes none.
            await asyncio.sleep(0)
        for line in list(self._lines.values()):
            for apart in self._apart.values():
                for waiting in apart.leave(line):
                    line.waiting.extend(waiting)
            while line.waiting:
                line.waiting.popleft().on_ready(_STOPPING)
        for connection in list(self._connections):
            connection.close()
        self._lines.clear()
        self._turns.clear()
        self._aging.clear()
        self._over.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def sockets_at(self, origin: Origin) -> int:
        line = self._lines.get(origin)
        return 0 if line is None else line.count

    # ── told by connections ──

    def closed(self, connection: Kept) -> None:
        """Forget a connection. One that isn't ours yet, or has been given up while it was being opened, is `_opened`'s to count."""
        if connection not in self._connections:
            return
        del self._connections[connection]
        line = self._lines[connection.origin]
        if connection in line.idle:
            line.idle.remove(connection)
        self._freed(line)

    # ── room ──

    def _open_or_wait(self, line: _Line, waiter: Waiter) -> None:
        if self._take_room(line):
            self._start_opening(line, waiter)
        else:
            line.waiting.append(waiter)
            self._queue(line)

    def _take_room(self, line: _Line) -> bool:
        """Count one more connection if there is room, or an idle one makes way; False if the line must wait.

        Nobody is overtaken, but while room is being given to those who wait: while anybody waits for what this asks for, it finds neither."""
        victim = None
        if line.count >= self._limits.sockets_per_origin_max:
            if not line.idle:
                return False
            victim = line.idle[0]
        elif self.count >= self._limits.sockets_max:
            victim = self._oldest_idle()
            if victim is None:
                return False
        line.count += 1  # before the victim goes, so that nobody else takes its room, nor the line for empty
        self.count += 1
        if victim is not None:
            victim.close()
        return True

    def _freed(self, line: _Line) -> None:
        """A socket is gone: its room goes to those who wait."""
        line.count -= 1
        self.count -= 1
        self._queue(line)
        for apart in self._apart.values():
            apart.unpark(line)
        self._doubt_first = not self._doubt_first  # by turns: else there might never be room for one of them
        if self._doubt_first:
            self._admit_all()
        self._grant()
        if not self._doubt_first:
            self._admit_all()
        if not line.count and not line.waiting and not any(line in apart for apart in self._apart.values()):
            self._lines.pop(line.origin, None)

    def _grant(self) -> None:
        """Give what room there is to those who wait for room in all, by turns, and not to too many in one turn of the loop."""
        if self._granting:
            return  # the next turn does; or an idle connection is making way just now
        self._granting = True
        for _ in range(GRANTS_AT_ONCE):
            if self._closing or (first := self._first_in_turn()) is None or not self._take_room(first):
                self._granting = False
                return
            self._turns.popleft()
            first.in_turn = False
            self._start_opening(first, first.waiting.popleft())
            self._queue(first)
        asyncio.get_running_loop().call_soon(self._grant_on)

    def _grant_on(self) -> None:
        self._granting = False
        self._grant()

    def _pass_on(self, line: _Line, connection: Kept) -> None:
        """Decide who gets a connection that became free while somebody waits."""
        # Below the bound whoever waits for room in all is just being given it.
        first = self._first_in_turn() if self.count >= self._limits.sockets_max else None
        if (
            first is not None
            and first is not line
            and (not line.waiting or not first.count or first.count + 1 < line.count)
        ):
            connection.close()  # its room goes to `first`
        elif not line.waiting:
            self._set_idle(line, connection)  # those who waited have gone
        elif line.waiting.first().fresh:
            connection.close()
        else:
            if first is not None:
                self._turns.rotate(-1)  # the next release looks at another origin
            self.reused += 1
            # Not at once: a waiter that has no use for it releases it to the next, and a long line would end the stack.
            asyncio.get_running_loop().call_soon(line.waiting.popleft().on_ready, connection)

    def _queue(self, line: _Line) -> None:
        """Put a line that only wants room in all into the queue for it, once."""
        if line.waiting and not line.in_turn and line.count < self._limits.sockets_per_origin_max:
            line.in_turn = True
            self._turns.append(line)

    def _first_in_turn(self) -> _Line | None:
        while self._turns:
            line = self._turns[0]
            if line.waiting and line.count < self._limits.sockets_per_origin_max:
                return line
            self._turns.popleft().in_turn = False
        return None

    def _set_idle(self, line: _Line, connection: Kept) -> None:
        line.idle.append(connection)
        if self._idled:
            return
        if self.count < self._limits.sockets_max or len(self._aging) >= 2 * self._limits.sockets_max:
            self._idled = True
        else:
            self._aging.append((connection.deadline, connection))

    def _oldest_idle(self) -> Kept | None:
        """Find the connection that has been idle for longest. Looking at 10,000 origins costs 3 ms, so one look serves many calls."""
        while True:
            while self._aging:
                deadline, connection = self._aging.popleft()
                line = self._lines.get(connection.origin)
                # Still idle, and since then: the stack is used from the top, so it has nothing older below it.
                if connection.deadline == deadline and line is not None and line.idle and line.idle[0] is connection:
                    return connection
            if not self._idled:
                return None
            self._idled = False
            found = [(connection.deadline, connection) for line in self._lines.values() for connection in line.idle]
            found.sort(key=lambda pair: pair[0])
            self._aging.extend(found)

    def _sweep(self) -> None:
        # The next one is set first: what a callback raises must not end the deadlines of all.
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(SWEEP_S, self._sweep) if self._connections and not self._closing else None
        now = loop.time()
        is_expiring = bool(self._over)
        self._over = [c for c in self._connections if c.deadline <= now]
        if self._over and not is_expiring:
            self._expire()

    def _expire(self) -> None:
        """End some of those whose time is over, and then others: POSTs that began together and hang would end together."""
        loop = asyncio.get_running_loop()
        some, self._over = self._over[:EXPIRE_AT_ONCE], self._over[EXPIRE_AT_ONCE:]
        if self._over:
            loop.call_later(EXPIRE_EVERY_S, self._expire)
        now = loop.time()
        for connection in some:
            if not connection.closed and connection.deadline <= now:  # a callback may have changed that
                connection.expire()

    # ── doubt ──

    def _admit_all(self) -> None:
        if self._admitting:
            return  # it goes on
        self._short = False
        for apart in self._apart.values():
            self._admit(apart)

    def _admit(self, apart: Apart[_Line]) -> None:
        """Open for who waits apart, as many as there may be and is room for."""
        while not apart.is_paced and self._admit_one(apart):
            pass

    def _admit_one(self, apart: Apart[_Line]) -> bool:
        """Open for the next who waits apart and whose origin has room; False if there is none, or no room in all."""
        if self._admitting:
            return False  # an idle connection is making way just now
        while apart.has_next and not self._closing:
            line = apart.first()
            if line.count >= self._limits.sockets_per_origin_max:
                apart.park(line)
                continue
            self._admitting = True
            has_room = self._take_room(line)
            self._admitting = False
            if not has_room:
                self._short = True
                return False
            waiter = apart.popleft()
            waiter.apart = apart
            apart.held += 1
            self._start_opening(line, waiter)
            return True
        return False

    def _no_doubt(self, waiter: Waiter, *, failed: bool) -> None:
        """Whether its connection comes is known: others may be let in. After one that `failed` a moment later, and one by one: what began
        together would end together, and so would all that follows."""
        apart, waiter.apart = waiter.apart, None
        if apart is None:
            return
        apart.held -= 1
        if failed:
            self._pace(apart)
        elif apart.is_paced:
            self._admit_one(apart)
        else:
            self._admit(apart)

    def _pace(self, apart: Apart[_Line]) -> None:
        if apart.has_next and not apart.is_paced and not self._closing:
            apart.is_paced = True
            soon = min(ADMIT_EVERY_S, self._limits.connect_s / 2 / apart.limit)  # so soon that all places can be used
            asyncio.get_running_loop().call_later(soon, self._admit_next, apart)

    def _admit_next(self, apart: Apart[_Line]) -> None:
        apart.is_paced = False
        if self._admit_one(apart):
            self._pace(apart)

    def _let_in(self, line: _Line) -> None:
        """The origin has let somebody in: who waits apart for it waits as anybody does."""
        for apart in self._apart.values():
            for waiting in apart.leave(line):
                line.waiting.extend(waiting)
        self._queue(line)
        self._grant()

    # ── opening ──

    def _start_opening(self, line: _Line, waiter: Waiter) -> None:
        line.opening += 1
        task = asyncio.get_running_loop().create_task(self._establish(line.origin, waiter.trace))
        self._opening[task] = None
        # Not in the task: one that is cancelled before its first step runs nothing of itself.
        task.add_done_callback(partial(self._opened, line, waiter))

    def _opened(self, line: _Line, waiter: Waiter, task: asyncio.Task[Kept | Outcome]) -> None:
        """Take over what was opened, or give its room back."""
        del self._opening[task]
        line.opening -= 1
        result: Kept | Outcome
        if task.cancelled():  # by close()
            result = _STOPPING
        elif (exc := task.exception()) is not None:  # a library's surprise must not take the lane's turn with it
            _log.error("connect.surprise", host=line.origin.host, exc_info=exc)
            result = Outcome(Fault.CONNECT, detail=f"{type(exc).__name__}: {exc}")
        else:
            result = task.result()
        if not isinstance(result, Outcome):
            self.opened += 1
            if result.closed:  # gone between the handshake and here
                result = Outcome(Fault.RESET, detail="closed right after connecting")
        if isinstance(result, Outcome):
            self.connect_failures += 1
            self._freed(line)
        else:
            self._connections[result] = None
            loop = asyncio.get_running_loop()
            result.deadline = loop.time() + self._limits.idle_s
            if self._sweeper is None:
                self._sweeper = loop.call_later(SWEEP_S, self._sweep)
            if line.count - line.opening == 1:
                self._let_in(line)
        self._no_doubt(waiter, failed=isinstance(result, Outcome))
        waiter.on_ready(result)
