"""Transport: what a POST costs with our thin client, with aiohttp behind the same port, and with aiohttp as it is used plainly.

Rounds alternate, so that whatever else the machine does hits all. First the clients alone, each in a process of its own: `in_flight` connections
post a ready-made request over and over. `plain` is ClientSession with its own connector, for comparison: is our adapter fair to aiohttp? Then
the whole dispatcher with either transport, as `bench.throughput` does it. GC is tuned as in the product everywhere.
Misleading when: the sink is the limit of the thin client's rate, which then wakes up for fewer answers at a time and looks dearer than it is.

    python -m bench.transport thin|aiohttp|plain PORT CONNECTIONS POSTS BODY_BYTES    →  {"posts": …, "wall_s": …, "cpu_s": …}
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import uvloop

from bench import rig, throughput
from dispatcher.domain.outcome import Outcome
from dispatcher.domain.url import Origin
from dispatcher.main import make_transport, tune_gc
from dispatcher.ports import Connection, Transport
from dispatcher.settings import load

KINDS = ("thin", "aiohttp", "plain")
BODY_BYTES = 470
HEADERS = {
    "user-agent": "dispatcher/1 (webhooks)",
    "content-type": "application/json",
    "webhook-id": "evt_" + "0" * 32,
    "webhook-timestamp": "1700000000",
    "webhook-signature": "v1," + "k" * 44,
    "x-attempt": "1",
}


async def run(*, rounds: int, events: int, endpoints: int, in_flight: int, kind: str, progress: Any) -> dict[str, Any]:
    """Return medians, minima and maxima over `rounds`."""
    made: list[dict[str, float]] = []
    with rig.postgres() as (dsn, _), rig.sink(kind) as (port, sink_pid):
        for n in range(rounds):
            made.append({})
            for client in KINDS:
                progress(f"transport: round {n + 1} of {rounds}, {client} client")
                made[n] |= await asyncio.to_thread(_client, client, port, sink_pid, in_flight, events)
            for transport in ("thin", "aiohttp"):
                progress(f"transport: round {n + 1} of {rounds}, dispatcher with {transport}")
                used_us = await _dispatcher(dsn, port, transport, events, endpoints, in_flight)
                made[n][f"dispatcher_{transport}_cpu_us"] = used_us
            made[n]["aiohttp_to_thin"] = made[n]["aiohttp_cpu_us"] / made[n]["thin_cpu_us"]
            made[n]["plain_to_thin"] = made[n]["plain_cpu_us"] / made[n]["thin_cpu_us"]
            made[n]["dispatcher_aiohttp_to_thin"] = (
                made[n]["dispatcher_aiohttp_cpu_us"] / made[n]["dispatcher_thin_cpu_us"]
            )
    spread = {}
    for key in made[0]:
        values = [one[key] for one in made]
        spread[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    settings = {"endpoints": endpoints, "in_flight": in_flight, "events": events, "sink": kind}
    return {"scenario": "transport", **settings, **spread}


def _client(client: str, port: int, sink_pid: int, connections: int, posts: int) -> dict[str, float]:
    arguments = [client, str(port), str(connections), str(posts), str(BODY_BYTES)]
    sink_cpu_s = rig.cpu_s(sink_pid, with_children=True)
    out = subprocess.run(
        [sys.executable, "-m", "bench.transport", *arguments], capture_output=True, check=True, text=True, timeout=600
    )
    sink_cpu_s = rig.cpu_s(sink_pid, with_children=True) - sink_cpu_s
    result: dict[str, float] = json.loads(out.stdout)
    measured = {
        f"{client}_cpu_us": result["cpu_s"] / posts * 1e6,
        f"{client}_rate_per_s": posts / result["wall_s"],
    }
    if client == "thin":  # the fastest
        measured["sink_cpu_share"] = sink_cpu_s / result["wall_s"]
    return measured


async def _dispatcher(dsn: str, port: int, transport: str, events: int, endpoints: int, in_flight: int) -> float:
    """Return the process's CPU µs per delivery."""
    connection = await rig.install(dsn, endpoints=endpoints, port=port, in_flight=max(1, in_flight // endpoints))
    try:
        async with rig.dispatcher(dsn, connection, slots=in_flight, transport=transport) as pid:
            await throughput.warm_up(connection, endpoints)
            before = rig.cpu_s(pid)
            await throughput.passed(connection, await throughput.produce(connection, events, endpoints))
            return (rig.cpu_s(pid) - before) / events * 1e6
    finally:
        await connection.close()


# ── in the client's process ──


class Poster:
    """One connection of the port that posts while there are posts left."""

    left = 0  # to be started
    unanswered = 0

    def __init__(self, transport: Transport, origin: Origin, request: bytes, done: asyncio.Event) -> None:
        self.transport, self.origin, self.request, self.done = transport, origin, request, done
        transport.connect(origin, self.post)

    def post(self, connection: Connection | Outcome) -> None:
        assert not isinstance(connection, Outcome), connection
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
