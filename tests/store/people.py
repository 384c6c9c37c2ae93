"""What people find in a database: endpoints, events, and what became of them, as rows. For tests of the people's side."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg


async def endpoint(db: asyncpg.Connection, account: str = "acct", state: str = "live", **columns: Any) -> int:
    columns = {"account_id": account, "url": "https://receiver.test/hook", "state": state} | columns
    if state in ("paused", "disabled"):
        columns["paused_at_id"] = 0
    names, places = ", ".join(columns), ", ".join(f"${n}" for n in range(1, 1 + len(columns)))
    endpoint_id: int = await db.fetchval(
        f"INSERT INTO webhook.endpoint ({names}) VALUES ({places}) RETURNING id", *columns.values()
    )
    await db.execute(
        "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) "
        "SELECT id, unnest(event_types), 0 FROM webhook.endpoint WHERE id = $1",
        endpoint_id,
    )
    return endpoint_id


async def emit(
    db: asyncpg.Connection, count: int = 1, account: str = "acct", type: str = "message.sent", at: datetime | None = None
) -> list[int]:  # fmt: skip
    rows = await db.fetch(
        "INSERT INTO webhook.outbox (account_id, type, payload, created_at) "
        "SELECT $1, $2, json_build_object('secret', n), coalesce($4, clock_timestamp()) FROM generate_series(1, $3::integer) AS n RETURNING id",
        account, type, count, at,
    )  # fmt: skip
    return [row["id"] for row in rows]


async def attempted(
    db: asyncpg.Connection, endpoint_id: int, ids: Sequence[int], *, run: int = 0, number: int = 1, fault: str | None = None
) -> None:  # fmt: skip
    await db.execute(
        "INSERT INTO webhook.attempt SELECT unnest($2::bigint[]), $1, now(), $3, 1000, $4, "
        "CASE WHEN $5::text IS NULL THEN 200 ELSE 500 END, $5, CASE WHEN $5::text IS NOT NULL THEN 'HTTP/1.1 500 said'::bytea END",
        endpoint_id, ids, run, number, fault,
    )  # fmt: skip


async def retrying(db: asyncpg.Connection, endpoint_id: int, ids: Sequence[int], *, run: int = 0) -> None:
    await attempted(db, endpoint_id, ids, run=run, fault="status")
    await db.execute(
        "INSERT INTO webhook.retry SELECT $1, unnest($2::bigint[]), $3, 2, now(), now() + interval '1 h', 'answered 500'",
        endpoint_id, ids, run,
    )  # fmt: skip


async def died(
    db: asyncpg.Connection, endpoint_id: int, ids: Sequence[int], *, run: int = 0, **columns: Any
) -> list[int]:
    """Give the deliveries up: a failed attempt and a dead letter each."""
    await attempted(db, endpoint_id, ids, run=run, fault=columns.get("fault", "status"))
    columns = {"reason": "attempt 11 was the last of the schedule", "status": 500, "fault": "status"} | columns
    names, places = ", ".join(columns), ", ".join(f"${n}" for n in range(4, 4 + len(columns)))
    rows = await db.fetch(
        "INSERT INTO webhook.dead_letter "
        f"(endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, {names}) "
        f"SELECT $1, id, $3, account_id, type, payload, created_at, 1, now(), {places} FROM webhook.outbox WHERE id = ANY ($2::bigint[]) "
        "ORDER BY id RETURNING id",
        endpoint_id, ids, run, *columns.values(),
    )  # fmt: skip
    return [row["id"] for row in rows]


async def states(db: asyncpg.Connection) -> dict[int, str]:
    """Return the state of each dead letter."""
    return {row["id"]: row["state"] for row in await db.fetch("SELECT id, state FROM webhook.dead_letter ORDER BY id")}


async def retention(db: asyncpg.Connection) -> None:
    """Take the log away, as retention does."""
    await db.execute("TRUNCATE webhook.outbox, webhook.attempt")
