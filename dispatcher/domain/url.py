"""What an endpoint's URL may be, and the parts of it that a request needs.

Parsers that disagree about a URL are how a guard is walked around, so there is one reading here: RFC 3986, and
whatever another parser, a resolver or a person could take for something else is refused with its remedy. Three
families of that:

- invisible or ambiguous characters: white space, controls, format characters, backslash, user names, percent signs in
  the host;
- IPv4 in disguise: resolvers take 0177.0.0.1, 0x7f.1, 2130706433, ::ffff:127.0.0.1 and full-width digits for
  127.0.0.1. As in the WHATWG URL standard a host whose last label is a number is an IPv4 address; unlike there, only
  its usual spelling is accepted;
- two names for one host: the result is lower-case ASCII (A-labels, RFC 5891) without a trailing dot, without the
  default port.

Path and query stay as they were given, to the byte: receivers route by them. They may hold secrets, as may a user
name; hence no message quotes more than the host. Nothing is resolved here: a name is judged when its addresses are
known, a literal address right away. Parsing the `url` of a result gives that result again.

The built-in receiver is the one exception, and a narrow one. A URL is its when scheme, host, port and path are, to the
character, what settings say, and the path ends in a token and nothing else. Its origin has a host that no URL can have, so
that no other URL shares its connections; the request target is the receiver's; and the transport goes to the listener's
address, which is a setting too. So all that a customer can do with it is to POST to a receiver, which anybody can.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

import idna

from dispatcher.domain.address import Address, AddressPolicy, ReceiverSite
from dispatcher.domain.client import ClientIdentity
from dispatcher.errors import InputError

URL_CHARS_MAX = 2048  # what common receivers and proxies take as a whole; the request head has its own bound
HOST_CHARS_MAX = 253  # RFC 1035, 2.3.4: 255 bytes on the wire, which is 253 characters without the trailing dot
DEFAULT_PORTS = {"https": 443, "http": 80}
RECEIVER_HOST = "(receiver)"  # of the built-in receiver's origin
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # of a receiver: 256 random bits


class Origin(NamedTuple):
    """What a connection is made to and as whom, and shared by. `host` is lower-case ASCII; an IPv6 address has no brackets here.

    A tuple, because it is looked up for each POST and a tuple hashes in C.
    """

    scheme: str
    host: str
    port: int
    identity: ClientIdentity | None = None  # the certificate that we show


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in its one spelling, cut up for a request.

    `request_target` is path and query for the request line, at least "/"; `host_header` has brackets around IPv6, and
    the port if it isn't the default. `address` is set if the host is a literal address.
    """

    url: str
    origin: Origin
    request_target: str
    host_header: str
    address: Address | None


def parse_url(text: object, policy: AddressPolicy) -> Target:
    """Read an endpoint's URL from outside; raise InputError with the trouble and its remedy."""
    scheme, authority, request_target = _split(_checked(text))
    own = None if policy.receiver is None else _own_receiver(scheme, authority, request_target, policy.receiver)
    if own is not None:
        return own
    place = _read_place(scheme, authority, policy)
    url = f"{scheme}://{place.host_header}{request_target}"
    if url != text:
        _checked(url)  # a "/" was added, or an international name grew, and what is stored must be readable again
    return Target(url, place.origin, request_target, place.host_header, place.address)


class _Place(NamedTuple):
    origin: Origin
    host_header: str
    address: Address | None


# Many endpoints are at few hosts, and a start reads all: with 100,000 on one address parse_url took 49 µs each, kept like this 9.
@lru_cache(maxsize=1024)
def _read_place(scheme: str, authority: str, policy: AddressPolicy) -> _Place:
    """Read and judge what a connection goes to."""
    _check_scheme(scheme, policy)
    host, address, port = _read_authority(authority, DEFAULT_PORTS[scheme])
    if not any(port in ports for ports in policy.ports):
        raise InputError(
            f"The URL's port {port} is refused: the operator allows {_said(policy.ports)} (DISPATCHER_ALLOWED_PORTS)."
        )
    if address is not None and (reason := policy.refusal(address, scheme)) is not None:
        raise InputError(f"The URL's address is refused: {reason}.")
    host_header = f"[{host}]" if isinstance(address, IPv6Address) else host
    if port != DEFAULT_PORTS[scheme]:
        host_header += f":{port}"
    return _Place(Origin(scheme, host, port), host_header, address)


