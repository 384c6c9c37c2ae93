"""Server-side request forgery, as a table: every special-purpose block × every embedding, every spelling, by every way in.

A way in is a URL that somebody saves, a name that a resolver answers for, and an answer that redirects. The parts are tested closer by
(domain/test_address.py, domain/test_url.py, transport/test_guard.py, transport/test_proxy.py); here they are put together as in production.
"""

import itertools
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network

import pytest

from dispatcher.domain.address import SPECIAL, AddressPolicy, parse_ports
from dispatcher.domain.outcome import Fault
from dispatcher.domain.url import Origin, parse_url
from dispatcher.errors import InputError
from dispatcher.settings import Settings
from dispatcher.sink import Behaviour
from dispatcher.transport import tcp
from tests.rig import rig, until
from tests.transport.peers import Names, connected, make_pool

POLICY = Settings().address_policy

# The IANA IPv4 and IPv6 Special-Purpose Address Registries (2025-10-09), and what no host answers at although no registry lists it. Written
# down once more: a row that is lost from the product's table is lost here only on purpose.
REGISTRIES = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29 192.0.0.8/32
192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24
192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
255.255.255.255/32 168.63.129.16/32 169.254.169.254/32 100.100.100.200/32 ::1/128 ::/128 ::/96 ::ffff:0:0:0/96 64:ff9b:1::/48
100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48
2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fd00:ec2::254/128
fe80::/10 fec0::/10 ff00::/8
"""
BLOCKS = REGISTRIES.split()

Embed = Callable[[IPv4Address], IPv6Address]
EMBEDDINGS: dict[str, Embed] = {
    "mapped": lambda inner: IPv6Address((0xFFFF << 32) | int(inner)),
    "compatible": lambda inner: IPv6Address(int(inner)),
    "translated": lambda inner: IPv6Address((0xFFFF << 48) | int(inner)),
    "6to4": lambda inner: IPv6Address((0x2002 << 112) | (int(inner) << 80) | 1),
    "Teredo, its server": lambda inner: IPv6Address((0x2001_0000 << 96) | (int(inner) << 64)),
    "Teredo, its client": lambda inner: IPv6Address((0x2001_0000 << 96) | (int(inner) ^ 0xFFFF_FFFF)),
    "NAT64": lambda inner: IPv6Address((0x0064_FF9B << 96) | int(inner)),
    "local NAT64": lambda inner: IPv6Address((0x0064_FF9B_0001 << 80) | int(inner)),
    "local NAT64, /48": lambda inner: IPv6Address(
        (0x0064_FF9B_0001 << 80) | (int(inner) >> 16 << 64) | ((int(inner) & 0xFFFF) << 40)
    ),
}


def addresses() -> list[str]:
    """The first, a middle and the last address of each block, and of IPv4's in each embedding."""
    found: dict[str, None] = {}
    for block in map(ip_network, BLOCKS):
        for n in (0, block.num_addresses // 2, block.num_addresses - 1):
            address = block[n]
            found[str(address)] = None
            if isinstance(block, IPv4Network):
                found |= {str(embed(address)): None for embed in EMBEDDINGS.values()}
    return list(found)


def test_the_products_table_and_this_one_name_the_same_blocks() -> None:
    ours = {str(network) for network, _, _ in SPECIAL}
    missing = [block for block in BLOCKS if not any(ip_network(block).version == n.version and ip_network(block).subnet_of(n)  # type: ignore[arg-type]
               for n, _, _ in SPECIAL)]  # fmt: skip
    assert missing == ["::ffff:0:0:0/96"], "outside 2000::/3, which is all that is allowed"
    assert ours <= set(BLOCKS)


def test_no_literal_address_of_a_special_block_can_be_saved() -> None:
    for address in addresses():
        with pytest.raises(InputError):
            parse_url(f"https://{f'[{address}]' if ':' in address else address}/hook", POLICY)


async def test_no_name_that_resolves_to_a_special_block_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, and as one of several of which the others would do."""
    dialled: list[str] = []

    async def dial(addr_infos, **_):
        dialled.extend(info[4][0] for info in addr_infos)
        raise ConnectionRefusedError

    monkeypatch.setattr(tcp.aiohappyeyeballs, "start_connection", dial)
    bad = addresses()
    names = {f"n{n}_example": (address,) for n, address in enumerate(bad)}
    names |= {f"m{n}_example": (address, "93.184.216.34", address) for n, address in enumerate(bad)}
    async with make_pool(guard=POLICY, resolver=Names(**names)) as pool:
        for n, address in enumerate(bad):
            outcome = await connected(pool, Origin("https", f"n{n}.example", 443))
            assert outcome.fault is Fault.BLOCKED, address
            assert dialled == [], address
            await connected(pool, Origin("https", f"m{n}.example", 443))
            assert set(dialled) == {"93.184.216.34"}, address
            dialled.clear()


# ── spellings ──


def spellings(address: IPv4Address) -> list[str]:
    """What some resolver or parser takes for the address: 1 to 4 parts, each octal, hexadecimal or decimal, in three alphabets, with a dot."""
    number = int(address)
    parts = {n: [*address.packed[: n - 1], number & (0xFFFF_FFFF >> 8 * (n - 1))] for n in (1, 2, 3, 4)}
    found = []
    for of_address in parts.values():
        for styles in itertools.product(
            ("{}", "0x{:x}", "0X{:X}", "0{:o}", "00000{:o}", "0x000{:x}"), repeat=len(of_address)
        ):
            if len(set(styles)) <= 2:  # mixed, but not all 1,500 of them
                found.append(".".join(style.format(part) for style, part in zip(styles, of_address, strict=True)))
    plain = str(address)
    wide = plain.translate({ord(c): 0xFF10 + int(c) for c in "0123456789"})
    circled = plain.translate({ord(c): 0x2460 + int(c) - 1 for c in "123456789"} | {ord("0"): 0x24EA})
    found += [wide, circled, wide.replace(".", "。"), plain.replace(".", "．"), plain.replace(".", "｡")]
    found += ["".join(f"%{ord(c):02x}" for c in plain), plain.replace(".", "%2e"), plain.replace("1", "%31", 1)]
    found += [f"{text}." for text in found]
    found += [
        f"user@{plain}",
        f"a:b@{plain}",
        f"example.com@{plain}",
        f"{plain}@example.com",
        f"{plain}#@example.com",
        f"{plain}\\@example.com",
    ]
    found += [
        f"[::ffff:{plain}]",
        f"[::{plain}]",
        f"[64:ff9b::{plain}]",
        "[::ffff:7f00:1%25eth0]",
        "[fe80::1%eth0]",
        "[fe80::1%25lo]",
    ]
    found += [f"{plain} ", f" {plain}", f"{plain}\t", f"{plain}\n", f"\x00{plain}", f"{plain}\u200b", f"{plain}\u00ad"]
    return [text for text in found if text != plain]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.1.1"])
def test_no_spelling_of_an_internal_address_is_a_way_in(address: str) -> None:
    """Refused, or read as what it is. What is no URL of that host at all (its fragment) is read as that."""
    for text in [address, *spellings(IPv4Address(address))]:
        with pytest.raises(InputError):
            parse_url(f"https://{text}/hook", POLICY)
        with pytest.raises(InputError):
            parse_url(f"https://{text}:443/", AddressPolicy())


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1"])
def test_a_spelling_opens_nothing_where_the_network_is_allowed(address: str) -> None:
    """An allowed network is no reason to read what others read differently."""
    policy = Settings(allowed_networks="127.0.0.0/8,10.0.0.0/8").address_policy
    assert parse_url(f"https://{address}/", policy).address == IPv4Address(address)
    for text in spellings(IPv4Address(address)):
        if "#" not in text:
            with pytest.raises(InputError):
                parse_url(f"https://{text}/hook", policy)


@pytest.mark.parametrize(
    "name",
    ["localhost", "localhost.", "LOCALHOST", "ｌocalhost", "metadata.google.internal", "a.localhost", "ip6-localhost"],
)
async def test_names_for_what_is_inside_are_judged_by_their_addresses(name: str) -> None:
    target = parse_url(f"https://{name}/", POLICY)
    inside = {target.origin.host.replace(".", "_"): ("127.0.0.1", "::1")}
    async with make_pool(guard=POLICY, resolver=Names(**inside)) as pool:
        assert (await connected(pool, target.origin)).fault is Fault.BLOCKED


# ── ports ──


@pytest.mark.parametrize("port", [1, 21, 22, 23, 25, 53, 110, 143, 389, 445, 465, 587, 993, 1023])
def test_ports_of_other_protocols_are_refused_by_default(port: int) -> None:
    with pytest.raises(InputError, match=f"port {port} is refused: the operator allows 80, 443, 1024 to 65535"):
        parse_url(f"https://example.com:{port}/", POLICY)


@pytest.mark.parametrize("port", [80, 443, 1024, 8443, 65535])
def test_other_ports_are_allowed_by_default(port: int) -> None:
    assert parse_url(f"https://example.com:{port}/", POLICY).origin.port == port


def test_ports_are_the_operators_choice() -> None:
    policy = Settings(allowed_ports="443 8000-8001", allowed_networks="10.0.0.0/8").address_policy
    for port in (443, 8000, 8001):
        parse_url(f"https://10.0.0.1:{port}/", policy)
    for url in ("https://10.0.0.1:8002/", "http://10.0.0.1/", "https://10.0.0.1:7999"):
        with pytest.raises(InputError, match=r"443, 8000 to 8001 \(DISPATCHER_ALLOWED_PORTS\)"):
            parse_url(url, policy)


@pytest.mark.parametrize("text", ["", " ,", "0", "65536", "443-80", "-1", "1-", "http", "443;80", "99999", "１"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(InputError):
        parse_ports(text)


async def test_an_endpoint_whose_port_is_no_longer_allowed_holds_its_events(dsn: str) -> None:
    """Saved under other settings: nothing is sent, and nothing is lost."""
    async with rig(dsn, start=False, allowed_ports="443") as r:
        endpoint = await r.endpoint()
        await r.start()
        await r.emit()
        await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)
        await until(lambda: r.db.fetchval("SELECT position > 0 FROM webhook.checkpoint"))
        assert await r.db.fetchval("SELECT backlog FROM webhook.lane WHERE endpoint_id = $1", endpoint) == 1
        assert not r.received


# ── redirects ──


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_that_nobody_follows(dsn: str, status: int) -> None:
    async with rig(dsn, retry_schedule_s=(600,)) as r:
        await r.endpoint(behaviour=Behaviour(mode="redirect") if status == 302 else Behaviour(status=status))
        [event] = await r.emit()
        await until(lambda: r.db.fetchval("SELECT count(*) FROM webhook.retry"))
        [attempt] = await r.attempts(event_id=event)
        assert (attempt["status"], attempt["fault"]) == (status, "status")
        assert set(r.by_path()) == {"/hook"}, "nothing came to where it pointed"
