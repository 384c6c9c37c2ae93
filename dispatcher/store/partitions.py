"""The `Partitions` port on PostgreSQL: one session of its own, so that what takes long or waits for a lock holds up nobody.

"Not now" is the server's lock_not_available, told as False or None. Before a call that needs a whole table's lock, we look
at who holds one: a transaction that is there twice, 20 ms apart, would outlast the try, and all producers would wait behind
it for nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from dispatcher.domain.endpoint import FOREVER
from dispatcher.domain.moment import from_us, to_us
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.retention import MARGIN_IDS, Span, is_settled
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
from dispatcher.store.session import Connection, Session
from dispatcher.store.sql import load

T = TypeVar("T")
STATEMENTS = load(Path(__file__).with_name("partitions.sql"))

# What the functions raise, and what the server does when two make the same leaf: duplicate_table, invalid_object_definition.
_REFUSED_STATES = ("22023", "55000", "42704", "42P07", "42P17")
LOOK_TWICE_S = 0.02
LONG_S = 3_600.0  # counting what is owed of 50 million events to an endpoint takes minutes; reading through the DEFAULT partition, seconds
_PARAMETERS = {
    # Plans are made each time: the leaves change, and a few statements every ten seconds can afford it. By indexes only: a leaf that was not
    # analysed yet would be read from end to end, once for each endpoint that lags.
    "plan_cache_mode": "force_custom_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "statement_timeout": f"{LONG_S * 1000:.0f}ms",
    # A process that is frozen between two statements would keep the leaf's lock, and its successor's reader would wait behind it.
    "idle_in_transaction_session_timeout": "3s",
    "lock_timeout": "2s",  # of what isn't said in schema.sql: reading a leaf that somebody is emptying
}


class PgPartitions:
    def __init__(self, dsn: str, *, timeout_s: float) -> None:
        self._session = Session(dsn, "janitor", timeout_s=timeout_s, parameters=_PARAMETERS)

    async def begin(self) -> None:
        await self._session.close()
        self._session.life = None
        self._session.life = await self._session.run(lambda c: c.fetchval(STATEMENTS.life))

    async def close(self) -> None:
        await self._session.close()

    # ── looking ──

    async def shape(self) -> LogShape:
        return await self._session.run(_shape)

    async def newest_us(self, leaf: Span) -> tuple[int | None, int | None]:
        async def work(connection: Connection) -> tuple[int | None, int | None]:
            event = await connection.fetchval(STATEMENTS.newest_event, leaf.low, leaf.high)
            attempt = await connection.fetchval(STATEMENTS.newest_attempt, leaf.low, leaf.high)
            return None if event is None else to_us(event), None if attempt is None else to_us(attempt)

        return await self._session.run(work)

    async def total_bytes(self) -> int:
        rows = await self._session.run(lambda c: c.fetch(STATEMENTS.sizes))
        return sum(row["bytes"] for row in rows)

    async def first_id_since(self, since_us: int, after: int, upto: int) -> tuple[int, int] | None:
        async def work(connection: Connection) -> tuple[int, int] | None:
            low, high, found = after + 1, upto + 1, None  # the first one lies in low … high − 1, or is `found`
            while low < high:
                middle = (low + high) // 2
                row = await connection.fetchrow(STATEMENTS.first_from, middle)
                if row is None or row["id"] > upto:
                    high = middle
                elif to_us(row["created_at"]) >= since_us:
                    high, found = middle, (row["id"], to_us(row["created_at"]))
                else:
                    low = row["id"] + 1
            return found

        return await self._session.run(work)

    # ── partitions ──

    async def attach(self, parent: Parent, leaf: Span) -> bool:
        async def work(connection: Connection) -> bool:
            if parent == "outbox":
                last_id = (await connection.fetchrow(STATEMENTS.progress))["last_id"]
                if leaf.low - last_id < MARGIN_IDS and await _is_held(connection, parent):
                    return False
            return await _now_or_not(connection.execute(STATEMENTS.attach, parent, leaf.low, leaf.high)) is not None

        return await self._session.run(work, timeout_s=LONG_S)

    async def recut(self, parent: Parent, leaf: Span, cuts: Sequence[int]) -> bool:
        async def work(connection: Connection) -> bool:
            if await _is_held(connection, parent):
                return False
            return await _now_or_not(connection.execute(STATEMENTS.recut, parent, leaf.low, list(cuts))) is not None

        return await self._session.run(work)

    async def adopt(self, parent: Parent, leaf: Span) -> str | None:
        async def work(connection: Connection) -> str | None:
            if await connection.fetchval(STATEMENTS.fence_is_valid, parent) and await _is_held(connection, parent):
                return None
            return await _now_or_not(connection.fetchval(STATEMENTS.adopt, parent, leaf.low, leaf.high))

        return await self._session.run(work, timeout_s=LONG_S)

    # ── retention ──

    async def retrying_below(self, bound: int) -> list[int]:
        rows = await self._session.run(lambda c: c.fetch(STATEMENTS.retrying_below, bound))
        return [row["id"] for row in rows]

    async def expire(self, epoch: int, leaf: Span) -> Expired | None:
        async def work(connection: Connection) -> Expired | None:
            async def whole() -> Expired:
                async with _transaction(connection):
                    return await _expire(connection, epoch, leaf)

            return await _now_or_not(whole())

        return await self._session.run(work, timeout_s=LONG_S)

    # ── sweeping ──

    async def sweep_retries(self, after: tuple[int, int, int], limit: int) -> SweptRetries:
        row = await self._session.run(lambda c: c.fetchrow(STATEMENTS.sweep_retries, *after, limit))
        if row is None:
            return SweptRetries(0, None)
        return SweptRetries(row["deliveries"], (row["endpoint_id"], row["event_id"], row["run"]))

    async def sweep_attempts(self, below: int, before_us: int, limit: int) -> int:
        before = from_us(before_us)
        deleted: int = await self._session.run(lambda c: c.fetchval(STATEMENTS.sweep_attempts, below, before, limit))
        return deleted

    async def sweep_dead_letters(self, after: int, before_us: int, limit: int) -> SweptDeadLetters:
        row = await self._session.run(
            lambda c: c.fetchrow(STATEMENTS.sweep_dead_letters, after, from_us(before_us), limit)
        )
        if row is None:
            return SweptDeadLetters(0, 0, None)
        return SweptDeadLetters(row["deleted"], row["open"], row["passed"] if row["is_old"] else None)

    async def sweep(self, what: Sweep, before_us: int, limit: int) -> int:
        statement = {
            "tests": STATEMENTS.sweep_tests,
            "stats": STATEMENTS.sweep_stats,
            "runs": STATEMENTS.sweep_runs,
            "event_keys": STATEMENTS.sweep_event_keys,
        }[what]
        deleted: int = await self._session.run(lambda c: c.fetchval(statement, from_us(before_us), limit))
        return deleted


async def list_partitions(connection: Connection) -> list[dict[str, Any]]:
    """Tell people what the log is stored in, by ascending ids, the DEFAULT partition last. Sizes include indexes."""
    progress = await connection.fetchrow(STATEMENTS.progress)
    found: dict[tuple[int | None, int | None], dict[str, Any]] = {}
    for row in await connection.fetch(STATEMENTS.listed):
        low, high = row["low"], row["high"]
        if (low, high) not in found:
            newest = None if low is None else await connection.fetchval(STATEMENTS.newest_event, low, high)
            found[low, high] = {
                "low": low,
                "high": high,
                "state": _state(low, high, newest, progress),
                "events_estimate": None,
                "newest_event_at": newest,
                "outbox_bytes": 0,
                "attempt_bytes": 0,
            }
        leaf = found[low, high]
        leaf[f"{row['parent']}_bytes"] = row["bytes"]
        if row["parent"] == "outbox":
            leaf["events_estimate"] = row["rows_estimate"]
    return list(found.values())


def _state(low: int | None, high: int | None, newest: datetime | None, progress: Any) -> str:
    if low is None or high is None:
        return "default"
    if low > progress["last_id"]:
        return "ahead"
    gaps = [(r.lower, r.upper - 1) for r in progress["gaps"]]
    if not is_settled(Span(low, high), progress["position"], gaps):
        return "in use"
    return "empty" if newest is None else "settled"


async def _shape(connection: Connection) -> LogShape:
    leaves: dict[str, list[Span]] = {"outbox": [], "attempt": []}
    for row in await connection.fetch(STATEMENTS.leaves):
        leaves[row["parent"]].append(Span(row["low"], row["high"]))
    fences = {row["parent"]: Span(row["low"], row["high"]) for row in await connection.fetch(STATEMENTS.fences)}
    tables = {}
    for parent, statement in (("outbox", STATEMENTS.outbox_outside), ("attempt", STATEMENTS.attempt_outside)):
        between = _between(leaves[parent])
        rows = await connection.fetch(statement, [span.low for span in between], [span.high for span in between])
        outside = [Span(row["low"], row["high"]) for row in rows]
        tables[parent] = TableShape(leaves[parent], outside, fences.get(parent))
    row = await connection.fetchrow(STATEMENTS.progress)
    gaps = IdRanges((r.lower, r.upper - 1) for r in row["gaps"])
    return LogShape(tables["outbox"], tables["attempt"], row["position"], gaps, row["last_id"], to_us(row["wall"]))


def _between(leaves: Sequence[Span]) -> list[Span]:
    """Return the ranges of ids that no leaf covers."""
    lows = [0, *(leaf.high for leaf in leaves)]
    highs = [*(leaf.low for leaf in leaves), FOREVER]
    return [Span(low, high) for low, high in zip(lows, highs, strict=True) if low < high]


async def _expire(connection: Connection, epoch: int, leaf: Span) -> Expired:
    """Count what is lost, end its retries, keep and tell the counts, and empty the leaf: in the caller's transaction."""
    found: dict[int, Loss] = {}
    for row in await connection.fetch(STATEMENTS.unsent, leaf.low, leaf.high):
        first, last = to_us(row["first_at"]), to_us(row["last_at"])
        found[row["endpoint_id"]] = Loss(row["endpoint_id"], row["deliveries"], 0, first, last)
    for row in await connection.fetch(STATEMENTS.end_retries, leaf.low, leaf.high):
        known = found.get(row["endpoint_id"])
        unsent = 0 if known is None else known.unsent
        times = [to_us(at) for at in (row["first_at"], row["last_at"]) if at is not None]
        times += [] if known is None else [known.first_us, known.last_us]
        first, last = min(times, default=0), max(times, default=0)
        found[row["endpoint_id"]] = Loss(row["endpoint_id"], unsent, row["deliveries"], first, last)
    await connection.execute(STATEMENTS.reopen_dead_letters, leaf.low, leaf.high)
    losses = [found[endpoint_id] for endpoint_id in sorted(found)]
    if losses:
        ids, deliveries = [loss.endpoint_id for loss in losses], [loss.deliveries for loss in losses]
        await connection.execute(STATEMENTS.discard, leaf.low, leaf.high, ids, deliveries)
        first_at, last_at = [from_us(loss.first_us) for loss in losses], [from_us(loss.last_us) for loss in losses]
        await connection.execute(STATEMENTS.tell, ids, deliveries, first_at, last_at)
    freed = await connection.fetchval(STATEMENTS.expire, leaf.low, leaf.high, epoch)
    if freed is None:
        raise FencedError(f"epoch {epoch} is over: another dispatcher took over")
    return Expired(losses, freed)


async def _is_held(connection: Connection, parent: Parent) -> bool:
    """Tell whether a transaction that isn't about to end holds a lock on the table."""
    first = {row[0] for row in await connection.fetch(STATEMENTS.in_the_way, parent)}
    if not first:
        return False
    await asyncio.sleep(LOOK_TWICE_S)
    return not first.isdisjoint(row[0] for row in await connection.fetch(STATEMENTS.in_the_way, parent))


async def _now_or_not(call: Awaitable[T]) -> T | None:
    """Return None if a lock could not be had at once. Raises RefusedError where it isn't safe, or the partitions are others by now."""
    try:
        return await call
    except asyncpg.LockNotAvailableError:
        return None
    except asyncpg.PostgresError as exc:
        if exc.sqlstate in _REFUSED_STATES:
            raise RefusedError(str(exc)) from exc
        raise


@contextlib.asynccontextmanager
async def _transaction(connection: Connection) -> AsyncIterator[None]:
    """Commit, or roll back what the server refused, "not now" included. After anything else the session hangs up (store/recording.py)."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    except asyncpg.PostgresError:
        await transaction.rollback()
        raise
    await transaction.commit()


__all__ = ["PgPartitions"]
