"""A look at the database every few seconds, on a session of its own: whether it answers, and what only it knows.

A scrape or a probe is answered from the last look, so that neither can hurry the database, nor hang when it is away.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import structlog

from dispatcher.errors import DispatcherError
from dispatcher.ports import LifeLostError, StoreAwayError
from dispatcher.store.session import Connection, Session
from dispatcher.store.sql import load
from dispatcher.store.status import COUNT_MAX, STATUS

OBSERVE = load(Path(__file__).with_name("observe.sql"))

LOOK_EVERY_S = 5.0
ANSWER_S = 5.0

_log = structlog.get_logger(room="observe")


@dataclass(frozen=True, slots=True)
class Seen:
    """`log_s` and `behind_s`: the age of the oldest undelivered event above the position, and behind the marks of live endpoints; 0 if there
    is none. Counts end at COUNT_MAX + 1."""

    log_s: float
    behind_s: float
    retries: int
    dead_letters: int


class Observer:
    """`run` looks until it is cancelled. `owns`: whether the log is ours to tell of; a standby asks only whether the database answers."""

    def __init__(self, dsn: str, owns: Callable[[], bool], *, every_s: float = LOOK_EVERY_S) -> None:
        self.seen: Seen | None = None  # None: not the owner, or the last look failed
        self._answered_at: float | None = None
        self._owns = owns
        self._every_s = every_s
        self._session = Session(
            dsn,
            "observer",
            timeout_s=ANSWER_S,
            parameters={"statement_timeout": f"{ANSWER_S * 1000:.0f}ms", "default_transaction_read_only": "on"},
        )

    @property
    def silent_s(self) -> float:
        """How long the database has not answered; infinite before the first answer."""
        return float("inf") if self._answered_at is None else time.monotonic() - self._answered_at

    async def run(self) -> None:
        was_away = False
        try:
            while True:
                try:
                    self.seen = await self._session.run(self._look)
                    self._answered_at = time.monotonic()
                    was_away = False
                except (StoreAwayError, LifeLostError, DispatcherError, asyncpg.PostgresError) as exc:
                    self.seen = None
                    if not was_away:
                        _log.warning("observer.away", error=str(exc))
                    was_away = True
                await asyncio.sleep(self._every_s)
        finally:
            await self._session.close()

    async def _look(self, connection: Connection) -> Seen | None:
        if not await connection.fetchval(OBSERVE.primary):
            raise StoreAwayError("the server is a standby, in recovery")
        if not self._owns():
            return None
        oldest = await connection.fetchrow(OBSERVE.oldest)
        return Seen(
            max(0.0, oldest["log_s"] or 0.0),
            max(0.0, oldest["behind_s"] or 0.0),
            await connection.fetchval(STATUS.retries, COUNT_MAX + 1),
            await connection.fetchval(STATUS.dead_letters, COUNT_MAX + 1),
        )
