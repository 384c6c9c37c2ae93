"""What an endpoint's attempts were like, minute by minute. Counted where results are batched; a minute is written when it is over."""

from dispatcher.ports import StatRow

MINUTE_US = 60_000_000
BUCKETS = 20  # of durations: < 1 ms, < 2 ms, < 4 ms, …; the last reaches beyond every timeout
LONGEST_US = (1 << BUCKETS - 1) * 1_000 - 1  # eight minutes; a process that was suspended over a POST measures any time
OVER = -1  # no minute
_NONE = (0,) * BUCKETS


class Stat:
    """One endpoint's minute; plain, because every result counts into one (0.3 µs). One instance for all its minutes: with a new one each, of
    ten thousand endpoints, half of what the collector had to walk was these."""

    __slots__ = ("dead", "delivered", "duration_us", "durations", "expired", "failed", "minute")

    def __init__(self) -> None:
        self.durations = [0] * BUCKETS
        self.begin(OVER)

    def begin(self, minute: int) -> None:
        self.minute = minute  # since 1970
        self.delivered = self.failed = self.dead = self.expired = self.duration_us = 0
        self.durations[:] = _NONE

    def row(self, endpoint_id: int) -> StatRow:
        return StatRow(
            endpoint_id,
            self.minute,
            self.delivered,
            self.failed,
            self.dead,
            self.duration_us // 1000,
            self.durations.copy(),
            self.expired,
        )
