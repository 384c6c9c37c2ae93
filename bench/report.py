"""What becomes of results: JSON to keep, tables on a terminal, pictures, and docs/benchmarks.md.

The document is made of one run's JSON, or of several where a scenario was run by itself (the later one counts), and
of docs/profile.md, which is written by hand: what a profile showed, what was tried, and what it gave.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Rendered

from bench.plot import svg
from bench.scenario import Goal, Plot, Result, Table

PACKAGES = ("uvloop", "asyncpg", "httptools", "aiohttp", "orjson")
UNITS = {"us": "µs", "per_s": "/s", "ms": "ms", "s": "s", "mb": "MB", "kb": "kB", "bytes": "B", "percent": "%"}


@dataclasses.dataclass(slots=True)
class Done:
    """One scenario of one run. `error` where it failed; then there is no result."""

    scenario: str
    shows: str
    misleads: str
    size: dict[str, Any]
    took_s: float
    result: Result
    error: str | None = None


@dataclasses.dataclass(slots=True)
class Run:
    """One run of the bench. `size` is what it was run in: full, quick, or tiny."""

    at: str
    size: str
    machine: dict[str, Any]
    done: list[Done] = dataclasses.field(default_factory=list)


def machine(server_version: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "PostgreSQL": server_version,
        **{name: version(name) for name in PACKAGES},
        "load_before": round(os.getloadavg()[0], 2),
    }


# ── JSON ──


def save(run: Run, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(run), indent=1, ensure_ascii=False))


def load(path: Path) -> Run:
    """Read what `save` wrote. `path` may be the folder it is in."""
    raw = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    done = []
    for one in raw.pop("done"):
        result = one.pop("result")
        made = Result(
            [Table(**table) for table in result["tables"]],
            [Goal(**goal) for goal in result["goals"]],
            [Plot(**plot) for plot in result["plots"]],
        )
        for plot in made.plots:
            plot.lines = {name: [(x, y) for x, y in line] for name, line in plot.lines.items()}
        done.append(Done(**one, result=made))
    return Run(**raw, done=done)


# ── cells ──


def heading(figure: str) -> str:
    """Make words of a figure's name: `dispatcher_cpu_us` → `dispatcher cpu, µs`."""
    for suffix, unit in UNITS.items():
        if figure.endswith(f"_{suffix}"):
            name = figure.removesuffix(f"_{suffix}")
            return f"{name.replace('_', ' ')}{'' if unit == '/s' else ', '}{unit}"
    return figure.replace("_", " ")


def number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1_000 else f"{value:.3g}" if size < 10 else f"{value:.1f}"


def cell(values: list[float] | None) -> str:
    """Show the median, and the smallest and largest if there were several rounds."""
    if not values:
        return "–"
    median = number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({number(min(values))}–{number(max(values))})"


def narrow(values: list[float] | None) -> str:
    """Show the same, the spread below the median."""
    return cell(values).replace(" (", "\n[dim]").replace(")", "[/dim]")


def columns(table: Table) -> list[str]:
    return list(dict.fromkeys(figure for figures in table.rows.values() for figure in figures))


def judged(goal: Goal) -> str:
    if goal.void is not None:
        return f"void: {goal.void}"
    median = statistics.median(goal.values)
    if goal.out_for is not None and (median >= goal.out_for if goal.relation == "≥" else median <= goal.out_for):
        return "yes, and what we are out for"
    return "yes" if goal.is_met else "no"


# ── the terminal ──


def show(run: Run, console: Console) -> None:
    for done in run.done:
        console.rule(f"[bold]{done.scenario}[/bold]  {done.took_s:.0f} s")
        console.print(f"{done.shows} [dim]Could mislead: {done.misleads}[/dim]")
        if done.error is not None:
            console.print(f"FAILED: {done.error}", style="bold red", markup=False)
        for table in done.result.tables:
            rendered = Rendered(title=table.title, title_justify="left")
            rendered.add_column("")
            shown = columns(table)
            for figure in shown:
                rendered.add_column(heading(figure), justify="right")
            for row, figures in table.rows.items():
                style = "red" if row in table.void else None
                rendered.add_row(row, *(narrow(figures.get(figure)) for figure in shown), style=style)
            console.print(rendered)
            for row, why in table.void.items():
                console.print(f"VOID: {row}: {why}", style="bold red", markup=False)
    goals = [goal for done in run.done for goal in done.result.goals]
    if goals:
        rendered = Rendered("goal", "wanted", "out for", "here", "reached", title="Goals", title_justify="left")
        for goal in goals:
            style = None if goal.is_met else "red"
            rendered.add_row(*_goal_cells(goal), style=style)
        console.print(rendered)


