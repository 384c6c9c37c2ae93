"""Who commits events: in bulk, as fast as they go; one by one at instants drawn in advance (open loop); or over and over
(closed loop).

Open loop: an event is due at its instant, whether or not earlier ones have arrived, so a stall counts for everything
that was due meanwhile (no coordinated omission). How late the producer itself was is told beside. `Arrivals` is the
other end: a receiver in the same process, which thus has the same clock.

    python -m bench.load DSN PRODUCERS SECONDS    →  {"commits": …, "wall_s": …, "cpu_s": …}    closed loop, in a process of its own
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import asyncpg
import uvloop

from bench.histogram import Histogram
from dispatcher.sink import Behaviour, Received, Sink

PRODUCERS = 8  # connections; each commit waits for its flush
ARRIVE_S = 240.0  # what has not arrived by then never does; behind a transaction of five million rows a late event waits for over a minute
BULK_ROWS = 500
PAYLOAD_BYTES = 400  # about 0.5 kB with the envelope


@dataclass(frozen=True, slots=True)
class Target:
    """Where events go: `rows` takes numbers of accounts and payloads, `bulk` accounts, payload, first and last number."""

    rows: str
    bulk: str


OUTBOX = Target(
    rows="INSERT INTO webhook.outbox (account_id, type, payload) "
    "SELECT 'acct_' || a, 'message.delivered', p::json FROM unnest($1::integer[], $2::text[]) AS u (a, p)",
    bulk="WITH made AS (INSERT INTO webhook.outbox (account_id, type, payload) "
    "SELECT 'acct_' || (n % $1::integer), 'message.delivered', $2::text::json FROM generate_series($3::integer, $4::integer) AS n "
    "RETURNING id) SELECT max(id) FROM made",
)

# The same with a key, an expiry and a priority each, for endpoints that don't order.
OUTBOX_OPTIONS = Target(
    rows="",
    bulk="WITH made AS (INSERT INTO webhook.outbox (account_id, type, payload, ordering_key, expires_at, priority) "
    "SELECT 'acct_' || (n % $1::integer), 'message.delivered', $2::text::json, 'key_' || n, now() + interval '1 hour', 1 "
    "FROM generate_series($3::integer, $4::integer) AS n RETURNING id) SELECT max(id) FROM made",
)


def payload(size: int, n: int | None = None) -> str:
    """Return JSON of about `size` bytes, with a number by which the event is known when it arrives."""
    number = "" if n is None else f',"n":{n}'
    return '{"text":"' + "x" * max(0, size - 11 - len(number)) + '"' + number + "}"


async def bulk(
    connection: asyncpg.Connection, events: int, accounts: int, *, size: int = PAYLOAD_BYTES, target: Target = OUTBOX, rows: int = BULK_ROWS
) -> int:  # fmt: skip
    """Commit events in statements of `rows`, spread over the accounts; return the last id."""
    last = 0
    for at in range(0, events, rows):
        last = await connection.fetchval(
            target.bulk, accounts, payload(size), at, min(events, at + rows) - 1, timeout=600
        )
    return last


@dataclass(slots=True)
class Committed:
    """When each event's commit was acknowledged; how late its transaction began, and how long it took since it was due."""

    at: dict[int, float] = field(default_factory=dict)
    late: Histogram = field(default_factory=Histogram)
    waited: Histogram = field(default_factory=Histogram)


