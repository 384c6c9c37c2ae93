"""The store's twin in memory: what PostgreSQL does to a dispatcher, without PostgreSQL.

`MemoryDatabase` is the server: tables, a WAL, locks, connections. Its methods are atomic (no await), so a simulation decides between which of
them the dispatcher's tasks run. `MemoryStore` is one dispatcher's five sessions on it and implements the `Store` port; it passes the same suite
as the real store (tests/store/test_conformance.py).

**Writes** are operations, appended to the WAL and applied to the tables in one go. A synchronous commit flushes all the WAL before it; the
recorder's doesn't. `crash` keeps what was flushed and a random part of the rest, and replays it. Ids come from a sequence that logs ahead: after
a crash it skips, and an id whose transaction was not flushed may be handed out again.

**Locks** are those that the design leans on: the writers' lock on the log (`holders`), the owner's, the doorbell's (shared by producers who
chose silence, exclusive for a sleeping dispatcher), the lock that orders configuration changes, and rows that an open transaction has changed.
What would wait in PostgreSQL raises `WouldBlockError` for the caller of the database, and is away for the store after its lock timeout.

**Faults** are hooks: `MemoryStore.fate` lets a call's connection die before or after the call took effect, `MemoryStore.sever` ends a session,
`MemoryDatabase.loses_notification` drops a ring, `MemoryDatabase.is_up` makes the server unreachable. Time comes from `now_us`, chance
from `rng`, and every call of the port yields through `pause` on its way there and back.
"""

import asyncio
import dataclasses
import random
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import orjson

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.endpoint import FOREVER, Endpoint, EndpointId, EndpointState, Subscription
from dispatcher.domain.event import Event, PublicIds, timestamp
from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.url import parse_url
from dispatcher.errors import InputError
from dispatcher.ports import (
    AttemptRow,
    Batch,
    ConfigChanges,
    DueRetry,
    FencedError,
    HeadPage,
    Holders,
    LaneRow,
    LifeLostError,
    Page,
    RetryPage,
    RetryRow,
    Started,
    StoreAwayError,
)

T = TypeVar("T")
RetryKey = tuple[int, int, int]  # endpoint, event, run

OWNER_WAIT_S, OWNER_POLL_S = 10.0, 0.1
SEQUENCE_LOG_AHEAD = 32  # PostgreSQL's SEQ_LOG_VALS
CONFIG_CHANGES_KEPT = 1_000
ID_KEY_BYTES = 16


class WouldBlockError(Exception):
    """In PostgreSQL this statement would wait for another transaction."""


class TransactionOverError(Exception):
    """The transaction has ended: by its own doing, or with its connection in a crash or a restart."""


class CannotPrepareError(Exception):
    """PREPARE TRANSACTION fails after a NOTIFY; the transaction is rolled back."""


# ── rows ──


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of the outbox. `stored_bytes` is what pg_column_size(payload) says."""

    id: int
    account_id: str
    type: str
    payload: bytes
    created_us: int
    occurred_us: int | None
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    endpoint_id: int
    event: LogRow
    run: int
    attempts: int
    first_attempt_us: int
    reason: str
    status: int | None
    fault: Fault


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    id: int
    endpoint_id: int
    pattern: str
    since_id: int
    until_id: int | None = None
    taken_up: bool = False


@dataclass(frozen=True, slots=True)
class EndpointRow:
    id: int
    account_id: str
    url: str
    state: EndpointState = EndpointState.DRAFT
    secrets: tuple[str, ...] = ()
    name: str = ""
    state_reason: str | None = None
    paused_at_id: int | None = None
    timeout_ms: int = 10_000
    rate_per_s: float | None = None
    rate_burst: int | None = None
    in_flight_max: int | None = None
    retry_schedule_s: tuple[int, ...] | None = None
    failing_since_us: int | None = None


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A prepared transaction. It keeps its virtual transaction's name until the server that prepared it ends."""

    xid: int
    server_start: int
    rows: tuple[LogRow, ...]
    is_silent: bool


Operation = Callable[["Tables"], None]


