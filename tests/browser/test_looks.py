"""What can be held of looks by numbers, on every page: contrast, nothing wider than a phone, a name for whatever can be used, one headline."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.browser.conftest import Windows, enter, enter_as_operator
from tests.browser.world import World, pages, world
from tests.web.conftest import Site

LOOK = Path(__file__).with_name("look.js").read_text()
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture
async def furnished(dsn: str) -> AsyncIterator[World]:
    async with world(dsn) as made:
        yield made


@pytest.mark.parametrize(("scheme", "size"), [("light", PHONE), ("dark", DESK), ("dark", PHONE), ("light", DESK)])
async def test_every_page_can_be_read(windows: Windows, furnished: World, scheme, size):
    windows.may_be_refused = True  # one of the pages says that something isn't there
    found = {}
    looking = {}
    for shown in pages(furnished.things):
        if shown.who not in looking:
            looking[shown.who] = window = await windows.open(color_scheme=scheme, viewport=size)
            if shown.who == "operator":
                await enter_as_operator(window, furnished.web)
            elif shown.who is not None:
                await enter(window, furnished.web, shown.who)
        window = looking[shown.who]
        await window.goto(furnished.web.url + shown.path)
        await window.evaluate("() => { for (const one of document.querySelectorAll('details')) one.open = true; }")
        if await window.get_by_role("button", name="Menu").is_visible():
            await window.get_by_role("button", name="Menu").click()
        seen = await window.evaluate(LOOK)
        if seen != {"faint": [], "wide": [], "unnamed": [], "headings": 1}:
            found[shown.name] = seen
    assert found == {}


@pytest.mark.parametrize("width", [1152, 1280, 1440])
async def test_the_menu_is_one_line_on_a_wide_screen(windows: Windows, web: Site, width):
    window = await windows.open(viewport={"width": width, "height": 700})
    await enter_as_operator(window, web)
    tops = await window.eval_on_selector_all(
        "header nav a, header .who *", "all => all.map(one => one.getBoundingClientRect())"
    )
    middles = {round(box["top"] + box["height"] / 2) for box in tops if box["width"]}
    assert max(middles) - min(middles) <= 2
    assert await window.evaluate(
        "() => { const nav = document.querySelector('nav'); return nav.scrollWidth <= nav.clientWidth; }"
    )
    await expect(window.get_by_role("button", name="Menu")).to_be_hidden()


async def test_the_menu_is_opened_and_closed_by_keys_on_a_phone(windows: Windows, web: Site):
    window = await windows.open(viewport=PHONE)
    await enter_as_operator(window, web)
    entry = window.get_by_role("navigation", name="Main").get_by_role("link", name="Deliveries")
    await expect(entry).to_be_hidden()
    await window.get_by_role("button", name="Menu").focus()
    await window.keyboard.press("Enter")
    await expect(entry).to_be_visible()
    await window.keyboard.press("Escape")
    await expect(entry).to_be_hidden()
    await window.keyboard.press("Enter")
    for _ in range(3):
        await window.keyboard.press("Tab")
    await expect(entry).to_be_focused()
    await window.keyboard.press("Enter")
    await window.wait_for_url("**/deliveries")
