"""Virtual time: an event loop whose clock stands still while anything is ready and jumps to the next timer when nothing is.

Whatever runs belongs to a *process* (a context variable, inherited by tasks and callbacks) or to the world around them. A halted process
runs nothing: its callbacks are kept, in order. Halted and let go on, it was frozen; never let go on, it was killed, between two callbacks
and so between any two awaits, without a `finally` of it being run. Only what is on the wire already arrives.

No threads, no sockets, no real clock. The order of callbacks is that of a real loop: ready ones first in, first out, timers by their time.
"""

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from dispatcher.transport.memory import MemoryConnection

_ON_THE_WIRE = MemoryConnection._arrive


class Halting:
    """What the loop must know of a process."""

    def __init__(self) -> None:
        self.halted = False
        self.parked: list[asyncio.Handle] = []


PROCESS: contextvars.ContextVar[Any] = contextvars.ContextVar("process", default=None)


class Stuck(Exception):  # noqa: N818 - a state, not an error of ours
    """Nothing is ready, and no timer is set."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """`on_surprise` is told what a callback raised, or a task that nobody awaits."""

    def __init__(self) -> None:
        self.on_surprise: Callable[[str], None] = lambda what: None
        self.callbacks = 0  # run so far
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._serial = 0
        self._stopping = False

    # ── what tasks and callbacks ask for ──

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._serial += 1
        heapq.heappush(self._timers, (when, self._serial, handle))
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.on_surprise(f"{context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # skipped when its time comes

    # ── running ──

    def stop(self) -> None:
        self._stopping = True

    def run(self, task: asyncio.Task[Any], *, callbacks_max: int) -> bool:
        """Run until the task is done (True), somebody calls `stop`, or so many callbacks have been run (False)."""
        last = self.callbacks + callbacks_max
        self._stopping = False
        asyncio._set_running_loop(self)
        try:
            while not self._stopping and not task.done() and self.callbacks < last:
                self._step()
        finally:
            asyncio._set_running_loop(None)
        return task.done()

    def _step(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Stuck
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if (
                process is not None
                and process.halted
                and getattr(handle._callback, "__func__", None) is not _ON_THE_WIRE
            ):
                process.parked.append(handle)
                continue
            self.callbacks += 1
            handle._run()
            if self._stopping:
                return

    def let_go_on(self, process: Halting) -> None:
        """Run what a halted process would have run meanwhile."""
        process.halted = False
        self._ready.extend(process.parked)
        process.parked = []

    def wind_up(self, processes: list[Any]) -> None:
        """End every task that is left, so that none is destroyed while pending. What they still do means nothing."""
        self.on_surprise = lambda what: None
        self._stopping = False
        for process in processes:
            self.let_go_on(process)
        asyncio._set_running_loop(self)
        try:
            for _ in range(200):
                tasks = [task for task in asyncio.all_tasks(self) if not task.done()]
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                with contextlib.suppress(Stuck):
                    for _ in range(4):
                        self._step()
        finally:
            asyncio._set_running_loop(None)
        self._ready.clear()
        self._timers.clear()
