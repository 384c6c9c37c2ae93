"""TLS: who is believed, what is asked for, and what happens when it goes wrong."""

import asyncio
import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport.tls import make_tls_context
from tests.transport.peers import OK, Names, connected, make_peer, make_pool, new_pool, post, sockets, start, until

pytestmark = pytest.mark.usefixtures("each_transport")

NAME = "hooks.example.com"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Made as an operator would, from a file."""
    path: Path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return make_tls_context(str(path))


def server_context(ca: trustme.CA, *identities: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*identities).configure_cert(context)
    return context


def names() -> Names:
    return Names(hooks_example_com=("127.0.0.1",), other_example_com=("127.0.0.1",))


async def test_a_custom_authority_is_believed_and_the_connection_kept(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = server_context(ca, NAME)
    asked: list[str | None] = []
    context.sni_callback = lambda sock, name, ctx: asked.append(name)
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        for _ in range(3):
            assert await post(pool, peer.origin) == Outcome(None, 200)
        assert (pool.opened, pool.count) == (1, 1)
        ours = peer.talks[0].transport.get_extra_info("ssl_object")
        assert ours.selected_alpn_protocol() == "http/1.1"
        assert ours.version() in ("TLSv1.2", "TLSv1.3")
    assert asked == [NAME]


async def test_an_address_in_the_url(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = server_context(ca, "127.0.0.1")
    asked: list[str | None] = []
    context.sni_callback = lambda sock, name, ctx: asked.append(name)
    async with make_peer(OK, tls=context) as peer, make_pool(tls=trusting) as pool:
        assert peer.origin.host == "127.0.0.1"
        assert (await post(pool, peer.origin)).delivered
    assert asked == [None]  # RFC 6066, 3: no literal addresses in SNI


@pytest.mark.parametrize("identity", ["other.example.com", "127.0.0.1", "*.com", "example.com"])
async def test_a_certificate_for_another_name(ca: trustme.CA, trusting: ssl.SSLContext, identity: str) -> None:
    context = server_context(ca, identity)
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        outcome = await connected(pool, peer.origin)
        assert outcome.fault is Fault.TLS
        assert "certificate was not accepted" in outcome.detail
        assert NAME in outcome.detail
        assert (pool.count, pool._lines, peer.requests) == (0, {}, 0)


async def test_a_certificate_for_a_name_does_not_serve_an_address(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    async with make_peer(OK, tls=server_context(ca, NAME)) as peer, make_pool(tls=trusting) as pool:
        assert (await connected(pool, peer.origin)).fault is Fault.TLS


async def test_an_unknown_authority_is_not_believed(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    stranger = trustme.CA()
    before = sockets()
    async with make_peer(OK, tls=server_context(stranger, NAME), name=NAME) as peer:
        for tls in (trusting, make_tls_context(None)):
            async with make_pool(tls=tls, resolver=names()) as pool:
                outcome = await connected(pool, peer.origin)
                assert outcome.fault is Fault.TLS
                assert "certificate was not accepted" in outcome.detail
                assert pool.count == 0
    await until(lambda: sockets() == before)


async def test_a_self_signed_certificate_is_not_believed(tmp_path: Path) -> None:
    """An authority's own certificate is one: signed by its own key, and nobody vouches for it."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    pem = tmp_path / "self.pem"
    pem.write_bytes(authority.private_key_pem.bytes() + authority.cert_pem.bytes())
    context.load_cert_chain(str(pem))
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=None, resolver=names()) as pool:
        outcome = await connected(pool, peer.origin)
        assert outcome.fault is Fault.TLS
        assert "self-signed certificate" in outcome.detail


async def test_an_expired_certificate(trusting: ssl.SSLContext, ca: trustme.CA) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(NAME, not_after=past).configure_cert(context)
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        outcome = await connected(pool, peer.origin)
        assert outcome.fault is Fault.TLS
        assert "expired" in outcome.detail


async def test_a_handshake_that_hangs(trusting: ssl.SSLContext) -> None:
    async with make_peer() as peer, make_pool(Limits(connect_s=0.1), tls=trusting) as pool:
        before = sockets()
        outcome = await connected(pool, Origin("https", "127.0.0.1", peer.origin.port))
        assert (outcome.fault, outcome.detail) == (Fault.TLS, "no TLS handshake within 0.1 s")
        assert (pool.count, pool._lines) == (0, {})
        assert peer.talks[0].received[:1] == b"\x16"  # it had our hello
        await until(lambda: peer.talks[0].lost)
        assert sockets() == before


@pytest.mark.parametrize("how", ["close", "half_close", "reset"])
@pytest.mark.parametrize("first", [b"", b"\x15\x03\x03\x00\x02\x02\x28", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_handshake_that_is_broken_off(trusting: ssl.SSLContext, how: str, first: bytes) -> None:
    async with make_peer() as peer, make_pool(tls=trusting) as pool:
        before = sockets()

        def hang_up(talk: Any) -> None:
            if first:
                talk.send(first)
            getattr(talk, how)()

        peer.on_open = hang_up
        outcome = await connected(pool, Origin("https", "127.0.0.1", peer.origin.port))
        assert outcome.fault is Fault.TLS, outcome
        assert outcome.detail
        assert (pool.count, pool._lines, pool._connections) == (0, {}, {})
        await until(lambda: peer.talks[0].lost)
        assert sockets() == before


async def test_old_versions_are_refused(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = server_context(ca, NAME)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        assert (await connected(pool, peer.origin)).fault is Fault.TLS
        assert pool.count == 0


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_closed_while_idle_and_while_busy(ca: trustme.CA, trusting: ssl.SSLContext, how: str) -> None:
    context = server_context(ca, NAME)
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        assert (await post(pool, peer.origin)).delivered
        getattr(peer.talks[0], how)()
        await until(lambda: pool.count == 0)
        assert (await post(pool, peer.origin)).delivered
        peer.on_request = lambda talk: getattr(talk, how)()
        assert (await post(pool, peer.origin)).fault is Fault.STALE
        assert (await post(pool, peer.origin, fresh=True)).fault is Fault.RESET
        assert pool.count == 0


async def test_an_unasked_answer_while_idle(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = server_context(ca, NAME)
    async with make_peer(OK, tls=context, name=NAME) as peer, make_pool(tls=trusting, resolver=names()) as pool:
        await post(pool, peer.origin)
        peer.talks[0].send(OK)
        await until(lambda: pool.count == 0)
        assert pool.unasked_bytes == 1


async def test_stopping_during_handshakes_and_posts(ca: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = server_context(ca, NAME)
    async with make_peer(tls=context, name=NAME) as peer, make_peer() as silent:
        before = sockets()
        pool = new_pool(tls=trusting, resolver=names())
        done = start(await connected(pool, peer.origin))
        told: list[Any] = []
        for _ in range(5):
            pool.connect(Origin("https", "127.0.0.1", silent.origin.port), told.append)
        await until(lambda: len(silent.talks) == 5 and peer.requests == 1)
        await pool.close()
        assert (await done).fault is Fault.RESET
        assert [outcome.fault for outcome in told] == [Fault.CONNECT] * 5
        assert (pool.count, pool._lines) == (0, {})
        await until(lambda: not silent.open and not peer.open)
        await asyncio.sleep(0)
        assert sockets() == before
