"""`dispatcher verify`: is this request signed by that key? For who has a request in files, and a receiver that refuses it."""

import base64
import binascii
import re
import sys
import time
from pathlib import Path

import click

from dispatcher.cli.common import as_json, print_json, say
from dispatcher.cli.shape import secret_of
from dispatcher.domain.signing import PUBLIC_PREFIX, SECRET_PREFIX, secret_key
from dispatcher.domain.verify import MISSING, OLD, TOLERANCE_S, VALID, WRONG, judge
from dispatcher.errors import InputError

BODY_BYTES_MAX = 4_194_304
HEADERS_BYTES_MAX = 65_536
WORDS = {
    VALID: "valid: the signature fits",
    MISSING: "missing: a request has the headers webhook-id, webhook-timestamp and webhook-signature; a proxy may have taken them out",
    OLD: f"old: the signature fits, but webhook-timestamp is more than {TOLERANCE_S} s from now; --any-time looks past that",
    WRONG: "wrong: no signature fits. It is over the body's bytes as they came, not parsed and written again; and the secret may be another's",
}
_FILE = click.Path(dir_okay=False, allow_dash=True, path_type=Path)


@click.command()
@click.option(
    "--secret",
    "keys",
    multiple=True,
    required=True,
    help="Signing secret (whsec_…) or public key (whpk_…); @FILE or @- reads it. Repeat it.",
)
@click.option(
    "--headers",
    "headers_file",
    type=_FILE,
    help="File with the request's headers, one 'Name: value' a line, as `curl -i` or a log has them.",
)
@click.option("--header", "lines", multiple=True, help="One header, 'Name: value'. Repeat it.")
@click.option("--any-time", is_flag=True, help="Whatever webhook-timestamp says.")
@click.argument("body", type=_FILE)
@as_json
def verify(
    keys: tuple[str, ...], headers_file: Path | None, lines: tuple[str, ...], any_time: bool, body: Path, json_out: bool
) -> None:
    """Tell whether a request's signature fits: BODY is the file with its body, - standard input.

    Exit status 0: it does; 1: it doesn't, and why.

    \b
    dispatcher verify --secret @secret.txt --headers headers.txt body.json
    """
    given = [secret_of(key) for key in keys]
    secrets = [key for key in given if key.startswith(SECRET_PREFIX)]
    public_keys = [key for key in given if key not in secrets]
    for key in secrets:
        secret_key(key)  # says what is wrong with it
    for key in public_keys:
        _check_public_key(key)
    text = "\n".join([*lines, "" if headers_file is None else _read(headers_file, HEADERS_BYTES_MAX).decode("latin-1")])
    headers = _headers(text)
    sent = headers.get("webhook-timestamp", "")
    is_time = re.fullmatch(r"[0-9]{1,12}", sent) is not None
    now_s = int(sent) if any_time and is_time else time.time()
    verdict = judge(headers, _read(body, BODY_BYTES_MAX), secrets, public_keys, now_s)
    if json_out:
        print_json({"verdict": verdict, "webhook_id": headers.get("webhook-id"), "said": WORDS[verdict]})
    else:
        say(WORDS[verdict])
    if verdict != VALID:
        raise SystemExit(1)


def _headers(text: str) -> dict[str, str]:
    """Return headers by lower-case names; a line without a colon, such as the request line, is none."""
    headers = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers


def _check_public_key(key: str) -> None:
    try:
        right = key.startswith(PUBLIC_PREFIX) and len(base64.b64decode(key[len(PUBLIC_PREFIX) :], validate=True)) == 32
    except (binascii.Error, ValueError):
        right = False
    if not right:
        raise InputError(f"a key is {SECRET_PREFIX}… or {PUBLIC_PREFIX}… of 32 bytes in base64")


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as exc:
        raise InputError(f"{path} can't be read: {exc}") from exc
    if len(content) > bytes_max:
        raise InputError(f"{path} is longer than {bytes_max} bytes")
    return content
