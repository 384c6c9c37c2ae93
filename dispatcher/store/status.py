"""Who owns the database, since when, how far behind it is, and who waits to take over: one snapshot, for people and scripts."""

from datetime import datetime
from pathlib import Path
from typing import Any

from dispatcher.store import standby
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

STATUS = load(Path(__file__).with_name("status.sql"))

LANES_MAX = 10
COUNT_MAX = 100_000  # nobody's next step depends on more; counting a million rows takes a while

ALIVE, SILENT, NONE = "alive", "not answering", "none"


async def read_status(connection: Connection) -> dict[str, Any]:
    """Return the status as a dict that is ready for JSON. `owner.state` is "alive", "not answering" (it holds the lock, and its heartbeat has
    stopped: a standby would take over) or "none" (nobody holds the lock; the rest is of the last owner). A count above COUNT_MAX reads
    COUNT_MAX + 1. Ages are in seconds, by the database's clock."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        row = await connection.fetchrow(STATUS.owner)
        standbys = await connection.fetch(STATUS.standbys)
        oldest_at = await connection.fetchval(STATUS.oldest, row["position"])
        lanes = await connection.fetchrow(STATUS.lanes)
        behind = await connection.fetch(STATUS.lanes_behind, LANES_MAX)
        retries = await connection.fetchval(STATUS.retries, COUNT_MAX + 1)
        dead_letters = await connection.fetchval(STATUS.dead_letters, COUNT_MAX + 1)
    now = row["now"]
    heartbeat_age_s = _age_s(now, row["heartbeat_at"])
    is_fresh = heartbeat_age_s is not None and heartbeat_age_s <= standby.STALE_S
    state = NONE if row["pid"] is None else ALIVE if is_fresh else SILENT
    return {
        "owner": {
            "name": row["owner"],
            "state": state,
            "since": row["owned_since"],
            "since_s": _age_s(now, row["owned_since"]),
            "epoch": row["epoch"],
            "heartbeat_at": row["heartbeat_at"],
            "heartbeat_age_s": heartbeat_age_s,
            "backend_pid": row["pid"],
            "client_addr": row["client_addr"],
        },
        "standbys": [
            {
                "name": waiting["name"],
                "since": waiting["since"],
                "backend_pid": waiting["pid"],
                "client_addr": waiting["client_addr"],
            }
            for waiting in standbys
        ],
        "log": {
            "position": row["position"],
            "last_id": row["last_id"],
            "behind_ids": max(0, row["last_id"] - row["position"]),
            "gap_ranges": row["gap_ranges"],
            "gap_ids": row["gap_ids"],
            "oldest_undelivered_at": oldest_at,
            "oldest_undelivered_s": _age_s(now, oldest_at),
        },
        "lanes": {
            "behind": lanes["behind"],
            "backlog": lanes["backlog"],
            "top": [
                {
                    "endpoint_id": lane["endpoint_id"],
                    "account_id": lane["account_id"],
                    "name": lane["name"],
                    "url": lane["url"],
                    "state": lane["state"],
                    "backlog": lane["backlog"],
                    "settled": lane["settled"],
                    "oldest_s": _age_s(now, lane["oldest_at"]),
                }
                for lane in behind
            ],
        },
        "retries": retries,
        "dead_letters": dead_letters,
        "now": now,
    }


def _age_s(now: datetime, at: datetime | None) -> float | None:
    return None if at is None else round(max(0.0, (now - at).total_seconds()), 3)
