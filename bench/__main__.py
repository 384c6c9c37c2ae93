"""`python -m bench`: run the scenarios, print tables, keep the results; `python -m bench report` makes
docs/benchmarks.md of them.

Loopback only; ends by itself. A scenario that fails is told of, and the others run all the same; results are kept
after each.
"""

import asyncio
import contextlib
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import asyncpg
import click
import uvloop
from rich.console import Console
from rich.table import Table

from bench import report, rig
from bench.scenario import Result, Scenario
from bench.scenarios import SCENARIOS

RESULTS = Path("bench/results")
DOCUMENT, PROFILE, PICTURES = Path("docs/benchmarks.md"), Path("docs/profile.md"), Path("docs/benchmarks")
SCENARIO_S_MAX = 3_600.0
BETWEEN_NAMES = r"(?<!\d),|,(?!\d{3}\b)"  # a comma that isn't within a number, as it is in "4,000 in flight"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only", "names", multiple=True, metavar="NAME", help="Run this scenario only; may be given several times."
)
@click.option(
    "--quick", is_flag=True, help="Small sizes: everything in under three minutes. For a look, not for figures."
)
@click.option("--tiny", is_flag=True, help="The smallest sizes, as the tests use them: does everything work here?")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of each scenario that has them.")
@click.option("--minutes", type=float, help="How long the soak lasts.")
@click.option(
    "--size", "sizes", multiple=True, metavar="[SCENARIO.]NAME=VALUE",
    help="Another size than --list shows, such as backlog.events=100000,5000000 or maintenance.held_s=600.",
)  # fmt: skip
@click.option(
    "--database-url",
    envvar="BENCH_DATABASE_URL",
    help="A PostgreSQL to use, by a role that may create databases. Without it: an embedded one.",
)
@click.option(
    "--sink",
    type=click.Choice(["auto", "nginx", "own"]),
    default="auto",
    show_default=True,
    help="Receiver for throughput.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    show_default=True,
    help="Where the results' folder is made.",
)
@click.option("--list", "list_only", is_flag=True, help="List the scenarios with their sizes, and end.")
@click.pass_context
def main(
    context: click.Context,
    names: tuple[str, ...],
    quick: bool,
    tiny: bool,
    rounds: int | None,
    minutes: float | None,
    sizes: tuple[str, ...],
    database_url: str | None,
    sink: str,
    out: Path,
    list_only: bool,
) -> None:
    """Measure the dispatcher, each figure beside what it is compared with in the same run.

    \b
      python -m bench                              everything, over an hour
      python -m bench --quick                      everything, small
      python -m bench --only latency --rounds 5    one scenario
      python -m bench report bench/results/…       make docs/benchmarks.md of a full run
    """
    if context.invoked_subcommand is not None:
        return
    which = "tiny" if tiny else "quick" if quick else "full"
    wanted = list(sizes)
    wanted += [f"rounds={rounds}"] if rounds is not None else []
    wanted += [f"soak.minutes={minutes}"] if minutes is not None else []
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name} is no scenario; there are {', '.join(known)}", param_hint="--only")
    chosen = [(scenario, scenario.sizes[which]) for scenario in SCENARIOS if not names or scenario.name in names]
    chosen = _resized(chosen, wanted)
    if list_only:
        _list(chosen)
        return
    with _server(database_url) as dsn:
        run = _run(dsn, chosen, which, rig.sink_kind(sink), out)
    if any(done.error is not None for done in run.done):
        sys.exit(1)


def _resized(chosen: list[tuple[Scenario, Any]], wanted: list[str]) -> list[tuple[Scenario, Any]]:
    for option in wanted:
        name, equals, text = option.partition("=")
        scenario_name, dot, field = name.rpartition(".")
        hit = False
        for n, (scenario, size) in enumerate(chosen):
            if (not dot or scenario.name == scenario_name) and equals and hasattr(size, field):
                chosen[n] = (
                    scenario,
                    dataclasses.replace(size, **{field: _parsed(text, get_type_hints(type(size))[field], option)}),
                )
                hit = True
        if not hit:
            raise click.BadParameter(f"{option}: no scenario here has such a size; see --list", param_hint="--size")
    return chosen