def _goal_cells(goal: Goal) -> tuple[str, ...]:
    out_for = "" if goal.out_for is None else f"{goal.relation} {number(goal.out_for)}"
    return goal.what, f"{goal.relation} {number(goal.wanted)}", out_for, cell(goal.values), judged(goal)


# ── pictures and the document ──


def draw(runs: Iterable[Done], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for done in runs:
        for plot in done.result.plots:
            (folder / f"{plot.name}.svg").write_text(svg(plot))


INTRODUCTION = """\
# Benchmarks

Made by `python -m bench report`, of the results of {command}. Don't edit it: what is written by hand is in [profile.md](profile.md).

`make bench` runs everything, in over an hour; `make bench ARGS=--quick` in under three minutes; `python -m bench --list` says what there
is, and `--help` how to choose scenarios, sizes and a database of your own. It starts a PostgreSQL, receivers and the dispatcher, each a
process of its own, talks to loopback only, and ends by itself. Results go to `bench/results/`.

**How to read it.** Every figure stands beside what it is compared with in the same run: median (smallest–largest) of several rounds, which
take turns, so that a slow moment of the machine meets all. CPU time is each process's own, from `/proc`. A row whose receiver was the limit
is void. What takes a few seconds is measured again, twice at most, where the hypervisor gave more than a hundredth of the cores' time to other
machines meanwhile. Absolute figures are this machine's; ratios travel better.

{machine}

Compared with: the **bare client**, the least that an asyncio HTTP client can cost (`bench/ceiling.py`, frozen; it shares no code with the
product); `wrk`, where it is installed; the **same engine on aiohttp** (`transport = "aiohttp"`); and the **usual way**, written well
(`bench/usual.py`): a queue table claimed with SKIP LOCKED, aiohttp, a status update per row, or batched.
"""


def document(runs: list[Run], profile: str, pictures: str) -> str:
    """Write docs/benchmarks.md. `pictures` is the folder they are in, as the document links to it."""
    newest: dict[str, tuple[Run, Done]] = {}
    for run in runs:
        for done in run.done:
            newest[done.scenario] = (run, done)
    described = []
    for run in runs:
        about = dict(run.machine)
        scenarios = ", ".join(name for name, (of, _) in newest.items() if of is run)
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
        described.append(f"{run.at}, size {run.size} ({scenarios}): {words}.")
    sizes = " and ".join(dict.fromkeys(f"a {run.size} run" for run in runs))
    sizes += (
        ", and of scenarios that were run by themselves afterwards (below: when, and which)" if len(runs) > 1 else ""
    )
    parts = [INTRODUCTION.format(command=sizes, machine="\n\n".join(described))]
    goals = [goal for _, done in newest.values() for goal in done.result.goals]
    if goals:
        rows = [(*_goal_cells(goal)[:4], f"**{judged(goal)}**" if not goal.is_met else judged(goal)) for goal in goals]
        parts.append("## Goals\n\n" + _markdown(("goal", "wanted", "out for", "here", "reached"), rows))
    for _, done in newest.values():
        parts.append(_section(done, pictures))
    parts.append(profile)
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _section(done: Done, pictures: str) -> str:
    size = ", ".join(f"{name} {_size(value)}" for name, value in done.size.items())
    lines = [
        f"## {done.scenario.capitalize()}",
        "",
        done.shows,
        f"Could mislead: {done.misleads}",
        "",
        f"`python -m bench --only {done.scenario}`; {size}; took {done.took_s:.0f} s.",
        "",
    ]
    if done.error is not None:
        lines += [f"**It failed:** {done.error}", ""]
    for table in done.result.tables:
        shown = columns(table)
        rows = [(row, *(cell(figures.get(figure)) for figure in shown)) for row, figures in table.rows.items()]
        lines += [f"**{table.title}**", "", _markdown(("", *map(heading, shown)), rows)]
        lines += [f"**Void**, {row}: {why}.\n" for row, why in table.void.items()]
    lines += [f"![{plot.title}]({pictures}/{plot.name}.svg)\n" for plot in done.result.plots]
    return "\n".join(lines)


def _size(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows)) + "\n"
