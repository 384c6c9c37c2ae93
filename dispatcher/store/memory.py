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
from dispatcher.domain.endpoint import FOREVER, Endpoint, EndpointId, EndpointState, Subscription, pattern_matches
from dispatcher.domain.event import Event, PublicIds, timestamp, traceparent_of
from dispatcher.domain.filters import Rule
from dispatcher.domain.ordering import parse_ordering
from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.retention import Span
from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.domain.sealing import Keyring
from dispatcher.domain.shape import SHAPE
from dispatcher.domain.signing import signing_in
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
    Recorded,
    RetryPage,
    RetryRow,
    RunPage,
    RunRow,
    Started,
    StatRow,
    StoreAwayError,
)
from dispatcher.store import standby
from dispatcher.store.credentials import shape_of
from dispatcher.store.standby import Look, Watch

T = TypeVar("T")
RetryKey = tuple[int, int, int]  # endpoint, event, run

LOCK_REFUSALS_MAX = 15  # as in postgres.py
SEQUENCE_LOG_AHEAD = 32  # PostgreSQL's SEQ_LOG_VALS
CONFIG_CHANGES_KEPT = 1_000
ID_KEY_BYTES = 16
FIRST_LEAVES = (Span(0, 100_000), Span(100_000, 1_000_000), Span(1_000_000, 10_000_000), Span(10_000_000, 40_000_000))
RUN_SCAN_IDS_MAX = 200_000


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
    ordering_key: str | None = None
    expires_us: int | None = None
    priority: int | None = None
    traceparent: str | None = None


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
    resent_run: int | None = None


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    id: int
    endpoint_id: int
    pattern: str
    since_id: int
    until_id: int | None = None
    taken_up: bool = False
    rule: Rule | None = None

    def is_for(self, event: LogRow) -> bool:
        return _subscription(self).matches(event.type, event.id) and (
            self.rule is None or self.rule.passes(event.type, event.payload)
        )


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
    failing_told: bool = False
    signing: str = "v1"
    body_format: str = "envelope"
    omit: tuple[str, ...] = ()
    extra_signature: str | None = None
    credentials: str | None = None  # never sealed here
    ordering: str = "off"
    rule: Rule | None = None  # its filters
    response_control: bool = False
    expiring: tuple[tuple[str, int], ...] = ()  # secrets that sign beside `secrets` until then

    def at(self, now_us: int) -> "EndpointRow":
        """The row with the secrets that sign at `now_us`."""
        valid = tuple(secret for secret, expires_us in self.expiring if expires_us > now_us)
        return dataclasses.replace(self, secrets=self.secrets + valid) if valid else self

    def next_expiry_us(self, now_us: int) -> int | None:
        return min((expires_us for _, expires_us in self.expiring if expires_us > now_us), default=None)


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
        self.attempts_of: defaultdict[tuple[int, int], list[AttemptRow]] = defaultdict(list)  # event, endpoint
        self.attempted: defaultdict[int, dict[int, None]] = defaultdict(dict)  # event → endpoints with a run-0 attempt
        self.retries: defaultdict[int, dict[tuple[int, int], RetryRow]] = defaultdict(dict)  # endpoint → (event, run)
        self.dead_letters: dict[RetryKey, DeadLetter] = {}
        self.runs: dict[int, tuple[int, Run]] = {}  # id → endpoint, run with its progress
        self.runs_finished: dict[int, None] = {}
        self.stats: dict[tuple[int, int, int], StatRow] = {}  # minute, endpoint, epoch
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
        self.forgets: dict[int, None] = {}  # seqs of those that say that events were erased
        self.prepared: dict[str, PreparedRow] = {}
        self.sequence_logged = 0
        # partitions, and what retention took (store/memory_partitions.py)
        self.leaves: dict[str, list[Span]] = {parent: list(FIRST_LEAVES) for parent in ("outbox", "attempt")}
        self.fences: dict[str, tuple[Span, bool]] = {}  # of the DEFAULT partition: bounds, validated
        self.discards: list[tuple[int, str, int, int, int]] = []  # endpoint, reason, after, up to, deliveries

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

    def put_run(self, endpoint_id: int, run: Run) -> None:
        self.runs[run.id] = (endpoint_id, run)

    def update_run(self, run_id: int, columns: dict[str, Any]) -> None:
        endpoint_id, run = self.runs[run_id]
        self.runs[run_id] = (endpoint_id, dataclasses.replace(run, **columns))

    def resend_dead(self, keys: Sequence[RetryKey], run_id: int) -> None:
        for key in keys:
            self.dead_letters[key] = dataclasses.replace(self.dead_letters[key], resent_run=run_id)

    def erase_event(self, event_id: int, endpoint_ids: Sequence[int]) -> None:
        row = self.outbox.pop(event_id, None)
        if row is not None:
            self.ids.remove(event_id)
            self.ids_of_account[row.account_id].remove(event_id)
        for endpoint_id in endpoint_ids:
            retries = self.retries[endpoint_id]
            for key in [key for key in retries if key[0] == event_id]:
                del retries[key]
            self.config_seq += 1
            self.config_changes.append((self.config_seq, endpoint_id))
            self.forgets[self.config_seq] = None

    def copy_of(self, endpoint_id: int, event_id: int) -> LogRow | None:
        """The event, or the copy of it that a dead letter kept."""
        found = self.outbox.get(event_id)
        if found is None:
            copies = (d.event for (e, i, _), d in self.dead_letters.items() if (e, i) == (endpoint_id, event_id))
            found = next(copies, None)
        return found

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
                self.attempts_of[attempt.event_id, attempt.endpoint_id].append(attempt)
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
            event = self.copy_of(dead.endpoint_id, dead.event_id)
            if event is not None:
                self.dead_letters.setdefault(
                    (dead.endpoint_id, dead.event_id, dead.run),
                    DeadLetter(
                        dead.endpoint_id, event, dead.run, dead.attempts, dead.first_attempt_us, dead.reason, dead.status, dead.fault
                    ),
                )  # fmt: skip
        for endpoint_id, event_id, run in batch.settled_retries:
            self.retries[endpoint_id].pop((event_id, run), None)
        for row in batch.runs:
            self._record_run(row)
        for stat in batch.stats:
            self.stats.setdefault((stat.minute, stat.endpoint_id, batch.epoch), stat)
        write = batch.checkpoint
        if write is not None:
            for lane in write.lanes:
                self.lanes[lane.endpoint_id] = _lane_copy(lane)
            for endpoint_id in write.lanes_gone:
                self.lanes.pop(endpoint_id, None)
            for subscription_id in taken_up:
                self.update_subscription(subscription_id, {"taken_up": True})
            self.position, self.gaps, self.heartbeat_us = write.position, write.gaps.copy(), now_us

    def _record_run(self, row: RunRow) -> None:
        if row.run not in self.runs:
            return
        self.update_run(
            row.run,
            {"settled": row.settled, "attempted": row.attempted, "delivered": row.delivered, "dead": row.dead},
        )
        if row.ended and row.canceled:
            for retries in self.retries.values():
                for key in [key for key in retries if key[1] == row.run]:
                    del retries[key]
        if row.ended and not any(run == row.run for retries in self.retries.values() for _, run in retries):
            self.runs_finished[row.run] = None

    # ── reading ──

    def above(self, after: int, limit: int) -> list[LogRow]:
        at = bisect_right(self.ids, after)
        return [self.outbox[i] for i in self.ids[at : at + limit]]

    def between(self, low: int, high: int, limit: int, account_id: str | None = None) -> list[LogRow]:
        ids = self.ids if account_id is None else self.ids_of_account.get(account_id, [])
        at = bisect_left(ids, low)
        return [self.outbox[i] for i in ids[at : min(at + limit, bisect_right(ids, high))]]

    def has_attempt(self, event_id: int, endpoint_id: int, run: int) -> bool:
        return any((event_id, endpoint_id, run, number) in self.attempts for number in (0, 1))

    def has_failed(self, event_id: int, endpoint_id: int) -> bool:
        return any(row.fault is not None for row in self._attempts_of(event_id, endpoint_id))

    def is_given_up(self, event_id: int, endpoint_id: int) -> bool:
        """No attempt in any run succeeded, none is to come, and it has not expired."""
        waits = any(known == event_id for known, _ in self.retries.get(endpoint_id, {}))
        return not waits and all(
            row.fault is not None and row.number for row in self._attempts_of(event_id, endpoint_id)
        )

    def _attempts_of(self, event_id: int, endpoint_id: int) -> Iterable[AttemptRow]:
        return self.attempts_of.get((event_id, endpoint_id), ())

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
            if known is None or number == 0 or 0 < known.number < number:
                newest[endpoint_id, event_id, run] = attempt
        for event in self.outbox.values():
            for endpoint_id, subscriptions in wanted.get(event.account_id, {}).items():
                matching = [s for s in subscriptions if s.is_for(event)]
                last = newest.get((endpoint_id, event.id, 0))
                lane = self.lanes.get(endpoint_id)
                if not matching:
                    continue
                if last is not None:
                    is_final = last.fault is None or last.number == 0 or (endpoint_id, event.id, 0) in self.dead_letters
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


