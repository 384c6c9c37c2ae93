"""The pages as a browser sees them: what they say, what they change, and that they stay within their account."""

import asyncio
import base64
import contextlib
import hmac
import html
import json
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import trustme

from dispatcher.sink import Behaviour, Sink
from dispatcher.store import runs
from dispatcher.store.admin import Admin
from dispatcher.web import panel
from dispatcher.web.panel import endpoint as endpoint_page
from dispatcher.web.panel.endpoint import SNIPPETS
from dispatcher.web.visit import Route, Who
from tests.conftest import connected
from tests.store import people
from tests.web.conftest import Answer, Site
from tests.web.test_table import snapshot, their_things

HTML = {"Accept": "text/html"}
EVERYBODYS = {"/catalogue/{name:[a-z0-9_.]{1,128}}"}  # pages of what belongs to no account


async def test_the_start_is_the_list_of_endpoints(web: Site):
    answer = await web.ask("GET", "/", key=await web.key("acct"), headers=HTML)
    assert (answer.status, answer.headers["Location"]) == (303, "/endpoints")


async def test_without_endpoints_the_list_says_what_to_do(web: Site):
    page = await web.ask("GET", "/endpoints", key=await web.key("acct"), headers=HTML)
    assert page.status == 200
    assert "Add your first endpoint" in page.text
    assert 'href="/endpoints/new"' in page.text


async def test_the_list_tells_how_endpoints_do(web: Site):
    async with connected(web.dsn) as db:
        endpoint = await people.endpoint(db, name="<Shop>", event_types=["message.*", "link.clicked", "a.b", "c.d"])
        await db.execute(
            "INSERT INTO webhook.endpoint_stat (endpoint_id, minute, epoch, delivered, failed, dead, duration_ms, durations) "
            "VALUES ($1, date_trunc('minute', now()), 1, 997, 3, 0, 5000, '{0,1000}'::integer[] || array_fill(0, ARRAY[18]))",
            endpoint,
        )
        await people.attempted(db, endpoint, await people.emit(db, 2), fault="status")
    page = await web.ask("GET", "/endpoints", key=await web.key("acct"), headers=HTML)
    for said in (
        "&lt;Shop&gt;",
        "receiver.test",
        "and 1 more",
        "99.7 %",
        "≤ 2 ms",
        "997 delivered and 3 failed attempts",
        '<path class="bar-good" d="M',
    ):
        assert said in page.text, said
    assert "style=" not in page.text
    [row] = (await web.ask("GET", "/endpoints?format=json", key=await web.key("acct"))).json["data"]
    assert (row["id"], row["last_failure"]["status"], row["hours"][-1]) == (endpoint, 500, [997, 3])


async def test_the_list_goes_by_pages_and_states(web: Site):
    async with connected(web.dsn) as db:
        for _ in range(51):
            await people.endpoint(db)
        await people.endpoint(db, state="paused")
    key = await web.key("acct")
    first = (await web.ask("GET", "/endpoints?format=json", key=key)).json
    second = (await web.ask("GET", f"/endpoints?format=json&cursor={first['next']}", key=key)).json
    assert [len(first["data"]), len(second["data"]), second["next"]] == [50, 2, None]
    paused = (await web.ask("GET", "/endpoints?format=json&state=paused", key=key)).json["data"]
    assert [row["state"] for row in paused] == ["paused"]
    assert "No endpoint is like that" in (await web.ask("GET", "/endpoints?state=draft", key=key, headers=HTML)).text
    assert (await web.ask("GET", "/endpoints?state=odd", key=key, headers=HTML)).status == 400
    assert (await web.ask("GET", "/endpoints?account_id=other", key=key, headers=HTML)).status == 403


# ── add, test, go live ──


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    made = Sink()
    await made.start()
    yield made
    await made.stop()


class Browser:
    """Logged in; sends its cookie and its token with each form."""

    def __init__(self, web: Site, cookie: str, token: str) -> None:
        self.web = web
        self.cookie = cookie
        self.token = token

    async def get(self, path: str) -> Answer:
        return await self.web.ask("GET", path, cookie=self.cookie, headers=HTML)

    async def post(self, path: str, fields: list[tuple[str, str]] | None = None) -> Answer:
        form = [*(fields or []), ("csrf_token", self.token)]
        return await self.web.ask("POST", path, cookie=self.cookie, headers=HTML, form=form)

    async def ok(self, path: str, fields: list[tuple[str, str]] | None = None) -> str:
        answer = await self.post(path, fields)
        assert answer.status == 303, f"{path}: {answer.status} {answer.text}"
        return str(answer.headers["Location"]).partition("#")[0].partition("?")[0]


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


