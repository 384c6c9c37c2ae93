"""What is particular about the requests to one endpoint: who signs and how, what they say beside the event, what of the event they say.

An endpoint's configuration has these as plain fields (`SHAPE`: shown as they are; `CREDENTIALS`: kept encrypted, and never shown again once
they are saved). `checked` brings them into their one form or refuses them with a sentence; `Shape` is what the engine makes of them.

Everything that is the same in each request, headers and authentication, goes into the endpoint's ready-made head; what depends on the event
is in `Shape.is_plain`'s absence only, so that an endpoint that asks for none of it costs nothing.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from dispatcher.domain.client import ClientIdentity, check_identity, describe_certificate
from dispatcher.domain.pointer import check_pointers
from dispatcher.domain.signing import SCHEMES
from dispatcher.domain.url import Target
from dispatcher.errors import InputError

SHAPE: dict[str, Any] = {
    "signing": "v1",
    "body_format": "envelope",
    "omit": [],
    "extra_signature": None,
}  # field → default
CREDENTIALS: dict[str, Any] = {
    "headers": {}, "basic": None, "bearer": None, "client_certificate": None, "client_key": None, "extra_signature_key": None,
}  # fmt: skip
SIGNINGS = (*SCHEMES, ",".join(SCHEMES))
BODY_FORMATS = ("envelope", "payload")
HIDDEN = "(hidden)"

HEADERS_MAX, HEADER_NAME_CHARS_MAX, HEADERS_CHARS_MAX = 20, 64, 4_096
CREDENTIAL_CHARS_MAX = 2_048
# What we say ourselves; what belongs to the connection and not to the request (RFC 9110, 7.6.1); what would say something untrue of the body;
# what a proxy before the receiver says of a client's address, which a receiver believes; and whose trace it is, which the producer says.
REFUSED_HEADERS = frozenset((
    "host", "content-type", "content-length", "content-encoding", "user-agent", "x-attempt", "accept-encoding", "expect",
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings",
    "forwarded", "via", "x-real-ip", "traceparent", "tracestate",
))  # fmt: skip
REFUSED_PREFIXES = ("webhook-", "proxy-", "x-forwarded-", "sec-")

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_VISIBLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, 2.1


@dataclass(frozen=True, slots=True)
class ExtraSignature:
    """A signature that some receiver has always checked: `hex` of HMAC-SHA256 over the body, behind a prefix; or `timestamped`,
    `t=…,v1=<hex of HMAC-SHA256 over "t.body">`. The key is the text as it stands."""

    form: str
    header: str
    prefix: str
    key: str = field(repr=False)

    def value(self, timestamp: bytes, body: bytes) -> bytes:
        key = self.key.encode()
        if self.form == "hex":
            return self.prefix.encode() + hmac.digest(key, body, hashlib.sha256).hex().encode()
        signed = hmac.digest(key, b"%b.%b" % (timestamp, body), hashlib.sha256).hex().encode()
        return b"t=%b,v1=%b" % (timestamp, signed)


@dataclass(frozen=True, slots=True)
class Shape:
    """`headers` are those of every request, authentication among them; `pointers` leave fields of `data` out."""

    signing: str = "v1"
    bare: bool = False
    pointers: tuple[str, ...] = ()
    extra_signature: ExtraSignature | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    identity: ClientIdentity | None = None

    @property
    def is_plain(self) -> bool:
        """Tell whether a request is the envelope with the standard's signature."""
        return not (self.bare or self.pointers or self.extra_signature)

    def aimed(self, target: Target) -> Target:
        """Return the target with the origin that connections of this identity are kept by."""
        if self.identity is None:
            return target
        return replace(target, origin=target.origin._replace(identity=self.identity))


PLAIN = Shape()


