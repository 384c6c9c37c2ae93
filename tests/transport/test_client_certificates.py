"""Client certificates (mTLS): shown to who asks, and a connection used by its own identity only."""

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from dispatcher.domain.client import ClientIdentity
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport import tls as tls_module
from dispatcher.transport.memory import MemoryTransport, Scripted
from dispatcher.transport.tls import make_tls_context
from tests.transport.peers import OK, Names, Peer, Talk, connected, make_peer, make_pool, post, sockets, until

NAME = "hooks.example.com"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


def identity_of(issuer: trustme.CA, name: str) -> ClientIdentity:
    issued = issuer.issue_cert(name, common_name=name)
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    return ClientIdentity.of(chain.decode(), issued.private_key_pem.bytes().decode())


@pytest.fixture(scope="module")
def ann(ca: trustme.CA) -> ClientIdentity:
    return identity_of(ca, "ann.example")


@pytest.fixture(scope="module")
def bob(ca: trustme.CA) -> ClientIdentity:
    return identity_of(ca, "bob.example")


def asking(ca: trustme.CA, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A receiver's context that wants a certificate of this authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.maximum_version = version
    ca.issue_cert(NAME).configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def pool_of(ca_file: str, **options: Any) -> Any:
    names = Names(hooks_example_com=("127.0.0.1",))
    return make_pool(
        tls=make_tls_context(ca_file), tls_as=partial(make_tls_context, ca_file), resolver=names, **options
    )


def who(talk: Talk) -> str:
    """The name in the certificate that came with a connection."""
    subject = talk.transport.get_extra_info("peercert")["subject"]
    return next(value for parts in subject for name, value in parts if name == "commonName")


def as_(origin: Origin, identity: ClientIdentity) -> Origin:
    return origin._replace(identity=identity)


@pytest.mark.usefixtures("each_transport")
class TestSockets:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_it_is_shown_and_the_connection_kept(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity, version: ssl.TLSVersion
    ) -> None:
        async with make_peer(OK, tls=asking(ca, version), name=NAME) as peer, pool_of(ca_file) as pool:
            for _ in range(3):
                assert await post(pool, as_(peer.origin, ann)) == Outcome(None, 200)
            assert (pool.opened, pool.reused) == (1, 2)
            assert [who(talk) for talk in peer.talks] == ["ann.example"]

    async def test_each_identity_has_connections_of_its_own(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity, bob: ClientIdentity
    ) -> None:
        """Many posts of both, crosswise: what arrives on a connection is its own identity's."""
        seen: list[tuple[str, bytes]] = []
        async with make_peer(tls=asking(ca), name=NAME) as peer, pool_of(ca_file) as pool:
            hear(peer, seen)
            for _ in range(5):
                posts = [
                    post(pool, as_(peer.origin, identity), request(name))
                    for identity, name in ((ann, b"ann.example"), (bob, b"bob.example"), (ann, b"ann.example"))
                ]
                assert all(outcome.delivered for outcome in await asyncio.gather(*posts))
            assert len(seen) == 15
            assert all(name.encode() == body for name, body in seen)
            assert pool.opened <= 3
            assert pool.reused >= 12

    async def test_a_loaded_copy_of_the_identity_uses_the_same_connection(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity
    ) -> None:
        again = ClientIdentity.of(ann.certificate, ann.key)
        async with make_peer(OK, tls=asking(ca), name=NAME) as peer, pool_of(ca_file) as pool:
            assert (await post(pool, as_(peer.origin, ann))).delivered
            assert (await post(pool, as_(peer.origin, again))).delivered
            assert pool.opened == 1

    async def test_one_identity_never_takes_anothers_idle_connection_at_the_bound(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity, bob: ClientIdentity
    ) -> None:
        seen: list[tuple[str, bytes]] = []
        async with (
            make_peer(tls=asking(ca), name=NAME) as peer,
            pool_of(ca_file, limits=Limits(sockets_max=1, sockets_per_origin_max=1)) as pool,
        ):
            hear(peer, seen)
            for identity, name in ((ann, b"ann.example"), (bob, b"bob.example"), (ann, b"ann.example")):
                assert (await post(pool, as_(peer.origin, identity), request(name))).delivered
            assert (pool.opened, pool.count) == (3, 1), "each made way for the other"
            assert [name for name, _ in seen] == ["ann.example", "bob.example", "ann.example"]

    async def test_without_one_a_receiver_that_asks_refuses(self, ca: trustme.CA, ca_file: str) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            async with make_peer(OK, tls=asking(ca, version), name=NAME) as peer, pool_of(ca_file) as pool:
                outcome = await post(pool, peer.origin)
                # In TLS 1.3 the refusal comes after our side of the handshake is done.
                assert outcome.fault in (Fault.TLS, Fault.RESET, Fault.STALE)
                assert peer.requests == 0

    async def test_a_stranger_is_refused(self, ca: trustme.CA, ca_file: str) -> None:
        stranger = identity_of(trustme.CA(), "ann.example")
        async with make_peer(OK, tls=asking(ca), name=NAME) as peer, pool_of(ca_file) as pool:
            assert (await post(pool, as_(peer.origin, stranger))).fault in (Fault.TLS, Fault.RESET, Fault.STALE)
            assert peer.requests == 0

    async def test_a_receiver_that_does_not_ask_is_posted_to_all_the_same(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity
    ) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert(NAME).configure_cert(context)
        async with make_peer(OK, tls=context, name=NAME) as peer, pool_of(ca_file) as pool:
            assert (await post(pool, as_(peer.origin, ann))).delivered

    async def test_the_receiver_is_verified_as_without_one(self, ca_file: str, ann: ClientIdentity) -> None:
        stranger = trustme.CA()
        async with make_peer(OK, tls=asking(stranger), name=NAME) as peer, pool_of(ca_file) as pool:
            outcome = await connected(pool, as_(peer.origin, ann))
            assert outcome.fault is Fault.TLS
            assert "certificate was not accepted" in outcome.detail

    async def test_a_key_that_openssl_does_not_take_is_told(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity, bob: ClientIdentity
    ) -> None:
        mixed = ClientIdentity.of(ann.certificate, bob.key)
        before = sockets()
        async with make_peer(OK, tls=asking(ca), name=NAME) as peer, pool_of(ca_file) as pool:
            outcome = await connected(pool, as_(peer.origin, mixed))
            assert outcome.fault is Fault.TLS
            assert "client certificate can't be used" in outcome.detail
            assert (pool.count, peer.talks) == (0, [])
        await until(lambda: sockets() == before)

    async def test_many_connections_at_once_make_one_context(
        self, ca: trustme.CA, ca_file: str, ann: ClientIdentity
    ) -> None:
        async with make_peer(OK, tls=asking(ca), name=NAME) as peer, pool_of(ca_file) as pool:
            made: list[ClientIdentity] = []
            pool._contexts._make = counting(made, partial(make_tls_context, ca_file))
            outcomes = await asyncio.gather(*(post(pool, as_(peer.origin, ann), fresh=True) for _ in range(10)))
            assert all(outcome.delivered for outcome in outcomes)
            assert made == [ann]


def request(body: bytes) -> bytes:
    return b"POST /hook HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def hear(peer: Peer, seen: list[tuple[str, bytes]]) -> None:
    """Answer each request, and keep whose connection it came on with its body."""

    def opened(talk: Talk) -> None:
        def received(data: bytes) -> None:
            talk.received += data
            _, end, body = talk.received.partition(b"\r\n\r\n")
            if end and len(body) == len(b"ann.example"):
                talk.received = b""
                seen.append((who(talk), body))
                talk.send(OK)

        talk.data_received = received  # type: ignore[method-assign]

    peer.on_open = opened


def counting(made: list[ClientIdentity], make: Callable[[ClientIdentity], ssl.SSLContext]) -> Any:
    def count(identity: ClientIdentity) -> ssl.SSLContext:
        made.append(identity)
        return make(identity)

    return count


async def test_contexts_are_bounded_and_the_least_recent_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "CONTEXTS_MAX", 2)
    made: list[ClientIdentity] = []
    contexts = tls_module.Contexts(counting(made, lambda identity: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)))
    a, b, c = (ClientIdentity.of(name, "") for name in "abc")
    for identity in (a, b, a, c, a, b):
        await contexts.of(identity)
    assert made == [a, b, c, b], "a was in use all the time"


async def test_the_twin_keeps_them_apart_too(ann: ClientIdentity, bob: ClientIdentity) -> None:
    transport = MemoryTransport(Limits(), lambda origin: Scripted())
    origin = Origin("https", NAME, 443)
    for whom in (origin, as_(origin, ann), as_(origin, bob)):
        assert (await post(transport, whom)).delivered
    assert transport.opened == 3
    assert (await post(transport, as_(origin, ann))).delivered
    assert transport.opened == 3
    await transport.close()


def test_the_key_is_left_in_no_file(
    ca_file: str, ann: ClientIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_tls_context(ca_file, ann)
    monkeypatch.delattr("os.memfd_create", raising=False)  # where there is none, a file that is gone at once
    make_tls_context(ca_file, ann)
    assert list(tmp_path.iterdir()) == []