class Tables:
    """What the WAL has made so far. Methods that change something are operations: they depend on nothing but the tables and arguments."""

    def __init__(self) -> None:
        self.outbox: dict[int, LogRow] = {}
        self.ids: list[int] = []  # ascending; the primary key
        self.ids_of_account: defaultdict[str, list[int]] = defaultdict(list)  # the index (account_id, id)
        self.attempts: dict[tuple[int, int, int, int], AttemptRow] = {}  # event, endpoint, run, number
        self.attempted: defaultdict[int, dict[int, None]] = defaultdict(dict)  # event → endpoints with a run-0 attempt
        self.retries: defaultdict[int, dict[tuple[int, int], RetryRow]] = defaultdict(dict)  # endpoint → (event, run)
        self.dead_letters: dict[RetryKey, DeadLetter] = {}
        self.lanes: dict[int, LaneRow] = {}
        self.position = 0
        self.gaps = IdRanges()
        self.epoch = 0
        self.owner: str | None = None
        self.heartbeat_us: int | None = None
        self.endpoints: dict[int, EndpointRow] = {}
        self.subscriptions: dict[int, SubscriptionRow] = {}
        self.config_changes: list[tuple[int, int]] = []  # seq, endpoint
        self.config_seq = 0
        self.prepared: dict[str, PreparedRow] = {}
        self.sequence_logged = 0

    # ── operations ──

    def log_sequence(self, value: int) -> None:
        self.sequence_logged = value

    def commit(self, rows: Sequence[LogRow], changes: Sequence[Operation], changed_endpoints: Sequence[int]) -> None:
        for row in rows:
            self.outbox[row.id] = row
            insort(self.ids, row.id)
            insort(self.ids_of_account[row.account_id], row.id)
        for change in changes:
            change(self)
        for endpoint_id in changed_endpoints:
            self.config_seq += 1
            self.config_changes.append((self.config_seq, endpoint_id))

    def prepare(self, name: str, prepared: PreparedRow) -> None:
        self.prepared[name] = prepared

    def end_prepared(self, name: str, *, commit: bool) -> None:
        prepared = self.prepared.pop(name)
        if commit:
            self.commit(prepared.rows, (), ())

    def put_endpoint(self, row: EndpointRow) -> None:
        self.endpoints[row.id] = row

    def update_endpoint(self, endpoint_id: int, columns: dict[str, Any]) -> None:
        self.endpoints[endpoint_id] = dataclasses.replace(self.endpoints[endpoint_id], **columns)

    def put_subscription(self, row: SubscriptionRow) -> None:
        self.subscriptions[row.id] = row

    def update_subscription(self, subscription_id: int, columns: dict[str, Any]) -> None:
        self.subscriptions[subscription_id] = dataclasses.replace(self.subscriptions[subscription_id], **columns)

    def raise_epoch(self, owner: str, now_us: int) -> None:
        self.epoch += 1
        self.owner, self.heartbeat_us = owner, now_us

    def tidy(self) -> None:
        """Forget what deleted endpoints left behind, and old configuration changes."""
        for row in self.endpoints.values():
            if row.state is EndpointState.DELETED:
                self.lanes.pop(row.id, None)
                self.retries.pop(row.id, None)
        self.config_changes = [c for c in self.config_changes if c[0] >= self.config_seq - CONFIG_CHANGES_KEPT]

    def record(self, batch: Batch, taken_up: Sequence[int], now_us: int) -> None:
        for attempt in batch.attempts:
            key = (attempt.event_id, attempt.endpoint_id, attempt.run, attempt.number)
            if key not in self.attempts:
                self.attempts[key] = attempt
                if attempt.run == 0:
                    self.attempted[attempt.event_id][attempt.endpoint_id] = None
        for retry in batch.retries:
            retries = self.retries[retry.endpoint_id]
            known = retries.get((retry.event_id, retry.run))
            if known is None:
                retries[retry.event_id, retry.run] = retry
            elif known.number < retry.number:
                retries[retry.event_id, retry.run] = dataclasses.replace(
                    known, number=retry.number, due_us=retry.due_us, reason=retry.reason
                )
        for dead in batch.dead:
            event = self.outbox.get(dead.event_id)
            if event is not None:
                self.dead_letters.setdefault(
                    (dead.endpoint_id, dead.event_id, dead.run),
                    DeadLetter(
                        dead.endpoint_id, event, dead.run, dead.attempts, dead.first_attempt_us, dead.reason, dead.status, dead.fault
                    ),
                )  # fmt: skip
        for endpoint_id, event_id, run in batch.settled_retries:
            self.retries[endpoint_id].pop((event_id, run), None)
        write = batch.checkpoint
        if write is not None:
            for lane in write.lanes:
                self.lanes[lane.endpoint_id] = _lane_copy(lane)
            for endpoint_id in write.lanes_gone:
                self.lanes.pop(endpoint_id, None)
            for subscription_id in taken_up:
                self.update_subscription(subscription_id, {"taken_up": True})
            self.position, self.gaps, self.heartbeat_us = write.position, write.gaps.copy(), now_us

    # ── reading ──

    def above(self, after: int, limit: int) -> list[LogRow]:
        at = bisect_right(self.ids, after)
        return [self.outbox[i] for i in self.ids[at : at + limit]]

    def between(self, low: int, high: int, limit: int, account_id: str | None = None) -> list[LogRow]:
        ids = self.ids if account_id is None else self.ids_of_account.get(account_id, [])
        at = bisect_left(ids, low)
        return [self.outbox[i] for i in ids[at : min(at + limit, bisect_right(ids, high))]]

    def attempted_by(self, rows: Iterable[LogRow]) -> list[Sequence[int]]:
        return [tuple(self.attempted[row.id]) if row.id in self.attempted else () for row in rows]

    def violations(self) -> list[str]:
        """Say where DESIGN §4's invariant doesn't hold: an event that nobody would look for any more."""
        found = []
        wanted: defaultdict[str, dict[int, list[SubscriptionRow]]] = defaultdict(dict)
        for s in self.subscriptions.values():
            endpoint = self.endpoints[s.endpoint_id]
            if endpoint.state is not EndpointState.DELETED:
                wanted[endpoint.account_id].setdefault(endpoint.id, []).append(s)
        newest: dict[RetryKey, AttemptRow] = {}
        for (event_id, endpoint_id, run, number), attempt in self.attempts.items():
            known = newest.get((endpoint_id, event_id, run))
            if known is None or known.number < number:
                newest[endpoint_id, event_id, run] = attempt
        for event in self.outbox.values():
            for endpoint_id, subscriptions in wanted.get(event.account_id, {}).items():
                matching = [s for s in subscriptions if _subscription(s).matches(event.type, event.id)]
                last = newest.get((endpoint_id, event.id, 0))
                lane = self.lanes.get(endpoint_id)
                if not matching:
                    continue
                if last is not None:
                    is_final = last.fault is None or (endpoint_id, event.id, 0) in self.dead_letters
                    if not is_final and (event.id, 0) not in self.retries.get(endpoint_id, {}):
                        found.append(
                            f"event {event.id}, endpoint {endpoint_id}: attempt {last.number} failed, no retry row"
                        )
                elif not (
                    event.id > self.position
                    or event.id in self.gaps
                    or (lane is not None and (event.id > lane.settled or event.id in lane.holes))
                    or any(not s.taken_up for s in matching)
                ):
                    found.append(
                        f"event {event.id}, endpoint {endpoint_id}: neither settled nor to be read again "
                        f"(position {self.position}, gaps {self.gaps}, lane {lane})"
                    )
        return found


