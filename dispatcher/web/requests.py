"""What was asked of panel and API, in plain numbers: whoever tells of the process reads them as they stand.

api        below /api/
panel      pages, logins, and whatever else isn't one of these
receiver   what was sent to a built-in receiver
stream     live updates, counted when they end
static     styles and scripts
health     /healthz
"""

import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware
from aiohttp.web import StreamResponse

from dispatcher.engine.histogram import Histogram

API, PANEL, RECEIVER, STREAM, STATIC, HEALTH = "api", "panel", "receiver", "stream", "static", "health"
PREFIXES = {"/api/": API, "/r/": RECEIVER, "/static/": STATIC, "/healthz": HEALTH}
LEFT = "left"  # the client was gone before its answer
STATUSES = ("2xx", "3xx", "4xx", "5xx", LEFT)
MEASURED = (API, PANEL, RECEIVER)  # a stream lasts as long as somebody looks; the others take no time

Handler = Callable[[web.Request], Awaitable[StreamResponse]]


class Requests:
    """`counts`: by area and class of status. `answer_us`: how long answers took, of areas that ask the database."""

    def __init__(self) -> None:
        self.counts = {
            (area, status): 0 for area in (API, PANEL, RECEIVER, STREAM, STATIC, HEALTH) for status in STATUSES
        }
        self.answer_us = Histogram()

    def count(self, area: str, status: str, took_s: float) -> None:
        self.counts[area, status] += 1
        if area in MEASURED:
            self.answer_us.add(int(took_s * 1e6))


def area_of(path: str) -> str:
    """Return the area of a path below the base path."""
    return next((area for prefix, area in PREFIXES.items() if path.startswith(prefix)), PANEL)


def counting(requests: Requests, mount: str) -> Middleware:
    """Make what counts every request as it was answered: it stands before all that may answer."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> StreamResponse:
        began = time.monotonic()
        area, status = area_of(request.path.removeprefix(mount)), LEFT
        try:
            response = await handler(request)
            status = f"{response.status // 100}xx"
            if response.content_type == "text/event-stream":
                area = STREAM
            return response
        except web.HTTPException as exc:
            status = f"{exc.status // 100}xx"
            raise
        finally:
            requests.count(area, status, time.monotonic() - began)

    return count
