"""The certificate and key by which we are known to a receiver (mTLS)."""

import hashlib
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from dispatcher.errors import InputError

PEM_CHARS_MAX = 65_536
CHAIN_MAX = 10


@dataclass(frozen=True, slots=True, eq=False)
class ClientIdentity:
    """A certificate chain, ours first, and its key; both PEM. Part of an `Origin`, so that a connection is used by its own identity only."""

    certificate: str = field(repr=False)
    key: str = field(repr=False)
    fingerprint: str

    @classmethod
    def of(cls, certificate: str, key: str) -> "ClientIdentity":
        return cls(certificate, key, hashlib.sha256(f"{certificate}\0{key}".encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClientIdentity) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def check_identity(certificate: str, key: str) -> None:
    """Raise InputError if these are not a certificate chain and the key of its first one. Never quotes the key."""
    chain = read_chain(certificate)
    if len(key) > PEM_CHARS_MAX:
        raise InputError(f"the client key is longer than {PEM_CHARS_MAX} characters", field="client_key")
    try:
        private = load_pem_private_key(key.encode(), password=None)
    except TypeError as exc:
        raise InputError(
            "the client key has a passphrase: take it off, it is encrypted here with your other secrets",
            field="client_key",
        ) from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise InputError("the client key is not a private key in PEM form", field="client_key") from exc
    if _public_bytes(private) != _public_bytes(chain[0]):
        raise InputError(
            "the client key doesn't belong to the first client certificate; that one must come before its issuers",
            field="client_key",
        )


def read_chain(certificate: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM text; raise InputError if it isn't one."""
    if len(certificate) > PEM_CHARS_MAX:
        raise InputError(f"the client certificate is longer than {PEM_CHARS_MAX} characters")
    if "PRIVATE KEY-----" in certificate:
        raise InputError(
            "the client certificate's text holds a private key: certificates are shown again, give the key apart"
        )
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
    except ValueError as exc:
        raise InputError("the client certificate is not a certificate in PEM form") from exc
    if len(chain) > CHAIN_MAX:
        raise InputError(f"the client certificate's chain has {len(chain)} certificates; the most is {CHAIN_MAX}")
    return chain


def describe_certificate(certificate: str) -> str:
    """Say whose certificate it is and how long it is valid."""
    first = read_chain(certificate)[0]
    names = first.subject.rfc4514_string() or f"serial {first.serial_number:x}"
    return f"{names}, until {first.not_valid_after_utc:%Y-%m-%d}"


def _public_bytes(holder: object) -> bytes:
    public = holder.public_key()  # type: ignore[attr-defined]  # certificates and private keys have no common type
    encoded: bytes = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded
