"""Is there a pooler in between that gives a session another server connection at each transaction?

A dispatcher's sessions hold what belongs to a server connection: the owner's and the doorbell's advisory locks, LISTEN,
prepared statements, parameters. In transaction mode a pooler hands these to whoever comes next, and the owner would own
nothing. So this is asked before anything is set or written, with unnamed statements, which leave nothing behind.

The sign is the backend's process id: it must stay the same for a session that idles, and be nobody else's meanwhile. A
pool that takes its connections last-in first-out, and nobody else uses, gives ours to the second session; one that deals
them out in turn gives us another at the second question; on a busy one either happens within a few rounds.
"""

import asyncio

import asyncpg

from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.store.session import Connection, close, connect_once, is_away
from dispatcher.store.sql import SQL

ROUNDS = 5
ANSWER_S = 5.0
# A statement that isn't there, or is there already, or a message that has no place: it was another connection than the last time.
_MIXED_UP_STATES = ("26000", "42P05", "08P01")

TRANSACTION_POOLING = (
    "DISPATCHER_DATABASE_URL leads to a pooler in transaction or statement mode, where each transaction may run on another server connection. "
    "The dispatcher's advisory locks (one owner at a time, the doorbell), LISTEN, prepared statements and session parameters belong to one, and "
    "can't work there. Point DISPATCHER_DATABASE_URL at PostgreSQL itself, or give this database and user a pool with pool_mode=session"
)
NO_ANSWER = (
    "a session was opened and got no answer ({why}): a pooler in between seems to have no server connection left for it. A dispatcher needs 8 "
    "of its own, and DISPATCHER_WEB_POOL_SIZE + 2 where it serves the panel (PgBouncer: pool_size, default_pool_size, max_db_connections); "
    "or point DISPATCHER_DATABASE_URL at PostgreSQL itself"
)


async def refuse_transaction_pooling(connection: Connection, dsn: str) -> None:
    """Raise DatabaseRefusedError if `connection`, fresh from `connect_once`, has no server connection of its own."""
    other = await connect_once(dsn, "dispatcher check")
    ours: set[int] = set()
    theirs: set[int] = set()
    backends = ours
    try:
        async with asyncio.timeout(ANSWER_S):
            for _ in range(ROUNDS):
                for asked, backends in ((connection, ours), (connection, ours), (other, theirs)):
                    backends.add(await asked.fetchval(SQL.backend_pid))
                if ours & theirs or len(ours) > 1 or len(theirs) > 1:
                    raise DatabaseRefusedError(TRANSACTION_POOLING)
    except Exception as exc:
        # A session's first statement can't be mixed up with anything.
        if backends and isinstance(exc, asyncpg.PostgresError) and exc.sqlstate in _MIXED_UP_STATES:
            raise DatabaseRefusedError(TRANSACTION_POOLING) from exc
        if not is_away(exc):
            raise
        connection.terminate()  # its goodbye would wait for the answer as well
        raise DatabaseAwayError(NO_ANSWER.format(why=exc if str(exc) else f"none in {ANSWER_S:g} s")) from exc
    finally:
        await close(other)
