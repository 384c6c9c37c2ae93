"""A bound on failed logins: by address, in memory. Keys can't be guessed; this keeps whoever tries from costing much."""

import ipaddress

FAILURES_MAX = 10
WINDOW_S = 300.0
ADDRESSES_MAX = 10_000


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