class Producers:
    """Connections that commit single rows; beyond 1,000 events a second several a transaction, because a disk flushes only so often."""

    def __init__(self, connections: list[asyncpg.Connection], target: Target) -> None:
        self._connections = connections
        self._target = target
        self._next = 0

    async def open_loop(
        self, rate: float, seconds: float, accounts: Sequence[int], *, size: int = PAYLOAD_BYTES
    ) -> Committed:
        """Commit events for the accounts in turn at Poisson instants. Numbers go on from call to call."""
        rows = max(1, round(rate / 1_000))
        rng = random.Random(1)
        committed = Committed()
        free: asyncio.Queue[asyncpg.Connection] = asyncio.Queue()
        for connection in self._connections:
            free.put_nowait(connection)

        async def commit(connection: asyncpg.Connection, numbers: range, due: float) -> None:
            committed.late.add((time.perf_counter() - due) * 1e6)
            await connection.execute(
                self._target.rows, [accounts[n % len(accounts)] for n in numbers], [payload(size, n) for n in numbers]
            )
            now = time.perf_counter()
            committed.waited.add((now - due) * 1e6)
            for n in numbers:
                committed.at[n] = now
            free.put_nowait(connection)

        began, at = time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as tasks:
            while True:
                at += rng.expovariate(rate / rows)
                if at >= seconds:
                    break
                wait = began + at - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                numbers = range(self._next, self._next + rows)
                self._next += rows
                tasks.create_task(commit(await free.get(), numbers, began + at))
        return committed

    async def burst(self, events: int, accounts: int, *, size: int = PAYLOAD_BYTES) -> tuple[range, float]:
        """Commit so many events by one statement; return their numbers and when it was acknowledged."""
        numbers = range(self._next, self._next + events)
        self._next += events
        await self._connections[0].execute(
            self._target.rows, [n % accounts for n in numbers], [payload(size, n) for n in numbers], timeout=120
        )
        return numbers, time.perf_counter()

    async def one(self, account: int) -> int:
        """Commit one event; return its number."""
        number = self._next
        self._next += 1
        await self._connections[0].execute(self._target.rows, [account], [payload(PAYLOAD_BYTES, number)])
        return number


@contextlib.asynccontextmanager
async def producers(dsn: str, target: Target = OUTBOX, count: int = PRODUCERS) -> AsyncIterator[Producers]:
    connections = [await asyncpg.connect(dsn) for _ in range(count)]
    try:
        yield Producers(connections, target)
    finally:
        for connection in connections:
            connection.terminate()


class Arrivals:
    """A receiver in this process that notes when each numbered event came first."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}
        self.count = 0
        self.sink = Sink(on_event=self._note)

    def _note(self, event: Received) -> None:
        self.count += 1
        if (found := event.body.rfind(b'"n":')) > 0:
            self.at.setdefault(int(event.body[found + 4 : event.body.index(b"}", found)]), time.perf_counter())

    async def all_of(self, committed: Committed) -> Histogram:
        """Wait until all of them are here; return how long after its commit's acknowledgement each came."""
        deadline = time.perf_counter() + ARRIVE_S
        missing = [n for n in committed.at if n not in self.at]
        while missing:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{len(missing)} events have not arrived {ARRIVE_S:g} s after the last commit")
            await asyncio.sleep(0.02)
            missing = [n for n in missing if n not in self.at]
        waits = Histogram()
        for n, at in committed.at.items():
            waits.add((self.at[n] - at) * 1e6)
        return waits


@contextlib.asynccontextmanager
async def arrivals(*, host: str = "127.0.0.1", slow: Sequence[tuple[str, Behaviour]] = ()) -> AsyncIterator[Arrivals]:
    """Listen; paths in `slow` behave as they say, and their events aren't waited for."""
    made = Arrivals()
    for path, behaviour in slow:
        made.sink.set_behaviour(path, behaviour)
    await made.sink.start(host)
    try:
        yield made
    finally:
        await made.sink.stop()


async def closed_loop(dsn: str, count: int, seconds: float) -> dict[str, float]:
    """Commit single rows, each producer one after another, for an account that nobody listens to."""
    connections = [await asyncpg.connect(dsn) for _ in range(count)]
    commits = 0
    text = payload(PAYLOAD_BYTES)
    wall, cpu = time.perf_counter(), time.process_time()

    async def loop(connection: asyncpg.Connection) -> None:
        nonlocal commits
        while time.perf_counter() - wall < seconds:
            await connection.execute(OUTBOX.rows, [-1], [text])
            commits += 1

    await asyncio.gather(*map(loop, connections))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for connection in connections:
        await connection.close()
    return {"commits": commits, "wall_s": wall, "cpu_s": cpu}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(closed_loop(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
