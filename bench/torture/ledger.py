"""What the producers and receivers wrote down, read as it grows; and the account that it makes."""

import bisect
import itertools
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.torture.plant import KINDS
from bench.torture.producer import ACCOUNTS

# So long after a fault's end it still explains a repeat: a receiver that was frozen writes down what the dispatcher has given up meanwhile.
EXPLAINS_AFTER_S = 3.0


class Span(NamedTuple):
    """A fault, once it is over; `on` tells whose endpoints it touched."""

    name: str
    began_at: float
    ended_at: float
    on: list[int]


class Discard(NamedTuple):
    after_id: int
    upto_id: int
    deliveries: int


class Tail:
    """A file of lines that grows; `read` returns the whole ones that are new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> list[list[str]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode().split(" ") for line in lines]


@dataclass
class Account:
    committed: int = 0
    rolled_back: int = 0
    deliveries: int = 0  # that are owed: committed events × the endpoints of their account
    delivered: int = 0
    dead_lettered: int = 0
    expired: int = 0
    lost: int = 0
    phantom: int = 0  # rolled back yet delivered
    bad_signatures: int = 0
    repeats: dict[str, int] = field(default_factory=dict)  # by the fault that explains them
    unexplained: int = 0
    examples: list[str] = field(default_factory=list)


class Ledger:
    def __init__(self, fates: list[Path], arrivals: list[Path]) -> None:
        self.committed: dict[int, tuple[str, int]] = {}  # number → account, id
        self.undone: set[int] = set()
        self.steady = [array("d") for _ in arrivals]  # when each receiver's steady endpoint got something, in order
        self.arrived = 0
        self._fates = [Tail(path) for path in fates]
        self._arrivals = [Tail(path) for path in arrivals]
        self._seen: defaultdict[str, set[int]] = defaultdict(set)  # path → numbers, whatever was answered
        self._taken: defaultdict[str, dict[int, float]] = defaultdict(
            dict
        )  # path → number → when it was first answered 2xx
        self._repeats: list[tuple[str, int, float, float]] = []  # path, number, answered 2xx, and again
        self._bad_signatures = 0

    def read(self) -> None:
        for tail in self._fates:
            for fate, _, account, events in tail.read():
                made = [event.split(":") for event in events.split(",")]
                if fate == "committed":
                    self.committed.update((int(number), (account, int(id_))) for number, id_ in made)
                else:
                    self.undone.update(int(number) for number, _ in made)
        for n, tail in enumerate(self._arrivals):
            for at, path, number, _, status, signed in tail.read():
                self._note(n, float(at), path, int(number), int(status))
                self._bad_signatures += signed == "0"

    def _note(self, n: int, at: float, path: str, number: int, status: int) -> None:
        if not number:
            return  # not a producer's: an account is told what has expired
        self.arrived += 1
        if path.endswith("/steady"):
            self.steady[n].append(at)
        self._seen[path].add(number)
        taken = self._taken[path]
        if number in taken:
            self._repeats.append((path, number, taken[number], at))
        elif 200 <= status <= 299:
            taken[number] = at

    def silence_s(self, n: int, since: float, until: float) -> float:
        """Return the longest time that receiver `n`'s steady endpoint was silent between two instants."""
        times = self.steady[n]
        inside = times[bisect.bisect(times, since) : bisect.bisect(times, until)]
        return max(later - earlier for earlier, later in itertools.pairwise([since, *inside, until]))

    def flows(self, n: int, since: float, count: int) -> bool:
        """Tell whether receiver `n`'s steady endpoint has got so much since."""
        return len(self.steady[n]) - bisect.bisect(self.steady[n], since) >= count

    def account(self, dead: dict[str, set[int]], discards: dict[str, list[Discard]], faults: list[Span]) -> Account:
        """Hold what was committed against what arrived. `dead` and `discards` are by path."""
        a = Account(committed=len(self.committed), rolled_back=len(self.undone), bad_signatures=self._bad_signatures)
        owed: defaultdict[str, dict[int, int]] = defaultdict(dict)  # account → number → id
        for number, (account, id_) in self.committed.items():
            owed[account][number] = id_
        for n, account in enumerate(ACCOUNTS):
            for kind in KINDS:
                path = f"/{n}/{kind}"
                self._settle(a, path, owed[account], dead.get(path, set()), discards.get(path, []))
        causes: Counter[str] = Counter()
        for path, number, first_at, again_at in self._repeats:
            cause = _cause(int(path.split("/")[1]), first_at, again_at, faults)
            if cause is None:
                a.unexplained += 1
                a.examples.append(
                    f"event {number} reached {path} at {first_at:.3f} and, unexplained, at {again_at:.3f}"
                )
            else:
                causes[cause] += 1
        a.repeats = dict(causes.most_common())
        del a.examples[20:]
        return a

    def _settle(self, a: Account, path: str, owed: dict[int, int], dead: set[int], discards: list[Discard]) -> None:
        taken = self._taken[path]
        delivered = owed.keys() & taken.keys()
        given_up = (owed.keys() & dead) - delivered
        open_ids = {owed[number]: number for number in owed.keys() - delivered - given_up}
        a.deliveries += len(owed)
        a.delivered += len(delivered)
        a.dead_lettered += len(given_up)
        for discard in discards:
            inside = [id_ for id_ in open_ids if discard.after_id < id_ <= discard.upto_id]
            for id_ in inside[: discard.deliveries]:  # what was not counted has no excuse
                del open_ids[id_]
            a.expired += min(len(inside), discard.deliveries)
        a.lost += len(open_ids)
        a.examples += [f"event {number} (id {id_}) never reached {path}" for id_, number in list(open_ids.items())[:5]]
        phantoms = self._seen[path] - owed.keys()
        a.phantom += len(phantoms)
        a.examples += [f"event {number} reached {path}, and was never committed" for number in list(phantoms)[:5]]


def _cause(n: int, first_at: float, again_at: float, faults: list[Span]) -> str | None:
    """Return the last fault on receiver `n` that began before the second arrival, and was not long over at the first."""
    for fault in reversed(faults):
        if n in fault.on and fault.began_at <= again_at and fault.ended_at + EXPLAINS_AFTER_S >= first_at:
            return fault.name
    return None
