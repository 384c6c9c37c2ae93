"""A receiver that doesn't end: `python -m bench.hostile PORT`. What it sends depends on the path, whatever it is asked.

/body      a body of 10 GB, as fast as it is read
/headers   ten million headers
/drip      an answer's bytes, one a second
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import uvloop

BODY_BYTES = 10 << 30
HEADERS = 10_000_000
DRIP_S = 1.0
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
SLOW = OK + b"content-length: 0\r\nx-fill: " + b"x" * 4_096 + b"\r\n\r\n"


def body() -> Iterator[bytes]:
    yield OK + b"transfer-encoding: chunked\r\n\r\n"
    yield from itertools.repeat(CHUNK, BODY_BYTES // 0x10000)


def headers() -> Iterator[bytes]:
    yield OK
    for first in range(0, HEADERS, 1_000):
        yield b"".join(b"x-%d: y\r\n" % n for n in range(first, first + 1_000))


class Hostile(asyncio.Protocol):
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: Iterator[bytes] | None = None
        self._transport: Any = None
        self._wait_s = 0.0
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._pieces is not None:
            return
        path = data.split(b" ", 2)[1]
        if path == b"/drip":
            self._pieces, self._wait_s = (SLOW[n : n + 1] for n in range(len(SLOW))), DRIP_S
        else:
            self._pieces = headers() if path == b"/headers" else body()
        self._send()

    def pause_writing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def resume_writing(self) -> None:
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pieces = iter(())
        self.pause_writing()

    def _send(self) -> None:
        assert self._pieces is not None
        piece = next(self._pieces, None)
        if piece is None:
            self._transport.close()
            return
        # The next one first: writing may pause us.
        self._timer = self._loop.call_later(self._wait_s, self._send)
        self._transport.write(piece)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Hostile, "127.0.0.1", port, backlog=1_024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
