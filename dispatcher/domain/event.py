"""Events: what a log row is in memory, its public id, and the envelope that receivers get.

The producer's payload stays the bytes it wrote: the envelope is built around them by concatenation, never by parsing.
Built once per event, it is shared by every endpoint that gets the event, over all attempts: only signature and headers
differ.

Public ids are `evt_` + 32 hex digits: one AES block over (created_at in µs, id). Opaque, stable over retries and
resends, reversible by whoever holds the key, and different even if a failover hands out a log id twice. (ECB of one
block is a pseudorandom permutation of 128 bits, which is all that is asked of it; nothing is secret about the plaintext
but the rate of events.)
"""

import re
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NewType

import orjson
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dispatcher.errors import InputError

AccountId = NewType("AccountId", str)
EventId = NewType("EventId", int)  # the outbox id

EVENT_TYPE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
EVENT_TYPE_BYTES_MAX = 128
PUBLIC_ID = re.compile(r"evt_[0-9a-f]{32}")
# What an account is told about one of its endpoints (`data.endpoint`), for its other endpoints. Only the dispatcher makes these.
TOLD_TO_OTHERS = frozenset(("endpoint.failing", "endpoint.disabled", "endpoint.recovered"))
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_BLOCK = struct.Struct(">QQ")


class Event:
    """One row of the log while it is in memory. Mutable and plain: tens of thousands live at once.

    `holders` is how many lanes still have it in hand; the engine's memory account is paid back when it falls to 0.
    """

    __slots__ = (
        "account_id", "body", "created_us", "expires_us", "holders", "id", "occurred_us", "ordering_key", "payload", "priority",
        "public_id", "traceparent", "type",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        account_id: str,
        type: str,
        payload: bytes,
        created_us: int,
        occurred_us: int | None,
        public_id: bytes,
        ordering_key: str | None = None,
        expires_us: int | None = None,
        priority: int | None = None,
        traceparent: bytes | None = None,
    ) -> None:
        self.id = id
        self.account_id = account_id
        self.type = type
        self.payload = payload
        self.created_us = created_us  # µs since 1970, UTC
        self.occurred_us = occurred_us
        self.public_id = public_id
        self.ordering_key = ordering_key
        self.expires_us = expires_us  # worth nothing to a receiver from then on
        self.priority = priority
        self.traceparent = traceparent  # the producer's, for the receiver
        self.body: bytes | None = None
        self.holders = 0

    def __repr__(self) -> str:
        return f"Event({self.id} {self.type} of {self.account_id}, {len(self.payload)} B)"

    def is_about(self, endpoint_id: int) -> bool:
        """Tell whether this is what an account's *other* endpoints are told about this one. The subscriptions say so too, but a reader may
        meet the event before it knows of their change."""
        if self.type not in TOLD_TO_OTHERS:
            return False
        try:
            return bool(orjson.loads(self.payload)["endpoint"]["id"] == endpoint_id)
        except (orjson.JSONDecodeError, LookupError, TypeError):
            return False  # not made by the dispatcher

    def envelope(self) -> bytes:
        """Return the body to POST: `{"id", "type", "timestamp", "account_id", "data"}`, built at the first call."""
        if self.body is None:
            self.body = self.wrap(self.payload)
        return self.body

    def wrap(self, data: bytes) -> bytes:
        """Return the envelope around another `data`: the payload without what an endpoint is not to get."""
        happened_us = self.created_us if self.occurred_us is None else self.occurred_us
        return envelope(self.public_id, self.type, happened_us, self.account_id, data)


def envelope(
    public_id: bytes, event_type: str, happened_us: int, account_id: str, data: bytes, *, test: bool = False
) -> bytes:
    """Build the envelope. `data` is JSON and goes in untouched; `happened_us` is µs since 1970."""
    return b'{"id":"%b","type":"%b","timestamp":"%b","account_id":%b,%b"data":%b}' % (
        public_id,
        event_type.encode(),
        timestamp(happened_us),
        orjson.dumps(account_id),
        b'"test":true,' if test else b"",
        data,
    )


# RFC 3339 has four digits for the year, and a producer may write any timestamptz, 4713 BC and infinity too: the nearest
# that can be said is sent.
_FIRST_US = -62_135_596_800_000_000  # 0001-01-01T00:00:00Z
_LAST_US = 253_402_300_799_999_999  # 9999-12-31T23:59:59.999999Z
_second_cache: tuple[int, bytes] = (_FIRST_US, b"0001-01-01T00:00:00")  # when it began, µs; its text


def timestamp(at_us: int) -> bytes:
    """Format µs since 1970 as RFC 3339 UTC with milliseconds. Neighbours share their second, so it is formatted once."""
    global _second_cache
    began_us, text = _second_cache
    us = at_us - began_us
    if not 0 <= us < 1_000_000:
        second, us = divmod(min(max(at_us, _FIRST_US), _LAST_US), 1_000_000)
        text = datetime.fromtimestamp(second, UTC).isoformat()[:19].encode()  # strftime's %Y drops leading zeros
        _second_cache = (second * 1_000_000, text)
    return b"%b.%03dZ" % (text, us // 1000)


class PublicIds:
    """Turn (created_at, id) into public ids and back, under the installation's key (16 bytes)."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES128(key), modes.ECB())  # noqa: S305 - single blocks, see above  # nosec B305
        # One for all: of whole blocks it keeps nothing back, and to make one takes longer than to use it (3.4 against 1.4 µs for an id).
        self._encrypt = self._cipher.encryptor().update

    def encode(self, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the public id of each (created_us, id), with one cipher call for all of them."""
        plain = b"".join([_BLOCK.pack(created_us, event_id) for created_us, event_id in pairs])
        hexed = self._encrypt(plain).hex().encode()
        return [b"evt_" + hexed[at : at + 32] for at in range(0, len(hexed), 32)]

    def decode(self, public_id: str) -> tuple[int, int]:
        """Return (created_us, id). A foreign id decodes to nonsense that no row matches.

        Raises InputError if the text has not the form."""
        if not PUBLIC_ID.fullmatch(public_id):
            raise InputError(f"{public_id!r} is not an event id: they are evt_ and 32 hexadecimal digits")
        created_us, event_id = _BLOCK.unpack(self._cipher.decryptor().update(bytes.fromhex(public_id[4:])))
        return created_us, event_id


def traceparent_of(text: str) -> bytes | None:
    """Return a producer's `traceparent` as it is sent on. What isn't one is left out, as W3C Trace Context has it: no event fails for it."""
    return text.encode() if TRACEPARENT.fullmatch(text) else None


def check_event_type(text: str) -> str:
    """Return `text` if it is an event type; else raise InputError."""
    if not EVENT_TYPE.fullmatch(text) or len(text) > EVENT_TYPE_BYTES_MAX:
        raise InputError(
            f"{text!r} is not an event type: lower-case words of letters, digits and _ joined by dots, "
            "such as message.delivered, at most 128 characters"
        )
    return text
