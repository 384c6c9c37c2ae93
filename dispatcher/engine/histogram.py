"""How long and how large things were, in buckets of powers of two: one increment of a list where the fact is known."""

BUCKETS = 64  # beyond every value that a column holds, so that nothing is clamped


class Histogram:
    """Of non-negative ints, in units that its owner names. Bucket n has the values below 2ⁿ that bucket n − 1 has not."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[value.bit_length()] += 1
        self.total += value


class Histograms:
    """What one dispatcher measures of itself, over all of its incarnations. Units last in names."""

    def __init__(self) -> None:
        self.received_us = Histogram()  # from an event's row to the 2xx of its first attempt
        self.attempt_us = Histogram()
        self.batch_rows = Histogram()
        self.batch_us = Histogram()  # from a batch that is built to its commit, waits for the database included
        self.failures: dict[str, int] = {}  # attempts by what went wrong: a fault, or the class of the answer's status
