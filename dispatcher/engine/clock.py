"""The engine's two clocks: a monotonic one for waits, and the database's wall clock for what is stored.

`time.monotonic`, not `loop.time()`: uvloop's is cached per iteration and counts milliseconds. A simulation replaces
`monotonic`.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """`sync` aligns the wall clock with the database's; between syncs it runs with the monotonic one, so a step of the local clock changes
    nothing."""

    __slots__ = ("_offset_us", "now")

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.now = monotonic
        self._offset_us = int(time.time() * 1e6) - int(monotonic() * 1e6)

    def sync(self, wall_us: int) -> None:
        self._offset_us = wall_us - int(self.now() * 1e6)

    def wall_us(self, now: float | None = None) -> int:
        """Return the wall clock, of the monotonic instant `now` if given: µs since 1970."""
        return self._offset_us + int((self.now() if now is None else now) * 1e6)

    def wall(self) -> datetime:
        return datetime.fromtimestamp(self.wall_us() / 1e6, UTC)
