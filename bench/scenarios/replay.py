"""Replay beside fresh events: commit → received of what is new, with and without replays of the same endpoints under way.

Short phases without and with replays in turn, A B A B …, on one dispatcher, open loop. What is compared is all A
against all B, so a slow moment of the disk or the machine, which lasts longer than a phase or hits one at random,
falls on both.
"""

import asyncio
from dataclasses import dataclass
from functools import partial

import asyncpg

from bench import load, rig
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table

ENDPOINTS = 100
RATE = 500.0  # fresh events a second
REPLAY_RATE = 200.0  # deliveries a second of each replay: the default
WITHOUT = "without a replay"


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int  # each with its own ratio
    pairs: int  # of phases a round
    phase_s: float
    replays: tuple[int, ...]  # at once
    history: int  # events that a replay reads from


SIZES = {
    "full": Size(rounds=3, pairs=10, phase_s=2, replays=(1, 5), history=300_000),
    "quick": Size(rounds=1, pairs=2, phase_s=1, replays=(1,), history=20_000),
    "tiny": Size(rounds=1, pairs=1, phase_s=0.3, replays=(1,), history=1_000),
}


async def run(bench: Bench, size: Size) -> Result:
    result = Result()
    for replays in size.replays:
        table = Table(
            f"{RATE:,.0f} fresh events a second, {replays} replay{'s' if replays > 1 else ''} at {REPLAY_RATE:g}/s"
        )
        beside = f"beside {replays} replay{'s' if replays > 1 else ''}"
        pooled = {WITHOUT: Histogram(), beside: Histogram()}
        async with load.arrivals() as arrivals, bench.database() as dsn:
            connection = await rig.install(dsn, endpoints=ENDPOINTS, port=arrivals.sink.port, in_flight=100)
            await connection.execute("UPDATE webhook.subscription SET since_id = $1", size.history)
            await load.bulk(connection, size.history, replays, rows=10_000)
            async with rig.dispatcher(dsn, connection), load.producers(dsn) as producers:
                await rig.passed(connection, size.history)
                await arrivals.all_of(await producers.open_loop(200, 1.0, range(ENDPOINTS)))  # connections, caches
                for n in range(size.rounds):
                    bench.tell(f"replay: {replays} at once, round {n + 1} of {size.rounds}")
                    await _round(table, pooled, beside, connection, arrivals, producers, replays, size)
            await connection.close()
        result.tables.append(table)
        if replays == 1:
            result.goals += table.goal(
                "p99 of fresh events: beside a replay ÷ without", "p99_ms", beside, "≤", 1.2, over=WITHOUT
            )
        lines = {name: histogram.curve() for name, histogram in pooled.items()}
        result.plots.append(
            Plot(f"replay-{replays}", f"Fresh events {beside}, all phases", "one event in …", "ms", lines, log_x=True, log_y=True)
        )  # fmt: skip
    return result


async def _round(
    table: Table, pooled: dict[str, Histogram], beside: str, connection: asyncpg.Connection, arrivals: load.Arrivals,
    producers: load.Producers, replays: int, size: Size,
) -> None:  # fmt: skip

    async def phase(row: str) -> tuple[Histogram, float]:
        """Return how long fresh events took, and how many others came a second."""
        runs = await _start(connection, replays, size.history) if row == beside else []
        await asyncio.sleep(0.3)  # it has begun, or what was under way has ended
        before = arrivals.count
        committed = await producers.open_loop(RATE, size.phase_s, range(ENDPOINTS))
        others = arrivals.count - before
        waits = await arrivals.all_of(committed)
        if runs:
            await connection.execute("UPDATE webhook.run SET state = 'canceled' WHERE id = ANY ($1::int[])", runs)
        return waits, max(0, others - len(committed.at)) / size.phase_s

    waits = {WITHOUT: Histogram(), beside: Histogram()}
    replayed_per_s = dict.fromkeys(waits, 0.0)
    for _ in range(size.pairs):
        for row in waits:
            found, others_per_s = await rig.undisturbed(partial(phase, row))
            waits[row].merge([found])
            replayed_per_s[row] += others_per_s / size.pairs
    for row, histogram in waits.items():
        pooled[row].merge([histogram])
        table.add(
            row,
            events=histogram.total,
            **histogram.figures(),
            replayed_per_s=replayed_per_s[row] if row == beside else 0,
        )


async def _start(connection: asyncpg.Connection, endpoints: int, upto_id: int) -> list[int]:
    async with connection.transaction():
        rows = await connection.fetch(
            "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, rate_per_s, total) "
            "SELECT id, 0, $2, $3, 0 FROM webhook.endpoint ORDER BY id LIMIT $1 RETURNING id",
            endpoints, upto_id, REPLAY_RATE,
        )  # fmt: skip
        runs = [row["id"] for row in rows]
        await connection.execute("INSERT INTO webhook.run_progress (run_id, settled) SELECT unnest($1::int[]), 0", runs)
    return runs


SCENARIO = Scenario(
    "replay",
    shows="What a fresh event feels of replays of the same endpoints that are under way: commit → received without "
    "and beside them.",
    misleads="on a machine that is full everything waits for a core, and the replays' own deliveries are what fills it;"
    " the ratio is of phases a few seconds apart.",
    sizes=SIZES,
    run=run,
)