@pytest.fixture
async def operator(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key()))


def is_open(page: Answer) -> bool:
    """Tell whether the button that puts live can be pressed."""
    found = re.search(r"<button class=\"needs-saved\"([^>]*)>Save and go live", page.text)
    assert found is not None, page.text
    return "disabled" not in found[1]


async def test_from_nothing_to_live(customer: Browser, sink: Sink):
    page = await customer.get("/endpoints/new")
    assert page.text.count("<h2") == 3
    assert re.search(r'value="message\.delivered" checked', page.text), "the catalogue's default types are ticked"
    fields = [
        ("url", f"{sink.url}/hook"),
        ("name", "Shop"),
        ("type", "message.sent"),
        ("type", "message.failed"),
        ("other_types", "link.*"),
    ]
    fields += [
        ("headers", "x-token: s3cret"),
        ("filter.from", "Acme\n+14155550156"),
        ("retry_schedule_s", "5, 30"),
        ("rate_per_s", "2.5"),
    ]
    setup = await customer.ok("/endpoints/new", fields)
    page = await customer.get(setup)
    assert not is_open(page)
    assert "POST /hook HTTP/1.1" in page.text
    assert "s3cret" not in page.text
    [row] = (await customer.web.ask("GET", "/endpoints?format=json", cookie=customer.cookie)).json["data"]
    assert (row["state"], row["event_types"]) == ("draft", ["message.sent", "message.failed", "link.*"])
    endpoint = f"/endpoints/{row['id']}"
    assert (await customer.post(f"{endpoint}/go-live")).status == 409

    sink.set_behaviour("/hook", Behaviour(status=302))
    await customer.ok(f"{endpoint}/test")
    page = await customer.get(setup)
    assert "redirects are not followed; give the final address" in page.text
    assert not is_open(page)

    sink.set_behaviour("/hook", Behaviour())
    assert await customer.ok(f"{endpoint}/test", [("type", "message.sent")]) == setup
    assert is_open(await customer.get(setup))
    assert await customer.ok(f"{endpoint}/go-live") == endpoint
    shown = (await customer.web.ask("GET", f"/api/v1{endpoint}", cookie=customer.cookie)).json
    assert (shown["state"], shown["filters"], shown["retry_schedule_s"], shown["rate_per_s"]) == (
        "live", {"from": ["+14155550156", "Acme"]}, [5, 30], 2.5
    )  # fmt: skip
    assert (await customer.get(setup)).text.count("nothing to put live") == 1


