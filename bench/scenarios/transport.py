"""Transport: what a POST costs with our thin client, with aiohttp behind the same port, and with aiohttp as it is used plainly.

Each client is alone in a process of its own (`bench.clients`). What the whole dispatcher costs with either is in `throughput`.
"""

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass

from bench import rig
from bench.clients import BODY_BYTES
from bench.rig import Bench
from bench.scenario import Result, Scenario, Table

NAMES = {"thin": "thin", "aiohttp": "aiohttp behind the port", "plain": "plain ClientSession"}


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    posts: int
    in_flight: int


SIZES = {
    "full": Size(rounds=5, posts=30_000, in_flight=1_000),
    "quick": Size(rounds=1, posts=5_000, in_flight=500),
    "tiny": Size(rounds=1, posts=200, in_flight=10),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table("A POST by each client")
    with rig.sink(bench.sink_kind) as (port, sink_pid):
        for n in range(size.rounds):
            for kind, row in NAMES.items():
                bench.tell(f"transport: round {n + 1} of {size.rounds}, {row}")
                before = rig.cpu_s(sink_pid, with_children=True)
                used = await asyncio.to_thread(_client, kind, port, size.in_flight, size.posts)
                sink_s = rig.cpu_s(sink_pid, with_children=True) - before
                table.add(
                    row,
                    cpu_us=used.cpu_s / used.posts * 1e6,
                    rate_per_s=used.posts / used.wall_s,
                    sink_share=sink_s / used.wall_s,
                )
                table.check_sink(row, sink_s / used.wall_s)
    goals = table.goal(
        "CPU of a POST: aiohttp ÷ thin", "cpu_us", NAMES["aiohttp"], "≥", 2.5, over=NAMES["thin"], out_for=4
    )
    return Result([table], goals)


def _client(kind: str, port: int, connections: int, posts: int) -> rig.Posted:
    out = subprocess.run(
        [sys.executable, "-m", "bench.clients", kind, *map(str, (port, connections, posts, BODY_BYTES))],
        stdout=subprocess.PIPE, check=True, text=True, timeout=600,
    )  # fmt: skip
    return rig.Posted(**json.loads(out.stdout))


SCENARIO = Scenario(
    "transport",
    shows="What one POST costs the client with the thin transport, with aiohttp behind the same port, and with a "
    "plain ClientSession.",
    misleads="a sink that is the limit lets the fastest client wake up for fewer answers at a time, and look dearer "
    "than it is.",
    sizes=SIZES,
    run=run,
)
