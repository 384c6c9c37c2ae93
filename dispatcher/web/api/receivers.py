"""The built-in receiver: an address of ours that shows what it gets, for who has no server yet."""

from dataclasses import asdict
from typing import Any

from dispatcher.domain.url import receiver_url
from dispatcher.errors import StateError
from dispatcher.settings import Settings
from dispatcher.store import receivers
from dispatcher.store.receivers import Received, Receiver
from dispatcher.web.api.models import base
from dispatcher.web.api.models import receivers as models
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import after_id, before_id, page

NOT_SET_UP = (
    "there is no built-in receiver here: its address is not set up (DISPATCHER_WEB_LISTEN or DISPATCHER_WEB_CONNECT)"
)


async def list_receivers(call: Call) -> Any:
    """List receivers that have not ended"""
    query: base.OfAccount = call.query
    settings = call.visit.web.settings
    async with call.visit.db() as db:
        found = await receivers.find(
            db, call.principal, account_id=query.account_id, after=after_id(query.cursor), limit=query.limit
        )
    return page([shown_receiver(settings, one) for one in found], query.limit, "id")


async def create_receiver(call: Call) -> Any:
    """Make an address that shows what it gets

    For who has no server yet: give it to an endpoint as its `url`. It can't be guessed, and ends after 24 hours."""
    body: models.NewReceiver = call.body
    settings = call.visit.web.settings
    account_id = call.principal.within(body.account_id)
    if settings.receiver_site is None:
        raise StateError(NOT_SET_UP)
    async with call.visit.db() as db:
        made = await receivers.create(db, call.principal, account_id)
    call.visit.subject = f"receiver_id={made.id} account_id={made.account_id}"
    return shown_receiver(settings, made)


async def show_receiver(call: Call) -> Any:
    """Show a receiver"""
    async with call.visit.db() as db:
        found = await receivers.get(db, call.principal, call.path["receiver_id"])
    return shown_receiver(call.visit.web.settings, found)


async def change_receiver(call: Call) -> Any:
    """Say what a receiver answers"""
    body: models.ReceiverChange = call.body
    async with call.visit.db() as db:
        found = await receivers.put_answer(db, call.principal, call.path["receiver_id"], body.answer)
    return shown_receiver(call.visit.web.settings, found)


async def delete_receiver(call: Call) -> Any:
    """End a receiver

    What it got goes with it. An endpoint that still has its address is told 410, which disables it."""
    async with call.visit.db() as db:
        found = await receivers.delete(db, call.principal, call.path["receiver_id"])
    return shown_receiver(call.visit.web.settings, found)


async def list_received(call: Call) -> Any:
    """List what a receiver got, the newest first

    The last hundred requests, with the first 16 kB of each body, and whether the signature fits an endpoint that has its address."""
    query: models.ReceivedFilter = call.query
    async with call.visit.db() as db:
        found = await receivers.get(db, call.principal, call.path["receiver_id"])
        rows = await receivers.received(
            db, found.id, before=before_id(query.cursor), after=query.after, limit=query.limit
        )
    return page([shown_received(row) for row in rows], query.limit, "id")


def shown_receiver(settings: Settings, receiver: Receiver) -> dict[str, Any]:
    """`url` is None where the settings don't say any more where the receiver is."""
    site = settings.receiver_site
    shown = asdict(receiver) | {"url": None if site is None else receiver_url(site, receiver.token)}
    del shown["token"]
    return shown


def shown_received(row: Received) -> dict[str, Any]:
    body = row.body.decode("utf-8", "replace")
    return asdict(row) | {
        "headers": [{"name": name, "value": value} for name, value in row.headers],
        "body": body,
        "body_is_whole": len(row.body) == row.body_bytes and body.encode() == row.body,
    }


_TAG = "Receivers"
_ONE = "/receivers/{receiver_id}"

OPERATIONS = (
    Operation("GET", "/receivers", list_receivers, _TAG, base.Page[models.ReceiverAnswer], base.OfAccount),
    Operation(
        "POST", "/receivers", create_receiver, _TAG, models.ReceiverAnswer, body=models.NewReceiver, status=201, change="receiver.create",
        body_is_optional=True,
    ),
    Operation("GET", _ONE, show_receiver, _TAG, models.ReceiverAnswer),
    Operation("PATCH", _ONE, change_receiver, _TAG, models.ReceiverAnswer, body=models.ReceiverChange, change="receiver.change"),
    Operation("DELETE", _ONE, delete_receiver, _TAG, models.ReceiverAnswer, change="receiver.delete"),
    Operation("GET", f"{_ONE}/requests", list_received, _TAG, base.Page[models.ReceivedAnswer], models.ReceivedFilter),
)  # fmt: skip