async def test_how_requests_are_shaped(customer: Browser, sink: Sink):
    """All that an endpoint can be told is in the form; what is secret is taken, kept when left empty, taken out, and never shown."""
    ca = trustme.CA()
    certificate = ca.issue_cert(common_name="shop")
    chain, key = certificate.cert_chain_pems[0].bytes().decode(), certificate.private_key_pem.bytes().decode()
    https = ("url", "https://receiver.example/hook")
    given = [
        ("basic", "shop:s3cret"), ("client_certificate", chain.replace("\n", "\r\n")), ("client_key", key.replace("\n", "\r\n")),
        ("signing", "v1,v1a"), ("body_format", "payload"), ("omit", "/message/text\n/link/ip"),
        ("extra_signature", "hex:x-shop-signature"), ("extra_signature_key", "long-known"),
        ("ordering", "give_up_after"), ("ordering_attempts", "3"), ("response_control", "on"),
    ]  # fmt: skip
    setup = await customer.ok("/endpoints/new", [https, ("all_types", "1"), *given])
    endpoint = f"/api/v1{setup.removesuffix('/setup')}"

    async def shown(*names: str) -> list[object]:
        answer = (await customer.web.ask("GET", endpoint, cookie=customer.cookie)).json
        return [answer[name] for name in names]

    plain = ("signing", "body_format", "omit", "extra_signature", "ordering", "response_control")
    as_given = ["v1,v1a", "payload", ["/link/ip", "/message/text"], "hex:x-shop-signature", "give_up_after 3", True]
    assert await shown(*plain) == as_given
    assert await shown("basic", "bearer", "client_key", "extra_signature_key") == [
        "(hidden)",
        None,
        "(hidden)",
        "(hidden)",
    ]
    page = await customer.get(setup)
    for secret in ("s3cret", "long-known", "PRIVATE KEY"):
        assert secret not in page.text
    for said in (
        "Take out the user and password",
        "CN=shop",
        '<option value="give_up_after" selected>',
        'value="3"',
    ):
        assert said in page.text
    again = [one for one in given if one[0] in (*plain, "ordering_attempts")]
    await customer.ok(setup, [https, ("all_types", "1"), *again])
    assert await shown(*plain, "basic", "client_key") == [*as_given, "(hidden)", "(hidden)"], "what isn't typed stays"
    await customer.ok(setup, [https, ("all_types", "1"), ("bearer", "t0ken"), ("remove", "client_certificate")])
    assert await shown(*plain) == ["v1", "envelope", [], None, "off", False]
    assert await shown("basic", "bearer", "client_certificate", "client_key") == [None, "(hidden)", None, None]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("basic", "nobody", "user:password"),
        ("bearer", "two words", "a bearer token has"),
        ("client_certificate", "text", "belong together"),
        ("omit", "message", "pointer"),
        ("extra_signature", "x-shop", "is not a signature"),
        ("extra_signature_key", "long-known", "means nothing without"),
        ("ordering", "give_up_after", "ordering"),
        ("signing", "v2", "signing"),
    ],
)  # fmt: skip
async def test_what_shapes_them_is_refused_with_the_field(customer: Browser, field: str, value: str, said: str):
    typed = [("url", "https://receiver.example/hook"), ("all_types", "1"), ("name", "kept"), (field, value)]
    page = await customer.post("/endpoints/new", typed)
    assert page.status == 400
    assert said in page.text
    assert 'value="kept"' in page.text
    [invalid] = re.findall(r'name="(\w+)"[^>]*aria-invalid="true"', page.text)[:1]
    assert invalid == field
    opened = page.text[: page.text.index('aria-invalid="true"')]
    assert "<details open>" in opened[opened.rindex("<details") :], "its part of the form is open"


async def test_an_edit_waits_beside_what_is_in_force(customer: Browser, sink: Sink):
    setup = await customer.ok(
        "/endpoints/new", [("url", f"{sink.url}/a"), ("all_types", "1"), ("headers", "x-a: 1\nx-b: 2")]
    )
    endpoint = setup.removesuffix("/setup")
    await customer.ok(f"{endpoint}/test")
    await customer.ok(f"{endpoint}/go-live")
    await customer.ok(setup, [("url", f"{sink.url}/b"), ("all_types", "1"), ("remove_header", "x-a")])
    page = await customer.get(setup)
    assert "This edit waits for its test" in page.text
    assert "It was of another configuration" in page.text
    assert not is_open(page)
    shown = (await customer.web.ask("GET", f"/api/v1{endpoint}", cookie=customer.cookie)).json
    assert (shown["url"], shown["proposed"]["url"]) == (f"{sink.url}/a", f"{sink.url}/b")
    assert (list(shown["headers"]), list(shown["proposed"]["headers"])) == (["x-a", "x-b"], ["x-b"])
    await customer.ok(f"{endpoint}/test")
    await customer.ok(f"{endpoint}/go-live")
    assert (await customer.web.ask("GET", f"/api/v1{endpoint}", cookie=customer.cookie)).json["url"] == f"{sink.url}/b"


