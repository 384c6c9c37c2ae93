"""Producers: what the doorbell costs those who commit, beside no trigger, an empty one, and one that always notifies.

A closed loop of single-row commits in a process of its own. A dispatcher reads the log all the while. Where nothing rings it polls each
millisecond, the pace of one that is rung often and has disarmed the doorbell, so that it does the same work in all four.
"""

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import asyncpg

from bench import rig
from bench.rig import Bench
from bench.scenario import Result, Scenario, Table

PROCESS_SHARE_MAX = 0.9  # of a core: above, the producers' own process was the limit

EMPTY = "CREATE FUNCTION webhook.bench_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"
ALWAYS = (
    "CREATE FUNCTION webhook.bench_trigger() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN PERFORM pg_notify('webhook_doorbell', ''); RETURN NULL; END $$"
)
TRIGGERS: dict[str, str | None] = {
    "no trigger": None,
    "an empty trigger": EMPTY,
    "the doorbell": None,
    "NOTIFY always": ALWAYS,
}


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    producers: tuple[int, ...]
    triggers: tuple[str, ...]
    seconds: float  # of each


SIZES = {
    "full": Size(rounds=9, producers=(1, 16, 64), triggers=tuple(TRIGGERS), seconds=2),
    "quick": Size(rounds=1, producers=(16,), triggers=("an empty trigger", "the doorbell"), seconds=1),
    "tiny": Size(rounds=1, producers=(2,), triggers=("NOTIFY always",), seconds=0.2),
}


async def run(bench: Bench, size: Size) -> Result:
    tables = {count: Table(f"{count} producer{'s' if count > 1 else ''}") for count in size.producers}
    for n in range(size.rounds):
        for name in size.triggers:
            bench.tell(f"producers: round {n + 1} of {size.rounds}, {name}")
            async with bench.database() as dsn:
                rings = "on" if name in ("the doorbell", "NOTIFY always") else "off"
                connection = await rig.install(dsn, endpoints=1, port=1_024, in_flight=1, doorbell=rings)
                await _set_trigger(connection, name)
                async with rig.dispatcher(dsn, connection, doorbell=rings, poll_ms=1) as running:
                    for count, table in tables.items():
                        await _measure(bench, table, name, dsn, count, size.seconds, running)
                await connection.close()
    goals = []
    for table in tables.values():
        what = f"{table.title}: commits with the doorbell ÷ with an empty trigger"
        goals += table.goal(what, "commits_per_s", "the doorbell", "≥", 0.95, over="an empty trigger")
    return Result(list(tables.values()), goals)


async def _set_trigger(connection: asyncpg.Connection, name: str) -> None:
    if (function := TRIGGERS[name]) is not None:
        await connection.execute("DROP TRIGGER IF EXISTS outbox_doorbell ON webhook.outbox")
        await connection.execute(function)
        await connection.execute(
            "CREATE TRIGGER outbox_doorbell AFTER INSERT ON webhook.outbox FOR EACH STATEMENT EXECUTE FUNCTION webhook.bench_trigger()"
        )


async def _measure(
    bench: Bench, table: Table, row: str, dsn: str, count: int, seconds: float, running: rig.Running
) -> None:
    async def measure() -> tuple[dict[str, Any], float | None, float]:
        postgres_s, own_s = bench.postgres_cpu_s(), running.cpu_s()
        process = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "bench.load", dsn, str(count), str(seconds)],
            capture_output=True, check=True, text=True, timeout=120,
        )  # fmt: skip
        postgres_s = None if postgres_s is None else (bench.postgres_cpu_s() or 0) - postgres_s
        return json.loads(process.stdout), postgres_s, running.cpu_s() - own_s

    told, postgres_s, own_s = await rig.undisturbed(measure)
    commits = told["commits"]
    table.add(
        row,
        commits_per_s=commits / told["wall_s"],
        postgres_cpu_us=None if postgres_s is None else postgres_s / commits * 1e6,
        dispatcher_cpu_us=own_s / commits * 1e6,
        producers_share=told["cpu_s"] / told["wall_s"],
    )
    if told["cpu_s"] / told["wall_s"] >= PROCESS_SHARE_MAX:
        table.void[row] = "the producers' own process was the limit"


SCENARIO = Scenario(
    "producers",
    shows="How many single-row commits a second 1, 16 and 64 producers make with the doorbell, beside no trigger, an"
    " empty one, and NOTIFY at every commit.",
    misleads="on a slow disk the flush hides the trigger; events are for nobody, so the dispatcher only reads; the "
    "producers are one Python process, void where that was the limit. What partition maintenance costs them is"
    " in maintenance.",
    sizes=SIZES,
    run=run,
)
