"""How connections come to be on real sockets, and what is left when that fails half-way. The port's promises are in test_conformance."""

import asyncio
import gc
import random
import ssl
import time
from collections import deque
from typing import Any

import pytest

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport import tcp
from dispatcher.transport.connection import Head, HttpConnection
from dispatcher.transport.memory import MemoryTransport, Scripted
from dispatcher.transport.room import Kept
from tests.transport import peers
from tests.transport.peers import (
    LOOPBACK,
    NOBODY_TRUSTED,
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
    start,
    until,
)  # fmt: skip

both = pytest.mark.usefixtures("each_transport")


@both
async def test_a_refused_connection_says_so() -> None:
    async with make_pool() as pool:
        with refusing() as origin:
            outcome = await connected(pool, origin)
    assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "Connection refused")


@pytest.mark.parametrize("kept", [True, False])
async def test_a_connection_that_is_closed_is_gone_without_the_collector(kept: bool) -> None:
    """It knows its parser and its transport, and they know it: hundreds that fail a second would be the collector's work, in pauses."""
    answer = OK if kept else b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

    def alive() -> int:
        return sum(isinstance(one, HttpConnection | Head) for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        async with make_peer(answer) as peer, make_pool() as pool:
            connection = await connected(pool, peer.origin)
            await start(connection)
            assert alive() == 1
            connection.close()
            del connection
            await until(lambda: alive() == 0)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["refused", "dropped", "no name", "handshake hangs", "handshake fails"])
