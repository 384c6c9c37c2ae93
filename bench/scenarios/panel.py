"""Panel under load: commit → received, with and without people who look: 50 page loads a second and 200 live streams beside steady deliveries.

Short phases without visitors, with them, and with visitors of a `dispatcher web` beside it, in turn, on one dispatcher, open loop; what is
compared is all of a kind. The third says what of the second is the machine's: the same pages and streams, but none of it in the deliveries'
process. Where it is allowed, the first two once more with producers, PostgreSQL (but for the panel's sessions), dispatcher and receiver
scheduled before everybody else: then no delivery waits for a core that somebody else has, and what is left is what the panel's own work in
the loop costs. Visitors are a process of their own (`main`), each of their loads due at its instant, whether or not earlier ones have been
answered. It says "ready" when all streams are open, and when its stdin ends, as JSON, what was seen.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import asyncpg
import uvloop

from bench import load, rig
from bench.histogram import Histogram
from bench.rig import Bench
from bench.scenario import Plot, Result, Scenario, Table
from bench.spawn import spawn
from dispatcher.domain.principal import OPERATOR
from dispatcher.store import access
from dispatcher.store.pool import NAME as PANELS_SESSIONS

RATE = 500.0  # events a second
WITHOUT, WITH, APART = "without visitors", "with visitors", "with visitors of a `dispatcher web` beside it"
JOINED_S = 1.0  # after the last stream was opened: a hundred people who come at one instant are no steady state
FIRST_WITHOUT, FIRST_WITH = "without visitors, deliveries run first", "with visitors, deliveries run first"
READY_S, ANSWER_S = 60.0, 30.0
ANSWERS_KEPT = 100_000
VISITORS = "from bench.scenarios.panel import main; main()"


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int  # each with its own ratio
    pairs: int  # of phases a round
    phase_s: float
    pages_per_s: float
    streams: int
    endpoints: tuple[int, ...]
    history: int  # events that were delivered before, for the pages to show


SIZES = {
    "full": Size(rounds=3, pairs=4, phase_s=3, pages_per_s=50, streams=200, endpoints=(100, 10_000), history=300_000),
    "quick": Size(rounds=1, pairs=1, phase_s=1, pages_per_s=20, streams=40, endpoints=(100,), history=5_000),
    "tiny": Size(rounds=1, pairs=1, phase_s=0.3, pages_per_s=10, streams=5, endpoints=(10,), history=200),
}


async def run(bench: Bench, size: Size) -> Result:
    result = Result()
    for endpoints in size.endpoints:
        await _variant(bench, result, size, endpoints)
    return result


async def _variant(bench: Bench, result: Result, size: Size, endpoints: int) -> None:
    many = f"{endpoints:,} endpoints"
    table = Table(
        f"{RATE:,.0f} events a second to {many}; visitors: {size.pages_per_s:g} pages a second, {size.streams} live streams"
    )
    seen = Table(f"What visitors see, {many}")
    pooled: dict[str, Histogram] = {}
    pages: dict[str, Histogram] = {}
    ports = {WITH: rig.free_port(), APART: rig.free_port()}
    async with load.arrivals() as arrivals, bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=endpoints, port=arrivals.sink.port, in_flight=100)
        _, key = await access.create_key(connection, OPERATOR, account_id=None, name="bench")
        async with (
            rig.dispatcher(dsn, connection, web_listen=f"127.0.0.1:{ports[WITH]}") as running,
            rig.web(dsn, ports[APART]),
            load.producers(dsn) as producers,
        ):
            for port in ports.values():
                await asyncio.to_thread(rig.await_port, port)
            bench.tell(f"panel: {size.history:,} events of the past to {many}")
            await rig.passed(connection, await load.bulk(connection, size.history, endpoints))
            await arrivals.all_of(await producers.open_loop(200, 1.0, range(endpoints)))  # connections, caches
            for port in ports.values():  # the first visitors, of whom nothing is told
                async with _visitors(port, key, size, endpoints):
                    await asyncio.sleep(min(2.0, size.phase_s))

            async def phase(row: str) -> _Phase:
                port = ports.get(WITH if row == FIRST_WITH else row)
                with contextlib.ExitStack() as scheduled:
                    async with _visitors(port, key, size, endpoints) as looked:
                        if row in (FIRST_WITHOUT, FIRST_WITH):
                            scheduled.enter_context(rig.first(await _delivering(connection, running)))
                        cpu_s, waiting = running.cpu_s(), rig.CoreWaits()
                        committed = await producers.open_loop(RATE, size.phase_s, range(endpoints))
                        cpu_s, waited = running.cpu_s() - cpu_s, waiting.share()
                        waits = await arrivals.all_of(committed)
                return _Phase(waits, cpu_s, waited, looked)

            rows = [WITHOUT, WITH, APART] + (
                [FIRST_WITHOUT, FIRST_WITH] if await _may_run_first(bench, connection, running) else []
            )
            for n in range(size.rounds):
                bench.tell(f"panel: {many}, round {n + 1} of {size.rounds}")
                phases: dict[str, list[_Phase]] = {row: [] for row in rows}
                for _ in range(size.pairs):
                    for row in rows:
                        phases[row].append(await rig.undisturbed(partial(phase, row)))
                for row, done in phases.items():
                    waits = Histogram()
                    waits.merge([one.waits for one in done])
                    pooled.setdefault(row, Histogram()).merge([waits])
                    table.add(
                        row, events=waits.total, **waits.figures(), cpu_share=sum(one.cpu_s for one in done) / (size.pairs * size.phase_s),
                        waits_for_a_core=_mean([one.waited for one in done]),
                        failed_pages=sum(one.looked.failed for one in done) if row == WITH else None,
                    )  # fmt: skip
                    for one in done if row == WITH else ():
                        for page, times_us in one.looked.pages.items():
                            for time_us in times_us:
                                pages.setdefault(page, Histogram()).add(time_us)
        await connection.close()
    for page, histogram in sorted(pages.items()):
        seen.add(page, loads=histogram.total, **histogram.figures())
    result.tables += [table, seen]
    result.goals += [
        *table.goal(f"p99 of deliveries: with visitors ÷ without, {many}", "p99_ms", WITH, "≤", 1.2, over=WITHOUT),
        *table.goal(
            f"p99 of deliveries: with visitors ÷ with visitors of another process, {many}",
            "p99_ms",
            WITH,
            "≤",
            1.2,
            over=APART,
        ),
        *table.goal(
            f"p99 of deliveries where they run first: with visitors ÷ without, {many}",
            "p99_ms",
            FIRST_WITH,
            "≤",
            1.2,
            over=FIRST_WITHOUT,
        ),
        *table.goal(f"pages that failed, {many}", "failed_pages", WITH, "≤", 0),
    ]
    for page in pages:
        result.goals += seen.goal(f"{page}: median of its time, ms, {many}", "p50_ms", page, "≤", 100)
    lines = {name: histogram.curve() for name, histogram in pooled.items()}
    result.plots.append(
        Plot(
            f"panel-{endpoints}",
            f"Deliveries beside visitors, {many}",
            "one event in …",
            "ms",
            lines,
            log_x=True,
            log_y=True,
        )
    )


@dataclass(frozen=True, slots=True)
class _Phase:
    waits: Histogram
    cpu_s: float
    waited: float | None  # the share of the time in which somebody waited for a core
    looked: "Looked"


async def _delivering(connection: asyncpg.Connection, running: rig.Running) -> list[int]:
    """Return the processes by which an event goes: our own, the dispatcher's, and PostgreSQL's without the panel's sessions."""
    rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE application_name <> $1", PANELS_SESSIONS)
    return [os.getpid(), running.pid, *(row["pid"] for row in rows)]


