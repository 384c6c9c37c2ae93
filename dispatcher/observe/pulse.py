"""The beat of a process: a timer that is late by as much as the loop is, and what has moved between two beats.

Reader and recorder touch a counter at every turn, at least once a second, also when there is nothing to do. So a look at
the counters once a second tells whether they move, and they need not know that anybody looks.
"""

import asyncio
import time
from collections.abc import Callable

from dispatcher.engine.counters import Counters
from dispatcher.engine.engine import Engine, State
from dispatcher.engine.histogram import Histogram

BEAT_S = 0.1
LOOK_S = 1.0


class Pulse:
    """`run` beats until it is cancelled; `on_look` is called once a second. Without an engine nothing is to move but the loop."""

    def __init__(self, engine: Engine | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self.loop_lag_us = Histogram()
        self.on_look: Callable[[], None] = lambda: None
        self._engine = engine
        self._now = now
        self._reader = _Moving(reads, now())
        self._recorder = _Moving(lambda counters: counters.checkpoints + counters.batches, now())

    @property
    def reader_quiet_s(self) -> float:
        """How long the reader has not looked at the log; 0 while it isn't this process's to read."""
        return self._reader.quiet_s(self._now()) if self._owns else 0.0

    @property
    def recorder_quiet_s(self) -> float:
        """How long no batch has been committed; an idle dispatcher commits a checkpoint a second."""
        return self._recorder.quiet_s(self._now()) if self._owns else 0.0

    @property
    def _owns(self) -> bool:
        return self._engine is not None and self._engine.state is State.OWNER

    async def run(self) -> None:
        looked_at = self._now()
        while True:
            due = self._now() + BEAT_S
            await asyncio.sleep(BEAT_S)
            now = self._now()
            self.loop_lag_us.add(max(0, int((now - due) * 1e6)))
            if now - looked_at >= LOOK_S:
                looked_at = now
                self.look(now)

    def look(self, now: float) -> None:
        if self._engine is not None:
            for moving in (self._reader, self._recorder):
                moving.look(self._engine.counters, now, owns=self._owns)
        self.on_look()


class _Moving:
    """When a figure that only grows was last seen to have grown."""

    def __init__(self, figure: Callable[[Counters], int], now: float) -> None:
        self._figure = figure
        self._value = -1
        self._at = now

    def look(self, counters: Counters, now: float, *, owns: bool) -> None:
        value = self._figure(counters)
        if value != self._value or not owns:
            self._value, self._at = value, now

    def quiet_s(self, now: float) -> float:
        return max(0.0, now - self._at)


def reads(counters: Counters) -> int:
    """Count the reader's turns: at the memory bound it waits instead of reading, and is well."""
    return counters.head_reads + counters.memory_waits + counters.gap_reads + counters.lag_reads + counters.retry_reads
