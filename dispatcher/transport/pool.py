"""The thin transport: how a connection comes to be. Bounds and waiting lines are `Room`'s, what is said on it `HttpConnection`'s.

Look up, judge every address, connect (to one of them, or have a proxy do so), judge the peer that was really reached, TLS with SNI and
verification. The whole has one deadline, and what it was busy with then is the fault: dns, connect or tls.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Sequence
from functools import partial
from time import perf_counter  # uvloop's own clock stands still within a turn, and has milliseconds
from typing import Any

import structlog

from dispatcher.domain.address import PLAIN_HTTP, AddressPolicy, is_literal
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.proxy import Proxy
from dispatcher.domain.url import RECEIVER_HOST, Origin
from dispatcher.ports import Limits, Trace
from dispatcher.transport.connection import HttpConnection, TracedConnection
from dispatcher.transport.proxy import ProxyError, Tunnels
from dispatcher.transport.resolver import Resolver, UnresolvedError
from dispatcher.transport.room import Kept, Room
from dispatcher.transport.tcp import connect_tcp
from dispatcher.transport.tls import Contexts, MakeContext, make_tls_context

_log = structlog.get_logger(room="transport")

_LATE = {
    Fault.DNS: "the name was not resolved",
    Fault.CONNECT: "no connection",
    Fault.TLS: "no TLS handshake",
}


class Pool(Room):
    """The `Transport` port on sockets. `guard` judges addresses; `tls` verifies peers; with `proxy` all goes through it.
    `local`: the addresses to connect from.

    `tls_as` makes what takes the place of `tls` for an origin with a client identity."""

    def __init__(
        self,
        limits: Limits,
        guard: AddressPolicy,
        *,
        tls: ssl.SSLContext | None = None,
        tls_as: MakeContext | None = None,
        resolver: Resolver | None = None,
        proxy: Proxy | None = None,
        local: Sequence[str] = (),
    ) -> None:
        super().__init__(limits)
        self._guard = guard
        self._tls = tls or make_tls_context(None)
        self._contexts = Contexts(tls_as or partial(make_tls_context, None))
        self._resolver = resolver or Resolver(limits.dns_ttl_s)
        self._local = local
        self._tunnels = Tunnels(proxy, self._resolver, limits.connect_s, local) if proxy is not None else None

    async def close(self) -> None:
        await super().close()
        await self._resolver.close()

    def _make(self, origin: Origin, trace: Trace | None = None) -> tuple[Kept, asyncio.Protocol]:
        """Make a connection that has no socket yet, and the protocol to give the socket to."""
        loop = asyncio.get_running_loop()
        if trace is None:
            connection = HttpConnection(self, origin, self._limits, loop)
        else:
            connection = TracedConnection(self, origin, self._limits, loop, trace)
        return connection, connection

    async def _establish(self, origin: Origin, trace: Trace | None = None) -> Kept | Outcome:
        limits = self._limits
        tls = self._tls
        if origin.identity is not None:
            try:
                tls = await self._contexts.of(origin.identity)
            except ssl.SSLError as exc:
                reason = exc.reason or type(exc).__name__
                return Outcome(Fault.TLS, detail=f"the endpoint's client certificate can't be used: {reason}")
        stage = Fault.DNS
        if trace is not None:
            trace.began = perf_counter()
        try:
            async with asyncio.timeout(limits.connect_s):
                if origin.host == RECEIVER_HOST:
                    # Ours, by a URL that could mean nothing else: its listener's address is a setting, and no proxy's business.
                    assert self._guard.receiver is not None
                    allowed = [self._guard.receiver.address]
                else:
                    addresses = await self._resolver.resolve(origin.host)
                    refusals = [self._guard.refusal(address, origin.scheme) for address in addresses]
                    allowed = [address for address, refusal in zip(addresses, refusals, strict=True) if refusal is None]
                    if not allowed:
                        return _blocked(origin, str(refusals[0]))
                stage = Fault.CONNECT
                if trace is not None:
                    trace.resolved = perf_counter()
                if origin.host == RECEIVER_HOST:
                    sock = await connect_tcp(allowed, origin.port)
                elif self._tunnels is None:
                    sock = await connect_tcp(allowed, origin.port, self._local)
                else:
                    sock = await self._tunnels.reach(allowed, origin.port)
                if trace is not None:
                    trace.connected = perf_counter()
                if origin.scheme == "https":
                    stage = Fault.TLS
                return await self._join(sock, origin, tls, trace)
        except TimeoutError:
            by = "by the proxy " if self._tunnels is not None and stage is Fault.CONNECT else ""
            return Outcome(stage, detail=f"{_LATE[stage]} {by}within {limits.connect_s:g} s")
        except UnresolvedError as exc:
            return Outcome(Fault.DNS, detail=str(exc))
        except ProxyError as exc:
            return Outcome(Fault.CONNECT, detail=str(exc))
        except ssl.SSLError as exc:
            return Outcome(Fault.TLS, detail=_tls_reason(exc))
        except OSError as exc:
            return Outcome(stage, detail=os.strerror(exc.errno) if exc.errno else str(exc) or type(exc).__name__)

    async def _join(
        self, sock: socket.socket, origin: Origin, tls: ssl.SSLContext, trace: Trace | None
    ) -> Kept | Outcome:
        """Make a connection of a connected socket, if its peer may be talked to."""
        loop = asyncio.get_running_loop()
        connection, protocol = self._make(origin, trace)
        options: dict[str, Any] = {}
        if origin.scheme == "https":
            options = {
                "ssl": tls,
                "server_hostname": origin.host,
                "ssl_handshake_timeout": self._limits.connect_s,
            }
        if self._tunnels is None and origin.host != RECEIVER_HOST:  # else the peer is the proxy, or ourselves
            try:
                peer = sock.getpeername()[0]
                refusal = self._guard.refusal(peer, origin.scheme)
            except OSError:
                sock.close()
                raise
            if refusal is not None:
                sock.close()
                return _blocked(origin, refusal)
            if trace is not None:
                trace.address = peer
        try:
            await loop.create_connection(lambda: protocol, sock=sock, **options)
        except BaseException:
            connection.close()  # its transport may exist already
            raise
        finally:
            # libuv owns the descriptor now, and has closed it if the peer was quick to hang up; uvloop doesn't always tell the socket.
            # Closing it here, or when it is collected, would close whatever has got the same number since.
            sock.detach()
        if trace is not None and origin.scheme == "https":
            trace.secured = perf_counter()
        return connection


def _blocked(origin: Origin, refusal: str) -> Outcome:
    """Tell why an address that was given is refused. What a *name* resolves to the log has: who may name hosts could map the network so."""
    if refusal == PLAIN_HTTP or is_literal(origin.host):
        return Outcome(Fault.BLOCKED, detail=refusal)
    _log.info("address.refused", host=origin.host, refusal=refusal)
    return Outcome(Fault.BLOCKED, detail="its name resolves to an address that may not be delivered to")


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate was not accepted: {exc.verify_message}"
    return f"the handshake failed: {exc.reason or exc}"
