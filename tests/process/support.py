"""Real processes for the tests: a dispatcher to be killed, producers that know what they committed, and the account.

`Dispatcher` is `python -m dispatcher run` with its log read line by line. `Load` inserts from several connections, with
rollbacks and late commits, and knows of each event whether it was committed, rolled back, or (when the connection died
during COMMIT) either. `Account` compares that with what the sink got. Every event carries a number of its own in its
payload, since outbox ids may be handed out again after a crash.

Nothing sleeps for luck: conditions are awaited with deadlines. Only processes that the test started are signalled, by
pid; whoever freezes something thaws it on the way out.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import orjson

from bench.spawn import Spawned, spawn
from dispatcher.sink import Received
from dispatcher.store.embedded import EmbeddedServer
from tests.rig import PATIENCE_S, Rig, until

INVARIANT = (Path(__file__).parent.parent / "invariant.sql").read_text()
ROOT = Path(__file__).parent.parent.parent
SESSIONS = ("owner", "listener", "reader", "recorder", "config")
AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


# ── a dispatcher ──


class Dispatcher:
    """One `dispatcher run`, or another verb that serves, of the package in `root`. `lines` are its log so far, `errors` its stderr."""

    def __init__(self, dsn: str, *, verb: str = "run", root: Path = ROOT, **settings: Any) -> None:
        effective = {
            "database_url": dsn,
            "allowed_networks": "127.0.0.0/8",
            "grace_s": 10,
            "log_format": "json",
        } | settings
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
        self._environment |= {f"DISPATCHER_{name.upper()}": str(value) for name, value in effective.items()}
        self._verb = verb
        self._root = root
        self._tasks: list[asyncio.Task[None]] = []
        self.process: Spawned
        self.lines: list[dict[str, Any]] = []
        self.errors = ""

    async def launch(self) -> "Dispatcher":
        self.process = await spawn(
            sys.executable, "-m", "dispatcher", self._verb,
            cwd=self._root, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._read_log()), asyncio.create_task(self._read_errors())]
        return self

    async def start(self) -> "Dispatcher":
        """Launch, and wait until it reads the log, or listens."""
        await self.launch()
        await self.said("web.listening" if self._verb == "web" else "started")
        return self

    async def _read_log(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(orjson.loads(line))

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.errors += line.decode()

    def all(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def said(self, event: str, *, times: int = 1, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the log line, and return the last one."""

        def found() -> bool:
            if len(self.all(event)) >= times:
                return True
            assert self.process.returncode is None, f"ended before {event!r}: {self}"
            return False

        try:
            await until(found, within_s=within_s, what=f"{event!r} in the log")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self}") from None
        return self.all(event)[-1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, *, within_s: float = PATIENCE_S) -> int:
        """Wait for its end, and return its exit status."""
        try:
            async with asyncio.timeout(within_s):
                status = await self.process.wait()
                await asyncio.gather(*self._tasks)
        except TimeoutError:
            raise AssertionError(f"still there after {within_s} s: {self}") from None
        return status

    async def stop(self, *, within_s: float = PATIENCE_S) -> int:
        self.signal(signal.SIGTERM)
        return await self.ended(within_s=within_s)

    async def kill(self) -> None:
        """kill -9; nothing of it is left when this returns, except in the database."""
        if self.process.returncode is None:
            self.signal(signal.SIGKILL)
        await self.ended()

    def __repr__(self) -> str:
        tail = "\n".join(str(line) for line in self.lines[-15:])
        return f"Dispatcher(status {self.process.returncode})\n{tail}\n{self.errors[-2000:]}"


@contextlib.asynccontextmanager
async def dispatching(dsn: str, *, verb: str = "run", **settings: Any) -> AsyncIterator[Dispatcher]:
    """A dispatcher that has started; killed at the end if it is still there."""
    made = Dispatcher(dsn, verb=verb, **settings)
    try:
        yield await made.start()
    finally:
        await made.kill()


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """SIGSTOP while inside."""
    stopped = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def server_pids(server: EmbeddedServer) -> list[int]:
    """Return the postmaster and all of its children, the postmaster first."""
    postmaster = int((server.data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return [postmaster, *map(int, children)]


async def backends(db: asyncpg.Connection, *sessions: str) -> list[int]:
    """Return the pids of the dispatcher's sessions in this database."""
    rows = await db.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = ANY ($1::text[])",
        [f"dispatcher {session}" for session in sessions or SESSIONS],
    )
    return [row["pid"] for row in rows]


async def standbys(db: asyncpg.Connection) -> list[int]:
    """Return the pids of the sessions of dispatchers that wait for the owner's end."""
    rows = await db.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'dispatcher standby %'"
    )
    return [row["pid"] for row in rows]


