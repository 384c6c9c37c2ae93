"""Latency: from the producer's commit, acknowledged, to the receiver having the whole request.

Open loop: events are committed one by one at instants drawn in advance (Poisson arrivals), whether or not the earlier
ones have arrived, so a stall counts for everything that was due meanwhile (no coordinated omission). Producer and
receiver share a process and its clock. Misleading when: that process, which makes one commit per event, is itself late;
its lateness is reported beside as `producer_late_p99_ms`.
"""

import asyncio
import random
import time
from typing import Any

import asyncpg

from bench import rig
from dispatcher.sink import Received, Sink

PRODUCERS = 8  # connections; each commit waits for its flush


async def run(*, rate: float, seconds: float, endpoints: int, progress: Any) -> dict[str, Any]:
    """Return percentiles in ms at `rate` events a second."""
    progress(f"latency: {rate:g} events/s for {seconds:g} s")
    received: dict[int, float] = {}

    def on_event(event: Received) -> None:
        at = event.body.rindex(b'"n":') + 4
        received.setdefault(int(event.body[at : event.body.index(b"}", at)]), time.perf_counter())

    sink = Sink(on_event=on_event)
    await sink.start()
    try:
        with rig.postgres() as (dsn, _):
            connection = await rig.install(dsn, endpoints=endpoints, port=sink.port, in_flight=100)
            async with rig.dispatcher(dsn, connection):
                producers = [await asyncpg.connect(dsn) for _ in range(PRODUCERS)]
                await produce(producers, endpoints, min(rate, 200), 2.0, -1_000_000, received)  # connections, caches
                committed, late = await produce(producers, endpoints, rate, seconds, 0, received)
                deadline = time.perf_counter() + 20
                while any(n not in received for n in committed) and time.perf_counter() < deadline:
                    await asyncio.sleep(0.05)
                for producer in producers:
                    await producer.close()
            await connection.close()
    finally:
        await sink.stop()
    missing = [n for n in committed if n not in received]
    assert not missing, f"{len(missing)} events never arrived"
    waits = sorted(max(0.0, received[n] - at) * 1e3 for n, at in committed.items())
    return {
        "scenario": "latency",
        "rate_per_s": rate,
        "events": len(waits),
        "p50_ms": percentile(waits, 0.50),
        "p90_ms": percentile(waits, 0.90),
        "p99_ms": percentile(waits, 0.99),
        "p999_ms": percentile(waits, 0.999),
        "max_ms": waits[-1],
        "producer_late_p99_ms": percentile(sorted(late), 0.99),
    }


async def produce(
    producers: list[Any], endpoints: int, rate: float, seconds: float, first: int, received: dict[int, float]
) -> tuple[dict[int, float], list[float]]:
    """Commit events at Poisson instants; return when each was acknowledged, and how late each began (ms)."""
    rng = random.Random(1)
    committed: dict[int, float] = {}
    late: list[float] = []
    free: asyncio.Queue[Any] = asyncio.Queue()
    for producer in producers:
        free.put_nowait(producer)

    async def commit(producer: Any, n: int, due: float) -> None:
        late.append((time.perf_counter() - due) * 1e3)
        await producer.execute(
            "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ($1, 'message.delivered', $2)",
            f"acct_{n % endpoints}", f'{{"text":"{"x" * 380}","n":{n}}}',
        )  # fmt: skip
        committed[n] = time.perf_counter()
        free.put_nowait(producer)

    began = time.perf_counter()
    at, n = 0.0, first
    async with asyncio.TaskGroup() as tasks:
        while at < seconds:
            at += rng.expovariate(rate)
            wait = began + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(commit(await free.get(), n, began + at))
            n += 1
    return committed, late


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
