"""Deliveries: found by what is known of them, and each with its attempts, its request made once more, and a button to send it again."""

from dataclasses import asdict
from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.verdict import verdict
from dispatcher.errors import DispatcherError, NotFoundError
from dispatcher.store import runs, search
from dispatcher.store.admin import Admin
from dispatcher.store.search import Found
from dispatcher.store.session import Connection
from dispatcher.web.api.events import statuses
from dispatcher.web.pages import tone
from dispatcher.web.panel import filters
from dispatcher.web.panel.rerender import rerender
from dispatcher.web.problems import ProblemError
from dispatcher.web.streams import Message
from dispatcher.web.visit import Route, Visit

ROWS = 30  # to render 50 holds the loop for over 5 ms
SHOWN_MAX = 50  # attempts of a delivery: the newest
FIELDS = ("endpoint_id", "type", "state", "status", "event", "reference", "since", "until", "account_id")
STATUSES = {"2": "2xx", "3": "3xx", "4": "4xx", "5": "5xx"}
LIVE_EVERY_S = 1.0
_PATH = "/deliveries/{event:[0-9a-z_]{1,40}}/{endpoint_id:[0-9]{1,18}}"


async def deliveries(visit: Visit) -> StreamResponse:
    given = visit.query
    found, problem = Found([], search.Searched(0, None, True), None), None
    async with visit.db() as db:
        try:
            found = await _find(visit, db, given)
        except (DispatcherError, ProblemError) as exc:
            problem = visit.web.problem(exc)
            if visit.wants_json or problem.status not in (400, 404):
                raise
        if visit.wants_json:
            return visit.json({"data": found.rows, "next": found.next, "searched": asdict(found.searched)})
        endpoints = await filters.endpoints_to_choose(visit, db)
    return visit.html(
        "deliveries.html", status=200 if problem is None else problem.status, data=found.rows, searched=found.searched, problem=problem,
        onward=filters.onward("/deliveries", given, found.next), filters={name: given.get(name, "") for name in FIELDS},
        is_filtered=any(given.get(name) for name in FIELDS), endpoints=endpoints, states=search.STATES, statuses=STATUSES,
        is_onward="cursor" in given,
    )  # fmt: skip


async def delivery(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        admin = visit.admin(db)
        shown, found = await _delivery(visit, admin)
        try:
            view = await admin.get(found["endpoint_id"])
        except NotFoundError:
            view = None  # deleted: what it has had is still shown
        last = next((one for one in reversed(found["attempts"]) if one["number"]), None)
        now = await admin.now()
        due = await search.retries_of(db, shown["id"], found["endpoint_id"])
    made = rerender(visit.web.settings, view, shown, last["number"] if last else 1, last["started_at"] if last else now)
    data: dict[str, Any] = {
        "event": {name: value for name, value in shown.items() if name not in ("deliveries", "payload")},
        "delivery": found | {"attempts": found["attempts"][-SHOWN_MAX:]},
        "more_attempts": max(0, len(found["attempts"]) - SHOWN_MAX), "next_attempt_at": due[0] if due else None,
        "is_overdue": bool(due) and due[0] <= now,
        "request": made.request, "curl": made.curl, "request_is_cut": made.cut, "no_request": made.why_not,
    }  # fmt: skip
    return visit.answer("delivery.html", data)


async def resend(visit: Visit) -> StreamResponse:
    endpoint_id = int(visit.path["endpoint_id"])
    async with visit.db() as db:
        run = await runs.resend(
            db, visit.path["event"], endpoint_id, visit.form.get("note", "").strip(), by=visit.principal
        )
    visit.subject += f" run_id={run.id}"
    return visit.redirect(f"/deliveries/{visit.path['event']}/{endpoint_id}#attempts")


async def live(visit: Visit) -> StreamResponse:
    """Stream one delivery's fate and attempts as they are recorded."""
    async with visit.db() as db:
        shown, found = await _delivery(visit, visit.admin(db))
    event_id, endpoint_id = str(shown["id"]), found["endpoint_id"]

    async def look(db: Connection, seen: dict[str, Any] | None) -> tuple[dict[str, Any], list[Message]]:
        told = await Admin(db, visit.web.settings, visit.principal).events.show(event_id, endpoint_id)
        now = next((one for one in told["deliveries"] if one["endpoint_id"] == endpoint_id), found)
        stands = {
            "fate": now["fate"], "tone": tone(now["fate"]), "runs": [one | {"tone": tone(one["fate"])} for one in now["runs"]],
            "attempts": [one | {"verdict": _verdict(one), "kind": _kind(now, one["run"])} for one in now["attempts"][-SHOWN_MAX:]],
        }  # fmt: skip
        return stands, [] if stands == seen else [("delivery", stands)]

    topic = ("delivery", shown["account_id"], shown["id"], endpoint_id)
    return await visit.web.streams.follow(visit, topic, look, every_s=LIVE_EVERY_S, kept=("delivery",))


async def _find(visit: Visit, db: Connection, given: Any) -> Found:
    status = filters.number(given, "status")
    if status == 0:
        raise ProblemError(400, "a status is 100 to 999, or its first digit", field="status")
    state = filters.one_of(given, "state", search.STATES)
    return await search.deliveries(
        db, visit.principal, account_id=filters.word(given, "account_id"), endpoint_id=filters.number(given, "endpoint_id"),
        states=[state] if state else (), types=filters.types(given), status=statuses(status), event=filters.word(given, "event"),
        text=filters.wanted(given), since=filters.moment(given, "since"), until=filters.moment(given, "until"),
        cursor=given.get("cursor"), limit=ROWS,
    )  # fmt: skip


async def _delivery(visit: Visit, admin: Admin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the event and its delivery to the endpoint, each attempt with a verdict in words."""
    endpoint_id = int(visit.path["endpoint_id"])
    shown = await admin.events.show(visit.path["event"], endpoint_id)
    found = next((one for one in shown["deliveries"] if one["endpoint_id"] == endpoint_id), None)
    if found is None:
        raise NotFoundError(f"endpoint {endpoint_id} was not to have event {visit.path['event']}")
    for one in found["attempts"]:
        one["verdict"] = _verdict(one)
        one["kind"] = _kind(found, one["run"])
    return shown, found


def _kind(delivery: dict[str, Any], run: int) -> str:
    return next((str(one["kind"]) for one in delivery["runs"] if one["run"] == run), "original")


def _verdict(attempt: dict[str, Any]) -> str:
    """Say of an attempt what its endpoint's owner should know."""
    if attempt["fault"] is None:
        return f"delivered, answered {attempt['status']}"
    if attempt["fault"] == Fault.EXPIRED.value:
        return "expired: the event's own time was over before it could be sent"
    return verdict(Outcome(Fault(attempt["fault"]), attempt["status"]))


ROUTES = (
    Route("GET", "/deliveries", deliveries),
    Route("GET", _PATH, delivery),
    Route("GET", f"{_PATH}/live", live),
    Route("POST", f"{_PATH}/resend", resend, change="delivery.resend"),
)
