"""`python -m bench`: run the scenarios, print tables, write JSON.

Every figure stands beside what it is compared with in the same run. Loopback only; ends by itself.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from bench import latency, maintenance, replay, rig, throughput, transport

LIMIT_SHARE = 0.9  # of one core: a sink that used more was the limit


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer rounds and events: under three minutes.")
@click.option(
    "--sink",
    "sink_kind",
    type=click.Choice(["auto", "nginx", "own"]),
    default="auto",
    show_default=True,
    help="Receiver.",
)
@click.option("--rounds", type=int, help="Rounds per scenario; the table shows median, min and max.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bench/results"), show_default=True
)
@click.option(
    "--only", type=click.Choice(["throughput", "latency", "replay", "transport", "maintenance"]), help="One scenario."
)
@click.option("--seconds", type=float, help="How long maintenance's transaction is held.")
def main(quick: bool, sink_kind: str, rounds: int | None, out: Path, only: str | None, seconds: float | None) -> None:
    """Measure the dispatcher: CPU and rate of deliveries against the barest client, and commit → received latency."""
    console = Console(stderr=True)
    rounds = rounds or (2 if quick else 5)
    results = []
    with console.status("") as status:

        def progress(text: str) -> None:
            status.update(text)

        for scenario, go in _scenarios(quick, rounds, rig.sink_kind(sink_kind), progress, seconds):
            if only in (None, scenario):
                results.append(uvloop.run(go()))
    report = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": _machine(), "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(report, indent=2))
    _print(report)
    click.echo(f"written to {path}", err=True)


def _scenarios(
    quick: bool, rounds: int, kind: str, progress: Callable[[str], None], held_s: float | None
) -> list[tuple[str, Callable[[], Any]]]:
    events = 100_000 if quick else 300_000
    seconds = 8 if quick else 30
    return [
        ("throughput", lambda: throughput.run(rounds=rounds, events=events, endpoints=100, in_flight=1_000, kind=kind, progress=progress)),
        *(
            (
                "replay",
                lambda each=each: replay.run(
                    rate=500, seconds=seconds, endpoints=100, replayed=5, replay_rate=each, rounds=rounds, progress=progress
                ),
            )
            for each in ((200.0,) if quick else (200.0, None))
        ),
        *(
            ("latency", lambda rate=rate: latency.run(rate=rate, seconds=seconds, endpoints=100, progress=progress))
            for rate in ((100, 1_000) if quick else (1, 100, 1_000, 3_000))
        ),
        ("transport", lambda: transport.run(rounds=rounds, events=events // 10, endpoints=100, in_flight=1_000, kind=kind, progress=progress)),
        ("maintenance", lambda: maintenance.run(held_s=held_s or (30 if quick else 600), progress=progress)),
    ]  # fmt: skip


def _print(report: dict[str, Any]) -> None:
    console = Console()
    for result in report["results"]:
        table = Table(
            title=", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, str | int))
        )
        spread = {key: value for key, value in result.items() if isinstance(value, dict)}
        for column in ("figure", "median", "min", "max") if spread else ("figure", "value"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for key, value in (spread or result).items():
            if isinstance(value, dict):
                table.add_row(key, *(f"{value[part]:,.2f}" for part in ("median", "min", "max")))
            elif isinstance(value, float):
                table.add_row(key, f"{value:,.2f}")
        console.print(table)
        if spread.get("sink_cpu_share", {"max": 0.0})["max"] > LIMIT_SHARE:
            console.print("VOID: the sink was the limit of this run.", style="bold red")


def _machine() -> dict[str, Any]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    packages = ("uvloop", "asyncpg", "httptools", "aiohttp", "orjson")
    return {
        "cpu": cpu, "cores": os.cpu_count(),
        "kernel": platform.release(), "python": sys.version.split()[0], **{name: version(name) for name in packages},
    }  # fmt: skip


if __name__ == "__main__":
    main()
