"""The built-in receiver: reached by tests and deliveries without opening the guard; what it shows, answers and bounds."""

import asyncio
import contextlib
import html
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher import settings as settings_module
from dispatcher.domain.outcome import Fault
from dispatcher.domain.url import RECEIVER_HOST, parse_url, receiver_url
from dispatcher.errors import InputError
from dispatcher.main import make_transport
from dispatcher.store import receivers
from dispatcher.web import receiver as receiver_module
from dispatcher.web.panel import receivers as panel_receivers
from tests.conftest import connected
from tests.rig import rig, until
from tests.store import people
from tests.web.conftest import Site, site
from tests.web.test_panel import Browser

TOKEN = "t" * 43
HOSTILE = '</pre><script>alert(1)</script>"'


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


def closed(port: int, **more: Any) -> dict[str, Any]:
    """Settings with the guard as in production: no private network is allowed, nor plain http."""
    return {"web_listen": f"127.0.0.1:{port}", "allowed_networks": ""} | more


@pytest.fixture(params=["thin"])
async def web(dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site(dsn, **closed(free_port(), transport=request.param)) as made:
        yield made


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


async def made(customer: Browser) -> tuple[str, str]:
    """Get an address: the page's path, and the URL."""
    at = await customer.ok("/receivers")
    shown = (await customer.web.ask("GET", f"{at}?format=json", cookie=customer.cookie)).json
    return at, shown["receiver"]["url"]


async def send(web: Site, url: str, body: bytes = b"{}", **headers: str) -> Any:
    return await web.ask("POST", url.removeprefix(web.url), headers=headers, data=body)


# ── the way through ──


@pytest.mark.parametrize("web", ["thin", "aiohttp"], indirect=True)
async def test_no_server_yet(customer: Browser):
    """From the empty page to a passed test whose signature fits, with the guard shut."""
    assert "Use an address of ours" in (await customer.get("/endpoints/new")).text
    at, url = await made(customer)
    assert url.startswith(customer.web.url + "/r/")
    page = (await customer.get(at)).text
    assert "Nothing yet" in page
    assert url in page
    setup = await customer.ok(f"{at}/endpoint")
    endpoint = setup.removesuffix("/setup")
    await customer.ok(f"{endpoint}/test")
    assert "200: passed" in (await customer.get(setup)).text
    page = (await customer.get(at)).text
    assert "the signature fits" in page
    assert "endpoint.test" in page
    assert f'href="{endpoint}"' in page
    await customer.ok(f"{endpoint}/go-live")


async def test_deliveries_reach_it_from_another_process_by_its_settings(dsn: str):
    """`dispatcher web` serves it; the engine, which serves nothing, is told where by DISPATCHER_WEB_CONNECT."""
    port = free_port()
    async with (
        site(dsn, **closed(port, public_url="https://hooks.example.com/panel")) as web,
        rig(
            dsn, allowed_networks="", public_url="https://hooks.example.com/panel", web_connect=f"127.0.0.1:{port}", retry_schedule_s="1,1"
        ) as r,
    ):  # fmt: skip
        key = await web.key("acct")
        receiver = (await web.ask("POST", "/panel/api/v1/receivers", key=key)).json
        assert receiver["url"].startswith("https://hooks.example.com/panel/r/")
        requests = f"/panel/api/v1/receivers/{receiver['id']}/requests"
        endpoint = (await web.ask("POST", "/panel/api/v1/endpoints", key=key, json={"url": receiver["url"]})).json
        assert (await web.ask("POST", f"/panel/api/v1/endpoints/{endpoint['id']}/test", key=key)).json["passed"]
        assert (await web.ask("POST", f"/panel/api/v1/endpoints/{endpoint['id']}/go-live", key=key)).status == 200
        await until(lambda: r.has_taken_up(endpoint["id"]))
        await people.emit(r.db, 1)

        async def got() -> list[Any]:
            rows: list[Any] = (await web.ask("GET", requests, key=key)).json["data"]
            return rows if len(rows) >= 2 else []

        newest, test = await until(got)
        assert (newest["signature"], test["signature"]) == ("valid", "valid")
        assert json.loads(newest["body"])["type"] == "message.sent"
        assert {"name": "host", "value": "hooks.example.com"} in [
            {"name": one["name"].lower(), "value": one["value"]} for one in newest["headers"]
        ]


async def test_what_arrives_is_shown_live(customer: Browser):
    at, url = await made(customer)
    response = await customer.web.http.get(f"{customer.web.url}{at}/live", headers={"Cookie": customer.cookie})
    line = b""
    async with asyncio.timeout(20):
        while not line.startswith(b"data:"):  # what was there at the first look is not news: more, until one is
            await send(customer.web, url, b'{"n": 1}')
            with contextlib.suppress(TimeoutError):
                line = await asyncio.wait_for(response.content.readline(), 0.5)
    response.close()
    told = json.loads(line.removeprefix(b"data:"))
    assert (told["body"], told["signature"], told["status"]) == ('{"n": 1}', "unknown", 200)


# ── the guard stays shut ──


SITE = settings_module.load(web_listen="127.0.0.1:8080", public_url="https://hooks.example.com/panel").receiver_site
assert SITE is not None
OWN = receiver_url(SITE, TOKEN)


def test_its_own_url_is_the_only_exception():
    policy = settings_module.load(
        web_listen="127.0.0.1:8080", public_url="https://hooks.example.com/panel"
    ).address_policy
    target = parse_url(OWN, policy)
    assert (target.origin.host, target.origin.port, target.request_target) == (RECEIVER_HOST, 8080, f"/panel/r/{TOKEN}")
    assert (target.url, target.host_header) == (OWN, "hooks.example.com")
    assert parse_url(OWN.replace("hooks.example.com", "HOOKS.example.com:443"), policy).origin.host == RECEIVER_HOST


@pytest.mark.parametrize(
    "url",
    [
        OWN + "/", OWN + "?a=1", OWN + "/../../api/v1/me", OWN[:-1], OWN + "x", OWN[:-1] + "%74", OWN.replace("/r/", "/R/"),
        OWN.replace("/panel", ""), OWN.replace("/panel", "/panel/."), OWN.replace("https", "http"), OWN.replace(".com", ".com:8443"),
        OWN.replace(".com", ".com."), OWN.replace("hooks.", "hooks2."), "https://hooks.example.com/panel/api/v1/me",
        OWN.replace("hooks.example.com", "127.0.0.1:8080"), OWN.replace("/r/", "//r/"), OWN.replace("/r/", "/r/./"),
    ],
)  # fmt: skip
def test_whatever_is_not_exactly_its_url_is_judged_like_any_other(url: str):
    """Another port, host, scheme, path, a query: an ordinary URL, whose addresses the guard judges, or none at all."""
    policy = settings_module.load(
        web_listen="127.0.0.1:8080", public_url="https://hooks.example.com/panel"
    ).address_policy
    try:
        target = parse_url(url, policy)
    except InputError:
        return
    if url == OWN.replace(".com", ".com."):  # the same name: URLs have one spelling
        assert target.url == OWN
    else:
        assert target.origin.host != RECEIVER_HOST


async def test_the_outbound_proxy_has_no_part_in_it(dsn: str):
    async with site(dsn, **closed(free_port(), proxy_url="http://127.0.0.1:9")) as web:
        key = await web.key("acct")
        receiver = (await web.ask("POST", "/api/v1/receivers", key=key)).json
        endpoint = (await web.ask("POST", "/api/v1/endpoints", key=key, json={"url": receiver["url"]})).json
        assert (await web.ask("POST", f"/api/v1/endpoints/{endpoint['id']}/test", key=key)).json["passed"]


async def test_a_name_of_ours_that_leads_inside_is_still_refused(dsn: str):
    """Our public name resolving to loopback opens nothing: neither another path nor another port of it."""
    port = free_port()
    async with site(dsn, **closed(port, public_url=f"http://127.0.0.1:{port}")) as web:
        transport = make_transport(web.settings)
        try:
            for url in (f"http://127.0.0.1:{port}/api/v1/me", f"http://127.0.0.1:{port + 1}/r/{TOKEN}"):
                with pytest.raises(InputError, match=r"refused"):
                    parse_url(url, web.settings.address_policy)
            ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            origin = parse_url(f"https://localhost:{port}/r/{TOKEN}", web.settings.address_policy).origin
            transport.connect(origin, ready.set_result)
            assert (await ready).fault is Fault.BLOCKED
        finally:
            await transport.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "hooks.internal:8080"])
