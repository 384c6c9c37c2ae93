"""What the Transport port promises, of both transports on real sockets and of the in-memory twin."""

import asyncio
import contextlib
import random
import selectors
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import pytest

from dispatcher.domain.outcome import Command, Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Doubt, Limits
from dispatcher.transport.memory import Dial, Dice, MemoryTransport, Reply, Scripted
from dispatcher.transport.room import DOUBTED, EXPIRE_AT_ONCE, GRANTS_AT_ONCE, Room
from tests.transport import peers
from tests.transport.peers import (
    REQUEST,
    Calls,
    Talk,
    black_hole,
    connected,
    make_peer,
    make_pool,
    post,
    refusing,
    sockets,
    start,
    until,
)  # fmt: skip


class World:
    """A transport and receivers that follow scripts."""

    transport: Room
    real = False

    async def receiver(self, *replies: Reply) -> tuple[Origin, Scripted]:
        raise NotImplementedError

    async def refusing(self) -> Origin:
        raise NotImplementedError

    async def black_hole(self) -> Origin:
        raise NotImplementedError

    def lose(self, origin: Origin) -> None:
        """Break all connections to the origin from its end."""
        raise NotImplementedError

    def real_count(self) -> int:
        """Count connections without asking the room for its count."""
        return len(self.transport._connections) + len(self.transport._opening)


class MemoryWorld(World):
    def __init__(self, limits: Limits) -> None:
        self.receivers: dict[Origin, Scripted] = {}
        self.transport: MemoryTransport = MemoryTransport(limits, self.receivers.get)

    def _add(self, receiver: Scripted) -> Origin:
        origin = Origin("https", f"host{len(self.receivers)}", 443)
        self.receivers[origin] = receiver
        return origin

    async def receiver(self, *replies: Reply) -> tuple[Origin, Scripted]:
        receiver = Scripted(*replies)
        return self._add(receiver), receiver

    async def refusing(self) -> Origin:
        receiver = Scripted()
        receiver.next_dial = Dial(outcome=Outcome(Fault.CONNECT, detail="refused"))
        return self._add(receiver)

    async def black_hole(self) -> Origin:
        receiver = Scripted()
        receiver.next_dial = Dial(after_s=1e9)
        return self._add(receiver)

    def lose(self, origin: Origin) -> None:
        self.transport.lose(origin)


class RealWorld(World):
    real = True

    def __init__(self, transport: Room, stack: contextlib.AsyncExitStack) -> None:
        self.transport = transport
        self.stack = stack
        self.peers: dict[Origin, Any] = {}
        self.before = sockets()
        self.elsewhere = 0  # sockets of ours that aren't the transport's

    async def receiver(self, *replies: Reply) -> tuple[Origin, Scripted]:
        receiver = Scripted(*replies)
        peer = await self.stack.enter_async_context(make_peer())
        peer.on_request = lambda talk: self._reply(talk, receiver)
        self.peers[peer.origin] = peer
        self.elsewhere += 1
        return peer.origin, receiver

    def _reply(self, talk: Talk, receiver: Scripted) -> None:
        if getattr(talk, "stale", False):
            talk.close()
            return
        reply = receiver.take(REQUEST)
        later = asyncio.get_running_loop().call_later
        if reply.status is not None:
            retry = f"retry-after: {reply.retry_after}\r\n" if reply.retry_after else ""
            if reply.command is not None:
                retry += f"webhook-delivery: {reply.command.value}\r\n"
            close = "connection: close\r\n" if reply.then == "close" else ""
            body = b"" if reply.status == 204 else b"ok"
            length = f"content-length: {len(body)}\r\n" if body else ""
            head = f"HTTP/1.1 {reply.status} X\r\n{retry}{close}{length}\r\n".encode()
            later(reply.head_s, talk.send, head)
            if reply.fault is Fault.RESET:
                later(reply.head_s + reply.body_s, talk.close)
            else:
                talk.stale = reply.then == "stale"  # type: ignore[attr-defined]
                later(reply.head_s + reply.body_s, talk.close if reply.then == "close" else talk.send, body)
        elif reply.fault is Fault.RESET:
            later(reply.head_s, talk.close)
        elif reply.fault is Fault.PROTOCOL:
            later(reply.head_s, talk.send, b"\x00 this is not HTTP\r\n\r\n")

    async def refusing(self) -> Origin:
        self.elsewhere += 1
        return self.stack.enter_context(refusing())

    async def black_hole(self) -> Origin:
        self.elsewhere += 4
        return self.stack.enter_context(black_hole())

    def lose(self, origin: Origin) -> None:
        for talk in self.peers[origin].talks:
            if not talk.lost:
                talk.reset()

    def real_count(self) -> int:
        theirs = sum(peer.open for peer in self.peers.values())
        return sockets() - self.before - self.elsewhere - theirs