async def standing_by(db: asyncpg.Connection, count: int = 1) -> None:
    async def so_many() -> bool:
        return len(await standbys(db)) == count

    await until(so_many, what=f"{count} standing by")


async def taken_up(db: asyncpg.Connection) -> None:
    """Wait until a checkpoint says that the dispatcher has met every subscription: until then each start sends its lane back."""

    async def all_of_them() -> bool:
        return await db.fetchval("SELECT bool_and(taken_up) FROM webhook.subscription")

    await until(all_of_them, what="all subscriptions taken up")


async def terminate(db: asyncpg.Connection, session: str) -> int:
    """End one of the dispatcher's sessions from the server's side, as an operator would; return how many there were."""
    pids = await backends(db, session)
    await db.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::integer[]) AS pid", pids)
    return len(pids)


async def no_backends(db: asyncpg.Connection) -> None:
    """Wait until the server has noticed that a killed dispatcher's connections are gone: nothing more is recorded then."""

    async def gone() -> bool:
        return not await backends(db)

    await until(gone, what="the killed dispatcher's sessions gone")


# ── load ──


class Load:
    """Producers. Each transaction inserts a few events; some roll back, some commit late, and what happened is known."""

    _numbers = itertools.count(1)

    def __init__(
        self, dsn: str, *, accounts: Sequence[str] = ("acct",), producers: int = 4, pace_s: float = 0.02, rows_max: int = 10,
        rolled_back: float = 0.1, late: float = 0.05, late_s: float = 0.3, seed: int = 0,
    ) -> None:  # fmt: skip
        self.committed: dict[int, str] = {}  # number → account
        self.rolled_back: set[int] = set()
        self.unknown: dict[int, str] = {}  # the connection died during COMMIT
        self._dsn = dsn
        self._accounts = accounts
        self._producers = producers
        self._pace_s = pace_s
        self._rows_max = rows_max
        self._rolled_back = rolled_back
        self._late = late
        self._late_s = late_s
        self._rng = random.Random(seed)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._produce()) for _ in range(self._producers)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let the open transactions end."""
        self._stopping = True
        for task in asyncio.as_completed(self._tasks):
            await task
        self._tasks = []

    async def more(self, count: int, *, within_s: float = PATIENCE_S) -> None:
        """Wait until so many more events are committed."""
        target = len(self.committed) + count
        await until(lambda: len(self.committed) >= target, within_s=within_s, what=f"{count} more committed")

    async def _produce(self) -> None:
        while not self._stopping:
            try:
                connection = await asyncpg.connect(self._dsn, timeout=10)
            except AWAY:
                await asyncio.sleep(0.05)
                continue
            try:
                while not self._stopping:
                    await self._transaction(connection)
                    await asyncio.sleep(self._rng.uniform(0, 2 * self._pace_s))
            except AWAY:
                connection.terminate()  # the server went away; noted below
            else:
                await connection.close()

    async def _transaction(self, connection: asyncpg.Connection) -> None:
        rng = self._rng
        account = rng.choice(self._accounts)
        numbers = [next(self._numbers) for _ in range(rng.randint(1, self._rows_max))]
        late, undo = rng.random() < self._late, rng.random() < self._rolled_back
        try:
            await connection.execute("BEGIN")
            await connection.executemany(
                "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ($1, 'message.sent', $2)",
                [(account, f'{{"number": {number}}}') for number in numbers],
            )
            if late:
                await asyncio.sleep(rng.uniform(0, self._late_s))
            if undo:
                await connection.execute("ROLLBACK")
        except AWAY:
            self.rolled_back.update(numbers)  # COMMIT was never sent
            raise
        if undo:
            self.rolled_back.update(numbers)
            return
        try:
            await connection.execute("COMMIT")
        except AWAY:
            self.unknown.update(dict.fromkeys(numbers, account))
            raise
        self.committed.update(dict.fromkeys(numbers, account))


_NUMBER = re.compile(rb'"number": (\d+)')


def number_of(received: Received) -> int:
    found = _NUMBER.search(received.body)
    assert found is not None
    return int(found[1])


# ── the account ──


class Watch:
    """Asks for the invariant again and again, and keeps what was violated."""

    def __init__(self, dsn: str) -> None:
        self.checks = 0
        self.violations: list[tuple[Any, ...]] = []
        self._dsn = dsn
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if kind is None:
            self.check()

    def check(self) -> None:
        assert self.violations == [], f"after {self.checks} checks"
        assert self.checks > 0

    async def _run(self) -> None:
        while True:
            try:
                connection = await asyncpg.connect(self._dsn, timeout=10)
            except AWAY:
                await asyncio.sleep(0.05)
                continue
            try:
                while not self.violations:
                    self.violations += [tuple(row) for row in await connection.fetch(INVARIANT)]
                    self.checks += 1
                    await asyncio.sleep(0.02)
                return
            except AWAY:
                continue
            finally:
                connection.terminate()


async def check_invariant(db: asyncpg.Connection) -> None:
    assert [tuple(row) for row in await db.fetch(INVARIANT)] == []


def arrivals(received: Iterable[Received]) -> dict[tuple[str, int, int], list[Received]]:
    """Group what arrived by (path, number of the event, attempt)."""
    groups = defaultdict(list)
    for got in received:
        assert got.signature_ok
        assert got.attempt is not None
        groups[got.path, number_of(got), got.attempt].append(got)
    return groups


async def recorded(db: asyncpg.Connection) -> dict[tuple[str, int, int], datetime]:
    """Return when each recorded attempt started, by the same key."""
    rows = await db.fetch(
        "SELECT e.url, (o.payload ->> 'number')::bigint AS number, a.number AS attempt, a.started_at FROM webhook.attempt a "
        "JOIN webhook.outbox o ON o.id = a.event_id JOIN webhook.endpoint e ON e.id = a.endpoint_id"
    )
    return {("/" + row["url"].rpartition("/")[2], row["number"], row["attempt"]): row["started_at"] for row in rows}


async def settle(
    r: Rig, load: Load, paths: dict[str, str], dispatcher: Dispatcher | None = None, *, within_s: float = 30.0
) -> int:
    """Wait until everything is delivered, stop the `dispatcher`, and check the account: committed = delivered.

    `paths`: path → account. Every delivery that arrived more than once under one attempt number must be explained: what is
    recorded is never sent again, so the recorded attempt is the last that arrived. Returns how many arrived once too often.
    """
    await load.stop()
    if dispatcher is None:
        await r.settled(within_s=within_s)
    else:

        async def delivered_all() -> bool:
            return not await r.undelivered() and not await r.db.fetchval("SELECT EXISTS (SELECT FROM webhook.retry)")

        await until(delivered_all, within_s=within_s, what="everything delivered")
        assert await dispatcher.stop() == 0, dispatcher
        assert not dispatcher.errors, dispatcher.errors
        assert await r.undelivered() == []
    await check_invariant(r.db)
    in_log = {
        row[0]: row[1]
        for row in await r.db.fetch("SELECT (payload ->> 'number')::bigint, account_id FROM webhook.outbox")
    }
    assert load.committed.items() <= in_log.items(), "the server lost what it had confirmed"
    assert in_log.keys() <= load.committed.keys() | load.unknown.keys()
    groups = arrivals(r.received)
    for path, account in paths.items():
        got = {number for where, number, _ in groups if where == path}
        delivered = {
            number for (where, number, _), all_ in groups.items()
            if where == path and any(one.status is not None and one.status < 300 for one in all_)
        }  # fmt: skip
        wanted = {number for number, whose in in_log.items() if whose == account}
        assert not wanted - delivered, f"{path} lost {sorted(wanted - delivered)[:20]}"
        assert not got - wanted - load.unknown.keys(), f"{path} got {sorted(got - wanted)[:20]}, never committed"
    rows = await recorded(r.db)
    twice = {key: all_ for key, all_ in groups.items() if len(all_) > 1}
    for key, all_ in twice.items():
        # The nearest: the dispatcher's clock is set by the database's once, at its start, and a few milliseconds slow.
        began = rows[key].timestamp()
        recorded_one = min(all_, key=lambda one: abs(one.received_at - began))
        assert recorded_one is all_[-1], f"{key}: recorded as of {began}, arrived {[one.received_at for one in all_]}"
    return sum(len(all_) - 1 for all_ in twice.values())


async def unrecorded(r: Rig) -> set[tuple[str, int, int]]:
    """Return what has arrived and has no attempt row: the only deliveries that the next start may send again."""
    return arrivals(r.received).keys() - (await recorded(r.db)).keys()


def longest_silence(r: Rig, since: float) -> float:
    """Return the longest time without an arrival from `since` (wall clock) on: the stall that a fault cost."""
    times = [since, *(got.received_at for got in r.received if got.received_at > since)]
    return max(later - earlier for earlier, later in itertools.pairwise(times))
