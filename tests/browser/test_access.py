"""Who gets in, by what a browser does and a program may not: links that end, other accounts, other sites, frames. And secrets that rotate."""

import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import aiohttp
import trustme
from aiohttp import web as http
from multidict import CIMultiDict
from playwright.async_api import Page, expect

from tests.browser.chromium import WAIT_MS
from tests.browser.conftest import Product, Windows, enter, link
from tests.web.conftest import Site, site

expect.set_options(timeout=WAIT_MS)

SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{20,}")


async def test_a_portal_link_opens_once_and_ends(windows: Windows, window: Page, web: Site):
    windows.may_be_refused = True
    address = await link(web)
    await window.goto(address)
    await expect(window.get_by_role("heading", name="No endpoints yet")).to_be_visible()
    await expect(window.locator("header .who")).to_contain_text("acct")
    await expect(window.get_by_role("link", name="Overview")).to_have_count(0)

    other = await windows.open()
    await other.goto(address)
    await expect(other.get_by_role("alert")).to_contain_text("has been used, or its time is over")
    late = await link(web)
    await web.query("UPDATE webhook.login_link SET expires_at = now() - interval '1 second'")
    await other.goto(late)
    await expect(other.get_by_role("alert")).to_contain_text("has been used, or its time is over")

    await web.query("UPDATE webhook.login SET expires_at = now() - interval '1 second'")
    await window.reload()
    await expect(window).to_have_url(re.compile("/login"))
    await expect(window.get_by_text("Customers come here by a link")).to_be_visible()


async def test_another_account_sees_nothing(windows: Windows, web: Site):
    windows.may_be_refused = True
    theirs, mine = await windows.open(), await windows.open()
    await enter(theirs, web, "theirs")
    await theirs.goto(f"{web.url}/endpoints/new")
    await theirs.get_by_label("URL that gets the POSTs").fill("https://receiver.test/theirs")
    await theirs.get_by_role("button", name="Save as a draft, then test").click()
    await theirs.wait_for_url("**/setup**")
    await enter(mine, web, "mine")
    await expect(mine.get_by_role("heading", name="No endpoints yet")).to_be_visible()
    endpoint = urlsplit(theirs.url).path.removesuffix("/setup")
    for path in (endpoint, f"{endpoint}/setup"):
        answer = await mine.goto(web.url + path)
        assert answer is not None
        assert answer.status == 404
        assert "receiver.test" not in await mine.content()
    answer = await mine.goto(f"{web.url}/overview")
    assert answer is not None
    assert answer.status == 403


async def test_a_secret_is_revealed_and_rotated(window: Page, product: Product):
    await enter(window, product.web)
    endpoint = await product.rig.endpoint("/hook")
    at = f"{product.web.url}/endpoints/{endpoint}"
    await window.goto(at)
    assert not SECRET.search(await window.content())
    await window.get_by_role("button", name="Reveal").click()
    await expect(window.get_by_text(SECRET)).to_have_count(1)
    await window.goto(at)
    await window.get_by_text("Rotate", exact=True).click()
    await window.get_by_label("How long the old one signs too").select_option(label="an hour")
    await window.get_by_role("button", name="Make a new one").click()
    await expect(window.get_by_text("signs too until")).to_be_visible()
    await window.get_by_role("button", name="Reveal").click()
    await expect(window.get_by_text(SECRET)).to_have_count(2)
    await window.goto(f"{at}/setup")
    await expect(window.get_by_text(re.compile(r"webhook-signature: v1,\S+ v1,\S+"))).to_be_visible()  # both sign


