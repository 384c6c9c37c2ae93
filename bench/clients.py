"""Clients that only post, to compare transports with: `connections` connections send a ready-made request over and over.

`thin` and `aiohttp` are the product's transports, behind their port; `plain` is ClientSession with a connector of its own: is our adapter
fair to aiohttp? GC is tuned as in the product everywhere.

    python -m bench.clients thin|aiohttp|plain PORT CONNECTIONS POSTS BODY_BYTES    →  {"posts": …, "wall_s": …, "cpu_s": …}
"""

import asyncio
import json
import sys
import time

import uvloop

from dispatcher.domain.outcome import Outcome
from dispatcher.domain.url import Origin
from dispatcher.main import make_transport, tune_gc
from dispatcher.ports import Connection, Transport
from dispatcher.settings import load

BODY_BYTES = 470
HEADERS = {
    "user-agent": "dispatcher/1 (webhooks)",
    "content-type": "application/json",
    "webhook-id": "evt_" + "0" * 32,
    "webhook-timestamp": "1700000000",
    "webhook-signature": "v1," + "k" * 44,
    "x-attempt": "1",
}


class Poster:
    """One connection of the port that posts while there are posts left."""

    left = 0  # to be started
    unanswered = 0

    def __init__(self, transport: Transport, origin: Origin, request: bytes, done: asyncio.Event) -> None:
        self.transport, self.origin, self.request, self.done = transport, origin, request, done
        transport.connect(origin, self.post)

    def post(self, connection: Connection | Outcome) -> None:
        assert not isinstance(connection, Outcome), connection
        if Poster.left == 0:  # the others were done before this one was open
            self.transport.release(connection)
            return
        Poster.left -= 1
        connection.post(self.request, 15.0, self.answered)

    def answered(self, outcome: Outcome) -> None:
        assert outcome.delivered, outcome
        Poster.unanswered -= 1
        if Poster.left > 0:
            connection = self.transport.try_acquire(self.origin)
            assert connection is not None
            self.post(connection)
        elif not Poster.unanswered:
            self.done.set()


async def by_port(transport_name: str, port: int, connections: int, posts: int, body: bytes) -> None:
    settings = load(transport=transport_name, allowed_networks="127.0.0.0/8", sockets_per_origin_max=connections)
    transport = make_transport(settings)
    head = f"POST /hook HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
    Poster.left = Poster.unanswered = posts
    done = asyncio.Event()
    for _ in range(connections):
        Poster(transport, Origin("http", "127.0.0.1", port), request, done)
    await done.wait()
    await transport.close()


async def by_plain_aiohttp(port: int, connections: int, posts: int, body: bytes) -> None:
    import aiohttp  # not by the others, who would pay for its import

    connector = aiohttp.TCPConnector(limit=connections, limit_per_host=connections)
    left = posts
    url = f"http://127.0.0.1:{port}/hook"

    async def loop(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(url, data=body, headers=HEADERS, allow_redirects=False) as response:
                await response.read()
                assert response.status // 100 == 2

    async with aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=15),
    ) as session:
        await asyncio.gather(*(loop(session) for _ in range(connections)))


async def client(kind: str, port: int, connections: int, posts: int, body_bytes: int) -> dict[str, float]:
    async def go(count: int) -> None:
        if kind == "plain":
            await by_plain_aiohttp(port, connections, count, b"x" * body_bytes)
        else:
            await by_port(kind, port, connections, count, b"x" * body_bytes)

    await go(connections * 3)  # imports, caches
    tune_gc()
    wall, cpu = time.perf_counter(), time.process_time()
    await go(posts)
    return {"posts": posts, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(client(sys.argv[1], *map(int, sys.argv[2:6])))))
