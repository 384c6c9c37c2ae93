"""The engine's two clocks: a monotonic one for waits, and the database's wall clock for what is stored.

`time.monotonic`, not `loop.time()`: uvloop's is cached per iteration and counts milliseconds. A simulation replaces
`monotonic`.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """Of the database's clock: set at the start, and held to it by every answer that tells it. Between answers it runs with the monotonic
    one, so a step of the local clock changes nothing, and a step of the database's, or a machine that was suspended, is followed."""

    __slots__ = ("_offset_us", "now")

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.now = monotonic
        self._offset_us = int(time.time() * 1e6) - int(monotonic() * 1e6)

    def sync(self, wall_us: int) -> None:
        """Set the wall clock to what the database's just was: slow by as long as that took to come."""
        self._offset_us = wall_us - int(self.now() * 1e6)

    def align(self, asked_at: float, wall_us: int, answered_at: float) -> None:
        """Move the wall clock only as far as an answer proves it wrong: the database's was `wall_us` at a time between the two monotonic ones,
        and no more is known (K. Marzullo, 1984). The answer that took least has the last word, so the clock isn't slow for long."""
        slowest_us, fastest_us = wall_us - int(answered_at * 1e6), wall_us - int(asked_at * 1e6)
        self._offset_us = min(max(self._offset_us, slowest_us), fastest_us)

    def wall_us(self, now: float | None = None) -> int:
        """Return the wall clock, of the monotonic instant `now` if given: µs since 1970."""
        return self._offset_us + int((self.now() if now is None else now) * 1e6)

    def monotonic(self, wall_us: int) -> float:
        """Return the monotonic instant at which the wall clock will be, or was, `wall_us`."""
        return (wall_us - self._offset_us) / 1e6

    def wall(self) -> datetime:
        return datetime.fromtimestamp(self.wall_us() / 1e6, UTC)
