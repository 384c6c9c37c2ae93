"""Accounts, keys, portal links, erasures, the audit: who may, and who did."""

from dataclasses import asdict
from typing import Any

from dispatcher.errors import ForbiddenError
from dispatcher.store import access, erasure, search
from dispatcher.web.api.models import base
from dispatcher.web.api.models import people as models
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import after_id, before_id, page
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Who


async def show_me(call: Call) -> Any:
    """Show who asks"""
    who = call.principal
    return {"actor": who.actor, "account_id": who.account_id, "is_operator": who.is_operator}


async def list_accounts(call: Call) -> Any:
    """List accounts that have endpoints, and how these are"""
    query: models.AccountFilter = call.query
    async with call.visit.db() as db:
        rows = await search.accounts(db, after=query.cursor or "", limit=query.limit)
    return page(rows, query.limit, "account_id")


async def list_keys(call: Call) -> Any:
    """List keys

    With their first characters and when they were last used."""
    query: models.KeyFilter = call.query
    async with call.visit.db() as db:
        found = await access.keys(
            db, call.principal, account_id=query.account_id, revoked=query.revoked, after=after_id(query.cursor), limit=query.limit
        )  # fmt: skip
    return page(found, query.limit, "id")


async def create_key(call: Call) -> Any:
    """Make a key

    Its text is in this answer and nowhere else. It may not outlive the key that makes it; a portal link's login makes none."""
    body: models.NewKey = call.body
    visit = call.visit
    if visit.login is not None and visit.login.by_link and not call.principal.is_operator:
        raise ForbiddenError(
            "a login by a portal link makes no keys, which would outlive it: use a key of the account, or ask who runs this"
        )
    async with visit.db() as db:
        made, text = await access.create_key(
            db, call.principal, account_id=body.account_id, name=body.name, ttl_s=body.ttl_s, until=visit.key_expires_at
        )
    call.visit.subject = f"key_id={made.id} account_id={made.account_id or '–'}"
    return asdict(made) | {"key": text}


async def revoke_key(call: Call) -> Any:
    """End a key, and the logins by it, at once and for good"""
    async with call.visit.db() as db:
        return await access.revoke_key(db, call.principal, call.path["key_id"])


async def list_portal_links(call: Call) -> Any:
    """List portal links"""
    query: base.OfAccount = call.query
    async with call.visit.db() as db:
        found = await access.links(
            db, call.principal, account_id=query.account_id, after=after_id(query.cursor), limit=query.limit
        )
    return page(found, query.limit, "id")


async def create_portal_link(call: Call) -> Any:
    """Make a link that logs a customer in

    The platform's backend asks for it when its customer, whom it has logged in, opens the panel; it sends the browser there, or
    shows it in a frame.
    Add ?next=/path to arrive at a page of the panel."""
    body: models.NewLink = call.body
    web = call.visit.web
    ttl_s = web.settings.portal_link_s if body.ttl_s is None else body.ttl_s
    async with call.visit.db() as db:
        made, token = await access.create_link(
            db, call.principal, account_id=body.account_id, ttl_s=ttl_s, session_s=web.settings.portal_session_s, uses=body.uses
        )  # fmt: skip
    call.visit.subject = f"link_id={made.id} account_id={body.account_id}"
    return asdict(made) | {"url": web.url(f"/enter/{token}", call.visit.request)}


async def revoke_portal_link(call: Call) -> Any:
    """End a portal link, and the logins by it"""
    async with call.visit.db() as db:
        return await access.revoke_link(db, call.principal, call.path["link_id"])


async def list_erasures(call: Call) -> Any:
    """List what was erased, by whom and when"""
    query: base.OfAccount = call.query
    async with call.visit.db() as db:
        found = await erasure.find(db, account_id=query.account_id, after=after_id(query.cursor), limit=query.limit)
    return page(found, query.limit, "id")


async def erase(call: Call) -> Any:
    """Erase an account, or one event, for good

    Payloads, answers, secrets and addresses go; attempts, times and counts stay. An account is erased in the background:
    `ended_at` tells when it is
    done. Stop its producer first: events that are inserted after it began are not erased."""
    body: models.NewErasure = call.body
    web = call.visit.web
    if (body.account_id is None) == (body.event is None):
        raise ProblemError(400, "name an account, or an event", field="account_id")
    if body.event is not None:
        async with call.visit.db(long=True) as db:
            call.visit.subject = f"event={body.event}"
            return await erasure.erase_event(db, await erasure.look_at_event(db, body.event)), 200
    account_id = body.account_id
    assert account_id is not None
    call.visit.subject = f"account_id={account_id}"

    async def work() -> None:
        async with web.pool.connection(long=True) as db:
            await erasure.erase_account(db, web.settings, account_id)

    async with call.visit.db(long=True) as db:
        web.jobs.check_room()
        await erasure.look_at_account(db, account_id)  # a wrong name is told, not erased
        begun = await erasure.begin_account(db, account_id)
    web.jobs.start(f"erase account {account_id}", work)
    return begun


async def list_changes(call: Call) -> Any:
    """List who changed what through panel and API, the newest first"""
    query: base.OfAccount = call.query
    async with call.visit.db() as db:
        found = await access.changes(
            db, call.principal, account_id=query.account_id, before=before_id(query.cursor), limit=query.limit
        )
    return page(found, query.limit, "id")


async def list_source_addresses(call: Call) -> Any:
    """List the addresses that POSTs come from

    For a receiver's firewall."""
    return {"data": [one.strip() for one in call.visit.web.settings.source_addresses.split(",") if one.strip()]}


OPERATIONS = (
    Operation("GET", "/me", show_me, "Access", models.Me),
    Operation("GET", "/source-addresses", list_source_addresses, "Access", models.SourceAddresses),
    Operation("GET", "/accounts", list_accounts, "Access", base.Page[models.AccountRow], models.AccountFilter, who=Who.OPERATOR),
    Operation("GET", "/keys", list_keys, "Access", base.Page[models.KeyAnswer], models.KeyFilter),
    Operation("POST", "/keys", create_key, "Access", models.CreatedKey, body=models.NewKey, status=201, change="key.create"),
    Operation("DELETE", "/keys/{key_id}", revoke_key, "Access", models.KeyAnswer, change="key.revoke"),
    Operation("GET", "/portal-links", list_portal_links, "Access", base.Page[models.LinkAnswer], base.OfAccount, who=Who.OPERATOR),
    Operation(
        "POST", "/portal-links", create_portal_link, "Access", models.CreatedLink, body=models.NewLink, status=201, who=Who.OPERATOR,
        change="portal_link.create",
    ),
    Operation(
        "DELETE", "/portal-links/{link_id}", revoke_portal_link, "Access", models.LinkAnswer, who=Who.OPERATOR, change="portal_link.revoke"
    ),
    Operation("GET", "/erasures", list_erasures, "Access", base.Page[models.ErasureAnswer], base.OfAccount, who=Who.OPERATOR),
    Operation(
        "POST", "/erasures", erase, "Access", models.ErasureAnswer, body=models.NewErasure, status=202, who=Who.OPERATOR, change="erase"
    ),
    Operation("GET", "/audit", list_changes, "Access", base.Page[models.ChangeAnswer], base.OfAccount),
)  # fmt: skip
