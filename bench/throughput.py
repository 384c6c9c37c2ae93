"""Throughput: what a delivery costs, beside what the barest client costs per POST against the same sink, in the same run.

The dispatcher runs idle; then events are committed in statements of 500 rows, faster than they can be delivered, and the clock runs until the
checkpoint has passed the last one. CPU time is the dispatcher process's own, from the first insert to that moment.
Misleading when: the sink or PostgreSQL, which share the two cores, are the limit of the *rate*; the ratio of CPU times stands all the same.
"""

import asyncio
import statistics
import time
from typing import Any

from bench import rig

PAYLOAD_BYTES = 400  # about 0.5 kB with the envelope


async def run(*, rounds: int, events: int, endpoints: int, in_flight: int, kind: str, progress: Any) -> dict[str, Any]:
    """Return medians, minima and maxima over `rounds`."""
    made = []
    with rig.postgres() as (dsn, postmaster), rig.sink(kind) as (port, sink_pid):
        for n in range(rounds):
            progress(f"throughput: round {n + 1} of {rounds}, ceiling")
            bare = await asyncio.to_thread(rig.ceiling, port, min(in_flight, 1_000), events, 470)
            progress(f"throughput: round {n + 1} of {rounds}, dispatcher")
            made.append(await _round(dsn, postmaster, port, sink_pid, events, endpoints, in_flight, bare))
    summary = {key: _spread([one[key] for one in made]) for key in made[0]}
    return {
        "scenario": "throughput",
        "endpoints": endpoints,
        "in_flight": in_flight,
        "events": events,
        "sink": kind,
        **summary,
    }


async def _round(
    dsn: str, postmaster: int, port: int, sink_pid: int, events: int, endpoints: int, in_flight: int, bare: dict[str, float]
) -> dict[str, float]:  # fmt: skip
    connection = await rig.install(dsn, endpoints=endpoints, port=port, in_flight=max(1, in_flight // endpoints))
    try:
        async with rig.dispatcher(dsn, connection, slots=in_flight) as pid:
            await warm_up(connection, endpoints)
            before = rig.cpu_s(pid), rig.cpu_s(postmaster, with_children=True), rig.cpu_s(sink_pid, with_children=True)
            stats = await _tuple_stats(connection)
            wal = await connection.fetchval("SELECT pg_current_wal_lsn()::text")
            began = time.perf_counter()
            last = await produce(connection, events, endpoints)
            produced = time.perf_counter() - began
            await passed(connection, last)
            wall = time.perf_counter() - began
            after = rig.cpu_s(pid), rig.cpu_s(postmaster, with_children=True), rig.cpu_s(sink_pid, with_children=True)
            rss = rig.rss_bytes(pid)
            recorded = await connection.fetchval("SELECT count(*) FROM webhook.attempt WHERE fault IS NULL")
            assert recorded >= events, (recorded, events)
            dead = await _tuple_stats(connection) - stats
            wal_bytes = float(
                await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), $1::text::pg_lsn)", wal)
            )
    finally:
        await connection.close()
    used = [b - a for a, b in zip(before, after, strict=True)]
    bare_us, own_us = bare["cpu_s"] / bare["posts"] * 1e6, used[0] / events * 1e6
    return {
        "rate_per_s": events / wall,
        "bare_rate_per_s": bare["posts"] / bare["wall_s"],
        "dispatcher_cpu_us": own_us,
        "bare_cpu_us": bare_us,
        "ratio": bare_us / own_us,
        "postgres_cpu_us": used[1] / events * 1e6,
        "sink_cpu_us": used[2] / events * 1e6,
        "dispatcher_cpu_share": used[0] / wall,
        "sink_cpu_share": used[2] / wall,
        "produce_s": produced,
        "wal_bytes_per_event": wal_bytes / events,
        "updated_or_deleted_rows": float(dead),
        "rss_mb": rss / 1e6,
    }


async def warm_up(connection: Any, endpoints: int) -> None:
    """Open connections and let the lanes find their limits."""
    await passed(connection, await produce(connection, max(20_000, endpoints * 20), endpoints))


async def produce(connection: Any, events: int, endpoints: int) -> int:
    """Insert `events` in statements of 500 rows, spread over the accounts; return the last id."""
    last = 0
    for at in range(0, events, 500):
        last = await connection.fetchval(
            "WITH made AS (INSERT INTO webhook.outbox (account_id, type, payload) "
            "SELECT 'acct_' || (n % $1::integer), 'message.delivered', $2::text::json FROM generate_series($3::integer, $4::integer) AS n "
            "RETURNING id) SELECT max(id) FROM made",
            endpoints, '{"text":"' + "x" * (PAYLOAD_BYTES - 11) + '"}', at, min(events, at + 500) - 1,
        )  # fmt: skip
    return last


async def passed(connection: Any, last: int) -> None:
    """Wait until every event up to `last` has its attempt row."""
    while True:
        row = await connection.fetchrow("SELECT position, isempty(gaps) AS whole FROM webhook.checkpoint")
        if (
            row["position"] >= last
            and row["whole"]
            and not await connection.fetchval("SELECT count(*) FROM webhook.lane")
        ):
            return
        await asyncio.sleep(0.02)


async def _tuple_stats(connection: Any) -> int:
    """Return rows updated or deleted so far in schema webhook, but for the checkpoint."""
    await connection.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
    changed: int = await connection.fetchval(
        "SELECT coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_user_tables "
        "WHERE schemaname = 'webhook' AND relname <> 'checkpoint'"
    )
    return changed


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
