"""A browser for all tests, a window for each, and before it the whole product: engine, panel, PostgreSQL, a receiver."""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from playwright.async_api import Browser, BrowserContext, Page

from dispatcher.main import make_web
from tests.browser.chromium import WAIT_MS, chromium, executable
from tests.rig import Rig, rig
from tests.web.conftest import Site, plain_logs, site

__all__ = ["plain_logs"]  # a fixture


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    path = executable()
    if path is None:
        pytest.skip(
            "no Chromium is installed (apt-get install chromium): the browser tests are left out, and only those"
        )
    async with chromium(path) as made:
        yield made


REFUSED = re.compile(
    r"Failed to load resource: .* (401|403|404) \("
)  # what a test of refusals meets; a file that is missing is a 404 too


@dataclass
class Windows:
    """Opens windows, each with cookies of its own, and notes what their pages complain about."""

    browser: Browser
    may_be_refused: bool = False
    complaints: list[str] = field(default_factory=list)
    contexts: list[BrowserContext] = field(default_factory=list)

    async def open(self, **options: Any) -> Page:
        context = await self.browser.new_context(locale="en-GB", timezone_id="UTC", **options)
        self.contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = await context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        return page

    async def close(self) -> None:
        """Close them all: before what they look at ends, or their live streams come back to nobody, and complain."""
        while self.contexts:
            await self.contexts.pop().close()


@pytest.fixture
async def windows(browser: Browser) -> AsyncIterator[Windows]:
    """Fails the test at its end if a script failed, the policy refused something, or a file was missing."""
    made = Windows(browser)
    yield made
    await made.close()
    said = [one for one in made.complaints if not (made.may_be_refused and REFUSED.search(one))]
    assert said == []


@pytest.fixture
async def window(windows: Windows) -> Page:
    return await windows.open()


async def link(web: Site, account_id: str = "acct") -> str:
    """Return a portal link, as the platform's backend gets it."""
    answer = await web.ask("POST", "/api/v1/portal-links", key=await web.key(), json={"account_id": account_id})
    return str(answer.json["url"])


async def enter(page: Page, web: Site, account_id: str = "acct") -> None:
    """Go in as a customer."""
    await page.goto(await link(web, account_id))


async def enter_as_operator(page: Page, web: Site) -> None:
    await page.goto(f"{web.url}/login")
    await page.get_by_label("Key").fill(await web.key())
    await page.get_by_role("button", name="Log in").click()
    await page.wait_for_url("**/overview")


class Product(NamedTuple):
    """A dispatcher that delivers, with its panel, as `run` has them in one process."""

    rig: Rig
    web: Site


@pytest.fixture
async def web(dsn: str, windows: Windows) -> AsyncIterator[Site]:
    async with site(dsn) as made:
        yield made
        await windows.close()


@pytest.fixture
async def product(dsn: str, windows: Windows) -> AsyncIterator[Product]:
    async with AsyncExitStack() as stack:
        settings = {
            "retry_schedule_s": (1,) * 50,
            "breaker_failures": 3,
            "breaker_wait_s": 1.0,
            "breaker_wait_max_s": 1.0,
        }
        made = await stack.enter_async_context(rig(dsn, **settings))
        web = await stack.enter_async_context(
            site(dsn, make=lambda given, dsn, transport: make_web(given, dsn, transport, made.engine))
        )
        yield Product(made, web)
        await windows.close()
