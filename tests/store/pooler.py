"""A pooler's double: as much of PgBouncer as decides what works behind one, in the test's own loop.

It speaks PostgreSQL's protocol to both sides: to a client it is a server that lets everybody in, to the server a client that logs in with trust.
Messages are passed on whole. What it copies from PgBouncer: startup parameters that it doesn't know are refused; a client gets a server
connection with its first message; that is given back at its end and cleaned by DISCARD ALL (session), when a transaction is over
(transaction), or after each statement, BEGIN being refused (statement); connections are taken last-in first-out or in turn; application_name
is set on the server connection for each client.
"""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, urlsplit, urlunsplit

Mode = Literal["session", "transaction", "statement"]
Message = tuple[bytes, bytes]  # type, body

PROTOCOL_3, CANCEL, SSL, GSS = 196_608, 80_877_102, 80_877_103, 80_877_104
TRACKED = {"user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings", "application_name"}  # fmt: skip
ASKS = (b"Q", b"S", b"F")  # each is answered by one ReadyForQuery


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">i", len(body) + 4) + body


def fatal(text: str) -> bytes:
    """An error as poolers send it, with SQLSTATE 08P01."""
    return message(b"E", b"SFATAL\0VFATAL\0C08P01\0M" + text.encode() + b"\0\0")


def startup(parameters: dict[str, str]) -> bytes:
    pairs = b"".join(name.encode() + b"\0" + value.encode() + b"\0" for name, value in parameters.items())
    body = struct.pack(">i", PROTOCOL_3) + pairs + b"\0"
    return struct.pack(">i", len(body) + 4) + body


async def read_message(reader: asyncio.StreamReader) -> Message:
    head = await reader.readexactly(5)
    return head[:1], await reader.readexactly(struct.unpack(">i", head[1:])[0] - 4)


class ServerConnection:
    """One connection to PostgreSQL; `client` is whom its answers go to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = b""  # ParameterStatus messages of the login
        self.client: Client | None = None
        self.unanswered = 0
        self.status = b"I"  # of the last ReadyForQuery
        self.application_name = ""
        self.ready = asyncio.Event()
        self.is_open = True

    @property
    def is_idle(self) -> bool:
        return self.unanswered == 0 and self.status == b"I"

    def send(self, kind: bytes, body: bytes) -> None:
        self.unanswered += kind in ASKS
        self.ready.clear()
        self.writer.write(message(kind, body))

    async def query(self, sql: str) -> None:
        """Run a statement of the pooler's own; nobody sees its answer."""
        client, self.client = self.client, None
        self.send(b"Q", sql.encode() + b"\0")
        await self.ready.wait()
        self.client = client


class Client:
    def __init__(self, writer: asyncio.StreamWriter, parameters: dict[str, str]) -> None:
        self.writer = writer
        self.parameters = parameters
        self.server: ServerConnection | None = None


class Pooler:
    """`dsn` leads through it to the same database as the `dsn` that it was made for."""

    def __init__(self, dsn: str, mode: Mode, *, in_turn: bool = False, size: int = 20, opened: int = 0) -> None:
        self.dsn = ""
        self.clients = 0
        self._to = urlsplit(dsn)
        self._mode = mode
        self._in_turn = in_turn
        self._size = size
        self._opened = opened
        self._idle: list[ServerConnection] = []
        self._all: list[ServerConnection] = []
        self._freed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self._keys: Iterator[int] = itertools.count(1_000_000_000)

    async def __aenter__(self) -> "Pooler":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.dsn = urlunsplit(self._to._replace(netloc=f"postgres@127.0.0.1:{port}", query=""))
        self._idle += [await self._open() for _ in range(self._opened)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._all:
            server.writer.close()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── clients ──

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = None
        try:
            parameters = await self._greeted(reader, writer)
            if parameters is None:
                return
            client = Client(writer, parameters)
            self.clients += 1
            while True:
                kind, body = await read_message(reader)
                if kind == b"X":
                    break
                if client.server is None:
                    client.server = await self._acquire(client)
                client.server.send(kind, body)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client is gone, with or without a goodbye
        finally:
            writer.close()
            if client is not None and client.server is not None:
                server, client.server = client.server, None
                server.client = None
                self._spawn(self._clean(server))

    async def _greeted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, str] | None:
        """Log a client in; None if it wanted something else, or may not."""
        while True:
            length, code = struct.unpack(">ii", await reader.readexactly(8))
            body = await reader.readexactly(length - 8)
            if code in (SSL, GSS):
                writer.write(b"N")
                continue
            if code != PROTOCOL_3:
                return None
            words = [word.decode() for word in body.split(b"\0")[:-2]]
            parameters = dict(zip(words[::2], words[1::2], strict=True))
            unknown = parameters.keys() - TRACKED
            if unknown:
                writer.write(fatal(f"unsupported startup parameter: {min(unknown)}"))
                return None
            if not self._all:
                self._idle.append(await self._open())
            key = message(b"K", struct.pack(">ii", next(self._keys), 0))  # the pooler's own: no backend has this id
            writer.write(message(b"R", struct.pack(">i", 0)) + self._all[0].greeting + key + message(b"Z", b"I"))
            return parameters

    # ── server connections ──

    async def _open(self) -> ServerConnection:
        where = parse_qs(self._to.query)
        server = ServerConnection(
            *await asyncio.open_unix_connection(f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}")
        )
        server.writer.write(startup({"user": "postgres", "database": self._to.path[1:], "client_encoding": "UTF8"}))
        self._all.append(server)
        while True:
            kind, body = await read_message(server.reader)
            assert kind != b"E", body
            if kind == b"S":
                server.greeting += message(kind, body)
            if kind == b"Z":
                break
        self._spawn(self._answers(server))
        return server

    async def _answers(self, server: ServerConnection) -> None:
        try:
            while True:
                kind, body = await read_message(server.reader)
                client = server.client
                if client is not None:
                    client.writer.write(message(kind, body))
                if kind == b"Z":
                    server.unanswered -= 1
                    server.status = body
                    server.ready.set()
                    if client is not None:
                        await self._answered(server, client)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            server.is_open = False
            server.ready.set()
            server.writer.close()
            self._all.remove(server)
            if server in self._idle:
                self._idle.remove(server)
            if server.client is not None:
                server.client.server = None
                server.client.writer.close()
            async with self._freed:
                self._freed.notify_all()

    async def _answered(self, server: ServerConnection, client: Client) -> None:
        if self._mode == "statement" and server.status != b"I":
            client.writer.write(fatal("transaction blocks not allowed in statement pooling mode"))
            server.writer.close()
        elif self._mode != "session" and server.is_idle:
            server.client = client.server = None
            await self._release(server)

    async def _acquire(self, client: Client) -> ServerConnection:
        async with self._freed:
            while True:
                if self._idle:
                    server = self._idle.pop(0 if self._in_turn else -1)
                    break
                if len(self._all) < self._size:
                    server = await self._open()
                    break
                await self._freed.wait()
        name = client.parameters.get("application_name", "")
        if server.application_name != name:
            await server.query(f"SET application_name = '{name}'")
            server.application_name = name
        server.client = client
        return server

    async def _release(self, server: ServerConnection) -> None:
        async with self._freed:
            self._idle.append(server)
            self._freed.notify()

    async def _clean(self, server: ServerConnection) -> None:
        """Give back what a client has left: cleaned in session mode, closed if it was in the middle of something."""
        if not server.is_idle:
            server.writer.close()
            return
        if self._mode == "session":
            with contextlib.suppress(OSError):
                await server.query("DISCARD ALL")
            server.application_name = ""
        if server.is_open:
            await self._release(server)
