"""The catalogue: what happens, what each event says, and a way to see one arrive: its sample, sent to an endpoint as a test."""

from typing import Any
from urllib.parse import urlsplit

from aiohttp.web import StreamResponse

from dispatcher.errors import InputError
from dispatcher.store import event_types
from dispatcher.store.event_types import EventType
from dispatcher.web.panel.fields import fields
from dispatcher.web.panel.setup import send_test
from dispatcher.web.visit import Route, Visit

ROWS = 100
ENDPOINTS_MAX = 50  # to choose from; who has more gives the number
_ONE = "/catalogue/{name:[a-z0-9_.]{1,128}}"


async def catalogue(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        types = await event_types.find(db, after=visit.query.get("cursor", "")[:128], limit=ROWS + 1)
    more = types[ROWS - 1].name if len(types) > ROWS else None
    shown = types[:ROWS]
    if visit.wants_json:
        return visit.json({"data": [one.as_dict() for one in shown], "next": more})
    groups: dict[str, list[EventType]] = {}
    for one in shown:
        groups.setdefault(one.name.partition(".")[0], []).append(one)
    return visit.html("catalogue.html", groups=groups, next=more)


async def event_type(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        found = await event_types.get(db, visit.path["name"])
        rows = await visit.admin(db).endpoints(None, None, limit=ENDPOINTS_MAX + 1)
    endpoints = [
        {"id": row["id"], "name": row["name"] or urlsplit(row["url"]).netloc, "state": row["state"]} for row in rows
    ]
    data: dict[str, Any] = {"type": found.as_dict(), "endpoints": endpoints[:ENDPOINTS_MAX]}
    if visit.wants_json:
        return visit.json(data)
    return visit.html(
        "event_type.html", **data, all_fit=len(endpoints) <= ENDPOINTS_MAX, fields=fields(found.json_schema)
    )


async def send(visit: Visit) -> StreamResponse:
    """Send the type's sample to an endpoint, as a test; its setup page shows what came of it."""
    given = visit.form.get("endpoint_id", "").strip()
    if not (given.isascii() and given.isdecimal() and len(given) <= 18):
        raise InputError("say to which endpoint, by its number", field="endpoint_id")
    visit.subject += f" endpoint_id={given}"
    return await send_test(visit, int(given), visit.path["name"])


ROUTES = (
    Route("GET", "/catalogue", catalogue),
    Route("GET", _ONE, event_type),
    Route("POST", f"{_ONE}/send", send, change="endpoint.test"),
)
