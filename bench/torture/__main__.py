"""`python -m bench.torture`: break things at random for so many minutes, then heal, wait until all is settled, and give an account.

Exit status 0: nothing was lost, nothing that was rolled back was delivered, every repeat has its reason, and deliveries resumed in time by
themselves. `--seed` repeats the schedule of faults; where in the work they fall is up to the machine. Loopback only.
"""

import asyncio
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from bench.torture.faults import FAULTS, RESUME_S, Fault
from bench.torture.ledger import Account, Discard, Ledger, Span
from bench.torture.plant import PRODUCERS, Plant, why_no_disk
from bench.torture.producer import ACCOUNTS

EVENTS_PER_S = 200  # about what the producers commit
WARM_UP_S = 2.0
FLOWS = 10  # arrivals at a receiver that count as a flow
HOPELESS_S = 45.0  # deliveries that haven't resumed by then are not waited for any longer
PAUSE_S = (0.5, 4.0)  # between a fault's end and the next one
TOGETHER = 0.15  # so often two faults strike at once
SETTLE_S = 90.0
IN_NAMESPACE = "BENCH_TORTURE_NAMESPACE"
EXPECTED_ENDS = {0, -9, 6, 7}  # stopped, killed, begun while the database was away, another took over


@dataclass
class Struck:
    """What one kind of fault did, over all its times."""

    times: int = 0
    resumed_s: list[float] = field(default_factory=list)  # longest silence after its end, each time
    silent_s: float = 0.0  # longest silence from its beginning on
    bound_s: float = RESUME_S


@dataclass
class Report:
    seed: int
    minutes: float
    account: Account
    struck: dict[str, Struck]
    skipped: dict[str, str]
    ends: dict[str, dict[int, int]]  # of dispatchers, by exit status
    violations: list[str]

    @property
    def holds(self) -> bool:
        return not self.violations