def make_shape(config: Mapping[str, Any]) -> Shape:
    """Make the shape of a configuration that has been checked; fields that it lacks are at their defaults."""
    given = {name: value for name, value in config.items() if name in SHAPE or name in CREDENTIALS}
    full = SHAPE | CREDENTIALS | given
    headers = sorted(full["headers"].items())
    if full["basic"] is not None:
        headers.append(("authorization", "Basic " + base64.b64encode(full["basic"].encode()).decode()))
    elif full["bearer"] is not None:
        headers.append(("authorization", f"Bearer {full['bearer']}"))
    extra = None
    if full["extra_signature"] is not None:
        form, header, prefix = _read_signature(full["extra_signature"])
        extra = ExtraSignature(form, header, prefix, full["extra_signature_key"])
    certificate, key = full["client_certificate"], full["client_key"]
    return Shape(
        signing=full["signing"],
        bare=full["body_format"] == "payload",
        pointers=tuple(full["omit"]),
        extra_signature=extra,
        headers=tuple(headers),
        identity=None if certificate is None else ClientIdentity.of(certificate, key),
    )


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return these fields of a configuration in their one form, its `url` being in its own; raise InputError with the trouble."""
    fields = {name: config.get(name, default) for name, default in (SHAPE | CREDENTIALS).items()}
    with _blamed("signing"):
        if fields["signing"] not in SIGNINGS:
            raise InputError(f"signing is {fields['signing']!r}; it must be one of {', '.join(map(repr, SIGNINGS))}")
    with _blamed("body_format"):
        if fields["body_format"] not in BODY_FORMATS:
            raise InputError(f"body_format is {fields['body_format']!r}; it must be envelope or payload")
    with _blamed("omit"):
        fields["omit"] = list(check_pointers(fields["omit"]))
    with _blamed("headers"):
        fields["headers"] = _check_headers(fields["headers"])
    with _blamed("basic" if fields["bearer"] is None else "bearer"):
        _check_authentication(fields)
    with _blamed("extra_signature"):
        _check_signature(fields)
    with _blamed("client_certificate"):
        _check_client(fields, str(config["url"]))
    return fields


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Say which field is to blame, where the refusal doesn't say it itself."""
    try:
        yield
    except InputError as exc:
        exc.field = exc.field or name
        raise


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the changes. Headers are changed one by one, because their values can't be read back: None takes one out.
    What is given in place of something else takes that out too."""
    full = {**config, **changes}
    if changes.get("headers") is not None:
        both = {**config.get("headers", {}), **{name.lower(): value for name, value in changes["headers"].items()}}
        full["headers"] = {name: value for name, value in both.items() if value is not None}
    elif "headers" in changes:
        full["headers"] = {}
    for given, other in (("basic", "bearer"), ("bearer", "basic")):
        if changes.get(given) is not None and changes.get(other) is None:
            full[other] = None
    if "extra_signature" in changes and changes["extra_signature"] is None:
        full["extra_signature_key"] = None
    if "client_certificate" in changes and changes["client_certificate"] is None:
        full["client_key"] = None
    return full


def shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as it may be shown: names, never values, of what is secret."""
    full = dict(config)
    for name in CREDENTIALS.keys() & full.keys():
        value = full[name]
        if name == "headers":
            full[name] = dict.fromkeys(sorted(value), HIDDEN)
        elif name == "client_certificate":
            full[name] = None if value is None else describe_certificate(value)
        else:
            full[name] = None if value is None else HIDDEN
    return full


def redacted(request: bytes, shape: Shape) -> bytes:
    """Return a request as it may be kept and shown: without the values of the endpoint's own headers."""
    head, end, body = request.partition(b"\r\n\r\n")
    hidden = {name.encode() for name, _ in shape.headers}
    lines = [
        line.partition(b": ")[0] + b": " + HIDDEN.encode() if line.partition(b": ")[0] in hidden else line
        for line in head.split(b"\r\n")
    ]
    return b"\r\n".join(lines) + end + body


def check_header_name(name: str) -> str:
    """Return a header's name in lower case, if an endpoint may have it. Raises InputError."""
    if not _TOKEN.fullmatch(name) or len(name) > HEADER_NAME_CHARS_MAX:
        raise InputError(
            f"{name!r} is not a header's name: use up to {HEADER_NAME_CHARS_MAX} letters, digits and - (no line breaks, nothing outside ASCII)"
        )
    name = name.lower()
    if name in REFUSED_HEADERS or name.startswith(REFUSED_PREFIXES):
        raise InputError(f"the header {name} is set by the dispatcher, or belongs to the connection; leave it out")
    return name


