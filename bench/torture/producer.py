"""A producer that writes down what became of each event: `python -m bench.torture.producer DSN FILE INDEX SEED`.

One line a transaction: its fate, when it was known, the account, and `number:id` of each event. Every event carries a number of its own,
because an id may be handed out again after a crash. A COMMIT without an answer is `unknown` until the next connection has looked: its
transaction is over by then, for a server that crashed ends all of them. Commits are synchronous, as is a producer's default.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

ACCOUNTS = ("a", "b", "c")
CONNECTIONS = 4
PACE_S = 0.12  # between a connection's transactions, on average
ROWS_MAX = 7
ROLLED_BACK = 0.1
LATE, LATE_S = 0.05, 1.0  # so many transactions stay open for up to so long
FILL_BYTES = 2_500
NUMBERS_EACH = 1_000_000_000  # event numbers of one producer
AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
INSERT = "INSERT INTO webhook.outbox (account_id, type, payload) SELECT $1, 'message.sent', p::json FROM unnest($2::text[]) AS p RETURNING id"
LOOK = "SELECT EXISTS (SELECT FROM webhook.outbox WHERE id = $1 AND payload ->> 'number' = $2)"

Made = list[tuple[int, int]]  # number, id


class Producer:
    def __init__(self, dsn: str, path: Path, index: int, seed: str) -> None:
        self.stopping = False
        self._dsn = dsn
        self._out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rng = random.Random(f"producer {index} {seed}")
        self._number = index * NUMBERS_EACH
        self._fill = "x" * FILL_BYTES

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONNECTIONS):
                tasks.create_task(self._produce())

    def _stop(self) -> None:
        self.stopping = True

    async def _produce(self) -> None:
        """Commit one transaction after another; end with nothing unknown."""
        unknown: tuple[str, Made] | None = None
        while not self.stopping or unknown is not None:
            try:
                connection = await asyncpg.connect(self._dsn, timeout=10)
            except AWAY:
                await asyncio.sleep(0.05)
                continue
            try:
                if unknown is not None:
                    account, made = unknown
                    is_there = await connection.fetchval(LOOK, made[0][1], str(made[0][0]))
                    self._note("committed" if is_there else "undone", account, made)
                    unknown = None
                while not self.stopping:
                    await self._transaction(connection)
                    await asyncio.sleep(self._rng.uniform(0, 2 * PACE_S))
                await connection.close()
            except _UnknownError as exc:
                unknown = exc.account, exc.made
                connection.terminate()
            except AWAY:
                connection.terminate()

    async def _transaction(self, connection: Any) -> None:
        rng = self._rng
        account = rng.choice(ACCOUNTS)
        numbers = [self._number + n for n in range(1, rng.randint(1, ROWS_MAX) + 1)]
        self._number = numbers[-1]
        payloads = [json.dumps({"number": n, "fill": self._fill}, separators=(",", ":")) for n in numbers]
        made = [(n, 0) for n in numbers]
        late, undo = rng.random() < LATE, rng.random() < ROLLED_BACK
        try:
            await connection.execute("BEGIN")
            rows = await connection.fetch(INSERT, account, payloads)
            made = [(number, row["id"]) for number, row in zip(numbers, rows, strict=True)]
            if late:
                await asyncio.sleep(rng.uniform(0, LATE_S))
            if undo:
                await connection.execute("ROLLBACK")
        except AWAY:
            self._note("undone", account, made)  # COMMIT was never sent
            raise
        if undo:
            self._note("undone", account, made)
            return
        try:
            await connection.execute("COMMIT")
        except AWAY as exc:
            raise _UnknownError(account, made) from exc
        self._note("committed", account, made)

    def _note(self, fate: str, account: str, made: Made) -> None:
        events = ",".join(f"{number}:{id_}" for number, id_ in made)
        os.write(self._out, f"{fate} {time.time():.6f} {account} {events}\n".encode())


class _UnknownError(Exception):
    def __init__(self, account: str, made: Made) -> None:
        super().__init__("COMMIT was sent, and no answer came")
        self.account = account
        self.made = made


if __name__ == "__main__":
    uvloop.run(Producer(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]).run())
