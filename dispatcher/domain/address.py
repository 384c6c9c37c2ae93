"""Which addresses a delivery may be sent to: the guard against server-side request forgery, as one table.

Customers choose the URLs, and our process stands inside a network that they can't reach; so only globally reachable
unicast addresses pass. `SPECIAL` lists what is anything else. An address is judged where it is connected to, after
the resolver and once per connection: a name that changes its mind between two look-ups gains nothing.

The table is our own because `ipaddress.is_global` answers another question: it passes multicast, 6to4, 64:ff9b:1::/48
and 3fff::/20. It follows the IANA IPv4 and IPv6 Special-Purpose Address Registries of 2025-10-09, but refuses each
listed block whole, also where the registry says "globally reachable": those entries are anycast services (PCP, TURN,
AMT, AS112) answered by whichever box is nearest, perhaps our own gateway, or identifiers that aren't hosts (ORCHIDv2,
drones). No receiver of webhooks lives there.

An IPv6 address that carries an IPv4 address is no way around the table:

- v4-mapped (::ffff:a.b.c.d): the kernel speaks IPv4 to a.b.c.d, so everywhere here it *is* a.b.c.d;
- NAT64 (64:ff9b::/96): a translator passes it on to the inner address, so the table must pass that too;
- v4-compatible, 6to4, Teredo and local-use NAT64: obsolete, or ending somewhere we can't judge; refused whole.

A NAT64 prefix of an operator's own (RFC 6052, 2.2) looks like any other address; who runs one must filter at the
translator.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network

from dispatcher.errors import InputError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class ReceiverSite:
    """The built-in receiver, from settings alone. Its URLs are scheme://host:port + `path` + a token, exactly; they are requested as `mount` +
    the token, at `address` and `listen_port`, a literal address: nothing is looked up for them."""

    scheme: str
    host: str
    port: int
    path: str  # /webhooks/r/
    mount: str  # the same as requests arrive
    address: str
    listen_port: int


PLAIN_HTTP = "plain http is only allowed to DISPATCHER_ALLOWED_NETWORKS, or with DISPATCHER_ALLOW_HTTP"


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Judge addresses by the table, with the operator's exceptions.

    An address in `allowed_networks` may be connected to whatever the table says, cloud metadata included: the operator
    knows that network. `allow_http` lifts the ban on plain http, not the table. `ports` are those that a URL may have,
    anywhere: a POST can be made to look like what a mail server or a database reads. `receiver` is the one URL that isn't judged
    by its address (domain/url.py).
    """

    allowed_networks: tuple[Network, ...] = ()
    allow_http: bool = False
    ports: tuple[range, ...] = (range(1, 65_536),)
    receiver: ReceiverSite | None = None

    def refusal(self, address: str | Address, scheme: str = "https") -> str | None:
        """Say why `address` may not be connected to, as a fragment of a sentence; None if it may."""
        try:
            address = ip_address(address)
        except ValueError:
            # A resolver's answer that isn't an address: nothing to connect to, so a refusal like any other.
            return f"{address!r} is not an IP address"
        if isinstance(address, IPv6Address):
            # Before the allowed networks: `in` ignores the zone, and a zone picks one of our own interfaces.
            if address.scope_id is not None:
                return f"{address} has a zone, which means something on one machine only (RFC 4007)"
            if address.ipv4_mapped is not None:
                address = address.ipv4_mapped

        if any(address in network for network in self.allowed_networks):
            return None
        reason = _special(address)
        if reason is None and scheme != "https" and not self.allow_http:
            return PLAIN_HTTP
        return reason


def is_literal(host: str) -> bool:
    """Tell whether a host is an address, not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def parse_networks(text: str) -> tuple[Network, ...]:
    """Read networks separated by commas or white space, e.g. "10.1.0.0/16, fd00:1::/48".

    A bare address stands for itself. Raise InputError on the first that isn't a network.
    """
    return tuple(_network(part) for part in re.split(r"[\s,]+", text) if part)


def parse_ports(text: str) -> tuple[range, ...]:
    """Read ports and ranges of ports separated by commas or white space, e.g. "443, 8000-8999".

    Raise InputError on the first that isn't one, or if there is none."""
    ports = tuple(_ports(part) for part in re.split(r"[\s,]+", text) if part)
    if not ports:
        raise InputError("no port is allowed, so nothing could be sent: write 443, or 1-65535 for all")
    return ports


_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def _ports(part: str) -> range:
    found = _PORTS.fullmatch(part)
    low, high = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 1 <= low <= high <= 65_535:
        raise InputError(f"{part!r} is neither a port nor a range of ports: write 443 or 8000-8999, from 1 to 65535")
    return range(low, high + 1)


