"""Two small proxies for the tests: HTTP CONNECT and SOCKS5, on loopback. They note what they are asked for."""

import asyncio
import base64
import contextlib
import ipaddress
from collections.abc import AsyncIterator

from dispatcher.domain.proxy import Proxy
from tests.transport.peers import until

REFUSALS = {"http": b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "socks5": b"\x05\x05\x00\x01" + bytes(6)}


class FakeProxy:
    """`asked`: (host, port) of each tunnel. `routes`: where a host is really reached, on loopback; `refuses` these hosts.

    `says`: its answer to all requests for a tunnel, then it closes; `says_piecewise`: it writes byte by byte."""

    def __init__(self, scheme: str, user: str = "", password: str = "") -> None:
        self.scheme = scheme
        self.user, self.password = user, password
        self.asked: list[tuple[str, int]] = []
        self.connections = 0
        self.callers: list[str] = []
        self.routes: dict[str, str] = {}
        self.refuses: set[str] = set()
        self.says: bytes | None = None
        self.says_piecewise = False
        self.silent = False
        self.host = "127.0.0.1"
        self.port = 0
        self.open: set[asyncio.Task[None]] = set()

    def settings(self, user: str | None = None, password: str | None = None) -> Proxy:
        """The client's side of it."""
        scheme = "http" if self.scheme == "http" else "socks5"
        return Proxy(
            scheme, self.host, self.port, self.user if user is None else user, self.password if password is None else password
        )  # fmt: skip

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.callers.append(writer.get_extra_info("peername")[0])
        task = asyncio.current_task()
        assert task is not None
        self.open.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await (self._http(reader, writer) if self.scheme == "http" else self._socks5(reader, writer))
        finally:
            self.open.discard(task)
            writer.close()

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, version = head[0].split(" ")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        headers = dict(
            line.lower().split(": ", 1) if "basic" not in line.lower() else line.split(": ", 1)
            for line in head[1:]
            if line
        )
        assert headers["host"] == target
        host, _, port = target.rpartition(":")
        self.asked.append((host.strip("[]"), int(port)))
        given = headers.get("proxy-authorization", "")
        if given != (
            f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}" if self.user else ""
        ):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        else:
            await self._tunnel(reader, writer, b"HTTP/1.1 200 Connection established\r\nvia: x\r\n\r\n")

    async def _socks5(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version, count = await reader.readexactly(2)
        assert version == 5
        methods = await reader.readexactly(count)
        wanted = 2 if self.user else 0
        if wanted not in methods:
            writer.write(b"\x05\xff")
            return
        writer.write(bytes((5, wanted)))
        if self.user:
            _, size = await reader.readexactly(2)
            user = await reader.readexactly(size)
            password = await reader.readexactly((await reader.readexactly(1))[0])
            right = (user.decode(), password.decode()) == (self.user, self.password)
            writer.write(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                return
        _, command, _, kind = await reader.readexactly(4)
        assert command == 1
        assert kind in (1, 4), "an address, never a name"
        host = str(ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        self.asked.append((host, int.from_bytes(await reader.readexactly(2), "big")))
        await self._tunnel(reader, writer, b"\x05\x00\x00\x01" + bytes(6))

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, yes: bytes) -> None:
        host, port = self.asked[-1]
        if self.silent:
            await reader.read()
            return
        if self.says is not None:
            writer.write(self.says)
            return
        if host in self.refuses:
            writer.write(REFUSALS[self.scheme])
            return
        there, here = await asyncio.open_connection(self.routes.get(host, host), port)
        try:
            for piece in [bytes([byte]) for byte in yes] if self.says_piecewise else [yes]:
                writer.write(piece)
                await asyncio.sleep(0.001 if self.says_piecewise else 0)
            up, down = asyncio.create_task(_pump(reader, here)), asyncio.create_task(_pump(there, writer))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        finally:
            here.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)


@contextlib.asynccontextmanager
async def make_proxy(scheme: str, user: str = "", password: str = "") -> AsyncIterator[FakeProxy]:
    proxy = FakeProxy(scheme, user, password)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in proxy.open:
            task.cancel()
        await until(lambda: not proxy.open)
        await server.wait_closed()
