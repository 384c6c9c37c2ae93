"""The options of `endpoint create` and `update` that shape an endpoint's requests, and how `endpoint show` tells of them.

What is secret may be given as `@FILE`, or `@-` for standard input: an argument can be read by everybody on the machine, and stays in the
shell's history.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dispatcher.domain.shape import BODY_FORMATS, SHAPE, SIGNINGS, shown
from dispatcher.errors import InputError, SealedError
from dispatcher.store.endpoint import EndpointView

_FROM_FILE = " @FILE or @- reads it."
_PEM = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)

UNSET: dict[str, dict[str, Any]] = {  # what `--unset` takes out → the fields, at their defaults
    "headers": {"headers": None},
    "auth": {"basic": None, "bearer": None},
    "client-cert": {"client_certificate": None, "client_key": None},
    "extra-signature": {"extra_signature": None, "extra_signature_key": None},
    "omit": {"omit": []},
}


def shape_options(command: Any) -> Any:
    for option in reversed(
        (
            click.option(
                "--signing",
                type=click.Choice(SIGNINGS),
                help="Signature schemes: v1 (HMAC), v1a (Ed25519), or both. [default: v1]",
            ),
            click.option(
                "--body",
                "body_format",
                type=click.Choice(BODY_FORMATS),
                help="The envelope, or the producer's payload alone. [default: envelope]",
            ),
            click.option(
                "--omit", multiple=True, help="JSON pointer to a field of data to leave out: /message/text. Repeat it."
            ),
            click.option(
                "--header",
                "headers",
                multiple=True,
                help="'Name: value' of a header of its own. Repeat it." + _FROM_FILE,
            ),
            click.option("--basic", help="Basic authentication, user:password." + _FROM_FILE),
            click.option("--bearer", help="Bearer token." + _FROM_FILE),
            click.option("--client-cert", type=_PEM, help="PEM chain of a client certificate (mTLS), ours first."),
            click.option("--client-key", type=_PEM, help="PEM key of the client certificate, without a passphrase."),
            click.option(
                "--extra-signature",
                help="A signature that the receiver knows already: hex:HEADER, hex:HEADER:PREFIX or timestamped:HEADER.",
            ),
            click.option("--extra-signature-key", help="Its key, as it stands. [default: a new one]" + _FROM_FILE),
        )
    ):
        command = option(command)
    return command


def unset_options(command: Any) -> Any:
    for option in (
        click.option("--unset", multiple=True, type=click.Choice(list(UNSET)), help="Take these out. Repeat it."),
        click.option("--remove-header", "removed", multiple=True, help="Take this header out. Repeat it."),
    ):
        command = option(command)
    return command


def shape_changes(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options above out of `given` and return the configuration that they are."""
    changes: dict[str, Any] = {}
    for what in given.pop("unset", ()):
        changes |= UNSET[what]
    removed = dict.fromkeys(name.lower() for name in given.pop("removed", ()))
    headers = removed | dict(_header(text) for text in given.pop("headers"))
    if headers:
        if "headers" in changes:
            raise InputError(
                "--unset headers takes all of them out; leave out --header and --remove-header, or use --remove-header for each"
            )
        changes["headers"] = headers
    for name in ("basic", "bearer", "extra_signature_key"):
        if (value := given.pop(name)) is not None:
            changes[name] = secret_of(value)
    for option, name in (("client_cert", "client_certificate"), ("client_key", "client_key")):
        if (path := given.pop(option)) is not None:
            changes[name] = _read(path)
    if omit := given.pop("omit"):
        changes["omit"] = list(omit)
    for name in SHAPE:
        if (value := given.pop(name, None)) is not None:
            changes[name] = value
    return changes


def described(view: EndpointView, *, reveal: bool) -> Iterator[tuple[str, str]]:
    """Yield (label, value) lines of what isn't as usual; what is secret is hidden, but with `reveal` the key that the receiver needs too."""
    for name, usual in SHAPE.items():
        value = view.config[name]
        if value != usual:
            yield name, ",".join(value) if isinstance(value, list) else value
    try:
        credentials = view.credentials
    except SealedError as exc:
        yield "credentials", str(exc)
        return
    visible = shown(credentials)
    for name, value in visible.pop("headers").items():
        yield "header", f"{name}: {value}"
    if reveal:
        visible["extra_signature_key"], visible["extra_signature_key of the edit"] = view.extra_keys
    for name, value in visible.items():
        if value is not None:
            yield name, value


def _header(text: str) -> tuple[str, str]:
    name, colon, value = secret_of(text).partition(":")
    if not colon:
        raise InputError("a header is given as 'Name: value'")  # not quoted: it may be a value
    return name.strip().lower(), value.strip(" ")


def secret_of(text: str) -> str:
    """Return the text, or what is in the file that it names; a line break at its end belongs to the file."""
    return _read(Path(text[1:])).removesuffix("\n").removesuffix("\r") if text.startswith("@") else text


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{path} can't be read: {exc}") from exc