# First match wins, so a narrower row stands before the block around it. A name completes the sentence "<address> is …".
SPECIAL: tuple[tuple[Network, str, str], ...] = tuple(
    (ip_network(cidr), name, source)
    for cidr, name, source in (
        # Metadata services hand credentials to whoever asks. Only Azure's lies outside every block below; the others
        # are here for a clearer sentence.
        ("168.63.129.16/32", "a cloud metadata service", "Azure WireServer"),
        ("169.254.169.254/32", "a cloud metadata service", "AWS, Azure, Google Cloud"),
        ("100.100.100.200/32", "a cloud metadata service", "Alibaba Cloud"),
        ("fd00:ec2::254/128", "a cloud metadata service", "AWS"),
        # IPv4
        ("0.0.0.0/8", "this network", "RFC 791"),
        ("10.0.0.0/8", "private", "RFC 1918"),
        ("100.64.0.0/10", "shared address space", "RFC 6598"),
        ("127.0.0.0/8", "loopback", "RFC 1122"),
        ("169.254.0.0/16", "link-local", "RFC 3927"),
        ("172.16.0.0/12", "private", "RFC 1918"),
        ("192.0.0.0/24", "reserved for IETF protocols", "RFC 6890"),
        ("192.0.2.0/24", "for documentation", "RFC 5737"),
        ("192.31.196.0/24", "an AS112 name server", "RFC 7535"),
        ("192.52.193.0/24", "a multicast tunnel relay", "RFC 7450"),
        ("192.88.99.0/24", "a 6to4 relay", "RFC 7526"),
        ("192.168.0.0/16", "private", "RFC 1918"),
        ("192.175.48.0/24", "an AS112 name server", "RFC 7534"),
        ("198.18.0.0/15", "for benchmarks", "RFC 2544"),
        ("198.51.100.0/24", "for documentation", "RFC 5737"),
        ("203.0.113.0/24", "for documentation", "RFC 5737"),
        ("224.0.0.0/4", "multicast", "RFC 5771"),
        ("255.255.255.255/32", "the broadcast address", "RFC 919"),
        ("240.0.0.0/4", "reserved", "RFC 1112"),
        # IPv6. Outside 2000::/3 everything is refused anyway; these rows only give it its name.
        ("::/128", "the unspecified address", "RFC 4291"),
        ("::1/128", "loopback", "RFC 4291"),
        ("::/96", "an IPv4-compatible address", "RFC 4291"),
        ("64:ff9b:1::/48", "local-use NAT64", "RFC 8215"),
        ("100::/64", "the discard prefix", "RFC 6666"),
        ("100:0:0:1::/64", "the dummy prefix", "RFC 9780"),
        ("5f00::/16", "a segment routing id", "RFC 9602"),
        ("fc00::/7", "unique-local", "RFC 4193"),
        ("fe80::/10", "link-local", "RFC 4291"),
        ("fec0::/10", "site-local", "RFC 3879"),
        ("ff00::/8", "multicast", "RFC 4291"),
        # IPv6, inside 2000::/3.
        ("2001::/32", "Teredo", "RFC 4380"),
        ("2001::/23", "reserved for IETF protocols", "RFC 2928"),
        ("2001:db8::/32", "for documentation", "RFC 3849"),
        ("2002::/16", "6to4", "RFC 3056"),
        ("2620:4f:8000::/48", "an AS112 name server", "RFC 7534"),
        ("3fff::/20", "for documentation", "RFC 9637"),
    )
)

_GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA has opened for allocation to hosts
_NAT64 = IPv6Network("64:ff9b::/96")


def _special(address: Address) -> str | None:
    """Say what `address` is if it isn't globally reachable unicast."""
    for network, name, source in SPECIAL:
        if address in network:
            return f"{address} is {name} ({network}, {source})"
    if address in _NAT64:
        inner = _special(IPv4Address(int(address) & 0xFFFF_FFFF))
        return None if inner is None else f"{address} is NAT64 ({_NAT64}, RFC 6052), and {inner}"
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return f"{address} is outside the global unicast space ({_GLOBAL_UNICAST}, RFC 4291)"
    return None


# `ipaddress` also takes zones, net masks and host masks; a mask read the wrong way round would open another network.
_CIDR = re.compile(r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?")


def _network(part: str) -> Network:
    try:
        if not _CIDR.fullmatch(part):
            raise ValueError(part)
        interface = ip_interface(part)
    except ValueError as exc:
        raise InputError(
            f"{part!r} is not a network. Write an address and a prefix length, e.g. 10.1.0.0/16 or fd00:1::/48."
        ) from exc
    network = interface.network
    if interface.ip != network.network_address:
        raise InputError(f"{part!r} has bits set after its prefix. Write {network}, or {interface.ip} alone.")
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and (mapped := network.network_address.ipv4_mapped):
        # It would never match: a v4-mapped address is judged as the IPv4 address it stands for.
        raise InputError(f"{part!r} is a v4-mapped network. Write {mapped}/{network.prefixlen - 96}.")
    return network
