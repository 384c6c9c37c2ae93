"""Neighbours: what healthy endpoints notice when 30 % of all are bad, each in one of six ways, against a run in which
those are healthy too.

    hang after accept · SYN dropped · name server silent · TLS handshake hangs · 500 at once · answers after 2 s

Twice: with the bad ones on origins of their own, and with good and bad as paths of one origin, where they share its
connections (there only what HTTP can do: hang, 500, slow). First fresh events at a steady rate, open loop, for
latency; then more than can be delivered, for the rate. And once more, when the bad ones have been so for a minute
longer: their breakers are open then.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench import load, receivers, rig
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table
from dispatcher.sink import Behaviour

HOSTS = 50  # loopback addresses that the endpoints are spread over: as many origins a port
CONNECT_TIMEOUT_S = 5.0
BEHAVIOURS = {"hang": Behaviour(mode="hang"), "fail": Behaviour(status=500), "slow": Behaviour(delay_s=2)}
CLEAN, BAD, ONE_ORIGIN, LATER = "all healthy", "30 % bad", ", one origin", ", a minute later"


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    endpoints: int
    slots: int
    rate: float  # fresh events a second, over all endpoints
    seconds: float
    events: int  # for the rate
    one_origin: bool  # the second run too
    later_s: float  # between a measurement beside bad ones and another


SIZES = {
    "full": Size(
        rounds=3, endpoints=10_000, slots=4_000, rate=1_000, seconds=12, events=100_000, one_origin=True, later_s=60
    ),
    "quick": Size(rounds=1, endpoints=300, slots=240, rate=500, seconds=1, events=5_000, one_origin=True, later_s=0),
    "tiny": Size(rounds=1, endpoints=20, slots=40, rate=100, seconds=0.3, events=100, one_origin=False, later_s=0.2),
}


async def run(bench: Bench, size: Size) -> Result:
    table, bad_ones = Table("The healthy 70 %"), Table("The other 30 %: their attempts until then, by what went wrong")
    pooled: dict[str, Histogram] = {}
    async with _receivers() as places:
        ways: dict[str, Callable[[int], str]] = {CLEAN: places.good, BAD: partial(places.url, own=True)}
        if size.one_origin:
            ways |= {CLEAN + ONE_ORIGIN: places.one, BAD + ONE_ORIGIN: partial(places.url, own=False)}
        for n in range(size.rounds):
            for row, way in ways.items():
                urls = [way(at) for at in range(size.endpoints)]
                bench.tell(f"neighbours: round {n + 1} of {size.rounds}, {row}")
                await _measure(bench, table, bad_ones, pooled, row, urls, places, size)
    goals = []
    for where, later in ((where, later) for later in ("", LATER) for where in ("", ONE_ORIGIN)):
        bad, clean, where = BAD + where + later, CLEAN + where, where + later
        goals += table.goal(f"healthy neighbours' rate ÷ clean run{where}", "rate_per_s", bad, "≥", 0.9, over=clean)
        goals += table.goal(f"healthy neighbours' p99 ÷ clean run{where}", "p99_ms", bad, "≤", 1.5, over=clean)
    lines = {row: histogram.curve() for row, histogram in pooled.items()}
    plot = Plot(
        "neighbours", "Healthy endpoints beside bad ones", "one event in …", "ms", lines, log_x=True, log_y=True
    )
    return Result([table, bad_ones], goals, [plot])


async def _measure(
    bench: Bench, table: Table, bad_ones: Table, pooled: dict[str, Histogram], row: str, urls: Sequence[str], places: "_Places", size: Size
) -> None:  # fmt: skip
    arrivals = places.arrivals
    arrivals.at.clear()
    async with bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=size.endpoints, port=0, in_flight=100, urls=urls)
        settings = {
            "slots": size.slots,
            "sockets_max": size.slots + 1_000,
            "connect_timeout_s": CONNECT_TIMEOUT_S,
            "grace_s": 0,  # who hangs isn't waited for
            "allow_http": True,
        }
        async with (
            rig.dispatcher(dsn, connection, dns_port=places.dns_port, **settings) as running,
            load.producers(dsn) as producers,
        ):
            # Everybody gets something, twice, so that whoever is bad is known to be before it counts. Arrivals are random: a twentieth more, or
            # the last hundred would have been tried once less.
            for _ in range(2):
                await _fresh(producers, arrivals, size, 1.05 * size.endpoints / size.rate)

            await _measure_now(table, pooled, row, running, producers, arrivals, size)
            faults = await connection.fetch(
                "SELECT coalesce(fault, 'delivered') AS fault, count(*) FROM webhook.attempt "
                "JOIN webhook.endpoint AS e ON e.id = endpoint_id WHERE e.url NOT LIKE '%/good/%' GROUP BY 1 ORDER BY 1"
            )
            if faults:
                bad_ones.add(row, **{record["fault"]: record["count"] for record in faults})
                if size.later_s:
                    await _fresh(producers, arrivals, size, size.later_s)
                    await _measure_now(table, pooled, row + LATER, running, producers, arrivals, size)
        connection.terminate()


async def _fresh(
    producers: load.Producers, arrivals: load.Arrivals, size: Size, seconds: float
) -> tuple[Histogram, float | None]:
    """Send to everybody at the steady rate; return how long healthy ones waited, and how long somebody waited for a core meanwhile."""
    everybody = _shuffled(size.endpoints)
    waiting = rig.CoreWaits()
    committed = await producers.open_loop(size.rate, seconds, everybody)
    waited = waiting.share()
    good = {n: at for n, at in committed.at.items() if not is_bad(everybody[n % len(everybody)])}
    return await arrivals.all_of(load.Committed(good)), waited


async def _measure_now(
    table: Table, pooled: dict[str, Histogram], row: str, running: rig.Running, producers: load.Producers, arrivals: load.Arrivals, size: Size
) -> None:  # fmt: skip
    waits, waits_for_a_core = await rig.undisturbed(partial(_fresh, producers, arrivals, size, size.seconds))
    pooled.setdefault(row, Histogram()).merge([waits])
    own_s, sink_s, began = running.cpu_s(), time.process_time(), time.perf_counter()
    numbers: list[int] = []
    for _ in range(0, size.events, load.BULK_ROWS):
        numbers += (await producers.burst(min(load.BULK_ROWS, size.events), size.endpoints))[0]
    wanted = load.Committed(dict.fromkeys((n for n in numbers if not is_bad(n % size.endpoints)), began))
    took_s = (await arrivals.all_of(wanted)).max_us / 1e6
    own_s, sink_share = running.cpu_s() - own_s, (time.process_time() - sink_s) / took_s
    table.add(
        row,
        endpoints=sum(not is_bad(at) for at in range(size.endpoints)),
        **waits.figures(),
        waits_for_a_core=waits_for_a_core,
        rate_per_s=len(wanted.at) / took_s,
        cpu_us=own_s / len(wanted.at) * 1e6,
        sink_share=sink_share,
        rss_mb=running.rss_mb(),
    )
    table.check_sink(row, sink_share)


def is_bad(at: int) -> bool:
    return at % 10 in (3, 6, 9)


def _shuffled(count: int) -> list[int]:
    """Every endpoint once, neighbours far apart: no run of bad ones."""
    step = next(step for step in range(round(count * 0.618), count + 1) if _coprime(step, count))
    return [at * step % count for at in range(count)]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


@dataclass(frozen=True, slots=True)
class _Places:
    """Where endpoints are. The n-th bad one is bad in the n-th way."""

    arrivals: load.Arrivals
    syn_port: int
    tls_port: int
    dns_port: int

    def good(self, at: int) -> str:
        return f"http://127.0.1.{1 + at % HOSTS}:{self.arrivals.sink.port}/good/{at}"

    def one(self, at: int) -> str:
        return f"http://127.0.0.1:{self.arrivals.sink.port}/good/{at}"

    def url(self, at: int, *, own: bool) -> str:
        if not is_bad(at):
            return self.good(at) if own else self.one(at)
        host, port = f"127.0.2.{1 + at % HOSTS}", self.arrivals.sink.port
        if not own:
            return f"http://127.0.0.1:{port}/{tuple(BEHAVIOURS)[at // 3 % len(BEHAVIOURS)]}"
        ways = (
            *(f"http://{host}:{port}/{name}" for name in BEHAVIOURS),
            f"http://{host}:{self.syn_port}/",
            f"https://{host}:{self.tls_port}/",
            f"https://e{at % HOSTS}.silent.test:{port}/",
        )
        return ways[at // 3 % len(ways)]


@contextlib.asynccontextmanager
async def _receivers() -> AsyncIterator[_Places]:
    slow = [(f"/{name}", behaviour) for name, behaviour in BEHAVIOURS.items()]
    with receivers.syn_dropped() as syn_port, receivers.dns_hanging() as dns_port:
        async with receivers.tls_hanging() as tls_port, load.arrivals(host="0.0.0.0", slow=slow) as arrivals:
            yield _Places(arrivals, syn_port, tls_port, dns_port)


SCENARIO = Scenario(
    "neighbours",
    shows="What the healthy 70 % of the endpoints notice of 30 % that hang, drop SYNs, have a silent name server, "
    "hang in the handshake, fail or take 2 s; and once more, when these have been so for a minute longer and breakers are open.",
    misleads="the bad ones get their events too, so beside them there is more to do for each healthy delivery; the "
    "healthy share 50 addresses, fewer origins than in life; the receiver, in one process with the producers, "
    "is a part of every wait, and its share of a core tells whether it was the limit of the rate.",
    sizes=SIZES,
    run=run,
)
