"""The twin's server: what PostgreSQL does to a dispatcher, without PostgreSQL.

`MemoryDatabase` has tables, a WAL, locks, connections. Its methods are atomic (no await), so a simulation decides between which of
them the dispatcher's tasks run. `Transaction` is what producers and operators do.

**Writes** are operations, appended to the WAL and applied to the tables in one go. A synchronous commit flushes all the WAL before it; the
recorder's doesn't. `crash` keeps what was flushed and a random part of the rest, and replays it. Ids come from a sequence that logs ahead: after
a crash it skips, and an id whose transaction was not flushed may be handed out again.

**Locks** are those that the design leans on: the writers' lock on the log (`holders`), the owner's, the doorbell's (shared by producers who
chose silence, exclusive for a sleeping dispatcher), the lock that orders configuration changes, and rows that an open transaction has changed.
What would wait in PostgreSQL raises `WouldBlockError` for the caller of the database, and is away for the store after its lock timeout.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from dispatcher.domain.endpoint import EndpointState, pattern_matches
from dispatcher.domain.event import PublicIds, timestamp
from dispatcher.domain.filters import Rule
from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.ports import (
    Holders,
)
from dispatcher.store.memory_tables import (
    EndpointRow,
    LogRow,
    Operation,
    PreparedRow,
    RetryKey,
    SubscriptionRow,
    Tables,
)

CONFIG_LOCK = "configuration changes"
SEQUENCE_LOG_AHEAD = 32  # PostgreSQL's SEQ_LOG_VALS
ID_KEY_BYTES = 16
TUPLE_HEADER_BYTES = 32  # with the null bitmap, aligned
TOAST_TUPLE_BYTES = 2_032  # TOAST_TUPLE_THRESHOLD with 8 kB pages: larger rows store their payload outside


class WouldBlockError(Exception):
    """In PostgreSQL this statement would wait for another transaction."""


class TransactionOverError(Exception):
    """The transaction has ended: by its own doing, or with its connection in a crash or a restart."""


class CannotPrepareError(Exception):
    """PREPARE TRANSACTION fails after a NOTIFY; the transaction is rolled back."""


class Connection:
    """A session's connection. The server may notice later than the client that it has ended (`is_open` outlives `is_alive`)."""

    __slots__ = ("inbox", "is_alive", "is_listening", "is_open", "on_lost", "wake")

    def __init__(self, on_lost: Callable[["Connection"], None]) -> None:
        self.is_alive = True
        self.is_open = True
        self.is_listening = False
        self.inbox: list[str] = []
        self.wake = asyncio.Event()  # something is in the inbox, or the connection has ended
        self.on_lost = on_lost


@dataclass(slots=True)
class _Lock:
    """An exclusive advisory lock: a session may take it several times, and must give it back as often."""

    holder: Connection | None = None
    times: int = 0

    def try_take(self, connection: Connection) -> bool:
        if self.holder is not None and self.holder is not connection:
            return False
        self.holder = connection
        self.times += 1
        return True

    def give_back(self, connection: Connection) -> None:
        if self.holder is connection:
            self.times -= 1
            if self.times == 0:
                self.holder = None

    def forget(self, connection: Connection) -> None:
        if self.holder is connection:
            self.holder, self.times = None, 0


