"""The store's twin in memory: one dispatcher's five sessions on a `MemoryDatabase` (memory_database.py), behind the `Store` port. It passes the
same suite as the real store (tests/store/test_conformance.py).

**Faults** are hooks: `MemoryStore.fate` lets a call's connection die before or after the call took effect, `MemoryStore.sever` ends a session,
`MemoryDatabase.loses_notification` drops a ring, `MemoryDatabase.is_up` makes the server unreachable. Time comes from the database's `now_us`,
chance from its `rng`, and every call of the port yields through `pause` on its way there and back.
"""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.endpoint import Endpoint, EndpointId, EndpointState, Subscription, pattern_matches
from dispatcher.domain.event import Event, traceparent_of
from dispatcher.domain.ordering import parse_ordering
from dispatcher.domain.run import Run, RunSource
from dispatcher.domain.sealing import Keyring
from dispatcher.domain.shape import SHAPE
from dispatcher.domain.signing import signing_in
from dispatcher.domain.url import parse_url
from dispatcher.errors import InputError
from dispatcher.ports import (
    Batch,
    ConfigChanges,
    DueRetry,
    FencedError,
    HeadPage,
    Holders,
    Kinds,
    LifeLostError,
    Page,
    Ranges,
    Recorded,
    RetryPage,
    RunPage,
    Started,
    StoreAwayError,
    Summary,
)
from dispatcher.store import standby
from dispatcher.store.credentials import shape_of
from dispatcher.store.memory_database import CONFIG_LOCK, Connection, MemoryDatabase
from dispatcher.store.memory_tables import (
    EndpointRow,
    LogRow,
    Tables,
    lane_copy,
    subscription_of,
)
from dispatcher.store.standby import Look, Watch

