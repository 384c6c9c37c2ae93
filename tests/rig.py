"""A whole dispatcher in the test's own loop: real PostgreSQL, real sockets, a local sink. And waits with deadlines instead of sleeps."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg

from dispatcher import settings as settings_module
from dispatcher.engine.engine import Engine
from dispatcher.engine.gaps import Gaps
from dispatcher.main import make_transport
from dispatcher.ports import Partitions
from dispatcher.settings import Settings
from dispatcher.sink import Behaviour, Received, Sink
from dispatcher.store.postgres import PgStore
from dispatcher.transport.pool import Pool

PATIENCE_S = 60.0  # a bound for what must happen, not for how soon: machines may be busy with much else
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjU"


async def until(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]], *, within_s: float = PATIENCE_S, what: str = ""
) -> Any:
    """Wait until `condition` is true and return its value; fail after `within_s`, also where `condition` itself waits."""
    bound = asyncio.timeout(within_s)
    try:
        async with bound:
            while True:
                value = condition()
                if asyncio.iscoroutine(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.005)  # a poll with a deadline, not a wait that hopes
    except TimeoutError:
        if not bound.expired():
            raise
        raise AssertionError(f"not within {within_s} s: {what or condition}") from None


class Rig:
    """An engine, a sink and a database connection. `got` counts (path, outbox id) of what the sink answered with 2xx."""

    def __init__(
        self, dsn: str, db: asyncpg.Connection, settings: Settings, make_gaps: Callable[[], Gaps] = Gaps
    ) -> None:
        self.dsn = dsn
        self.db = db
        self.settings = settings
        self.received: list[Received] = []
        self.sink = Sink(secrets=SECRET, on_event=self.received.append)
        self.transport: Pool = make_transport(settings)
        self.engine: Engine
        self.task: asyncio.Task[None] | None = None
        self.make_partitions: Callable[[], Partitions] | None = None  # with one, the engine has a janitor
        self._make_gaps = make_gaps

    async def start(self) -> None:
        self.engine = Engine(
            PgStore(self.dsn, self.settings),
            self.transport,
            self.settings,
            owner="test",
            make_gaps=self._make_gaps,
            partitions=None if self.make_partitions is None else self.make_partitions(),
        )
        self.task = asyncio.create_task(self.engine.run())
        ready = asyncio.create_task(self.engine.ready.wait())
        await asyncio.wait([self.task, ready], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            ready.cancel()
            self.task.result()

    async def stop(self) -> None:
        """Stop in an orderly way."""
        assert self.task is not None
        self.engine.stop()
        await self.task
        self.task = None

    async def kill(self) -> None:
        """End the engine as a kill would: nothing is drained, flushed or released in order."""
        assert self.task is not None
        if self.engine.incarnation is not None:
            self.engine.incarnation.sender.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.task = None

    async def endpoint(
        self, path: str = "/hook", *, account: str = "acct", types: tuple[str, ...] = ("*",), state: str = "live", url: str | None = None,
        behaviour: Behaviour | None = None, **columns: Any,
    ) -> int:  # fmt: skip
        """Make a live endpoint on the sink, as an operator with SQL would."""
        if behaviour is not None:
            self.sink.set_behaviour(path, behaviour)
        names = ", ".join(columns)
        places = ", ".join(f"${n}" for n in range(4, 4 + len(columns)))
        async with self.db.transaction():
            endpoint_id: int = await self.db.fetchval(
                f"INSERT INTO webhook.endpoint (account_id, url, state{', ' + names if names else ''}) "
                f"VALUES ($1, $2, $3{', ' + places if places else ''}) RETURNING id",
                account, url or self.sink.url + path, state, *columns.values(),
            )  # fmt: skip
            await self.db.execute(
                "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, $2)", endpoint_id, SECRET
            )
            for pattern in types:
                await self.db.execute(
                    "INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, $2, webhook.last_id())",
                    endpoint_id, pattern,
                )  # fmt: skip
        if self.task is not None and state == "live" and not self.db.is_in_transaction():
            await until(lambda: self.has_taken_up(endpoint_id), what=f"endpoint {endpoint_id} is known and live")
        return endpoint_id

    def has_taken_up(self, endpoint_id: int) -> bool:
        incarnation = self.engine.incarnation
        lane = None if incarnation is None else incarnation.lanes.get(endpoint_id)
        return lane is not None and lane.live

    async def emit(
        self, count: int = 1, *, account: str = "acct", type: str = "message.sent", payload: str = '{"n": 1}', key: str | None = None,
        expires_s: float | None = None, priority: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Insert events in one statement and return their ids. `key`: to order by; `expires_s`: from now."""
        rows = await self.db.fetch(
            "INSERT INTO webhook.outbox (account_id, type, payload, ordering_key, expires_at, priority) "
            "SELECT $1, $2, $3::text::json, $5, clock_timestamp() + $6::double precision * interval '1 second', $7 "
            "FROM generate_series(1, $4::integer) RETURNING id",
            account, type, payload, count, key, expires_s, priority,
        )  # fmt: skip
        return [row["id"] for row in rows]

    async def attempts(self, **where: Any) -> list[asyncpg.Record]:
        condition = " AND ".join(f"{name} = ${n}" for n, name in enumerate(where, start=1)) or "true"
        return await self.db.fetch(
            f"SELECT * FROM webhook.attempt WHERE {condition} ORDER BY event_id, endpoint_id, run, number",
            *where.values(),
        )

    async def undelivered(self) -> list[tuple[int, int]]:
        """Committed events × live subscriptions without a successful attempt."""
        rows = await self.db.fetch(UNDELIVERED)
        return [(row["event_id"], row["endpoint_id"]) for row in rows]

    async def settled(self, *, within_s: float = 30.0) -> None:
        """Wait until every committed event is delivered everywhere and the checkpoint says so."""

        async def done() -> bool:
            row = await self.db.fetchrow(SETTLED)
            return row is not None and row["settled"]

        await until(done, within_s=within_s, what="everything settled")
        assert await self.undelivered() == []

    def by_path(self) -> Counter[str]:
        return Counter(event.path for event in self.received)


