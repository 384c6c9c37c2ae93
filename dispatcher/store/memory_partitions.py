"""The twin of store/partitions.py: the janitor's session on a MemoryDatabase.

Rows aren't moved between leaves here; a leaf is a range of ids. What is modelled is what others see: which locks are in the
way (an open producer's transaction holds one on the whole log, and one on the DEFAULT partition if it wrote there), what
may be done when, and what retention takes and counts. Dead letters, tests and runs keep no times here and never get old.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

import orjson

from dispatcher.domain.endpoint import FOREVER, EndpointState
from dispatcher.domain.event import timestamp
from dispatcher.domain.retention import MARGIN_IDS, Span, is_settled
from dispatcher.domain.run import RunSource
from dispatcher.ports import (
    Expired,
    FencedError,
    LogShape,
    Loss,
    Parent,
    RefusedError,
    Sweep,
    SweptDeadLetters,
    SweptRetries,
    TableShape,
)
from dispatcher.store.memory import MemoryStore
from dispatcher.store.memory_database import MemoryDatabase, origin_of
from dispatcher.store.memory_tables import EndpointRow, LogRow, RetryKey, SubscriptionRow, Tables

T = TypeVar("T")


class MemoryPartitions:
    """The `Partitions` port; `store` is the same dispatcher's, whose connections and faults it shares."""

    def __init__(self, database: MemoryDatabase, store: MemoryStore) -> None:
        self._database = database
        self._store = store

    async def begin(self) -> None:
        pass  # the store knows the life

    async def close(self) -> None:
        self._store.sever("janitor")

    async def _call(self, what: str, work: Callable[[], T]) -> T:
        return await self._store.call("janitor", what, lambda _: work())

    # ── looking ──

    async def shape(self) -> LogShape:
        def work() -> LogShape:
            tables = self._tables
            shapes = {parent: self._shape_of(parent) for parent in ("outbox", "attempt")}
            last_id, now_us = self._database.last_id(), self._database.now_us()
            return LogShape(shapes["outbox"], shapes["attempt"], tables.position, tables.gaps.copy(), last_id, now_us)

        return await self._call("shape", work)

    def _shape_of(self, parent: str) -> TableShape:
        leaves = sorted(self._tables.leaves[parent])
        bounds = zip([0, *(leaf.high for leaf in leaves)], [*(leaf.low for leaf in leaves), FOREVER], strict=True)
        between = [Span(low, high) for low, high in bounds if low < high]
        fence = self._tables.fences.get(parent)
        outside = [span for span in between if self._ids(parent, span)]
        return TableShape(leaves, outside, None if fence is None else fence[0])

    async def newest_us(self, leaf: Span) -> tuple[int | None, int | None]:
        def work() -> tuple[int | None, int | None]:
            events = self._ids("outbox", leaf)
            attempts = [row.started_us for key, row in self._tables.attempts.items() if leaf.low <= key[0] < leaf.high]
            return self._tables.outbox[events[-1]].created_us if events else None, max(attempts, default=None)

        return await self._call("newest", work)

    async def total_bytes(self) -> int:
        def work() -> int:
            return sum(row.stored_bytes for row in self._tables.outbox.values()) + 64 * len(self._tables.attempts)

        return await self._call("total_bytes", work)

    async def first_id_since(self, since_us: int, after: int, upto: int) -> tuple[int, int] | None:
        def work() -> tuple[int, int] | None:
            rows = self._tables.between(after + 1, upto, len(self._tables.ids))
            return next(((row.id, row.created_us) for row in rows if row.created_us >= since_us), None)

        return await self._call("first_id_since", work)

    # ── partitions ──

    async def attach(self, parent: Parent, leaf: Span) -> bool:
        def work() -> bool:
            last_id = self._database.last_id()
            near = parent == "outbox" and leaf.low - last_id < MARGIN_IDS
            if (near and self._is_held(parent)) or self._default_is_held(parent):
                return False
            if leaf.low <= last_id or any(leaf.overlaps(other) for other in self._tables.leaves[parent]):
                raise RefusedError(f"{parent} can't have a partition {leaf}")
            self._write(_set_leaves, parent=parent, leaves=(*self._tables.leaves[parent], leaf))
            return True

        return await self._call("attach", work)

    async def recut(self, parent: Parent, leaf: Span, cuts: Sequence[int]) -> bool:
        def work() -> bool:
            tables = self._tables
            if self._is_held(parent):
                return False
            if leaf not in tables.leaves[parent]:
                raise RefusedError(f"{parent} has no partition {leaf}")
            rest = [other for other in tables.leaves[parent] if other != leaf]
            made = [Span(low, high) for low, high in pairwise(cuts)]
            if cuts:
                fits = list(cuts) == sorted(set(cuts)) and (cuts[0], cuts[-1]) == (leaf.low, leaf.high)
                is_safe = fits and leaf.low > self._database.last_id()
            else:
                is_safe = is_settled(leaf, tables.position, tables.gaps)
                if parent == "attempt":
                    oldest = next((other for other in rest if other.high == leaf.low), None)
                    made = [] if oldest is None else [Span(oldest.low, leaf.high)]
                    is_safe = (
                        is_safe and oldest is not None and not any(made[0].overlaps(o) for o in tables.leaves["outbox"])
                    )
                    rest = [other for other in rest if other != oldest]
            if not is_safe or self._ids(parent, leaf):
                raise RefusedError(f"partition {leaf} of {parent} is in use, or {list(cuts)} don't fit it")
            self._write(_set_leaves, parent=parent, leaves=(*rest, *made))
            return True

        return await self._call("recut", work)

    async def adopt(self, parent: Parent, leaf: Span) -> str | None:
        def work() -> str | None:
            tables = self._tables
            fenced = tables.fences.get(parent)
            if fenced is None:
                return self._fence(parent, leaf)
            fence, is_valid = fenced
            near = fence.high - self._database.last_id() < MARGIN_IDS
            if near and not any(other.low == fence.high for other in tables.leaves[parent]):
                self._write(_set_fence, parent=parent, fence=None)
                return "unfenced"
            outside = [span for span in self._shape_of(parent).outside if not fence.overlaps(span)]
            if not is_valid:
                self._write(_set_fence, parent=parent, fence=None if outside else (fence, True))
                return "unfenced" if outside else "validated"
            if self._is_held(parent):
                return None
            self._write(_set_fence, parent=parent, fence=None)
            self._write(_set_leaves, parent=parent, leaves=(*tables.leaves[parent], fence))
            return "adopted"

        return await self._call("adopt", work)

    def _fence(self, parent: Parent, leaf: Span) -> str | None:
        tables = self._tables
        outside = self._shape_of(parent).outside
        if any(self._ids(parent, Span(span.low, min(span.high, leaf.low))) for span in outside if span.low < leaf.low):
            return "below"
        near = leaf.high - self._database.last_id() < MARGIN_IDS
        if any(leaf.overlaps(other) for other in tables.leaves[parent]) or (
            near and not any(other.low == leaf.high for other in tables.leaves[parent])
        ):
            raise RefusedError(f"the default partition of {parent} can't become {leaf}")
        if self._default_is_held(parent):
            return None
        self._write(_set_fence, parent=parent, fence=(leaf, False))
        return "fenced"

    # ── retention ──

    async def retrying_below(self, bound: int) -> list[int]:
        def work() -> list[int]:
            live = self._live()
            return [i for i, rows in self._tables.retries.items() if i in live and any(key[0] < bound for key in rows)]

        return await self._call("retrying_below", work)

    async def expire(self, epoch: int, leaf: Span) -> Expired | None:
        def work() -> Expired | None:
            database, tables = self._database, self._tables
            if tables.epoch != epoch:
                raise FencedError(f"epoch {epoch} is over: another dispatcher took over")
            if leaf not in tables.leaves["outbox"] or not is_settled(leaf, tables.position, tables.gaps):
                raise RefusedError(f"partition {leaf} is not settled")
            if any(leaf.low <= row.id < leaf.high for t in database.open_transactions for row in t.rows):
                return None
            losses = self._losses(leaf)
            retries = [
                (endpoint_id, event_id, run)
                for endpoint_id, rows in tables.retries.items()
                for event_id, run in rows
                if leaf.low <= event_id < leaf.high and not self._has_copy(endpoint_id, event_id)
            ]
            before = len(tables.outbox) + len(tables.attempts)
            for loss in losses:
                counted = (loss.endpoint_id, "expired", leaf.low - 1, leaf.high - 1, loss.deliveries)
                self._write(_discard, row=counted)
                self._tell(tables.endpoints[loss.endpoint_id], loss)
            self._write(_end_retries, keys=tuple(retries))
            self._write(_reopen_dead_letters, leaf=leaf)
            self._write(_empty, leaf=leaf)
            return Expired(losses, 64 * (before - len(tables.outbox) - len(tables.attempts)))

        return await self._call("expire", work)

    def _losses(self, leaf: Span) -> list[Loss]:
        tables = self._tables
        losses = []
        for endpoint in sorted(self._live().values(), key=lambda row: row.id):
            subscriptions = [s for s in tables.subscriptions.values() if s.endpoint_id == endpoint.id]
            events = tables.between(leaf.low, leaf.high - 1, len(tables.ids), endpoint.account_id)
            unsent = [event for event in events if self._is_unsent(endpoint, subscriptions, event)]
            waiting = [
                tables.outbox.get(event_id)
                for event_id, _ in tables.retries.get(endpoint.id, {})
                if leaf.low <= event_id < leaf.high and not self._has_copy(endpoint.id, event_id)
            ]
            if unsent or waiting:
                times = [event.created_us for event in (*unsent, *waiting) if event is not None]
                first, last = min(times, default=0), max(times, default=0)
                losses.append(Loss(endpoint.id, len(unsent), len(waiting), first, last))
        return losses

    def _is_unsent(self, endpoint: EndpointRow, subscriptions: Sequence[SubscriptionRow], event: LogRow) -> bool:
        lane = self._tables.lanes.get(endpoint.id)
        is_open = lane is not None and (event.id > lane.settled or event.id in lane.holes)
        return not self._tables.has_attempt(event.id, endpoint.id, 0) and any(
            (is_open or not s.taken_up) and s.is_for(event) for s in subscriptions
        )

    def _tell(self, endpoint: EndpointRow, loss: Loss) -> None:
        about = {"id": endpoint.id, "name": endpoint.name, "url": origin_of(endpoint.url)}
        times = {"from": timestamp(loss.first_us).decode(), "to": timestamp(loss.last_us).decode()}
        payload = orjson.dumps({"endpoint": about, "deliveries": loss.deliveries, **times})
        with self._database.begin() as transaction:
            transaction.insert(endpoint.account_id, "endpoint.events_expired", payload)

    # ── sweeping ──

    async def sweep_retries(self, after: tuple[int, int, int], limit: int) -> SweptRetries:
        def work() -> SweptRetries:
            retries = self._tables.retries
            keys = sorted((e, i, run) for e, rows in retries.items() for i, run in rows if (e, i, run) > after)[:limit]
            gone = [key for key in keys if key[1] not in self._tables.outbox and not self._has_copy(key[0], key[1])]
            counts: dict[int, list[int]] = {}
            for endpoint_id, event_id, _ in gone:
                if endpoint_id in self._live():
                    counts.setdefault(endpoint_id, []).append(event_id)
            for endpoint_id, ids in counts.items():
                self._write(_discard, row=(endpoint_id, "expired", min(ids) - 1, max(ids), len(ids)))
            self._write(_end_retries, keys=tuple(gone))
            return SweptRetries(sum(map(len, counts.values())), keys[-1] if keys else None)

        return await self._call("sweep_retries", work)

    async def sweep_attempts(self, below: int, before_us: int, limit: int) -> int:
        def work() -> int:
            attempts = self._tables.attempts
            keys = tuple(
                sorted(k for k, row in attempts.items() if k[0] < below and row.started_us < before_us)[:limit]
            )
            self._write(_delete_attempts, keys=keys)
            return len(keys)

        return await self._call("sweep_attempts", work)

    async def sweep_dead_letters(self, after: int, before_us: int, limit: int) -> SweptDeadLetters:
        return await self._call("sweep_dead_letters", lambda: SweptDeadLetters(0, 0, None))

    async def sweep(self, what: Sweep, before_us: int, limit: int) -> int:
        return await self._call(f"sweep_{what}", lambda: 0)

    # ── the database ──

    @property
    def _tables(self) -> Tables:
        return self._database.tables

    def _write(self, operation: Callable[..., None], **arguments: object) -> None:
        self._database.write(partial(operation, **arguments), synchronous=True)

    def _ids(self, parent: str, span: Span) -> list[int]:
        """Return the ids of the table's rows within the span, ascending."""
        if parent == "outbox":
            return [row.id for row in self._tables.between(span.low, span.high - 1, len(self._tables.ids))]
        return sorted({row.event_id for row in self._tables.attempts.values() if span.low <= row.event_id < span.high})

    def _is_held(self, parent: str) -> bool:
        holders = self._database.holders()
        return parent == "outbox" and bool(holders.running or holders.prepared)

    def _default_is_held(self, parent: str) -> bool:
        leaves = self._tables.leaves[parent]
        rows = [row.id for transaction in self._database.open_transactions for row in transaction.rows]
        return parent == "outbox" and any(not any(leaf.low <= i < leaf.high for leaf in leaves) for i in rows)

    def _has_copy(self, endpoint_id: int, event_id: int) -> bool:
        return any(key[:2] == (endpoint_id, event_id) for key in self._tables.dead_letters)

    def _live(self) -> dict[int, EndpointRow]:
        return {i: row for i, row in self._tables.endpoints.items() if row.state is not EndpointState.DELETED}


