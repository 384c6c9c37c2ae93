"""Events and deliveries: send, find, and tell why one didn't arrive."""

from typing import Any

import orjson

from dispatcher.domain.endpoint import pattern_matches
from dispatcher.domain.event import TOLD_TO_OTHERS
from dispatcher.errors import NotFoundError
from dispatcher.store import runs, search
from dispatcher.store.admin import Admin
from dispatcher.store.events import NewEvent
from dispatcher.store.search import Found
from dispatcher.web.api.models import base, recovery
from dispatcher.web.api.models import events as models
from dispatcher.web.api.operation import BATCH_BYTES_MAX, Call, Operation
from dispatcher.web.api.paging import after_id
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Who

ENDPOINTS_MAX = 100  # of an event's account, looked at for a page: each costs a third of a millisecond or more


async def send_event(call: Call) -> Any:
    """Send an event

    For producers that can't INSERT into the outbox. `data` goes out byte by byte as it came in. Repeating it under the same
    Idempotency-Key within
    24 hours answers as the first time and sends nothing."""
    body: models.NewEvent = call.body
    sent = await _send(call, [body], b"[" + call.visit.body + b"]")
    return sent[0]


async def send_events(call: Call) -> Any:
    """Send many events

    All or none, in order, in one transaction."""
    body: models.NewEvents = call.body
    return {"data": await _send(call, body.events, call.visit.body, within="events")}


async def _send(call: Call, given: list[models.NewEvent], text: bytes, *, within: str | None = None) -> list[Any]:
    for event in given:
        if event.type in TOLD_TO_OTHERS:
            raise ProblemError(400, f"{event.type} is made by the dispatcher; nobody else sends it", field="type")
    events = [
        NewEvent(
            event.account_id,
            event.type,
            event.occurred_at,
            event.ordering_key,
            event.expires_at,
            event.priority,
            event.traceparent,
        )
        for event in given
    ]
    async with call.visit.db() as db:
        admin = call.visit.admin(db)

        async def act() -> dict[str, Any]:
            sent = await admin.events.send_many(events, text.decode(), within=within)
            return {"sent": [{"id": event_id, "event_id": public_id} for event_id, public_id in sent]}

        answer, _ = await admin.events.once(call.idempotency_key, call.visit.request.path.encode() + b"\n" + text, act)
    sent: list[Any] = answer["sent"]
    call.visit.subject = f"events={len(sent)} first={sent[0]['id']}"
    return sent


async def list_events(call: Call) -> Any:
    """Find events

    From new to old. A page looks at a bounded number of events, and says how far it came: go on with `next` until `searched.complete`."""
    query: models.EventFilter = call.query
    async with call.visit.db() as db:
        found = await search.events(
            db, call.principal, account_id=query.account_id, types=query.type, text=query.text, since=query.since, until=query.until,
            cursor=query.cursor, limit=query.limit,
        )  # fmt: skip
    return _page(found)


async def show_event(call: Call) -> Any:
    """Show an event, and why it did or didn't arrive

    Each endpoint that was to have it, with what happened there, attempt by attempt; and each endpoint of its account that was
    not, with why. For so many of the account's endpoints at a time; `next` leads to the others."""
    query: models.EventPart = call.query
    async with call.visit.db() as db:
        shown = await told_of(call.visit.admin(db), call.path["event"], after=after_id(query.cursor), limit=query.limit)
    payload = shown["payload"]
    next_id = shown["next"]
    return shown | {
        "next": None if next_id is None else str(next_id),
        "data": None if payload is None else orjson.loads(payload),
    }


async def told_of(admin: Admin, reference: str, *, after: int = 0, limit: int = ENDPOINTS_MAX) -> dict[str, Any]:
    """Return an event, each endpoint that was to have it, and as `not_for` each of its account that was not, with why. Of the account's
    endpoints `limit` are looked at, from `after` on."""
    shown = await admin.events.show(reference, after=after, limit=limit)
    upto = shown["next"]
    endpoints = await admin.endpoints(shown["account_id"], None, after=after, limit=limit)
    endpoints = [row for row in endpoints if upto is None or row["id"] <= upto]
    had = {delivery["endpoint_id"] for delivery in shown["deliveries"]}
    not_for = [
        {"endpoint_id": row["id"], "name": row["name"], "state": row["state"], "why": _why_not(row, shown["type"])}
        for row in endpoints
        if row["id"] not in had
    ]
    return shown | {"not_for": not_for}


