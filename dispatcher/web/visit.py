"""One request on its way: who asks, whether they may, what they sent, and how they are answered.

`Route.serve` is the only way to a handler, for pages and API alike, and it takes the same steps in the same order: a
bearer's key, or the login's cookie, becomes a `Principal`; the route's `who` is held against it; a change that comes
with a cookie must show its CSRF token; the body is read within its bound; the change is written into the audit before
it is made, and its status after. A handler begins where all of that is true.
"""

import asyncio
import enum
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlsplit

import orjson
import structlog
from aiohttp import web
from aiohttp.web import StreamResponse

from dispatcher.domain.principal import Principal
from dispatcher.errors import BusyError, DatabaseAwayError
from dispatcher.store import access
from dispatcher.store.access import Login
from dispatcher.store.admin import Admin
from dispatcher.store.session import Connection
from dispatcher.web import sessions
from dispatcher.web.pages import Templates
from dispatcher.web.problems import ProblemError
from dispatcher.web.turns import others_first

if TYPE_CHECKING:
    from dispatcher.web.app import Web

_log = structlog.get_logger(room="web")

BODY_BYTES_MAX = 65_536
BODY_S = 10.0  # a body must have come by then
SAFE = ("GET", "HEAD", "OPTIONS")

Handler = Callable[["Visit"], Awaitable[StreamResponse]]


class Who(enum.Enum):
    """Whom a route is for."""

    ANYONE = "anyone"
    SIGNED_IN = "accounts and operators"
    OPERATOR = "operators"


class Page(web.Response):
    """A page that is rendered after its handler has ended and given its connection back; `Route.serve` does it."""

    def __init__(self, template: str, context: dict[str, Any], status: int) -> None:
        super().__init__(text="", status=status, content_type="text/html")
        self._template = template
        self._context = context

    async def fill(self, templates: Templates) -> None:
        self.text = await templates.render_by_turns(self._template, self._context)


