"""The usual way, written well, to compare with: a queue table claimed with SKIP LOCKED, aiohttp, a status that is updated.

Two forms of one program. `row`: claims in batches, and marks each row by a statement of its own when its POST has
ended, over a pool of connections. `batched`: marks all rows that have ended meanwhile by one statement, at most every
10 ms. Both keep up to `slots` POSTs in flight, sign as Standard Webhooks ask, retry with backoff, and take up what a
dead worker had claimed. Both commit asynchronously what may be repeated, have their garbage collector tuned as the
dispatcher has, and poll every 20 ms when there is nothing to do. What they lack: isolation of endpoints, limits,
breakers, a history of attempts, payloads kept apart from state.

    BENCH_COUNTERS=FILE python -m bench.usual DSN row|batched SLOTS
"""

import asyncio
import base64
import hmac
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Literal

import aiohttp
import asyncpg
import uvloop

from bench.load import Target
from bench.rig import PASSED_S, SECRET, Counters, Running
from dispatcher.main import tune_gc

Form = Literal["row", "batched"]
Ended = tuple[int, str, int | None, int]  # id, new status, HTTP status, seconds to wait
FORMS: dict[Form, str] = {"row": "row by row", "batched": "batched"}

CLAIM_ROWS = 500
MARK_WAIT_S = 0.01
GATHER_S = 0.005
IDLE_S = 0.02
LEASE_S = 60
POOL = 10
TIMEOUT_S = 15

SCHEMA = """
CREATE SCHEMA usual;
CREATE TABLE usual.endpoint (id integer PRIMARY KEY, url text NOT NULL, secret text NOT NULL);
CREATE TABLE usual.queue (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint_id integer NOT NULL,
    payload     json NOT NULL,
    status      text NOT NULL DEFAULT 'pending',
    attempts    smallint NOT NULL DEFAULT 0,
    due_at      timestamptz NOT NULL DEFAULT now(),   -- of a running one: when its claim is void
    answered    smallint,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX queue_due ON usual.queue (due_at, id) WHERE status IN ('pending', 'running');
"""

CLAIM = """
UPDATE usual.queue AS q SET status = 'running', attempts = q.attempts + 1, due_at = now() + $2 * interval '1 second'
FROM (
    SELECT id FROM usual.queue WHERE status IN ('pending', 'running') AND due_at <= now() ORDER BY due_at, id LIMIT $1 FOR UPDATE SKIP LOCKED
) AS d
WHERE q.id = d.id
RETURNING q.id, q.endpoint_id, q.payload, q.attempts
"""

MARK_ONE = """
UPDATE usual.queue SET status = $2, answered = $3, due_at = now() + $4 * interval '1 second' WHERE id = $1
"""

MARK_MANY = """
UPDATE usual.queue AS q SET status = d.status, answered = d.answered, due_at = now() + d.wait_s * interval '1 second'
FROM unnest($1::bigint[], $2::text[], $3::smallint[], $4::integer[]) AS d (id, status, answered, wait_s)
WHERE q.id = d.id
"""

QUEUE = Target(
    rows="INSERT INTO usual.queue (endpoint_id, payload) SELECT a, p::json FROM unnest($1::integer[], $2::text[]) AS u (a, p)",
    bulk="WITH made AS (INSERT INTO usual.queue (endpoint_id, payload) "
    "SELECT n % $1::integer, $2::text::json FROM generate_series($3::integer, $4::integer) AS n RETURNING id) SELECT max(id) FROM made",
)


async def install(dsn: str, urls: list[str]) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn)
    await connection.execute(SCHEMA)
    await connection.execute(
        "INSERT INTO usual.endpoint SELECT n - 1, url, $2 FROM unnest($1::text[]) WITH ORDINALITY AS u (url, n)", urls, SECRET
    )  # fmt: skip
    return connection


async def settled(running: Running, count: int) -> None:
    """Wait until the process has marked so many rows in all."""
    async with asyncio.timeout(PASSED_S):
        while running.counters.settled < count:
            if running.process.poll() is not None:
                raise RuntimeError(f"the usual way ended with {running.process.returncode}")
            await asyncio.sleep(0.02)


