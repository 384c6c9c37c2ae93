"""Alerts: who is told by mail what happens to endpoints, what was told, and how programs are told the same."""

from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError
from dispatcher.store import alerts
from dispatcher.store.session import Connection
from dispatcher.web.api.paging import after_id, page
from dispatcher.web.panel import filters
from dispatcher.web.visit import Route, Visit, Who

TOLD, RECIPIENTS = 50, 100  # rows


async def show(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        return await _page(visit, db, account_id=visit.query.get("account_id", "").strip() or None)


async def add(visit: Visit) -> StreamResponse:
    account_id, address = visit.form.get("account_id", "").strip() or None, visit.form.get("address", "").strip()
    async with visit.db() as db:
        try:
            made = await alerts.add_recipient(db, visit.principal, account_id=account_id, address=address)
        except DispatcherError as exc:
            if visit.wants_json or not visit.principal.sees(account_id):
                raise
            return await _page(visit, db, account_id=account_id, problem=exc, typed=address)
    visit.subject = f"recipient_id={made.id} account_id={made.account_id or '–'}"
    return visit.redirect("/alerts")


async def remove(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await alerts.remove_recipient(db, visit.principal, int(visit.path["recipient_id"]))
    return visit.redirect("/alerts")


async def put_operator_account(visit: Visit) -> StreamResponse:
    account_id = visit.form.get("account_id", "").strip() or None
    async with visit.db() as db:
        await alerts.put_operator_account(db, visit.principal, account_id)
    return visit.redirect("/alerts")


async def _page(
    visit: Visit, db: Connection, *, account_id: str | None, problem: DispatcherError | None = None, typed: str = ""
) -> StreamResponse:
    is_operator = visit.principal.is_operator
    after = after_id(visit.query.get("cursor"))
    recipients = await alerts.recipients(db, visit.principal, account_id=account_id, after=after, limit=RECIPIENTS)
    data: dict[str, Any] = {
        "account_id": account_id,
        "recipients": [
            {"id": one.id, "account_id": one.account_id, "address": one.address, "created_at": one.created_at}
            for one in recipients
        ],
        "next": page(recipients, RECIPIENTS, "id")["next"],
        "told": await alerts.alerts(db, visit.principal, account_id=account_id, limit=TOLD),
        "mail_is_set_up": visit.web.settings.mail_server is not None,
        "mails_per_hour": visit.web.settings.alert_mails_per_hour,
        "operator_account": await alerts.operator_account(db) if is_operator else None,
    }
    if visit.wants_json:
        return visit.json(data)
    said = None if problem is None else problem.message
    status = 200 if problem is None else visit.web.problem(problem).status
    return visit.html(
        "alerts.html", status=status, problem=said, typed=typed, onward=filters.onward("/alerts", visit.query, data["next"]),
        is_onward="cursor" in visit.query, **data,
    )  # fmt: skip


ROUTES = (
    Route("GET", "/alerts", show),
    Route("POST", "/alerts/recipients", add, change="alert_recipient.add"),
    Route("POST", "/alerts/recipients/{recipient_id:[0-9]{1,18}}/remove", remove, change="alert_recipient.remove"),
    Route("POST", "/alerts/operator-account", put_operator_account, Who.OPERATOR, change="operator_account.put"),
)
