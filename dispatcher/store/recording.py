"""How a batch of results is written: attempts by COPY, encoded by hand, the rest by one statement a kind."""

import contextlib
import struct
from collections.abc import AsyncIterator, Sequence

import asyncpg
import structlog

from dispatcher.domain.moment import from_us
from dispatcher.domain.ranges import IdRanges
from dispatcher.ports import AttemptRow, Batch, CheckpointWrite, FencedError, Recorded, RunRow
from dispatcher.store.session import Connection, is_away
from dispatcher.store.sql import SQL

_log = structlog.get_logger(room="store")

CANCELED_RETRIES = 5_000  # of canceled runs that are ended in a batch
PG_EPOCH_US = 946_684_800_000_000  # PostgreSQL counts from 2000-01-01

_ATTEMPT_COLUMNS = (
    "event_id",
    "endpoint_id",
    "run",
    "number",
    "started_at",
    "duration_us",
    "status",
    "fault",
    "response_head",
)
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
_COPY_END = struct.pack(">h", -1)
# 9 fields; event, endpoint, run, number, started_at, duration; each after its length. asyncpg's copy_records_to_table encodes value by
# value; a delivered attempt is nothing but fixed-size words, so one struct call does.
_FIXED = struct.Struct(">hiqiqiiihiqii")
_DELIVERED = struct.Struct(">hiqiqiiihiqiiihii")  # … and status, fault NULL, response_head NULL


async def write(connection: Connection, batch: Batch, *, by_row: bool) -> Recorded:
    """Write a batch in one transaction. `by_row`: attempts one by one, each under a savepoint, after a COPY that was refused.

    Raises FencedError if another dispatcher took over."""
    taken_up: list[int] = []
    finished: list[int] = []
    async with _transaction(connection):
        if not await connection.fetch(SQL.fence, batch.epoch):
            raise FencedError(f"another dispatcher took over: our epoch {batch.epoch} is over")
        if batch.attempts:
            if by_row:
                for row in batch.attempts:
                    await _insert_attempt(connection, row)
            else:
                await _copy_attempts(connection, batch.attempts)
        if batch.retries:
            r = batch.retries
            await connection.execute(
                SQL.put_retries,
                [x.endpoint_id for x in r],
                [x.event_id for x in r],
                [x.run for x in r],
                [x.number for x in r],
                [from_us(x.first_attempt_us) for x in r],
                [from_us(x.due_us) for x in r],
                [_text(x.reason) for x in r],
                [x.ordering_key for x in r],
            )
        if batch.dead:
            d = batch.dead
            await connection.execute(
                SQL.put_dead_letters,
                [x.endpoint_id for x in d],
                [x.event_id for x in d],
                [x.run for x in d],
                [x.attempts for x in d],
                [from_us(x.first_attempt_us) for x in d],
                [_text(x.reason) for x in d],
                [x.status for x in d],
                [x.fault.value for x in d],
            )
        if batch.settled_retries:
            s = batch.settled_retries
            await connection.execute(SQL.end_retries, [x[0] for x in s], [x[1] for x in s], [x[2] for x in s])
        if batch.runs:
            finished = await _write_runs(connection, batch.runs)
        if batch.stats:
            stats = batch.stats
            await connection.execute(
                SQL.put_stats,
                batch.epoch,
                [x.minute for x in stats],
                [x.endpoint_id for x in stats],
                [x.delivered for x in stats],
                [x.failed for x in stats],
                [x.dead for x in stats],
                [x.expired for x in stats],
                [x.duration_ms for x in stats],
                [f"{{{','.join(map(str, x.durations))}}}" for x in stats],
            )
        if batch.checkpoint is not None:
            taken_up = await _write_checkpoint(connection, batch.checkpoint)
    return Recorded(taken_up, finished)


async def _copy_attempts(connection: Connection, rows: Sequence[AttemptRow]) -> None:
    source = _copy_rows(rows)
    if connection.is_closed():
        # Dropped between the last statement's answer and our turn, as when we were frozen. asyncpg's COPY doesn't look: an AttributeError.
        raise asyncpg.InterfaceError("the connection was closed")
    await connection.copy_to_table(
        "attempt", schema_name="webhook", columns=_ATTEMPT_COLUMNS, format="binary", source=source
    )


