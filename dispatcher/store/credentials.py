"""What of an endpoint's row is secret: its credentials, which are one JSON text. Sealed on the way in, opened on the way out.

A draft carries its credentials too, sealed for its own place: what an edit proposes can't be taken for what is in force.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from dispatcher.domain.sealing import Keyring, credentials_place
from dispatcher.domain.shape import CREDENTIALS, PLAIN, SHAPE, Shape, make_shape

Row = Any  # asyncpg's


def shape_of(row: Row, keyring: Keyring) -> Shape:
    """Make the shape of what is in force. Raises SealedError."""
    config = {field: row[field] for field in SHAPE}
    if row["credentials"] is None and config == SHAPE:
        return PLAIN
    return make_shape(config | open_credentials(row["credentials"], credentials_place(row["id"]), keyring))


def open_credentials(text: str | None, place: str, keyring: Keyring) -> dict[str, Any]:
    """Return all credentials, those that aren't set at their defaults. Raises SealedError."""
    return CREDENTIALS | ({} if text is None else orjson.loads(keyring.open(text, place)))


def seal_credentials(config: Mapping[str, Any], place: str, keyring: Keyring) -> str | None:
    """Return the credentials of a configuration as they are stored; None if there are none."""
    given = {field: config[field] for field, default in CREDENTIALS.items() if config[field] != default}
    return keyring.seal(orjson.dumps(given).decode(), place) if given else None
