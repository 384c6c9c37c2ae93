"""Circuit breaker of one endpoint, as a state machine without a clock.

             7 in a row, or half of ≥ 20 within 60 s            wait is over
    CLOSED ────────────────────────────────────────▶ OPEN ────────────────────▶ HALF_OPEN
       ▲                                              ▲     (one probe at a time)  │   │
       │                                              └──── probe failed: longer ──┘   │
       └──────────────────────────────── probe succeeded ──────────────────────────────┘

OPEN lets nothing start. HALF_OPEN lets one probe start; its result decides. Results of POSTs that began before the
breaker opened count for nothing while it is open, so that a burst that fails together opens it once, not forty times
over. Only what says "the endpoint is unwell" is fed in: an answer with Retry-After is not a failure here (DESIGN §9).
States and names: M. Nygard, "Release It!".
"""

from dataclasses import dataclass
from enum import Enum

WINDOW_S = 60.0
WINDOW_CALLS_MIN = 20
WINDOW_FAILED_SHARE = 0.5
WINDOW_SLICES = 6  # the window moves in steps of 10 s: six counters instead of a list of calls
SLICE_S = WINDOW_S / WINDOW_SLICES


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


CLOSED = BreakerState.CLOSED  # looking a member up in its Enum costs 40 ns, several times per POST


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """failures: in a row, that open it. wait_s doubles from first to last."""

    failures: int = 7
    wait_s: float = 5.0
    wait_max_s: float = 300.0


class CircuitBreaker:
    """Mutable state; times are seconds of one monotonic clock."""

    __slots__ = (
        "_calls",
        "_slice_at",
        "consecutive",
        "limits",
        "opened_times",
        "probing",
        "state",
        "until",
        "wait_s",
    )

    def __init__(self, limits: BreakerLimits) -> None:
        self.limits = limits
        self.state = BreakerState.CLOSED
        self.consecutive = 0
        self.until = 0.0  # while OPEN: when a probe may go
        self.wait_s = limits.wait_s
        self.probing = False
        self.opened_times = 0
        # Of each slice its calls and its failures, the newest last; none before the first call. One list, for good: with one a slice, made anew
        # as the window moves, it was seven objects of each endpoint for the collector to walk.
        self._calls: list[int] = []
        self._slice_at = 0

    def __repr__(self) -> str:
        return f"CircuitBreaker({self.state.value}, {self.consecutive} in a row, until {self.until:.3f})"

    def may_start(self, now: float) -> bool:
        """Tell whether a POST may start now. Turns OPEN into HALF_OPEN when the wait is over."""
        if self.state is CLOSED:
            return True
        if self.state is BreakerState.OPEN and now >= self.until:
            self.state, self.probing = BreakerState.HALF_OPEN, False
        return self.state is BreakerState.HALF_OPEN and not self.probing

    def started(self) -> bool:
        """Note that a POST starts (after `may_start`); return whether it is a probe."""
        if self.state is not CLOSED:
            assert self.state is BreakerState.HALF_OPEN, "may_start() was not asked"
            assert not self.probing, "a second probe"
            self.probing = True
            return True
        return False

    def succeeded(self, now: float, probe: bool) -> bool:
        """Note a success; return whether it closed the breaker."""
        if self.state is CLOSED:
            self.consecutive = 0
            self._move(now)
            self._calls[-2] += 1
            return False
        if not (probe and self.state is BreakerState.HALF_OPEN):
            return False
        self.state, self.probing, self.consecutive, self.wait_s = BreakerState.CLOSED, False, 0, self.limits.wait_s
        self._calls.clear()
        return True

    def failed(self, now: float, probe: bool) -> bool:
        """Note a failure; return whether it opened the breaker (again)."""
        if self.state is BreakerState.CLOSED:
            self.consecutive += 1
            self._move(now)
            self._calls[-2] += 1
            self._calls[-1] += 1
            calls, failures = sum(self._calls[::2]), sum(self._calls[1::2])
            many = calls >= WINDOW_CALLS_MIN and failures >= calls * WINDOW_FAILED_SHARE
            if self.consecutive < self.limits.failures and not many:
                return False
        elif probe and self.state is BreakerState.HALF_OPEN:
            self.wait_s = min(self.wait_s * 2, self.limits.wait_max_s)
        else:
            return False
        self.state, self.probing, self.until = BreakerState.OPEN, False, now + self.wait_s
        self.opened_times += 1
        return True

    def abandoned(self, probe: bool) -> None:
        """Note that a started POST came to no result that counts: another probe may go."""
        if probe and self.state is BreakerState.HALF_OPEN:
            self.probing = False

    def _move(self, now: float) -> None:
        """Move the window to the slice that `now` lies in; a clock that steps back stays in the newest."""
        at = int(now / SLICE_S)
        if at > self._slice_at or not self._calls:
            fresh = min(at - self._slice_at, WINDOW_SLICES) if self._calls else WINDOW_SLICES
            self._calls[: 2 * fresh] = ()
            self._calls += [0, 0] * fresh
            self._slice_at = at