def receiver_site(public_url: str, mount: str, address: str, listen_port: int) -> ReceiverSite:
    """Return where the built-in receiver is: what its URLs begin with, and where requests for them go."""
    scheme, authority, path = _split(_checked(public_url))
    host, _, port = _read_authority(authority, DEFAULT_PORTS[scheme])
    return ReceiverSite(scheme, host, port, path.rstrip("/") + "/r/", mount + "/r/", address, listen_port)


def receiver_url(site: ReceiverSite, token: str) -> str:
    """Return the URL of the receiver with this token."""
    return f"{site.scheme}://{_host_header(site)}{site.path}{token}"


def receiver_token(target: Target, site: ReceiverSite | None) -> str | None:
    """Return the token of the built-in receiver that a URL is of, if it is of one."""
    return target.request_target[len(site.mount) :] if site and target.origin.host == RECEIVER_HOST else None


def _own_receiver(scheme: str, authority: str, request_target: str, site: ReceiverSite) -> Target | None:
    token = request_target.removeprefix(site.path)
    if scheme != site.scheme or request_target != site.path + token or not TOKEN.fullmatch(token):
        return None
    host, _, port = _read_authority(authority, DEFAULT_PORTS[scheme])
    if (host, port) != (site.host, site.port):
        return None
    origin = Origin("http", RECEIVER_HOST, site.listen_port)
    return Target(receiver_url(site, token), origin, site.mount + token, _host_header(site), None)


def _host_header(site: ReceiverSite) -> str:
    host = f"[{site.host}]" if ":" in site.host else site.host
    return host if site.port == DEFAULT_PORTS[site.scheme] else f"{host}:{site.port}"


def _said(ports: tuple[range, ...]) -> str:
    return ", ".join(str(r.start) if len(r) == 1 else f"{r.start} to {r.stop - 1}" for r in ports)


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise InputError("The URL must be a string, e.g. https://example.com/hook.")
    if len(text) > URL_CHARS_MAX:
        raise InputError(f"The URL has {len(text)} characters; the most is {URL_CHARS_MAX}.")
    # Not printable: controls, separators, surrogates, and what hides or turns the text round (U+200B, U+202E).
    if text.isprintable() and " " not in text and "\\" not in text:
        return text
    position, character = next((n, c) for n, c in enumerate(text, start=1) if c in " \\" or not c.isprintable())
    raise InputError(
        f"The URL's character {position} is U+{ord(character):04X}. "
        "White space, control characters and backslashes must be percent-encoded or removed."
    )


# RFC 3986, appendix B, for URLs that have an authority. The fragment is matched only to be left out: it is never sent.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?:#.*)?")


def _split(text: str) -> tuple[str, str, str]:
    """Cut into lower-case scheme, authority and request target."""
    match = _URL.fullmatch(text)
    if match is None:
        raise InputError("This is not a URL. Write it in full, e.g. https://example.com/hook.")
    rest = match["rest"]
    if not rest.isascii():
        raise InputError("The URL's path or query has a character outside ASCII: percent-encode it, e.g. %C3%BC for ü.")
    return match["scheme"].lower(), match["authority"], rest if rest.startswith("/") else "/" + rest


def _check_scheme(scheme: str, policy: AddressPolicy) -> None:
    if scheme not in DEFAULT_PORTS:
        raise InputError(f"The URL's scheme is {scheme}; use https.")
    # With allowed networks a name may yet turn out to lie in one of them, so the address decides, when it is known.
    if scheme == "http" and not (policy.allow_http or policy.allowed_networks):
        raise InputError(
            "Plain http is refused: use https, "
            "or have the operator set DISPATCHER_ALLOWED_NETWORKS or DISPATCHER_ALLOW_HTTP."
        )


_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]*)(?::(?P<port>.*))?")
_PORT = re.compile(r"[0-9]{1,5}")


