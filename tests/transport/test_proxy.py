"""Outbound proxies, with both transports: what the proxy is told, what the guard still sees, and who is blamed for what."""

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from dispatcher.domain.address import AddressPolicy, parse_networks
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.proxy import Proxy
from dispatcher.domain.url import Origin
from dispatcher.errors import InputError
from dispatcher.ports import Limits
from tests.transport.peers import (
    OK,
    REQUEST,
    Calls,
    Names,
    black_hole,
    connected,
    make_peer,
    make_pool,
    new_pool,
    post,
    refusing,
    sockets,
    until,
)  # fmt: skip
from tests.transport.proxies import FakeProxy, make_proxy

pytestmark = pytest.mark.usefixtures("each_transport")

PUBLIC, OTHER = "93.184.216.34", "93.184.216.35"  # the proxy leads them to loopback
PUBLIC_V6 = "2600::5"
CLOSED = AddressPolicy(allow_http=True)  # loopback is refused: the proxy's own address is exempt
NAME = "hooks.example.com"


@pytest.fixture(params=["http", "socks5"])
async def proxy(request: pytest.FixtureRequest) -> AsyncIterator[FakeProxy]:
    async with make_proxy(request.param) as made:
        made.routes = {PUBLIC: "127.0.0.1", OTHER: "127.0.0.1", PUBLIC_V6: "127.0.0.1"}
        yield made


def names(*addresses: str) -> Names:
    return Names(hooks_example_com=addresses or (PUBLIC,), proxy_example_com=("127.0.0.1",))


def server_context(ca: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)
    return context


# ── what the proxy is told ──


@pytest.mark.parametrize("host", [NAME, PUBLIC])
async def test_posts_go_through_a_tunnel_to_an_address(proxy: FakeProxy, host: str) -> None:
    async with (
        make_peer(OK, name=host) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names()) as pool,
    ):
        for _ in range(3):
            assert await post(pool, peer.origin) == Outcome(None, 200)
        assert proxy.asked == [(PUBLIC, peer.origin.port)]  # once, and by address
        assert peer.requests == 3
        assert (pool.opened, pool.reused, pool.count) == (1, 2, 1)


async def test_the_proxys_name_is_looked_up_like_any(proxy: FakeProxy) -> None:
    proxy.host = "proxy.example.com"
    async with (
        make_peer(OK, name=NAME) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names()) as pool,
    ):
        assert (await post(pool, peer.origin)).delivered


async def test_an_ipv6_address(proxy: FakeProxy) -> None:
    async with (
        make_peer(OK, name=NAME) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names(PUBLIC_V6)) as pool,
    ):
        assert (await post(pool, peer.origin)).delivered
    assert proxy.asked == [(PUBLIC_V6, peer.origin.port)]


async def test_an_answer_that_comes_in_pieces(proxy: FakeProxy) -> None:
    proxy.says_piecewise = True
    async with (
        make_peer(OK, name=NAME) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names()) as pool,
    ):
        assert (await post(pool, peer.origin)).delivered


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_credentials(scheme: str) -> None:
    async with make_proxy(scheme, "user", "p@:ß" if scheme == "http" else "p@:s") as proxy, make_peer(OK) as peer:
        proxy.routes[PUBLIC] = "127.0.0.1"
        origin = Origin("http", PUBLIC, peer.origin.port)
        async with make_pool(guard=CLOSED, proxy=proxy.settings()) as pool:
            assert (await post(pool, origin)).delivered
        for user, password in (("", ""), ("other", proxy.password), (proxy.user, "wrong")):
            before = sockets()
            async with make_pool(guard=CLOSED, proxy=proxy.settings(user, password)) as pool:
                outcome = await connected(pool, origin)
            assert outcome.fault is Fault.CONNECT
            assert outcome.detail.startswith("the proxy ")
            assert proxy.password not in outcome.detail
            if scheme == "http":
                assert "wants other credentials: 407" in outcome.detail
            await until(lambda before=before: sockets() <= before and not proxy.open)
        assert peer.requests == 1


# ── the guard ──


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1"])
@pytest.mark.parametrize("named", [True, False])
async def test_a_blocked_address_is_never_told_to_the_proxy(proxy: FakeProxy, address: str, named: bool) -> None:
    async with make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names(address)) as pool:
        outcome = await connected(pool, Origin("https", NAME if named else address, 443))
    assert outcome.fault is Fault.BLOCKED
    assert proxy.connections == 0