def _check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for given, value in headers.items():
        name = check_header_name(given)
        if name in result:
            raise InputError(f"the header {name} is given twice")
        _check_visible(value, f"the value of the header {name}")
        result[name] = value
    if len(result) > HEADERS_MAX:
        raise InputError(f"{len(result)} headers are more than {HEADERS_MAX}")
    if (size := sum(len(name) + len(value) for name, value in result.items())) > HEADERS_CHARS_MAX:
        raise InputError(f"the headers have {size} characters together; the most is {HEADERS_CHARS_MAX}")
    return dict(sorted(result.items()))


def _check_visible(text: Any, what: str) -> None:
    """Refuse what could end a header, or what receivers read differently. Never quotes it: it may be a secret."""
    if not isinstance(text, str) or not text:
        raise InputError(f"{what} must be a text that isn't empty")
    for position, character in enumerate(text, start=1):
        if not " " <= character <= "~":
            raise InputError(
                f"{what} has U+{ord(character):04X} as character {position}; only printable ASCII can go into a header, "
                "no line breaks, NUL or tabs"
            )
    if not _VISIBLE.fullmatch(text):
        raise InputError(f"{what} begins or ends with a space, which would be lost on the way")


def _check_authentication(fields: dict[str, Any]) -> None:
    basic, bearer = fields["basic"], fields["bearer"]
    if basic is not None:
        user, colon, password = basic.partition(":")
        if not colon or not user or not password or not basic.isprintable() or len(basic) > CREDENTIAL_CHARS_MAX:
            raise InputError(
                f"basic authentication is user:password, printable, at most {CREDENTIAL_CHARS_MAX} characters"
            )
    if bearer is not None and (not _BEARER.fullmatch(bearer) or len(bearer) > CREDENTIAL_CHARS_MAX):
        raise InputError(
            f"a bearer token has 1 to {CREDENTIAL_CHARS_MAX} letters, digits and - . _ ~ + / =; for another kind use a header"
        )
    ways = [name for name in ("basic", "bearer") if fields[name] is not None]
    ways += ["the header authorization"] if "authorization" in fields["headers"] else []
    if len(ways) > 1:
        raise InputError(f"{' and '.join(ways)} are both given: a request has one authorization")


def _check_signature(fields: dict[str, Any]) -> None:
    if fields["extra_signature"] is None:
        if fields["extra_signature_key"] is not None:
            raise InputError(
                "extra_signature_key means nothing without extra_signature; give both", field="extra_signature_key"
            )
        return
    form, header, prefix = _read_signature(fields["extra_signature"])
    header = check_header_name(header)
    if header in fields["headers"] or header == "authorization":
        raise InputError(f"the header {header} can't be a signature and something else")
    fields["extra_signature"] = f"{form}:{header}" + (f":{prefix}" if prefix else "")
    if fields["extra_signature_key"] is None:
        fields["extra_signature_key"] = secrets.token_hex(32)
    with _blamed("extra_signature_key"):
        _check_visible(fields["extra_signature_key"], "the extra signature's key")
    if not 8 <= len(fields["extra_signature_key"]) <= 256:
        raise InputError("the extra signature's key has 8 to 256 characters", field="extra_signature_key")


_SIGNATURE = re.compile(r"(?:(hex):([^:]+)(?::([!-9;-~]{1,32}))?|(timestamped):([^:]+))")


def _read_signature(text: Any) -> tuple[str, str, str]:
    """Cut `hex:HEADER`, `hex:HEADER:PREFIX` or `timestamped:HEADER` into form, header and prefix."""
    found = _SIGNATURE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InputError(
            f"{text!r} is not a signature: write hex:HEADER, hex:HEADER:PREFIX or timestamped:HEADER, such as hex:x-hub-signature-256:sha256="
        )
    return found[1] or found[4], found[2] or found[5], found[3] or ""


def _check_client(fields: dict[str, Any], url: str) -> None:
    certificate, key = fields["client_certificate"], fields["client_key"]
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise InputError("a client certificate and its key belong together; give both")
    if not url.startswith("https:"):
        raise InputError("a client certificate means nothing without TLS; use an https URL")
    check_identity(certificate, key)


__all__ = [
    "CREDENTIALS", "HIDDEN", "PLAIN", "SHAPE", "ExtraSignature", "Shape", "checked", "make_shape", "merged", "redacted", "shown",
]  # fmt: skip
