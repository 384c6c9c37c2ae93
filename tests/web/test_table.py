"""What holds for every operation, read from the table: a new one can't be forgotten."""

import re
from typing import Any

import pytest

from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.domain.shape import CREDENTIALS, SHAPE
from dispatcher.store import access, alerts, receivers, runs
from dispatcher.store.endpoint import CONFIG_FIELDS
from dispatcher.web.api import OPERATIONS
from dispatcher.web.api.models import endpoints as models
from dispatcher.web.api.operation import Operation
from dispatcher.web.app import routes
from dispatcher.web.visit import SAFE, Who
from tests.conftest import connected
from tests.store import people
from tests.web.conftest import Site

PREFIX = "/api/v1"
BODIES: dict[str, Any] = {  # what an operation needs to be taken seriously
    "create_endpoint": {"account_id": "theirs", "url": "https://receiver.test/hook"},
    "change_endpoint": {"name": "mine now"},
    "send_event": {"account_id": "theirs", "type": "message.sent", "data": {}},
    "send_events": {"events": [{"account_id": "theirs", "type": "message.sent", "data": {}}]},
    "change_run_rate": {"rate_per_s": 5},
    "resend_dead_letters": {"ids": [1]},
    "discard_dead_letters": {"ids": [1]},
    "put_event_type": {"title": "Theirs"},
    "create_key": {"account_id": "theirs"},
    "create_portal_link": {"account_id": "theirs"},
    "erase": {"account_id": "theirs"},
    "add_alert_recipient": {"account_id": "theirs", "address": "mine@example.com"},
    "put_operator_account": {"account_id": "mine"},
    "create_receiver": {"account_id": "theirs"},
    "change_receiver": {"answer": "gone"},
    "start_replay": {"only_failed": False},
}
# Everybody's, or the asker's own: what they answer has nothing of the other account in it.
OWN = {"show_me", "list_source_addresses", "list_event_types", "show_event_type"}


async def their_things(site: Site) -> dict[str, Any]:
    """Make one of everything that belongs to the account `theirs`."""
    async with connected(site.dsn) as db:
        endpoint = await people.endpoint(db, "theirs", name="their endpoint")
        [event, dead] = await people.emit(db, 2, "theirs")
        await people.attempted(db, endpoint, [event], fault="status")
        [letter] = await people.died(db, endpoint, [dead])
        run = await runs.resend(db, str(event), endpoint)
        key, _ = await access.create_key(db, OPERATOR, account_id="theirs", name="their key")
        link, _ = await access.create_link(db, OPERATOR, account_id="theirs", ttl_s=60, session_s=60)
        recipient = await alerts.add_recipient(db, OPERATOR, account_id="theirs", address="their@example.com")
        await db.execute(
            "SELECT webhook.tell_of_endpoint($1, 'endpoint.failing', 'consecutive_failures', now())", endpoint
        )
        receiver = await receivers.create(db, OPERATOR, "theirs")
        await receivers.keep(
            db, receiver.id, [("x", "their header")], b"their body", signature="unknown", endpoint_id=None, status=200
        )
        await access.begin_change(db, Principal("their key", "theirs"), "their change", "", "")
        await db.execute(
            "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, verdict, request) "
            "VALUES ($1, '', 1, '', '')",
            endpoint,
        )
    return {
        "endpoint_id": endpoint, "event": event, "letter_id": letter, "run_id": run.id, "key_id": key.id, "link_id": link.id,
        "recipient_id": recipient.id,
        "receiver_id": receiver.id,
        "name": "message.sent",
    }  # fmt: skip


def path_of(operation: Operation, things: dict[str, Any]) -> str:
    return PREFIX + re.sub(r"\{(\w+)\}", lambda found: str(things[found[1]]), operation.path)


async def snapshot(site: Site) -> dict[str, Any]:
    """Everything in the database but the trail and what login itself writes."""
    tables = await site.query(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'webhook' AND tablename NOT IN ('audit', 'api_key', 'login', 'idempotency_key')"
    )
    return {
        row["tablename"]: [
            tuple(r) for r in await site.query(f"SELECT t::text FROM webhook.{row['tablename']} AS t ORDER BY 1")
        ]
        for row in tables
    }


