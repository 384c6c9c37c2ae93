"""Standard Webhooks 1.0.0, symmetric signatures: `v1,` + base64(HMAC-SHA256(secret, "id.timestamp.body")).

Secrets are `whsec_` + base64 of 24–64 random bytes. While a secret is being rotated each valid one signs, space-
delimited, newest first. Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-
webhooks.md
"""

import base64
import binascii
import hmac
import secrets
from collections.abc import Sequence

from dispatcher.errors import InputError

SECRET_PREFIX = "whsec_"  # noqa: S105 - the standard's prefix, not a secret
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64  # the standard's bounds


def new_secret() -> str:
    """Make a secret of 32 random bytes."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def secret_key(secret: str) -> bytes:
    """Return the key inside `whsec_…`. Raises InputError that says what is wrong, without showing the secret."""
    if not secret.startswith(SECRET_PREFIX):
        raise InputError(f"a signing secret starts with {SECRET_PREFIX}")
    try:
        key = base64.b64decode(secret[len(SECRET_PREFIX) :], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InputError(f"the signing secret after {SECRET_PREFIX} is not base64") from exc
    if not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise InputError(f"a signing secret holds {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, this one {len(key)}")
    return key


class Signer:
    """The secrets of one endpoint that sign now, prepared once.

    An HMAC object that has absorbed the key is copied per signature: 1.3 µs for 0.5 kB against 1.8 µs for hmac.digest(), which absorbs the key
    each time (CPython 3.11, OpenSSL 3.0).
    """

    __slots__ = ("_prepared",)

    def __init__(self, secret_texts: Sequence[str]) -> None:
        self._prepared = tuple(hmac.new(secret_key(secret), digestmod="sha256") for secret in secret_texts)

    def sign(self, event_id: bytes, timestamp: bytes, body: bytes) -> bytes:
        """Return the value of the `webhook-signature` header."""
        signatures = []
        for prepared in self._prepared:
            mac = prepared.copy()
            mac.update(b"%b.%b.%b" % (event_id, timestamp, body))
            signatures.append(b"v1," + binascii.b2a_base64(mac.digest(), newline=False))
        return b" ".join(signatures)
