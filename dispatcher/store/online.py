"""Change the log beside its producers: indexes and checks that are large to make, made without holding anybody up.

A migration's transaction holds its locks to its end, and to read the log through takes three seconds for a million events. So what
needs that comes first, in steps that are transactions of their own (migrations/N.online.sql):

    an index     ON ONLY the parent, where it is invalid; CONCURRENTLY on each leaf; attached, one by one: with the last one it is valid
    a check      NOT VALID, so that it binds new rows; then validated, which reads, but holds up neither readers nor writers

What takes a lock that producers wait for takes it for a moment, or gives up after LOCK_MS and tries again; behind one long transaction
that may be for a while. The older program runs on with what is there. Interrupted, it is repeated: each step sees what was done.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

ONLINE = load(Path(__file__).with_name("online.sql"))
LOCK_MS = 50
PAUSE_S, PAUSES_MAX = 0.25, 240  # a minute of trying
ROUNDS_MAX = 5  # over the leaves: a running dispatcher may make new ones

Tell = Callable[[str], None]


@asynccontextmanager
async def alone(connection: Connection, tell: Tell) -> AsyncIterator[None]:
    """Keep others from migrating meanwhile, and the role's and the database's own timeouts from ending what reads the log through. Who comes
    second waits for a minute: two that start at once each find the schema installed, once."""
    for pause in range(PAUSES_MAX):
        if await connection.fetchval(ONLINE.begin):
            break
        if pause == 0:
            tell("another `dispatcher migrate` is at work on this database: waiting for it")
        await asyncio.sleep(PAUSE_S)
    else:
        raise DatabaseAwayError(
            "another `dispatcher migrate` is at work on this database; wait for it, then run it again"
        )
    try:
        yield
    finally:
        if not connection.is_closed():
            if (
                connection.is_in_transaction()
            ):  # schema.sql has its own, and what ended it in the middle is to be told, not this
                await connection.execute("ROLLBACK")
            await connection.execute(ONLINE.end)


async def change(connection: Connection, step: int, tell: Tell) -> None:
    """Do what migration `step` does beside the producers, if it has such a part. `tell` is told how far it is."""
    path = Path(__file__).parent / "migrations" / f"{step}.online.sql"
    if not path.is_file():
        return
    for name, statement in vars(load(path)).items():
        if statement.startswith("CREATE INDEX"):
            await _index(connection, name, statement, tell)
        else:
            await _check(connection, name, statement, tell)


async def _index(connection: Connection, name: str, statement: str, tell: Tell) -> None:
    is_valid = await connection.fetchval(ONLINE.index, name)
    if is_valid is None:
        await briefly(connection, statement.format(how="", index=name, table="ONLY webhook.outbox"), name, tell)
    suffix = name.removeprefix("outbox")
    for _ in range(ROUNDS_MAX):
        leaves = await connection.fetch(ONLINE.leaves, name, suffix)
        for n, row in enumerate(leaves, start=1):
            index = row["leaf"] + suffix
            tell(f"index {name}: {row['leaf']}, {n} of {len(leaves)}")
            if row["is_valid"] is False:
                await connection.execute(ONLINE.drop.format(index=index))
            if not row["is_valid"]:
                table = f"webhook.{row['leaf']}"
                await connection.execute(statement.format(how="CONCURRENTLY", index=index, table=table))
            await briefly(connection, ONLINE.attach.format(parent=name, index=index), name, tell)
        if await connection.fetchval(ONLINE.index, name):
            return
    raise DatabaseAwayError(
        f"index {name} isn't whole: partitions came while it was made; run `dispatcher migrate` again"
    )


async def _check(connection: Connection, name: str, statement: str, tell: Tell) -> None:
    is_valid = await connection.fetchval(ONLINE.constraint, name)
    if is_valid is None:
        await briefly(connection, statement, name, tell)
    if not is_valid:
        tell(f"check {name}")
        try:
            await connection.execute(ONLINE.validate.format(constraint=name))
        except asyncpg.CheckViolationError as exc:
            raise DatabaseRefusedError(
                f"the outbox has events that break {name} ({exc}); correct them, then run `dispatcher migrate` again"
            ) from exc


async def briefly(connection: Connection, statement: str, name: str, tell: Tell) -> None:
    """Execute what needs a lock for a moment, when it can be had."""
    await connection.execute(ONLINE.lock_timeout, f"{LOCK_MS}ms")
    try:
        for n in range(PAUSES_MAX):
            try:
                await connection.execute(statement)
            except asyncpg.LockNotAvailableError:
                if n == 0:
                    tell(f"{name}: waiting for transactions that hold the outbox")
                await asyncio.sleep(PAUSE_S)
            else:
                return
    finally:
        if not connection.is_closed():
            await connection.execute(ONLINE.no_lock_timeout)
    raise DatabaseAwayError(
        f"{name} can't be changed now: transactions have held the outbox for a minute; what was made is kept, run `dispatcher migrate` again"
    )
