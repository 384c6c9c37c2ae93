"""Forty seconds of torture, and that its account can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.torture.ledger import Discard, Ledger, Span

ROOT = Path(__file__).parent.parent
SEED = 20
SLACK = 4.0  # on a noisy machine a stall says little; what is lost, or was never committed, says all


def test_forty_seconds_of_torture() -> None:
    """No disk is mounted here; everything else that the machine has."""
    command = ["--minutes", "0.67", "--seed", str(SEED), "--no-disk", "--slack", str(SLACK), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.torture", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    told = "\n".join([*report["violations"], done.stderr])
    account = report["account"]
    assert account["lost"] == account["phantom"] == account["unexplained"] == account["bad_signatures"] == 0, told
    assert account["committed"] > 1_000, told
    assert account["delivered"] + account["dead_lettered"] + account["expired"] == account["deliveries"], told
    assert len(report["struck"]) >= 3, told
    assert done.returncode == 0, told


# What the producers and receivers might write, and what the account makes of it.

FATES = ["committed 1.0 a 1:11,2:12,3:13", "undone 1.0 a 4:14", "committed 1.0 b 5:15"]
KINDS = ("steady", "flaky", "slow", "rejecting", "limited")
EVERYWHERE = [f"{path} {number}" for number in (1, 2, 3) for path in (f"/0/{kind}" for kind in KINDS)] + [
    f"/1/{kind} 5" for kind in KINDS
]


def ledger_of(tmp_path: Path, arrivals: list[str]) -> Ledger:
    """Arrivals are `path number`, each a tenth of a second after the one before, answered 204."""
    (tmp_path / "fates").write_text("".join(line + "\n" for line in FATES))
    for n in range(3):
        mine = [f"{100 + at / 10} {line} 1 204 1\n" for at, line in enumerate(arrivals) if line.startswith(f"/{n}/")]
        (tmp_path / f"arrivals-{n}").write_text("".join(mine))
    made = Ledger([tmp_path / "fates"], [tmp_path / f"arrivals-{n}" for n in range(3)])
    made.read()
    return made


def test_an_account_that_holds(tmp_path: Path) -> None:
    account = ledger_of(tmp_path, EVERYWHERE).account({}, {}, [])
    assert (account.committed, account.rolled_back, account.deliveries, account.delivered) == (4, 1, 20, 20)
    assert (account.lost, account.phantom, account.unexplained, account.examples) == (0, 0, 0, [])


def test_what_never_arrived_is_lost_unless_it_is_dead_or_counted(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, [line for line in EVERYWHERE if line not in ("/0/slow 2", "/0/slow 3")])
    assert ledger.account({}, {}, []).lost == 2
    account = ledger.account({"/0/slow": {2}}, {}, [])
    assert (account.lost, account.dead_lettered) == (1, 1)
    account = ledger.account({}, {"/0/slow": [Discard(0, 100, 2)]}, [])
    assert (account.lost, account.expired) == (0, 2)
    assert ledger.account({}, {"/0/slow": [Discard(0, 100, 1)]}, []).lost == 1  # more than were counted
    assert ledger.account({}, {"/0/slow": [Discard(0, 12, 2)]}, []).lost == 1  # not in that range
    assert ledger.account({"/0/flaky": {2, 3}}, {}, []).lost == 2  # another endpoint's


def test_what_was_rolled_back_or_is_anothers_is_a_phantom(tmp_path: Path) -> None:
    assert ledger_of(tmp_path, [*EVERYWHERE, "/0/steady 4", "/0/steady 5"]).account({}, {}, []).phantom == 2


@pytest.mark.parametrize(
    ("fault", "explained"),
    [
        (Span("kill", 101.0, 101.0, [0]), True),
        (Span("kill", 101.0, 101.0, [1]), False),  # elsewhere
        (Span("kill", 103.0, 104.0, [0]), False),  # began after it
        (Span("kill", 90.0, 95.0, [0]), False),  # long over
    ],
)
def test_a_repeat_needs_a_fault_that_explains_it(tmp_path: Path, fault: Span, explained: bool) -> None:
    account = ledger_of(tmp_path, [*EVERYWHERE, "/0/steady 1"]).account({}, {}, [fault])
    assert account.unexplained == (not explained)
    assert account.repeats == ({"kill": 1} if explained else {})


def test_silence_is_the_longest_between_arrivals(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, EVERYWHERE)  # 100.0, 100.5, 101.0
    assert ledger.silence_s(0, 99.8, 101.2) == pytest.approx(0.5)
    assert ledger.silence_s(0, 98.0, 101.2) == pytest.approx(2.0)
    assert ledger.silence_s(0, 100.9, 105.0) == pytest.approx(4.0)
    assert ledger.flows(0, 99.0, 3)
    assert not ledger.flows(0, 100.7, 2)