# ── operations on the tables, as the WAL has them ──


def _set_leaves(tables: Tables, parent: str, leaves: Sequence[Span]) -> None:
    tables.leaves[parent] = sorted(leaves)


def _set_fence(tables: Tables, parent: str, fence: tuple[Span, bool] | None) -> None:
    if fence is None:
        tables.fences.pop(parent, None)
    else:
        tables.fences[parent] = fence


def _discard(tables: Tables, row: tuple[int, str, int, int, int]) -> None:
    tables.discards.append(row)


def _end_retries(tables: Tables, keys: Sequence[RetryKey]) -> None:
    for endpoint_id, event_id, run in keys:
        tables.retries[endpoint_id].pop((event_id, run), None)


def _reopen_dead_letters(tables: Tables, leaf: Span) -> None:
    for key, letter in tables.dead_letters.items():
        run = letter.resent_run
        if run is None or run in tables.runs_finished or not leaf.low <= letter.event.id < leaf.high:
            continue
        if tables.runs[run][1].source is RunSource.LOG and not tables.has_attempt(letter.event.id, key[0], run):
            tables.dead_letters[key] = replace(letter, resent_run=None)


def _delete_attempts(tables: Tables, keys: Sequence[tuple[int, int, int, int]]) -> None:
    for key in keys:
        event_id, endpoint_id, run, _ = key
        tables.attempts_of[event_id, endpoint_id].remove(tables.attempts.pop(key))
        if run == 0:
            tables.attempted[event_id].pop(endpoint_id, None)


def _empty(tables: Tables, leaf: Span) -> None:
    _delete_attempts(tables, [key for key in tables.attempts if leaf.low <= key[0] < leaf.high])
    for event_id in [i for i in tables.ids if leaf.low <= i < leaf.high]:
        tables.ids.remove(event_id)
        tables.ids_of_account[tables.outbox.pop(event_id).account_id].remove(event_id)
