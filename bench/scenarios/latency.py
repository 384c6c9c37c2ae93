"""Latency: from the acknowledgement of a producer's commit to the receiver having the whole request, open loop; and a
burst from idle."""

import asyncio
from dataclasses import dataclass

from bench import load, rig, usual
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table

ENDPOINTS = 100
USUAL_RATE_MAX = 1_000.0  # it's there to compare with, not to be brought down


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    rates: tuple[float, ...]  # events a second
    seconds: float  # each rate, each round
    burst: int


SIZES = {
    "full": Size(rounds=3, rates=(1.0, 100.0, 1_000.0, 5_000.0), seconds=15, burst=50_000),
    "quick": Size(rounds=1, rates=(100.0, 1_000.0), seconds=2, burst=10_000),
    "tiny": Size(rounds=1, rates=(200.0,), seconds=0.3, burst=300),
}


async def run(bench: Bench, size: Size) -> Result:
    rates, bursts = Table("Commit → received"), Table(f"A burst of {size.burst:,} events in one commit, from idle")
    pooled: dict[str, Histogram] = {}
    for n in range(size.rounds):
        told = f"latency: round {n + 1} of {size.rounds}"
        async with load.arrivals() as arrivals, bench.database() as dsn:
            connection = await rig.install(dsn, endpoints=ENDPOINTS, port=arrivals.sink.port, in_flight=100)
            async with rig.dispatcher(dsn, connection), load.producers(dsn) as producers:
                for rate in size.rates:
                    bench.tell(f"{told}, {rate:g} a second")
                    await _rate(rates, pooled, f"dispatcher, {rate:,g}/s", arrivals, producers, rate, size.seconds)
                bench.tell(f"{told}, a burst")
                await _burst(bursts, arrivals, producers, size.burst)
            await connection.close()
        async with load.arrivals() as arrivals, bench.database() as dsn:
            urls = [f"http://127.0.0.1:{arrivals.sink.port}/hook/{at}" for at in range(ENDPOINTS)]
            connection = await usual.install(dsn, urls)
            async with (
                rig.watched("bench.usual", dsn, "batched", "1000", env={}),
                load.producers(dsn, usual.QUEUE) as producers,
            ):
                for rate in (rate for rate in size.rates if rate <= USUAL_RATE_MAX):
                    bench.tell(f"{told}, the usual way, {rate:g} a second")
                    await _rate(
                        rates,
                        pooled,
                        f"the usual way, batched, {rate:,g}/s",
                        arrivals,
                        producers,
                        rate,
                        size.seconds,
                    )
            await connection.close()
    goals = [
        *rates.goal("p50 at 1,000/s, ms", "p50_ms", "dispatcher, 1,000/s", "≤", 1),
        *rates.goal("p99 at 1,000/s, ms", "p99_ms", "dispatcher, 1,000/s", "≤", 3),
        *rates.goal("p99 at 5,000/s, ms", "p99_ms", "dispatcher, 5,000/s", "≤", 10),
    ]
    lines = {name: histogram.curve() for name, histogram in pooled.items()}
    plot = Plot("latency", "Commit → received, all rounds", "one event in …", "ms", lines, log_x=True, log_y=True)
    return Result([rates, bursts], goals, [plot])


async def _rate(
    table: Table, pooled: dict[str, Histogram], row: str, arrivals: load.Arrivals, producers: load.Producers, rate: float, seconds: float
) -> None:  # fmt: skip
    accounts = range(ENDPOINTS)
    warmed = await producers.open_loop(min(rate, 200), min(1.0, seconds), accounts)  # connections, caches
    await arrivals.all_of(warmed)

    async def measure() -> tuple[load.Committed, Histogram]:
        committed = await producers.open_loop(rate, seconds, accounts)
        while not committed.at:  # at one a second there may be none in a short time
            committed = await producers.open_loop(rate, seconds, accounts)
        return committed, await arrivals.all_of(committed)

    committed, waits = await rig.undisturbed(measure)
    pooled.setdefault(row, Histogram()).merge([waits])
    table.add(row, events=waits.total, **waits.figures(), producer_late_p99_ms=committed.late.percentile_ms(0.99))


async def _burst(table: Table, arrivals: load.Arrivals, producers: load.Producers, events: int) -> None:
    await asyncio.sleep(0.5)  # the dispatcher sleeps
    numbers, acknowledged = await producers.burst(events, ENDPOINTS)
    waits = await arrivals.all_of(load.Committed(dict.fromkeys(numbers, acknowledged)))
    last_s = waits.max_us / 1e6
    first_ms = (min(arrivals.at[n] for n in numbers) - acknowledged) * 1e3
    table.add(
        "dispatcher", first_ms=first_ms, half_ms=waits.percentile_ms(0.5), last_ms=last_s * 1e3,
        rate_per_s=events / last_s if last_s else 0,
    )  # fmt: skip


SCENARIO = Scenario(
    "latency",
    shows="How long after its commit was acknowledged an event is at the receiver, at steady rates (Poisson "
    "arrivals, open loop) and after a burst.",
    misleads="producer and receiver share one process, and its loop's own lateness counts; above 1,000 a second a "
    "commit holds several events; at 1 a second there are too few events for the far percentiles; the usual "
    "way is told of nothing and looks every 20 ms, which is its p50.",
    sizes=SIZES,
    run=run,
)