class Visit:
    """What a handler gets. `form` and `query` have one value a name, the last; `form_list` has them all."""

    def __init__(self, web: "Web", route: "Route", request: web.Request) -> None:
        self.web = web
        self.route = route
        self.request = request
        self.login: Login | None = None
        self.body = b""
        self.subject = " ".join(f"{name}={value}" for name, value in request.match_info.items())
        self.key_expires_at: datetime | None = None  # of the key that it came by
        self._principal: Principal | None = None
        self._key: str | None = None

    # ── who ──

    @property
    def principal(self) -> Principal:
        """Who asks. Every question to the store takes it."""
        assert self._principal is not None, "the route is for anyone, who may be nobody"
        return self._principal

    @property
    def is_signed_in(self) -> bool:
        return self._principal is not None

    @property
    def csrf_token(self) -> str:
        """For `<input type=hidden name=csrf_token>`, or the header X-CSRF-Token. Empty where nobody is logged in."""
        return "" if self.login is None else sessions.csrf_token(self.web.key, self.login.id)

    @property
    def address(self) -> str:
        """The client's address; behind trusted proxies the last that isn't one of them."""
        address = self.request.remote or ""
        if not self.web.trusts(address):
            return address
        hops = ",".join(self.request.headers.getall("X-Forwarded-For", []))  # each proxy may add a line
        for hop in reversed(hops.split(",")):
            try:
                address = str(ipaddress.ip_address(hop.strip()))
            except ValueError:
                break
            if not self.web.trusts(address):
                break
        return address

    # ── what was sent ──

    @property
    def path(self) -> Mapping[str, str]:
        return self.request.match_info

    @property
    def query(self) -> Mapping[str, str]:
        return {name: value for name, value in self.request.query.items()}  # noqa: C416 - a MultiDict has several

    @property
    def form(self) -> dict[str, str]:
        return dict(self._pairs())

    def form_list(self, name: str) -> list[str]:
        return [value for key, value in self._pairs() if key == name]

    @property
    def wants_json(self) -> bool:
        if self.request.query.get("format") == "json" or self.route.is_api:
            return True
        accept = self.request.headers.get("Accept", "")
        return "application/json" in accept and "text/html" not in accept

    # ── the database ──

    @asynccontextmanager
    async def db(self, *, long: bool = False) -> AsyncIterator[Connection]:
        """Lend a connection; `long` for what may take minutes."""
        async with self.web.pool.connection(long=long) as db:
            yield db
        await others_first()

    def admin(self, db: Connection) -> Admin:
        """What people do to endpoints and events, as whoever asks."""
        return Admin(db, self.web.settings, self.principal)

    # ── answers ──

    def answer(self, template: str, data: dict[str, Any], *, status: int = 200) -> web.Response:
        """Answer with a page, or with its data as JSON if that is what was asked for: every page answers both."""
        return self.json(data, status=status) if self.wants_json else self.html(template, status=status, **data)

    def html(self, template: str, *, status: int = 200, **context: Any) -> "Page":
        shared = {
            "principal": self._principal, "csrf_token": self.csrf_token, "path": self.request.path, "is_operator":
            self._principal is not None and self._principal.is_operator,
        }  # fmt: skip
        return Page(template, shared | context, status)

    def json(self, data: Any, *, status: int = 200) -> web.Response:
        return web.Response(body=orjson.dumps(data, default=str), status=status, content_type="application/json")

    def redirect(self, path: str) -> web.Response:
        """Send the browser to a path of ours, by GET."""
        return web.Response(status=303, headers={"Location": self.web.base + path})

    def begin_login(self, login: Login, path: str) -> web.Response:
        """Send the browser on with its cookie. What it had before is worth nothing: ids are new with each login."""
        response = self.redirect(path)
        expires = int(login.expires_at.timestamp())
        value = sessions.sign(self.web.key, login.id, expires)
        response.headers.add("Set-Cookie", self.web.cookies.put(value, max(0, expires - int(time.time()))))
        return response

    # ── the steps before a handler; Route.serve takes them ──

    async def authenticate(self) -> None:
        authorization = self.request.headers.get("Authorization")
        if authorization is not None:
            await self._by_key(authorization)
            return
        cookie = self.request.cookies.get(self.web.cookies.name)
        if cookie is None:
            return
        async with self.db() as db:
            await self.web.know_key(db)
            login_id = sessions.unsign(self.web.key, cookie, time.time())
            self.login = None if login_id is None else await access.login(db, login_id)
        if self.login is not None and self.login.proxy_user != (self.proxy_user if self.login.proxy_user else None):
            self.login = None  # the proxy has somebody else before it now
        if self.login is not None:
            self._principal, self.key_expires_at = self.login.principal, self.login.key_expires_at

    async def is_still_let_in(self) -> bool:
        """Ask again, in the middle of a long answer: the key may have been revoked since, or the login be over."""
        async with self.db() as db:
            if self.login is not None:
                return await access.login(db, self.login.id) is not None
            return self._key is None or await access.bearer(db, self._key) is not None

    @property
    def proxy_user(self) -> str | None:
        """Whom a trusted proxy says it has let in."""
        header = self.web.settings.web_login_header
        if header is None or not self.web.trusts(self.request.remote or ""):
            return None
        named = self.request.headers.getall(header, [])
        user = named[0].strip() if len(named) == 1 else ""  # of two, one is the client's own
        return user if user and user.isprintable() and len(user) <= 200 else None

    async def _by_key(self, authorization: str) -> None:
        """A key that fits is let in whatever others of its address have tried: behind a proxy that isn't trusted they are everybody."""
        scheme, _, text = authorization.partition(" ")
        text = text.strip()
        if scheme.lower() == "bearer" and text.startswith(access.KEY_PREFIX):
            async with self.db() as db:
                found = await access.bearer(db, text)
            if found is not None:
                _, self._principal, self.key_expires_at = found
                self._key = text
                return
        self.check_failures()
        self.count_failure()
        raise ProblemError(401, "this is no key, or none any more", headers={"WWW-Authenticate": "Bearer"})

    def check_failures(self) -> None:
        """Refuse an address that has failed too often to log in."""
        wait_s = self.web.failed_logins.wait_s(self.address, time.monotonic())
        if wait_s:
            raise ProblemError(
                429, "too many failed logins from this address", headers={"Retry-After": str(int(wait_s) + 1)}
            )

    def count_failure(self) -> None:
        self.web.failed_logins.count(self.address, time.monotonic())

    def authorize(self) -> None:
        who = self.route.who
        if who is Who.ANYONE:
            return
        if self._principal is None:
            if self.request.method == "GET" and not self.wants_json:
                here = self.request.path_qs.removeprefix(self.web.mount) or "/"
                raise web.HTTPSeeOther(f"{self.web.base}/login?next={quote(here, safe='')}")
            raise ProblemError(
                401, "log in, or send a key: Authorization: Bearer whkey_…", headers={"WWW-Authenticate": "Bearer"}
            )
        if who is Who.OPERATOR and not self._principal.is_operator:
            raise ProblemError(403, "this is for operators")

    def check_csrf(self) -> None:
        """A browser sends the cookie along with whatever any page makes it send; our pages' token it can't know."""
        if self.request.method in SAFE or self.login is None:
            return
        self.check_origin()
        given = self.request.headers.get("X-CSRF-Token") or self.form.get("csrf_token", "")
        if not sessions.is_csrf_token(self.web.key, self.login.id, given):
            raise ProblemError(403, "this page is from before you logged in; load it again and repeat", code="csrf")

    def check_origin(self) -> None:
        """Refuse what a browser says comes from another site."""
        site, origin = self.request.headers.get("Sec-Fetch-Site"), self.request.headers.get("Origin")
        if site is not None and site not in ("same-origin", "none"):
            raise ProblemError(403, "this came from another site", code="csrf")
        if origin is not None and not self._is_ours(origin):
            raise ProblemError(403, "this came from another site", code="csrf")

    def _is_ours(self, origin: str) -> bool:
        try:
            return urlsplit(origin).netloc == self.web.host(self.request)
        except ValueError:  # such as http://[
            return False

    async def read_body(self) -> None:
        if self.request.method in SAFE or not self.request.can_read_body:
            return
        most = self.route.body_bytes_max
        too_large = ProblemError(413, f"a body has at most {most} bytes here", headers={"Connection": "close"})
        if (self.request.content_length or 0) > most:
            raise too_large
        if self.request.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
            raise ProblemError(
                415, "bodies are taken as they are, without a Content-Encoding", headers={"Connection": "close"}
            )
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in self.request.content.iter_chunked(65_536):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > most:
                        raise too_large
        except TimeoutError as exc:
            raise ProblemError(
                408, f"the body did not come within {BODY_S:g} s", headers={"Connection": "close"}
            ) from exc
        except web.RequestPayloadError as exc:
            raise ProblemError(
                400, "the body broke off, or is no chunked one", headers={"Connection": "close"}
            ) from exc
        self.body = b"".join(chunks)

    def _pairs(self) -> list[tuple[str, str]]:
        if self.request.content_type != "application/x-www-form-urlencoded":
            return []
        try:
            return parse_qsl(self.body.decode(), keep_blank_values=True, max_num_fields=1_000, errors="strict")
        except ValueError as exc:
            raise ProblemError(400, "the form is malformed") from exc


