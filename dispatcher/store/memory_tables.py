"""The twin's tables: what PostgreSQL has made of the WAL so far. What changes them is an operation, which can be replayed
(memory_database.py)."""

import dataclasses
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dispatcher.domain.endpoint import FOREVER, EndpointState, Subscription
from dispatcher.domain.filters import Rule
from dispatcher.domain.outcome import Fault
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.retention import Span
from dispatcher.domain.run import Run
from dispatcher.ports import (
    AttemptRow,
    Batch,
    LaneRow,
    RetryRow,
    RunRow,
    StatRow,
)

RetryKey = tuple[int, int, int]  # endpoint, event, run

CONFIG_CHANGES_KEPT = 1_000
FIRST_LEAVES = (Span(0, 100_000), Span(100_000, 1_000_000), Span(1_000_000, 10_000_000), Span(10_000_000, 40_000_000))


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
        return subscription_of(self).matches(event.type, event.id) and (
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

    def end_retries(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Forget those of (endpoint, event, run)."""
        for endpoint_id, event_id, run in rows:
            self.retries[endpoint_id].pop((event_id, run), None)

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
        self.end_retries(batch.settled_retries)
        for row in batch.runs:
            self._record_run(row)
        for stat in batch.stats:
            self.stats.setdefault((stat.minute, stat.endpoint_id, batch.epoch), stat)
        write = batch.checkpoint
        if write is not None:
            for lane in write.lanes:
                self.lanes[lane.endpoint_id] = lane_copy(lane)
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

    def attempted_by(self, rows: Iterable[LogRow], of: Iterable[int] | None = None) -> list[Sequence[int]]:
        wanted = None if of is None else set(of)
        return [
            tuple(
                endpoint_id for endpoint_id in self.attempted.get(row.id, ()) if wanted is None or endpoint_id in wanted
            )
            for row in rows
        ]

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


def lane_copy(lane: LaneRow) -> LaneRow:
    return LaneRow(lane.endpoint_id, lane.settled, lane.holes.copy(), lane.backlog)


def subscription_of(row: SubscriptionRow) -> Subscription:
    until_id = FOREVER if row.until_id is None else row.until_id
    return Subscription(row.id, row.pattern, row.since_id, until_id, row.taken_up, row.rule)
