"""Standard Webhooks 1.0.0: signatures over "id.timestamp.body", in two schemes.

| scheme | signature                   | signed with                     | checked with               |
|--------|-----------------------------|---------------------------------|----------------------------|
| v1     | `v1,` + base64(HMAC-SHA256) | `whsec_` + base64(24–64 bytes)  | the same                   |
| v1a    | `v1a,` + base64(Ed25519)    | `whsk_` + base64(seed ‖ public) | `whpk_` + base64(public)   |

An endpoint signs in one scheme or in both. While a secret is being rotated each valid one signs, space-delimited,
newest first. Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import secrets
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from dispatcher.errors import InputError

SECRET_PREFIX = "whsec_"  # noqa: S105 - the standard's prefix, not a secret  # nosec B105
PRIVATE_PREFIX, PUBLIC_PREFIX = "whsk_", "whpk_"
SCHEMES = ("v1", "v1a")
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


def new_private_key() -> str:
    """Make an Ed25519 key."""
    key = Ed25519PrivateKey.generate()
    return PRIVATE_PREFIX + base64.b64encode(key.private_bytes_raw() + key.public_key().public_bytes_raw()).decode()


def private_key(text: str) -> Ed25519PrivateKey:
    """Return the key inside `whsk_…`: the seed of 32 bytes, alone or followed by the public key, as the standard's tools write it.

    Raises InputError that says what is wrong, without showing the key."""
    if not text.startswith(PRIVATE_PREFIX):
        raise InputError(f"a private signing key starts with {PRIVATE_PREFIX}")
    try:
        raw = base64.b64decode(text[len(PRIVATE_PREFIX) :], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InputError(f"the private signing key after {PRIVATE_PREFIX} is not base64") from exc
    if len(raw) not in (32, 64):
        raise InputError(f"a private signing key holds 32 or 64 bytes, this one {len(raw)}")
    key = Ed25519PrivateKey.from_private_bytes(raw[:32])
    if len(raw) == 64 and key.public_key().public_bytes_raw() != raw[32:]:
        raise InputError("the private signing key's two halves don't belong together: it was cut or mixed up")
    return key


def public_key(private_text: str) -> str:
    """Return the `whpk_…` that belongs to a `whsk_…`."""
    return PUBLIC_PREFIX + base64.b64encode(private_key(private_text).public_key().public_bytes_raw()).decode()


def scheme_of(secret: str) -> str:
    return "v1a" if secret.startswith(PRIVATE_PREFIX) else "v1"


def new_key(scheme: str) -> str:
    """Make a secret, or private key, for a scheme."""
    return new_private_key() if scheme == "v1a" else new_secret()


def check_key(text: str, scheme: str) -> None:
    """Raise InputError if `text` is not a secret, or private key, for the scheme."""
    if scheme == "v1a":
        private_key(text)
    else:
        secret_key(text)


def signing_in(secret_texts: Iterable[str], signing: str) -> tuple[str, ...]:
    """Return those of an endpoint's secrets that sign in `signing`: a scheme, or several with commas."""
    schemes = signing.split(",")
    return tuple(secret for secret in secret_texts if scheme_of(secret) in schemes)


def make_signer(secret_texts: Sequence[str]) -> "Signer":
    """Return what signs with these secrets and private keys."""
    return MixedSigner(secret_texts) if any(scheme_of(s) == "v1a" for s in secret_texts) else Signer(secret_texts)


class Signer:
    """The secrets of one endpoint that sign now, prepared once.

    An HMAC object that has absorbed the key is copied per signature. For 0.5 kB, `cryptography`'s takes 1.2 µs, the standard library's 1.9, and
    hmac.digest(), which absorbs the key each time, 2.8 (CPython 3.11, a busy machine).
    """

    __slots__ = ("_prepared",)

    def __init__(self, secret_texts: Sequence[str]) -> None:
        self._prepared = tuple(HMAC(secret_key(secret), SHA256()) for secret in secret_texts)

    def sign(self, event_id: bytes, timestamp: bytes, body: bytes) -> bytes:
        """Return the value of the `webhook-signature` header."""
        signatures = []
        for prepared in self._prepared:
            mac = prepared.copy()
            mac.update(b"%b.%b.%b" % (event_id, timestamp, body))
            signatures.append(b"v1," + binascii.b2a_base64(mac.finalize(), newline=False))
        return b" ".join(signatures)


class MixedSigner(Signer):
    """Secrets of both schemes. Apart, so that the common case asks nothing: an Ed25519 signature takes ten times as long as an HMAC."""

    __slots__ = ("_keys",)

    def __init__(self, secret_texts: Sequence[str]) -> None:
        super().__init__(())
        self._keys = tuple(private_key(text) if scheme_of(text) == "v1a" else Signer((text,)) for text in secret_texts)

    def sign(self, event_id: bytes, timestamp: bytes, body: bytes) -> bytes:
        signed = b"%b.%b.%b" % (event_id, timestamp, body)
        return b" ".join(
            key.sign(event_id, timestamp, body)
            if isinstance(key, Signer)
            else b"v1a," + binascii.b2a_base64(key.sign(signed), newline=False)
            for key in self._keys
        )
