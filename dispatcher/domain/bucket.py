"""Token bucket: at most rate·t + burst POSTs start in any span of t seconds.

Exact: tokens accrue continuously and `ready_at` is the instant at which the next one is there, so that a lane can sleep
until then instead of looking. Used per endpoint; the algorithm is RFC 2697's, with one rate and one burst.
"""

# After months of uptime a double holds an instant to about a nanosecond, so what ready_at() returns can lie that much
# before the token. Less than this counts as there, up to 4 years of uptime; what was taken early is owed (`tokens`
# falls below 0), so it never adds up.
EARLY_S = 1e-8


class TokenBucket:
    """State of one endpoint's rate limit. Times are seconds of one monotonic clock; mutable for the hot path."""

    __slots__ = ("burst", "rate_per_s", "stamp", "tokens")

    def __init__(self, rate_per_s: float, burst: int, now: float) -> None:
        assert rate_per_s > 0
        assert burst >= 1
        self.rate_per_s = rate_per_s
        self.burst = burst
        self.tokens = float(burst)
        self.stamp = now

    def __repr__(self) -> str:
        return f"TokenBucket({self.rate_per_s}/s, {self.tokens:.2f} of {self.burst})"

    def try_take(self, now: float) -> bool:
        """Take a token if one is there."""
        self._accrue(now)
        if 1 - self.tokens > self.rate_per_s * EARLY_S:
            return False
        self.tokens -= 1
        return True

    def ready_at(self, now: float) -> float:
        """Return when the next token is there: `now` or later. `try_take` at that instant succeeds."""
        self._accrue(now)
        missing = 1 - self.tokens
        return now if missing <= self.rate_per_s * EARLY_S else now + missing / self.rate_per_s

    def change(self, rate_per_s: float, burst: int, now: float) -> None:
        """Adopt other limits, keeping no more tokens than the new burst."""
        self._accrue(now)
        self.rate_per_s, self.burst = rate_per_s, burst
        self.tokens = min(self.tokens, float(burst))

    def _accrue(self, now: float) -> None:
        if now > self.stamp:  # a clock that stands still or steps back gives nothing
            self.tokens = min(float(self.burst), self.tokens + (now - self.stamp) * self.rate_per_s)
            self.stamp = now