async def test_a_connection_that_does_not_come_leaves_nothing_to_the_collector(how: str) -> None:
    """Hundreds a second, each with its parser, or with the frames of what it waited for: they were all that it found, and it held the loop
    for 180 ms to find them."""
    async with make_peer() as peer, make_pool(Limits(connect_s=0.1), resolver=Names()) as pool:
        if how == "handshake fails":
            peer.on_open = lambda talk: talk.close(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with refusing() as refused, black_hole() as dropped:
            origins = {"refused": refused, "dropped": dropped, "no name": Origin("http", "no.example", 80)}
            origin = origins.get(how, Origin("https", "127.0.0.1", peer.origin.port))
            await connected(pool, origin)  # whatever is made once only
            pool._resolver._cache.clear()
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                assert isinstance(await connected(pool, origin), Outcome)
                for _ in range(3):
                    await asyncio.sleep(0)
                gc.collect()
                assert not gc.garbage, [type(one).__name__ for one in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()


@both
async def test_a_dropped_syn_leaves_no_socket() -> None:
    async with make_pool(Limits(connect_s=0.1)) as pool:
        with black_hole() as origin:
            before = sockets()
            outcome = await connected(pool, origin)
            assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "no connection within 0.1 s")
            await until(lambda: sockets() == before)


@both
async def test_all_addresses_fail() -> None:
    with refusing() as origin:
        names = Names(two_example=("127.0.0.1", "127.0.0.2", "127.0.0.3"))
        async with make_pool(resolver=names) as pool:
            outcome = await connected(pool, Origin("http", "two.example", origin.port))
    assert outcome.fault is Fault.CONNECT


@both
async def test_an_address_that_drops_syns_delays_by_little() -> None:
    """Happy eyeballs: the next address is tried while the first hangs, and the loser's socket is closed."""
    async with make_peer(OK, host="127.0.0.2") as peer:
        before = sockets()
        names = Names(both_example=("127.0.0.1", "127.0.0.2"))

        async def hang_at_first(sock: Any, address: Any) -> None:
            if address[0] == "127.0.0.1":
                await asyncio.Event().wait()
            await real(sock, address)

        loop = asyncio.get_running_loop()
        real = loop.sock_connect

        class Loop:  # uvloop's methods can't be replaced
            sock_connect = staticmethod(hang_at_first)

            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

        async with make_pool(resolver=names) as pool:
            start_connection = tcp.aiohappyeyeballs.start_connection

            async def patched(*args: Any, **options: Any) -> Any:
                return await start_connection(*args, **options | {"loop": Loop()})

            tcp.aiohappyeyeballs.start_connection = patched
            try:
                began = time.monotonic()
                assert (await post(pool, Origin("http", "both.example", peer.origin.port))).delivered
                assert time.monotonic() - began < 2
            finally:
                tcp.aiohappyeyeballs.start_connection = start_connection
            assert sockets() == before + 2  # ours and the peer's


async def test_a_name_with_many_addresses_does_not_multiply_sockets() -> None:
    addresses = [f"127.0.1.{n}" for n in range(50)] + [f"2600::{n}" for n in range(50)]
    infos = tcp.addr_infos(addresses, 443)
    assert len(infos) == 2 * tcp.ADDRESSES_MAX
    assert infos[0][4] == ("2600::0", 443, 0, 0)
    assert infos[-1][4] == ("127.0.1.2", 443)


@both
async def test_closing_while_connects_and_posts_are_under_way() -> None:
    before = sockets()
    names = Names()
    names.until_set["hung.example"] = asyncio.Event()
    async with make_peer() as peer:
        listening = sockets() - before
        with black_hole() as hole:
            filled = sockets() - before - listening
            pool = new_pool(Limits(sockets_per_origin_max=4), resolver=names)
            calls = Calls()
            busy = await connected(pool, peer.origin)
            busy.post(REQUEST, 60, calls.one())
            await until(lambda: peer.requests == 1)
            origins = [peer.origin, hole, Origin("https", *_address(peer.origin)), Origin("http", "hung.example", 80)]
            for origin in origins * 4:
                pool.connect(origin, calls.one())
            await asyncio.sleep(0)
            await pool.close()
            assert calls.all_once
            assert {result.fault for result in calls.results} == {Fault.RESET, Fault.CONNECT}
            assert (pool.count, pool._lines, pool._opening) == (0, {}, {})
            await until(lambda: not peer.open)
            await until(lambda: sockets() == before + listening + filled)


def _address(origin: Origin) -> tuple[str, int]:
    return origin.host, origin.port


@both
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_stopped_at_every_step_of_connecting(scheme: str) -> None:
    """close() after 0, 1, 2, … turns of the loop: wherever that hits, the count ends at 0 and no socket is left."""
    async with make_peer(OK) as peer:
        before = sockets()
        origin = Origin(scheme, *_address(peer.origin))

        async def stopped_after(turns: int) -> bool:
            pool = new_pool()
            calls = Calls()
            pool.connect(origin, calls.one())
            for _ in range(turns):
                await asyncio.sleep(0)
            ready = bool(calls.results)
            await pool.close()
            await until(lambda: calls.all_once)
            assert (pool.count, pool._lines, pool._connections, pool._opening) == (0, {}, {}, {})
            return ready

        if scheme == "https":  # nobody answers our hello
            assert not any([await stopped_after(turns) for turns in range(20)])
        else:
            turns = 0
            while not await stopped_after(turns):
                turns += 1
                assert turns < 1_000
        await until(lambda: sockets() == before)


class Interrupted:
    """Of a pool: fail after a connection was made, when its transport already exists."""

    async def _join(self, sock: Any, origin: Origin, tls: ssl.SSLContext, trace: Any) -> Kept | Outcome:
        result: Any = await super()._join(sock, origin, tls, trace)  # type: ignore[misc]
        assert not isinstance(result, Outcome)
        self.made = result
        what = self.plan.pop(0)
        if what == "peer closes":
            await until(lambda: self.peer.open)
            self.peer.talks[-1].reset()
            await until(lambda: result.closed)
        elif what == "raise":
            result.close()
            raise OSError("half-way")
        elif what == "surprise":
            result.close()
            raise ValueError("half-way")
        elif what == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                result.close()
        return result

    plan: list[str]
    peer: Any
    made: Any


@both
async def test_a_connection_lost_while_it_is_made_counts_once() -> None:
    async with make_peer(OK) as peer:
        before = sockets()
        kind: Any = type("Interrupted", (Interrupted, peers.chosen), {})
        pool = kind(Limits(connect_s=0.1), LOOPBACK, tls=NOBODY_TRUSTED)
        pool.peer = peer
        plan = ["peer closes", "raise", "surprise", "hang", "go on"] * 6
        random.Random(1).shuffle(plan)
        for what in plan:
            pool.plan = [what]
            result = await connected(pool, peer.origin)
            getattr(pool.made, "handler", pool.made).connection_lost(None)  # told late, or again
            assert isinstance(result, Outcome) is (what != "go on")
            assert pool.count == len(pool._connections) == 0, what
            assert not pool._lines
        await pool.close()
        await until(lambda: not peer.open)
        assert sockets() == before


class Looks(dict[Any, Any]):
    """Origins that count how often somebody looks at all of them."""

    count = 0

    def values(self) -> Any:
        self.count += 1
        return super().values()


@pytest.mark.parametrize("idle", [1, 2, 500])
async def test_evicting_at_the_bound_is_cheap_with_many_origins(idle: int) -> None:
    """Every connect evicts, the oldest first; whether much is idle or little, nobody looks at all origins each time."""
    many = 500
    transport = MemoryTransport(Limits(sockets_max=many), lambda origin: receiver)
    receiver = Scripted()
    held = deque([await connected(transport, Origin("https", f"host{n}", 443)) for n in range(many)])
    looks = transport._lines = Looks(transport._lines)
    released: deque[Any] = deque()
    for n in range(many, 3 * many):
        while len(released) < idle:
            released.append(held.popleft())
            transport.release(released[-1])
        held.append(await connected(transport, Origin("https", f"host{n}", 443)))
        assert released.popleft().closed
        assert transport.count == len(transport._lines) == many
    assert looks.count <= 1
    await transport.close()


async def test_what_was_noted_for_eviction_is_bounded() -> None:
    transport = MemoryTransport(Limits(sockets_max=2), lambda origin: receiver)
    receiver = Scripted()
    origins = [Origin("https", f"host{n}", 443) for n in range(3)]
    for n in range(20):
        assert (await post(transport, origins[n % 2])).delivered
        assert len(transport._aging) <= 4
    oldest: Any = transport.try_acquire(origins[1])
    other: Any = transport.try_acquire(origins[0])
    transport.release(oldest)
    now = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > now)  # it counts milliseconds
    transport.release(other)
    await connected(transport, origins[2])
    assert oldest.closed
    assert not other.closed
    await transport.close()


