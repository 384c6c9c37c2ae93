"""Charts as numbers: bars that a template writes as SVG attributes, because the policy allows no style of its own. Each chart
says in words what it shows, for who can't see it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bar:
    """One step: `good` on top of `bad`, in the chart's units, from its floor."""

    x: float
    good: float
    bad: float


@dataclass(frozen=True, slots=True)
class Chart:
    width: float
    height: float
    step: float
    most: int  # attempts of the highest bar
    bars: tuple[Bar, ...]
    words: str


def bars(steps: Sequence[tuple[int, int]], *, width: float, height: float, span: str) -> Chart:
    """Return a chart of (delivered, failed) a step. The highest bar is as high as the chart; one that is not empty can be seen."""
    most = max((delivered + failed for delivered, failed in steps), default=0)
    step = width / max(1, len(steps))

    def high(count: int) -> float:
        return 0 if not count else round(max(1.0, count / most * height), 2)

    made = tuple(
        Bar(round(n * step, 2), high(delivered), high(failed)) for n, (delivered, failed) in enumerate(steps) if delivered + failed
    )  # fmt: skip
    delivered, failed = sum(step[0] for step in steps), sum(step[1] for step in steps)
    words = f"{delivered:,} delivered and {failed:,} failed attempts {span}"
    return Chart(width, height, round(step, 2), most, made, words)
