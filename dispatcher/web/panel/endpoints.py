"""The list of endpoints: what there is, how it does, and what needs a hand."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from aiohttp.web import StreamResponse

from dispatcher.store import stats
from dispatcher.web.api.paging import after_id, page
from dispatcher.web.panel.charts import Chart, bars
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Route, Visit

ROWS = 50
STATES = ("draft", "live", "paused", "disabled")


async def endpoints(visit: Visit) -> StreamResponse:
    state, account_id = visit.query.get("state") or None, visit.query.get("account_id") or None
    if state not in (None, *STATES):
        raise ProblemError(400, f"there is no state {state!r}: {', '.join(STATES)}", field="state")
    async with visit.db() as db:
        rows = await visit.admin(db).endpoints(account_id, state, after=after_id(visit.query.get("cursor")), limit=ROWS)
        ids = [row["id"] for row in rows]
        summaries = await stats.summaries(db, ids)
        hours = await stats.by_hour(db, ids)
        failures = await stats.last_failures(db, ids)
    shown = []
    for row in rows:
        summary = summaries.get(row["id"])
        shown.append(
            row | {
                "host": urlsplit(row["url"]).netloc,
                "stats_24h": None if summary is None else summary.as_dict(),
                "hours": hours.get(row["id"], []),
                "last_failure": failures.get(row["id"]),
            }
        )  # fmt: skip
    found: dict[str, Any] = page(shown, ROWS, "id") | {"filters": {"state": state, "account_id": account_id}}
    if visit.wants_json:
        return visit.json(found)
    return visit.html("endpoints.html", **found, states=STATES, spark=_spark)


def _spark(hours: Sequence[tuple[int, int]]) -> Chart:
    """Called by the template, row by row: fifty at once would hold the loop for several milliseconds."""
    return bars(hours, width=96, height=24, span="in 24 hours")


ROUTES = (Route("GET", "/endpoints", endpoints),)
