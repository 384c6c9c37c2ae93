"""The panel and the API: one aiohttp application, served by `dispatcher run` beside the engine or alone by `dispatcher web`.

It has a few database connections of its own (store/pool.py) and shares nothing with deliveries but the loop and, for
tests of endpoints, the transport. Whatever goes wrong here ends in an answer, never in the engine.

    Route (visit.py)     a path, whom it is for, a handler; `serve` logs in, checks, reads, audits, and only then calls it
    Visit (visit.py)     what a handler gets: principal, form, query, database; and its answers
    Web (here)           what all visits share
    api/                 /api/v1: one table of routes with the models that validate and document it
    panel/               the pages
    pages.py             templates and static files
    streams.py           live updates
    requests.py          what was asked, counted and timed

How to add a page. Write a handler in panel/, and put its route into `ROUTES` of panel/__init__.py:

    async def endpoint(visit: Visit) -> StreamResponse:
        async with visit.db() as db:
            view = await visit.admin(db).get(int(visit.path["endpoint_id"]))    # another account's: NotFoundError, a 404
        return visit.answer("endpoint.html", {"endpoint": view.as_dict()})      # HTML, or JSON if that is asked for

    async def pause(visit: Visit) -> StreamResponse:
        async with visit.db() as db:
            await visit.admin(db).pause(int(visit.path["endpoint_id"]), skip="skip" in visit.form)
        return visit.redirect(f"/endpoints/{visit.path['endpoint_id']}")

    ROUTES = (
        Route("GET", "/endpoints/{endpoint_id:[0-9]{1,18}}", endpoint),
        Route("POST", "/endpoints/{endpoint_id:[0-9]{1,18}}/pause", pause, change="endpoint.pause"),
    )

Its template is panel/templates/endpoint.html and extends base.html (blocks: title, nav, main, scripts); its styles and
scripts are files in panel/static, named by `{{ static("endpoint.js") }}`: the policy allows nothing inline and nothing from
elsewhere. Paths are written `{{ url("/endpoints") }}`. A form has `<input type="hidden" name="csrf_token"
value="{{ csrf_token }}">`; a script sends the header X-CSRF-Token, from `<meta name="csrf-token">`. Errors of ours
(dispatcher/errors.py) are raised, not rendered: `answer_errors` makes them pages or problem+json. Every question to the
store takes `visit.principal`, or an account that `visit.principal.within` returned. Live: streams.py.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware
from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError
from dispatcher.ports import Transport
from dispatcher.settings import Settings
from dispatcher.store import access
from dispatcher.store.overview import read_minutes, read_overview
from dispatcher.store.pool import Pool
from dispatcher.store.session import Connection
from dispatcher.web import api, login, panel, receiver
from dispatcher.web.jobs import Jobs
from dispatcher.web.kept import Kept
from dispatcher.web.limits import FailedLogins, Trials
from dispatcher.web.pages import StaticFiles, Templates
from dispatcher.web.problems import ProblemError, problem_of, problem_of_http
from dispatcher.web.requests import Requests, counting
from dispatcher.web.sessions import Cookies
from dispatcher.web.streams import Streams
from dispatcher.web.visit import VISIT, Route, Visit, Who

_log = structlog.get_logger(room="web")

LISTEN = "127.0.0.1:8080"  # unless a setting says otherwise

# For how long what all operators see is kept: 15 statements, and a sum over the last whole minutes.
OVERVIEW_S, MINUTES_S = 1.0, 30.0

LaneHealth = Callable[[int | None], list[dict[str, Any]]]  # of one endpoint, or all; empty unless this process delivers
Handler = Callable[[web.Request], Awaitable[StreamResponse]]
Vitals = Callable[[], Mapping[str, float]]  # what the delivering process's memory knows; empty unless that is this one


class Web:
    """What all visits share. Made within a running loop; `close` it."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        transport: Transport,
        *,
        lane_health: LaneHealth | None = None,
        vitals: Vitals = dict,
        requests: Requests | None = None,
    ) -> None:
        public = settings.public_url or ""
        self.settings = settings
        self.pool = pool
        self.transport = transport
        self.lane_health = lane_health  # of the engine beside; None where there is none
        self.vitals = vitals
        self.requests = requests or Requests()
        self.base = urlsplit(public).path  # before every path that a browser is told
        self.mount = (
            self.base if settings.web_base_path is None else settings.web_base_path
        )  # before every path that comes in
        self.cookies = Cookies.of(settings, self.base)
        self.files = StaticFiles(settings)
        self.templates = Templates(settings, self.files, self.base)
        self.published = api.publish(self.templates, title=settings.product_name, server=self.base)
        self.overview = Kept(self._read_overview, for_s=OVERVIEW_S)
        self.minutes = Kept(read_minutes, for_s=MINUTES_S)
        self.streams = Streams(pool, streams_max=settings.web_streams_max)
        self.failed_logins = FailedLogins()
        self.trials = Trials()
        self.jobs = Jobs()
        self.receivers = receiver.Receivers()
        self.headers = security_headers(settings)
        self.listening = settings.web_listen or LISTEN  # the server says where it really does
        self._public = public
        self._trusted = settings.trusted_proxies
        self._key: bytes | None = None

    @property
    def key(self) -> bytes:
        """What cookies are signed with; known after `know_key`."""
        assert self._key is not None
        return self._key

    async def know_key(self, db: Connection) -> None:
        if self._key is None:
            self._key = await access.web_key(db)

    async def _read_overview(self, db: Connection) -> dict[str, Any]:
        return await read_overview(db) | {"vitals": self.vitals()}

    def trusts(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._trusted)

    def host(self, request: web.Request) -> str:
        """The host that browsers know us by."""
        return urlsplit(self._public).netloc or request.host

    def url(self, path: str, request: web.Request | None = None) -> str:
        """A whole address, for who is elsewhere."""
        if self._public:
            return self._public + path
        host = self.listening if request is None else request.host
        return f"http://{host}{path}"

    def problem(self, exc: Exception) -> ProblemError:
        """Return what goes wrong as an answer; what nobody expected is logged with its trace."""
        if isinstance(exc, ProblemError):
            return exc
        if isinstance(exc, DispatcherError):
            return problem_of(exc)
        if isinstance(exc, web.HTTPException):
            return problem_of_http(exc)
        return ProblemError(500, "something went wrong on our side; it has been logged")

    def status_of(self, exc: Exception) -> int:
        return exc.status if isinstance(exc, web.HTTPException) else self.problem(exc).status

    async def close(self) -> None:
        await self.streams.close()
        await self.jobs.close()
        await self.pool.close()


