"""Receivers that do harm, on loopback only: each is what some customer's endpoint is on some day.

What only an HTTP server can do (hang, fail, be slow) is the project's sink's; here is what happens before HTTP.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator


@contextlib.contextmanager
def syn_dropped() -> Iterator[int]:
    """Yield a port to which a connection never comes about: its queue of accepted ones is full, so the kernel drops each further SYN."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("0.0.0.0", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        for _ in range(10):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        else:
            raise RuntimeError("this kernel goes on accepting: a full queue can't be made")
        yield port


@contextlib.asynccontextmanager
async def tls_hanging() -> AsyncIterator[int]:
    """Yield a port that accepts every connection, reads, and never says a word: a TLS handshake there doesn't end."""
    accepted: set[asyncio.BaseTransport] = set()

    class Mute(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            accepted.add(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            accepted.discard(self.transport)

    server = await asyncio.get_running_loop().create_server(Mute, "0.0.0.0", 0, backlog=4_096)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for transport in list(accepted):
            transport.close()
        await server.wait_closed()


@contextlib.contextmanager
def dns_hanging() -> Iterator[int]:
    """Yield a port of a name server that takes questions and never answers, by UDP and by TCP."""
    udp, tcp = _both_at_one_port()
    with udp, tcp:
        tcp.listen(16)
        yield udp.getsockname()[1]


def _both_at_one_port() -> tuple[socket.socket, socket.socket]:
    """Bind a UDP and a TCP socket to the same number, which may be taken for one of them."""
    while True:
        udp, tcp = socket.socket(type=socket.SOCK_DGRAM), socket.socket()
        udp.bind(("127.0.0.1", 0))
        try:
            tcp.bind(udp.getsockname())
        except OSError as exc:
            udp.close()
            tcp.close()
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            return udp, tcp