async def test_no_operation_shows_or_touches_another_account(web: Site):
    """Asked with the key of another account: it is refused, or not found, or answers without anything of theirs; and nothing changes."""
    things = await their_things(web)
    key = await web.key("mine")
    before = await snapshot(web)
    for operation in OPERATIONS:
        answer = await web.ask(operation.method, path_of(operation, things), key=key, json=BODIES.get(operation.id))
        said = f"{operation.id}: {answer.status} {answer.text}"
        assert "their" not in answer.text.replace("theirs", ""), said
        if operation.who is Who.OPERATOR:
            assert answer.status == 403, said
        elif operation.id in OWN:
            assert answer.status in (200, 404), said
        elif operation.parameters:
            assert answer.status == 404, said
        elif answer.status == 200:
            assert (operation.method, answer.json["data"]) == ("GET", []) or operation.id in (
                "list_keys",
                "list_changes",
            ), said
        else:
            assert answer.status in (403, 404), said
    assert await snapshot(web) == before
    assert await web.query("SELECT FROM webhook.api_key WHERE revoked_at IS NOT NULL") == []


@pytest.mark.parametrize("parameter", ["account_id", "endpoint_id"])
async def test_no_filter_reaches_another_account(web: Site, parameter: str):
    things = await their_things(web)
    key = await web.key("mine")
    value = "theirs" if parameter == "account_id" else things["endpoint_id"]
    tried = 0
    for operation in OPERATIONS:
        if operation.query is None or parameter not in operation.query.model_fields or operation.parameters:
            continue
        answer = await web.ask(operation.method, f"{path_of(operation, things)}?{parameter}={value}", key=key)
        assert answer.status in (403, 404) or answer.json["data"] == [], f"{operation.id}: {answer.text}"
        tried += 1
    assert tried >= 3


async def test_the_owner_and_an_operator_do_see_them(web: Site):
    """Or the tests above would pass on an API that finds nothing."""
    things = await their_things(web)
    for key in (await web.key("theirs"), await web.key()):
        for operation in OPERATIONS:
            if (
                operation.method == "GET"
                and operation.id not in ("show_event_type",)
                and operation.who is Who.SIGNED_IN
            ):
                answer = await web.ask("GET", path_of(operation, things), key=key)
                assert answer.status == 200, f"{operation.id}: {answer.text}"
                if "data" in answer.json and operation.id not in (
                    "list_source_addresses",
                    "list_event_types",
                    "show_stats",
                    "show_event",
                ):
                    assert answer.json["data"], operation.id


async def test_no_operation_answers_nobody(web: Site):
    things = await their_things(web)
    before = await snapshot(web)
    for operation in OPERATIONS:
        answer = await web.ask(operation.method, path_of(operation, things), json=BODIES.get(operation.id))
        assert (answer.status, answer.json["code"]) == (401, "login_needed"), operation.id
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert await snapshot(web) == before


async def test_every_change_by_a_browser_needs_its_token(web: Site):
    """Of every route, pages too: with the cookie alone nothing changes."""
    things = await their_things(web)
    cookie, token = await web.login(await web.key())
    before = await snapshot(web)
    tried = 0
    for route in routes():
        if route.method in SAFE:
            continue
        path = re.sub(r"\{(\w+)[^/]*\}", lambda found: str(things.get(found[1], 1)), route.path)
        for headers in ({}, {"X-CSRF-Token": token[:-1] + ("A" if token[-1] != "A" else "B")}, {"X-CSRF-Token": "é"}):
            answer = await web.ask(route.method, path, cookie=cookie, headers={"Accept": "application/json"} | headers)
            assert (answer.status, answer.json["code"]) == (403, "csrf"), f"{route.method} {path}: {answer.text}"
        foreign = {"X-CSRF-Token": token, "Origin": "https://elsewhere.example", "Accept": "application/json"}
        assert (await web.ask(route.method, path, cookie=cookie, headers=foreign)).status == 403
        tried += 1
    assert tried > 20
    assert await snapshot(web) == before


def test_every_route_that_changes_something_is_audited():
    for route in routes():
        assert route.method in SAFE or route.change, route.path


def test_every_option_of_an_endpoint_is_in_the_api():
    assert {*models.EndpointOptions.model_fields, "url"} == {*CONFIG_FIELDS, *SHAPE, *CREDENTIALS}
    assert set(models.EndpointConfig.model_fields) == {*CONFIG_FIELDS, *SHAPE, *CREDENTIALS}


async def test_the_document_describes_every_operation(web: Site):
    document = (await web.ask("GET", f"{PREFIX}/openapi.json")).json
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(operation.method, operation.path) for operation in OPERATIONS}
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert not operation["summary"].endswith(".")


async def test_the_page_shows_every_operation_and_schema(web: Site):
    page = await web.ask("GET", f"{PREFIX}/docs")
    assert page.status == 200
    for operation in OPERATIONS:
        assert f'id="{operation.id}"' in page.text
    assert 'id="schema-EndpointAnswer"' in page.text
    assert re.findall(r'(?:src|href)="(?!/|#)', page.text) == [], "nothing from elsewhere"