@contextlib.asynccontextmanager
async def another_site(page: str) -> AsyncIterator[str]:
    """Serve a page from another port: the same site to a browser's cookies, but another origin."""

    async def answer(_: http.Request) -> http.Response:
        return http.Response(text=page, content_type="text/html")

    app = http.Application()
    app.router.add_get("/", answer)
    runner = http.AppRunner(app, access_log=None)
    await runner.setup()
    await http.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def test_another_site_can_not_press_a_button(windows: Windows, window: Page, product: Product):
    """The browser sends the login's cookie along: what refuses it is the origin, and the token that the other site can't know."""
    windows.may_be_refused = True
    await enter(window, product.web)
    endpoint = await product.rig.endpoint("/hook")
    pause = f"{product.web.url}/endpoints/{endpoint}/pause"
    form = f'<form method="post" action="{pause}"><button>Win a prize</button></form>'
    async with another_site(form) as elsewhere:
        await window.goto(elsewhere)
        await window.get_by_role("button", name="Win a prize").click()
        await expect(window.get_by_role("alert")).to_contain_text("This came from another site")
    await window.goto(f"{product.web.url}/endpoints/{endpoint}")
    status = await window.evaluate("(pause) => fetch(pause, { method: 'POST' }).then((answer) => answer.status)", pause)
    assert status == 403
    assert (await product.rig.db.fetchval("SELECT state FROM webhook.endpoint")) == "live"
    await window.get_by_role("button", name="Pause: hold its events").click()  # the same by the page itself
    await expect(window.locator("h1 .state")).to_have_text("paused")


async def test_nobody_may_frame_it_unasked(windows: Windows, window: Page, web: Site):
    async with another_site(f'<iframe src="{web.url}/login"></iframe>') as elsewhere:
        await window.goto(elsewhere)
        frame = window.frames[1]
        await frame.wait_for_load_state()
        assert await frame.get_by_label("Key").count() == 0
    assert [said for said in windows.complaints if "frame-ancestors" in said or "X-Frame-Options" in said]
    windows.complaints.clear()


@contextlib.asynccontextmanager
async def over_tls(answer: Callable[[http.Request], Awaitable[http.StreamResponse]]) -> AsyncIterator[int]:
    """Serve by https:// for whatever name Chromium is told leads here (chromium.py)."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("hooks.example", "platform.example").configure_cert(tls)
    app = http.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = http.AppRunner(app, access_log=None)
    await runner.setup()
    await http.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def test_a_platform_shows_it_in_its_own_page(windows: Windows, dsn: str):
    """Cookies of a frame of another site, kept apart for the site that shows it; forms work, with their tokens."""
    panel, shop = "", ""

    async def as_a_proxy(request: http.Request) -> http.Response:
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Accept-Encoding")}
        body = await request.read()
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            asked = session.request(
                request.method, panel + request.path_qs, headers=headers, data=body, allow_redirects=False
            )
            async with asked as answer:
                kept = [
                    (name, value) for name, value in answer.headers.items() if name not in ("Content-Length", "Date")
                ]
                return http.Response(status=answer.status, headers=CIMultiDict(kept), body=await answer.read())

    async def as_the_platform(_: http.Request) -> http.Response:
        return http.Response(text=shop, content_type="text/html")

    async with over_tls(as_a_proxy) as port, over_tls(as_the_platform) as shop_port:
        public, platform = f"https://hooks.example:{port}", f"https://platform.example:{shop_port}"
        async with site(dsn, public_url=public, frame_ancestors=platform) as web:
            panel = web.url
            shop = f'<h1>Your shop</h1><iframe src="{await link(web)}" width="900" height="600"></iframe>'
            window = await windows.open(ignore_https_errors=True)
            await window.goto(platform)
            frame = window.frame_locator("iframe")
            await frame.get_by_role("link", name="Add your first endpoint").click()
            await frame.get_by_label("URL that gets the POSTs").fill("https://receiver.test/hook")
            await frame.get_by_role("button", name="Save as a draft, then test").click()
            await expect(frame.locator("form[action$='/test']")).to_be_visible()  # of an endpoint that is there
            assert [row["url"] for row in await web.query("SELECT url FROM webhook.endpoint")] == [
                "https://receiver.test/hook"
            ]
            await window.close()  # its live stream would come back when the panel is gone