# ── the server ──


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
        self._open: dict[Transaction, None] = {}
        self._connections: dict[Connection, None] = {}
        self.owner_lock = _Lock()
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
        self, count: int = 1, *, account_id: str = "acct", type: str = "message.sent", payload: bytes = b"{}"
    ) -> list[int]:
        """Insert events in a transaction of their own; return their ids."""  # fmt: skip
        with self.begin() as transaction:
            return [transaction.insert(account_id, type, payload) for _ in range(count)]

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


CONFIG_LOCK = "configuration changes"


@dataclass(slots=True, eq=False)
class Transaction:
    """A producer's or an operator's transaction. What it did is seen by others at its commit; its ids are taken at once."""

    database: MemoryDatabase
    xid: int
    rows: list[LogRow] = field(default_factory=list)
    changes: list[Operation] = field(default_factory=list)
    changed_endpoints: list[int] = field(default_factory=list)
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

    def write_row(self, account_id: str, type: str, payload: bytes, occurred_us: int | None = None) -> int:
        """Take an id and write the row; the statement's trigger has yet to run (`ring`)."""
        self.lock_log()
        database = self.database
        row_id = database.next_id()
        stored_bytes = _stored_bytes(account_id, type, payload, occurred_us)
        self.rows.append(LogRow(row_id, account_id, type, payload, database.now_us(), occurred_us, stored_bytes))
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
    ) -> int:
        """Insert one event as one statement; return its id."""  # fmt: skip
        row_id = self.write_row(account_id, type, payload, occurred_us)
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
            self.subscribe(endpoint_id, pattern)
        return endpoint_id

    def update_endpoint(self, endpoint_id: int, **columns: Any) -> None:
        self._lock_row(f"endpoint {endpoint_id}")
        self._lock_config()
        self._change(endpoint_id, partial(Tables.update_endpoint, endpoint_id=endpoint_id, columns=columns))

    def pause(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.PAUSED, paused_at_id=self.database.last_id())

    def resume(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.LIVE, paused_at_id=None)

    def delete_endpoint(self, endpoint_id: int) -> None:
        self.update_endpoint(endpoint_id, state=EndpointState.DELETED)

    def subscribe(self, endpoint_id: int, pattern: str, *, since_id: int | None = None) -> int:
        """Subscribe to what comes after the last id handed out now, which may be long before the commit."""
        self._lock_config()
        subscription_id = self.database.next_subscription_id()
        since = self.database.last_id() if since_id is None else since_id
        row = SubscriptionRow(subscription_id, endpoint_id, pattern, since)
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
        if self.changed_endpoints:
            self.database.notify("config")

    def rollback(self) -> None:
        self._check_open()
        self.end()

    def prepare(self, name: str) -> None:
        """Hand the transaction over to the server under `name`; raises CannotPrepareError, having rolled back, after a NOTIFY."""
        self._check_open()
        self.end()
        if self.rings or self.changed_endpoints:
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