Make = Callable[..., Any]


@pytest.fixture(params=[*peers.TRANSPORTS, "twin"])
async def make_world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Make a world with the given limits; it must be left without a connection, an origin or a task."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**limits: Any) -> World:
            if request.param != "twin":
                monkeypatch.setattr(peers, "chosen", peers.TRANSPORTS[request.param])
                pool = await stack.enter_async_context(make_pool(Limits(**limits)))
                return RealWorld(pool, stack)
            world = MemoryWorld(Limits(**limits))
            stack.push_async_callback(world.transport.close)
            return world

        yield make


# ── one POST ──


async def test_a_post_arrives_and_its_connection_is_used_again(make_world: Make) -> None:
    world = await make_world()
    origin, receiver = await world.receiver()
    assert world.transport.try_acquire(origin) is None
    for _ in range(3):
        assert await post(world.transport, origin) == Outcome(None, 204)
    assert receiver.requests == [REQUEST] * 3
    assert (world.transport.opened, world.transport.reused, world.transport.count) == (1, 2, 1)


@pytest.mark.parametrize("status", [200, 202, 206, 299])
async def test_2xx_is_delivered_and_nothing_of_it_is_kept(make_world: Make, status: int) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(status))
    assert await post(world.transport, origin) == Outcome(None, status)
    assert world.transport.try_acquire(origin) is not None


@pytest.mark.parametrize("status", [301, 307, 400, 404, 410, 500, 599])
async def test_other_answers_are_failures_with_their_head_and_keep_the_connection(
    make_world: Make, status: int
) -> None:
    world = await make_world()
    origin, receiver = await world.receiver(Reply(status))
    outcome = await post(world.transport, origin)
    assert (outcome.fault, outcome.status, outcome.retry_after) == (Fault.STATUS, status, None)
    assert outcome.response_head.startswith(b"HTTP/1.1 %d" % status)
    assert await post(world.transport, origin) == Outcome(None, 204)
    assert (world.transport.opened, len(receiver.requests)) == (1, 2)


async def test_retry_after_is_told(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(429, retry_after="17"))
    assert (await post(world.transport, origin)).retry_after == "17"


async def test_a_command_is_told_of_failures_and_where_it_is_asked_for(make_world: Make) -> None:
    world = await make_world()
    told = [Reply(500, command=Command.ABORT), *[Reply(204, command=Command.DISABLE)] * 2, Reply(204)]
    origin, _ = await world.receiver(*told)
    outcomes = [await post(world.transport, origin, commands=commands) for commands in (False, False, True, True)]
    assert [outcome.command for outcome in outcomes] == [Command.ABORT, None, Command.DISABLE, None]
    assert world.transport.opened == 1


async def test_silence_ends_at_the_bound_on_time_to_headers(make_world: Make) -> None:
    world = await make_world(headers_s=0.1)
    origin, _ = await world.receiver(Reply(None))
    outcome = await post(world.transport, origin, timeout_s=60)
    assert (outcome.fault, outcome.status) == (Fault.TIMEOUT, None)
    assert "headers" in outcome.detail
    assert world.transport.count == 0


async def test_silence_ends_at_the_requests_own_bound_if_that_is_nearer(make_world: Make) -> None:
    world = await make_world(headers_s=60)
    origin, _ = await world.receiver(Reply(None))
    assert (await post(world.transport, origin, timeout_s=0.1)).fault is Fault.TIMEOUT


async def test_an_answer_may_take_longer_than_its_headers_but_not_than_its_total(make_world: Make) -> None:
    world = await make_world(headers_s=0.1)
    origin, _ = await world.receiver(Reply(200, body_s=0.2), Reply(200, body_s=60))
    assert (await post(world.transport, origin, timeout_s=60)).delivered
    outcome = await post(world.transport, origin, timeout_s=0.2)
    assert (outcome.fault, outcome.status) == (Fault.TIMEOUT, 200)
    assert "headers" not in outcome.detail
    assert world.transport.count == 0


async def test_not_http(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(None, fault=Fault.PROTOCOL))
    assert (await post(world.transport, origin)).fault is Fault.PROTOCOL
    assert world.transport.count == 0


async def test_an_answer_that_says_close_is_not_kept(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(then="close"))
    assert (await post(world.transport, origin)).delivered
    assert (world.transport.count, world.transport.try_acquire(origin)) == (0, None)


# ── stale or reset ──


