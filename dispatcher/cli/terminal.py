"""Asking before something irrevocable or big, and bars on what takes long. Both talk on stderr: stdout is for results."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dispatcher.errors import InputError

yes_option = click.option("--yes", is_flag=True, help="Don't ask. Needed where standard input is not a terminal.")


class Rate(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """Deliveries a second, or `unlimited` (infinity)."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if value == "unlimited":
            return inf
        try:
            rate = float(value)
        except ValueError:
            rate = 0
        if not 0 < rate < inf:
            self.fail(f"{value!r} is not a rate: give deliveries a second, such as 50, or unlimited", param, ctx)
        return rate


RATE = Rate()


def can_ask() -> bool:
    return sys.stdin.isatty()


def ask(question: str, *, yes: bool) -> None:
    """Go on only if the person says so. Raises InputError where there is no person to ask."""
    if yes:
        return
    if not can_ask():
        raise InputError(
            "this asks before it does anything, and standard input is not a terminal; look first, then repeat with --yes"
        )
    click.confirm(question, abort=True, err=True)


def ask_to_type(question: str, expected: str, *, yes: bool) -> None:
    """The same for what can't be undone: the person types the name of what goes."""
    if yes:
        return
    if not can_ask():
        raise InputError(
            "this can't be undone, and standard input is not a terminal to ask on; look first, then repeat with --yes"
        )
    if click.prompt(question, err=True) != expected:
        raise InputError(f"that is not {expected!r}; nothing was changed")


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say on a terminal that something is under way whose end isn't known."""
    with Console(stderr=True).status(f"{what} …"):
        yield


@contextmanager
def bar(*, quiet: bool = False, total: float | None = None, what: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `step(n)` for work of one kind: a bar on a terminal, else nothing."""
    with bars({what: total}, quiet=quiet) as step:
        yield lambda n: step(what, n)


@contextmanager
def bars(totals: dict[str, float | None], *, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Yield `step(what, n)`; each kind of work gets its bar when it begins. An unknown total is a bar that only moves."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda what, n: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def step(what: str, n: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=totals.get(what))
            progress.advance(tasks[what], n)

        yield step


def about(seconds: float) -> str:
    """Say a length of time roughly: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for bound, unit_s, unit in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < bound:
            amount = seconds / unit_s
            return f"{amount:.1f} {unit}" if unit == "h" else f"{max(1, round(amount))} {unit}"
    return f"{seconds / 86_400:.1f} days"