class Torture:
    def __init__(self, plant: Plant, seed: int, seconds: float, slack: float, say: Callable[[str], None]) -> None:
        self.plant = plant
        self.ledger = Ledger(
            [plant.fates(n) for n in range(PRODUCERS)], [plant.arrivals(n) for n in range(len(ACCOUNTS))]
        )
        self.struck: defaultdict[str, Struck] = defaultdict(Struck)
        self.spans: list[Span] = []
        self.violations: list[str] = []
        self._seed = seed
        self._rng = random.Random(f"torture {seed}")
        self._seconds = seconds
        self._slack = slack
        self._say = say
        self._faults = [fault for fault in FAULTS if fault.name not in plant.skipped]
        self._deck: list[Fault] = []

    async def run(self) -> Report:
        began = time.time()
        await self._flow(began, range(len(ACCOUNTS)))
        await asyncio.sleep(WARM_UP_S)
        while time.time() < began + self._seconds:
            await self._strike(began)
        self._say("healing")
        account = await self._heal()
        ends = {kept.name: dict(kept.statuses) for kept in self.plant.dispatchers}
        self._judge(account, ends)
        minutes = (time.time() - began) / 60
        return Report(self._seed, minutes, account, dict(self.struck), self.plant.skipped, ends, self.violations)

    # ── faults ──

    def _draw(self) -> list[Fault]:
        """Draw one fault, or two. Each comes once before any comes again."""
        drawn: list[Fault] = []
        for _ in range(2 if self._rng.random() < TOGETHER else 1):
            if not self._deck:
                self._deck = list(self._faults)
                self._rng.shuffle(self._deck)
            fault = self._deck.pop()
            if fault not in drawn:
                drawn.append(fault)
        return drawn

    async def _strike(self, began: float) -> None:
        faults = self._draw()
        seeds = [self._rng.random() for _ in faults]
        name = faults[0].name if len(faults) == 1 else "two at once"
        began_at = time.time()
        touched = await asyncio.gather(
            *(f.strike(self.plant, random.Random(s)) for f, s in zip(faults, seeds, strict=True))
        )
        ended_at = time.time()
        everywhere = list(range(len(ACCOUNTS)))
        on = sorted({n for some in touched for n in (everywhere if some is None else some)})
        from_start = len(faults) == 1 and faults[0].from_start
        bound_s = max(fault.resume_s for fault in faults)
        since = began_at if from_start else ended_at
        self.spans.append(Span(name, began_at, ended_at, on))
        resumed = await self._flow(since, on)
        await asyncio.sleep(self._rng.uniform(*PAUSE_S))
        self.ledger.read()
        until = time.time()
        stall_s = max(self.ledger.silence_s(n, since, until) for n in on)
        struck = self.struck[name]
        struck.times += 1
        struck.bound_s = bound_s
        struck.resumed_s.append(stall_s)
        struck.silent_s = max(struck.silent_s, *(self.ledger.silence_s(n, began_at, until) for n in on))
        told = name if len(faults) == 1 else " + ".join(fault.name for fault in faults)
        late = not resumed or stall_s > bound_s * self._slack
        self._say(
            f"{began_at - began:7.1f} s  {told:<44} over after {ended_at - began_at:4.1f} s, longest stall {stall_s:5.2f} s"
            f"{'  TOO LONG' if late else ''}   {len(self.ledger.committed):,} committed, {self.ledger.arrived:,} arrived"
        )
        if late:
            self.violations.append(f"{told}: deliveries stood still for {stall_s:.1f} s, {began_at - began:.1f} s in")

    async def _flow(self, since: float, on: Any) -> bool:
        """Wait until deliveries flow to each of the receivers; return whether they do."""
        deadline = time.time() + HOPELESS_S
        while time.time() < deadline:
            self.ledger.read()
            if all(self.ledger.flows(n, since, FLOWS) for n in on):
                return True
            await asyncio.sleep(0.05)
        return False

    # ── the end ──

    async def _heal(self) -> Account:
        """Stop the producers, lift the limit, wait until everything is settled, and make the account."""
        plant = self.plant
        for kept in plant.producers:
            if await kept.stop(30) != 0:
                self.violations.append(f"{kept.name} failed: {_tail(kept.errors)}")
        await plant.query("UPDATE webhook.endpoint SET rate_per_s = NULL")
        if not await plant.settled(SETTLE_S):
            self.violations.append(f"not settled {SETTLE_S:.0f} s after everything was well")
        for kept in plant.dispatchers:
            if (status := await kept.stop()) != 0:
                self.violations.append(f"{kept.name} ended with {status} at the end: {_tail(kept.errors)}")
        self.ledger.read()
        dead: defaultdict[str, set[int]] = defaultdict(set)
        for row in await plant.query(
            "SELECT endpoint_id, (payload ->> 'number')::bigint AS number FROM webhook.dead_letter"
        ):
            dead[plant.endpoints[row["endpoint_id"]]].add(row["number"])
        discards: defaultdict[str, list[Discard]] = defaultdict(list)
        for row in await plant.query("SELECT endpoint_id, after_id, upto_id, deliveries FROM webhook.discard"):
            discards[plant.endpoints[row["endpoint_id"]]].append(
                Discard(row["after_id"], row["upto_id"], row["deliveries"])
            )
        return self.ledger.account(dead, discards, self.spans)

    def _judge(self, account: Account, ends: dict[str, dict[int, int]]) -> None:
        for name in ("lost", "phantom", "unexplained", "bad_signatures"):
            if getattr(account, name):
                self.violations.append(f"{name}: {getattr(account, name)}")
        self.violations += account.examples
        for name, statuses in ends.items():
            if unexpected := statuses.keys() - EXPECTED_ENDS:
                self.violations.append(f"{name} ended with {sorted(unexpected)}")
        for kept in self.plant.dispatchers:
            if "Traceback" in (text := _tail(kept.errors, 100_000)):
                self.violations.append(f"{kept.name}: {text[text.index('Traceback') :][:2_000]}")