CONFIG_LOCK = "configuration changes"


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
        who = {"id": about.id, "name": about.name, "url": about.url}
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
        self._owner_session: Connection | None = None  # the one that took the owner lock
        self._lock_refusals = 0

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

    async def start(self, owner: str, on_standby: Callable[[], None] = lambda: None) -> Started:
        await self.close()
        self._life = None
        database = self._database
        if not await self._call("owner", "try_own", database.owner_lock.try_take):
            on_standby()
            watch = Watch()
            while True:
                database.standbys[self._connections["owner"]] = None
                look = await self._call("owner", "look_at_owner", self._look_at_owner)
                if watch.is_dead(look):
                    await self._call("owner", "end_owner", partial(self._end_owner, look=look))
                elif look.holder is not None:
                    await self._sleep(standby.POLL_S)
                if await self._call("owner", "try_own", database.owner_lock.try_take):
                    break
        self._owner_session, self._lock_refusals = self._connections["owner"], 0
        database.standbys.pop(self._owner_session, None)
        life = await self._as_owner("begin_life", lambda _: database.begin_life())
        epoch = await self._as_owner("raise_epoch", lambda _: self._raise_epoch(owner))
        await self._as_owner("tidy", lambda _: database.write(Tables.tidy, synchronous=True))
        started = await self._as_owner("read", lambda _: self._read_start(epoch))
        started.last_id = await self._as_owner("last_id", lambda _: database.last_id())
        self._life, self._epoch = life, epoch
        return started

    async def _as_owner(self, what: str, work: Callable[[Connection], T]) -> T:
        """Call on the connection that has the lock: one that was made again in between would not have it."""
        if self._owner_session is None or not self._owner_session.is_alive:
            raise StoreAwayError(f"owner: the connection was lost ({what})")
        return await self._call("owner", what, work)

    def _look_at_owner(self, _: Connection) -> Look:
        tables, holder = self._database.tables, self._database.owner_lock.holder
        return Look(
            holder=None if holder is None else id(holder),
            owner=tables.owner,
            epoch=tables.epoch,
            heartbeat_us=tables.heartbeat_us,
            held_up=False,
            now_us=self._database.now_us(),
        )

    def _end_owner(self, _: Connection, look: Look) -> None:
        holder = self._database.owner_lock.holder
        if id(holder) == look.holder and self._database.tables.heartbeat_us == look.heartbeat_us:
            assert holder is not None
            self._database.disconnect(holder)

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
        if self._owner_session is None or not self._owner_session.is_alive:
            callback()

    async def is_stood_by(self) -> bool:
        return await self._call("config", "is_stood_by", lambda _: any(c.is_alive for c in self._database.standbys))

    async def hold_ownership(self) -> None:
        database = self._database

        def work(connection: Connection) -> tuple[bool, int]:
            holder, epoch = database.owner_lock.holder, database.tables.epoch
            lingers = holder is self._owner_session and holder is not connection
            if holder is not None and lingers and epoch == self._epoch:
                database.reap(holder)  # the server takes our former session for alive
            had = database.owner_lock.try_take(connection)
            if had:
                self._owner_session = connection
            return had, epoch

        had, epoch = await self._call("owner", "hold_ownership", work)
        if epoch != self._epoch:
            raise FencedError(f"another dispatcher took over: epoch {epoch} rules, ours was {self._epoch}")
        if had:
            self._lock_refusals = 0
            return
        self._lock_refusals += 1
        if self._lock_refusals >= LOCK_REFUSALS_MAX:
            raise FencedError(f"another session keeps the owner lock from us, under our epoch {epoch}")
        raise StoreAwayError("owner: another session holds the lock, and has not raised the epoch yet")

    # ── reading ──

    async def head(self, after: int, limit: int, bytes_max: int, young: Sequence[int], *, attempted: bool) -> HeadPage:
        young = list(young)

        def snapshot(_: Connection) -> HeadPage:
            tables = self._database.tables
            gaps = [tables.outbox[i] for i in sorted(set(young)) if i in tables.outbox]
            rows, cut = _cut(gaps + tables.above(after, limit), bytes_max)
            full = cut or sum(row.id > after for row in rows) >= limit
            return HeadPage(
                self._events(rows), tables.attempted_by(rows) if attempted else None, full, 0, tables.config_seq
            )

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

    async def urgent(self, account_id: str, after: int, upto: int, limit: int, bytes_max: int) -> Page:
        def work(_: Connection) -> Page:
            tables = self._database.tables
            rows = tables.between(after + 1, upto, len(tables.ids), account_id)
            rows, cut = _cut([row for row in rows if (row.priority or 0) > 0][:limit], bytes_max)
            return Page(self._events(rows), tables.attempted_by(rows), cut or len(rows) >= limit)

        return await self._call("reader", "urgent", work)

    async def keys(
        self, account_id: str, keys: Sequence[tuple[str, int]], upto: int, limit: int, bytes_max: int
    ) -> list[Page]:
        def work(_: Connection) -> list[Page]:
            tables = self._database.tables
            found = [
                (n, row)
                for n, (key, low) in enumerate(keys)
                for row in [r for r in tables.between(low, upto, len(tables.ids), account_id) if r.ordering_key == key][:limit]
            ]  # fmt: skip
            pages = self._dealt(found, len(keys), len(found) + 1, bytes_max)
            for page in pages:
                page.full = page.full or len(page.events) >= limit
            return pages

        return await self._call("reader", "keys", work)

    async def held_keys(self, endpoint_id: int) -> list[tuple[str, int]]:
        def work(_: Connection) -> list[tuple[str, int]]:
            retries = self._database.tables.retries.get(endpoint_id, {}).values()
            return [(r.ordering_key, r.event_id) for r in retries if r.ordering_key is not None and r.run == 0]

        return await self._call("reader", "held_keys", work)

    async def due_retries(
        self, wanted: Sequence[tuple[int, int]], bytes_max: int, *, without_runs: Sequence[int] = ()
    ) -> list[RetryPage]:
        def work(_: Connection) -> list[RetryPage]:
            tables, now_us = self._database.tables, self._database.now_us()
            pages, bytes_left = [], bytes_max
            for endpoint_id, room in wanted:
                if bytes_left <= 0:
                    pages.append(RetryPage([], True, None))
                    continue
                waiting = [r for r in tables.retries.get(endpoint_id, {}).values() if r.run not in without_runs]
                due = sorted((r.due_us, r.event_id, r.run, r) for r in waiting if r.due_us <= now_us)
                found = [(r, tables.copy_of(endpoint_id, r.event_id)) for *_, r in due[:room]]
                due_rows = [r for r, copy in found if copy is not None]
                rows, cut = _cut([copy for _, copy in found if copy is not None], bytes_left)
                bytes_left -= sum(row.stored_bytes for row in rows)
                retries = [
                    DueRetry(event, r.run, r.number, r.first_attempt_us)
                    for event, r in zip(self._events(rows), due_rows, strict=False)
                ]
                next_due_us = min((r.due_us for r in waiting if r.due_us > now_us), default=None)
                pages.append(RetryPage(retries, cut or len(rows) >= room, next_due_us))
            return pages

        return await self._call("reader", "due_retries", work)

    async def run_page(
        self, endpoint_id: int, account_id: str, run: Run, after: int, limit: int, bytes_max: int
    ) -> RunPage:
        def work(_: Connection) -> RunPage:
            tables, upto = self._database.tables, run.upto_id
            if run.source is RunSource.LOG:
                upto = min(upto, after + RUN_SCAN_IDS_MAX)
                candidates = tables.between(after + 1, upto, len(tables.ids), account_id)
            else:
                dead = {d.event.id: d.event for d in tables.dead_letters.values() if d.resent_run == run.id}
                candidates = [dead[i] for i in sorted(dead) if after < i <= upto]
            seen = [row for row in candidates if any(pattern_matches(p, row.type) for p in run.patterns)]
            if run.only_failed:
                seen = [row for row in seen if tables.has_failed(row.id, endpoint_id)]
            seen = seen[:limit]
            wanted = [
                row
                for row in seen
                if not tables.has_attempt(row.id, endpoint_id, run.id)
                and (not run.only_failed or tables.is_given_up(row.id, endpoint_id))
            ]
            rows, cut = _cut(wanted, bytes_max)
            passed = rows[-1].id if cut else seen[-1].id if len(seen) >= limit else upto
            return RunPage(self._events(rows), passed)

        return await self._call("reader", "run_page", work)

    async def arm_doorbell(self) -> bool:
        return await self._call("reader", "arm_doorbell", self._database.try_arm)

    async def disarm_doorbell(self) -> None:
        await self._call("reader", "disarm_doorbell", self._database.doorbell_lock.give_back)

    def _ranges(
        self, account_id: str | None, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int
    ) -> list[Page]:
        tables = self._database.tables
        found = [
            (n, row) for n, (low, high) in enumerate(ranges) for row in tables.between(low, high, limit, account_id)
        ]
        return self._dealt(found, len(ranges), limit, bytes_max)

    def _dealt(self, found: list[tuple[int, LogRow]], count: int, limit: int, bytes_max: int) -> list[Page]:
        """One bound for all pages together: where it cuts, that page and those after it are full."""
        tables = self._database.tables
        rows, cut = _cut([row for _, row in found[:limit]], bytes_max)
        pages = [Page([], [], False) for _ in range(count)]
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
            Event(
                row.id, row.account_id, row.type, row.payload, row.created_us, row.occurred_us, public_id,
                row.ordering_key, row.expires_us, row.priority, None if row.traceparent is None else traceparent_of(row.traceparent),
            )
            for row, public_id in zip(rows, public, strict=True)
        ]  # fmt: skip

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

    async def record(self, batch: Batch) -> Recorded:
        database = self._database

        def work(_: Connection) -> Recorded:
            if database.tables.epoch != batch.epoch:
                raise FencedError(f"another dispatcher took over: our epoch {batch.epoch} is over")
            for row in batch.attempts:
                assert min(row.number, row.run, row.duration_us) >= 0, row
                assert row.fault is not None or (row.status is not None and 200 <= row.status <= 299), row
            asked = batch.checkpoint.taken_up if batch.checkpoint is not None else []
            taken_up = [
                i for i in asked if i in database.tables.subscriptions and not database.changing(f"subscription {i}")
            ]
            operation = partial(Tables.record, batch=_batch_copy(batch), taken_up=taken_up, now_us=database.now_us())
            database.write(operation, synchronous=False)
            finished = [row.run for row in batch.runs if row.run in database.tables.runs_finished]
            return Recorded(taken_up, finished)

        return await self._call("recorder", "record", work)

    # ── configuration ──

    async def config_changes(self, after_seq: int, epoch: int, again: Sequence[int] = ()) -> ConfigChanges:
        changes, forgets, now_rules = await self._call(
            "config",
            "config_changes",
            lambda _: (
                [c for c in self._database.tables.config_changes if c[0] > after_seq],
                [
                    c
                    for c in self._database.tables.config_changes
                    if c[0] > after_seq and c[0] in self._database.tables.forgets
                ],
                self._database.tables.epoch,
            ),
        )
        if now_rules != epoch:
            raise FencedError(f"another dispatcher took over: epoch {now_rules} rules, ours was {epoch}")
        ids = sorted({endpoint_id for _, endpoint_id in changes} | set(again))
        if not ids:
            return ConfigChanges(after_seq, [], [], [])
        endpoints = await self._call("config", "endpoints", lambda _: self._endpoints(ids))
        gone = sorted(set(ids) - {endpoint.id for endpoint in endpoints})
        forget = sorted({endpoint_id for _, endpoint_id in forgets})
        return ConfigChanges(changes[-1][0] if changes else after_seq, endpoints, gone, forget)

    async def note_failing(self, failing_since_us: dict[int, int | None]) -> None:
        noted = dict(failing_since_us)

        def work(connection: Connection) -> None:
            if self._is_over():
                return
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
            if endpoint is None or self._is_over():
                return
            self._lock_or_leave(connection, f"endpoint {endpoint_id}")
            if endpoint.state is not EndpointState.LIVE:
                return
            self._lock_or_leave(connection, CONFIG_LOCK)
            lane = self._database.tables.lanes.get(endpoint_id)
            with self._database.begin() as transaction:
                transaction.update_endpoint(
                    endpoint_id,
                    state=EndpointState.DISABLED,
                    state_reason=reason,
                    paused_at_id=self._database.last_id(),
                )
                held = {"held_events": 0 if lane is None else lane.backlog}
                transaction.tell_of_endpoint(endpoint, "endpoint.disabled", reason, failing_since_us, **held)

        await self._call("config", "disable_endpoint", work)

    async def tell_failing(self, endpoint_id: int, failing_since_us: int) -> None:
        def work(connection: Connection) -> None:
            endpoint = self._database.tables.endpoints.get(endpoint_id)
            if endpoint is None or self._is_over():
                return
            self._lock_or_leave(connection, f"endpoint {endpoint_id}")
            if endpoint.state is not EndpointState.LIVE or endpoint.failing_told:
                return
            self._lock_or_leave(connection, CONFIG_LOCK)
            since_us = failing_since_us if endpoint.failing_since_us is None else endpoint.failing_since_us
            columns = {"failing_since_us": since_us, "failing_told": True}
            change = partial(Tables.update_endpoint, endpoint_id=endpoint_id, columns=columns)
            with self._database.begin() as transaction:
                transaction.changes.append(change)
                transaction.tell_of_endpoint(endpoint, "endpoint.failing", "consecutive_failures", failing_since_us)

        await self._call("config", "tell_failing", work)

    async def tell_recovered(self, endpoint_id: int, failing_since_us: int) -> None:
        def work(connection: Connection) -> None:
            endpoint = self._database.tables.endpoints.get(endpoint_id)
            if endpoint is None or self._is_over():
                return
            self._lock_or_leave(connection, f"endpoint {endpoint_id}")
            if endpoint.state is not EndpointState.LIVE or not endpoint.failing_told:
                return
            self._lock_or_leave(connection, CONFIG_LOCK)
            columns: dict[str, Any] = {"failing_since_us": None, "failing_told": False}
            change = partial(Tables.update_endpoint, endpoint_id=endpoint_id, columns=columns)
            with self._database.begin() as transaction:
                transaction.changes.append(change)
                transaction.tell_of_endpoint(endpoint, "endpoint.recovered", "delivered", failing_since_us)

        await self._call("config", "tell_recovered", work)

    def _is_over(self) -> bool:
        """Tell whether another epoch rules."""
        return self._database.tables.epoch != self._epoch

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
        runs: defaultdict[int, list[Run]] = defaultdict(list)
        for run_id, (endpoint_id, run) in tables.runs.items():
            if run_id not in tables.runs_finished:
                runs[endpoint_id].append(run)
        now_us = self._database.now_us()
        rows = [tables.endpoints[i] for i in ids if i in tables.endpoints]
        return [
            dataclasses.replace(
                _endpoint(row.at(now_us), of_endpoint[row.id], runs[row.id], self._policy),
                reload_at_us=row.next_expiry_us(now_us),
            )
            for row in rows
            if row.state is not EndpointState.DELETED
        ]

    # ── sessions ──

    async def call(self, session: str, what: str, work: Callable[[Connection], T]) -> T:
        """Run another twin's work on a session of this dispatcher's (store/memory_partitions.py)."""
        return await self._call(session, what, work)

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
        [dataclasses.replace(row) for row in batch.runs],
        [dataclasses.replace(row, durations=list(row.durations)) for row in batch.stats],
        write,
    )


