"""An outbound proxy, as a value: what DISPATCHER_PROXY_URL says.

Two kinds: `http` (a tunnel by CONNECT, RFC 9110, 9.3.6) and `socks5` (RFC 1928). Both are handed an address that the guard has judged, never a
name; hence no `socks5h`, which would have the proxy resolve names behind the guard's back. The URL holds a password, so no message quotes it.
"""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote, urlsplit

from dispatcher.errors import InputError

EXAMPLE = "http://user:password@proxy.example.com:3128 or socks5://proxy.example.com:1080"
CREDENTIAL_BYTES_MAX = 255  # RFC 1929, 2


@dataclass(frozen=True, slots=True)
class Proxy:
    """`host` is a name or an address, without brackets. Without credentials both are empty."""

    scheme: Literal["http", "socks5"]
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


def parse_proxy(text: str) -> Proxy:
    """Read a proxy's URL; raise InputError with the trouble and its remedy."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:  # brackets that don't match, a port that is no number
        raise InputError(f"this is not a proxy's URL; write {EXAMPLE}") from exc
    scheme: Literal["http", "socks5"]
    if parts.scheme == "http":
        scheme = "http"
    elif parts.scheme == "socks5":
        scheme = "socks5"
    elif parts.scheme == "socks5h":
        raise InputError("with socks5h the proxy would resolve names, which the address guard must see; write socks5")
    else:
        raise InputError(f"a proxy's URL begins with http:// or socks5://; write {EXAMPLE}")
    if not parts.hostname or not port or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise InputError(f"a proxy's URL is a scheme, a host and a port, with or without credentials; write {EXAMPLE}")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if bool(user) != bool(password):
        raise InputError(f"a proxy's credentials are a user and a password; write {EXAMPLE}")
    if ":" in user:  # RFC 7617, 2: it would end the name
        raise InputError("a proxy's user name must not contain a colon")
    if max(len(user.encode()), len(password.encode())) > CREDENTIAL_BYTES_MAX:
        raise InputError(f"a proxy's user name and password may have {CREDENTIAL_BYTES_MAX} bytes each")
    if scheme == "socks5" and not (user + password).isascii():  # RFC 1929 names no encoding
        raise InputError("a socks5 proxy's user name and password must be ASCII")
    return Proxy(scheme, parts.hostname, port, user, password)
