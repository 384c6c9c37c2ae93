"""The simulation by hand and by night; see `python -m tests.simulation --help`."""

import multiprocessing
import os
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.simulation.faults import FAULTS
from tests.simulation.night import run_one, run_seeds


@click.command()
@click.option("--seed", type=int, help="Run this one, and print its trace with the engine's log.")
@click.option("--seeds", type=click.IntRange(1), default=1_000, show_default=True, help="How many to run.")
@click.option("--from", "first", type=int, default=0, show_default=True, help="The first of them.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.option("--fault", type=click.Choice([f.name for f in FAULTS]), help="Break this rule of the engine on purpose.")
@click.option("--faults", is_flag=True, help="List the rules that can be broken.")
def main(seed: int | None, seeds: int, first: int, jobs: int, fault: str | None, faults: bool) -> None:
    """Run the real engine on in-memory twins and virtual time, with the faults that each seed draws."""
    if faults:
        for known in FAULTS:
            click.echo(known.name)
        return
    if seed is not None:
        result = run_one(seed, fault, verbose=True)
        click.echo("\n".join(result.trace))
        click.echo(str(result))
        sys.exit(result.violation is not None)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bad, posts = 0, 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("seeds", total=seeds)
        for result in run_seeds(pool, range(first, first + seeds), fault):
            progress.advance(task)
            posts += result.stats["posts"]
            if result.violation is not None:
                bad += 1
                progress.print(str(result), markup=False, highlight=False)
    click.echo(f"{seeds} seeds from {first}, {posts} POSTs, {bad} violations")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
