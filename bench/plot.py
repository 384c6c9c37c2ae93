"""Pictures of a result, as SVG written by hand: a few lines through points, or a few stacked bars, need no library.

Colours are Okabe and Ito's, which the colour-blind can tell apart; text is the reader's own font.
"""

import math
from collections.abc import Iterator
from html import escape

from bench.scenario import Plot

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 46
BAR = 22


def svg(plot: Plot) -> str:
    """Draw one picture."""
    parts = list(_bars(plot) if plot.stacked else _lines(plot))
    height = _bars_height(plot) if plot.stacked else HEIGHT + 18 * len(plot.lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        + _text(WIDTH / 2, 22, plot.title, anchor="middle", weight="bold")
        + "".join(parts)
        + "</svg>\n"
    )


class _Scale:
    """From values to pixels, linear or logarithmic, with ticks at round values."""

    def __init__(self, low: float, high: float, begin: float, end: float, *, log: bool) -> None:
        self._log = log
        if log:
            self.low = 10 ** math.floor(math.log10(low))
            self.high = max(10 ** math.ceil(math.log10(high)), self.low * 10)
            self.ticks = [self.low * 10**n for n in range(1 + round(math.log10(self.high / self.low)))]
        else:
            step = _round_step((high - low) / 5 or abs(high) / 5 or 1)
            self.low, self.high = math.floor(low / step) * step, max(math.ceil(high / step) * step, step)
            self.ticks = [self.low + step * n for n in range(1 + round((self.high - self.low) / step))]
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        share = math.log(value / low) / math.log(high / low) if self._log else (value - low) / (high - low)
        return round(self._begin + share * (self._end - self._begin), 1)


def _round_step(step: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 5, 10) if step <= factor * power * 1.001)


def _lines(plot: Plot) -> Iterator[str]:
    points = [point for line in plot.lines.values() for point in line]
    if not points:
        yield _text(WIDTH / 2, HEIGHT / 2, "no values", anchor="middle")
        return
    xs, ys = [x for x, _ in points], [y for _, y in points]
    floor = min((y for y in ys if y > 0), default=1.0) if plot.log_y else min(0.0, *ys)
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=plot.log_x)
    up = _Scale(floor, max(max(ys), floor), HEIGHT - BOTTOM, TOP, log=plot.log_y)
    for tick in up.ticks:
        y = up(tick)
        yield f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#dddddd"/>\n' + _text(
            LEFT - 6, y + 4, _short(tick), anchor="end"
        )
    for tick in across.ticks:
        x = across(tick)
        yield f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="#eeeeee"/>\n' + _text(
            x, HEIGHT - BOTTOM + 16, _short(tick), anchor="middle"
        )
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, plot.x, anchor="middle")
    yield _text(16, (TOP + HEIGHT - BOTTOM) / 2, plot.y, anchor="middle", turned=True)
    for n, (name, line) in enumerate(plot.lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        shown = [(x, max(y, up.low)) for x, y in line]
        path = "L".join(f"{across(x)} {up(y)}" for x, y in shown)
        dots = "" if n < len(COLOURS) else ' stroke-dasharray="4 3"'
        if path:
            yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dots}/>\n'
        y = HEIGHT + 18 * n + 4
        yield f'<path d="M{LEFT} {y - 4}h24" stroke="{colour}" stroke-width="3"{dots}/>\n' + _text(LEFT + 32, y, name)


def _bars_height(plot: Plot) -> int:
    return TOP + (BAR + 6) * len(plot.stacked) + 60


def _bars(plot: Plot) -> Iterator[str]:
    left = 210
    series = list(dict.fromkeys(name for bar in plot.stacked.values() for name in bar))
    across = _Scale(0, max(sum(bar.values()) for bar in plot.stacked.values()), left, WIDTH - RIGHT, log=False)
    bottom = TOP + (BAR + 6) * len(plot.stacked)
    for tick in across.ticks:
        x = across(tick)
        yield f'<path d="M{x} {TOP}V{bottom}" stroke="#dddddd"/>\n' + _text(
            x, bottom + 14, _short(tick), anchor="middle"
        )
    yield _text((left + WIDTH - RIGHT) / 2, bottom + 30, plot.x, anchor="middle")
    for row, (name, bar) in enumerate(plot.stacked.items()):
        y = TOP + (BAR + 6) * row + 3
        yield _text(left - 8, y + BAR / 2 + 4, name, anchor="end")
        done = 0.0
        for part, value in bar.items():
            x, done = across(done), done + value
            colour = COLOURS[series.index(part) % len(COLOURS)]
            yield f'<rect x="{x}" y="{y}" width="{round(across(done) - x, 1)}" height="{BAR}" fill="{colour}"/>\n'
    for n, part in enumerate(series):
        x = left + 150 * n
        yield f'<rect x="{x}" y="{bottom + 40}" width="12" height="12" fill="{COLOURS[n % len(COLOURS)]}"/>\n'
        yield _text(x + 18, bottom + 50, part)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}"{turn}>{escape(text)}</text>\n'


def _short(value: float) -> str:
    for size, suffix in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= 2 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{suffix}"
    return f"{value:.6g}"
