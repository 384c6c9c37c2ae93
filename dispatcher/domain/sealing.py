"""Encryption of secrets at rest: AES-256-GCM, under the first of several keys.

A sealed text is `sealed:<key id>:<base64 of nonce and ciphertext>`. The key id says which key opens it, and is a hash of that key. Bound to
each is its *place*, table, column and endpoint: moved to another row, by whoever can write to the database, it doesn't open. Nonces are 96
random bits; a key may seal 2^32 texts before two of them are likelier than 2^-32 to be equal, which is more than there are endpoints.

Without keys texts stay plain, and a plain text is read as it is with keys too, so that encryption can be turned on in a running system;
`dispatcher rotate-key` seals what there was.
"""

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dispatcher.errors import InputError, SealedError

KEY_BYTES = 32
NONCE_BYTES = 12
KEYS_MAX = 20
PREFIX = "sealed:"
MAKE_A_KEY = "`openssl rand -base64 32` makes one"

_SEALED = re.compile(r"sealed:([0-9a-f]{8}):([A-Za-z0-9+/]+={0,2})")


class Keyring:
    """The keys of one process: the first seals, all open. Without any, nothing is sealed."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self._ciphers = {key_id(key): AESGCM(key) for key in keys}
        self.first_id = next(iter(self._ciphers), None)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._ciphers)})"

    @property
    def ids(self) -> tuple[str, ...]:
        """What names the keys, the one that seals first."""
        return tuple(self._ciphers)

    def __contains__(self, id: str) -> bool:
        return id in self._ciphers

    def seal(self, text: str, place: str) -> str:
        """Encrypt under the first key, for this place."""
        if self.first_id is None:
            return text
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = self._ciphers[self.first_id].encrypt(nonce, text.encode(), place.encode())
        return f"{PREFIX}{self.first_id}:{base64.b64encode(nonce + sealed).decode()}"

    def open(self, text: str, place: str) -> str:
        """Decrypt what was sealed for this place. Raises SealedError, with the remedy."""
        if not text.startswith(PREFIX):
            return text
        found = _SEALED.fullmatch(text)
        if found is None:
            raise SealedError(f"{place} is not what was sealed there: it was cut or changed; restore it from a backup")
        cipher = self._ciphers.get(found[1])
        if cipher is None:
            raise SealedError(missing_keys([found[1]], what=place))
        try:
            raw = base64.b64decode(found[2], validate=True)
            return cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], place.encode()).decode()
        except (InvalidTag, binascii.Error, ValueError) as exc:
            raise SealedError(
                f"{place} is not what was sealed there: it was changed, or moved from another row; restore it from a backup"
            ) from exc

    def is_current(self, text: str) -> bool:
        """Tell whether the text is as `seal` would leave it."""
        return self.first_id is None or text.startswith(f"{PREFIX}{self.first_id}:")


def key_id(key: bytes) -> str:
    return hashlib.sha256(b"dispatcher key id\0" + key).hexdigest()[:8]


def new_encryption_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def parse_keys(text: str) -> tuple[bytes, ...]:
    """Read keys, base64 of 32 bytes each, divided by commas or white space; `#` begins a comment. Raises InputError without showing any."""
    lines = (line.partition("#")[0] for line in text.splitlines())
    words = " ".join(lines).replace(",", " ").split()
    if not words:
        raise InputError(f"there is no key in it; {MAKE_A_KEY}")
    if len(words) > KEYS_MAX:
        raise InputError(
            f"{len(words)} keys are more than {KEYS_MAX}; `dispatcher rotate-key` makes old ones superfluous"
        )
    keys = []
    for number, word in enumerate(words, start=1):
        try:
            key = base64.b64decode(word, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise InputError(f"key {number} is not base64; {MAKE_A_KEY}") from exc
        if len(key) != KEY_BYTES:
            raise InputError(f"key {number} holds {len(key)} bytes, it must be {KEY_BYTES}; {MAKE_A_KEY}")
        keys.append(key)
    if len(set(keys)) != len(keys):
        raise InputError("the same key is in it twice")
    return tuple(keys)


def missing_keys(ids: Sequence[str], *, what: str = "the database's secrets") -> str:
    """Say what to do about keys that are not there."""
    return (
        f"{what} can't be read: encrypted under key {', '.join(ids)}, which is not set. Add the key to DISPATCHER_ENCRYPTION_KEYS "
        "or DISPATCHER_ENCRYPTION_KEYS_FILE; until `dispatcher rotate-key` has been run under a new key, the old one must stay behind it"
    )


def secret_place(endpoint_id: int) -> str:
    return f"endpoint_secret.secret of endpoint {endpoint_id}"


def credentials_place(endpoint_id: int) -> str:
    return f"endpoint.credentials of endpoint {endpoint_id}"


def draft_place(endpoint_id: int) -> str:
    return f"endpoint.draft of endpoint {endpoint_id}"
