"""The built-in receiver: an address to try things out with, what it gets, live, and what it answers."""

from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError, StateError
from dispatcher.store import receivers
from dispatcher.store.receivers import ANSWERS
from dispatcher.store.session import Connection
from dispatcher.web.api.paging import after_id, page
from dispatcher.web.api.receivers import NOT_SET_UP, shown_received, shown_receiver
from dispatcher.web.panel import filters
from dispatcher.web.streams import Message
from dispatcher.web.visit import Route, Visit

SHOWN = 50
_PATH = "/receivers/{receiver_id:[0-9]{1,18}}"


async def show_all(visit: Visit) -> StreamResponse:
    return await _list(visit)


async def create(visit: Visit) -> StreamResponse:
    account_id = visit.principal.within(visit.form.get("account_id", "").strip() or None)
    if visit.web.settings.receiver_site is None:
        raise StateError(NOT_SET_UP)
    try:
        async with visit.db() as db:
            made = await receivers.create(db, visit.principal, account_id)
    except DispatcherError as exc:
        if visit.wants_json:
            raise
        return await _list(visit, problem=exc)
    visit.subject = f"receiver_id={made.id} account_id={made.account_id}"
    return visit.redirect(f"/receivers/{made.id}")


async def show(visit: Visit) -> StreamResponse:
    settings = visit.web.settings
    async with visit.db() as db:
        found = await receivers.get(db, visit.principal, _id(visit))
        shown = shown_receiver(settings, found)
        rows = await receivers.received(db, found.id, limit=SHOWN)
        used_by = [] if shown["url"] is None else await receivers.endpoints_of_url(db, found.account_id, shown["url"])
    data: dict[str, Any] = {
        "receiver": shown,
        "requests": [shown_received(row) for row in rows],
        "endpoints": used_by,
        "answers": ANSWERS,
    }
    return visit.answer("receiver.html", data)


async def change(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        found = await receivers.get(db, visit.principal, _id(visit))
        await receivers.put_answer(db, visit.principal, found.id, visit.form.get("answer", ""))
    return visit.redirect(f"/receivers/{_id(visit)}")


async def delete(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await receivers.delete(db, visit.principal, _id(visit))
    return visit.redirect("/receivers")


async def create_endpoint(visit: Visit) -> StreamResponse:
    """Make a draft of an endpoint that has this address, and go on with its test."""
    async with visit.db() as db:
        found = await receivers.get(db, visit.principal, _id(visit))
        url = shown_receiver(visit.web.settings, found)["url"]
        if url is None:
            raise StateError(NOT_SET_UP)
        view = await visit.admin(db).create(found.account_id, {"url": url, "name": "Built-in receiver"})
    visit.subject = f"endpoint_id={view.id} account_id={found.account_id}"
    return visit.redirect(f"/endpoints/{view.id}/setup#test")


async def live(visit: Visit) -> StreamResponse:
    """Stream what the receiver gets."""
    async with visit.db() as db:
        found = await receivers.get(db, visit.principal, _id(visit))

    async def look(db: Connection, seen: int | None) -> tuple[int, list[Message]]:
        if seen is None:
            newest = await receivers.received(db, found.id, limit=1)
            return (newest[0].id if newest else 0), []
        rows = await receivers.received(db, found.id, after=seen)
        return (rows[0].id if rows else seen), [("request", shown_received(row)) for row in reversed(rows)]

    return await visit.web.streams.follow(visit, ("receiver", found.account_id, found.id), look)


async def _list(visit: Visit, *, problem: DispatcherError | None = None) -> StreamResponse:
    settings = visit.web.settings
    async with visit.db() as db:
        rows = await receivers.find(db, visit.principal, after=after_id(visit.query.get("cursor")), limit=SHOWN)
    data: dict[str, Any] = {
        "receivers": [shown_receiver(settings, row) for row in rows],
        "next": page(rows, SHOWN, "id")["next"],
        "is_set_up": settings.receiver_site is not None,
        "answers": ANSWERS,
    }
    if visit.wants_json:
        return visit.json(data)
    said = None if problem is None else problem.message
    status = 200 if problem is None else visit.web.problem(problem).status
    return visit.html(
        "receivers.html", status=status, problem=said, not_set_up=NOT_SET_UP, onward=filters.onward("/receivers", visit.query, data["next"]),
        is_onward="cursor" in visit.query, **data,
    )  # fmt: skip


def _id(visit: Visit) -> int:
    return int(visit.path["receiver_id"])


ROUTES = (
    Route("GET", "/receivers", show_all),
    Route("POST", "/receivers", create, change="receiver.create"),
    Route("GET", _PATH, show),
    Route("GET", f"{_PATH}/live", live),
    Route("POST", _PATH, change, change="receiver.change"),
    Route("POST", f"{_PATH}/delete", delete, change="receiver.delete"),
    Route("POST", f"{_PATH}/endpoint", create_endpoint, change="endpoint.create"),
)