def make_app(shared: Web) -> web.Application:
    """Return the application with every route under the base path."""
    app = web.Application(
        middlewares=[counting(shared.requests, shared.mount), answering_errors(shared)],
        client_max_size=1,  # bodies are read by Visit
    )
    for route in routes():
        app.router.add_route(route.method, shared.mount + route.path, partial(route.serve, shared))
    app.router.add_post(
        shared.mount + receiver.PATH, partial(receiver.receive, shared)
    )  # nobody's login, whatever it carries
    app.router.add_get(shared.mount + "/static/{digest}/{name:.+}", partial(_static, shared))
    app.router.add_get(shared.mount + "/healthz", partial(_health, shared))

    async def finish(request: web.Request, response: StreamResponse) -> None:
        for name, value in shared.headers.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.popall("Server", None)

    app.on_response_prepare.append(finish)
    return app


def routes() -> Sequence[Route]:
    """Return every route there is; a test tries each with the wrong account."""
    found = [*login.ROUTES, *api.ROUTES, *panel.ROUTES]
    if not any(route.path == "/" for route in found):
        found.append(Route("GET", "/", _home))
    return found


async def _home(visit: Visit) -> StreamResponse:
    return visit.redirect("/overview" if visit.principal.is_operator else "/endpoints")


async def _health(shared: Web, _: web.Request) -> web.StreamResponse:
    """Say, to a load balancer that has no login, whether pages can be answered; not what is wrong."""
    try:
        await shared.pool.ask()
    except DispatcherError:
        return web.json_response({"ready": False}, status=503)
    return web.json_response({"ready": True})


async def _static(shared: Web, request: web.Request) -> StreamResponse:
    return shared.files.respond(request.match_info["digest"], request.match_info["name"])


def answering_errors(shared: Web) -> Middleware:
    """Make what turns every exception into an answer: problem+json for programs, a page for people."""

    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> StreamResponse:
        began = time.monotonic()
        try:
            return await handler(request)
        except (web.HTTPRedirection, web.HTTPSuccessful):
            raise
        except ConnectionResetError:
            raise  # the client has left: there is nobody to answer
        except Exception as exc:  # noqa: BLE001 - every one becomes an answer; those that nobody expected are logged
            problem = shared.problem(exc)
            if problem.status >= 500 and not isinstance(exc, DispatcherError | ProblemError):
                _log.exception("request.failed", method=request.method, path=_pattern(request))
            elif problem.status >= 500:
                _log.warning(
                    "request.refused",
                    path=_pattern(request),
                    error=problem.detail,
                    seconds=round(time.monotonic() - began, 3),
                )
            visit = request.get(VISIT) or Visit(shared, _NOWHERE[_is_api(shared, request)], request)
            if visit.wants_json or request.method == "HEAD":
                return problem.response()
            page = visit.html("error.html", status=problem.status, problem=problem)
            page.headers.update(problem.headers)
            await page.fill(shared.templates)
            return page

    return answer_errors


def _pattern(request: web.Request) -> str:
    """Return the path with names in place of what stands there: a login link's token must not be in a log."""
    resource = request.match_info.route.resource
    return "(no route)" if resource is None else resource.canonical


# For requests that found no route.
_NOWHERE = {is_api: Route("GET", "/", _home, Who.ANYONE, is_api=is_api) for is_api in (False, True)}


def _is_api(shared: Web, request: web.Request) -> bool:
    return request.path.startswith(shared.mount + "/api/")


def security_headers(settings: Settings) -> dict[str, str]:
    """Return what every answer says to browsers: nothing from elsewhere, nothing inline, in nobody's frame but those set."""
    ancestors = " ".join(settings.frame_origins) or "'none'"
    logo = urlsplit(settings.logo_url or "")
    pictures = f" {logo.scheme}://{logo.netloc}" if logo.netloc else ""
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:{pictures}; font-src 'self'; "
            f"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors {ancestors}"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # not no-referrer: browsers would then send `Origin: null` with our own forms
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }
    if not settings.frame_origins:
        headers |= {"X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin"}
    return headers