async def test_closed_before_an_answer_is_a_reset_on_a_new_connection(make_world: Make) -> None:
    world = await make_world()
    origin, receiver = await world.receiver(Reply(None, fault=Fault.RESET))
    outcome = await post(world.transport, origin)
    assert (outcome.fault, outcome.status) == (Fault.RESET, None)
    assert len(receiver.requests) == 1
    assert world.transport.count == 0


@pytest.mark.parametrize("how", [Reply(None, fault=Fault.RESET), None])
async def test_closed_before_an_answer_is_stale_on_a_kept_connection(make_world: Make, how: Reply | None) -> None:
    world = await make_world()
    replies = [Reply(then="stale")] if how is None else [Reply(), how]
    origin, receiver = await world.receiver(*replies)
    assert (await post(world.transport, origin)).delivered
    assert (await post(world.transport, origin)).fault is Fault.STALE
    assert world.transport.count == 0
    assert (await post(world.transport, origin, fresh=True)).delivered
    assert len(receiver.requests) == (2 if how is None else 3)


async def test_a_connection_that_was_given_back_unused_is_kept_too(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(None, fault=Fault.RESET))
    world.transport.release(await connected(world.transport, origin))
    assert (await post(world.transport, origin)).fault is Fault.STALE


@pytest.mark.parametrize("before", [(), (Reply(),)])
async def test_broken_off_in_the_middle_is_a_reset_on_any_connection(
    make_world: Make, before: tuple[Reply, ...]
) -> None:
    world = await make_world()
    origin, _ = await world.receiver(*before, Reply(200, fault=Fault.RESET))
    for _ in before:
        assert (await post(world.transport, origin)).delivered
    outcome = await post(world.transport, origin)
    assert (outcome.fault, outcome.status) == (Fault.RESET, 200)
    assert world.transport.count == 0


@pytest.mark.parametrize("kept", [False, True])
async def test_lost_between_acquire_and_post(make_world: Make, kept: bool) -> None:
    world = await make_world()
    origin, receiver = await world.receiver()
    if kept:
        await post(world.transport, origin)
        connection = world.transport.try_acquire(origin)
    else:
        connection = await connected(world.transport, origin)
    await until(lambda: not world.real or world.peers[origin].open)
    world.lose(origin)
    await until(lambda: connection.closed)
    assert world.transport.count == 0
    assert (await start(connection)).fault is (Fault.STALE if kept else Fault.RESET)
    assert world.transport.count == 0
    assert len(receiver.requests) == kept


