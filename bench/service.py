"""`dispatcher run`, watched: it counts the statements it sends and the attempts it records, and asks a name server of the bench's, if told to.

    BENCH_COUNTERS=FILE [BENCH_DNS_PORT=PORT] [BENCH_WITHOUT_OPTIONS=1] python -m bench.service

Everything else is the product's own start. PostgreSQL counts statements only with an extension that must be loaded at
its start; here it costs a microsecond a statement, of which there are about two per hundred deliveries.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import aiodns
import asyncpg

from bench.rig import Counters
from dispatcher.cli import main
from dispatcher.domain.event import Event
from dispatcher.domain.run import ORIGINAL
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import CROWD, Lanes
from dispatcher.engine.sender import Sender
from dispatcher.ports import HeadPage
from dispatcher.store.postgres import PgStore
from dispatcher.store.sql import SQL


def watch_statements(counters: Counters) -> None:
    """Count what every connection from now on sends."""

    class Counting(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
        async def copy_to_table(self, table_name: str, **options: Any) -> Any:
            done = await super().copy_to_table(table_name, **options)
            # A query logger isn't told of COPY. Its answer says how many rows it wrote: "COPY 500".
            counters.add(statements=1, settled=int(done.split()[1]) if table_name == "attempt" else 0)
            return done

    connect = asyncpg.connect

    @functools.wraps(connect)
    async def watched(*args: Any, **options: Any) -> Any:
        connection = await connect(*args, connection_class=Counting, **options)
        connection.add_query_logger(counters.count)
        return connection

    asyncpg.connect = watched


def ask(port: int) -> None:
    """Have names looked up at 127.0.0.1:`port` only."""
    aiodns.DNSResolver = functools.partial(  # type: ignore[misc,assignment]
        aiodns.DNSResolver, nameservers=["127.0.0.1"], udp_port=port, tcp_port=port
    )


def leave_out_options() -> None:
    """Deliver as if events had no key, expiry, priority or trace: the head is read without these columns, and lanes and the sender don't ask
    for them. What the product costs beside it is what they cost when nobody uses them. For receivers at
    which nothing fails."""
    columns = ("ordering_key", "expires_at", "priority", "traceparent")
    names = ", ".join(columns), ", ".join(f"b.{column}" for column in columns)
    for name in ("head", "head_attempted"):
        text = getattr(SQL, name)
        for listed in names:
            assert f", {listed}" in text
            text = text.replace(f", {listed}", "")
        setattr(SQL, name, text)

    async def head(self: PgStore, after: int, limit: int, bytes_max: int, young: Any, *, attempted: bool) -> HeadPage:
        query = SQL.head_attempted if attempted else SQL.head
        rows = await self._reader.run(lambda c: c.fetch(query, after, limit, bytes_max, young))
        last_id, config_seq = rows[0][0], rows[0][1]
        if rows[0][2] is None:
            return HeadPage([], [] if attempted else None, False, last_id, config_seq)
        above = sum(1 for row in rows if row[2] > after) if young else len(rows)
        full = above >= limit or rows[-1][8] >= bytes_max
        skips = [row[9] for row in rows] if attempted else None
        return HeadPage(self._events(rows, 2, plain=True), skips, full, last_id, config_seq)

    def take_event(self: Lane, event: Event, now: float) -> None:
        self.hands[event.id] = now
        self.queue.append(event)

    def take(self: Lanes, lane: Lane, event: Event, now: float) -> bool:
        self.unsettled[lane] = None
        self.memory.hold(event)
        lane.take(event, now)
        if len(lane.queue) > CROWD:
            self._long[lane] = None
        return True

    def next_delivery(self: Sender, lane: Lane) -> Delivery:
        delivery = Delivery(self.answered, lane, lane.queue.popleft(), ORIGINAL, 1, 0)
        if not lane.live or lane.next_retry_at is not None or lane.runs:
            self._look(lane)
        return delivery

    PgStore.head, Lane.take, Lanes.take, Sender._next = head, take_event, take, next_delivery  # type: ignore[method-assign]


if __name__ == "__main__":
    watch_statements(Counters(Path(os.environ.pop("BENCH_COUNTERS"))))
    if dns_port := os.environ.pop("BENCH_DNS_PORT", None):
        ask(int(dns_port))
    if os.environ.pop("BENCH_WITHOUT_OPTIONS", None):
        leave_out_options()
    sys.argv = ["dispatcher", "run"]
    main()