async def test_saved_paused_it_holds_from_then_on(customer: Browser, sink: Sink):
    setup = await customer.ok("/endpoints/new", [("url", f"{sink.url}/hook"), ("all_types", "1")])
    endpoint = setup.removesuffix("/setup")
    assert (await customer.post(f"{endpoint}/go-live", [("paused", "1")])).status == 409
    await customer.ok(f"{endpoint}/test")
    await customer.ok(f"{endpoint}/go-live", [("paused", "1")])
    async with connected(customer.web.dsn) as db:
        await people.emit(db, 3)
    shown = (await customer.web.ask("GET", f"/api/v1{endpoint}", cookie=customer.cookie)).json
    assert (shown["state"], shown["held"]) == ("paused", 3)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("url", ("url", "https://10.0.0.1/")),
        ("url", ("url", "ftp://example.com/")),
        ("timeout_ms", ("timeout_ms", "soon")),
        ("rate_per_s", ("rate_per_s", "-1")),
        ("event_types", ("other_types", "NoSuch")),
        ("headers", ("headers", "host: elsewhere")),
    ],
)
async def test_what_can_not_be_is_said_beside_what_was_typed(customer: Browser, field: str, given: tuple[str, str]):
    fields = {"url": "https://receiver.test/hook", "name": "Typed", "other_types": "message.*"} | dict([given])
    answer = await customer.post("/endpoints/new", list(fields.items()))
    assert answer.status == 400
    assert 'role="alert"' in answer.text
    assert 'value="Typed"' in answer.text
    if field != "headers":  # may hold a secret: what is typed there is not written back
        assert 'aria-invalid="true"' in answer.text
        assert html.escape(given[1]) in answer.text
    assert await customer.web.query("SELECT FROM webhook.endpoint") == []


async def test_only_operators_go_live_untested_and_loudly(customer: Browser, operator: Browser):
    setup = await customer.ok("/endpoints/new", [("url", "https://receiver.test/"), ("all_types", "1")])
    endpoint = setup.removesuffix("/setup")
    assert "Go live untested" not in (await customer.get(setup)).text
    assert (await customer.post(f"{endpoint}/go-live", [("force", "1")])).status == 403
    assert "has not been seen to work" in (await operator.get(setup)).text
    await operator.ok(f"{endpoint}/go-live", [("force", "1")])
    [row] = await customer.web.query("SELECT state, state_reason FROM webhook.endpoint")
    assert tuple(row) == ("live", "forced without a test")


async def test_a_form_is_tested_at_most_ten_times_a_minute(customer: Browser):
    setup = await customer.ok("/endpoints/new", [("url", "https://receiver.test/"), ("all_types", "1")])
    await customer.web.query(
        "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, verdict, request) "
        "SELECT id, '', 1, '', '' FROM webhook.endpoint, generate_series(1, 10)"
    )
    assert (await customer.post(f"{setup.removesuffix('/setup')}/test")).status == 429


# ── accounts ──


