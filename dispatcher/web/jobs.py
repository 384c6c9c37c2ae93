"""Work that outlives its request: an erasure. A bounded number of tasks, owned here, ended with the server."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from dispatcher.errors import BusyError, DispatcherError

_log = structlog.get_logger(room="web")

JOBS_MAX = 1  # a job has one of the two long connections; the other is for requests


class Jobs:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def check_room(self) -> None:
        if len(self._tasks) >= JOBS_MAX:
            raise BusyError("work of this kind is under way; ask again when it has ended")

    def start(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        """Begin, or raise BusyError. What it does must be safe to repeat: the server may end in the middle."""
        self.check_room()
        task = asyncio.create_task(self._run(name, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except DispatcherError as exc:
            _log.error("job.failed", job=name, error=str(exc))
        except Exception:  # noqa: BLE001 - logged with its trace; nobody awaits it
            _log.exception("job.failed", job=name)
