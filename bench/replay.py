"""Replay beside fresh events: commit → received of what is new, with and without replays of the same endpoints under way.

Both are measured in turn on one dispatcher, open loop, as in `latency`; the ratio of their percentiles is the figure.
Misleading when: the machine itself is full, because then everything waits for a core; the replays' rate says how much
they add.
"""

import asyncio
import statistics
import time
from typing import Any

import asyncpg

from bench import rig
from bench.latency import PRODUCERS, percentile, produce
from dispatcher.sink import Received, Sink

HISTORY = 200_000  # events that the replays read from; more than they get through


async def run(
    *, rate: float, seconds: float, endpoints: int, replayed: int, replay_rate: float | None, rounds: int, progress: Any
) -> dict[str, Any]:
    """Return p50 and p99 in ms without and with `replayed` endpoints being replayed, and the ratios."""
    received: dict[int, float] = {}
    arrived = 0

    def on_event(event: Received) -> None:
        nonlocal arrived
        arrived += 1
        at = event.body.rindex(b'"n":') + 4
        received.setdefault(int(event.body[at : event.body.index(b"}", at)]), time.perf_counter())

    sink = Sink(on_event=on_event)
    await sink.start()
    alone: dict[str, list[float]] = {"p50": [], "p99": []}
    beside: dict[str, list[float]] = {"p50": [], "p99": []}
    replays_per_s = []
    try:
        with rig.postgres() as (dsn, _):
            connection = await rig.install(dsn, endpoints=endpoints, port=sink.port, in_flight=100)
            await connection.execute("UPDATE webhook.subscription SET since_id = $1", HISTORY)
            await _fill(connection, replayed)
            async with rig.dispatcher(dsn, connection):
                producers = [await asyncpg.connect(dsn) for _ in range(PRODUCERS)]
                await produce(producers, endpoints, min(rate, 200), 2.0, -1_000_000, received)  # connections, caches
                for n in range(rounds):
                    for waits, replaying in ((alone, False), (beside, True)):
                        progress(f"replay: round {n + 1} of {rounds}, {'with' if replaying else 'without'} replays")
                        runs = await _start(connection, replayed, replay_rate) if replaying else []
                        await asyncio.sleep(0.5 if replaying else 0)
                        before, began = arrived, time.perf_counter()
                        first = (2 * n + replaying) * 1_000_000
                        committed, _ = await produce(producers, endpoints, rate, seconds, first, received)
                        if replaying:
                            share = (arrived - before - len(committed)) / (time.perf_counter() - began)
                            replays_per_s.append(share)
                        await connection.execute(
                            "UPDATE webhook.run SET state = 'canceled' WHERE id = ANY ($1::int[])", runs
                        )
                        deadline = time.perf_counter() + 20
                        while any(i not in received for i in committed) and time.perf_counter() < deadline:
                            await asyncio.sleep(0.05)
                        ordered = sorted(max(0.0, received[i] - at) * 1e3 for i, at in committed.items())
                        waits["p50"].append(percentile(ordered, 0.50))
                        waits["p99"].append(percentile(ordered, 0.99))
                        await asyncio.sleep(1)
                for producer in producers:
                    await producer.close()
            await connection.close()
    finally:
        await sink.stop()
    return {
        "scenario": "replay",
        "rate_per_s": rate,
        "replayed_endpoints": replayed,
        "replay_rate_each": "unlimited" if replay_rate is None else f"{replay_rate:g}/s",
        "replays_per_s": _spread(replays_per_s),
        **{f"{p}_ms_alone": _spread(alone[p]) for p in alone},
        **{f"{p}_ms_beside_replays": _spread(beside[p]) for p in beside},
        **{f"{p}_ratio": _spread([b / a for a, b in zip(alone[p], beside[p], strict=True)]) for p in alone},
    }


async def _fill(connection: asyncpg.Connection, accounts: int) -> None:
    await connection.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload) "
        "SELECT 'acct_' || n % $2::int, 'message.delivered', ('{\"text\":\"' || repeat('x', 380) || '\",\"n\":-' || n || '}')::json "
        "FROM generate_series(1, $1::int) AS n",
        HISTORY, accounts, timeout=120,
    )  # fmt: skip


async def _start(connection: asyncpg.Connection, endpoints: int, rate: float | None) -> list[int]:
    async with connection.transaction():
        rows = await connection.fetch(
            "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, rate_per_s, total) "
            "SELECT id, 0, $2, $3, 0 FROM webhook.endpoint ORDER BY id LIMIT $1 RETURNING id",
            endpoints, HISTORY, rate,
        )  # fmt: skip
        runs = [row["id"] for row in rows]
        await connection.execute("INSERT INTO webhook.run_progress (run_id, settled) SELECT unnest($1::int[]), 0", runs)
    return runs


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
