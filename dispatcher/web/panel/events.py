"""Events: found in the log, and each with what became of it at every endpoint: why did it not arrive?"""

from dataclasses import asdict
from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError
from dispatcher.store import search
from dispatcher.store.search import Found
from dispatcher.store.session import Connection
from dispatcher.web.api.events import told_of
from dispatcher.web.api.paging import after_id
from dispatcher.web.panel import filters
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Route, Visit

ROWS = 50
ENDPOINTS_MAX = 30  # of the event's account, on a page
DATA_CHARS_MAX = 16_384
FIELDS = ("event", "type", "reference", "since", "until", "account_id")


async def events(visit: Visit) -> StreamResponse:
    given = visit.query
    event = filters.word(given, "event")
    found, problem = Found([], search.Searched(0, None, True), None), None
    async with visit.db() as db:
        try:
            if event is not None:
                shown = await visit.admin(db).events.show(event, 0)  # of no endpoint: whether it is there
                return visit.redirect(f"/events/{shown['id']}")
            found = await _find(visit, db, given)
        except (DispatcherError, ProblemError) as exc:
            problem = visit.web.problem(exc)
            if visit.wants_json or problem.status not in (400, 404):
                raise
    if visit.wants_json:
        return visit.json({"data": found.rows, "next": found.next, "searched": asdict(found.searched)})
    return visit.html(
        "events.html", status=200 if problem is None else problem.status, data=found.rows, searched=found.searched, problem=problem,
        onward=filters.onward("/events", given, found.next), filters={name: given.get(name, "") for name in FIELDS},
        is_filtered=any(given.get(name) for name in FIELDS), is_onward="cursor" in given,
    )  # fmt: skip


async def event(visit: Visit) -> StreamResponse:
    after = after_id(visit.query.get("cursor"))
    async with visit.db() as db:
        shown = await told_of(visit.admin(db), visit.path["event"], after=after, limit=ENDPOINTS_MAX)
    text = shown.pop("payload")
    data: dict[str, Any] = shown | {
        "deliveries": [
            {name: value for name, value in one.items() if name != "attempts"}
            | {"attempts": sum(attempt["number"] > 0 for attempt in one["attempts"]), "last": _last(one["attempts"])}
            for one in shown["deliveries"]
        ],
        "next": None if shown["next"] is None else str(shown["next"]),
        "data": text if text is None else text[:DATA_CHARS_MAX],
        "data_is_cut": text is not None and len(text) > DATA_CHARS_MAX,
    }
    if visit.wants_json:
        return visit.json({"event": data})
    onward = filters.onward(f"/events/{shown['id']}", {}, data["next"])
    return visit.html("event.html", event=data, onward=onward, is_onward=after > 0)


def _last(attempts: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not attempts:
        return None
    newest = max(attempts, key=lambda one: one["started_at"])
    return {name: newest[name] for name in ("started_at", "status", "fault")}


async def _find(visit: Visit, db: Connection, given: Any) -> Found:
    return await search.events(
        db, visit.principal, account_id=filters.word(given, "account_id"), types=filters.types(given), text=filters.wanted(given),
        since=filters.moment(given, "since"), until=filters.moment(given, "until"), cursor=given.get("cursor"), limit=ROWS,
    )  # fmt: skip


ROUTES = (
    Route("GET", "/events", events),
    Route("GET", "/events/{event:[0-9a-z_]{1,40}}", event),
)