async def test_lost_while_idle_is_forgotten(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver()
    await post(world.transport, origin)
    world.lose(origin)
    await until(lambda: world.transport.count == 0)
    assert world.transport.try_acquire(origin) is None
    assert (await post(world.transport, origin)).delivered


async def test_closed_by_us_while_busy(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver(Reply(None))
    connection = await connected(world.transport, origin)
    done = start(connection)
    connection.close()
    assert (await done).fault is Fault.RESET
    connection.close()
    assert world.transport.count == 0


async def test_releasing_a_closed_connection_changes_nothing(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver()
    connection = await connected(world.transport, origin)
    other = await connected(world.transport, origin)
    connection.close()
    world.transport.release(connection)
    world.transport.release(other)
    assert world.transport.count == 1
    assert world.transport.try_acquire(origin) is other
    assert world.transport.try_acquire(origin) is None
    other.close()
    world.transport.release(other)
    assert world.transport.count == 0


# ── connecting ──


async def test_refused(make_world: Make) -> None:
    world = await make_world()
    outcome = await connected(world.transport, await world.refusing())
    assert outcome.fault is Fault.CONNECT
    assert (world.transport.count, world.transport.connect_failures) == (0, 1)


async def test_connecting_has_a_bound(make_world: Make) -> None:
    world = await make_world(connect_s=0.2)
    outcome = await connected(world.transport, await world.black_hole())
    assert outcome.fault is Fault.CONNECT
    assert "within 0.2 s" in outcome.detail
    assert world.transport.count == 0


async def test_fresh_is_not_a_kept_connection(make_world: Make) -> None:
    world = await make_world()
    origin, _ = await world.receiver()
    await post(world.transport, origin)
    assert (await post(world.transport, origin, fresh=True)).delivered
    assert (world.transport.opened, world.transport.count) == (2, 2)


# ── bounds and lines ──


async def lined_up(world: World, origin: Origin, count: int, **options: Any) -> Calls:
    calls = Calls()
    for _ in range(count):
        world.transport.connect(origin, calls.one(), **options)
    return calls


async def test_sockets_per_origin_are_bounded_and_the_line_is_served_in_order(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=2)
    origin, _ = await world.receiver()
    served: list[tuple[int, Any]] = []
    for n in range(5):
        world.transport.connect(origin, lambda result, n=n: served.append((n, result)))
    await until(lambda: len(served) == 2)
    assert world.transport.count == 2
    assert sorted(n for n, _ in served) == [0, 1]
    for expected in (2, 3, 4):
        world.transport.release(served[-1][1])
        await until(lambda expected=expected: served[-1][0] == expected)
    served[0][1].close()  # nobody waits: its room stays free
    await asyncio.sleep(0)
    assert (world.transport.count, world.transport.opened, world.transport.reused) == (1, 2, 3)


async def test_endpoints_of_one_origin_take_turns(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=1)
    origin, _ = await world.receiver()
    served: list[tuple[str, Any]] = []
    for who in ("a", "a", "a", "a", "b", "b", "c"):
        world.transport.connect(origin, lambda result, who=who: served.append((who, result)), turn_of=who)
    for count in range(1, 8):
        await until(lambda count=count: len(served) == count)
        world.transport.release(served[-1][1])
    assert "".join(who for who, _ in served) == "aabcaba", "the first needs no turn: it finds room"


async def test_a_closed_connection_makes_room_for_who_waits(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=1)
    origin, _ = await world.receiver()
    calls = await lined_up(world, origin, 3)
    for count in (1, 2, 3):
        await until(lambda count=count: len(calls.results) == count)
        assert world.transport.count == 1
        calls.results[-1].close()
    assert calls.all_once
    assert world.transport.count == 0


async def test_a_failed_connect_makes_room_for_who_waits(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=1, sockets_max=1)
    origin = await world.refusing()
    other, _ = await world.receiver()
    calls = await lined_up(world, origin, 3)
    assert (await connected(world.transport, other)).origin == other
    await until(lambda: len(calls.results) == 1)
    assert world.transport.count == 1  # `other` had its turn after the first, and holds the only socket
    world.lose(other)
    await until(lambda: len(calls.results) == 3)
    assert {result.fault for result in calls.results} == {Fault.CONNECT}
    assert world.transport.count == 0


async def test_sockets_in_all_are_bounded_and_origins_take_turns(make_world: Make) -> None:
    world = await make_world(sockets_max=2)
    busy, _ = await world.receiver()
    a, _ = await world.receiver()
    b, _ = await world.receiver()
    first, second = await connected(world.transport, busy), await connected(world.transport, busy)
    order: list[str] = []
    got: list[Any] = []
    for name, origin in (("a", a), ("a", a), ("b", b), ("busy", busy)):
        world.transport.connect(origin, lambda result, name=name: (order.append(name), got.append(result)))
    first.close()
    await until(lambda: order == ["a"])
    second.close()
    await until(lambda: order == ["a", "b"])  # not a's second one
    assert world.transport.count == 2
    got[0].close()
    await until(lambda: order == ["a", "b", "busy"])
    got[1].close()
    await until(lambda: order == ["a", "b", "busy", "a"])
    assert world.transport.count == 2


async def test_connections_that_may_never_come_hold_a_part_of_the_room(make_world: Make) -> None:
    """Else all of the sockets would hang for as long as connecting may take, and the idle one would have been closed for it."""
    world = await make_world(sockets_max=16, connect_s=0.3)
    quiet, _ = await world.receiver()
    world.transport.release(await connected(world.transport, quiet))
    holes, calls = [await world.black_hole() for _ in range(3)], Calls()
    for doubt, count in ((Doubt.UNTRIED, 8), (Doubt.UNREACHED, 1)):
        for hole in holes * count:
            world.transport.connect(hole, calls.one(), doubt=doubt)
    await asyncio.sleep(0)
    assert len(world.transport._opening) == 16 * sum(DOUBTED.values()), "twelve untried, two unreached"
    other, _ = await world.receiver()
    assert (await connected(world.transport, other)).origin == other, "nothing in doubt waits for what is"
    assert world.transport.try_acquire(quiet) is not None
    late, arrived = await world.receiver(), asyncio.get_running_loop().create_future()
    world.transport.connect(late[0], arrived.set_result, doubt=Doubt.UNTRIED)
    assert (await arrived).origin == late[0], "its turn is before the second of an origin"
    assert not calls.all_once
    await until(lambda: calls.all_once)
    assert {result.fault for result in calls.results} == {Fault.CONNECT}


async def test_nobody_waits_apart_for_room_at_an_origin(make_world: Make) -> None:
    """Else who waits for the room of one dead origin would hold that of everybody untried."""
    world = await make_world(sockets_max=16, sockets_per_origin_max=2, connect_s=0.3)
    hole, calls = await world.black_hole(), Calls()
    for _ in range(14):
        world.transport.connect(hole, calls.one(), doubt=Doubt.UNTRIED)
    assert world.transport._apart[Doubt.UNTRIED].held == 2
    origin, _ = await world.receiver()
    arrived = asyncio.get_running_loop().create_future()
    world.transport.connect(origin, arrived.set_result, doubt=Doubt.UNTRIED)
    assert (await arrived).origin == origin
    assert not calls.results
    assert len(world.transport._opening) == 2


async def test_who_waits_apart_gets_the_room_of_what_becomes_idle(make_world: Make) -> None:
    """And of one dead origin no more than that may have, also when they were asked for while there was no room at all."""
    world = await make_world(sockets_max=8, sockets_per_origin_max=2)
    origins = [(await world.receiver())[0] for _ in range(4)]
    busy = [await connected(world.transport, origin) for origin in origins * 2]
    hole, calls = await world.black_hole(), Calls()
    for _ in range(7):
        world.transport.connect(hole, calls.one(), doubt=Doubt.UNTRIED)
    assert (world.transport._apart[Doubt.UNTRIED].held, world.transport.count) == (0, 8)
    for connection in busy:
        world.transport.release(connection)
    assert (world.transport._apart[Doubt.UNTRIED].held, world.transport.count) == (2, 8)
    assert sum(connection.closed for connection in busy) == 2
    origin, _ = await world.receiver()
    arrived = asyncio.get_running_loop().create_future()
    world.transport.connect(origin, arrived.set_result, doubt=Doubt.UNTRIED)
    assert (await arrived).origin == origin
    assert not calls.results


async def test_a_connection_that_comes_in_a_pause_lets_in_who_waits_if_anybody_does() -> None:
    """The pause outlives the line: it was found empty, and two waiters were never told."""
    world = MemoryWorld(Limits(sockets_max=4))  # three untried at a time
    refused = Dial(0.010, Outcome(Fault.CONNECT, detail="refused"))
    origins = []
    for dial in (refused, Dial(0.0105), Dial(0.0108), Dial(0.001)):
        origin, receiver = await world.receiver()
        receiver.next_dial = dial
        origins.append(origin)
    calls = Calls()
    for origin in origins:
        world.transport.connect(origin, calls.one(), doubt=Doubt.UNTRIED)
    await until(lambda: calls.all_once)
    assert [isinstance(result, Outcome) for result in calls.results].count(True) == 1
    assert world.transport._apart[Doubt.UNTRIED].held == 0


async def test_a_connection_is_not_closed_for_who_is_about_to_get_room(make_world: Make) -> None:
    """While room is given to the many who waited apart, a few a turn of the loop, healthy connections were closed for them."""
    world = await make_world(sockets_max=100)
    busy, _ = await world.receiver()
    origin, _ = await world.receiver()
    kept = [await connected(world.transport, busy) for _ in range(20)]
    hole, calls = await world.black_hole(), Calls()
    for _ in range(12):
        world.transport.connect(hole, calls.one(), doubt=Doubt.UNREACHED)
    served: list[Any] = []
    for _ in range(40):
        world.transport.connect(origin, served.append, doubt=Doubt.UNREACHED)
    world.transport.connect(origin, served.append)

    released, counts = list[Any](), list[int]()

    def release() -> None:
        counts.append(world.transport.count)
        if world.transport._turns and kept:
            released.append(kept.pop())
            world.transport.release(released[-1])
        if kept and len(served) < 41:
            asyncio.get_running_loop().call_soon(release)

    release()
    await until(lambda: len(served) == 41)
    assert released, "while room was being given"
    assert max(after - before for before, after in pairwise(counts)) == GRANTS_AT_ONCE, "and a few a turn"
    assert not any(connection.closed for connection in released)


async def test_who_waits_apart_is_let_in_with_the_first_of_its_origin(make_world: Make) -> None:
    world = await make_world(sockets_max=4)
    hole = await world.black_hole()
    origin, _ = await world.receiver()
    calls = Calls()
    world.transport.connect(hole, calls.one(), doubt=Doubt.UNREACHED)
    served: list[Any] = []
    for _ in range(5):
        world.transport.connect(origin, served.append, doubt=Doubt.UNREACHED)
    await asyncio.sleep(0.05)
    assert not served, "one hangs, and of four sockets one may"
    assert (await connected(world.transport, origin)).origin == origin
    await until(lambda: len(served) == 2)
    assert world.transport.count == 4, "all the room there is"
    for count in (3, 4, 5):
        world.transport.release(served[-1])
        await until(lambda count=count: len(served) == count)


async def test_a_release_serves_an_origin_that_waits_for_room_in_all(make_world: Make) -> None:
    world = await make_world(sockets_max=1)
    a, _ = await world.receiver()
    b, _ = await world.receiver()
    held = await connected(world.transport, a)
    waiting = asyncio.create_task(connected(world.transport, b))
    await asyncio.sleep(0)
    assert (await start(held)).delivered  # not idle for idle_s: b gets its room
    assert (await waiting).origin == b
    assert world.transport.count == 1


async def test_a_busy_origin_with_a_line_does_not_starve_one_without_a_socket(make_world: Make) -> None:
    world = await make_world(sockets_max=2)
    a, _ = await world.receiver()
    b, _ = await world.receiver()
    held = [await connected(world.transport, a), await connected(world.transport, a)]
    calls = await lined_up(world, a, 50)
    waiting = asyncio.create_task(connected(world.transport, b))
    await asyncio.sleep(0)
    world.transport.release(held[0])  # a's line came first
    world.transport.release(held[1])
    assert (await waiting).origin == b
    # Now they are even: a goes on with what it has, without a handshake.
    opened = world.transport.opened
    for count in range(1, 51):
        await until(lambda count=count: len(calls.results) == count)
        world.transport.release(calls.results[-1])
    assert world.transport.opened == opened


async def test_an_idle_connection_elsewhere_makes_way_the_oldest_first(make_world: Make) -> None:
    world = await make_world(sockets_max=5)
    room = world.transport
    origins = [(await world.receiver())[0] for _ in range(9)]
    held = [await connected(room, origin) for origin in origins[:5]]
    loop = asyncio.get_running_loop()

    def give_back(n: int) -> None:
        room.release(held[n])

    for n in (3, 1, 0, 2):
        before = loop.time()
        give_back(n)
        await until(lambda before=before: loop.time() > before)  # it counts milliseconds: make their ages differ
    new = [await connected(room, origins[5])]
    assert [connection.closed for connection in held] == [False, False, False, True, False]
    assert room.try_acquire(origins[1]) is held[1]  # used once more: now it is the youngest
    give_back(1)
    for count, closed in ((1, 0), (2, 2), (3, 1)):
        new.append(await connected(room, origins[5 + count]))
        assert held[closed].closed
        assert [connection.closed for connection in held].count(False) == 4 - count
        assert room.count == 5
    assert not held[4].closed  # never idle


async def test_idle_connections_are_closed_by_age(make_world: Make) -> None:
    world = await make_world(idle_s=0.1)
    origin, _ = await world.receiver()
    connection = await connected(world.transport, origin)
    assert (await start(connection)).delivered
    assert world.transport.count == 1
    await until(lambda: world.transport.count == 0)
    assert connection.closed
    assert not world.transport._lines
    await until(lambda: world.transport._sweeper is None)  # and no timer is left running for nothing


async def test_those_whose_time_is_over_at_once_end_some_at_a_time(make_world: Make) -> None:
    """250 POSTs that began together and hang held everybody up for 30 ms when they ended."""
    world = await make_world()
    origin, _ = await world.receiver()
    room = world.transport
    for connection in [await connected(room, origin) for _ in range(3 * EXPIRE_AT_ONCE)]:
        room.release(connection)
        connection.deadline = 0.0
    most, before = 0, room.count
    assert before == 3 * EXPIRE_AT_ONCE
    async with asyncio.timeout(15):
        while room.count:
            await asyncio.sleep(0)
            most, before = max(most, before - room.count), room.count
    assert 0 < most <= EXPIRE_AT_ONCE


async def test_a_fresh_one_takes_the_room_of_an_idle_one(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=1)
    origin, _ = await world.receiver()
    await post(world.transport, origin)
    connection = await connected(world.transport, origin, fresh=True)
    assert not connection.kept
    assert (world.transport.count, len(world.transport._lines)) == (1, 1)
    assert (await start(connection)).delivered


async def test_a_fresh_one_at_the_bound_in_all_takes_the_room_of_its_own_idle_one(make_world: Make) -> None:
    world = await make_world(sockets_max=1)
    origin, _ = await world.receiver()
    await post(world.transport, origin)
    assert not (await connected(world.transport, origin, fresh=True)).kept
    assert (world.transport.count, len(world.transport._lines)) == (1, 1)


async def test_who_waits_for_a_fresh_one_is_served_by_a_release(make_world: Make) -> None:
    world = await make_world(sockets_per_origin_max=1)
    origin, _ = await world.receiver()
    held = await connected(world.transport, origin)
    fresh = await lined_up(world, origin, 1, fresh=True)
    any_ = await lined_up(world, origin, 1)
    assert (await start(held)).delivered
    await until(lambda: fresh.results)
    assert not fresh.results[0].kept
    assert held.closed
    assert not any_.results
    world.transport.release(fresh.results[0])
    await until(lambda: any_.results)
    assert any_.results == fresh.results


async def test_a_long_line_that_has_no_use_for_connections_any_more(make_world: Make) -> None:
    """Each gives it back at once, as lanes do that were paused meanwhile: 3,000 nested calls would be too many."""
    world = await make_world(sockets_per_origin_max=1)
    origin, _ = await world.receiver()
    held = await connected(world.transport, origin)
    served = []

    def give_back(connection: Any) -> None:
        served.append(connection)
        world.transport.release(connection)

    for _ in range(3_000):
        world.transport.connect(origin, give_back)
    world.transport.release(held)
    await until(lambda: len(served) == 3_000)
    assert world.transport.opened == 1
    assert world.transport.try_acquire(origin) is held


# ── stopping ──


async def test_close_tells_everyone_once(make_world: Make) -> None:
    world = await make_world(sockets_max=3)
    origin, receiver = await world.receiver(Reply(None), Reply(None))
    hole = await world.black_hole()
    calls = Calls()
    busy = await connected(world.transport, origin)
    idle = await connected(world.transport, origin)
    busy.post(REQUEST, 60, calls.one())
    world.transport.connect(hole, calls.one())  # opening
    world.transport.connect(origin, calls.one())  # waiting for room
    world.transport.connect(hole, calls.one())
    await until(lambda: receiver.requests)
    await world.transport.close()
    assert calls.all_once
    assert {result.fault for result in calls.results} == {Fault.RESET, Fault.CONNECT}
    assert idle.closed
    assert busy.closed
    assert (world.transport.count, world.transport._lines) == (0, {})
    world.transport.release(idle)
    assert (await start(idle)).fault is Fault.RESET
    assert (await connected(world.transport, origin)).fault is Fault.CONNECT
    assert world.transport.try_acquire(origin) is None
    await world.transport.close()


async def test_close_idle_and_never_used(make_world: Make) -> None:
    world = await make_world()
    await world.transport.close()
    world = await make_world()
    origin, _ = await world.receiver()
    await post(world.transport, origin)
    await world.transport.close()
    assert world.transport.count == 0


# ── whatever happens ──


@pytest.mark.parametrize("seed", range(24))
async def test_counts_are_true_and_everyone_is_told_once(make_world: Make, seed: int) -> None:
    """Random connects, posts, losses and releases at small bounds; then everything ends, and nothing is left."""
    rng = random.Random(seed)
    limits = {"sockets_max": rng.choice((1, 2, 3, 4, 5, 6, 12, 20)), "sockets_per_origin_max": rng.randint(1, 4)}
    world = await make_world(**limits, connect_s=0.1, headers_s=0.1, idle_s=0.2)
    room = world.transport
    alive = [await world.receiver() for _ in range(3)]
    origins = [origin for origin, _ in alive] + [await world.refusing(), await world.black_hole()]
    choices = [
        Reply(), Reply(), Reply(500), Reply(then="close"), Reply(then="stale"), Reply(None), Reply(200, body_s=0.01),
        Reply(None, fault=Fault.RESET), Reply(200, fault=Fault.RESET), Reply(None, fault=Fault.PROTOCOL), Reply(head_s=0.01),
    ]  # fmt: skip
    for _, receiver in alive:
        receiver.replies.extend(rng.choices(choices, k=200))
    calls = Calls()

    def ready(told: Callable[[Any], None]) -> Callable[[Any], None]:
        def on_ready(result: Any) -> None:
            told(result)
            if isinstance(result, Outcome):
                return
            what = rng.random()
            if what < 0.2:
                room.release(result)
            elif what < 0.3:
                result.close()
            else:
                result.post(REQUEST, 0.2, calls.one())

        return on_ready

    def check() -> None:
        lines = room._lines.values()
        assert room.count == sum(line.count for line in lines)
        assert room.count == len(room._connections) + len(room._opening)
        assert room.count <= limits["sockets_max"]
        assert all(line.count <= limits["sockets_per_origin_max"] for line in lines)
        apart_lines = {line for apart in room._apart.values() for line in (*apart.waiting, *apart.parked)}
        assert all(line.count or line.waiting or line in apart_lines for line in lines)
        assert not any(line.waiting and line.idle for line in lines)
        if room._first_in_turn() is not None and not room._granting:
            assert room.count == limits["sockets_max"]
            assert not any(line.idle for line in lines)
        for apart in room._apart.values():
            assert 0 <= apart.held <= apart.limit
            if (
                apart.has_next
                and not apart.is_paced
                and any(line.count < limits["sockets_per_origin_max"] for line in apart.waiting)
            ):
                assert room._short
                assert room.count == limits["sockets_max"]
                assert not any(line.idle for line in lines)
            assert all(line.count == limits["sockets_per_origin_max"] for line in apart.parked)
        assert all(line.count == line.opening and room._lines[line.origin] is line for line in apart_lines)

    for _ in range(150):
        what = rng.random()
        origin = rng.choice(origins[:3] if rng.random() < 0.9 else origins)
        if what < 0.6:
            connection = room.try_acquire(origin) if rng.random() < 0.5 else None
            if connection is None:
                doubt = rng.choice((None, None, Doubt.UNTRIED, Doubt.UNREACHED))
                room.connect(
                    origin, ready(calls.one()), fresh=rng.random() < 0.2, doubt=doubt, turn_of=rng.randrange(4)
                )
            else:
                connection.post(REQUEST, 0.2, calls.one())
        elif what < 0.63:
            world.lose(rng.choice(origins[:3]))
        elif what < 0.9:
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.002)
        check()
    if seed % 2:
        await until(lambda: calls.all_once and room.count == 0, within_s=15)
        check()
    else:
        await room.close()
        await until(lambda: calls.all_once)  # what was told "later" comes with the loop's next turn
    assert calls.all_once
    assert (room.count, room._lines) == (0, {})
    assert not any(apart.held or apart.waiting or apart.parked for apart in room._apart.values())
    await until(lambda: world.real_count() == 0)
    assert calls.all_once


async def test_the_count_is_that_of_the_sockets(make_world: Make) -> None:
    world = await make_world()
    a, _ = await world.receiver()
    b, _ = await world.receiver()
    held = [await connected(world.transport, origin) for origin in (a, a, b)]
    await until(lambda: not world.real or sum(peer.open for peer in world.peers.values()) == 3)
    assert world.real_count() == world.transport.count == 3
    world.transport.release(held[0])
    held[1].close()
    await until(lambda: world.real_count() == world.transport.count == 2)


# ── the twin alone ──


class VirtualSelector(selectors.DefaultSelector):
    """Waiting makes the time pass, and nothing else does."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.waits = VirtualSelector()
        super().__init__(self.waits)

    def time(self) -> float:
        return self.waits.now


def simulate(seed: int) -> list[str]:
    """Run an hour of faults, then heal; return what was seen and when."""
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        rng = random.Random(seed)
        arrived: list[bytes] = []
        dice = Dice(
            rng,
            [(6, Reply(head_s=0.02)), (1, Reply(None)), (1, Reply(None, fault=Fault.RESET)), (1, Reply(then="stale"))],
            [(4, Dial(0.05)), (1, Dial(outcome=Outcome(Fault.TLS))), (1, Dial(100.0))],
            on_request=arrived.append,
        )
        transport = MemoryTransport(Limits(), lambda origin: dice, latency_s=(0.001, 0.2), rng=rng)
        origin = Origin("https", "example.com", 443)
        for n in range(200):
            outcome = await post(transport, origin, b"%d" % n, timeout_s=15)
            seen.append(f"{loop.time():.6f} {outcome.fault} {len(arrived)} {transport!r}")
            await asyncio.sleep(rng.uniform(0, 36))
        dice.heal()
        while (await post(transport, origin, timeout_s=15)).fault is Fault.STALE:
            pass
        assert (await post(transport, origin)).delivered
        await transport.close()

    loop = VirtualLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return seen


def test_a_seed_gives_the_same_run_under_virtual_time() -> None:
    first = simulate(7)
    assert first == simulate(7)
    assert first != simulate(8)
    assert {line.split()[1] for line in first} >= {"None", "Fault.TIMEOUT", "Fault.TLS", "Fault.CONNECT", "Fault.STALE"}


async def test_a_request_under_way_arrives_though_we_hang_up() -> None:
    receiver = Scripted()
    transport = MemoryTransport(Limits(), lambda origin: receiver, latency_s=(0.01, 0.01))
    connection = await connected(transport, Origin("https", "example.com", 443))
    done = start(connection)
    await transport.close()
    assert (await done).fault is Fault.RESET
    await until(lambda: receiver.requests == [REQUEST])


async def test_a_name_without_receiver_does_not_resolve() -> None:
    transport = MemoryTransport(Limits(), {}.get)
    assert (await connected(transport, Origin("https", "example.com", 443))).fault is Fault.DNS
    assert transport.count == 0
