"""Bounds in memory. On failed logins, by address: keys can't be guessed; this keeps whoever tries from costing much. And on tests under way."""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.errors import BusyError

FAILURES_MAX = 10
WINDOW_S = 300.0
ADDRESSES_MAX = 10_000
TRIALS_OF_ACCOUNT_MAX = 5
TRIALS_MAX = 100


class Trials:
    """Tests under way. Each may take a minute, and its sockets are the deliveries' too."""

    def __init__(self) -> None:
        self._of: Counter[str | None] = Counter()

    @contextmanager
    def under_way(self, account_id: str | None) -> Iterator[None]:
        """Count one of an account's, None: of the operators'. Raises BusyError where there are too many."""
        of_account_max = TRIALS_MAX if account_id is None else TRIALS_OF_ACCOUNT_MAX
        if self._of[account_id] >= of_account_max or self._of.total() >= TRIALS_MAX:
            raise BusyError("too many tests are under way; try again when one has ended")
        self._of[account_id] += 1
        try:
            yield
        finally:
            self._of[account_id] -= 1
            if not self._of[account_id]:
                del self._of[account_id]


class FailedLogins:
    """Counts failures by address in windows of five minutes. An IPv6 address counts as its /64: that is one customer's."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, int]] = {}  # address → (when its window ends, failures in it)

    def wait_s(self, address: str, now: float) -> float:
        """Return how long the address must wait before it may try again; 0 if it needn't."""
        until, count = self._counts.get(_place(address), (0.0, 0))
        return until - now if count >= FAILURES_MAX and until > now else 0.0

    def count(self, address: str, now: float) -> None:
        place = _place(address)
        until, count = self._counts.pop(place, (0.0, 0))
        if until <= now:
            until, count = now + WINDOW_S, 0
        self._counts[place] = (until, count + 1)
        if len(self._counts) > ADDRESSES_MAX:
            del self._counts[next(iter(self._counts))]  # the one that failed longest ago

    def __len__(self) -> int:
        return len(self._counts)


def _place(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address
