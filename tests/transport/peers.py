"""Receivers for the transport's tests, played by hand, and waits that end on a condition."""

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from dispatcher.domain.address import AddressPolicy, parse_networks
from dispatcher.domain.outcome import Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Connection, Limits, Transport
from dispatcher.transport.aiohttp_transport import AiohttpTransport
from dispatcher.transport.pool import Pool
from dispatcher.transport.resolver import Resolver, UnresolvedError

REQUEST = b"POST /hook HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nbody"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
NOBODY_TRUSTED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the system's authorities take 25 ms to load
LOOPBACK = AddressPolicy(parse_networks("127.0.0.0/8, ::1"))
TRANSPORTS: dict[str, type[Pool]] = {"thin": Pool, "aiohttp": AiohttpTransport}
chosen: type[Pool] = Pool  # what `new_pool` makes; the fixture `each_transport` sets it


async def until(condition: Callable[[], Any], *, within_s: float = 5.0) -> Any:
    """Wait until `condition` is true and return its value; fail after `within_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not (value := condition()):
        assert loop.time() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.001)  # a poll with a deadline, not a wait that hopes
    return value


def sockets() -> int:
    """Count this process's sockets."""
    found = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            found += stat.S_ISSOCK(os.fstat(int(name)).st_mode)
    return found


class Calls:
    """Outcomes in the order of their arrival; `told` says how often each callback was called."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.told: dict[int, int] = {}

    def one(self) -> Callable[[Any], None]:
        index = len(self.told)
        self.told[index] = 0

        def callback(result: Any) -> None:
            self.told[index] += 1
            self.results.append(result)

        return callback

    @property
    def all_once(self) -> bool:
        return all(count == 1 for count in self.told.values())


async def connected(transport: Transport, origin: Origin, *, fresh: bool = False, within_s: float = 30.0) -> Any:
    """Connect and return the connection or the outcome."""
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    transport.connect(origin, ready.set_result, fresh=fresh)
    assert not ready.done(), "on_ready comes later"
    return await asyncio.wait_for(ready, within_s)


def start(
    connection: Connection, request: bytes = REQUEST, timeout_s: float = 5.0, commands: bool = False
) -> "asyncio.Future[Outcome]":
    """Post and return the outcome as a future. A second call of on_done would raise InvalidStateError."""
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    connection.post(request, timeout_s, done.set_result, commands)
    assert not done.done(), "on_done comes later"
    return done


async def post(
    transport: Transport,
    origin: Origin,
    request: bytes = REQUEST,
    *,
    timeout_s: float = 5.0,
    fresh: bool = False,
    commands: bool = False,
) -> Outcome:
    """Post as the engine does: on an idle connection, else on a new one."""
    connection = None if fresh else transport.try_acquire(origin)
    if connection is None:
        result = await connected(transport, origin, fresh=fresh)
        if isinstance(result, Outcome):
            return result
        connection = result
    assert connection is not None
    return await asyncio.wait_for(start(connection, request, timeout_s, commands), 30)


class Talk(asyncio.Protocol):
    """One accepted connection; the test plays its side."""

    def __init__(self, peer: "Peer") -> None:
        self.peer = peer
        self.received = b""
        self.eof = False
        self.lost = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.peer.talks.append(self)
        self.peer.on_open(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if REQUEST in self.received:
            self.received = self.received.replace(REQUEST, b"", 1)
            self.peer.requests += 1
            self.peer.on_request(self)

    def eof_received(self) -> bool:
        self.eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def send(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self, last: bytes = b"") -> None:
        if last:
            self.transport.write(last)
        self.transport.close()

    def half_close(self, last: bytes = b"") -> None:
        if last:
            self.transport.write(last)
        self.transport.write_eof()

    def reset(self) -> None:
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Peer:
    """A listener on loopback. `on_open` and `on_request` are what it does by itself: nothing, unless the test says."""

    def __init__(self) -> None:
        self.talks: list[Talk] = []
        self.requests = 0
        self.on_open: Callable[[Talk], None] = lambda talk: None
        self.on_request: Callable[[Talk], None] = lambda talk: None
        self.origin: Origin
        self.server: asyncio.Server

    def answers(self, *answers: bytes) -> None:
        """Answer requests in turn; the last one stands for all that follow."""
        left = list(answers)
        self.on_request = lambda talk: talk.send(left.pop(0) if len(left) > 1 else left[0])

    @property
    def open(self) -> int:
        return sum(not talk.lost for talk in self.talks)


@contextlib.asynccontextmanager
async def make_peer(
    *answers: bytes, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", name: str | None = None
) -> AsyncIterator[Peer]:
    peer = Peer()
    if answers:
        peer.answers(*answers)
    peer.server = await asyncio.get_running_loop().create_server(lambda: Talk(peer), host, 0, ssl=tls, backlog=1024)
    port = peer.server.sockets[0].getsockname()[1]
    peer.origin = Origin("https" if tls else "http", name or host, port)
    try:
        yield peer
    finally:
        peer.server.close()
        for talk in peer.talks:
            talk.transport.abort()
        await until(lambda: not peer.open)
        await peer.server.wait_closed()


class Names(Resolver):
    """A resolver with a table instead of name servers; `until_set` makes look-ups of a name wait."""

    def __init__(self, **names: "tuple[str, ...] | list[tuple[str, ...]]") -> None:
        super().__init__(ttl_max_s=30.0)
        self.names = {name.replace("_", "."): found for name, found in names.items()}
        self.until_set: dict[str, asyncio.Event] = {}
        self.ttl_s = 30.0

    async def lookup(self, host: str) -> tuple[tuple[str, ...], float]:
        if host in self.until_set:
            await self.until_set[host].wait()
        found = self.names.get(host)
        if not found:
            raise UnresolvedError(f"{host} does not resolve")
        if isinstance(found, list):
            return (found.pop(0) if len(found) > 1 else found[0]), self.ttl_s
        return found, self.ttl_s


def new_pool(limits: Limits | None = None, *, guard: AddressPolicy = LOOPBACK, **options: Any) -> Pool:
    return chosen(limits or Limits(), guard, **{"tls": NOBODY_TRUSTED} | options)


@contextlib.asynccontextmanager
async def make_pool(limits: Limits | None = None, **options: Any) -> AsyncIterator[Pool]:
    """A pool that must leave nothing behind."""
    pool = new_pool(limits, **options)
    try:
        yield pool
    finally:
        await pool.close()
        if isinstance(pool, AiohttpTransport):
            assert not pool.tasks
        assert pool.count == 0
        assert not pool._lines
        assert not pool._connections
        assert not pool._opening


@contextlib.contextmanager
def refusing() -> Iterator[Origin]:
    """An origin where nobody listens, and nobody else will: the port is bound."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Origin("http", "127.0.0.1", sock.getsockname()[1])


@contextlib.contextmanager
def black_hole() -> Iterator[Origin]:
    """An origin whose SYNs are dropped: a listener that never accepts, its backlog full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield Origin("http", "127.0.0.1", listener.getsockname()[1])