def _subscription(row: SubscriptionRow) -> Subscription:
    until_id = FOREVER if row.until_id is None else row.until_id
    return Subscription(row.id, row.pattern, row.since_id, until_id, row.taken_up, row.rule)


def _endpoint(
    row: EndpointRow, subscriptions: Sequence[Subscription], runs: Sequence[Run], policy: AddressPolicy
) -> Endpoint:
    columns = {name: getattr(row, name) for name in (*SHAPE, "id", "credentials")} | {"omit": list(row.omit)}
    shape = shape_of(columns, Keyring())
    try:
        target = shape.aimed(parse_url(row.url, policy))
    except InputError:
        target = None
    return Endpoint(
        id=EndpointId(row.id),
        account_id=row.account_id,
        target=target,
        state=row.state,
        secrets=signing_in(row.secrets, shape.signing),
        subscriptions=tuple(subscriptions),
        timeout_s=row.timeout_ms / 1000,
        rate_per_s=row.rate_per_s,
        rate_burst=row.rate_burst,
        in_flight_max=row.in_flight_max,
        retry_schedule_s=row.retry_schedule_s,
        failing_since_us=row.failing_since_us,
        failing_told=row.failing_told,
        state_reason=row.state_reason,
        response_control=row.response_control,
        runs=tuple(runs),
        shape=shape,
        ordering=parse_ordering(row.ordering),
    )