VISIT = web.RequestKey("visit", Visit)  # where a request keeps it, for who answers when the handler can't


@dataclass(frozen=True, slots=True)
class Route:
    """A path, its handler, and whom it is for. `change`: what the audit calls what it does, such as endpoint.pause; every route that isn't
    a look (GET) has one. Paths are below the base path, with parameters as aiohttp has them: /endpoints/{endpoint_id:[0-9]{1,18}}."""

    method: str
    path: str
    handler: Handler
    who: Who = Who.SIGNED_IN
    change: str | None = None
    body_bytes_max: int = BODY_BYTES_MAX
    is_api: bool = False

    def __post_init__(self) -> None:
        assert (self.method in SAFE) == (self.change is None), f"{self.method} {self.path}: a change has a name"

    async def serve(self, web: "Web", request: web.Request) -> StreamResponse:
        visit = request[VISIT] = Visit(web, self, request)
        await visit.authenticate()
        visit.authorize()
        await visit.read_body()
        visit.check_csrf()
        handler = self.handler if self.change is None or not visit.is_signed_in else self._change
        response = await handler(visit)
        if isinstance(response, Page):
            await response.fill(web.templates)
        await others_first()
        return response

    async def _change(self, visit: Visit) -> StreamResponse:
        assert self.change is not None
        async with visit.db() as db:
            change_id = await access.begin_change(db, visit.principal, self.change, visit.subject, visit.address)
        status = 500
        try:
            response = await self.handler(visit)
            status = response.status
        except Exception as exc:
            status = visit.web.status_of(exc)
            raise
        finally:
            try:
                async with visit.db() as db:
                    await access.end_change(db, change_id, status, visit.subject)
            except (BusyError, DatabaseAwayError) as exc:
                # It is done, or it failed, as the answer says: said to have failed, it would be made once more.
                _log.warning(
                    "change.end_unknown", change=change_id, action=self.change, status=status, error=exc.message
                )
        return response
