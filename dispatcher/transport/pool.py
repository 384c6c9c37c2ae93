"""The thin transport: how an `HttpConnection` comes to be. Bounds and waiting lines are `Room`'s.

Look up, judge every address, connect (RFC 8305 happy eyeballs), judge the peer that was really reached, TLS with SNI and verification. The
whole has one deadline, and what it was busy with then is the fault: dns, connect or tls.
"""

import asyncio
import os
import socket
import ssl
from typing import Any

import aiohappyeyeballs

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport.connection import HttpConnection
from dispatcher.transport.resolver import Resolver, UnresolvedError
from dispatcher.transport.room import Room

# Tried per family. Each try is a socket that the bounds don't see, and a name may have any number of addresses that drop our SYNs.
ADDRESSES_MAX = 3
HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305, 8

_LATE = {
    Fault.DNS: "the name was not resolved",
    Fault.CONNECT: "no connection",
    Fault.TLS: "no TLS handshake",
}


class Pool(Room):
    """The `Transport` port on sockets. `guard` judges addresses; `tls` verifies peers."""

    def __init__(
        self,
        limits: Limits,
        guard: AddressPolicy,
        *,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        super().__init__(limits)
        self._guard = guard
        self._tls = tls or make_tls_context(None)
        self._resolver = resolver or Resolver(limits.dns_ttl_s)

    async def close(self) -> None:
        await super().close()
        await self._resolver.close()

    async def _establish(self, origin: Origin) -> HttpConnection | Outcome:
        limits = self._limits
        stage = Fault.DNS
        try:
            async with asyncio.timeout(limits.connect_s):
                addresses = await self._resolver.resolve(origin.host)
                refusals = [self._guard.refusal(address, origin.scheme) for address in addresses]
                allowed = [address for address, refusal in zip(addresses, refusals, strict=True) if refusal is None]
                if not allowed:
                    return Outcome(Fault.BLOCKED, detail=str(refusals[0]))
                stage = Fault.CONNECT
                sock = await aiohappyeyeballs.start_connection(
                    _addr_infos(allowed, origin.port),
                    happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
                    interleave=1,
                    loop=asyncio.get_running_loop(),
                )
                if origin.scheme == "https":
                    stage = Fault.TLS
                return await self._join(sock, origin)
        except TimeoutError:
            return Outcome(stage, detail=f"{_LATE[stage]} within {limits.connect_s:g} s")
        except UnresolvedError as exc:
            return Outcome(Fault.DNS, detail=str(exc))
        except ssl.SSLError as exc:
            return Outcome(Fault.TLS, detail=_tls_reason(exc))
        except OSError as exc:
            return Outcome(stage, detail=os.strerror(exc.errno) if exc.errno else str(exc) or type(exc).__name__)

    async def _join(self, sock: socket.socket, origin: Origin) -> HttpConnection | Outcome:
        """Make a connection of a connected socket, if its peer may be talked to."""
        loop = asyncio.get_running_loop()
        connection = HttpConnection(self, origin, self._limits, loop)
        options: dict[str, Any] = {}
        if origin.scheme == "https":
            options = {
                "ssl": self._tls,
                "server_hostname": origin.host,
                "ssl_handshake_timeout": self._limits.connect_s,
            }
        try:
            refusal = self._guard.refusal(sock.getpeername()[0], origin.scheme)
        except OSError:
            sock.close()
            raise
        if refusal is not None:
            sock.close()
            return Outcome(Fault.BLOCKED, detail=refusal)
        try:
            await loop.create_connection(lambda: connection, sock=sock, **options)
        except BaseException:
            connection.close()  # its transport may exist already
            raise
        finally:
            # libuv owns the descriptor now, and has closed it if the peer was quick to hang up; uvloop doesn't always tell the socket.
            # Closing it here, or when it is collected, would close whatever has got the same number since.
            sock.detach()
        return connection


def make_tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Verify peers against the system's authorities, or those of `ca_file` alone."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _addr_infos(addresses: list[str], port: int) -> list[Any]:
    v6 = [address for address in addresses if ":" in address]
    v4 = [address for address in addresses if ":" not in address]
    infos: list[Any] = [
        (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
        for address in v6[:ADDRESSES_MAX]
    ]
    infos += [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)) for address in v4[:ADDRESSES_MAX]
    ]
    return infos


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate was not accepted: {exc.verify_message}"
    return f"the handshake failed: {exc.reason or exc}"
