"""A receiver's side of Standard Webhooks, for the built-in receiver: does the signature fit?"""

import base64
import hmac
from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dispatcher.domain.signing import secret_key

TOLERANCE_S = 300  # Standard Webhooks: "to prevent replay attacks"; five minutes, as its libraries have it
SIGNATURES_MAX = 20

VALID, MISSING, OLD, WRONG = "valid", "missing", "old", "wrong"


def judge(
    headers: Mapping[str, str], body: bytes, secrets: Sequence[str], public_keys: Sequence[str], now_s: float
) -> str:
    """Return VALID, or why not: headers are MISSING, the time is too far off (OLD), or no signature fits any key (WRONG).

    `headers` by lower-case names; secrets as whsec_…, public keys as whpk_…."""
    try:
        event_id, at, given = (headers[name] for name in ("webhook-id", "webhook-timestamp", "webhook-signature"))
    except KeyError:
        return MISSING
    if not (at.isascii() and at.isdecimal() and len(at) <= 12):
        return WRONG
    signed = f"{event_id}.{at}.".encode("utf-8", "surrogateescape") + body  # what isn't UTF-8, as servers give it
    for part in given.split(" ")[:SIGNATURES_MAX]:
        scheme, _, text = part.partition(",")
        try:
            signature = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        if (scheme == "v1" and _fits_secret(signature, signed, secrets)) or (
            scheme == "v1a" and _fits_key(signature, signed, public_keys)
        ):
            return VALID if abs(now_s - int(at)) <= TOLERANCE_S else OLD
    return WRONG


def _fits_secret(signature: bytes, signed: bytes, secrets: Sequence[str]) -> bool:
    return any(hmac.compare_digest(hmac.digest(secret_key(one), signed, "sha256"), signature) for one in secrets)


def _fits_key(signature: bytes, signed: bytes, public_keys: Sequence[str]) -> bool:
    for text in public_keys:
        try:
            Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix("whpk_"))).verify(signature, signed)
        except (InvalidSignature, ValueError):
            continue
        return True
    return False
