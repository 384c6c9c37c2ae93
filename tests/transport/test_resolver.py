"""The resolver: cache, sharing, bounds, and how it ends. No name server is asked but one of our own."""

import asyncio
from typing import Any

import aiodns
import pytest

from dispatcher.domain.outcome import Fault
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport import resolver as resolver_module
from dispatcher.transport.resolver import Resolver, UnresolvedError
from tests.transport.peers import OK, Names, connected, make_peer, make_pool, post, until


def age(resolver: Resolver, host: str, by_s: float) -> None:
    """Let a cached answer be older."""
    until_, found = resolver._cache[host]
    resolver._cache[host] = (until_ - by_s, found)


async def test_addresses_need_no_look_up() -> None:
    names = Names()
    for host in ("127.0.0.1", "::1", "2600::1"):
        assert await names.resolve(host) == (host,)
    assert names.lookups == 0


async def test_answers_are_kept_for_their_time_to_live() -> None:
    names = Names(a_example=[("127.0.0.1",), ("127.0.0.2",)])
    names.ttl_s = 10.0
    assert await names.resolve("a.example") == await names.resolve("a.example") == ("127.0.0.1",)
    age(names, "a.example", 9.5)
    assert await names.resolve("a.example") == ("127.0.0.1",)
    age(names, "a.example", 1)
    assert await names.resolve("a.example") == ("127.0.0.2",)
    assert names.lookups == 2


async def test_of_thousands_of_addresses_some_of_each_family_are_kept() -> None:
    many = [f"192.0.2.{n}" for n in range(200)] * 2 + [f"2600::{n:x}" for n in range(200)]
    some = resolver_module._some(many)
    most = resolver_module.ADDRESSES_MAX
    assert some == (*many[:most], *many[400 : 400 + most])


async def test_answers_whose_time_is_over_are_let_go_of() -> None:
    names = Names(**{f"h{n}_example": ("127.0.0.1",) for n in range(4)})
    for n in range(3):
        await names.resolve(f"h{n}.example")
        age(names, f"h{n}.example", 1_000)
    await names.resolve("h3.example")
    assert list(names._cache) == ["h3.example"]


@pytest.mark.parametrize(("ttl_s", "kept_s"), [(0.0, 1.0), (86_400.0, 30.0)])
async def test_the_time_to_live_has_bounds(ttl_s: float, kept_s: float) -> None:
    names = Names(a_example=("127.0.0.1",))
    names.ttl_s = ttl_s
    await names.resolve("a.example")
    left = names._cache["a.example"][0] - asyncio.get_running_loop().time()
    assert kept_s - 0.5 < left <= kept_s


async def test_a_name_that_does_not_resolve_is_remembered_for_a_second() -> None:
    names = Names()
    for _ in range(3):
        with pytest.raises(UnresolvedError, match=r"no\.example does not resolve"):
            await names.resolve("no.example")
    assert names.lookups == 1
    names.names["no.example"] = ("127.0.0.1",)
    age(names, "no.example", resolver_module.NEGATIVE_TTL_S)
    assert await names.resolve("no.example") == ("127.0.0.1",)


async def test_the_same_failure_told_often_does_not_grow() -> None:
    names = Names()
    seen = []
    for _ in range(3):
        try:
            await names.resolve("no.example")
        except UnresolvedError as exc:
            seen.append(exc)
    assert len({id(exc) for exc in seen}) == 3


async def test_one_look_up_a_name_shared_by_all_and_ended_by_none() -> None:
    names = Names(a_example=("127.0.0.1",))
    go = names.until_set["a.example"] = asyncio.Event()
    waiting = [asyncio.create_task(names.resolve("a.example")) for _ in range(5)]
    await until(lambda: names.lookups)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    go.set()
    assert [await task for task in waiting[1:]] == [("127.0.0.1",)] * 4
    assert (names.lookups, names._lookups) == (1, {})


async def test_a_failure_that_nobody_waits_for_any_more_is_no_noise() -> None:
    names = Names()
    go = names.until_set["no.example"] = asyncio.Event()
    task = asyncio.create_task(names.resolve("no.example"))
    await until(lambda: names.lookups)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    go.set()
    await until(lambda: not names._lookups)
    assert "no.example" in names._cache


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "NAMES_MAX", 3)
    names = Names(**{f"n{n}": ("127.0.0.1",) for n in range(5)})
    for n in range(5):
        await names.resolve(f"n{n}")
    assert list(names._cache) == ["n2", "n3", "n4"]