@pytest.mark.parametrize("route", panel.ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_no_page_shows_or_touches_another_account(web: Site, route: Route):
    things = await their_things(web)
    path = re.sub(r"\{(\w+)[^/]*\}", lambda found: str(things[found[1]]), route.path)
    before = await snapshot(web)
    mine = Browser(web, *await web.login(await web.key("mine")))
    form = [("account_id", "theirs"), ("url", "https://receiver.test/"), ("all_types", "1"), ("sure", "1")]
    form += [("endpoint_id", str(things["endpoint_id"]))]
    answer = await (mine.get(path) if route.method == "GET" else mine.post(path, form))
    assert "their" not in answer.text.replace("theirs", ""), answer.text
    if route.who is Who.OPERATOR:
        assert answer.status == 403, answer.text
    elif path != route.path and route.path not in EVERYBODYS:
        assert answer.status == 404, answer.text
    elif route.method == "GET":
        assert answer.status == 200
    else:
        assert answer.status == 403, answer.text
    assert await snapshot(web) == before
    theirs = Browser(web, *await web.login(await web.key("theirs")))
    if route.method == "GET" and route.who is not Who.OPERATOR and not path.endswith("/live"):
        assert (await theirs.get(path)).status == 200, "or this would pass on pages that show nothing"


# ── one endpoint ──


async def test_an_endpoint_is_paused_and_resumed(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, name="Shop")
    at = f"/endpoints/{endpoint}"
    assert "Pause: hold its events" in (await customer.get(at)).text
    await customer.ok(f"{at}/pause")
    async with connected(customer.web.dsn) as db:
        await people.emit(db, 2)
    page = (await customer.get(at)).text
    assert "2 events are held since then" in page
    await customer.ok(f"{at}/resume", [("choice", "skip")])
    assert (await customer.web.query("SELECT reason, deliveries FROM webhook.discard"))[0]["deliveries"] == 2
    await customer.ok(f"{at}/pause", [("skip", "1")])
    assert "never sent" in (await customer.get(at)).text
    assert (await customer.post(f"{at}/resume", [("choice", "send")])).status == 409
    assert (await customer.post(f"{at}/resume", [("choice", "keep")])).status == 400
    await customer.ok(f"{at}/resume")
    assert (await customer.post(f"{at}/disable")).status == 403


async def test_an_operator_disables_and_enables(operator: Browser):
    async with connected(operator.web.dsn) as db:
        endpoint = await people.endpoint(db)
    at = f"/endpoints/{endpoint}"
    await operator.ok(f"{at}/disable", [("reason", "it is <down>")])
    assert "it is &lt;down&gt;" in (await operator.get(at)).text
    await operator.ok(f"{at}/enable", [("choice", "send")])
    assert (await operator.web.query("SELECT state FROM webhook.endpoint"))[0]["state"] == "live"


async def test_deleting_asks_first(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
    assert (await customer.post(f"/endpoints/{endpoint}/delete")).status == 400
    assert await customer.ok(f"/endpoints/{endpoint}/delete", [("sure", "1")]) == "/endpoints"
    assert (await customer.get(f"/endpoints/{endpoint}")).status == 410


async def test_a_deleted_endpoint_says_what_it_was(customer: Browser, operator: Browser):
    """Whatever still tells of it leads to a page that says so; other accounts and programs get what they get where there never was one."""
    async with connected(customer.web.dsn) as db:
        endpoint, other = await people.endpoint(db, name="<Shop>"), await people.endpoint(db, "other", name="Till")
        [event] = await people.emit(db)
        [letter] = await people.died(db, endpoint, [event])
        run = await runs.resend(db, str(event), endpoint)
        await db.execute(
            "UPDATE webhook.endpoint SET state = 'deleted' WHERE id = ANY ($1::bigint[])", [endpoint, other]
        )
    for path in (
        "/deliveries",
        f"/deliveries?endpoint_id={endpoint}",
        f"/deliveries/{event}/{endpoint}",
        "/dead-letters?state=all",
        f"/events/{event}",
        "/recover",
        f"/recover/runs/{run.id}",
    ):
        page = (await customer.get(path)).text
        assert f'href="/endpoints/{endpoint}"' in page, path
        assert "deleted" in page, path
    assert f'href="/endpoints/{endpoint}"' in (await customer.get(f"/dead-letters/{letter}")).text
    page = await customer.get(f"/endpoints/{endpoint}")
    assert page.status == 410
    for said in ("&lt;Shop&gt;", "Nothing is sent to it any more", f'href="/deliveries?endpoint_id={endpoint}"'):
        assert said in page.text
    assert (
        f'<option value="{endpoint}" selected>endpoint {endpoint}'
        in (await customer.get(f"/deliveries?endpoint_id={endpoint}")).text
    )
    assert (await customer.get(f"/endpoints/{other}")).status == 404
    assert (await operator.get(f"/endpoints/{other}")).status == 410
    answer = await customer.web.ask("GET", f"/endpoints/{endpoint}?format=json", cookie=customer.cookie)
    assert answer.status == 404


async def test_secrets_show_when_they_are_asked_for(customer: Browser):
    setup = await customer.ok("/endpoints/new", [("url", "https://receiver.test/"), ("all_types", "1")])
    at = setup.removesuffix("/setup")
    assert not re.search(r"whsec_[A-Za-z0-9+/]{20}", (await customer.get(at)).text)
    [first] = set(re.findall(r"whsec_[A-Za-z0-9+/=]{20,}", (await customer.post(f"{at}/secrets")).text))
    await customer.ok(f"{at}/rotate-secret", [("overlap_s", "3600.0")])
    both = re.findall(r"whsec_[A-Za-z0-9+/=]{20,}", (await customer.post(f"{at}/secrets")).text)
    assert (len(both), both[1]) == (2, first)
    await customer.ok(f"{at}/rotate-secret", [("overlap_s", "0.0")])
    [last] = set(re.findall(r"whsec_[A-Za-z0-9+/=]{20,}", (await customer.post(f"{at}/secrets")).text))
    assert last not in both
    for bad in ("nan", "-1", "much", "1e99"):
        assert (await customer.post(f"{at}/rotate-secret", [("overlap_s", bad)])).status == 400, bad
    actions = [row["action"] for row in await customer.web.query("SELECT action FROM webhook.audit ORDER BY id")]
    assert actions.count("endpoint.reveal_secrets") == 3


async def test_a_new_key_of_an_extra_signature_is_shown_when_it_is_asked_for(customer: Browser):
    given = [("url", "https://receiver.test/"), ("all_types", "1"), ("extra_signature", "hex:x-sig")]
    at = (await customer.ok("/endpoints/new", given)).removesuffix("/setup")
    assert not re.search(r"\b[0-9a-f]{64}\b", (await customer.get(at)).text)
    assert re.search(
        r"key of the extra signature: <code>[0-9a-f]{64}</code>", (await customer.post(f"{at}/secrets")).text
    )


async def test_what_is_one_is_said_so(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, rate_per_s=1)
        ids = await people.emit(db, 2)
        await people.retrying(db, endpoint, ids[:1])
        await people.died(db, endpoint, ids[1:])
        await db.execute("UPDATE webhook.endpoint SET failing_since = now()")
    page = (await customer.get(f"/endpoints/{endpoint}")).text
    for said in ("1 delivery waits for a retry", "1 delivery was given up", "1 POST a second"):
        assert said in page
    assert "looked at 1 dead letter," in (await customer.get("/dead-letters")).text
    assert "1 open dead letter<" in (await customer.get(f"/recover/endpoints/{endpoint}")).text
    assert "<strong>1 dead letter</strong>" in (await customer.get("/dead-letters/all")).text


async def test_a_failing_endpoint_says_since_when_and_what_waits(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        await people.retrying(db, endpoint, await people.emit(db, 3))
        await db.execute("UPDATE webhook.endpoint SET failing_since = now()")
    page = (await customer.get(f"/endpoints/{endpoint}")).text
    assert "No POST has succeeded since" in page
    assert "3 deliveries wait for a retry" in page
    assert page.count("retrying</span> 500, next") == 3


async def test_the_chart_has_a_bar_where_something_happened(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        await db.execute(
            "INSERT INTO webhook.endpoint_stat (endpoint_id, minute, epoch, delivered, failed, dead, duration_ms, durations) "
            "SELECT $1, date_trunc('minute', now()) - m * interval '1 minute', 1, 7, m, 0, 9, array_fill(1, ARRAY[20]) "
            "FROM generate_series(1, 2) AS m",
            endpoint,
        )
    page = (await customer.get(f"/endpoints/{endpoint}?span=hour")).text
    good, bad = (re.search(rf'<path class="bar-{kind}" d="([^"]*)"', page) for kind in ("good", "bad"))
    assert (good[1].count("M"), bad[1].count("M")) == (2, 2)
    assert "14 delivered and 3 failed attempts in the last hour" in page
    assert (await customer.get(f"/endpoints/{endpoint}?span=century")).status == 400


async def test_deliveries_appear_live(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_page, "LIVE_EVERY_S", 0.05)
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        response = await customer.web.http.get(
            f"{customer.web.url}/endpoints/{endpoint}/live", headers={"Cookie": customer.cookie}
        )
        line, event = b"", b""
        async with asyncio.timeout(20):
            # What was there at the first look is not news: more, until one is.
            while not (line.startswith(b"data:") and event == b"event: attempt\n"):
                await people.attempted(db, endpoint, await people.emit(db, 1), fault="status")
                with contextlib.suppress(TimeoutError):
                    line = await asyncio.wait_for(response.content.readline(), 0.5)
                event = line if line.startswith(b"event:") else event
        response.close()
    data = json.loads(line.removeprefix(b"data:"))
    assert (data["endpoint_id"], data["type"], data["status"]) == (endpoint, "message.sent", 500)


async def test_filters_may_be_called_as_methods_of_python_are(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, filters='{"items": ["one"], "get": ["two"]}')
    page = (await customer.get(f"/endpoints/{endpoint}")).text
    assert "items: one" in page
    assert "get: two" in page
    assert (await customer.get(f"/endpoints/{endpoint}/setup")).status == 200


async def test_one_look_tells_each_endpoint_its_own(customer: Browser):
    """And of one that is another account's now, or deleted, nobody is told."""
    web = customer.web.web
    async with connected(customer.web.dsn) as db:
        one, two, gone = [await people.endpoint(db) for _ in range(3)]
        event = await people.emit(db, 1)
        for endpoint in (one, two):
            await people.attempted(db, endpoint, event)
        await people.retrying(db, two, await people.emit(db, 1))
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
        topics = [("acct", one), ("acct", two), ("acct", gone), ("other", one)]
        found = await endpoint_page._look(web, db, dict.fromkeys(topics))
        assert sorted(found) == sorted(topics[:2])
        told = {topic[1]: messages for topic, (_, messages) in found.items()}
        assert [(name, row["endpoint_id"], row["status"]) for name, row in told[one][:-1]] == [("attempt", one, 200)]
        assert [(name, row["endpoint_id"], row["status"]) for name, row in told[two][:-1]] == [
            ("attempt", two, 200), ("attempt", two, 500),
        ]  # fmt: skip
        assert [told[endpoint][-1][1]["retries"] for endpoint in (one, two)] == [0, 1]
        newest = await Admin(db, web.settings).events.tail(timedelta(minutes=1), [one, two], 2_000, limit=2)
        assert [(row["endpoint_id"], row["status"]) for row in newest] == [(two, 200), (two, 500)]
        # Nothing has happened since: nothing is told.
        again = await endpoint_page._look(web, db, {topic: seen for topic, (seen, _) in found.items()})
        assert [messages for _, messages in again.values()] == [[], []]


def signed(secret: str, at: int, body: bytes) -> dict[str, str]:
    signature = base64.b64encode(hmac.digest(base64.b64decode(secret[6:]), b"evt_1.%d." % at + body, "sha256")).decode()
    return {"webhook-id": "evt_1", "webhook-timestamp": str(at), "webhook-signature": f"v1a,x v1,{signature}"}


def test_the_python_shown_verifies_and_refuses():
    scope: dict[str, Any] = {}
    exec(SNIPPETS["Python"], scope)
    secret = "whsec_" + base64.b64encode(b"k" * 24).decode()
    now = int(time.time())
    scope["verify"](secret, signed(secret, now, b"{}"), b"{}")
    for at, body in ((now, b"{ }"), (now - 301, b"{}"), (now + 302, b"{}")):
        with pytest.raises(ValueError, match=r"fits|too old"):
            scope["verify"](secret, signed(secret, at, b"{}"), body)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_javascript_shown_verifies_and_refuses():
    secret = "whsec_" + base64.b64encode(b"k" * 24).decode()
    headers = json.dumps(signed(secret, int(time.time()), b"{}"))
    for body, code in (("{}", 0), ("{ }", 1)):
        script = f"{SNIPPETS['JavaScript']}\nverify({secret!r}, {headers}, Buffer.from({body!r}));"
        assert subprocess.run(["node", "-e", script], capture_output=True, check=False).returncode == code


async def test_a_filter_that_the_catalogue_has_lost_is_not_dropped(customer: Browser):
    """Saved without it, everything would be sent."""
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, filters='{"gone": ["one"]}')
    setup = f"/endpoints/{endpoint}/setup"
    assert 'name="filter.gone"' in (await customer.get(setup)).text
    fields = [("url", "https://a.example/hook"), ("type", "message.sent")]
    answer = await customer.post(setup, [*fields, ("filter.gone", "one")])
    assert (answer.status, "gone" in answer.text) == (400, True), "what can't be kept is said"
    await customer.ok(setup, [*fields, ("filter.gone", "")])


async def test_who_edits_what_another_has_changed_meanwhile_is_told(customer: Browser):
    """The form has every field: the second to save would have put back all that the first had changed."""
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
    setup = f"/endpoints/{endpoint}/setup"
    base = re.search(r'name="base" value="([0-9a-f]{16})"', (await customer.get(setup)).text)
    assert base is not None
    fields = [("url", "https://a.example/hook"), ("all_types", "1"), ("base", base[1])]
    await customer.ok(setup, [*fields, ("name", "first")])
    answer = await customer.post(setup, [*fields, ("name", "second")])
    assert (answer.status, "somebody has changed it" in answer.text, 'value="second"' in answer.text) == (
        409,
        True,
        True,
    )
    base = re.search(r'name="base" value="([0-9a-f]{16})"', answer.text)
    assert base is not None
    await customer.ok(setup, [*fields[:2], ("base", base[1]), ("name", "second")])
    assert 'value="second"' in (await customer.get(setup)).text


async def test_failures_are_found_among_many_that_did_not_fail(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        failed, *_ = ids = await people.emit(db, 4)
        await people.attempted(db, endpoint, [failed], fault="status")
        for event in ids[1:]:
            await people.attempted(db, endpoint, [event])
        rows = await Admin(db, customer.web.settings).events.tail(timedelta(minutes=1), None, 2_000, 2, failures=True)
    assert [row["event_id"] for row in rows] == [failed]
