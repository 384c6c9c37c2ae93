"""A network between a dispatcher and PostgreSQL that can be cut: then nothing gets through either way, and nobody is told.

It listens on TCP and forwards to the server's unix socket. What was on its way when it was cut arrives when it heals, as TCP would see to,
the ends of connections included; a connection that is made meanwhile is accepted (as by a kernel's backlog) and gets no answer.
"""

import asyncio
import contextlib
from types import TracebackType
from urllib.parse import parse_qs, urlsplit, urlunsplit

CHUNK_BYTES = 65_536


class Network:
    """`dsn` leads through it to the same database as the `dsn` that it was made for."""

    def __init__(self, dsn: str) -> None:
        self.dsn = ""
        self._to = urlsplit(dsn)
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()  # both sides' of what is connected now
        self._server: asyncio.Server

    async def __aenter__(self) -> "Network":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.dsn = urlunsplit(self._to._replace(netloc=f"postgres@127.0.0.1:{port}", query=""))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._whole.clear()

    def heal(self) -> None:
        self._whole.set()

    def lead_to(self, dsn: str) -> None:
        """Lead connections that are made from now on to another server, as a name or a floating address does after a failover."""
        self._to = urlsplit(dsn)

    def sever(self) -> int:
        """End every connection at once, and tell both sides; return how many there were."""
        writers = tuple(self._open)
        for writer in writers:
            writer.transport.abort()
        return len(writers) // 2

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        where = parse_qs(self._to.query)
        try:
            await self._whole.wait()
            server_reader, server_writer = await asyncio.open_unix_connection(
                f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}"
            )
            self._open |= {writer, server_writer}
            try:
                await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))
            finally:
                self._open -= {writer, server_writer}
                server_writer.close()
        except OSError:
            pass  # either side is gone: so is the other
        finally:
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.read(CHUNK_BYTES)
            await self._whole.wait()
            if not data:
                break
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
