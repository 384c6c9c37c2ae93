"""What a scenario is and what it yields: tables with one value a round in each cell, goals that are judged by them, and
pictures.

A row is one contender or one factor; whatever it is compared with is another row of the same table, measured in the
same run. Names of figures end in their unit (`cpu_us`, `rate_per_s`). Everything here is plain data, so that a run
can be kept as JSON and reported later.
"""

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.rig import Bench

Figures = dict[str, list[float]]  # one value a round
Relation = Literal["≥", "≤"]

SINK_SHARE_MAX = 0.9  # of a core: a sink that used more was the limit


@dataclass(slots=True)
class Goal:
    """Something to reach: the median of `values` in `relation` to `wanted`; `out_for` is what we would like better still."""

    what: str
    values: list[float]
    relation: Relation
    wanted: float
    out_for: float | None = None
    void: str | None = None

    @property
    def is_met(self) -> bool:
        median = statistics.median(self.values)
        return self.void is None and (median >= self.wanted if self.relation == "≥" else median <= self.wanted)


@dataclass(slots=True)
class Table:
    title: str
    rows: dict[str, Figures] = field(default_factory=dict)
    void: dict[str, str] = field(default_factory=dict)  # row → why its figures mean nothing

    def add(self, row: str, /, **figures: float | None) -> None:
        """Add one round's figures; None is what can't be told here, such as the CPU time of a server elsewhere."""
        kept = self.rows.setdefault(row, {})
        for name, value in figures.items():
            if value is not None:
                kept.setdefault(name, []).append(float(value))

    def check_sink(self, row: str, share: float) -> None:
        """Mark a row as void if its sink was the limit."""
        if share >= SINK_SHARE_MAX:
            self.void[row] = f"the sink was the limit: it used {share:.2f} of a core"

    def values(self, figure: str, row: str, over: str | None = None) -> list[float]:
        """Return a figure's rounds, or its ratio to another row's in the same round."""
        if over is None:
            return self.rows[row][figure]
        pairs = zip(self.rows[row][figure], self.rows[over][figure], strict=True)
        return [a / b if b else float("inf") for a, b in pairs]

    def goal(
        self, what: str, figure: str, row: str, relation: Relation, wanted: float, *, over: str | None = None, out_for: float | None = None
    ) -> list[Goal]:  # fmt: skip
        """Return the goal, or nothing where this run has no such row or figure."""
        if any(figure not in self.rows.get(name, {}) for name in (row, over) if name is not None):
            return []
        void = self.void.get(row) or (self.void.get(over) if over is not None else None)
        return [Goal(what, self.values(figure, row, over), relation, wanted, out_for, void)]


@dataclass(slots=True)
class Plot:
    """Lines through points; or, if `stacked`, one bar a name, made up of its series."""

    name: str  # of the file
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    stacked: dict[str, dict[str, float]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


@dataclass(slots=True)
class Result:
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`sizes` are frozen dataclasses of the scenario's own: `full`, `quick` (all scenarios together in three minutes), and `tiny` for tests."""

    name: str
    shows: str
    misleads: str
    sizes: Mapping[str, Any]
    run: Callable[[Bench, Any], Awaitable[Result]]


def median(values: list[float]) -> float:
    return statistics.median(values)