def test_without_an_address_there_is_none(listen: str):
    """A name could come to mean another machine."""
    assert settings_module.load(web_listen=listen).receiver_site is None
    assert settings_module.load().receiver_site is None


@pytest.mark.parametrize(
    ("given", "reached", "url"),
    [
        ({"web_listen": "0.0.0.0:8080"}, ("127.0.0.1", 8080), "http://127.0.0.1:8080/r/"),
        ({"web_listen": "[::]:8080"}, ("::1", 8080), "http://[::1]:8080/r/"),
        ({"web_listen": "localhost:8080"}, ("127.0.0.1", 8080), "http://127.0.0.1:8080/r/"),
        ({"web_connect": "10.0.0.7:80", "public_url": "https://a.example"}, ("10.0.0.7", 80), "https://a.example/r/"),
    ],
)
def test_where_it_is_reached(given: dict[str, Any], reached: tuple[str, int], url: str):
    settings = settings_module.load(**given)
    found = settings.receiver_site
    assert found is not None
    assert (found.address, found.listen_port) == reached
    assert receiver_url(found, TOKEN) == url + TOKEN
    assert parse_url(url + TOKEN, settings.address_policy).origin.host == RECEIVER_HOST


async def test_an_endpoint_takes_only_a_receiver_of_its_account(customer: Browser):
    _, url = await made(customer)
    key = await customer.web.key("other")
    answer = await customer.web.ask("POST", "/api/v1/endpoints", key=key, json={"url": url})
    assert (answer.status, answer.json["field"]) == (400, "url")
    ended = url[:-43] + TOKEN
    assert (await customer.web.ask("POST", "/api/v1/endpoints", key=key, json={"url": ended})).status == 400
    mine = await customer.web.key("acct")
    endpoint = (await customer.web.ask("POST", "/api/v1/endpoints", key=mine, json={"url": url})).json
    at = f"/api/v1/endpoints/{endpoint['id']}"
    await customer.web.query("UPDATE webhook.receiver SET expires_at = now()")
    assert (await customer.web.ask("PATCH", at, key=mine, json={"name": "Still mine"})).status == 200, (
        "it is left to rename"
    )


