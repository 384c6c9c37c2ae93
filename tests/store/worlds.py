"""Two worlds to hold a Store against: a real PostgreSQL, and the twin. Each can do what producers, operators and fate do to a dispatcher."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import asyncpg

from dispatcher import settings as settings_module
from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.outcome import Fault
from dispatcher.domain.run import RunState
from dispatcher.ports import AttemptRow, Store, StoreAwayError
from dispatcher.store import standby
from dispatcher.store.memory import MemoryStore
from dispatcher.store.memory_database import MemoryDatabase, Transaction
from dispatcher.store.postgres import PgStore

SETTINGS = settings_module.Settings(allowed_networks="127.0.0.0/8")
URL, ORIGIN = "https://receiver.test/hook", "https://receiver.test/"  # what others are told of it
SECRETS = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",)
MANY, HUGE = 1_000, 1 << 30  # bounds that nothing here reaches


async def insisting(call: Callable[[], Awaitable[Any]]) -> Any:
    """Call once more if the first call found its connection gone: whether it notices before or during the call is chance."""
    try:
        return await call()
    except StoreAwayError:
        return await call()


class Tx(Protocol):
    """A producer's or operator's open transaction."""

    async def insert(self, count: int = 1, **columns: Any) -> list[int]: ...
    async def savepoint(self) -> None: ...
    async def rollback_to(self) -> None: ...
    async def touch_endpoint(self, endpoint_id: int) -> None: ...
    async def touch_subscription(self, subscription_id: int) -> None: ...
    async def subscribe(self, endpoint_id: int, pattern: str) -> int: ...
    async def prepare(self, name: str) -> None: ...
    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...


class World(Protocol):
    def store(self) -> Store: ...
    def begin(self) -> Any: ...
    async def add_endpoint(self, *patterns: str, **columns: Any) -> int: ...
    async def update_endpoint(self, endpoint_id: int, **columns: Any) -> None: ...
    async def subscriptions(self, endpoint_id: int) -> list[tuple[int, str, int, bool]]: ...
    async def commit_prepared(self, name: str) -> None: ...
    async def sever(self, store: Any, session: str) -> None: ...
    async def lose_life(self, store: Any) -> None: ...
    async def attempts(self) -> list[AttemptRow]: ...
    async def retries(self) -> list[tuple[Any, ...]]: ...
    async def dead_letters(self) -> list[tuple[Any, ...]]: ...
    async def forget_events(self, ids: Sequence[int]) -> None: ...
    async def add_run(self, endpoint_id: int, upto_id: int, **columns: Any) -> int: ...
    async def change_run(self, run_id: int, state: str) -> None: ...
    async def resend_dead(self, endpoint_id: int, run: int, *event_ids: int) -> None: ...
    async def progress(self, run_id: int) -> tuple[int, int, int, int, bool]: ...
    async def stats(self) -> list[tuple[Any, ...]]: ...
    async def close(self) -> None: ...

    async def insert(self, count: int = 1, **columns: Any) -> list[int]:
        async with self.begin() as tx:
            ids: list[int] = await tx.insert(count, **columns)
        return ids


# ── PostgreSQL ──


class PgTx:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._db = connection
        self.is_open = True

    async def insert(
        self,
        count: int = 1,
        account_id: str = "acct",
        type: str = "message.sent",
        payload: str = "{}",
        occurred_us: int | None = None,
        ordering_key: str | None = None,
        expires_us: int | None = None,
        priority: int | None = None,
        traceparent: str | None = None,
    ) -> list[int]:
        rows = await self._db.fetch(
            "INSERT INTO webhook.outbox (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent) "
            "SELECT $1, $2, $3::text::json, '1970-01-01Z'::timestamptz + $5::bigint * interval '1 us', $6, "
            "'1970-01-01Z'::timestamptz + $7::bigint * interval '1 us', $8, $9 FROM generate_series(1, $4::integer) RETURNING id",
            account_id, type, payload, count, occurred_us, ordering_key, expires_us, priority, traceparent,
        )  # fmt: skip
        return [row["id"] for row in rows]

    async def savepoint(self) -> None:
        await self._db.execute("SAVEPOINT here")

    async def rollback_to(self) -> None:
        await self._db.execute("ROLLBACK TO here")

    async def touch_endpoint(self, endpoint_id: int) -> None:
        await self._db.execute("UPDATE webhook.endpoint SET timeout_ms = 9999 WHERE id = $1", endpoint_id)

    async def touch_subscription(self, subscription_id: int) -> None:
        await self._db.execute("SELECT FROM webhook.subscription WHERE id = $1 FOR UPDATE", subscription_id)

    async def subscribe(self, endpoint_id: int, pattern: str) -> int:
        return await self._db.fetchval(
            "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, $2, webhook.last_id()) RETURNING id",
            endpoint_id, pattern,
        )  # fmt: skip

    async def prepare(self, name: str) -> None:
        await self._end(f"PREPARE TRANSACTION '{name}'")

    async def commit(self) -> None:
        await self._end("COMMIT")

    async def rollback(self) -> None:
        await self._end("ROLLBACK")

    async def _end(self, how: str) -> None:
        self.is_open = False
        await self._db.execute(how)


class PgWorld(World):
    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._db: asyncpg.Connection | None = None
        self._stores: list[PgStore] = []

    def store(self) -> PgStore:
        self._stores.append(PgStore(self.dsn, SETTINGS))
        return self._stores[-1]

    async def db(self) -> asyncpg.Connection:
        if self._db is None:
            self._db = await asyncpg.connect(self.dsn)
        return self._db

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[PgTx]:
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute("BEGIN")
            tx = PgTx(connection)
            yield tx
            if tx.is_open:
                await tx.commit()
        finally:
            await connection.close()

    async def add_endpoint(self, *patterns: str, **columns: Any) -> int:
        columns = {"account_id": "acct", "url": URL, "state": "live"} | columns
        db = await self.db()
        names, places = ", ".join(columns), ", ".join(f"${n}" for n in range(1, len(columns) + 1))
        async with db.transaction():
            endpoint_id: int = await db.fetchval(
                f"INSERT INTO webhook.endpoint ({names}) VALUES ({places}) RETURNING id", *columns.values()
            )
            for secret in SECRETS:
                await db.execute(
                    "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, $2)", endpoint_id, secret
                )
            for pattern in patterns or ("*",):
                await PgTx(db).subscribe(endpoint_id, pattern)
        return endpoint_id

    async def update_endpoint(self, endpoint_id: int, **columns: Any) -> None:
        sets = ", ".join(f"{name} = ${n}" for n, name in enumerate(columns, start=2))
        await (await self.db()).execute(
            f"UPDATE webhook.endpoint SET {sets} WHERE id = $1", endpoint_id, *columns.values()
        )

    async def subscriptions(self, endpoint_id: int) -> list[tuple[int, str, int, bool]]:
        return await self._rows(
            "SELECT id, pattern, since_id, taken_up FROM webhook.subscription WHERE endpoint_id = $1 ORDER BY id",
            endpoint_id,
        )

    async def commit_prepared(self, name: str) -> None:
        await (await self.db()).execute(f"COMMIT PREPARED '{name}'")

    async def sever(self, store: Any, session: str) -> None:
        await self._terminate(f"dispatcher {session}")

    async def lose_life(self, store: Any) -> None:
        db = await self.db()
        await db.execute("UPDATE webhook.life SET token = gen_random_uuid()")
        await self._terminate("dispatcher %")

    async def _terminate(self, application_name: str) -> None:
        assert await (await self.db()).fetchval(
            "SELECT bool_and(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE $1",
            application_name,
        )

    async def attempts(self) -> list[AttemptRow]:
        rows = await self._rows(
            "SELECT event_id, endpoint_id, run, number, (extract(epoch FROM started_at) * 1000000)::bigint, duration_us, status, fault, "
            "response_head FROM webhook.attempt ORDER BY event_id, endpoint_id, run, number"
        )
        return [AttemptRow(*row[:7], None if row[7] is None else Fault(row[7]), row[8]) for row in rows]

    async def retries(self) -> list[tuple[Any, ...]]:
        return await self._rows(
            "SELECT endpoint_id, event_id, run, number, (extract(epoch FROM first_attempt_at) * 1000000)::bigint, "
            "(extract(epoch FROM due_at) * 1000000)::bigint, reason FROM webhook.retry ORDER BY 1, 2, 3"
        )

    async def dead_letters(self) -> list[tuple[Any, ...]]:
        return await self._rows(
            "SELECT endpoint_id, event_id, run, account_id, type, payload::text, attempts, "
            "(extract(epoch FROM first_attempt_at) * 1000000)::bigint, reason, status, fault FROM webhook.dead_letter ORDER BY 1, 2, 3"
        )

    async def forget_events(self, ids: Sequence[int]) -> None:
        await (await self.db()).execute("DELETE FROM webhook.outbox WHERE id = ANY ($1::bigint[])", ids)

    async def add_run(self, endpoint_id: int, upto_id: int, **columns: Any) -> int:
        columns = {
            "after_id": 0,
            "patterns": ("*",),
            "only_failed": False,
            "rate_per_s": None,
            "source": "log",
        } | columns
        db = await self.db()
        async with db.transaction():
            run_id: int = await db.fetchval(
                f"INSERT INTO webhook.run (endpoint_id, upto_id, total, {', '.join(columns)}) "
                "VALUES ($1, $2, 0, $3, $4, $5, $6, $7) RETURNING id",
                endpoint_id, upto_id, *columns.values(),
            )  # fmt: skip
            await db.execute(
                "INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, $2)", run_id, columns["after_id"]
            )
        return run_id

    async def change_run(self, run_id: int, state: str) -> None:
        await (await self.db()).execute("UPDATE webhook.run SET state = $2 WHERE id = $1", run_id, state)

    async def resend_dead(self, endpoint_id: int, run: int, *event_ids: int) -> None:
        await (await self.db()).execute(
            "UPDATE webhook.dead_letter SET state = 'resent', resent_run = $2 WHERE endpoint_id = $1 AND event_id = ANY ($3::bigint[])",
            endpoint_id, run, event_ids,
        )  # fmt: skip

    async def progress(self, run_id: int) -> tuple[int, int, int, int, bool]:
        [row] = await self._rows(
            "SELECT settled, attempted, delivered, dead, finished_at IS NOT NULL FROM webhook.run_progress WHERE run_id = $1",
            run_id,
        )
        return row  # type: ignore[return-value]

    async def stats(self) -> list[tuple[Any, ...]]:
        return await self._rows(
            "SELECT (extract(epoch FROM minute) / 60)::bigint, endpoint_id, epoch, delivered, failed, dead, duration_ms, durations "
            "FROM webhook.endpoint_stat ORDER BY 1, 2, 3"
        )

    async def _rows(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await (await self.db()).fetch(query, *args)]

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        if self._db is not None:
            await self._db.close()


# ── the twin ──


class MemoryTx:
    def __init__(self, transaction: Transaction) -> None:
        self._tx = transaction
        self._here: Any = None

    @property
    def is_open(self) -> bool:
        return self._tx.is_open

    async def insert(self, count: int = 1, payload: str = "{}", **columns: Any) -> list[int]:
        return [self._tx.insert(payload=payload.encode(), **columns) for _ in range(count)]

    async def savepoint(self) -> None:
        self._here = self._tx.savepoint()

    async def rollback_to(self) -> None:
        self._tx.rollback_to(self._here)

    async def touch_endpoint(self, endpoint_id: int) -> None:
        self._tx.update_endpoint(endpoint_id, timeout_ms=9_999)

    async def touch_subscription(self, subscription_id: int) -> None:
        self._tx.touch_subscription(subscription_id)

    async def subscribe(self, endpoint_id: int, pattern: str) -> int:
        return self._tx.subscribe(endpoint_id, pattern)

    async def prepare(self, name: str) -> None:
        self._tx.prepare(name)

    async def commit(self) -> None:
        self._tx.commit()

    async def rollback(self) -> None:
        self._tx.rollback()


class MemoryWorld(World):
    def __init__(self) -> None:
        seconds = itertools.count(1_700_000_000)
        self.database = MemoryDatabase(now_us=lambda: next(seconds) * 1_000_000, rng=random.Random(1))

    def store(self) -> MemoryStore:
        return MemoryStore(self.database, policy=SETTINGS.address_policy)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[MemoryTx]:
        await asyncio.sleep(0)  # as a real one would
        with self.database.begin() as transaction:
            yield MemoryTx(transaction)

    async def add_endpoint(self, *patterns: str, **columns: Any) -> int:
        with self.database.begin() as transaction:
            columns = {"account_id": "acct", "url": URL, "state": "live", "secrets": SECRETS} | columns
            return transaction.add_endpoint(patterns=patterns or ("*",), **_typed(columns))

    async def update_endpoint(self, endpoint_id: int, **columns: Any) -> None:
        with self.database.begin() as transaction:
            transaction.update_endpoint(endpoint_id, **_typed(columns))

    async def subscriptions(self, endpoint_id: int) -> list[tuple[int, str, int, bool]]:
        rows = self.database.tables.subscriptions.values()
        return [(row.id, row.pattern, row.since_id, row.taken_up) for row in rows if row.endpoint_id == endpoint_id]

    async def commit_prepared(self, name: str) -> None:
        self.database.commit_prepared(name)

    async def sever(self, store: Any, session: str) -> None:
        store.sever(session)

    async def lose_life(self, store: Any) -> None:
        self.database.crash()

    async def attempts(self) -> list[AttemptRow]:
        return [row for _, row in sorted(self.database.tables.attempts.items())]

    async def retries(self) -> list[tuple[Any, ...]]:
        rows = [row for retries in self.database.tables.retries.values() for row in retries.values()]
        return sorted(
            (r.endpoint_id, r.event_id, r.run, r.number, r.first_attempt_us, r.due_us, r.reason) for r in rows
        )

    async def dead_letters(self) -> list[tuple[Any, ...]]:
        return [
            (d.endpoint_id, d.event.id, d.run, d.event.account_id, d.event.type, d.event.payload.decode(), d.attempts,
             d.first_attempt_us, d.reason, d.status, d.fault.value)
            for _, d in sorted(self.database.tables.dead_letters.items())
        ]  # fmt: skip

    async def forget_events(self, ids: Sequence[int]) -> None:
        tables = self.database.tables
        for event_id in ids:
            tables.ids.remove(event_id)
            tables.ids_of_account[tables.outbox.pop(event_id).account_id].remove(event_id)

    async def add_run(self, endpoint_id: int, upto_id: int, **columns: Any) -> int:
        columns = dict(columns)
        source = columns.pop("source", "log")
        with self.database.begin() as transaction:
            return transaction.add_run(endpoint_id, upto_id, dead=() if source == "dead_letter" else None, **columns)

    async def change_run(self, run_id: int, state: str) -> None:
        with self.database.begin() as transaction:
            transaction.update_run(run_id, state=RunState(state))

    async def resend_dead(self, endpoint_id: int, run: int, *event_ids: int) -> None:
        keys = [key for key in self.database.tables.dead_letters if key[0] == endpoint_id and key[1] in event_ids]
        self.database.tables.resend_dead(keys, run)

    async def progress(self, run_id: int) -> tuple[int, int, int, int, bool]:
        tables = self.database.tables
        _, run = tables.runs[run_id]
        return run.settled, run.attempted, run.delivered, run.dead, run_id in tables.runs_finished

    async def stats(self) -> list[tuple[Any, ...]]:
        return [
            (*key, s.delivered, s.failed, s.dead, s.duration_ms, s.durations)
            for key, s in sorted(self.database.tables.stats.items())
        ]

    async def close(self) -> None:
        pass


def _typed(columns: dict[str, Any]) -> dict[str, Any]:
    if "state" in columns:
        columns["state"] = EndpointState(columns["state"])
    if columns.get("retry_schedule_s") is not None:
        columns["retry_schedule_s"] = tuple(columns["retry_schedule_s"])
    return columns


def same_json(one: bytes, other: Any) -> bool:
    return bool(json.loads(one) == other)


def shorten_watch(monkeypatch: Any, stale_s: float) -> None:
    """Have a standby give up on an owner after `stale_s`, and look so much oftener."""
    for name in ("STALE_S", "POLL_S", "STEP_MAX_S"):
        monkeypatch.setattr(standby, name, getattr(standby, name) * stale_s / 3)
