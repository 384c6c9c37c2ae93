"""What an operator sees first: how much is delivered, what waits and where, and how the database is.

It is what the tables tell. What only the delivering process's memory knows (POSTs in flight, breakers) isn't here.
"""

import time
from pathlib import Path
from typing import Any

from dispatcher.store import stats, status
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

OVERVIEW = load(Path(__file__).with_name("overview.sql"))

MINUTES = 2  # of 10,000 busy endpoints 20,000 rows, each with 20 counts to add up
TOP = 10
NEWEST_IDS, NEWEST_POSTS = 2_000, 500


async def read_overview(db: Connection) -> dict[str, Any]:
    """Return the overview as a dict that is ready for JSON, what `dispatcher status` shows as `service`."""
    known = await status.read_status(db)
    began = time.perf_counter()
    database = await db.fetchrow(OVERVIEW.database)
    round_trip_ms = (time.perf_counter() - began) * 1e3
    posts = await db.fetchrow(OVERVIEW.first_posts, known["log"]["last_id"] - NEWEST_IDS, NEWEST_POSTS)
    p50_ms, p99_ms = posts["ms"] or (None, None)
    return {
        "service": known,
        "endpoints": dict(await db.fetchrow(OVERVIEW.endpoints)),
        "failing": [dict(row) for row in await db.fetch(OVERVIEW.failing, TOP)],
        "backlog_by_account": [dict(row) for row in await db.fetch(OVERVIEW.backlog_by_account, TOP)],
        "first_posts": {"posts": posts["posts"], "p50_ms": _ms(p50_ms), "p99_ms": _ms(p99_ms)},
        "database": dict(database) | {"round_trip_ms": round(round_trip_ms, 2)},
    }


async def read_minutes(db: Connection) -> dict[str, Any]:
    """Return what happened in the last whole minutes, in sum. With many busy endpoints it takes longer than the rest."""
    found = await stats.lately(db, MINUTES)
    return {
        "minutes": MINUTES, "delivered_per_s": found.delivered / MINUTES / 60, "failed_per_s": found.failed / MINUTES / 60,
        **found.as_dict(),
    }  # fmt: skip


def _ms(value: Any) -> float | None:
    return None if value is None else round(max(0.0, float(value)), 2)