async def test_of_several_addresses_only_the_allowed_are_told(proxy: FakeProxy) -> None:
    proxy.refuses = {PUBLIC}
    resolver = names("10.0.0.1", PUBLIC_V6, PUBLIC, "127.0.0.1", OTHER)
    async with (
        make_peer(OK, name=NAME) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=resolver) as pool,
    ):
        assert (await post(pool, peer.origin)).delivered
    assert [host for host, _ in proxy.asked] == [PUBLIC, OTHER]  # IPv4 first, the next when one is refused


async def test_plain_http_only_to_allowed_networks(proxy: FakeProxy) -> None:
    guard = AddressPolicy(parse_networks(f"{OTHER}/32"))
    async with make_peer(OK) as peer, make_pool(guard=guard, proxy=proxy.settings()) as pool:
        assert (await connected(pool, Origin("http", PUBLIC, peer.origin.port))).fault is Fault.BLOCKED
        assert (await post(pool, Origin("http", OTHER, peer.origin.port))).delivered


# ── TLS ──


async def test_tls_goes_through_and_is_verified_by_name(proxy: FakeProxy) -> None:
    ca = trustme.CA()
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    asked: list[str | None] = []
    right = server_context(ca, NAME)
    right.sni_callback = lambda sock, name, ctx: asked.append(name)
    options: dict[str, Any] = {"guard": AddressPolicy(), "proxy": proxy.settings(), "tls": trusting}
    async with make_peer(OK, tls=right, name=NAME) as peer, make_pool(**options, resolver=names()) as pool:
        for _ in range(2):
            assert await post(pool, peer.origin) == Outcome(None, 200)
        assert pool.opened == 1
        assert peer.requests == 2
    assert asked == [NAME]
    for authority, name in ((ca, "other.example.com"), (ca, PUBLIC), (trustme.CA(), NAME)):
        wrong = server_context(authority, name)
        async with make_peer(OK, tls=wrong, name=NAME) as peer, make_pool(**options, resolver=names()) as pool:
            outcome = await connected(pool, peer.origin)
            assert outcome.fault is Fault.TLS
            assert "certificate was not accepted" in outcome.detail
            assert peer.requests == pool.count == 0


# ── who is blamed ──


async def test_the_proxy_can_not_reach_it(proxy: FakeProxy) -> None:
    proxy.refuses = {PUBLIC, OTHER}
    before = sockets()
    async with make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names(PUBLIC, OTHER)) as pool:
        outcome = await connected(pool, Origin("https", NAME, 443))
        assert outcome.fault is Fault.CONNECT
        assert outcome.detail.startswith("the proxy refused: ")
        assert (pool.count, pool._lines) == (0, {})
    assert len(proxy.asked) == 2
    await until(lambda: sockets() == before)


async def test_a_refusal_on_principle_is_not_tried_again(proxy: FakeProxy) -> None:
    proxy.says = {"http": b"HTTP/1.1 403 Forbidden\r\n\r\n", "socks5": b"\x05\x02\x00\x01" + bytes(6)}[proxy.scheme]
    async with make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names(PUBLIC, OTHER)) as pool:
        outcome = await connected(pool, Origin("https", NAME, 443))
        assert outcome.fault is Fault.CONNECT
        assert outcome.detail.startswith("the proxy refused: ")
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_no_proxy_there(scheme: Any) -> None:
    with refusing() as nobody:
        async with make_pool(guard=CLOSED, proxy=Proxy(scheme, nobody.host, nobody.port)) as pool:
            outcome = await connected(pool, Origin("https", PUBLIC, 443))
        assert outcome.fault is Fault.CONNECT
        assert outcome.detail.startswith("the proxy is not reachable: ")
    async with make_pool(guard=CLOSED, proxy=Proxy(scheme, "no.example", 1), resolver=names()) as pool:
        outcome = await connected(pool, Origin("https", PUBLIC, 443))
        assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "the proxy's name: no.example does not resolve")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_drops_syns(scheme: Any) -> None:
    with black_hole() as hole:
        before = sockets()
        async with make_pool(Limits(connect_s=0.1), guard=CLOSED, proxy=Proxy(scheme, hole.host, hole.port)) as pool:
            outcome = await connected(pool, Origin("https", PUBLIC, 443))
        assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "no connection by the proxy within 0.1 s")
        await until(lambda: sockets() == before)