# ── one dispatcher ──


class Fate(Enum):
    """What becomes of a call. Both losses are a StoreAwayError: its caller can't tell them apart."""

    DONE = "done"
    LOST_BEFORE = "lost before it took effect"
    LOST_AFTER = "lost after it took effect"


class MemoryStore:
    """The `Store` port on a MemoryDatabase.

    `fate` is asked for each call, and for each "connect", with the session and what it is about to do. `pause` is awaited wherever a real
    call would wait for the network, `sleep` while another holds the owner lock.
    """

    SESSIONS = ("owner", "listener", "reader", "recorder", "config")

    def __init__(
        self,
        database: MemoryDatabase,
        *,
        policy: AddressPolicy | None = None,
        pause: Callable[[], Awaitable[None]] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.fate: Callable[[str, str], Fate] = lambda session, what: Fate.DONE
        self._database = database
        self._policy = policy or AddressPolicy(allow_http=True)
        self._pause = pause or _yield
        self._sleep = sleep
        self._connections: dict[str, Connection] = {}
        self._life: int | None = None
        self._epoch = 0
        self._owner_lost: Callable[[], None] | None = None

    def sever(self, session: str, *, lingering: bool = False) -> None:
        """End a session's connection from outside. `lingering`: the server keeps its locks until `MemoryDatabase.reap`."""
        connection = self._connections.get(session)
        if connection is None or not connection.is_alive:
            return
        if lingering:
            connection.is_alive = False
            connection.wake.set()
            connection.on_lost(connection)
        else:
            self._database.disconnect(connection)

    # ── start and ownership ──

    async def start(self, owner: str) -> Started:
        await self.close()
        self._life = None
        database = self._database
        waited_s = 0.0
        while not await self._call("owner", "try_own", database.owner_lock.try_take):
            if waited_s >= OWNER_WAIT_S:
                raise FencedError(f"another dispatcher owns this database: {database.tables.owner}")
            await self._sleep(OWNER_POLL_S)
            waited_s += OWNER_POLL_S
        life = await self._call("owner", "begin_life", lambda _: database.begin_life())
        epoch = await self._call("owner", "raise_epoch", lambda _: self._raise_epoch(owner))
        await self._call("owner", "tidy", lambda _: database.write(Tables.tidy, synchronous=True))
        started = await self._call("owner", "read", lambda _: self._read_start(epoch))
        started.last_id = await self._call("owner", "last_id", lambda _: database.last_id())
        self._life, self._epoch = life, epoch
        return started

    def _raise_epoch(self, owner: str) -> int:
        operation = partial(Tables.raise_epoch, owner=owner, now_us=self._database.now_us())
        self._database.write(operation, synchronous=True)
        return self._database.tables.epoch

    def _read_start(self, epoch: int) -> Started:
        tables = self._database.tables
        live = [row.id for row in tables.endpoints.values() if row.state is not EndpointState.DELETED]
        return Started(
            epoch=epoch,
            position=tables.position,
            gaps=tables.gaps.copy(),
            lanes=[_lane_copy(lane) for lane in tables.lanes.values()],
            endpoints=self._endpoints(live),
            config_seq=tables.config_seq,
            last_id=0,
            retries_due={i: min(r.due_us for r in tables.retries[i].values()) for i in live if tables.retries.get(i)},
            wall_us=self._database.now_us(),
        )

    async def close(self) -> None:
        for connection in self._connections.values():
            self._hang_up(connection)
        self._connections.clear()
        await self._pause()

    def on_owner_lost(self, callback: Callable[[], None]) -> None:
        self._owner_lost = callback

    async def hold_ownership(self) -> None:
        database = self._database

        def work(connection: Connection) -> tuple[bool, int]:
            return database.owner_lock.try_take(connection), database.tables.epoch

        had, epoch = await self._call("owner", "hold_ownership", work)
        if epoch != self._epoch:
            raise FencedError(f"epoch {epoch} rules, ours was {self._epoch}: another dispatcher took over")
        if not had:
            raise StoreAwayError("owner: our old session still holds the lock")

    # ── reading ──

    async def head(self, after: int, limit: int, bytes_max: int, young: Sequence[int], *, attempted: bool) -> HeadPage:
        young = list(young)

        def snapshot(_: Connection) -> HeadPage:
            tables = self._database.tables
            gaps = [tables.outbox[i] for i in sorted(set(young)) if i in tables.outbox]
            rows, cut = _cut(gaps + tables.above(after, limit), bytes_max)
            full = cut or sum(row.id > after for row in rows) >= limit
            return HeadPage(self._events(rows), tables.attempted_by(rows) if attempted else None, full, 0)

        page: HeadPage
        page, last_id = await self._calls("reader", "head", snapshot, lambda _: self._database.last_id())
        page.last_id = last_id  # later than the snapshot, as in the statement
        return page

    async def holders(self) -> Holders:
        return await self._call("reader", "holders", lambda _: self._database.holders())

    async def probe(self, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int) -> list[Page]:
        return await self._call("reader", "probe", lambda _: self._ranges(None, ranges, limit, bytes_max))

    async def holes(self, account_id: str, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int) -> list[Page]:
        return await self._call("reader", "holes", lambda _: self._ranges(account_id, ranges, limit, bytes_max))

    async def account(
        self, account_id: str, after: int, upto: int, types: Sequence[str] | None, limit: int, bytes_max: int
    ) -> Page:
        def work(_: Connection) -> Page:
            tables = self._database.tables
            rows = tables.between(after + 1, upto, len(tables.ids), account_id)
            rows, cut = _cut([row for row in rows if types is None or row.type in types][:limit], bytes_max)
            return Page(self._events(rows), tables.attempted_by(rows), cut or len(rows) >= limit)

        return await self._call("reader", "account", work)

    async def due_retries(self, endpoint_id: int, limit: int, bytes_max: int) -> RetryPage:
        database = self._database

        def next_due(_: Connection) -> int | None:
            now_us = database.now_us()
            return min((r.due_us for r in self._retries(endpoint_id) if r.due_us > now_us), default=None)

        def page(_: Connection) -> RetryPage:
            now_us, outbox = database.now_us(), database.tables.outbox
            due = sorted(
                (r for r in self._retries(endpoint_id) if r.due_us <= now_us),
                key=lambda r: (r.due_us, r.event_id, r.run),
            )
            due = [r for r in due[:limit] if r.event_id in outbox]
            rows, cut = _cut([outbox[r.event_id] for r in due], bytes_max)
            retries = [
                DueRetry(event, r.run, r.number, r.first_attempt_us)
                for event, r in zip(self._events(rows), due, strict=False)
            ]
            return RetryPage(retries, cut or len(rows) >= limit, None)

        next_due_us, found = await self._calls("reader", "due_retries", next_due, page)
        found.next_due_us = next_due_us
        return found

    def _retries(self, endpoint_id: int) -> Iterable[RetryRow]:
        return self._database.tables.retries.get(endpoint_id, {}).values()

    async def arm_doorbell(self) -> bool:
        return await self._call("reader", "arm_doorbell", self._database.try_arm)

    async def disarm_doorbell(self) -> None:
        await self._call("reader", "disarm_doorbell", self._database.doorbell_lock.give_back)

    def _ranges(
        self, account_id: str | None, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int
    ) -> list[Page]:
        """One bound for all ranges together: where it cuts, that range and those after it are full."""
        tables = self._database.tables
        found = [
            (n, row) for n, (low, high) in enumerate(ranges) for row in tables.between(low, high, limit, account_id)
        ]
        rows, cut = _cut([row for _, row in found[:limit]], bytes_max)
        pages = [Page([], [], False) for _ in ranges]
        for (n, _), event, attempted in zip(found, self._events(rows), tables.attempted_by(rows), strict=False):
            page = pages[n]
            page.events.append(event)
            assert page.attempted is not None
            page.attempted.append(attempted)
        if rows and (cut or len(rows) >= limit):
            for page in pages[found[len(rows) - 1][0] :]:
                page.full = True
        return pages

    def _events(self, rows: Sequence[LogRow]) -> list[Event]:
        public = self._database.public_ids.encode([(row.created_us, row.id) for row in rows])
        return [
            Event(row.id, row.account_id, row.type, row.payload, row.created_us, row.occurred_us, public_id)
            for row, public_id in zip(rows, public, strict=True)
        ]

    # ── wake-ups ──

    async def listen(self, on_doorbell: Callable[[], None], on_config: Callable[[], None]) -> None:
        def subscribe(connection: Connection) -> Connection:
            connection.is_listening = True
            return connection

        connection = await self._call("listener", "listen", subscribe)
        on_doorbell()  # whatever rang while nobody listened
        on_config()
        while connection.is_alive:
            await connection.wake.wait()
            connection.wake.clear()
            inbox, connection.inbox = connection.inbox, []
            for channel in inbox:
                (on_doorbell if channel == "doorbell" else on_config)()
        raise StoreAwayError("listener: the connection was closed")

    # ── recording ──

    async def record(self, batch: Batch) -> list[int]:
        database = self._database

        def work(_: Connection) -> list[int]:
            if database.tables.epoch != batch.epoch:
                raise FencedError(f"epoch {batch.epoch} is over: another dispatcher took over")
            for row in batch.attempts:
                assert min(row.number, row.run, row.duration_us) >= 0, row
                assert row.fault is not None or (row.status is not None and 200 <= row.status <= 299), row
            asked = batch.checkpoint.taken_up if batch.checkpoint is not None else []
            taken_up = [
                i for i in asked if i in database.tables.subscriptions and not database.changing(f"subscription {i}")
            ]
            operation = partial(Tables.record, batch=_batch_copy(batch), taken_up=taken_up, now_us=database.now_us())
            database.write(operation, synchronous=False)
            return taken_up

        return await self._call("recorder", "record", work)

    # ── configuration ──

    async def config_changes(self, after_seq: int, epoch: int) -> ConfigChanges:
        changes, now_rules = await self._call(
            "config",
            "config_changes",
            lambda _: (
                [c for c in self._database.tables.config_changes if c[0] > after_seq],
                self._database.tables.epoch,
            ),
        )
        if now_rules != epoch:
            raise FencedError(f"epoch {now_rules} rules, ours was {epoch}: another dispatcher took over")
        if not changes:
            return ConfigChanges(after_seq, [], [])
        ids = sorted({endpoint_id for _, endpoint_id in changes})
        endpoints = await self._call("config", "endpoints", lambda _: self._endpoints(ids))
        return ConfigChanges(changes[-1][0], endpoints, sorted(set(ids) - {endpoint.id for endpoint in endpoints}))

    async def note_failing(self, failing_since_us: dict[int, int | None]) -> None:
        noted = dict(failing_since_us)

        def work(connection: Connection) -> None:
            for endpoint_id in noted:
                self._lock_or_leave(connection, f"endpoint {endpoint_id}")
            for endpoint_id, since_us in noted.items():
                if endpoint_id in self._database.tables.endpoints:
                    columns = {"failing_since_us": since_us}
                    change = partial(Tables.update_endpoint, endpoint_id=endpoint_id, columns=columns)
                    self._database.write(change, synchronous=True)

        await self._call("config", "note_failing", work)

    async def disable_endpoint(self, endpoint_id: int, reason: str, failing_since_us: int | None) -> None:
        def work(connection: Connection) -> None:
            endpoint = self._database.tables.endpoints.get(endpoint_id)
            if endpoint is None:
                return
            self._lock_or_leave(connection, f"endpoint {endpoint_id}")
            if endpoint.state is not EndpointState.LIVE:
                return
            self._lock_or_leave(connection, CONFIG_LOCK)
            since = None if failing_since_us is None else timestamp(failing_since_us).decode()
            about = {"id": endpoint_id, "name": endpoint.name, "url": endpoint.url}
            with self._database.begin() as transaction:
                transaction.update_endpoint(
                    endpoint_id,
                    state=EndpointState.DISABLED,
                    state_reason=reason,
                    paused_at_id=self._database.last_id(),
                )
                payload = orjson.dumps({"endpoint": about, "reason": reason, "failing_since": since})
                transaction.insert(endpoint.account_id, "endpoint.disabled", payload)

        await self._call("config", "disable_endpoint", work)

    def _lock_or_leave(self, connection: Connection, lock: str) -> None:
        if self._database.changing(lock):
            self._hang_up(connection)
            raise StoreAwayError(f"config: {lock} is locked for longer than the lock timeout")

    async def wall_us(self) -> int:
        return await self._call("config", "wall", lambda _: self._database.now_us())

    def _endpoints(self, ids: Iterable[int]) -> list[Endpoint]:
        tables = self._database.tables
        of_endpoint: defaultdict[int, list[Subscription]] = defaultdict(list)
        for row in tables.subscriptions.values():
            of_endpoint[row.endpoint_id].append(_subscription(row))
        rows = [tables.endpoints[i] for i in ids if i in tables.endpoints]
        return [
            _endpoint(row, of_endpoint[row.id], self._policy) for row in rows if row.state is not EndpointState.DELETED
        ]

    # ── sessions ──

    async def _call(self, session: str, what: str, work: Callable[[Connection], T]) -> T:
        """Run `work` on the server, atomically, between two pauses."""
        _, result = await self._calls(session, what, lambda _: None, work, between=False)
        return result

    async def _calls(
        self,
        session: str,
        what: str,
        first: Callable[[Connection], Any],
        second: Callable[[Connection], T],
        *,
        between: bool = True,
    ) -> tuple[Any, T]:
        """Run `first` and `second`, others' work in between."""
        connection = await self._connection(session)
        fate = self.fate(session, what)
        try:
            await self._pause()
            self._check(connection, session)
            if fate is Fate.LOST_BEFORE:
                raise StoreAwayError(f"{session}: the connection was lost ({what})")
            one = first(connection)
            if between:
                await self._pause()
                self._check(connection, session)
            two = second(connection)
            if fate is Fate.LOST_AFTER:
                raise StoreAwayError(f"{session}: the connection was lost ({what})")
            await self._pause()
            self._check(connection, session)
        except BaseException:
            self._hang_up(connection)  # also when we were cancelled: the answer may still be on its way
            raise
        return one, two

    async def _connection(self, session: str) -> Connection:
        connection = self._connections.get(session)
        if connection is not None and connection.is_alive:
            return connection
        fate = self.fate(session, "connect")
        await self._pause()
        if fate is not Fate.DONE or not self._database.is_up:
            raise StoreAwayError(f"{session}: can't connect")
        if self._life is not None and self._database.life != self._life:
            raise LifeLostError(f"{session}: the server was restarted after a crash, or promoted")
        connection = self._database.connect(partial(self._lost, session))
        self._connections[session] = connection
        return connection

    def _check(self, connection: Connection, session: str) -> None:
        if not connection.is_alive or not self._database.is_up:
            raise StoreAwayError(f"{session}: the connection was lost")

    def _lost(self, session: str, connection: Connection) -> None:
        """The connection ended without our doing."""
        if self._connections.get(session) is connection and session == "owner" and self._owner_lost is not None:
            asyncio.get_running_loop().call_soon(self._owner_lost)

    def _hang_up(self, connection: Connection) -> None:
        if connection.is_alive:
            connection.is_alive = False  # first: this is our doing
            connection.wake.set()
            self._database.disconnect(connection)


async def _yield() -> None:
    await asyncio.sleep(0)


# ── values ──


def _virtual_id(xid: int) -> str:
    return f"3/{xid}"


def _cut(rows: list[LogRow], bytes_max: int) -> tuple[list[LogRow], bool]:
    """End a page with the first row that reaches `bytes_max`; tell whether one did."""
    total = 0
    for n, row in enumerate(rows):
        total += row.stored_bytes
        if total >= bytes_max:
            return rows[: n + 1], True
    return rows, False


TUPLE_HEADER_BYTES = 32  # with the null bitmap, aligned
TOAST_TUPLE_BYTES = 2_032  # TOAST_TUPLE_THRESHOLD with 8 kB pages: larger rows store their payload outside


def _stored_bytes(account_id: str, type: str, payload: bytes, occurred_us: int | None) -> int:
    """Return pg_column_size(payload): a varlena has a header of 1 byte up to 126 bytes, of 4 beyond, and none outside of its row."""
    size = 8  # id
    for length in (len(account_id.encode()), len(type.encode()), len(payload)):
        size = size + length + 1 if length <= 126 else (size + 3) // 4 * 4 + length + 4
    for _ in range(1 if occurred_us is None else 2):
        size = (size + 7) // 8 * 8 + 8
    if TUPLE_HEADER_BYTES + size > TOAST_TUPLE_BYTES:
        return len(payload)
    return len(payload) + (1 if len(payload) <= 126 else 4)


def _lane_copy(lane: LaneRow) -> LaneRow:
    return LaneRow(lane.endpoint_id, lane.settled, lane.holes.copy(), lane.backlog)


def _batch_copy(batch: Batch) -> Batch:
    """Copy what the caller could change later: the WAL must replay what was written."""
    write = batch.checkpoint
    if write is not None:
        lanes = [_lane_copy(lane) for lane in write.lanes]
        write = dataclasses.replace(write, gaps=write.gaps.copy(), lanes=lanes, lanes_gone=list(write.lanes_gone))
    return Batch(
        batch.epoch,
        [dataclasses.replace(row) for row in batch.attempts],
        [dataclasses.replace(row) for row in batch.retries],
        list(batch.settled_retries),
        [dataclasses.replace(row) for row in batch.dead],
        write,
    )


def _subscription(row: SubscriptionRow) -> Subscription:
    until_id = FOREVER if row.until_id is None else row.until_id
    return Subscription(row.id, row.pattern, row.since_id, until_id, row.taken_up)


def _endpoint(row: EndpointRow, subscriptions: Sequence[Subscription], policy: AddressPolicy) -> Endpoint:
    try:
        target = parse_url(row.url, policy)
    except InputError:
        target = None
    return Endpoint(
        id=EndpointId(row.id),
        account_id=row.account_id,
        target=target,
        state=row.state,
        secrets=row.secrets,
        subscriptions=tuple(subscriptions),
        timeout_s=row.timeout_ms / 1000,
        rate_per_s=row.rate_per_s,
        rate_burst=row.rate_burst,
        in_flight_max=row.in_flight_max,
        retry_schedule_s=row.retry_schedule_s,
        failing_since_us=row.failing_since_us,
    )
