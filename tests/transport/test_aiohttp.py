"""aiohttp kept from its habits: what we rendered is what is sent, once, and nothing is added, followed, kept or unpacked."""

import asyncio
import base64
import gzip
import random
from pathlib import Path
from typing import Any

import pytest

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.event import Event
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.signing import Signer
from dispatcher.domain.url import Origin, parse_url
from dispatcher.engine.request import Requests, render_head
from dispatcher.main import make_transport
from dispatcher.settings import load
from dispatcher.sink import Behaviour
from dispatcher.transport.aiohttp_transport import AiohttpTransport
from dispatcher.transport.pool import Pool
from tests.rig import rig
from tests.transport.peers import OK, REQUEST, Names, connected, make_peer, make_pool, post, start, until
from tests.transport.proxies import make_proxy

pytestmark = pytest.mark.usefixtures("aiohttp_only")


@pytest.fixture
def aiohttp_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.transport.peers.chosen", AiohttpTransport)


SIGNER = Signer(("whsec_" + base64.b64encode(b"k" * 24).decode(),))


def request(url: str, body: bytes = b'{"n":1}', user_agent: str = "dispatcher/1 (webhooks)") -> bytes:
    head = render_head(parse_url(url, AddressPolicy(allow_http=True)), user_agent)
    event = Event(0, "acct", "a.b", b"{}", 0, None, b"evt_0")
    event.body = body
    return Requests(head, SIGNER).render(event, b"1700000000", 1)


@pytest.mark.parametrize(
    "target",
    ["/", "/hook?", "/hook?a=b&a=%zz&&c", "//a//b/../c/./d", "/%7Eme/%2F%2e%2E/?x=[]{}|^`<>\"'+%20", "/a;b=c:d@e,f$g!h*i(j)", "/?/?"],
)  # fmt: skip
async def test_a_request_is_sent_to_the_byte(target: str) -> None:
    async with make_peer() as peer, make_pool() as pool:
        sent = request(f"http://Hooks.Example.com:8080{target}")
        assert target.encode() in sent
        for count in (1, 2):
            done = start(await connected(pool, peer.origin), sent)
            await until(lambda count=count: peer.talks and peer.talks[0].received == sent * count)
            peer.talks[0].send(OK)
            assert (await done).delivered


@pytest.mark.parametrize("size", [0, 1, 1_048_577, 16_777_216])
async def test_a_body_of_any_size(size: int) -> None:
    """Beyond 1 MiB aiohttp warns, which would fail this test."""
    async with make_peer() as peer, make_pool() as pool:
        sent = request("https://hooks.example.com/", random.Random(size).randbytes(size))
        done = start(await connected(pool, peer.origin), sent, 30)
        await until(lambda: peer.talks and len(peer.talks[0].received) >= len(sent), within_s=20)
        assert peer.talks[0].received == sent
        peer.talks[0].send(OK)
        assert (await done).delivered


async def test_the_environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login hunter2 password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with make_peer(OK) as peer, make_pool() as pool:
        assert (await post(pool, peer.origin)).delivered
        assert peer.talks[0].received == b""  # REQUEST was taken out of it, and nothing is left


async def test_cookies_are_not_kept_redirects_not_followed_and_nothing_is_unpacked() -> None:
    bomb = gzip.compress(bytes(10_000_000))[:5_000]
    answers = [
        b"HTTP/1.1 200 OK\r\nset-cookie: a=b; path=/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 307 X\r\nlocation: /elsewhere\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb) + bomb,
        b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nxx",
        b"HTTP/1.1 401 X\r\nwww-authenticate: Basic\r\ncontent-length: 0\r\n\r\n",
    ]
    async with make_peer(*answers) as peer, make_pool() as pool:
        assert [(await post(pool, peer.origin)).status for _ in answers] == [200, 307, 200, 200, 401]
        assert (peer.requests, len(peer.talks), peer.talks[0].received) == (5, 1, b"")


async def test_even_what_aiohttp_would_repeat_is_sent_once() -> None:
    """It sends idempotent methods again when a kept connection turns out to be closed. We only POST; but it isn't trusted to know."""
    sent = REQUEST.replace(b"POST", b"PUT")
    async with make_peer(OK) as peer, make_pool() as pool:
        assert (await post(pool, peer.origin)).delivered
        done = start(pool.try_acquire(peer.origin), sent)  # type: ignore[arg-type]
        await until(lambda: peer.talks[0].received == sent)
        peer.talks[0].close()
        assert (await done).fault is Fault.STALE
        assert len(peer.talks) == 1
        assert pool.count == 0


async def test_a_surprise_of_the_library_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        connection = await connected(pool, peer.origin)

        async def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("a library's surprise")

        monkeypatch.setattr(pool.session, "request", broken)  # type: ignore[attr-defined]
        outcome = await start(connection)
        assert (outcome.fault, outcome.detail) == (Fault.RESET, "RuntimeError: a library's surprise")
        assert connection.closed
        assert pool.count == 0


async def test_a_callback_that_raises_is_the_loops_to_tell() -> None:
    async with make_peer(OK) as peer, make_pool() as pool:
        told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))

        def fail(outcome: Outcome) -> None:
            raise RuntimeError("a bug of the caller's")

        try:
            (await connected(pool, peer.origin)).post(REQUEST, 5, fail)
            await until(lambda: told)
            assert str(told[0]["exception"]) == "a bug of the caller's"
        finally:
            loop.set_exception_handler(None)
        assert (await post(pool, peer.origin)).delivered
        assert pool.opened == 1


async def test_stopping_leaves_no_task_and_may_be_repeated() -> None:
    async with make_peer() as peer:
        async with make_pool() as pool:
            assert isinstance(pool, AiohttpTransport)
            done = [start(await connected(pool, peer.origin, fresh=True), timeout_s=60) for _ in range(5)]
            await until(lambda: peer.requests == 5)
            assert len(pool.tasks) == 5
            await pool.close()
            assert not pool.tasks
            assert {(await outcome).fault for outcome in done} == {Fault.RESET}
        await pool.close()


async def test_the_setting_chooses() -> None:
    for name, kind in (("thin", Pool), ("aiohttp", AiohttpTransport)):
        transport = make_transport(load(transport=name, proxy_url="http://u:p@127.0.0.1:3128"))
        assert type(transport) is kind
        assert repr(transport._tunnels) == "Tunnels(http://127.0.0.1:3128)"
        await transport.close()
    transport = make_transport(load())
    assert type(transport) is Pool
    assert transport._tunnels is None
    await transport.close()


async def test_the_whole_chain_through_a_proxy(dsn: str) -> None:
    async with make_proxy("http", "user", "p@ss") as proxy:
        url = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        async with rig(dsn, transport="aiohttp", proxy_url=url) as r:
            assert isinstance(r.transport, AiohttpTransport)
            await r.endpoint(behaviour=Behaviour(status=200, body=b"fine"))
            await r.emit(200)
            await r.settled()
            assert len(r.received) == 200
            assert all(event.signature_ok for event in r.received)
            assert {row["status"] for row in await r.attempts()} == {200}
            assert set(proxy.asked) == {("127.0.0.1", r.sink.port)}


async def test_origins_of_every_kind() -> None:
    """The URL is only made up for aiohttp; the connection knows where it leads."""
    names = Names()
    names.names["_odd.example"] = ("::1",)
    async with make_peer(OK, host="::1") as peer, make_pool(resolver=names) as pool:
        for host in ("::1", "_odd.example"):
            assert (await post(pool, Origin("http", host, peer.origin.port))).delivered
