"""Mail, as values: the server that DISPATCHER_SMTP_URL names, and what an address is.

The URL holds a password, so no message quotes it. How it is protected is in its scheme, and there is no guessing: whoever is between us and the
server can't talk us out of TLS.
"""

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote, urlsplit

from dispatcher.errors import InputError

EXAMPLE = "smtp://user:password@mail.example.com:587"
ADDRESS_CHARS_MAX = 254  # RFC 5321, 4.5.3.1.3: a path of 256 with its brackets
Security = Literal["starttls", "tls", "plain"]
SCHEMES: dict[str, tuple[Security, int]] = {
    "smtp": ("starttls", 587),  # asked for and insisted on
    "smtps": ("tls", 465),
    "smtp+plain": ("plain", 25),  # for a relay on this machine
}

# A part of RFC 5321's that no header, log or template can take for something else: no quotes, no comments, no route; names in ASCII.
_ADDRESS = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*"
)


@dataclass(frozen=True, slots=True)
class MailServer:
    host: str
    port: int
    security: Security
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


def parse_smtp(text: str) -> MailServer:
    """Read a mail server's URL; raise InputError with the trouble."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise InputError(f"this is not a mail server's URL; write {EXAMPLE}") from exc
    if parts.scheme not in SCHEMES or not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
        raise InputError(f"write {EXAMPLE} (STARTTLS), smtps://… (TLS), or smtp+plain://… (neither)")
    if (parts.username is None) != (parts.password is None):
        raise InputError("a mail server wants both a user and a password, or neither")
    security, usual_port = SCHEMES[parts.scheme]
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return MailServer(parts.hostname, port or usual_port, security, user, password)


def check_address(text: str) -> str:
    """Return a mail address, or refuse it."""
    if len(text) > ADDRESS_CHARS_MAX or not _ADDRESS.fullmatch(text):
        raise InputError(
            "this is no mail address of the plain kind, such as ops@example.com (names in ASCII)", field="address"
        )
    return text