async def test_closing_ends_what_is_under_way() -> None:
    names = Names()
    names.until_set["hung.example"] = asyncio.Event()
    task = asyncio.create_task(names.resolve("hung.example"))
    await until(lambda: names.lookups)
    await names.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    await names.close()
    assert not names._lookups


# ── seen through the pool ──


async def test_an_unknown_name_is_a_dns_fault() -> None:
    async with make_pool(resolver=Names()) as pool:
        outcome = await connected(pool, Origin("https", "no.example", 443))
        assert (outcome.fault, outcome.detail) == (Fault.DNS, "no.example does not resolve")
        assert pool.count == 0


async def test_a_look_up_that_hangs_is_a_dns_fault_at_the_bound_on_connecting() -> None:
    names = Names()
    names.until_set["hung.example"] = asyncio.Event()
    async with make_pool(Limits(connect_s=0.1), resolver=names) as pool:
        outcome = await connected(pool, Origin("https", "hung.example", 443))
        assert (outcome.fault, outcome.detail) == (Fault.DNS, "the name was not resolved within 0.1 s")
        assert pool.count == 0
        assert names.lookups == 1


async def test_hung_names_do_not_delay_others() -> None:
    names = Names(good_example=("127.0.0.1",))
    async with make_peer(OK) as peer, make_pool(resolver=names) as pool:
        for n in range(100):
            names.until_set[f"hung{n}.example"] = asyncio.Event()
            pool.connect(Origin("http", f"hung{n}.example", 80), lambda result: None)
        assert (await post(pool, Origin("http", "good.example", peer.origin.port))).delivered


async def test_a_surprise_of_the_resolver_is_told_and_counts() -> None:
    class Broken(Resolver):
        async def lookup(self, host: str) -> tuple[tuple[str, ...], float]:
            raise RuntimeError("a library's surprise")

    async with make_pool(resolver=Broken(30)) as pool:
        outcome = await connected(pool, Origin("https", "a.example", 443))
        assert (outcome.fault, outcome.detail) == (Fault.CONNECT, "RuntimeError: a library's surprise")
        assert (pool.count, pool._lines) == (0, {})


# ── c-ares itself, asking a name server on loopback ──


class NameServer(asyncio.DatagramProtocol):
    """Answer A queries from a table; other types and names don't exist; "hung" gets no answer."""

    def __init__(self, **addresses: str) -> None:
        self.addresses = addresses
        self.asked: list[str] = []
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        question, kind = data[12 : at + 5], data[at + 1 : at + 3]
        self.asked.append(".".join(labels).lower())
        if labels[0] == "hung":
            return
        address = self.addresses.get(labels[0]) if kind == b"\0\1" else None
        known = labels[0] in self.addresses
        header = (
            data[:2]
            + (b"\x81\x80" if known else b"\x81\x83")
            + b"\0\1"
            + (b"\0\1" if address else b"\0\0")
            + b"\0\0\0\0"
        )
        answer = b""
        if address:
            answer = b"\xc0\x0c\0\1\0\1" + (20).to_bytes(4, "big") + b"\0\4" + bytes(map(int, address.split(".")))
        self.transport.sendto(header + question + answer, peer)


async def test_a_real_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    server = NameServer(hooks="127.0.0.7")
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    real = aiodns.DNSResolver

    def asking_ours(**options: Any) -> Any:
        return real(nameservers=[f"127.0.0.1:{port}"], **options)

    monkeypatch.setattr(aiodns, "DNSResolver", asking_ours)
    resolver = Resolver(30.0)
    try:
        assert await resolver.resolve("hooks.example.com") == ("127.0.0.7",)
        left = resolver._cache["hooks.example.com"][0] - loop.time()
        assert 19 < left < 20.001
        with pytest.raises(UnresolvedError, match=r"nothere\.example\.com does not resolve"):
            await resolver.resolve("nothere.example.com")
        assert "hooks.example.com" in server.asked
        for odd in ("a" * 64 + ".example.com", "127.1", "１２７.0.0.1"):
            with pytest.raises(UnresolvedError):
                await asyncio.wait_for(resolver.resolve(odd), 5)
        task = asyncio.create_task(resolver.resolve("hung.example.com"))
        await until(lambda: "hung.example.com" in server.asked)
        await resolver.close()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    finally:
        await resolver.close()
        transport.close()
