"""What can be held of looks by numbers, on every page: contrast, nothing wider than a phone, a name for whatever can be used, one headline."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.conftest import Windows, enter, enter_as_operator
from tests.browser.world import World, pages, world

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
        seen = await window.evaluate(LOOK)
        if seen != {"faint": [], "wide": [], "unnamed": [], "headings": 1}:
            found[shown.name] = seen
    assert found == {}