def _tail(path: Path, size: int = 2_000) -> str:
    return path.read_text(errors="replace")[-size:]


async def torture(
    seed: int, seconds: float, *, no_disk: str | None, slack: float, say: Callable[[str], None]
) -> Report:
    """Run it in a directory of its own, which stays if the account doesn't hold. `no_disk`: why PostgreSQL gets no disk of its own."""
    directory = Path(tempfile.mkdtemp(prefix="dispatcher-torture-", dir="/tmp"))
    plant = Plant(directory, seed=str(seed), events=int(seconds * EVENTS_PER_S), disk=no_disk is None, say=say)
    if no_disk is not None:
        plant.skipped["disk full"] = no_disk
    async with plant:
        report = await Torture(plant, seed, seconds, slack, say).run()
    if report.holds:
        shutil.rmtree(directory)
    else:
        report.violations.append(f"logs and files are in {directory}")
    return report


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="How long faults strike."
)
@click.option("--seed", type=int, help="Repeat a schedule of faults. Without it, one is drawn and printed.")
@click.option("--disk/--no-disk", default=True, help="Mount a small disk for PostgreSQL, to fill it (root, Linux).")
@click.option(
    "--slack", type=click.FloatRange(min=1), default=1.0, show_default=True, help="Multiply the bounds on stalls, on a busy machine."
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def main(minutes: float, seed: int | None, disk: bool, slack: float, as_json: bool) -> None:
    """Break a real dispatcher, PostgreSQL and receivers at random, and hold what was committed against what arrived."""
    no_disk = why_no_disk() if disk else "--no-disk was given"
    if no_disk is None and IN_NAMESPACE not in os.environ:
        # Mounts of a namespace of our own end with us, whatever our end is.
        os.environ[IN_NAMESPACE] = "1"
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            sys.executable,
            "-m",
            "bench.torture",
            *sys.argv[1:],
        ]
        os.execvp(command[0], command)
    seed = secrets.randbelow(1_000_000) if seed is None else seed

    def say(text: str) -> None:
        click.echo(text, err=True)

    say(f"seed {seed}, {minutes:g} minutes")
    report = uvloop.run(torture(seed, minutes * 60, no_disk=no_disk, slack=slack, say=say))
    if as_json:
        click.echo(json.dumps(asdict(report) | {"holds": report.holds}))
    else:
        _print(report)
    sys.exit(0 if report.holds else 1)


def _print(report: Report) -> None:
    console = Console()
    account = report.account
    table = Table(
        title=f"seed {report.seed}, {report.minutes:.1f} minutes: {'it holds' if report.holds else 'IT DOES NOT HOLD'}"
    )
    for column in ("account", "count"):
        table.add_column(column, justify="left" if column == "account" else "right")
    for name in (
        "committed",
        "rolled_back",
        "deliveries",
        "delivered",
        "dead_lettered",
        "expired",
        "lost",
        "phantom",
        "unexplained",
    ):
        words = {
            "committed": "events committed", "rolled_back": "events rolled back", "deliveries": "deliveries owed",
            "phantom": "rolled back yet delivered", "unexplained": "repeats without a reason", "dead_lettered": "dead-lettered",
        }  # fmt: skip
        table.add_row(words.get(name, name), f"{getattr(account, name):,}")
    console.print(table)
    table = Table(caption="stall: the longest after a fault's end; silence: the longest from its beginning on")
    for column in ("fault", "times", "stall, s", "bound", "silence, s", "repeats"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for name, struck in sorted(report.struck.items()):
        table.add_row(
            name, str(struck.times), f"{max(struck.resumed_s):.2f}", f"{struck.bound_s:.0f}", f"{struck.silent_s:.2f}",
            f"{account.repeats.get(name, 0):,}",
        )  # fmt: skip
    console.print(table)
    for name, why in report.skipped.items():
        console.print(f"left out: {name}, because {why}")
    for violation in report.violations:
        console.print(violation, style="bold red", markup=False)


if __name__ == "__main__":
    main()