class Worker:
    """One process of the usual way. Ends when told to, with nothing in flight."""

    def __init__(self, dsn: str, form: Form, slots: int, counters: Counters | None = None) -> None:
        self._dsn = dsn
        self._form = form
        self._free = asyncio.Semaphore(slots)
        self._slots = slots
        self._counters = counters
        self._stopping = asyncio.Event()
        self._ended: deque[Ended] = deque()  # to be marked
        self._endpoints: dict[int, tuple[str, bytes]] = {}
        self._session: aiohttp.ClientSession
        self._pool: asyncpg.Pool

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=self._slots, limit_per_host=self._slots)
        async with (
            asyncpg.create_pool(
                self._dsn,
                min_size=POOL,
                max_size=POOL,
                init=self._init,
                reset=_keep,
                server_settings={"synchronous_commit": "off"},  # what a crash of the server takes is sent again
            ) as self._pool,
            aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            ) as self._session,
        ):
            for row in await self._pool.fetch("SELECT id, url, secret FROM usual.endpoint"):
                key = base64.b64decode(row["secret"].removeprefix("whsec_") + "==")
                self._endpoints[row["id"]] = (row["url"], key)
            async with asyncio.TaskGroup() as tasks:
                if self._form == "batched":
                    tasks.create_task(self._mark())
                await self._claim(tasks)
                for _ in range(self._slots):  # until nothing is in flight
                    await self._free.acquire()
                self._slots = 0  # tells the marker to end

    async def _init(self, connection: asyncpg.Connection) -> None:
        if self._counters is not None:
            connection.add_query_logger(self._counters.count)

    async def _claim(self, tasks: asyncio.TaskGroup) -> None:
        while not self._stopping.is_set():
            await self._free.acquire()
            if self._free.locked():
                await asyncio.sleep(GATHER_S)  # rather than claim one by one
            wanted = 1
            while wanted < CLAIM_ROWS and not self._free.locked():
                await self._free.acquire()  # doesn't wait
                wanted += 1
            rows = await self._pool.fetch(CLAIM, wanted, LEASE_S)
            for row in rows:
                tasks.create_task(self._deliver(row))
            for _ in range(wanted - len(rows)):
                self._free.release()
            if not rows:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._stopping.wait()
                except TimeoutError:
                    pass  # look again

    async def _deliver(self, row: asyncpg.Record) -> None:
        url, key = self._endpoints[row["endpoint_id"]]
        number = row["attempts"]
        body = row["payload"].encode()
        webhook_id, timestamp = f"msg_{row['id']}", str(int(time.time()))
        digest = hmac.digest(key, f"{webhook_id}.{timestamp}.".encode() + body, "sha256")
        headers = {
            "content-type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": "v1," + base64.b64encode(digest).decode(),
        }
        status: int | None = None
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass  # no answer: status stays None, and the row is due again later
        if status is not None and 200 <= status <= 299:
            ended: Ended = (row["id"], "done", status, 0)
        elif number >= 5:
            ended = (row["id"], "dead", status, 0)
        else:
            ended = (row["id"], "pending", status, 5 * 4 ** (number - 1))
        if self._form == "batched":
            self._ended.append(ended)
        else:
            await self._pool.execute(MARK_ONE, *ended)
            self._settled(1)

    async def _mark(self) -> None:
        while self._slots or self._ended:
            if self._ended:
                batch = [self._ended.popleft() for _ in range(min(len(self._ended), 1_000))]
                await self._pool.execute(MARK_MANY, *map(list, zip(*batch, strict=True)))
                self._settled(len(batch))
            await asyncio.sleep(MARK_WAIT_S)

    def _settled(self, count: int) -> None:
        for _ in range(count):
            self._free.release()  # not before it is marked: that bounds what waits for it
        if self._counters is not None:
            self._counters.add(settled=count)


async def _keep(_connection: object) -> None:
    """Be the pool's reset: nothing is set on these connections, and resetting them would double the statements."""


async def main(dsn: str, form: Form, slots: int) -> None:
    worker = Worker(dsn, form, slots, Counters(Path(os.environ["BENCH_COUNTERS"])))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    tune_gc()
    await worker.run()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], next(form for form in FORMS if form == sys.argv[2]), int(sys.argv[3])))