def origin_of(url: str) -> str:
    """Return what others are told of an endpoint's URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/"


class MemoryDatabase:
    """The server. `now_us` is its clock, in µs since 1970; `rng` decides what a crash loses."""

    def __init__(self, *, now_us: Callable[[], int], rng: random.Random) -> None:
        self.tables = Tables()
        self.now_us = now_us
        self.is_up = True  # False: nobody can connect
        self.life: int | None = None  # the token in `life`; None after a crash
        self.loses_notification: Callable[[], bool] = lambda: False
        self.public_ids = PublicIds(rng.randbytes(ID_KEY_BYTES))
        self._rng = rng
        self._wal: list[Operation] = []
        self._flushed = 0
        self._server_start = 1
        self._lives = 0
        self._sequence = 0
        self._xids = 0
        self._endpoint_ids = 0
        self._subscription_ids = 0
        self._run_ids = 0
        self._open: dict[Transaction, None] = {}
        self._connections: dict[Connection, None] = {}
        self.owner_lock = _Lock()
        self.standbys: dict[Connection, None] = {}
        self.doorbell_lock = _Lock()

    # ── producers and operators ──

    def begin(self) -> "Transaction":
        """Open a transaction: `commit`, `rollback` or `prepare` it, or use it in a `with`, which commits."""
        assert self.is_up, "the server is down"
        self._xids += 1
        transaction = Transaction(self, self._xids)
        self._open[transaction] = None
        return transaction

    def insert(
        self, count: int = 1, *, account_id: str = "acct", type: str = "message.sent", payload: bytes = b"{}", **options: Any
    ) -> list[int]:  # fmt: skip
        """Insert events in a transaction of their own; return their ids."""
        with self.begin() as transaction:
            return [transaction.insert(account_id, type, payload, **options) for _ in range(count)]

    def commit_prepared(self, name: str) -> None:
        self.write(partial(Tables.end_prepared, name=name, commit=True), synchronous=True)

    def rollback_prepared(self, name: str) -> None:
        self.write(partial(Tables.end_prepared, name=name, commit=False), synchronous=True)

    @property
    def open_transactions(self) -> list["Transaction"]:
        return list(self._open)

    def last_id(self) -> int:
        """The last id handed out."""
        return self._sequence

    # ── what happens to servers ──

    def flush(self) -> None:
        """Flush the WAL, as its writer does a few times a second."""
        self._flushed = len(self._wal)

    def crash(self) -> None:
        """Lose all memory and a random part of the WAL that was not flushed; recover. `life` is empty now."""
        kept = self._rng.randint(self._flushed, len(self._wal))
        del self._wal[kept:]
        self._flushed = kept
        self.tables = Tables()
        for operation in self._wal:
            operation(self.tables)
        self._sequence = self.tables.sequence_logged
        self.life = None
        self._come_up()

    def restart(self) -> None:
        """Stop in an orderly way and start again: nothing is lost but connections and open transactions."""
        self.flush()
        self._come_up()

    def _come_up(self) -> None:
        self._server_start += 1
        for transaction in list(self._open):
            transaction.end()
        for connection in list(self._connections):
            self.disconnect(connection)

    # ── for Transaction and MemoryStore ──

    def write(self, operation: Operation, *, synchronous: bool) -> None:
        self._wal.append(operation)
        operation(self.tables)
        if synchronous:
            self.flush()

    def next_id(self) -> int:
        self._sequence += 1
        if self._sequence > self.tables.sequence_logged:
            self.write(partial(Tables.log_sequence, value=self._sequence + SEQUENCE_LOG_AHEAD), synchronous=False)
        return self._sequence

    def next_endpoint_id(self) -> int:
        self._endpoint_ids += 1
        return self._endpoint_ids

    def next_subscription_id(self) -> int:
        self._subscription_ids += 1
        return self._subscription_ids

    def next_run_id(self) -> int:
        self._run_ids += 1
        return self._run_ids

    def begin_life(self) -> int:
        if self.life is None:
            self._lives += 1
            self.life = self._lives
        return self.life

    def holders(self) -> Holders:
        running = frozenset(t.virtual_id for t in self._open if t.holds_log_lock)
        prepared = frozenset(
            _virtual_id(p.xid) if p.server_start == self._server_start else f"-1/{p.xid}"
            for p in self.tables.prepared.values()
        )
        return Holders(running, prepared)

    @property
    def server_start(self) -> int:
        return self._server_start

    def try_arm(self, connection: Connection) -> bool:
        """Take the doorbell's lock exclusively, unless a transaction that chose silence is open."""
        if any(t.is_silent for t in self._open) or any(p.is_silent for p in self.tables.prepared.values()):
            return False
        return self.doorbell_lock.try_take(connection)

    def changing(self, lock: str) -> bool:
        """Tell whether an open transaction holds a row's lock, or that of configuration changes."""
        return any(lock in transaction.locks for transaction in self._open)

    def notify(self, channel: str) -> None:
        for connection in self._connections:
            if connection.is_listening and connection.is_alive and not self.loses_notification():
                connection.inbox.append(channel)
                connection.wake.set()

    def connect(self, on_lost: Callable[[Connection], None]) -> Connection:
        connection = Connection(on_lost)
        self._connections[connection] = None
        return connection

    def disconnect(self, connection: Connection) -> None:
        """End a connection on both sides."""
        self.reap(connection)
        if connection.is_alive:
            connection.is_alive = False
            connection.wake.set()
            connection.on_lost(connection)

    def reap(self, connection: Connection | None = None) -> None:
        """Let the server notice that clients are gone (`connection`: this one): their locks are free."""
        for gone in [c for c in self._connections if not c.is_alive] if connection is None else [connection]:
            gone.is_open = False
            self._connections.pop(gone, None)
            self.owner_lock.forget(gone)
            self.doorbell_lock.forget(gone)

    def over(self, transaction: "Transaction") -> None:
        self._open.pop(transaction, None)


