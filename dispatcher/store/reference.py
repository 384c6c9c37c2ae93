"""How people name an event: by its outbox id, or by the public id that receivers see (evt_…)."""

from dataclasses import dataclass
from datetime import datetime

from dispatcher.domain.event import PublicIds
from dispatcher.domain.moment import to_us
from dispatcher.store.session import Connection
from dispatcher.store.sql import SQL

ID_MAX = (1 << 63) - 1  # bigint


@dataclass(frozen=True, slots=True)
class EventReference:
    """`created_us` is known of a public id only. One of another installation, or made up, decodes to an id and a time that no row has."""

    text: str
    id: int
    created_us: int | None

    def fits(self, created_at: datetime) -> bool:
        """Tell whether the row with this id, made at `created_at`, is the one that was meant."""
        return self.created_us is None or self.created_us == to_us(created_at)


async def event_reference(connection: Connection, text: str) -> EventReference:
    """Read an outbox id or an evt_… id. Raises InputError if it is neither."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        return EventReference(text, int(text), None)
    created_us, event_id = PublicIds(await connection.fetchval(SQL.id_key)).decode(text)
    return EventReference(text, event_id if event_id <= ID_MAX else -1, created_us)
