"""Soak: a steady load for as long as you like, and what drifts: memory, descriptors, latency, rate."""

import time
from dataclasses import dataclass

from bench import load, rig
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table

ENDPOINTS = 100
RATE = 1_000.0


@dataclass(frozen=True, slots=True)
class Size:
    minutes: float
    slice_s: float


SIZES = {
    "full": Size(minutes=3, slice_s=5),
    "quick": Size(minutes=0.1, slice_s=1),
    "tiny": Size(minutes=0.01, slice_s=0.2),
}


async def run(bench: Bench, size: Size) -> Result:
    table = Table("The first fifth of the time and the last")
    drift: dict[str, list[tuple[float, float]]] = {"resident memory, MB": [], "descriptors": [], "p99, ms": []}
    rows: list[dict[str, float]] = []
    async with load.arrivals() as arrivals, bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=ENDPOINTS, port=arrivals.sink.port, in_flight=100)
        async with rig.dispatcher(dsn, connection) as running, load.producers(dsn) as producers:
            await arrivals.all_of(await producers.open_loop(RATE, min(2.0, size.slice_s), range(ENDPOINTS)))
            began = time.perf_counter()
            while not rows or time.perf_counter() - began < size.minutes * 60:
                bench.tell(f"soak: {(time.perf_counter() - began) / 60:.1f} of {size.minutes:g} minutes")
                arrivals.at.clear()
                slice_began, cpu_s = time.perf_counter(), running.cpu_s()
                waits = await arrivals.all_of(await producers.open_loop(RATE, size.slice_s, range(ENDPOINTS)))
                seconds = time.perf_counter() - slice_began
                rows.append(
                    {
                        "rate_per_s": waits.total / seconds,
                        "p50_ms": waits.percentile_ms(0.5),
                        "p99_ms": waits.percentile_ms(0.99),
                        "cpu_us": (running.cpu_s() - cpu_s) / waits.total * 1e6,
                        "rss_mb": running.rss_mb(),
                        "descriptors": (descriptors := rig.descriptors(running.pid)),
                        "own_descriptors": descriptors - arrivals.sink.connections,
                    }
                )
                minute = (time.perf_counter() - began) / 60
                for name, figure in zip(drift, ("rss_mb", "descriptors", "p99_ms"), strict=True):
                    drift[name].append((minute, rows[-1][figure]))
        await connection.close()
    fifth = max(1, len(rows) // 5)
    for row, slices in (("first fifth", rows[:fifth]), ("last fifth", rows[-fifth:])):
        for figures in slices:
            table.add(row, **figures)
    goals = [
        *table.goal("memory: last fifth ÷ first", "rss_mb", "last fifth", "≤", 1.1, over="first fifth"),
        *table.goal(
            "descriptors but those to receivers: last fifth ÷ first",
            "own_descriptors",
            "last fifth",
            "≤",
            1.1,
            over="first fifth",
        ),
    ]
    return Result([table], goals, [Plot("soak", "A steady load", "minutes", "", drift)])


SCENARIO = Scenario(
    "soak",
    shows="Whether memory, descriptors, latency or rate drift under 1,000 events a second for --minutes N.",
    misleads="connections to receivers come and go with the load, so only other descriptors are compared; minutes show a leak per delivery, not "
    "one per day; partitions change and retention begins after hours.",
    sizes=SIZES,
    run=run,
)
