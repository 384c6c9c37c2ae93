"""A log-linear histogram (as HdrHistogram's): any value, within 1 %, in a few hundred counts; histograms of phases and
rounds can be added.

Values are microseconds. Below 128 each has a bucket of its own; above, every power of two is divided into 64 equal
buckets.
"""

from collections import Counter
from collections.abc import Iterable

BITS = 7  # of a value that are kept: the error is at most 1 in 2⁷


class Histogram:
    """Count durations. Percentiles are the upper edge of the bucket they fall into, so never flattering."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.total = 0
        self.max_us = 0

    def add(self, value_us: float) -> None:
        value = max(0, round(value_us))
        self.counts[_bucket(value)] += 1
        self.total += 1
        self.max_us = max(self.max_us, value)

    def merge(self, others: Iterable["Histogram"]) -> "Histogram":
        """Take in what the others have counted; return self."""
        for other in others:
            self.counts.update(other.counts)
            self.total += other.total
            self.max_us = max(self.max_us, other.max_us)
        return self

    def percentile_ms(self, share: float) -> float:
        """Return the value, in ms, that a share of all values doesn't exceed. There must be values."""
        assert self.total, "a percentile of nothing"
        rank = min(self.total, max(1, -(-share * self.total // 1)))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return min(_upper(bucket), self.max_us) / 1e3
        raise AssertionError("the counts don't add up to the total")

    def figures(self) -> dict[str, float]:
        """Return the percentiles that the tables show."""
        named = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
        return {name: self.percentile_ms(share) for name, share in named.items()}

    def curve(self) -> list[tuple[float, float]]:
        """Return (how many nines × 10, ms) up to what the number of values can tell: the usual picture of a latency distribution."""
        points = []
        share_above = 1.0
        while share_above * self.total >= 1:
            points.append((1 / share_above, self.percentile_ms(1 - share_above)))
            share_above /= 10**0.25
        return points


def _bucket(value: int) -> int:
    shift = max(0, value.bit_length() - BITS)
    return (shift << BITS) + (value >> shift)


def _upper(bucket: int) -> int:
    shift, kept = bucket >> BITS, bucket & ((1 << BITS) - 1)
    return ((kept + 1) << shift) - 1
