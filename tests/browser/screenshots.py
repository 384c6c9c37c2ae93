"""Pictures of every page, in light and dark, on a desk and on a phone: `python -m tests.browser.screenshots`.

docs/panel/ gets each page in light at desk width, and two sheets of all pages in dark: on a desk, and on a phone. `--all DIRECTORY` keeps every
single picture besides, to look at.
"""

import argparse
import asyncio
import base64
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop
from playwright.async_api import Browser, Page, expect

from dispatcher import log
from dispatcher import settings as settings_module
from dispatcher.store import event_types
from tests.browser.chromium import WAIT_MS, chromium, executable
from tests.browser.conftest import enter, enter_as_operator
from tests.browser.world import Shown, World, pages, traffic, world
from tests.conftest import SCHEMA, connected, make_server

PICTURES = Path(__file__).parent.parent.parent / "docs" / "panel"
DESK, PHONE = (1280, 900), (390, 1200)  # CSS pixels; pages that are longer are cut
SHEET = """<!doctype html><style>
body {{ margin: 12px; background: #000; display: grid; gap: 12px; align-items: start; width: max-content;
  grid-template-columns: repeat({columns}, {width}px) }}
figure {{ margin: 0 }} img {{ display: block; width: 100% }}
figcaption {{ font: 13px system-ui, sans-serif; color: #ccc; padding: 2px 0 4px }}
</style>"""

Pictures = dict[str, bytes]


async def main(every: Path | None) -> None:
    path = executable()
    if path is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    log.configure(settings_module.load(log_level="error"))
    PICTURES.mkdir(exist_ok=True)
    with _database() as dsn:
        async with connected(dsn) as db:
            await db.execute(SCHEMA)
            await event_types.install(db, event_types.DEFAULT_CATALOGUE.read_bytes())
        async with world(dsn) as made, chromium(path) as browser, asyncio.TaskGroup() as tasks:
            busy = tasks.create_task(traffic(made.rig))
            taken = {
                (scheme, name): await _take(browser, made, scheme, size)
                for name, size in (("desk", DESK), ("phone", PHONE))
                for scheme in ("light", "dark")
            }
            busy.cancel()
            if every is not None:
                for (scheme, name), pictures in taken.items():
                    for page, picture in pictures.items():
                        every.mkdir(parents=True, exist_ok=True)
                        (every / f"{page}-{scheme}-{name}.png").write_bytes(picture)
            for old in PICTURES.glob("*.png"):
                old.unlink()
            for page, picture in taken["light", "desk"].items():
                (PICTURES / f"{page}.png").write_bytes(picture)
            for name, pictures, columns, width in (
                ("sheet-dark", taken["dark", "desk"], 4, 420),
                ("sheet-phone", taken["dark", "phone"], 8, 200),
            ):
                (PICTURES / f"{name}.jpg").write_bytes(await _sheet(browser, pictures, columns, width))
    sizes = [file.stat().st_size for file in PICTURES.iterdir()]
    print(f"{len(sizes)} pictures in {PICTURES}, {sum(sizes) / 1e6:.1f} MB")


async def _take(browser: Browser, made: World, scheme: str, size: tuple[int, int]) -> Pictures:
    windows: dict[str | None, Page] = {}
    pictures = {}
    for shown in pages(made.things):
        if shown.who not in windows:
            context = await browser.new_context(
                locale="en-GB", timezone_id="UTC", color_scheme=scheme, viewport={"width": size[0], "height": 700}
            )
            context.set_default_timeout(WAIT_MS)
            windows[shown.who] = window = await context.new_page()
            if shown.who == "operator":
                await enter_as_operator(window, made.web)
            elif shown.who is not None:
                await enter(window, made.web, shown.who)
        pictures[shown.name] = await _picture(windows[shown.who], made, shown, size)
    for window in windows.values():
        await window.context.close()
    return pictures


async def _picture(window: Page, made: World, shown: Shown, size: tuple[int, int]) -> bytes:
    await window.goto(made.web.url + shown.path)
    if await window.locator("#live").count():
        await expect(window.locator("#live")).to_contain_text("Live", timeout=WAIT_MS)
    if await window.locator("#spark").count():
        await expect(window.locator("#spark rect").nth(3)).to_be_attached(timeout=WAIT_MS)
    height = min(size[1], await window.evaluate("document.documentElement.scrollHeight"))
    return await window.screenshot(
        full_page=True, clip={"x": 0, "y": 0, "width": size[0], "height": height}, animations="disabled"
    )


async def _sheet(browser: Browser, pictures: Pictures, columns: int, width: int) -> bytes:
    """Put pictures beside each other."""
    page = await browser.new_page(viewport={"width": columns * (width + 12) + 12, "height": 800})
    figures = "".join(
        f'<figure><figcaption>{name}</figcaption><img src="data:image/png;base64,{base64.b64encode(picture).decode()}"></figure>'
        for name, picture in pictures.items()
    )
    await page.set_content(SHEET.format(columns=columns, width=width) + figures)
    made = await page.screenshot(full_page=True, type="jpeg", quality=60)
    await page.close()
    return made


@contextlib.contextmanager
def _database() -> Iterator[str]:
    server, directory = make_server()
    try:
        yield server.dsn
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.browser.screenshots", description=__doc__)
    parser.add_argument("--all", type=Path, metavar="DIRECTORY", help="keep every single picture here")
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main(parser.parse_args().all))