async def test_what_a_request_carries_logs_nobody_in_or_out(customer: Browser):
    """A customer chooses headers: they must not count as logins, least of all as failed ones of our own address."""
    _, url = await made(customer)
    for _ in range(15):
        await send(customer.web, url, Authorization="Bearer whkey_wrong", Cookie=customer.cookie)
    assert (await customer.web.ask("GET", "/api/v1/me", key=await customer.web.key("acct"))).status == 200
    assert [row["action"] for row in await customer.web.query("SELECT action FROM webhook.audit")] == [
        "receiver.create"
    ]


# ── what it answers ──


@pytest.mark.parametrize(
    ("answer", "status"), [("ok", 200), ("error", 500), ("gone", 410), ("throttle", 429), ("slow", 200)]
)
async def test_it_answers_as_it_is_told(customer: Browser, answer: str, status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(receiver_module, "SLOW_S", 0.05)
    at, url = await made(customer)
    await customer.ok(at, [("answer", answer)])
    assert f'value="{answer}" checked' in (await customer.get(at)).text
    loop = asyncio.get_running_loop()
    began = loop.time()
    got = await send(customer.web, url)
    assert got.status == status
    assert ("Retry-After" in got.headers) == (answer == "throttle")
    # A timer may fire early by what the loop's clock can't tell.
    assert (loop.time() - began >= 0.04) or answer != "slow"
    assert (await customer.post(at, [("answer", "explode")])).status == 400


async def test_it_ends_after_a_day_and_then_says_gone(customer: Browser):
    at, url = await made(customer)
    [row] = await customer.web.query("SELECT expires_at - created_at AS life FROM webhook.receiver")
    assert abs(row["life"].total_seconds() - 86_400) < 1
    await send(customer.web, url)
    await customer.web.query("UPDATE webhook.receiver SET expires_at = clock_timestamp()")
    assert (await send(customer.web, url)).status == 410
    assert (await customer.get(at)).status == 404
    assert (await send(customer.web, url[:-43] + TOKEN)).status == 410
    assert (await customer.web.ask("GET", f"/r/{TOKEN}")).status == 405
    async with connected(customer.web.dsn) as db:
        from dispatcher.store import access

        await access.sweep(db)
        assert await db.fetchval("SELECT count(*) FROM webhook.received") == 0


async def test_deleting_it_takes_what_it_got(customer: Browser):
    at, url = await made(customer)
    await send(customer.web, url)
    assert await customer.ok(f"{at}/delete") == "/receivers"
    assert await customer.web.query("SELECT FROM webhook.received") == []
    assert (await send(customer.web, url)).status == 410


# ── what it shows ──


async def test_what_it_got_is_shown_as_text(customer: Browser):
    at, url = await made(customer)
    await send(customer.web, url, HOSTILE.encode() + b"\x00\xff", **{"X-Hostile": HOSTILE})
    page = await customer.get(at)
    assert "<script>alert" not in page.text
    assert html.escape(HOSTILE).replace("&quot;", "&#34;") in page.text
    assert page.text.count("&lt;script&gt;") == 2
    assert "style=" not in page.text
    assert "onerror" not in page.text


async def test_a_signature_is_held_against_the_endpoints_that_have_its_address(customer: Browser):
    at, url = await made(customer)
    await send(customer.web, url)
    setup = await customer.ok(f"{at}/endpoint")
    await send(customer.web, url)
    headers = {"webhook-id": "evt_1", "webhook-timestamp": "1700000000", "webhook-signature": "v1,AAAA"}
    await send(customer.web, url, b"{}", **headers)
    await customer.ok(f"{setup.removesuffix('/setup')}/rotate-secret", [("overlap_s", "0.0")])
    await customer.ok(f"{setup.removesuffix('/setup')}/test")
    shown = (await customer.web.ask("GET", f"{at}?format=json", cookie=customer.cookie)).json
    assert [one["signature"] for one in shown["requests"]] == ["valid", "wrong", "missing", "unknown"]


# ── bounds ──


async def test_rows_bodies_and_receivers_are_bounded(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    at, url = await made(customer)
    large = b"x" * (receivers.BODY_KEPT_BYTES + 1)
    assert (await send(customer.web, url, large)).status == 200
    assert (await send(customer.web, url, b"x" * (receiver_module.BODY_BYTES_MAX + 1))).status == 413
    [row] = await customer.web.query("SELECT body_bytes, octet_length(body) AS kept FROM webhook.received")
    assert tuple(row) == (len(large), receivers.BODY_KEPT_BYTES)
    receiver_id = int(at.rpartition("/")[2])
    async with connected(customer.web.dsn) as db:
        for n in range(receivers.KEPT_MAX + 5):
            await receivers.keep(db, receiver_id, [], b"%d" % n, signature="unknown", endpoint_id=None, status=200)
        kept = await receivers.received(db, receiver_id)
    assert len(kept) == receivers.KEPT_MAX
    assert kept[0].body == b"104"
    for _ in range(receivers.OF_ACCOUNT_MAX - 1):
        await customer.ok("/receivers")
    page = await customer.post("/receivers")
    assert (page.status, "at most; delete one" in page.text) == (409, True)


async def test_a_flood_is_told_to_slow_down_and_not_kept(customer: Browser):
    _, url = await made(customer)
    statuses = await asyncio.gather(*(send(customer.web, url) for _ in range(60)))
    told = [answer.status for answer in statuses]
    assert set(told) <= {200, 429, 503}
    assert told.count(429) + told.count(503) > 10
    assert len(await customer.web.query("SELECT FROM webhook.received")) == told.count(200)
    state = customer.web.web.receivers
    await until(lambda: state.at_once == 0)


async def test_slow_answers_hold_nobody_elses_room(customer: Browser):
    at, url = await made(customer)
    await customer.ok(at, [("answer", "slow")])
    slow = [asyncio.create_task(send(customer.web, url)) for _ in range(receiver_module.AT_ONCE_EACH_MAX)]
    state = customer.web.web.receivers
    await until(lambda: sum(state._each.values()) == receiver_module.AT_ONCE_EACH_MAX and state.at_once == 0)
    assert (await send(customer.web, url)).status == 429
    _, other = await made(customer)
    assert (await send(customer.web, other)).status == 200
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_all_receivers_together_leave_room_for_the_panel(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(receiver_module, "ENTERED_MAX", 2)
    at, url = await made(customer)
    await customer.ok(at, [("answer", "slow")])
    slow = [asyncio.create_task(send(customer.web, url)) for _ in range(2)]
    state = customer.web.web.receivers
    await until(lambda: state.entered == 2)
    _, other = await made(customer)
    assert (await send(customer.web, other)).status == 429
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_without_settings_it_says_what_is_missing(dsn: str):
    async with site(dsn) as web:
        key = await web.key("acct")
        answer = await web.ask("POST", "/api/v1/receivers", key=key)
        assert (answer.status, "DISPATCHER_WEB_CONNECT" in answer.json["detail"]) == (409, True)
        page = await web.ask("GET", "/receivers", key=key, headers={"Accept": "text/html"})
        assert "no built-in receiver here" in page.text


async def test_receivers_are_listed_to_the_last(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panel_receivers, "SHOWN", 1)
    first, second = [(await made(customer))[0] for _ in range(2)]
    page = (await customer.get("/receivers")).text
    assert f'{first}"' in page
    assert f'{second}"' not in page
    [onward] = re.findall(r'href="([^"]*cursor=[0-9]+)">Further ones', page)
    page = (await customer.get(onward)).text
    assert f'{first}"' not in page
    assert f'{second}"' in page
