"""Panel and API on a real socket, over a real PostgreSQL: asked as a browser and as a program would."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest
import structlog
from multidict import CIMultiDict

from dispatcher import log
from dispatcher import settings as settings_module
from dispatcher.domain.principal import OPERATOR
from dispatcher.main import make_transport
from dispatcher.settings import Settings
from dispatcher.store import access
from dispatcher.web.app import Web
from dispatcher.web.server import WebServer
from tests.conftest import connected


@dataclass
class Answer:
    status: int
    headers: Any
    text: str
    json: Any

    def cookies(self) -> list[str]:
        return self.headers.getall("Set-Cookie", [])


class Site:
    """One server. `ask` sends what it is given and nothing else: no cookie jar, no redirects followed."""

    def __init__(self, server: WebServer, settings: Settings, dsn: str, http: aiohttp.ClientSession) -> None:
        self.server = server
        self.settings = settings
        self.dsn = dsn
        self.http = http
        self.url = f"http://127.0.0.1:{server.port}"

    @property
    def web(self) -> Web:
        assert self.server.web is not None
        return self.server.web

    async def ask(
        self, method: str, path: str, *, key: str | None = None, cookie: str | None = None, headers: Mapping[str, str] | None = None,
        json: Any = None, form: Any = None, data: bytes | None = None,
    ) -> Answer:  # fmt: skip
        sent = CIMultiDict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        if cookie is not None:
            sent["Cookie"] = cookie
        if json is not None:
            sent["Content-Type"] = "application/json"
            data = orjson.dumps(json)
        async with self.http.request(
            method, self.url + path, headers=sent, data=data if form is None else form, allow_redirects=False
        ) as response:
            text = await response.text()
            is_json = "json" in response.headers.get("Content-Type", "")
            return Answer(
                response.status,
                response.headers,
                text,
                await response.json(content_type=None) if is_json and text else None,
            )

    async def key(self, account_id: str | None = None, name: str = "test") -> str:
        async with connected(self.dsn) as db:
            _, text = await access.create_key(db, OPERATOR, account_id=account_id, name=name)
        return text

    async def login(self, key: str) -> tuple[str, str]:
        """Log a browser in; return its cookie and its CSRF token."""
        answer = await self.ask("POST", "/login", form={"key": key})
        assert answer.status == 303, answer.text
        cookie = cookie_of(answer)
        return cookie, await self.csrf(cookie)

    async def csrf(self, cookie: str) -> str:
        page = await self.ask("GET", "/api/v1/docs", cookie=cookie)
        token = re.search(r'name="csrf-token" content="([^"]+)"', page.text)
        assert token is not None
        return token[1]

    async def query(self, statement: str, *values: Any) -> list[Any]:
        async with connected(self.dsn) as db:
            return await db.fetch(statement, *values)


def cookie_of(answer: Answer) -> str:
    [cookie] = answer.cookies()
    return cookie.partition(";")[0]


@contextlib.asynccontextmanager
async def site(dsn: str, make: Callable[..., WebServer] = WebServer, **settings: Any) -> AsyncIterator[Site]:
    effective = settings_module.load(**{"web_listen": "127.0.0.1:0", "allowed_networks": "127.0.0.0/8"} | settings)
    transport = make_transport(effective)
    server = make(effective, dsn, transport)
    task = asyncio.create_task(server.run())
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        ready.cancel()
        task.result()
    try:
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=30)
        ) as http:
            yield Site(server, effective, dsn, http)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await transport.close()


@pytest.fixture(autouse=True, scope="session")
def plain_logs() -> Iterator[None]:
    """Log as the service does. structlog's own default renders every local variable of a traceback, for half a minute."""
    before = structlog.get_config()
    log.configure(settings_module.load())
    yield
    structlog.configure(**before)


@pytest.fixture
async def web(dsn: str) -> AsyncIterator[Site]:
    async with site(dsn) as made:
        yield made
