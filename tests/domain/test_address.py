"""The guard's table against a second copy of the registries, its neighbours, and every way to hide an IPv4 address.

`REGISTRY` has IANA's rows one by one, nested ones included, so that a row lost from `SPECIAL` is noticed here;
`OUTSIDE` has the addresses on either side of each block, so that a block grown too large is noticed as well.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dispatcher.domain.address import SPECIAL, AddressPolicy, parse_networks
from dispatcher.errors import InputError

PUBLIC = AddressPolicy()
IPV4 = st.ip_addresses(v=4)  # Hypothesis draws every other one from the special-purpose blocks
IPV6 = st.ip_addresses(v=6)
no_deadline = settings(deadline=None)  # a busy machine is no defect

REGISTRY = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12
192.0.0.0/24 192.0.0.0/29 192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24
192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 255.255.255.255/32

::1/128 ::/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64
2001::/23 2001::/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48
2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10
"""  # without ::ffff:0:0/96 and 64:ff9b::/96, which are judged by the address inside

NOT_IN_THE_REGISTRY = """
224.0.0.0/4 168.63.129.16/32 169.254.169.254/32 100.100.100.200/32 fd00:ec2::254/128
::/96 ::ffff:0:0:0/96 fec0::/10 ff00::/8 200::/7 1000::/4 4000::/2 8000::/2 c000::/3 e000::/4 f000::/5 f800::/6 fe00::/9
"""

