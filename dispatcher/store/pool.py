"""The connections of panel and API: few, bounded, and impatient, so that people never slow deliveries.

A request waits for a connection for a bounded time and then hears that it is busy. Statements end at their timeout, and
so does a transaction that somebody left open. What may take longer (a delete that counts, an erasure) has two
connections of its own, so that it doesn't take those of everybody else.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from dispatcher.errors import BusyError, DatabaseAwayError, InputError
from dispatcher.store.session import Connection, is_away
from dispatcher.store.sql import SQL

WAIT_S = 2.0
LONG = 2
LONG_TIMEOUT_S = 120.0
CONNECT_S = 5.0
NAME = "dispatcher web"


class Pool:
    """`async with pool.connection() as db:`; made by `open`, and at the end `close`d. Raises BusyError and DatabaseAwayError."""

    def __init__(self, dsn: str, *, size: int, statement_timeout_s: float) -> None:
        self._dsn = dsn
        self._quick = _make(dsn, size, statement_timeout_s)
        self._long = _make(dsn, LONG, LONG_TIMEOUT_S)
        self.statement_timeout_s = statement_timeout_s

    @asynccontextmanager
    async def connection(self, *, long: bool = False) -> AsyncIterator[Connection]:
        """Lend a connection. `long`: one of the two for work that may take minutes."""
        pool, timeout_s = (self._long, LONG_TIMEOUT_S) if long else (self._quick, self.statement_timeout_s)
        try:
            async with asyncio.timeout(WAIT_S):
                await pool  # made at the first use: the database may be away when the process starts
                lent = await pool.acquire()
        except TimeoutError as exc:
            raise BusyError("the database has no room for this now; try again in a moment") from exc
        except Exception as exc:
            if is_away(exc):
                raise DatabaseAwayError("the database can't be reached now; try again in a moment") from exc
            raise
        try:
            yield lent
        except asyncpg.DataError as exc:  # a NUL, a number beyond its column
            raise InputError("something in it is no text or number that the database can hold") from exc
        except asyncpg.DeadlockDetectedError as exc:
            raise BusyError("somebody else was changing the same; try again") from exc
        except asyncpg.QueryCanceledError as exc:
            raise BusyError(f"this takes longer than {timeout_s:g} s; ask for less, or try again later") from exc
        except Exception as exc:
            if is_away(exc):
                raise DatabaseAwayError("the database went away; try again in a moment") from exc
            raise
        finally:
            await _give_back(pool, lent)

    async def ask(self) -> None:
        """Ask for anything. Raises BusyError or DatabaseAwayError where nothing is answered."""
        async with self.connection() as db:
            await db.fetchval(SQL.backend_pid)

    async def close(self) -> None:
        for pool in (self._quick, self._long):
            try:
                async with asyncio.timeout(WAIT_S):
                    await pool  # one that was never used can't be closed
                    await pool.close()
            except (TimeoutError, asyncpg.InterfaceError):
                pool.terminate()


async def _give_back(pool: Any, lent: Connection) -> None:
    """Give back what was lent. A server that has fallen silent doesn't answer that either: asyncpg has hung up by then, and whoever used it
    has its answer, or knows why not."""
    try:
        await pool.release(lent, timeout=WAIT_S)
    except Exception as exc:
        if not is_away(exc):
            raise


def _make(dsn: str, size: int, timeout_s: float) -> Any:
    parameters = {
        "application_name": NAME,
        "jit": "off",
        "timezone": "UTC",
        "statement_timeout": str(int(timeout_s * 1000)),
        "lock_timeout": "3s",
        "idle_in_transaction_session_timeout": "15s",
        "plan_cache_mode": "force_custom_plan",  # a list's plan depends on which filters are given
        # A page wants few rows, of one account most often. At the default of 4 the log's own order looks cheaper than the account's index as
        # soon as an account has a tenth of the events, and is not, once it has been quiet for a million of them.
        "random_page_cost": "1.1",
        "max_parallel_workers_per_gather": "0",  # a page isn't worth two cores: one is wanted for deliveries
    }

    async def begin(connection: Connection) -> None:
        # By a statement: a pooler such as PgBouncer refuses them as startup parameters.
        await connection.execute(SQL.set_parameters, list(parameters), list(parameters.values()))

    async def leave_as_it_is(connection: Connection) -> None:
        """Instead of asyncpg's RESET ALL, which would undo the parameters."""
        if connection.is_in_transaction():
            connection.terminate()  # its user was cancelled in the middle

    return asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=CONNECT_S,
        command_timeout=timeout_s + 5,  # a server that has fallen silent; its own timeout is sooner
        max_inactive_connection_lifetime=60,
        init=begin,
        reset=leave_as_it_is,
        server_settings={"application_name": NAME},
    )