async def test_a_proxy_that_says_nothing(proxy: FakeProxy) -> None:
    proxy.silent = True
    before = sockets()
    async with make_pool(Limits(connect_s=0.1), guard=CLOSED, proxy=proxy.settings()) as pool:
        outcome = await connected(pool, Origin("https", PUBLIC, 443))
        assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "no connection by the proxy within 0.1 s")
        assert (pool.count, pool._lines) == (0, {})
    await until(lambda: sockets() == before)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "did not answer CONNECT in HTTP/1.1"),
        (b"HTTP/2 200\r\n\r\n", "did not answer CONNECT in HTTP/1.1"),
        (b"HTTP/1.1 407 \xff\r\n\r\n", "wants other credentials: 407 ÿ"),
        (b"HTTP/1.1 302\r\nlocation: http://10.0.0.1/\r\n\r\n", "refused: 302"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "refused: 100 Continue"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "nobody asked for"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 20_000, "too long"),
    ],
)
async def test_a_proxy_that_does_not_answer_as_it_should(says: bytes, words: str) -> None:
    async with make_proxy("http") as proxy:
        proxy.says = says
        before = sockets()
        async with make_pool(guard=CLOSED, proxy=proxy.settings()) as pool:
            outcome = await connected(pool, Origin("https", PUBLIC, 443))
            assert outcome.fault is Fault.CONNECT
            assert words in outcome.detail
            assert "proxy" in outcome.detail
            assert len(outcome.detail) < 200
        await until(lambda: sockets() <= before and not proxy.open)


@pytest.mark.parametrize(
    "says", [b"", b"\x05", b"\x05\x00\x00", b"\x04\x00\x00\x01" + bytes(6), b"HTTP/1.1 400 X\r\n\r\n"]
)
async def test_a_socks_proxy_that_does_not_answer_as_it_should(says: bytes) -> None:
    async with make_proxy("socks5") as proxy:
        proxy.says = says
        before = sockets()
        async with make_pool(guard=CLOSED, proxy=proxy.settings()) as pool:
            outcome = await connected(pool, Origin("https", PUBLIC, 443))
            assert outcome.fault is Fault.CONNECT
            assert outcome.detail.startswith("the proxy refused: ")
        await until(lambda: sockets() <= before and not proxy.open)


async def test_a_tunnel_that_breaks_is_a_lost_connection(proxy: FakeProxy) -> None:
    async with (
        make_peer(OK, name=NAME) as peer,
        make_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names()) as pool,
    ):
        assert (await post(pool, peer.origin)).delivered
        peer.on_request = lambda talk: talk.close()
        assert (await post(pool, peer.origin)).fault is Fault.STALE
        assert (await post(pool, peer.origin)).fault is Fault.RESET
        assert pool.count == 0


async def test_stopped_at_every_step_of_connecting(proxy: FakeProxy) -> None:
    async with make_peer(OK, name=NAME) as peer:
        before = sockets()

        async def stopped_after(turns: int) -> bool:
            pool = new_pool(guard=CLOSED, proxy=proxy.settings(), resolver=names())
            calls = Calls()
            pool.connect(peer.origin, calls.one())
            for _ in range(turns):
                await asyncio.sleep(0)
            ready = bool(calls.results)
            await pool.close()
            await until(lambda: calls.all_once)
            assert (pool.count, pool._lines, pool._connections, pool._opening) == (0, {}, {}, {})
            return ready

        turns = 0
        while not await stopped_after(turns):
            turns += 1
            assert turns < 1_000
        await until(lambda: not proxy.open)
        await until(lambda: sockets() == before)
        assert REQUEST not in b"".join(talk.received for talk in peer.talks)


# ── what it needs ──


async def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_socks", None)
    with pytest.raises(InputError, match=r"pip install 'dispatcher\[socks\]'"):
        new_pool(proxy=Proxy("socks5", "127.0.0.1", 1080))
    await new_pool(proxy=Proxy("http", "127.0.0.1", 3128)).close()


async def test_no_repr_shows_the_password() -> None:
    pool = new_pool(proxy=Proxy("http", "127.0.0.1", 3128, "user", "hunter2"))
    assert "hunter2" not in f"{pool!r} {pool._tunnels!r}"
    await pool.close()
