"""Alerts: who is told by mail what happens to endpoints, and what was told."""

from typing import Any

from dispatcher.store import alerts
from dispatcher.web.api.models import alerts as models
from dispatcher.web.api.models import base
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import after_id, before_id, page
from dispatcher.web.visit import Who


async def list_alert_recipients(call: Call) -> Any:
    """List who is told by mail

    Of an account's endpoints; recipients without an account are operators, who are told of all."""
    query: base.OfAccount = call.query
    async with call.visit.db() as db:
        found = await alerts.recipients(
            db, call.principal, account_id=query.account_id, after=after_id(query.cursor), limit=query.limit
        )
    return page(found, query.limit, "id")


async def add_alert_recipient(call: Call) -> Any:
    """Add a recipient

    An address that is told by mail when an endpoint fails, is disabled, recovers, or loses events to retention. Without an account, by an
    operator: it is told of every account's endpoints."""
    body: models.NewRecipient = call.body
    async with call.visit.db() as db:
        made = await alerts.add_recipient(db, call.principal, account_id=body.account_id, address=body.address)
    call.visit.subject = f"recipient_id={made.id} account_id={made.account_id or '–'}"
    return made


async def remove_alert_recipient(call: Call) -> Any:
    """Take a recipient out"""
    async with call.visit.db() as db:
        return await alerts.remove_recipient(db, call.principal, call.path["recipient_id"])


async def list_alerts(call: Call) -> Any:
    """List what was told by mail, the newest first

    To an account's recipients; for operators who name no account, to all, operators included."""
    query: base.OfAccount = call.query
    async with call.visit.db() as db:
        found = await alerts.alerts(
            db, call.principal, account_id=query.account_id, before=before_id(query.cursor), limit=query.limit
        )
    return page(found, query.limit, "id")


async def show_operator_account(call: Call) -> Any:
    """Show whose endpoints get every account's operational events"""
    async with call.visit.db() as db:
        return {"account_id": await alerts.operator_account(db)}


async def put_operator_account(call: Call) -> Any:
    """Say whose endpoints get every account's operational events

    From then on whatever an account is told of its endpoints (`endpoint.failing` and the like) goes to the endpoints of this account too, with
    `account_id` in its data. It is an account like any other; null: none."""
    body: models.OperatorAccount = call.body
    async with call.visit.db() as db:
        await alerts.put_operator_account(db, call.principal, body.account_id)
    call.visit.subject = f"account_id={body.account_id or '–'}"
    return {"account_id": body.account_id}


_TAG = "Alerts"

OPERATIONS = (
    Operation("GET", "/alert-recipients", list_alert_recipients, _TAG, base.Page[models.RecipientAnswer], base.OfAccount),
    Operation(
        "POST", "/alert-recipients", add_alert_recipient, _TAG, models.RecipientAnswer, body=models.NewRecipient, status=201,
        change="alert_recipient.add",
    ),
    Operation(
        "DELETE", "/alert-recipients/{recipient_id}", remove_alert_recipient, _TAG, models.RecipientAnswer, change="alert_recipient.remove"
    ),
    Operation("GET", "/alerts", list_alerts, _TAG, base.Page[models.AlertAnswer], base.OfAccount),
    Operation("GET", "/operator-account", show_operator_account, _TAG, models.OperatorAccountAnswer, who=Who.OPERATOR),
    Operation(
        "PUT", "/operator-account", put_operator_account, _TAG, models.OperatorAccountAnswer, body=models.OperatorAccount,
        who=Who.OPERATOR, change="operator_account.put",
    ),
)  # fmt: skip