@dataclass(slots=True, eq=False)
class Transaction:
    """A producer's or an operator's transaction. What it did is seen by others at its commit; its ids are taken at once."""

    database: MemoryDatabase
    xid: int
    rows: list[LogRow] = field(default_factory=list)
    changes: list[Operation] = field(default_factory=list)
    changed_endpoints: list[int] = field(default_factory=list)
    erases: bool = False
    locks: set[str] = field(default_factory=set)
    holds_log_lock: bool = False
    is_silent: bool = False  # holds the doorbell's lock, shared
    rings: bool = False
    is_open: bool = True

    @property
    def virtual_id(self) -> str:
        return _virtual_id(self.xid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_open:
            self.rollback() if kind else self.commit()

    # ── producers ──

    def lock_log(self) -> None:
        """Begin an INSERT: its lock is held, its id not taken yet."""
        self._check_open()
        self.holds_log_lock = True

    def write_row(
        self, account_id: str, type: str, payload: bytes, occurred_us: int | None = None, **options: Any
    ) -> int:
        """Take an id and write the row; the statement's trigger has yet to run (`ring`). `options`: ordering_key, expires_us, priority,
        traceparent."""
        self.lock_log()
        database = self.database
        row_id = database.next_id()
        stored_bytes = _stored_bytes(account_id, type, payload, occurred_us, **options)
        now_us = database.now_us()
        self.rows.append(LogRow(row_id, account_id, type, payload, now_us, occurred_us, stored_bytes, **options))
        return row_id

    def ring(self) -> None:
        """The doorbell's trigger: share its lock and stay silent, or ring at the commit."""
        self._check_open()
        if self.database.doorbell_lock.holder is None:
            self.is_silent = True
        else:
            self.rings = True

    def insert(
        self,
        account_id: str = "acct",
        type: str = "message.sent",
        payload: bytes = b"{}",
        occurred_us: int | None = None,
        **options: Any,
    ) -> int:
        """Insert one event as one statement; return its id."""  # fmt: skip
        row_id = self.write_row(account_id, type, payload, occurred_us, **options)
        self.ring()
        return row_id

    def savepoint(self) -> tuple[int, bool, bool]:
        self._check_open()
        return len(self.rows), self.is_silent, self.rings

    def rollback_to(self, savepoint: tuple[int, bool, bool]) -> None:
        """Undo producers' statements since the savepoint, the doorbell's lock and ring included. The ids stay taken."""
        self._check_open()
        count, self.is_silent, self.rings = savepoint
        del self.rows[count:]

    # ── operators ──

    def add_endpoint(
        self,
        account_id: str = "acct",
        url: str = "http://receiver.test/hook",
        *,
        patterns: Sequence[str] = ("*",),
        state: EndpointState = EndpointState.LIVE,
        **columns: Any,
    ) -> int:
        self._lock_config()
        endpoint_id = self.database.next_endpoint_id()
        row = EndpointRow(endpoint_id, account_id, url, state, **columns)
        self._change(endpoint_id, partial(Tables.put_endpoint, row=row))
        for pattern in patterns:
            self.subscribe(endpoint_id, pattern, rule=row.rule)
        return endpoint_id

    def update_endpoint(self, endpoint_id: int, **columns: Any) -> None:
        self._lock_row(f"endpoint {endpoint_id}")
        self._lock_config()
        self._change(endpoint_id, partial(Tables.update_endpoint, endpoint_id=endpoint_id, columns=columns))

    def pause(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.PAUSED, paused_at_id=self.database.last_id())

    def resume(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.LIVE, paused_at_id=None)

    def resume_and_skip(self, endpoint_id: int) -> None:
        """Put a paused endpoint live; what was held is never sent."""
        held_at = self.database.tables.endpoints[endpoint_id].paused_at_id
        assert held_at is not None, "it is paused"
        self.resume(endpoint_id)
        for row in [row for row in self.database.tables.subscriptions.values() if row.endpoint_id == endpoint_id]:
            until_id = max(row.since_id, held_at)
            if row.until_id is None or row.until_id > until_id:
                change = partial(Tables.update_subscription, subscription_id=row.id, columns={"until_id": until_id})
                self._change(endpoint_id, change)
            if row.until_id is None:
                self.subscribe(endpoint_id, row.pattern)

    def rotate_secret(self, endpoint_id: int, secret: str, overlap_us: int) -> None:
        """Let a new secret sign, and what signs now for so much longer."""
        now_us = self.database.now_us()
        row = self.database.tables.endpoints[endpoint_id]
        expiring = [*((old, now_us + overlap_us) for old in row.secrets), *row.expiring]
        self.update_endpoint(endpoint_id, secrets=(secret,), expiring=tuple(expiring))

    def erase_event(self, event_id: int, account_id: str) -> None:
        """Erase an event that has no dead letter, and its retries. What is in flight comes back later: erase it again then."""
        self._lock_config()
        endpoint_ids = [row.id for row in self.database.tables.endpoints.values() if row.account_id == account_id]
        self.changes.append(partial(Tables.erase_event, event_id=event_id, endpoint_ids=endpoint_ids))
        self.erases = True

    def delete_endpoint(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.DELETED)

    def refilter(self, endpoint_id: int, rule: Rule | None) -> None:
        """Edit an endpoint's filters: its subscriptions end here, and new ones begin."""
        self.update_endpoint(endpoint_id, rule=rule)
        for row in list(self.database.tables.subscriptions.values()):
            if row.endpoint_id == endpoint_id and row.until_id is None:
                self.unsubscribe(row.id)
                self.subscribe(endpoint_id, row.pattern, rule=rule)

    def subscribe(
        self, endpoint_id: int, pattern: str, *, since_id: int | None = None, rule: Rule | None = None
    ) -> int:
        """Subscribe to what comes after the last id handed out now, which may be long before the commit."""
        self._lock_config()
        subscription_id = self.database.next_subscription_id()
        since = self.database.last_id() if since_id is None else since_id
        row = SubscriptionRow(subscription_id, endpoint_id, pattern, since, rule=rule)
        self._change(endpoint_id, partial(Tables.put_subscription, row=row))
        return subscription_id

    def unsubscribe(self, subscription_id: int) -> None:
        self._lock_row(f"subscription {subscription_id}")
        self._lock_config()
        change = partial(
            Tables.update_subscription,
            subscription_id=subscription_id,
            columns={"until_id": self.database.last_id()},
        )
        self._change(self.database.tables.subscriptions[subscription_id].endpoint_id, change)

    def tell_of_endpoint(
        self, about: EndpointRow, event_type: str, reason: str, failing_since_us: int | None, **facts: Any
    ) -> None:
        """Tell the account's other endpoints: its own subscriptions are divided around that one event."""
        since = None if failing_since_us is None else timestamp(failing_since_us).decode()
        who = {"id": about.id, "name": about.name, "url": origin_of(about.url)}
        payload = orjson.dumps({"endpoint": who, "reason": reason, "failing_since": since, **facts})
        told = self.insert(about.account_id, event_type, payload)
        for row in list(self.database.tables.subscriptions.values()):
            if row.endpoint_id == about.id and row.until_id is None and pattern_matches(row.pattern, event_type):
                columns = {"until_id": told - 1}
                change = partial(Tables.update_subscription, subscription_id=row.id, columns=columns)
                self._change(about.id, change)
                self.subscribe(about.id, row.pattern, since_id=told, rule=row.rule)

    def add_run(
        self,
        endpoint_id: int,
        upto_id: int | None = None,
        *,
        after_id: int = 0,
        patterns: tuple[str, ...] = ("*",),
        only_failed: bool = False,
        rate_per_s: float | None = None,
        dead: Sequence[RetryKey] | None = None,
    ) -> int:
        """Ask for a resend or replay, up to the last id now; of dead letters, if some are given."""
        self._lock_config()
        run_id = self.database.next_run_id()
        run = Run(
            id=run_id,
            source=RunSource.LOG if dead is None else RunSource.DEAD_LETTER,
            after_id=after_id,
            upto_id=self.database.last_id() if upto_id is None else upto_id,
            patterns=patterns,
            only_failed=only_failed,
            rate_per_s=rate_per_s,
            state=RunState.RUNNING,
            settled=after_id,
            rule=None if dead is not None else self.database.tables.endpoints[endpoint_id].rule,
        )
        self._change(endpoint_id, partial(Tables.put_run, endpoint_id=endpoint_id, run=run))
        if dead is not None:
            self.changes.append(partial(Tables.resend_dead, keys=tuple(dead), run_id=run_id))
        return run_id

    def update_run(self, run_id: int, **columns: Any) -> None:
        self._lock_row(f"run {run_id}")
        self._lock_config()
        endpoint_id, _ = self.database.tables.runs[run_id]
        self._change(endpoint_id, partial(Tables.update_run, run_id=run_id, columns=columns))

    def touch_subscription(self, subscription_id: int) -> None:
        """Lock a subscription's row, as SELECT … FOR UPDATE does."""
        self._lock_row(f"subscription {subscription_id}")

    def _change(self, endpoint_id: int, operation: Operation) -> None:
        self.changes.append(operation)
        self.changed_endpoints.append(endpoint_id)

    def _lock_config(self) -> None:
        self._lock_row(CONFIG_LOCK)

    def _lock_row(self, lock: str) -> None:
        self._check_open()
        if lock not in self.locks and self.database.changing(lock):
            raise WouldBlockError(lock)
        self.locks.add(lock)

    # ── ending ──

    def commit(self, *, asynchronous: bool = False) -> None:
        self._check_open()
        self.end()
        if self.rows or self.changes:
            operation = partial(
                Tables.commit,
                rows=tuple(self.rows),
                changes=tuple(self.changes),
                changed_endpoints=tuple(self.changed_endpoints),
            )
            self.database.write(operation, synchronous=not asynchronous)
        if self.rings:
            self.database.notify("doorbell")
        if self.changed_endpoints or self.erases:
            self.database.notify("config")

    def rollback(self) -> None:
        self._check_open()
        self.end()

    def prepare(self, name: str) -> None:
        """Hand the transaction over to the server under `name`; raises CannotPrepareError, having rolled back, after a NOTIFY."""
        self._check_open()
        self.end()
        if self.rings or self.changed_endpoints or self.erases:
            raise CannotPrepareError(name)
        prepared = PreparedRow(self.xid, self.database.server_start, tuple(self.rows), self.is_silent)
        self.database.write(partial(Tables.prepare, name=name, prepared=prepared), synchronous=True)

    def end(self) -> None:
        """Free the locks. Not for callers: it is how a crash ends a transaction."""
        self.is_open = False
        self.database.over(self)

    def _check_open(self) -> None:
        if not self.is_open:
            raise TransactionOverError(self.virtual_id)


def _virtual_id(xid: int) -> str:
    return f"3/{xid}"


def _stored_bytes(
    account_id: str, type: str, payload: bytes, occurred_us: int | None, ordering_key: str | None = None, expires_us: int | None = None,
    priority: int | None = None, traceparent: str | None = None,
) -> int:  # fmt: skip
    """Return pg_column_size(payload): a varlena has a header of 1 byte up to 126 bytes, of 4 beyond, and none outside of its row."""
    size = 8  # id
    for length in (len(account_id.encode()), len(type.encode()), len(payload)):
        size = size + length + 1 if length <= 126 else (size + 3) // 4 * 4 + length + 4
    for _ in range(1 if occurred_us is None else 2):
        size = (size + 7) // 8 * 8 + 8
    if ordering_key is not None:
        size += len(ordering_key.encode()) + 1
    if expires_us is not None:
        size = (size + 7) // 8 * 8 + 8
    if priority is not None:
        size = (size + 1) // 2 * 2 + 2
    if traceparent is not None:
        size += len(traceparent.encode()) + 1
    if TUPLE_HEADER_BYTES + size > TOAST_TUPLE_BYTES:
        return len(payload)
    return len(payload) + (1 if len(payload) <= 126 else 4)
