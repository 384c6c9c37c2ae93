"""Event types: what exists, for people and code generators."""

from typing import Any

from dispatcher.store import event_types
from dispatcher.store.event_types import EventType
from dispatcher.web.api.models import base
from dispatcher.web.api.models import catalogue as models
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import page
from dispatcher.web.visit import Who


async def list_event_types(call: Call) -> Any:
    """List event types

    By name. Events of types that aren't listed are delivered all the same."""
    query: base.Paged = call.query
    async with call.visit.db() as db:
        found = await event_types.find(db, after=query.cursor or "", limit=query.limit)
    return page([one.as_dict() for one in found], query.limit, "name")


async def show_event_type(call: Call) -> Any:
    """Show an event type: its meaning, JSON Schema and a sample"""
    async with call.visit.db() as db:
        return (await event_types.get(db, call.path["name"])).as_dict()


async def put_event_type(call: Call) -> Any:
    """Add an event type, or replace it"""
    body: models.EventTypeGiven = call.body
    async with call.visit.db() as db:
        is_new = await event_types.put(db, EventType(name=call.path["name"], **body.model_dump()))
        shown = (await event_types.get(db, call.path["name"])).as_dict()
    return shown, 201 if is_new else 200


async def delete_event_type(call: Call) -> Any:
    """Take an event type out of the catalogue

    Its events are delivered as before."""
    async with call.visit.db() as db:
        found = await event_types.get(db, call.path["name"])
        await event_types.delete(db, call.path["name"])
    return found.as_dict()


_ONE = "/event-types/{name}"

OPERATIONS = (
    Operation("GET", "/event-types", list_event_types, "Event types", base.Page[models.EventTypeAnswer], base.Paged),
    Operation("GET", _ONE, show_event_type, "Event types", models.EventTypeAnswer),
    Operation(
        "PUT", _ONE, put_event_type, "Event types", models.EventTypeAnswer, body=models.EventTypeGiven, who=Who.OPERATOR,
        change="event_type.put", body_bytes_max=262_144,
    ),
    Operation("DELETE", _ONE, delete_event_type, "Event types", models.EventTypeAnswer, who=Who.OPERATOR, change="event_type.delete"),
)  # fmt: skip