def _read_authority(authority: str, default_port: int) -> tuple[str, Address | None, int]:
    """Read host, literal address and port."""
    if "@" in authority:
        raise InputError("The URL has a user name or password: remove it. Receivers know us by the signature.")
    if not authority.startswith("[") and authority.count(":") > 1:
        raise InputError("The URL's host has colons: an IPv6 address needs brackets, e.g. https://[2600::1]/hook.")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise InputError("The URL's brackets don't enclose an IPv6 address, as in https://[2600::1]/hook.")
    port = default_port
    if match["port"] is not None:
        port = int(match["port"]) if _PORT.fullmatch(match["port"]) else 0
        if not 1 <= port <= 65535:
            raise InputError("The URL's port must be a number from 1 to 65535; leave it out for the default.")
    host, address = _read_host(match["host"])
    return host, address, port


# Underscores are no part of RFC 1123's host names, but of enough names inside companies, and resolvers take them.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")


def _read_host(text: str) -> tuple[str, Address | None]:
    if not text:
        raise InputError("The URL has no host. Write it in full, e.g. https://example.com/hook.")
    if "%" in text:
        raise InputError(
            "The URL's host has a percent sign: write the name itself, or an IPv6 address without its zone."
        )
    if text.startswith("["):
        return _read_ipv6(text)
    name = _to_ascii(text)
    if _ENDS_IN_NUMBER.fullmatch(name):
        ipv4 = _read_ipv4(name)
        if ipv4 is None:
            raise InputError(f"The URL's host {text!r} ends in a number, but is not an IPv4 address like 192.0.2.1.")
        if text != str(ipv4):
            raise InputError(_disguised(text, ipv4))
        return text, ipv4
    name = name.removesuffix(".")
    if not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise InputError(
            f"The URL's host {text!r} is not a name: its labels are 1 to 63 letters, digits, '-' or '_', "
            "separated by single dots and with no '-' at either end."
        )
    return name, None


def _read_ipv6(text: str) -> tuple[str, IPv6Address]:
    try:
        address = IPv6Address(text[1:-1])
    except ValueError as exc:
        raise InputError(f"The URL's host {text!r} is not an IPv6 address, as in https://[2600::1]/hook.") from exc
    if address.ipv4_mapped is not None:
        raise InputError(_disguised(text, address.ipv4_mapped))
    return str(address), address


def _disguised(text: str, ipv4: IPv4Address) -> str:
    return f"The URL's host {text!r} is an unusual spelling of {ipv4}: write {ipv4}."


def _to_ascii(text: str) -> str:
    """Bring a host name to lower-case ASCII; it may keep a trailing dot."""
    # Bounded before idna sees it, whose rules take more than linear time; idna bounds what it returns.
    if len(text.removesuffix(".")) > HOST_CHARS_MAX:
        raise InputError(f"The URL's host is longer than {HOST_CHARS_MAX} characters, the most that DNS can hold.")
    if text.isascii():
        return text.lower()
    try:
        return idna.encode(text, uts46=True, std3_rules=True).decode("ascii")
    except UnicodeError as exc:
        raise InputError(f"The URL's host {text!r} is not an international name that DNS can hold: {exc}.") from exc


_NUMBER = re.compile(r"0x(?P<hexadecimal>[0-9a-f]*)|0(?P<octal>[0-7]+)|(?P<decimal>0|[1-9][0-9]*)")


def _read_ipv4(name: str) -> IPv4Address | None:
    """Read an address as lenient resolvers do: 1 to 4 numbers, the last fills the rest (WHATWG URL, "IPv4 parser")."""
    matches = [_NUMBER.fullmatch(part) for part in name.removesuffix(".").split(".")]
    numbers = [_value(match) for match in matches if match is not None]
    if len(numbers) != len(matches) or len(numbers) > 4:
        return None
    *heads, last = numbers
    if any(head > 255 for head in heads) or last >= 256 ** (4 - len(heads)):
        return None
    return IPv4Address(last + sum(head << (24 - 8 * index) for index, head in enumerate(heads)))


def _value(match: re.Match[str]) -> int:
    if match["hexadecimal"] is not None:
        return int(match["hexadecimal"] or "0", 16)  # "0x" alone is 0 to the WHATWG parser
    if match["octal"] is not None:
        return int(match["octal"], 8)
    return int(match["decimal"])
