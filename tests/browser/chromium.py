"""A real Chromium without a window. Playwright drives it; the browser is the system's (`apt-get install chromium`): a test run
downloads none."""

import contextlib
import shutil
from collections.abc import AsyncIterator

from playwright.async_api import Browser, async_playwright

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP *.example 127.0.0.1",
)  # fmt: skip
WAIT_MS = 60_000  # for a condition, on a machine that is busy with other things


def executable() -> str | None:
    """Return where Chromium is, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


@contextlib.asynccontextmanager
async def chromium(path: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS), timeout=WAIT_MS)
        try:
            yield browser
        finally:
            await browser.close()
