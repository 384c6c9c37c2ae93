"""A pace for a receiver that asks for less: additive increase, multiplicative decrease.

An answer 429, 502, 503 or 504 halves the rate at which POSTs start; each second without one adds a twentieth of the rate
that was too much, so that a receiver is back there after ten seconds, and is then asked for a little more. Answers to
POSTs that began before the last cut say nothing new, nor do those within a second of it, which is how long most limits
of receivers count: they cut once. After a minute without one the pace is over, and nothing but the endpoint's own limits
is left. (D.-M. Chiu, R. Jain, 1989: of the linear rules the one that is both efficient and fair to others who use the
same receiver.)

Pure state; times are seconds of one monotonic clock.
"""

from dispatcher.domain.bucket import TokenBucket

THROTTLING = frozenset(
    (429, 502, 503, 504)
)  # Standard Webhooks names 429, 502 and 504; 503 is what servers say as well
CUT = 0.5
STEPS_BACK = 20  # seconds in which the rate grows by as much as it was
RATE_MIN_PER_S = 0.5
CUT_EVERY_S = 1.0
OVER_S = 60.0
BURST_S = 0.02  # a token every few ms could not be waited for: timers have a millisecond


class Pace:
    __slots__ = ("_bucket", "cut_at", "rate_per_s", "since", "step_per_s")

    def __init__(self, rate_per_s: float, now: float) -> None:
        """`rate_per_s`: what was sent when it was too much."""
        self.rate_per_s = rate_per_s
        self._bucket = TokenBucket(RATE_MIN_PER_S, 1, now)
        self._cut(now)

    def __repr__(self) -> str:
        return f"Pace({self.rate_per_s:.1f}/s, cut at {self.cut_at:.3f})"

    def throttled(self, started: float, now: float) -> bool:
        """Take in an answer that asks for less, to a POST that began at `started`; return whether it cut the rate."""
        if started < self.cut_at or now - self.cut_at < CUT_EVERY_S:
            return False
        self._grow(now)
        self._cut(now)
        return True

    def is_over(self, now: float) -> bool:
        return now - self.cut_at >= OVER_S

    def rate_at(self, now: float) -> float:
        self._grow(now)
        return self.rate_per_s

    def ready_at(self, now: float) -> float:
        """Return when a POST may start: `now` or later."""
        self._grow(now)
        return self._bucket.ready_at(now)

    def take(self, now: float) -> None:
        taken = self._bucket.try_take(now)
        assert taken, "ready_at() said that there is a token"

    def _cut(self, now: float) -> None:
        self.step_per_s = self.rate_per_s / STEPS_BACK
        self.cut_at = self.since = now
        self._set(self.rate_per_s * CUT, now)

    def _grow(self, now: float) -> None:
        whole_s = int(now - self.since)
        if whole_s > 0:
            self.since += whole_s
            self._set(self.rate_per_s + whole_s * self.step_per_s, now)

    def _set(self, rate_per_s: float, now: float) -> None:
        self.rate_per_s = max(RATE_MIN_PER_S, rate_per_s)
        self._bucket.change(self.rate_per_s, max(1, int(self.rate_per_s * BURST_S)), now)