UNDELIVERED = """
SELECT o.id AS event_id, s.endpoint_id
FROM webhook.outbox o
JOIN webhook.endpoint e ON e.account_id = o.account_id AND e.state <> 'deleted'
JOIN (SELECT DISTINCT endpoint_id, pattern, since_id, until_id, rule FROM webhook.subscription) s ON s.endpoint_id = e.id
 AND o.id > s.since_id AND (s.until_id IS NULL OR o.id <= s.until_id)
 AND (s.pattern = '*' OR s.pattern = o.type OR (s.pattern LIKE '%.*' AND starts_with(o.type, left(s.pattern, -1))))
 AND webhook.passes(s.rule, o.type, o.payload)
WHERE NOT EXISTS (
    SELECT FROM webhook.attempt a WHERE a.event_id = o.id AND a.endpoint_id = e.id AND a.run = 0 AND a.fault IS NULL
)
"""

SETTLED = """
SELECT c.position >= (SELECT coalesce(max(id), 0) FROM webhook.outbox) AND isempty(c.gaps)
       AND NOT EXISTS (SELECT FROM webhook.lane) AND NOT EXISTS (SELECT FROM webhook.retry) AS settled
FROM webhook.checkpoint c
"""


@contextlib.asynccontextmanager
async def rig(
    dsn: str, *, make_gaps: Callable[[], Gaps] = Gaps, start: bool = True, **settings: Any
) -> AsyncIterator[Rig]:
    """A started rig, ended in whatever state the test leaves it."""
    effective = settings_module.load(**{"allowed_networks": "127.0.0.0/8", "grace_s": 5} | settings)
    db = await asyncpg.connect(dsn)
    made = Rig(dsn, db, effective, make_gaps)
    await made.sink.start()
    try:
        if start:
            await made.start()
        yield made
    finally:
        failed = made.task is not None and made.task.done() and not made.task.cancelled() and made.task.exception()
        if made.task is not None:
            await made.kill()
        await made.transport.close()
        await made.sink.stop()
        await made.db.close()  # the one in use: a test may have connected again
        if failed:
            raise failed