OUTSIDE = """
1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0
191.255.255.255 192.0.1.0 192.0.1.255 192.0.3.0 192.31.195.255 192.31.197.0 192.52.192.255 192.52.194.0
192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 192.175.47.255 192.175.49.0
198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255

2000:: 2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:200:: 2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db9::
2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2003:: 2620:4f:7fff:ffff:ffff:ffff:ffff:ffff 2620:4f:8001::
3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff 3fff:1000:: 3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""


@pytest.mark.parametrize("cidr", (REGISTRY + NOT_IN_THE_REGISTRY).split())
def test_a_special_block_is_refused_from_end_to_end(cidr):
    network = ip_network(cidr)
    for index in (0, network.num_addresses // 2, network.num_addresses - 1):
        assert PUBLIC.refusal(network[index]) is not None
        assert PUBLIC.refusal(str(network[index])) is not None


@pytest.mark.parametrize("text", OUTSIDE.split())
def test_the_neighbours_of_a_special_block_are_allowed(text):
    assert PUBLIC.refusal(text) is None
    assert PUBLIC.refusal(ip_address(text)) is None


def test_no_row_is_hidden_by_one_before_it():
    for index, (network, name, source) in enumerate(SPECIAL):
        inside = str(network[network.num_addresses // 2])
        assert PUBLIC.refusal(inside) == f"{inside} is {name} ({network}, {source})", (
            f"row {index} never speaks for {network}"
        )


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1", "127.0.0.1 is loopback (127.0.0.0/8, RFC 1122)"),
        ("::ffff:127.0.0.1", "127.0.0.1 is loopback (127.0.0.0/8, RFC 1122)"),
        (
            "64:ff9b::a00:1",
            "64:ff9b::a00:1 is NAT64 (64:ff9b::/96, RFC 6052), and 10.0.0.1 is private (10.0.0.0/8, RFC 1918)",
        ),
        ("4000::1", "4000::1 is outside the global unicast space (2000::/3, RFC 4291)"),
        ("fe80::1%eth0", "fe80::1%eth0 has a zone, which means something on one machine only (RFC 4007)"),
        ("example.com", "'example.com' is not an IP address"),
    ],
)
def test_a_refusal_says_what_the_address_is(address, sentence):
    assert PUBLIC.refusal(address) == sentence


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("169.254.169.254", "a cloud metadata service"),
        ("100.100.100.200", "a cloud metadata service"),
        ("fd00:ec2::254", "a cloud metadata service"),
        ("255.255.255.255", "the broadcast address"),
        ("::", "the unspecified address"),
        ("::1", "loopback"),
        ("::2", "an IPv4-compatible address"),
        ("64:ff9b:1::1", "local-use NAT64"),
        ("100::1", "the discard prefix"),
        ("100:0:0:1::1", "the dummy prefix"),
        ("5f00::1", "a segment routing id"),
        ("fd00::1", "unique-local"),
        ("fe80::1", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("2001::1", "Teredo"),
    ],
)
def test_what_a_wider_block_would_refuse_too_goes_by_its_own_name(address, name):
    assert f"{address} is {name} (" in (PUBLIC.refusal(address) or "")


@no_deadline
@given(st.one_of(IPV4, IPV6))
def test_what_python_calls_not_global_is_refused(address):
    # A second opinion. The other direction doesn't hold, which is why there is a table.
    judged_by_inner = address.version == 6 and address.ipv4_mapped is not None
    if not judged_by_inner and not address.is_global:
        assert PUBLIC.refusal(address) is not None


@pytest.mark.parametrize("address", ["224.0.1.1", "ff0e::1", "2002:808:808::1", "64:ff9b:1::808:808", "3fff::1"])
def test_what_is_global_to_some_version_of_python_is_refused_all_the_same(address):
    assert PUBLIC.refusal(address) is not None


# An IPv4 address inside an IPv6 address


def mapped(inner: IPv4Address) -> IPv6Address:
    return IPv6Address((0xFFFF << 32) | int(inner))


def nat64(inner: IPv4Address) -> IPv6Address:
    return IPv6Address((0x64FF9B << 96) | int(inner))


REFUSED_WHOLE = {
    "v4-compatible": lambda inner: IPv6Address(int(inner)),
    "v4-translated": lambda inner: IPv6Address((0xFFFF << 48) | int(inner)),
    "6to4": lambda inner: IPv6Address((0x2002 << 112) | (int(inner) << 80) | 1),
    "Teredo": lambda inner: IPv6Address((0x20010000 << 96) | (int(inner) ^ 0xFFFF_FFFF)),
    "local NAT64": lambda inner: IPv6Address((0x64FF9B0001 << 80) | int(inner)),
}


@no_deadline
@given(IPV4)
def test_mapped_and_nat64_are_judged_by_the_address_inside(inner):
    refused = PUBLIC.refusal(inner) is not None
    assert (PUBLIC.refusal(mapped(inner)) is not None) == refused
    assert (PUBLIC.refusal(nat64(inner)) is not None) == refused


@pytest.mark.parametrize("embed", REFUSED_WHOLE.values(), ids=REFUSED_WHOLE)
@no_deadline
@given(inner=IPV4)
def test_other_embeddings_are_refused_whatever_is_inside(embed, inner):
    assert PUBLIC.refusal(embed(inner)) is not None


def test_the_embeddings_are_those_of_the_standards():
    inner = IPv4Address("8.8.8.8")
    assert mapped(inner) == IPv6Address("::ffff:8.8.8.8")
    assert nat64(inner) == IPv6Address("64:ff9b::8.8.8.8")
    assert REFUSED_WHOLE["6to4"](inner).sixtofour == inner
    assert REFUSED_WHOLE["Teredo"](inner).teredo == (IPv4Address(0), inner)
    assert REFUSED_WHOLE["local NAT64"](inner) in ip_network("64:ff9b:1::/48")


@pytest.mark.parametrize("address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2600::1"])
def test_public_addresses_are_allowed_in_each_form(address):
    assert PUBLIC.refusal(address) is None


# The operator's exceptions

PRIVATE = AddressPolicy(allowed_networks=parse_networks("10.1.0.0/16 fd00:1::/48"))


@pytest.mark.parametrize("address", ["10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3", "fd00:1::", "fd00:1:0:ffff::1"])
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_an_allowed_network_is_allowed_with_either_scheme(address, scheme):
    assert PRIVATE.refusal(address, scheme) is None


@pytest.mark.parametrize(
    "address",
    [
        "10.0.255.255",
        "10.2.0.0",
        "fd00:2::",
        "64:ff9b::10.1.2.3",
        "::10.1.2.3",
        "2002:a01:203::1",
        "64:ff9b:1::10.1.2.3",
    ],
)
def test_an_allowed_network_allows_nothing_besides(address):
    assert PRIVATE.refusal(address) is not None


def test_an_allowed_network_may_hold_a_metadata_service():
    assert AddressPolicy(parse_networks("169.254.169.254")).refusal("169.254.169.254") is None


def test_an_allowed_network_does_not_allow_a_zone():
    policy = AddressPolicy(parse_networks("::/0"))
    assert policy.refusal("fe80::1") is None
    assert policy.refusal("fe80::1%eth0") is not None
    assert policy.refusal(IPv6Address("fe80::1%eth0")) is not None


def test_all_of_ipv6_allowed_is_nothing_of_ipv4_allowed():
    assert AddressPolicy(parse_networks("::/0")).refusal("::ffff:127.0.0.1") is not None


@pytest.mark.parametrize(
    ("policy", "address", "refused"),
    [
        (AddressPolicy(), "8.8.8.8", True),
        (AddressPolicy(allow_http=True), "8.8.8.8", False),
        (AddressPolicy(allow_http=True), "127.0.0.1", True),
        (PRIVATE, "8.8.8.8", True),
        (PRIVATE, "10.1.0.1", False),
    ],
)
def test_plain_http_needs_an_allowed_network_or_the_setting(policy, address, refused):
    assert (policy.refusal(address, "http") is not None) == refused


def test_the_table_speaks_before_the_ban_on_http():
    assert PUBLIC.refusal("10.0.0.1", "http") == "10.0.0.1 is private (10.0.0.0/8, RFC 1918)"
    assert "DISPATCHER_ALLOW_HTTP" in (PUBLIC.refusal("8.8.8.8", "http") or "")


@no_deadline
@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789abcdef.:%/"), st.characters())))
def test_any_text_gets_an_answer(text):
    # A resolver's answer never raises, and only addresses pass.
    if PUBLIC.refusal(text) is None:
        ip_address(text)


# parse_networks


@pytest.mark.parametrize("text", ["", "  ", ",", " ,\n"])
def test_no_networks(text):
    assert parse_networks(text) == ()


def test_networks_are_separated_by_commas_and_white_space():
    expected = tuple(ip_network(cidr) for cidr in ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32", "::1/128"))
    assert parse_networks("10.0.0.0/8,fd00::/8, 192.0.2.7\n::1 ") == expected


@pytest.mark.parametrize(
    "bad",
    [
        "office",
        "10.0.0.0/33",
        "fd00::/129",
        "10.0.0/8",
        "010.0.0.0/8",
        "10.0.0.0/",
        "/8",
        "10.0.0.0/-1",
        "10.0.0.0/8/8",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/0.255.255.255",
        "fe80::%eth0/64",
        "10.0.0.0/8;",
        "1٠.0.0.0/8",
    ],
)
def test_a_bad_network_is_named_and_an_example_shown(bad):
    with pytest.raises(InputError) as caught:
        parse_networks(f"192.168.0.0/16, {bad}")
    assert repr(bad) in str(caught.value)
    assert "10.1.0.0/16" in str(caught.value)
    assert "192.168" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("fd00:1::1/48", "fd00:1::/48"),
        ("10.0.0.1/0", "0.0.0.0/0"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_a_network_written_askew_is_answered_with_the_right_one(text, network):
    with pytest.raises(InputError, match="Write") as caught:
        parse_networks(text)
    assert f"Write {network}" in str(caught.value)


@st.composite
def networks(draw):
    address = draw(st.one_of(IPV4, IPV6.filter(lambda address: address.ipv4_mapped is None)))
    return ip_network((address, draw(st.integers(0, address.max_prefixlen))), strict=False)


@no_deadline
@given(st.lists(networks()).map(tuple))
def test_networks_are_read_back_as_they_were_written(written):
    assert parse_networks(", ".join(map(str, written))) == written


@no_deadline
@given(networks(), st.data())
def test_every_address_of_an_allowed_network_is_allowed(network, data):
    address = network[data.draw(st.integers(0, network.num_addresses - 1))]
    assume(address.version == 4 or address.ipv4_mapped is None)  # ::/0 holds them, but they are IPv4
    policy = AddressPolicy((network,))
    assert policy.refusal(address, "http") is None
    if address.version == 4:
        assert policy.refusal(mapped(address), "http") is None


@no_deadline
@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789abcdef.:%/, "), st.characters())))
def test_bad_networks_raise_nothing_but_input_errors(text):
    try:
        read = parse_networks(text)
    except InputError:
        return
    assert parse_networks(" ".join(map(str, read))) == read
