"""The thin transport: a bounded pool of `HttpConnection`s by origin, and how they come to be.

Bounds: sockets in all, sockets an origin, idle time. Room is counted from the moment a connection is being opened.
Who finds no room waits in its
origin's line; an idle socket of another origin is closed to make room; origins without room take turns. A connection that becomes free goes to
its origin's line first, else to the top of its idle stack, so that a quiet origin's surplus sockets grow old and are closed.

Opening: look up, judge every address, connect (RFC 8305 happy eyeballs), judge the peer that was really reached, TLS with SNI and verification.
The whole has one deadline.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohappyeyeballs
import structlog

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Connection, Limits
from dispatcher.transport.connection import HttpConnection
from dispatcher.transport.resolver import Resolver, UnresolvedError

_log = structlog.get_logger(room="transport")

SWEEP_S = 0.05  # how late a deadline may be noticed; one look at 5,000 connections costs 0.2 ms

Ready = Callable[[Connection | Outcome], None]


class _OriginPool:
    """What the pool knows of one origin. `count`: open and opening."""

    __slots__ = ("count", "idle", "origin", "waiting")

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.count = 0
        self.idle: list[HttpConnection] = []
        self.waiting: deque[_Waiter] = deque()


@dataclass(slots=True)
class _Waiter:
    on_ready: Ready
    fresh: bool


class Pool:
    """The `Transport` port. `guard` judges addresses; `tls` verifies peers."""

    def __init__(
        self,
        limits: Limits,
        guard: AddressPolicy,
        *,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self._limits = limits
        self._guard = guard
        self._tls = tls or make_tls_context(None)
        self._resolver = resolver or Resolver(limits.dns_ttl_s)
        self._origins: dict[Origin, _OriginPool] = {}
        self._connections: set[HttpConnection] = set()
        self._opening: set[asyncio.Task[None]] = set()  # owned here, ended by close()
        self._starved: deque[_OriginPool] = deque()  # have waiters, but there was no socket left in all
        self._sweeper: asyncio.TimerHandle | None = None
        self._closing = False
        self.count = 0  # sockets open and opening, in all
        self.opened = 0
        self.reused = 0
        self.unasked_bytes = 0
        self.connect_failures = 0

    def __repr__(self) -> str:
        return f"Pool({self.count} sockets, {len(self._origins)} origins, {self.opened} opened, {self.reused} reused)"

    # ── the port ──

    def try_acquire(self, origin: Origin) -> HttpConnection | None:
        pool = self._origins.get(origin)
        if pool is None or not pool.idle:
            return None
        self.reused += 1
        return pool.idle.pop()

    def release(self, connection: Connection) -> None:
        assert isinstance(connection, HttpConnection)
        pool = self._origins.get(connection.origin)
        if connection.closed or pool is None:
            return
        while pool.waiting:
            waiter = pool.waiting.popleft()
            if not waiter.fresh:
                self.reused += 1
                waiter.on_ready(connection)
                return
            self._open_or_wait(pool, waiter, first=True)
            break
        connection.deadline = asyncio.get_running_loop().time() + self._limits.idle_s
        pool.idle.append(connection)

    def connect(self, origin: Origin, on_ready: Ready, *, fresh: bool = False) -> None:
        loop = asyncio.get_running_loop()
        if self._closing:
            loop.call_soon(on_ready, Outcome(Fault.CONNECT, detail="stopping"))
            return
        if self._sweeper is None:
            self._sweeper = loop.call_later(SWEEP_S, self._sweep)
        pool = self._origins.get(origin)
        if pool is None:
            pool = self._origins[origin] = _OriginPool(origin)
        if not fresh and pool.idle:
            self.reused += 1
            loop.call_soon(on_ready, pool.idle.pop())
            return
        self._open_or_wait(pool, _Waiter(on_ready, fresh))

    async def close(self) -> None:
        """Close every connection; requests in flight end as resets. Call it after draining."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = list(self._opening)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()
        await self._resolver.close()

    # ── told by connections ──

    def closed(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)
        pool = self._origins[connection.origin]
        if connection in pool.idle:
            pool.idle.remove(connection)
        self._freed(pool)

    # ── room ──

    def _open_or_wait(self, pool: _OriginPool, waiter: _Waiter, *, first: bool = False) -> None:
        if pool.count >= self._limits.sockets_per_origin_max:
            # Only a busy origin is at its bound; an idle socket of its own makes way for a fresh one.
            if not (waiter.fresh and pool.idle):
                (pool.waiting.appendleft if first else pool.waiting.append)(waiter)
                return
            pool.idle[0].close()
        if self.count >= self._limits.sockets_max and not self._evict_idle():
            (pool.waiting.appendleft if first else pool.waiting.append)(waiter)
            self._starved.append(pool)
            return
        pool.count += 1
        self.count += 1
        task = asyncio.get_running_loop().create_task(self._open(pool, waiter))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _evict_idle(self) -> bool:
        """Close the idle connection that is nearest its end; False if none is idle."""
        oldest = min(
            (pool.idle[0] for pool in self._origins.values() if pool.idle), key=lambda c: c.deadline, default=None
        )
        if oldest is None:
            return False
        oldest.close()
        return True

    def _freed(self, pool: _OriginPool) -> None:
        """A socket is gone: serve who waited for it."""
        pool.count -= 1
        self.count -= 1
        if self._closing:
            return
        if pool.waiting and self.count < self._limits.sockets_max:
            self._open_or_wait(pool, pool.waiting.popleft(), first=True)
        while self._starved and self.count < self._limits.sockets_max:
            starved = self._starved.popleft()
            if starved.waiting:
                self._open_or_wait(starved, starved.waiting.popleft(), first=True)
        if not pool.count and not pool.waiting and not pool.idle:
            self._origins.pop(pool.origin, None)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [c for c in self._connections if c.deadline <= now]:
            connection.expire(now)
        self._sweeper = loop.call_later(SWEEP_S, self._sweep)

    # ── opening ──

    async def _open(self, pool: _OriginPool, waiter: _Waiter) -> None:
        result: HttpConnection | Outcome
        try:
            async with asyncio.timeout(self._limits.connect_s):
                result = await self._establish(pool.origin)
        except TimeoutError:
            result = Outcome(Fault.CONNECT, detail=f"no connection within {self._limits.connect_s:g} s")
        except UnresolvedError as exc:
            result = Outcome(Fault.DNS, detail=str(exc))
        except ssl.SSLError as exc:
            result = Outcome(Fault.TLS, detail=_tls_reason(exc))
        except OSError as exc:
            result = Outcome(Fault.CONNECT, detail=exc.strerror or str(exc) or type(exc).__name__)
        except asyncio.CancelledError:
            self._freed(pool)
            raise
        except Exception as exc:  # noqa: BLE001 - a library's surprise must not take the lane's turn with it; it is told and logged
            _log.exception("connect.surprise", host=pool.origin.host)
            result = Outcome(Fault.CONNECT, detail=f"{type(exc).__name__}: {exc}")
        if isinstance(result, Outcome):
            self.connect_failures += 1
            self._freed(pool)
        elif result.closed:  # gone between the handshake and here
            result = Outcome(Fault.RESET, detail="closed right after connecting")
        waiter.on_ready(result)

    async def _establish(self, origin: Origin) -> HttpConnection | Outcome:
        addresses = await self._resolver.resolve(origin.host)
        refusals = [self._guard.refusal(address, origin.scheme) for address in addresses]
        allowed = [address for address, refusal in zip(addresses, refusals, strict=True) if refusal is None]
        if not allowed:
            return Outcome(Fault.BLOCKED, detail=str(refusals[0]))
        loop = asyncio.get_running_loop()
        sock = await aiohappyeyeballs.start_connection(
            [_addr_info(address, origin.port) for address in allowed],
            happy_eyeballs_delay=0.25,
            interleave=1,
            loop=loop,
        )
        try:
            refusal = self._guard.refusal(sock.getpeername()[0], origin.scheme)
            if refusal is not None:
                sock.close()
                return Outcome(Fault.BLOCKED, detail=refusal)
            connection = HttpConnection(self, origin, self._limits, loop)
            options: dict[str, Any] = {}
            if origin.scheme == "https":
                options = {
                    "ssl": self._tls,
                    "server_hostname": origin.host,
                    "ssl_handshake_timeout": self._limits.connect_s,
                }
            await loop.create_connection(lambda: connection, sock=sock, **options)
        except BaseException:
            sock.close()
            raise
        self.opened += 1
        if not connection.closed:
            self._connections.add(connection)
            connection.deadline = loop.time() + self._limits.idle_s
        return connection


def make_tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Verify peers against the system's authorities, or those of `ca_file` alone."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _addr_info(address: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    peer = (address, port, 0, 0) if family == socket.AF_INET6 else (address, port)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", peer)


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate was not accepted: {exc.verify_message}"
    return f"the handshake failed: {exc.reason or exc}"
