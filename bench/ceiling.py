"""The ceiling: the least that an asyncio HTTP client can cost. FROZEN: it shares no code with the product and is never
tuned, so that figures of different days can be compared. It sends one ready-made request over and over on kept-alive
connections and waits for each answer.

    python -m bench.ceiling HOST PORT CONNECTIONS POSTS BODY_BYTES    →  {"posts": …, "wall_s": …, "cpu_s": …}
"""

import asyncio
import json
import sys
import time
from typing import cast

import httptools
import uvloop


class Bare(asyncio.Protocol):
    left = 0

    def __init__(self, request: bytes, done: asyncio.Event) -> None:
        self.request, self.done = request, done
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        Bare.left -= 1
        if Bare.left > 0:
            self.transport.write(self.request)
        else:
            self.done.set()


async def run(host: str, port: int, connections: int, posts: int, body_bytes: int) -> dict[str, float]:
    head = f"POST /hook HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\ncontent-length: {body_bytes}\r\n\r\n"
    done = asyncio.Event()
    made = [Bare(head.encode() + b"x" * body_bytes, done) for _ in range(connections)]
    for bare in made:
        await asyncio.get_running_loop().create_connection(lambda bare=bare: bare, host, port)  # type: ignore[misc]
    Bare.left = posts
    wall, cpu = time.perf_counter(), time.process_time()
    for bare in made:
        bare.transport.write(bare.request)
    await done.wait()
    return {"posts": posts, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(sys.argv[1], *map(int, sys.argv[2:6])))))
