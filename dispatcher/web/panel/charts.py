"""Charts as numbers: bars that a template writes as SVG attributes, because the policy allows no style of its own. Each chart
says in words what it shows, for who can't see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2

from dispatcher.domain.text import amount


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars of what went well on top of what did not. `good` and `bad` are each one path of all its bars: an element for each of them took
    most of the time in which a page of fifty charts was made."""

    width: float
    height: float
    most: int  # attempts of the highest bar
    good: str
    bad: str
    words: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart, in as many parts as it has gaps: each the `points` of a polyline."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    width: float
    height: float
    most: float  # what the top is
    lines: tuple[Line, ...]
    words: str


def lines(
    series: dict[str, Sequence[float | None]], *, width: float, height: float, words: str, log: bool = False
) -> Lines:
    """Return a chart of values that hold for a step each; None leaves a gap. `log`: each power of two is as high as the next, from 1 up."""
    most = max((value for values in series.values() for value in values if value is not None), default=0)
    top, floor = height - 3, height - 1

    @cache  # of a day's steps few are different, and a logarithm for each took most of the time
    def at(value: float) -> float:
        share = log2(max(1.0, value)) / max(1.0, log2(max(1.0, most))) if log else value / (most or 1)
        return round(floor - share * top, 2)

    made = []
    for name, values in series.items():
        edges = _edges(len(values), width)
        parts: list[list[str]] = [[]]
        for n, value in enumerate(values):
            if value is not None:
                parts[-1] += [f"{edges[n]},{at(value)}", f"{edges[n + 1]},{at(value)}"]
            elif parts[-1]:
                parts.append([])
        made.append(Line(name, tuple(" ".join(part) for part in parts if part)))
    return Lines(width, height, most, tuple(made), words)


@lru_cache(maxsize=32)
def _edges(steps: int, width: float) -> tuple[str, ...]:
    """Return where steps begin, and where the last one ends. Few are different, and to write them took half of a bar chart's time."""
    return tuple(f"{n * width / max(1, steps):.2f}" for n in range(steps + 1))


def bars(steps: Sequence[tuple[int, int]], *, width: float, height: float, span: str) -> Chart:
    """Return a chart of (delivered, failed) a step. The highest bar is as high as the chart; one that is not empty can be seen."""
    most = max((delivered + failed for delivered, failed in steps), default=0)
    step, scale = width / max(1, len(steps)), height / max(1, most)
    wide, bottom, edges = f"{max(0.5, step * 0.8):.2f}", f"{height:g}", _edges(len(steps), width)
    good, bad = [], []
    for n, (delivered, failed) in enumerate(steps):  # a day has 288, in one turn of the loop
        floor = height - max(1.0, failed * scale) if failed else height
        if failed:
            bad.append(f"M{edges[n]} {bottom}V{floor:.2f}h{wide}V{bottom}z")
        if delivered:
            good.append(
                f"M{edges[n]} {floor:.2f}V{max(0.0, floor - max(1.0, delivered * scale)):.2f}h{wide}V{floor:.2f}z"
            )
    delivered, failed = sum(step[0] for step in steps), sum(step[1] for step in steps)
    words = f"{delivered:,} delivered and {amount(failed, 'failed attempt')} {span}"
    return Chart(width, height, most, "".join(good), "".join(bad), words)