async def _may_run_first(bench: Bench, connection: asyncpg.Connection, running: rig.Running) -> bool:
    if not bench.is_server_here or (os.cpu_count() or 1) < 2:
        return False
    try:
        with rig.first(await _delivering(connection, running)):
            return True
    except PermissionError:
        return False


def _mean(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


# ── visitors ──


@dataclass(slots=True)
class Looked:
    """What the visitors of a phase saw: how long each page took, in µs."""

    pages: dict[str, list[float]] = field(default_factory=dict)
    failed: int = 0


@contextlib.asynccontextmanager
async def _visitors(port: int | None, key: str, size: Size, endpoints: int) -> AsyncIterator[Looked]:
    """Have visitors of that port look for as long as this is entered, or nobody. Wait for as long before it in either case."""
    looked = Looked()
    if port is None:
        await asyncio.sleep(min(JOINED_S, size.phase_s))
        yield looked
        return
    process = await spawn(
        sys.executable, "-c", VISITORS, f"http://127.0.0.1:{port}", key, str(size.pages_per_s), str(size.streams), str(endpoints),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            ready = await process.stdout.readline()
        assert ready == b"ready\n", f"the visitors did not get in: {ready!r}"
        await asyncio.sleep(min(JOINED_S, size.phase_s))
        yield looked
        process.stdin.close()
        async with asyncio.timeout(READY_S):
            said = json.loads(await process.stdout.readline())
            await process.wait()
        looked.pages, looked.failed = said["pages"], said["failed"]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def visit(url: str, key: str, pages_per_s: float, streams: int, endpoints: int) -> dict[str, Any]:
    """Look at pages, in turn, and keep streams open, until stdin ends."""
    pages = {
        "/overview": "/overview", "/endpoints": "/endpoints", "/endpoints/N": "/endpoints/{n}", "/endpoints/N/setup": "/endpoints/{n}/setup",
        "/catalogue": "/catalogue", "/api/v1/deliveries": "/api/v1/deliveries?endpoint_id={n}", "/api/v1/events": "/api/v1/events?limit=50",
    }  # fmt: skip
    looked = Looked()
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)  # its end is what can be read of it
    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    )

    async def page(n: int) -> None:
        name = list(pages)[n % len(pages)]
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_S), session.get(url + pages[name].format(n=1 + n % endpoints)) as answer:
                await answer.read()
                ok = answer.status == 200
        except (TimeoutError, aiohttp.ClientError):
            ok = False
        looked.failed += not ok
        times = looked.pages.setdefault(name, [])
        if len(times) < ANSWERS_KEPT:
            times.append((time.perf_counter() - began) * 1e6)

    async def stream(n: int, opened: asyncio.Semaphore) -> None:
        path = "/overview/live" if n == 0 else f"/endpoints/{1 + n % endpoints}/live"
        async with session.get(url + path) as answer:
            answer.raise_for_status()
            opened.release()
            async for _ in answer.content.iter_any():
                pass

    async with session, asyncio.TaskGroup() as tasks:
        opened = asyncio.Semaphore(0)
        open_streams = [tasks.create_task(stream(n, opened)) for n in range(streams)]
        for _ in range(streams):
            await opened.acquire()
        print("ready", flush=True)
        began, n = time.perf_counter(), 0
        loads = []
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, began + n / pages_per_s - time.perf_counter())):
                    await over.wait()
            if not over.is_set():
                loads.append(tasks.create_task(page(n)))
                n += 1
        await asyncio.gather(*loads)
        for one in open_streams:
            one.cancel()
    return {"pages": looked.pages, "failed": looked.failed}


def main() -> None:
    """Be the visitors' process."""
    url, key, pages_per_s, streams, endpoints = sys.argv[1:]
    print(json.dumps(uvloop.run(visit(url, key, float(pages_per_s), int(streams), int(endpoints)))), flush=True)


SCENARIO = Scenario(
    "panel",
    shows="What deliveries notice of people who look at the panel, served by the same process: commit → received without and with 50 page "
    "loads a second and 200 live streams, and how long pages take.",
    misleads="visitors, producers, receiver and PostgreSQL share the machine with it, so on a full one everything waits for a core; a page's "
    "time is as its visitor sees it, the wait for a connection to the database included; streams are spread over endpoints, which is more "
    "looks a second than people who watch the same.",
    sizes=SIZES,
    run=run,
)