T = TypeVar("T")
LOCK_REFUSALS_MAX = 15  # as in postgres.py
RUN_SCAN_IDS_MAX = 200_000


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
        self._busy: set[str] = set()
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
            lanes=[lane_copy(lane) for lane in tables.lanes.values()],
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
        return await self._call("reader", "is_stood_by", lambda _: any(c.is_alive for c in self._database.standbys))

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

    async def probe(self, ranges: Ranges, limit: int, bytes_max: int, of: Kinds | None = None) -> list[Page]:
        def wanted(row: LogRow) -> bool:
            return of is None or (row.account_id in of[0] and row.type in of[1])

        return await self._call("reader", "probe", lambda _: self._ranges(wanted, ranges, limit, bytes_max))

    async def summary(self, ranges: Ranges) -> list[Summary]:
        def work(_: Connection) -> list[Summary]:
            tables = self._database.tables
            groups: dict[tuple[str, str], list[LogRow]] = {}
            for low, high in ranges:
                for row in tables.between(low, high, len(tables.ids)):
                    groups.setdefault((row.account_id, row.type), []).append(row)
            return [
                Summary(*key, len(rows), any((row.priority or 0) > 0 for row in rows), min(row.id for row in rows), max(row.id for row in rows))
                for key, rows in groups.items()
            ]  # fmt: skip

        return await self._call("reader", "summary", work)

    async def holes(
        self, account_id: str, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int, of: Sequence[int]
    ) -> list[Page]:
        return await self._call(
            "reader",
            "holes",
            lambda _: self._ranges(lambda row: row.account_id == account_id, ranges, limit, bytes_max, of),
        )

    async def account(
        self, account_id: str, after: int, upto: int, types: Sequence[str] | None, limit: int, bytes_max: int, of: Sequence[int],
    ) -> Page:  # fmt: skip
        def work(_: Connection) -> Page:
            tables = self._database.tables
            rows = tables.between(after + 1, upto, len(tables.ids), account_id)
            rows, cut = _cut([row for row in rows if types is None or row.type in types][:limit], bytes_max)
            return Page(self._events(rows), tables.attempted_by(rows, of), cut or len(rows) >= limit)

        return await self._call("reader", "account", work)

    async def urgent(
        self, account_id: str, after: int, upto: int, limit: int, bytes_max: int, of: Sequence[int]
    ) -> Page:
        def work(_: Connection) -> Page:
            tables = self._database.tables
            rows = tables.between(after + 1, upto, len(tables.ids), account_id)
            rows, cut = _cut([row for row in rows if (row.priority or 0) > 0][:limit], bytes_max)
            return Page(self._events(rows), tables.attempted_by(rows, of), cut or len(rows) >= limit)

        return await self._call("reader", "urgent", work)

    async def keys(
        self, account_id: str, keys: Sequence[tuple[str, int]], upto: int, limit: int, bytes_max: int, of: Sequence[int],
    ) -> list[Page]:  # fmt: skip
        def work(_: Connection) -> list[Page]:
            tables = self._database.tables
            found = [
                (n, row)
                for n, (key, low) in enumerate(keys)
                for row in [r for r in tables.between(low, upto, len(tables.ids), account_id) if r.ordering_key == key][:limit]
            ]  # fmt: skip
            pages = self._dealt(found, len(keys), len(found) + 1, bytes_max, of)
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
                orphans = [(endpoint_id, r.event_id, r.run) for r, copy in found if copy is None]
                if orphans:
                    self._database.write(partial(Tables.end_retries, rows=orphans), synchronous=False)
                rows, cut = _cut([copy for _, copy in found if copy is not None], bytes_left)
                bytes_left -= sum(row.stored_bytes for row in rows)
                retries = [
                    DueRetry(event, r.run, r.number, r.first_attempt_us)
                    for event, r in zip(self._events(rows), due_rows, strict=False)
                ]
                next_due_us = min((r.due_us for r in waiting if r.due_us > now_us), default=None)
                full = cut or len(found) >= room or bool(orphans)
                pages.append(RetryPage(retries, full, next_due_us, bool(orphans)))
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
        self, wanted: Callable[[LogRow], bool], ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int, of: Sequence[int] | None = None,
    ) -> list[Page]:  # fmt: skip
        tables = self._database.tables
        found = [
            (n, row)
            for n, (low, high) in enumerate(ranges)
            for row in tables.between(low, high, len(tables.ids))
            if wanted(row)
        ]
        return self._dealt(found, len(ranges), limit, bytes_max, of)

    def _dealt(
        self, found: list[tuple[int, LogRow]], count: int, limit: int, bytes_max: int, of: Sequence[int] | None
    ) -> list[Page]:
        """One bound for all pages together: where it cuts, that page and those after it are full."""
        tables = self._database.tables
        rows, cut = _cut([row for _, row in found[:limit]], bytes_max)
        pages = [Page([], [], False) for _ in range(count)]
        for (n, _), event, attempted in zip(found, self._events(rows), tables.attempted_by(rows, of), strict=False):
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
        changes, forgets, now_rules, wall_us = await self._call(
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
                self._database.now_us(),
            ),
        )
        if now_rules != epoch:
            raise FencedError(f"another dispatcher took over: epoch {now_rules} rules, ours was {epoch}")
        ids = sorted({endpoint_id for _, endpoint_id in changes} | set(again))
        if not ids:
            return ConfigChanges(after_seq, wall_us)
        endpoints = await self._call("config", "endpoints", lambda _: self._endpoints(ids))
        gone = sorted(set(ids) - {endpoint.id for endpoint in endpoints})
        forget = sorted({endpoint_id for _, endpoint_id in forgets})
        return ConfigChanges(changes[-1][0] if changes else after_seq, wall_us, endpoints, gone, forget)

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

    def _endpoints(self, ids: Iterable[int]) -> list[Endpoint]:
        tables = self._database.tables
        of_endpoint: defaultdict[int, list[Subscription]] = defaultdict(list)
        for row in tables.subscriptions.values():
            of_endpoint[row.endpoint_id].append(subscription_of(row))
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
        assert session not in self._busy, f"{what}: a session does one thing at a time, and {session} is in use"
        self._busy.add(session)
        try:
            return await self._calls_alone(session, what, first, second, between=between)
        finally:
            self._busy.discard(session)

    async def _calls_alone(
        self, session: str, what: str, first: Callable[[Connection], Any], second: Callable[[Connection], T], *, between: bool
    ) -> tuple[Any, T]:  # fmt: skip
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


def _cut(rows: list[LogRow], bytes_max: int) -> tuple[list[LogRow], bool]:
    """End a page with the first row that reaches `bytes_max`; tell whether one did."""
    total = 0
    for n, row in enumerate(rows):
        total += row.stored_bytes
        if total >= bytes_max:
            return rows[: n + 1], True
    return rows, False


def _batch_copy(batch: Batch) -> Batch:
    """Copy what the caller could change later: the WAL must replay what was written."""
    write = batch.checkpoint
    if write is not None:
        lanes = [lane_copy(lane) for lane in write.lanes]
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