async def _copy_rows(rows: Sequence[AttemptRow]) -> AsyncIterator[bytes]:
    yield b"".join([_COPY_HEADER, *map(_copy_row, rows), _COPY_END])


def _copy_row(row: AttemptRow) -> bytes:
    started = row.started_us - PG_EPOCH_US
    if row.fault is None:
        return _DELIVERED.pack(
            9,
            8,
            row.event_id,
            8,
            row.endpoint_id,
            4,
            row.run,
            2,
            row.number,
            8,
            started,
            4,
            row.duration_us,
            2,
            row.status,
            -1,
            -1,
        )
    fixed = _FIXED.pack(
        9, 8, row.event_id, 8, row.endpoint_id, 4, row.run, 2, row.number, 8, started, 4, row.duration_us
    )
    status = None if row.status is None else struct.pack(">h", row.status)
    return fixed + _field(status) + _field(row.fault.value.encode()) + _field(row.response_head)


def _field(value: bytes | None) -> bytes:
    return struct.pack(">i", -1) if value is None else struct.pack(">i", len(value)) + value


@contextlib.asynccontextmanager
async def _transaction(connection: Connection) -> AsyncIterator[None]:
    """Commit, or roll back what the server refused. After anything else, a cancellation too, the session hangs up: a ROLLBACK would
    first wait for the cancelled statement, for as long as the server is silent."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    except asyncpg.PostgresError as exc:
        if not is_away(exc):
            await transaction.rollback()
        raise
    await transaction.commit()


async def _insert_attempt(connection: Connection, row: AttemptRow) -> None:
    """Insert one row under a savepoint; one that is still refused goes in without its free text."""
    values = [row.event_id, row.endpoint_id, row.run, row.number, from_us(row.started_us), row.duration_us, row.status]
    fault = None if row.fault is None else row.fault.value
    try:
        async with _transaction(connection):
            await connection.execute(SQL.attempt_one, *values, fault, row.response_head)
    except asyncpg.PostgresError as exc:
        if is_away(exc):
            raise
        _log.warning("attempt.text_dropped", event_id=row.event_id, endpoint_id=row.endpoint_id, error=str(exc))
        await connection.execute(SQL.attempt_one, *values, fault, None)


async def _write_runs(connection: Connection, runs: Sequence[RunRow]) -> list[int]:
    canceled = [x.run for x in runs if x.canceled and x.ended]
    if canceled:
        await connection.execute(SQL.end_canceled_runs, canceled, CANCELED_RETRIES)
    rows = await connection.fetch(
        SQL.put_runs,
        [x.run for x in runs],
        [x.settled for x in runs],
        [x.attempted for x in runs],
        [x.delivered for x in runs],
        [x.dead for x in runs],
        [x.ended for x in runs],
    )
    return [row["run_id"] for row in rows if row["finished"]]


async def _write_checkpoint(connection: Connection, write: CheckpointWrite) -> list[int]:
    taken_up: list[int] = []
    if write.lanes:
        lanes = write.lanes
        await connection.execute(
            SQL.put_lanes,
            [x.endpoint_id for x in lanes],
            [x.settled for x in lanes],
            [_multirange(x.holes) for x in lanes],
            [x.backlog for x in lanes],
        )
    if write.lanes_gone:
        await connection.execute(SQL.end_lanes, write.lanes_gone)
    if write.taken_up:
        taken_up = [row["id"] for row in await connection.fetch(SQL.take_up, write.taken_up)]
    await connection.execute(SQL.put_checkpoint, write.position, _multirange(write.gaps))
    return taken_up


def _multirange(ranges: IdRanges) -> str:
    return "{" + ",".join(f"[{low},{high + 1})" for low, high in ranges) + "}"


def _text(text: str) -> str:
    return text.replace("\x00", "�")[:500]