def _parsed(text: str, kind: Any, option: str) -> Any:
    """Read a size as its dataclass says: a number, a word, true or false, or several separated by commas."""
    try:
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            parts = re.split(BETWEEN_NAMES, text) if item is str else text.split(",")
            return tuple(_parsed(part, item, option) for part in parts if part)
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as exc:
        raise click.BadParameter(f"{option}: {text!r} is no {kind.__name__}", param_hint="--size") from exc


def _list(chosen: list[tuple[Scenario, Any]]) -> None:
    table = Table("scenario", "what it shows", "could mislead", "sizes", show_lines=True)
    for scenario, size in chosen:
        shown = "\n".join(f"{field.name}={_shown(getattr(size, field.name))}" for field in dataclasses.fields(size))
        table.add_row(scenario.name, scenario.shows, scenario.misleads, shown)
    Console().print(table, markup=False)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def _server(database_url: str | None) -> Iterator[str]:
    if database_url is None:
        with rig.postgres() as (dsn, _):
            yield dsn
    else:
        yield database_url


def _run(dsn: str, chosen: list[tuple[Scenario, Any]], which: str, sink: str, out: Path) -> report.Run:
    console, began = Console(stderr=True), time.monotonic()
    version, postmaster = asyncio.run(_look(dsn))
    run = report.Run(
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), which, report.machine(version) | {"sink": sink}
    )
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    with console.status("") as status:

        def tell(text: str) -> None:
            if console.is_terminal:
                status.update(f"[{len(run.done) + 1}/{len(chosen)}] {text}")
            else:
                console.print(f"{time.monotonic() - began:6.1f} s  {text}", markup=False)

        bench = rig.Bench(dsn, postmaster, sink, tell)
        for scenario, size in chosen:
            run.done.append(_one(bench, scenario, size))
            report.save(run, folder / "results.json")
            console.print(f"{'failed' if run.done[-1].error else 'done'}: {scenario.name}, {run.done[-1].took_s:.0f} s")
    report.draw(run.done, folder)
    report.show(run, Console(width=None if sys.stdout.isatty() else 160))
    click.echo(f"written to {folder}", err=True)
    return run


async def _look(dsn: str) -> tuple[str, int | None]:
    try:
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            version: str = await connection.fetchval("SHOW server_version")
        finally:
            await connection.close()
        return version, await rig.local_postmaster(dsn)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise click.ClickException(f"the database can't be reached: {exc}") from exc


def _one(bench: rig.Bench, scenario: Scenario, size: Any) -> report.Done:
    async def bounded() -> Result:
        async with asyncio.timeout(SCENARIO_S_MAX):
            return await scenario.run(bench, size)

    began = time.monotonic()
    result, error = Result(), None
    # A look of this process's collector at all of its objects held a receiver in it for 55 ms: there is none while a scenario runs, what it
    # starts with counts as old, and the young are looked at in turns of at most 3 ms.
    gc.collect()
    gc.freeze()
    gc.set_threshold(3_000, 10, 1_000_000)
    try:
        result = uvloop.run(bounded())
    except Exception as exc:  # noqa: BLE001 - the others are measured all the same; the run's exit status tells
        Console(stderr=True).print_exception()
        error = f"{type(exc).__name__}: {exc}"
    sizes = dataclasses.asdict(size)
    return report.Done(scenario.name, scenario.shows, scenario.misleads, sizes, time.monotonic() - began, result, error)


@main.command("report")
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--to", type=click.Path(path_type=Path, dir_okay=False), default=DOCUMENT, show_default=True, help="The document."
)
def make_report(results: tuple[Path, ...], to: Path) -> None:
    """Make docs/benchmarks.md of a run's RESULTS (its folder, or the JSON in it).

    Give several where a scenario was run by itself afterwards: the later one counts.
    """
    runs = [report.load(path) for path in results]
    for run in runs:
        if run.size != "full":
            click.echo(f"note: the run of {run.at} was a {run.size} one; its figures aren't for publishing", err=True)
    pictures = to.with_suffix("")
    for run in runs:
        report.draw(run.done, pictures)
    to.write_text(report.document(runs, PROFILE.read_text(), pictures.name))
    click.echo(f"written: {to}", err=True)


if __name__ == "__main__":
    # What is measured gets its settings from here alone.
    for variable in [name for name in os.environ if name.startswith("DISPATCHER_")]:
        del os.environ[variable]
    main()
