"""Sockets by way of an outbound proxy: it is told a judged address, and sees nothing but the tunnel.

The name has been resolved and its addresses judged before the proxy hears of any; so the guard holds as it does without one, provided that the
proxy connects to what it was told. Everything above the socket (TLS with the name, Host) is as without a proxy too. The proxy's own address is
the operator's choice and isn't judged.

What goes wrong here is told as `ProxyError`, in words that blame the proxy and not the receiver behind it.
"""

import asyncio
import base64
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from dispatcher.domain.proxy import Proxy
from dispatcher.errors import InputError
from dispatcher.transport.resolver import Resolver, UnresolvedError
from dispatcher.transport.tcp import ADDRESSES_MAX, connect_tcp

HEAD_BYTES_MAX = 8_192  # of a proxy's answer to CONNECT


class ProxyError(Exception):
    """The proxy is not to be had, or would not connect us."""


class ProxyRefusedError(ProxyError):
    """The proxy could not reach this address; another may do."""


class Tunnels:
    """Reach addresses through `proxy`, whose name `resolver` looks up, within `connect_s`."""

    def __init__(self, proxy: Proxy, resolver: Resolver, connect_s: float, local: Sequence[str] = ()) -> None:
        if local and proxy.scheme == "socks5":
            raise InputError("setting DISPATCHER_LOCAL_ADDRESS: not with a socks5:// proxy; leave one of the two out")
        self._local = local
        self._proxy = proxy
        self._resolver = resolver
        self._connect_s = connect_s
        self._socks: Any = _load_socks() if proxy.scheme == "socks5" else None

    def __repr__(self) -> str:
        return f"Tunnels({self._proxy.scheme}://{self._proxy.host}:{self._proxy.port})"

    async def reach(self, addresses: list[str], port: int) -> socket.socket:
        """Return a socket that the proxy has connected to one of `addresses`. Raises ProxyError or TimeoutError; it is
        the caller who bounds the time of the whole.

        IPv4 first, one after the other: a proxy can't be raced, and many have no IPv6."""
        try:
            ours = await self._resolver.resolve(self._proxy.host)
        except UnresolvedError as exc:
            raise ProxyError(f"the proxy's name: {exc}") from exc
        refused: ProxyRefusedError | None = None
        for address in sorted(addresses, key=lambda address: ":" in address)[:ADDRESSES_MAX]:
            try:
                if self._proxy.scheme == "http":
                    return await self._connect(ours, address, port)
                return await self._socks5(ours, address, port)
            except ProxyRefusedError as exc:
                refused = exc
        assert refused is not None
        raise refused

    async def _connect(self, ours: tuple[str, ...], address: str, port: int) -> socket.socket:
        """Open a tunnel by HTTP CONNECT."""
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        head = f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n"
        if self._proxy.user:
            credentials = base64.b64encode(f"{self._proxy.user}:{self._proxy.password}".encode()).decode()
            head += f"proxy-authorization: Basic {credentials}\r\n"
        loop = asyncio.get_running_loop()
        try:
            sock = await connect_tcp(list(ours), self._proxy.port, self._local)
        except OSError as exc:
            raise ProxyError(f"the proxy is not reachable: {_reason(exc)}") from exc
        try:
            await loop.sock_sendall(sock, head.encode() + b"\r\n")
            answer = b""
            while (end := answer.find(b"\r\n\r\n")) < 0:
                if len(answer) > HEAD_BYTES_MAX:
                    raise ProxyError("the proxy's answer to CONNECT is too long")
                more = await loop.sock_recv(sock, HEAD_BYTES_MAX)
                if not more:
                    raise ProxyError("the proxy closed the connection before it answered CONNECT")
                answer += more
            _judge_connect(answer[: end + 2])
            if len(answer) > end + 4:  # nobody has said anything yet that could be answered
                raise ProxyError("bytes that nobody asked for came after the proxy's answer to CONNECT")
        except BaseException as exc:
            sock.close()
            if isinstance(exc, OSError):
                raise ProxyError(f"the proxy broke off: {_reason(exc)}") from exc
            raise
        return sock

    async def _socks5(self, ours: tuple[str, ...], address: str, port: int) -> socket.socket:
        """Open a tunnel by SOCKS5; the library closes its socket when it fails or is cancelled."""
        proxy, socks = self._proxy, self._socks
        unreachable: OSError | None = None
        for own in ours[:ADDRESSES_MAX]:
            client = socks.async_.asyncio.Proxy(
                socks.ProxyType.SOCKS5,
                own,
                proxy.port,
                username=proxy.user or None,
                password=proxy.password or None,
                rdns=False,
            )
            try:
                sock: socket.socket = await client.connect(address, port, timeout=self._connect_s)
            except TimeoutError:
                raise
            except socks.ProxyConnectionError as exc:
                unreachable = exc
            except socks.ProxyError as exc:
                kind = ProxyRefusedError if exc.error_code in SOCKS_REFUSALS else ProxyError
                raise kind(f"the proxy refused: {exc}") from exc
            except OSError as exc:
                raise ProxyError(f"the proxy broke off: {_reason(exc)}") from exc
            else:
                return sock
        # Its own words name the proxy's address, and what stands here a customer reads.
        why = _reason(unreachable) if unreachable is not None and unreachable.errno else "no connection"
        raise ProxyError(f"the proxy is not reachable: {why}") from unreachable


# RFC 1928, 6: network unreachable, host unreachable, connection refused, TTL expired, address type not supported. What the others say (general
# failure, not allowed) they would say of every address.
SOCKS_REFUSALS = (3, 4, 5, 6, 8)

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: ([^\r\n]*))?\r\n")


def _judge_connect(head: bytes) -> None:
    match = _STATUS.match(head)
    if match is None:
        raise ProxyError("the proxy did not answer CONNECT in HTTP/1.1")
    status = int(match[1])
    if 200 <= status <= 299:
        return
    words = f"{status} {(match[2] or b'').decode('latin-1')[:100]}".strip()
    if status == 407:
        raise ProxyError(f"the proxy wants other credentials: {words}")
    kind = ProxyRefusedError if status in (502, 503, 504) else ProxyError
    raise kind(f"the proxy refused: {words}")


def _load_socks() -> Any:
    """Import the library; it comes with an extra, because few need it."""
    try:
        import python_socks
        import python_socks.async_.asyncio
    except ImportError as exc:
        raise InputError(
            "setting DISPATCHER_PROXY_URL: a socks5:// proxy needs the extra `socks`: pip install 'dispatcher[socks]'"
        ) from exc
    return python_socks


def _reason(exc: OSError) -> str:
    return os.strerror(exc.errno) if exc.errno else str(exc) or type(exc).__name__
