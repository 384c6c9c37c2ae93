"""Logging in and out: by a key, by a link that the platform's backend or the command line made, or because a trusted proxy
says who it is."""

from aiohttp.web import StreamResponse

from dispatcher.store import access
from dispatcher.store.session import Connection
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Route, Visit, Who


async def login_page(visit: Visit) -> StreamResponse:
    path = _next(visit)
    if visit.is_signed_in:
        return visit.redirect(path)
    user = visit.proxy_user
    if user is not None:
        async with visit.db() as db:
            await visit.web.know_key(db)
            return visit.begin_login(await access.login_by_proxy(db, user, visit.web.settings.session_s), path)
    return visit.html("login.html", next=path, failed=False)


async def login(visit: Visit) -> StreamResponse:
    """Exchange a key for a cookie."""
    visit.check_origin()
    visit.check_failures()
    path = _next(visit)
    async with visit.db() as db:
        await visit.web.know_key(db)
        made = await access.login_by_key(db, visit.form.get("key", "").strip(), visit.web.settings.session_s)
        if made is None:
            visit.count_failure()
            return visit.html("login.html", status=401, next=path, failed=True)
        await _end(visit, db)
        return visit.begin_login(made, path)


async def enter(visit: Visit) -> StreamResponse:
    """Open a link: use it up, and go on as its account."""
    visit.check_failures()
    if visit.request.method == "HEAD":
        raise ProblemError(405, "a link is opened by GET", headers={"Allow": "GET"})
    async with visit.db() as db:
        await visit.web.know_key(db)
        made = await access.login_by_link(db, visit.path["token"])
        if made is None:
            visit.count_failure()
            raise ProblemError(
                403, "this link has been used, or its time is over; ask for another where you got it", code="link_over"
            )
        await _end(visit, db)
        return visit.begin_login(made, _next(visit))


async def logout(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await _end(visit, db)
    response = visit.redirect("/login")
    response.headers.add("Set-Cookie", visit.web.cookies.clear())
    return response


async def _end(visit: Visit, db: Connection) -> None:
    """End the login that the browser came with, and what is streamed to it by this process."""
    if visit.login is not None:
        await access.end_login(db, visit.login.id)
        visit.web.streams.end(visit.login)


def _next(visit: Visit) -> str:
    """Return the path of ours to go on to; never another site's."""
    path = visit.form.get("next") or visit.query.get("next") or "/"
    is_ours = (
        path.startswith("/")
        and path[1:2] not in ("/", "\\")
        and path.isascii()
        and path.isprintable()
        and len(path) <= 1_000
    )
    return path if is_ours else "/"


ROUTES = (
    Route("GET", "/login", login_page, Who.ANYONE),
    Route("POST", "/login", login, Who.ANYONE, change="login"),
    Route("GET", "/enter/{token:[A-Za-z0-9_-]{20,100}}", enter, Who.ANYONE),
    Route("POST", "/logout", logout, Who.ANYONE, change="logout"),
)
