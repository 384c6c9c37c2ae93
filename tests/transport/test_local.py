"""POSTs go out from the address that the operator chose, with both transports, and from no other."""

import pytest

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.proxy import Proxy
from dispatcher.errors import InputError
from dispatcher.main import make_transport
from dispatcher.settings import load
from dispatcher.transport.tcp import check_local
from tests.transport.peers import OK, Names, Peer, connected, make_peer, make_pool, post, sockets
from tests.transport.proxies import make_proxy

pytestmark = pytest.mark.usefixtures("each_transport")


def callers(peer: Peer) -> list[str]:
    return [talk.transport.get_extra_info("peername")[0] for talk in peer.talks]


async def test_connections_come_from_it() -> None:
    async with make_peer(OK) as peer, make_pool(local=("127.0.0.7",)) as pool:
        before = sockets()
        assert await post(pool, peer.origin) == Outcome(None, 200)
        assert callers(peer) == ["127.0.0.7"]
        assert sockets() == before + 2


async def test_what_is_of_the_other_family_is_not_tried() -> None:
    names = Names(both_example=("::1", "127.0.0.1"))
    async with make_peer(OK, name="both.example") as peer, make_pool(local=("127.0.0.7",), resolver=names) as pool:
        assert await post(pool, peer.origin) == Outcome(None, 200)
        assert callers(peer) == ["127.0.0.7"]
    names = Names(six_example=("::1",))
    async with make_peer(OK, name="six.example") as peer, make_pool(local=("127.0.0.7",), resolver=names) as pool:
        outcome = await connected(pool, peer.origin)
        assert isinstance(outcome, Outcome)
        assert outcome.fault is Fault.CONNECT
        assert not peer.talks


async def test_an_address_that_is_gone_is_a_failed_connection() -> None:
    async with make_peer(OK) as peer, make_pool(local=("192.0.2.1",)) as pool:  # TEST-NET-1: nobody has it
        before = sockets()
        outcome = await connected(pool, peer.origin)
        assert isinstance(outcome, Outcome)
        assert outcome.fault is Fault.CONNECT
        assert sockets() == before


async def test_the_proxy_is_reached_from_it() -> None:
    async with (
        make_proxy("http") as proxy,
        make_peer(OK) as peer,
        make_pool(local=("127.0.0.7",), proxy=proxy.settings()) as pool,
    ):
        assert await post(pool, peer.origin) == Outcome(None, 200)
        assert proxy.callers == ["127.0.0.7"]


async def test_not_with_a_socks_proxy() -> None:
    with pytest.raises(InputError, match="socks5"):
        async with make_pool(local=("127.0.0.7",), proxy=Proxy("socks5", "127.0.0.1", 1)):
            pass


def test_an_address_of_another_machine_is_refused_at_the_start() -> None:
    check_local(("127.0.0.7",))
    with pytest.raises(InputError, match=r"DISPATCHER_LOCAL_ADDRESS: 192\.0\.2\.1 can't be bound"):
        make_transport(load(local_address="192.0.2.1"))
