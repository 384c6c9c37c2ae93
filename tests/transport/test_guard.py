"""The address guard where it counts: at the connect."""

import asyncio
import socket
from typing import Any

import pytest

from dispatcher.domain.address import AddressPolicy, parse_networks
from dispatcher.domain.outcome import Fault
from dispatcher.domain.url import Origin
from dispatcher.transport import tcp
from tests.transport.peers import LOOPBACK, OK, Names, connected, make_peer, make_pool, post, sockets

pytestmark = pytest.mark.usefixtures("each_transport")

CLOSED = AddressPolicy()
PUBLIC = "93.184.216.34"  # never connected to here


class Net:
    """Note what is dialled, and reach a peer on loopback in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int = 0) -> None:
        self.dialled: list[str] = []
        self.port = port
        monkeypatch.setattr(tcp.aiohappyeyeballs, "start_connection", self.start_connection)

    async def start_connection(self, addr_infos: list[Any], **options: Any) -> socket.socket:
        self.dialled += [info[4][0] for info in addr_infos]
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "fd00::1", "64:ff9b::7f00:1"],
)  # fmt: skip
@pytest.mark.parametrize("named", [False, True])
async def test_a_blocked_address_is_never_dialled(address: str, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch)
    host = "evil.example" if named else address
    async with make_pool(guard=CLOSED, resolver=Names(evil_example=(address,))) as pool:
        outcome = await connected(pool, Origin("https", host, 443))
    assert outcome.fault is Fault.BLOCKED
    # Of an address that was given it says what it is; of a name not, or whoever may name hosts could ask for all of ours.
    assert (" is " in outcome.detail) == (not named), outcome.detail
    assert net.dialled == []


async def test_of_several_addresses_only_the_allowed_are_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_peer(OK) as peer:
        net = Net(monkeypatch, peer.origin.port)
        names = Names(mixed_example=("10.0.0.1", "127.0.0.1", "fd00::1"))
        async with make_pool(resolver=names) as pool:
            assert (await post(pool, Origin("http", "mixed.example", peer.origin.port))).delivered
        assert net.dialled == ["127.0.0.1"]


async def test_a_name_that_changes_its_mind_is_judged_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: public when it is looked up first, loopback the next time. What we dial is what was judged."""
    async with make_peer(OK) as peer:
        net = Net(monkeypatch, peer.origin.port)
        names = Names(rebind_example=[(PUBLIC,), ("127.0.0.1",)])
        async with make_pool(guard=CLOSED, resolver=names) as pool:
            origin = Origin("https", "rebind.example", peer.origin.port)
            first = await connected(pool, origin)
            # The name was public, but where we got to isn't: the peer is judged too, before a byte is sent.
            assert (first.fault, net.dialled) == (Fault.BLOCKED, [PUBLIC])
            names._cache.clear()
            second = await connected(pool, origin)
            assert second.fault is Fault.BLOCKED
            assert net.dialled == [PUBLIC]
            assert second.detail == "its name resolves to an address that may not be delivered to"
        await asyncio.sleep(0)
        assert [talk.received for talk in peer.talks] in ([b""], [])


async def test_a_peer_that_is_refused_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_peer(OK) as peer:
        Net(monkeypatch, peer.origin.port)
        before = sockets()
        async with make_pool(guard=CLOSED, resolver=Names(a_example=(PUBLIC,))) as pool:
            assert (await connected(pool, Origin("https", "a.example", 443))).fault is Fault.BLOCKED
            assert pool.count == 0
        assert sockets() - sum(not talk.lost for talk in peer.talks) <= before


async def test_http_only_to_allowed_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_peer(OK) as peer:
        net = Net(monkeypatch, peer.origin.port)
        names = Names(out_example=(PUBLIC,), in_example=("127.0.0.1",))
        async with make_pool(guard=LOOPBACK, resolver=names) as pool:
            outcome = await connected(pool, Origin("http", "out.example", 80))
            assert outcome.fault is Fault.BLOCKED
            assert "plain http" in outcome.detail
            assert net.dialled == []
            assert (await post(pool, Origin("http", "in.example", peer.origin.port))).delivered
        both = AddressPolicy(parse_networks("127.0.0.0/8"), allow_http=True)
        async with make_pool(guard=both, resolver=names) as pool:
            assert (await post(pool, Origin("http", "out.example", 80))).delivered


async def test_what_is_no_address_is_refused() -> None:
    async with make_pool(guard=CLOSED, resolver=Names(odd_example=("not an address",))) as pool:
        assert (await connected(pool, Origin("https", "odd.example", 443))).fault is Fault.BLOCKED


async def test_a_kept_connection_serves_its_own_origin_only() -> None:
    """Two names of one address share nothing: what one was judged for says nothing of the other."""
    names = Names(a_example=("127.0.0.1",), b_example=("127.0.0.1",))
    async with make_peer(OK) as peer, make_pool(resolver=names) as pool:
        assert (await post(pool, Origin("http", "a.example", peer.origin.port))).delivered
        assert pool.try_acquire(Origin("http", "b.example", peer.origin.port)) is None
        assert pool.try_acquire(Origin("https", "a.example", peer.origin.port)) is None