def _why_not(endpoint: dict[str, Any], event_type: str) -> str:
    """Say why an endpoint was not to have an event, as far as its configuration tells."""
    if endpoint["state"] == "draft":
        return "it is a draft, which gets nothing"
    if not any(pattern_matches(pattern, event_type) for pattern in endpoint["event_types"]):
        return f"it doesn't subscribe to {event_type}"
    return (
        "it wasn't subscribed when the event was made: it went live or subscribed later, or what came then was skipped"
    )


async def list_deliveries(call: Call) -> Any:
    """Find deliveries

    From new to old, one for each event and endpoint, with its last attempt. A page looks at a bounded number of events, and says
    how far it came."""
    query: models.DeliveryFilter = call.query
    async with call.visit.db() as db:
        found = await search.deliveries(
            db, call.principal, account_id=query.account_id, endpoint_id=query.endpoint_id, states=query.state, types=query.type,
            status=statuses(query.status), fault=query.fault, event=query.event, text=query.text, since=query.since, until=query.until,
            cursor=query.cursor, limit=query.limit,
        )  # fmt: skip
    return _page(found)


def statuses(status: int | None) -> tuple[int, int] | None:
    if status is None or status >= 100:
        return None if status is None else (status, status)
    if status > 9:
        raise ProblemError(400, "a status is 100 to 999, or its first digit", field="status")
    return status * 100, status * 100 + 99


async def show_delivery(call: Call) -> Any:
    """Show a delivery with its attempts"""
    async with call.visit.db() as db:
        shown = await call.visit.admin(db).events.show(call.path["event"], call.endpoint_id)
    for delivery in shown["deliveries"]:
        if delivery["endpoint_id"] == call.endpoint_id:
            return delivery
    raise NotFoundError(f"endpoint {call.endpoint_id} was not to have event {call.path['event']}")


async def resend_event(call: Call) -> Any:
    """Send an event to an endpoint once more

    A delivery of its own, with retries of its own, under the same webhook-id. From the log, or from a dead letter's copy if
    retention has taken it."""
    body: base.Noted = call.body
    async with call.visit.db() as db:
        run = await runs.resend(db, call.path["event"], call.endpoint_id, body.note, by=call.principal)
    call.visit.subject += f" run_id={run.id}"
    return run.as_dict()


def _page(found: Found) -> dict[str, Any]:
    return {"data": found.rows, "next": found.next, "searched": found.searched}


OPERATIONS = (
    Operation(
        "POST", "/events", send_event, "Events", models.SentEvent, body=models.NewEvent, status=201, who=Who.OPERATOR, change="event.send",
        body_bytes_max=BATCH_BYTES_MAX, is_idempotent=True,
    ),
    Operation(
        "POST", "/events/batch", send_events, "Events", models.SentEvents, body=models.NewEvents, status=201, who=Who.OPERATOR,
        change="event.send", body_bytes_max=BATCH_BYTES_MAX, is_idempotent=True,
    ),
    Operation("GET", "/events", list_events, "Events", models.EventPage, models.EventFilter),
    Operation("GET", "/events/{event}", show_event, "Events", models.EventAnswer, models.EventPart),
    Operation("GET", "/deliveries", list_deliveries, "Deliveries", models.DeliveryPage, models.DeliveryFilter),
    Operation("GET", "/events/{event}/deliveries/{endpoint_id}", show_delivery, "Deliveries", models.EventDelivery),
    Operation(
        "POST", "/events/{event}/deliveries/{endpoint_id}/resend", resend_event, "Deliveries", recovery.RunAnswer, body=base.Noted, status=201,
        change="delivery.resend", body_is_optional=True,
    ),
)  # fmt: skip