async def test_no_look_at_all_origins_when_nothing_is_idle() -> None:
    transport = MemoryTransport(Limits(sockets_max=1), lambda origin: receiver)
    receiver = Scripted()
    held = await connected(transport, Origin("https", "held", 443))
    calls = Calls()
    for n in range(200):
        transport.connect(Origin("https", f"host{n}", 443), calls.one())
    assert len(transport._turns) == 200
    for n in range(200):
        held.close()
        await until(lambda n=n: len(calls.results) == n + 1)
        held = calls.results[-1]
        assert held.origin.host == f"host{n}"
    held.close()
    assert (transport.count, transport._lines, list(transport._turns)) == (0, {}, [])


async def test_the_queue_for_room_does_not_grow_with_what_is_served_otherwise() -> None:
    transport = MemoryTransport(Limits(sockets_max=1), lambda origin: receiver)
    receiver = Scripted()
    origin = Origin("https", "one", 443)
    held = await connected(transport, origin)
    for _ in range(100):
        waiting = asyncio.create_task(connected(transport, origin))
        await asyncio.sleep(0)
        transport.release(held)
        assert await waiting is held
        assert len(transport._turns) <= 1
    await transport.close()


async def test_repr_tells_the_state(each_transport: str) -> None:
    pool_name, name = {"thin": ("Pool", "HttpConnection"), "aiohttp": ("AiohttpTransport", "AiohttpConnection")}[
        each_transport
    ]
    async with make_peer(OK) as peer, make_pool() as pool:
        connection = await connected(pool, peer.origin)
        assert repr(connection) == f"{name}(127.0.0.1:{peer.origin.port} idle)"
        done = start(connection)
        assert "busy" in repr(connection)
        assert connection.busy
        await done
        assert "idle, kept" in repr(connection)
        assert repr(pool) == f"{pool_name}(1 sockets, 1 origins, 1 opened, 0 reused)"
        connection.close()
        assert "closed" in repr(connection)
