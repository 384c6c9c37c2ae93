"""How endpoints have done: by the minute for a chart, in sum for a list.

Durations are kept as counts in powers of two, so a percentile is the upper end of its bucket: true within a factor of
two, and never better than it was.
"""

import asyncio
from bisect import bisect_left
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dispatcher.errors import InputError
from dispatcher.store.session import Connection
from dispatcher.store.sql import load

BUCKETS = 20  # as the dispatcher writes them (engine/stats.py)
POINTS_MAX = 300  # a day by five minutes; what is made of more would hold the loop for longer than 5 ms
POINTS_A_TURN = 50  # of the event loop: half a millisecond
SPAN_MAX = timedelta(days=31)
STEPS_MIN = (1, 5, 15, 60, 180)


def _load() -> SimpleNamespace:
    buckets = ", ".join(f"sum(durations[{n}])::bigint" for n in range(1, BUCKETS + 1))
    statements = load(Path(__file__).with_name("stats.sql"))
    return SimpleNamespace(**{name: text.replace("{buckets}", buckets) for name, text in vars(statements).items()})


STATS = _load()


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of attempts, and of deliveries given up (`dead`). Latencies in milliseconds; None where there was no attempt."""

    delivered: int
    failed: int
    dead: int
    mean_ms: float | None
    p50_ms: int | None
    p95_ms: int | None
    p99_ms: int | None

    @property
    def success_rate(self) -> float | None:
        attempts = self.delivered + self.failed
        return self.delivered / attempts if attempts else None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.__slots__, "success_rate")}


@dataclass(frozen=True, slots=True)
class Point:
    """`backlog`: the most events that waited for their first attempt."""

    at: datetime
    stats: Stats
    backlog: int


async def series(
    db: Connection, endpoint_id: int, since: datetime | None, until: datetime | None, step_min: int | None = None
) -> list[Point]:
    """Return what happened in each step in which something did. Without bounds: the last 24 hours; without a step: the shortest that gives
    POINTS_MAX points at most."""
    if until is None:
        until = await db.fetchval(STATS.now)
        assert until is not None
    try:
        since = since or until - timedelta(days=1)
    except OverflowError as exc:
        raise InputError("that is before there were years", field="until") from exc
    if not timedelta() <= until - since <= SPAN_MAX:
        raise InputError(f"a range goes forward, and spans at most {SPAN_MAX.days} days", field="since")
    span_min = (until - since) / timedelta(minutes=1)
    if step_min is None:
        step_min = next(step for step in STEPS_MIN if span_min / step <= POINTS_MAX)
    elif span_min / step_min > POINTS_MAX:
        raise InputError(f"these would be more than {POINTS_MAX} points; give a larger step", field="step_min")
    points = []
    for n, row in enumerate(await db.fetch(STATS.series, endpoint_id, since, until, step_min), start=1):
        points.append(Point(row["at"], _stats(row), row["backlog"]))
        if n % POINTS_A_TURN == 0:
            await asyncio.sleep(0)
    return points


async def summaries(db: Connection, endpoint_ids: list[int], span: timedelta = timedelta(days=1)) -> dict[int, Stats]:
    """Return the sums of a page of endpoints; one without attempts isn't in it."""
    rows = await db.fetch(STATS.summaries, endpoint_ids, span)
    return {row["endpoint_id"]: _stats(row) for row in rows}


async def lately(db: Connection, minutes: int) -> Stats:
    """Return the sum of all endpoints' last whole minutes. With many busy endpoints it takes a while: ask once a minute."""
    return _stats(await db.fetchrow(STATS.lately, minutes))


async def by_hour(db: Connection, endpoint_ids: list[int], hours: int = 24) -> dict[int, list[tuple[int, int]]]:
    """Return (delivered, failed) of each of the last hours, oldest first, for each of a page of endpoints that has any."""
    made: dict[int, list[tuple[int, int]]] = {}
    for row in await db.fetch(STATS.by_hour, endpoint_ids, hours):
        counts = made[row["endpoint_id"]] = [(0, 0)] * hours
        for hour, delivered, failed in zip(row["hours"], row["delivered"], row["failed"], strict=True):
            counts[hour] = (delivered, failed)
    return made


async def last_failures(db: Connection, endpoint_ids: list[int]) -> dict[int, dict[str, Any]]:
    """Return the last failed attempt of each of a page of endpoints that has one, as far as retention has left them."""
    return {row["endpoint_id"]: dict(row) for row in await db.fetch(STATS.last_failures, endpoint_ids)}


def percentile(reached: list[int], share: float) -> int | None:
    """Return the upper end, in ms, of the bucket in which the share of attempts is reached. `reached`: attempts up to each bucket's end."""
    return 1 << bisect_left(reached, share * reached[-1]) if reached[-1] else None


def _stats(row: Any) -> Stats:
    delivered, failed, duration_ms = row["delivered"], row["failed"], row["duration_ms"]
    reached = list(accumulate(count or 0 for count in row["durations"]))
    return Stats(
        delivered, failed, row["dead"], duration_ms / (delivered + failed) if delivered + failed else None,
        percentile(reached, 0.5), percentile(reached, 0.95), percentile(reached, 0.99),
    )  # fmt: skip
