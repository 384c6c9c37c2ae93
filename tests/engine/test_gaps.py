"""The gaps against a small model of transactions: ids are taken before the commit, commits come in any order, some never come, some are
prepared and bear another name afterwards.

The judge knows the truth: an id at or below the head that is neither seen nor in the gaps must be one that never comes. `World` runs the
reader's steps (head, holders, look, answer) between the transactions' own, at random from a seed, under bounds so small that each run meets
them. Run with `barrier_off` the same worlds must lose ids, or the judge sees nothing.
"""

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from dispatcher.domain.ranges import IdRanges
from dispatcher.engine import gaps as gaps_module
from dispatcher.engine.gaps import LOOK_IDS_MAX, SUMMARY_IDS, SUMMARY_REST, SUMMARY_REST_MAX_S, Barrier, Gaps, Look
from dispatcher.ports import Holders

SEEDS = range(1_000)


def holders(running: str = "", prepared: str = "") -> Holders:
    """Names are single words: `holders("a b", "p")`."""
    return Holders(frozenset(running.split()), frozenset(prepared.split()))


@pytest.fixture
def tiny_bounds(monkeypatch):
    for name, value in {
        "OLD_MAX": 6,
        "YOUNG_MAX": 4,
        "YOUNG_RUN_MAX": 3,
        "LOOK_RANGES_MAX": 3,
        "LOOK_IDS_MAX": 6,
    }.items():
        monkeypatch.setattr(gaps_module, name, value)


class LostError(Exception):
    """A committed id, or one that may still be, is neither seen nor in the gaps."""


class World:
    """`lives`: id → the transaction that may still commit it. `renames`: where a prepared transaction gets its other name, at PREPARE or at
    the restart (PostgreSQL has done either). Reads are bounded to 3 rows in all."""

    ROWS = 3

    def __init__(self, seed: int, *, barrier_off: bool = False) -> None:
        self.rng = random.Random(seed)
        self.renames = self.rng.choice(["at prepare", "at restart"])
        self.two_phase = self.rng.random() < 0.5
        self.gaps = Gaps(barrier_off=barrier_off)
        self.now = 0.0
        # the database
        self.serial = 0
        self.last_id = 0
        self.running: dict[str, set[int]] = {}  # transactions that hold the writers' lock, and the ids they took
        self.prepared: dict[str, set[int]] = {}
        self.committed: set[int] = set()
        self.dead: set[int] = set()
        # the reader
        self.head = 0
        self.bound = 0  # the last id as of the read before
        self.seen: set[int] = set()
        self.asked: list[tuple[Look, list[int], bool]] = []
        self.met_the_bound = False

    # ── the database's steps ──

    def begin(self) -> None:
        self.serial += 1
        self.running[f"v{self.serial}"] = set()

    def take_ids(self) -> None:
        if self.running:
            name = self.rng.choice(list(self.running))
            for _ in range(self.rng.choice([1, 1, 1, 2, 6])):
                self.last_id += 1
                self.running[name].add(self.last_id)

    def end(self) -> None:
        if self.running:
            self._end(self.running.pop(self.rng.choice(list(self.running))))

    def end_prepared(self) -> None:
        if self.prepared:
            self._end(self.prepared.pop(self.rng.choice(list(self.prepared))))

    def _end(self, ids: set[int]) -> None:
        (self.committed if self.rng.random() < 0.7 else self.dead).update(ids)

    def prepare(self) -> None:
        if self.running and self.two_phase:
            name = self.rng.choice(list(self.running))
            self.prepared[name if self.renames == "at restart" else "p" + name] = self.running.pop(name)

    def restart(self) -> None:
        """Running transactions die, prepared ones stay; usually the reader notices and forgets, but the barriers must hold even if not."""
        for ids in self.running.values():
            self.dead |= ids
        self.running = {}
        if self.renames == "at restart":
            self.prepared = {"p" + name.removeprefix("p"): ids for name, ids in self.prepared.items()}
        if self.rng.random() < 0.5:
            self.asked = []
            self.gaps.forget_barriers()

    # ── the reader's steps, as in engine/reader.py ──

    def read_head(self) -> None:
        rows = sorted(event_id for event_id in self.committed if event_id > self.head)
        full = len(rows) >= self.ROWS
        rows = rows[: self.ROWS]
        for event_id in sorted(self.committed & self.gaps.young.keys()):
            self.gaps.found_young(event_id)
            self.seen.add(event_id)
        old_head = self.head
        self.head = rows[-1] if full else max([self.bound, self.head, *rows[-1:]])
        self.gaps.passed(old_head, self.head, rows, self.now)
        self.gaps.age(self.now)
        self.seen.update(rows)
        self.bound = self.last_id

    def note_holders(self) -> None:
        if not self.asked and self.gaps.wants_holders(self.now):
            self.gaps.note_holders(Holders(frozenset(self.running), frozenset(self.prepared)), self.now)

    def ask(self) -> None:
        """One statement over all ranges that want a look, LIMIT and all; its answer is applied at a later step."""
        if self.asked:
            return
        budget = self.ROWS
        for look in self.gaps.looks():
            rows = sorted(event_id for event_id in self.committed if look.low <= event_id <= look.high)
            full = len(rows) >= budget  # from the range that was cut on, pages are full, and empty after it
            self.asked.append((look, rows[:budget], full))
            budget -= len(rows[:budget])

    def answer(self) -> None:
        asked, self.asked = self.asked, []
        for look, rows, full in asked:
            self.gaps.looked(look, rows, full)
            self.seen.update(rows)

    def wait(self) -> None:
        self.now += self.rng.choice([0.005, 0.05, 0.3, 2.0])

    def reconnect(self) -> None:
        self.asked = []
        self.gaps.forget_barriers()

    # ── the judge ──

    def check(self) -> None:
        for event_id in range(1, self.head + 1):
            if event_id not in self.seen and event_id not in self.dead and event_id not in self.gaps:
                raise LostError(f"{event_id}: gaps {self.gaps.ranges()}, head {self.head}")
        spans = [(gap.low, gap.high) for gap in self.gaps]
        assert all(low <= high for low, high in spans)
        assert all(high < low for (_, high), (low, _) in pairwise(spans)), spans
        assert not any(low <= event_id <= high for event_id in self.gaps.young for low, high in spans)
        assert len(self.gaps.old) <= gaps_module.OLD_MAX
        assert len(self.gaps.young) <= gaps_module.YOUNG_MAX
        self.met_the_bound |= len(self.gaps.old) == gaps_module.OLD_MAX
        everything = self.gaps.ranges()
        ids = [event_id for event_id in range(1, self.last_id + 2) if event_id in self.gaps]
        assert ids == [event_id for low, high in everything for event_id in range(low, high + 1)]

    STEPS = (
        (begin, 8), (take_ids, 18), (end, 9), (prepare, 3), (end_prepared, 3), (restart, 0.5), (reconnect, 0.5),
        (read_head, 10), (note_holders, 12), (ask, 12), (answer, 12), (wait, 8),
    )  # fmt: skip

    def run(self) -> None:
        for step in self.rng.choices(*zip(*self.STEPS, strict=True), k=250):
            step(self)
            self.check()

    def heal(self) -> None:
        """Every transaction but one ends: all that was committed must be seen, though nothing can close. Then the last: nothing stays open."""
        while len(self.running) > 1:
            self.end()
        while self.prepared:
            self.end_prepared()
        self.read_on(lambda: self.seen == self.committed)
        assert self.seen == self.committed
        self.end()
        self.read_on(lambda: not self.gaps)
        assert not self.gaps, f"stuck: {list(self.gaps)}"
        assert self.seen == self.committed
        assert self.head == self.last_id

    def read_on(self, is_over: Callable[[], bool]) -> None:
        for _ in range(200):
            for step in (World.read_head, World.note_holders, World.ask, World.answer):
                step(self)
                self.check()
            self.now += 0.3
            if is_over() and self.head == self.last_id:
                break


def run_seeds(seeds: range, **options: bool) -> list[World]:
    worlds = []
    for seed in seeds:
        world = World(seed, **options)
        try:
            world.run()
            world.heal()
        except BaseException as exc:
            exc.add_note(f"World({seed})")
            raise
        worlds.append(world)
    return worlds


def test_no_id_that_comes_is_closed_as_never(tiny_bounds):
    worlds = run_seeds(SEEDS)
    assert sum(world.met_the_bound for world in worlds) > len(worlds) // 20
    assert sum(world.gaps.closed_ids for world in worlds) > 10 * len(worlds)


def test_no_id_that_comes_is_closed_as_never_within_the_usual_bounds():
    """Here ranges are never joined, so each id that never comes is closed exactly once."""
    for world in run_seeds(range(300)):
        assert world.gaps.closed_ids == len(world.dead), world.rng


def test_without_barriers_ids_are_lost():
    lost = 0
    for seed in range(100):
        try:
            World(seed, barrier_off=True).run()
        except LostError:
            lost += 1
    assert lost > 30


# The barrier


def test_a_barrier_opens_when_all_its_members_have_left():
    barrier = Barrier(frozenset("ab"))
    assert not barrier.note(holders("a b c"))
    assert barrier.note(holders("a c"))
    assert not barrier.is_open
    assert not barrier.note(holders("a c"))
    assert barrier.note(holders("c"))
    assert barrier.is_open


def test_nobody_joins_a_barrier_later():
    barrier = Barrier(frozenset("a"))
    barrier.note(holders("a b", "p"))
    assert barrier.members == {"a"}


def test_a_transaction_that_was_prepared_under_another_name_is_still_waited_for():
    barrier = Barrier(frozenset("ab"))
    barrier.note(holders("b", "a2"))
    assert barrier.members == {"b", "a2"}
    barrier.note(holders("", "a2"))
    assert barrier.members == {"a2"}
    barrier.note(holders())
    assert barrier.is_open


def test_a_prepared_transaction_that_a_restart_renames_is_still_waited_for():
    barrier = Barrier(frozenset("p"))
    barrier.note(holders("", "-1/7"))
    assert barrier.members == {"-1/7"}


def test_steady_two_phase_commits_keep_no_barrier_closed():
    """There is always somebody prepared, but never the same."""
    barrier = Barrier(frozenset(["a", "p0"]))
    for n in range(10):
        barrier.note(holders("", f"p{n} p{n + 1}"))
    assert barrier.is_open


# Young gaps


def test_what_a_read_skipped_is_young():
    gaps = Gaps()
    gaps.passed(10, 20, [12, 13, 17], now=1.0)
    assert list(gaps.young) == [11, 14, 15, 16, 18, 19, 20]
    assert (len(gaps), bool(gaps.old)) == (7, False)
    assert [event_id for event_id in range(9, 23) if event_id in gaps] == [11, 14, 15, 16, 18, 19, 20]
    assert gaps.ranges() == IdRanges([(11, 11), (14, 16), (18, 20)])
    gaps.found_young(15)
    gaps.found_young(12)  # was never missing
    assert gaps.ranges() == IdRanges([(11, 11), (14, 14), (16, 16), (18, 20)])


@pytest.mark.parametrize(("old_head", "new_head", "seen"), [(0, 0, []), (5, 5, []), (5, 6, [6]), (5, 8, [6, 7, 8])])
def test_a_read_without_a_gap(old_head, new_head, seen):
    gaps = Gaps()
    gaps.passed(old_head, new_head, seen, now=1.0)
    assert not gaps


def test_young_ids_age_into_ranges():
    gaps = Gaps()
    gaps.passed(0, 4, [3], now=1.0)
    gaps.passed(4, 6, [], now=1.05)
    gaps.age(now=1.0999)
    assert not gaps.old
    gaps.age(now=1.101)
    assert ([(gap.low, gap.high) for gap in gaps], list(gaps.young)) == ([(1, 2), (4, 4)], [5, 6])
    gaps.age(now=1.151)
    assert [(gap.low, gap.high) for gap in gaps] == [(1, 2), (4, 4), (5, 6)]  # neighbours stay apart
    assert not gaps.young


def test_a_long_run_is_a_range_at_once():
    gaps = Gaps()
    gaps.passed(0, 204, [101, 203], now=1.0)  # 100 ids, 101 and 1
    assert [(gap.low, gap.high) for gap in gaps] == [(102, 202)]
    assert list(gaps.young) == [*range(1, 101), 204]


def test_beyond_the_bound_of_young_ids_all_are_ranges():
    gaps = Gaps()
    for n in range(30):
        gaps.passed(100 * n, 100 * n + 100, [100 * n + 100], now=1.0)
    assert len(gaps.young) == 1_980
    assert [(gap.low, gap.high) for gap in gaps] == [(100 * n + 1, 100 * n + 99) for n in range(20, 30)]


# Old gaps


def closing(low: int, high: int) -> Gaps:
    gaps = Gaps()
    gaps.restore([(low, high)])
    gaps.note_holders(holders(), now=0.0)
    return gaps


def spans(gaps: Gaps) -> list[tuple[int, int]]:
    return [(gap.low, gap.high) for gap in gaps]


def asked(gaps: Gaps, **options: float) -> list[tuple[int, int]]:
    return [(look.low, look.high) for look in gaps.looks(**options)]


def look_at_all(gaps: Gaps) -> int:
    """Look, and find nothing; return how many ranges were looked at."""
    looks = gaps.looks()
    for look in looks:
        gaps.looked(look, [], full=False)
    return len(looks)


def test_a_gap_closes_by_a_look_after_its_last_holder_left():
    gaps = Gaps()
    gaps.restore([(5, 9)])
    (gap,) = gaps
    assert gaps.wants_holders(now=0.0)
    gaps.note_holders(holders("a"), now=0.0)
    (look,) = gaps.looks()
    assert look == Look(gap, 5, 9, closes=False)
    gaps.looked(look, [6], full=False)
    assert (spans(gaps), gaps.closed_ids) == ([(5, 5), (7, 9)], 0)

    assert not gaps.wants_holders(now=0.01)
    assert gaps.wants_holders(now=0.03)
    assert not gaps.is_pending
    gaps.note_holders(holders("b"), now=0.03)
    assert gaps.is_pending
    first, second = gaps.looks()
    assert first.closes
    assert second.closes
    gaps.looked(first, [5], full=False)
    gaps.looked(second, [], full=False)
    assert (spans(gaps), gaps.closed_ids) == ([], 3)
    assert not gaps.wants_holders(now=9.0)


def test_a_gap_that_was_not_known_has_no_share_in_a_barrier():
    gaps = Gaps()
    gaps.restore([(5, 9)])
    gaps.note_holders(holders("a"), now=0.0)
    gaps.passed(9, 10, [], now=0.0)
    gaps.age(now=1.0)
    assert spans(gaps) == [(5, 9), (10, 10)]
    gaps.note_holders(holders("b"), now=1.0)
    assert [gap.is_closing for gap in gaps] == [True, False]


def test_barriers_that_became_equal_are_one():
    gaps = Gaps()
    gaps.restore([(1, 1)])
    gaps.note_holders(holders("a long"), now=0.0)
    gaps.passed(4, 5, [], now=0.0)
    gaps.age(now=1.0)
    gaps.note_holders(holders("a b long"), now=1.0)
    first, second = gaps
    assert first.barrier is not second.barrier
    gaps.note_holders(holders("b long"), now=1.1)
    assert first.barrier is not second.barrier
    gaps.note_holders(holders("long"), now=1.2)
    assert first.barrier is second.barrier
    gaps.note_holders(holders(), now=1.3)
    assert first.is_closing
    assert second.is_closing


def test_barriers_whose_first_members_differ_stay_two():
    """One of them has "p" as somebody who joined, whom nobody joins when it leaves; to the other it is one that may have been prepared."""
    gaps = Gaps()
    gaps.restore([(1, 1)])
    gaps.note_holders(holders("a"), now=0.0)
    gaps.note_holders(holders("", "p"), now=0.1)
    gaps.passed(4, 5, [], now=0.0)
    gaps.age(now=1.0)
    gaps.note_holders(holders("", "p"), now=1.0)
    first, second = gaps
    assert (first.barrier.members, second.barrier.members) == ({"p"}, {"p"})
    gaps.note_holders(holders("", "-1/7"), now=1.1)
    assert (first.is_closing, second.is_closing) == (True, False)


def test_after_a_reconnect_nothing_is_known_about_holders():
    gaps = closing(1, 9)
    gaps.forget_barriers()
    assert not gaps.looks()
    assert gaps.wants_holders(now=0.0)
    gaps.note_holders(holders("a"), now=5.0)
    (look,) = gaps.looks()
    assert not look.closes


def test_a_closing_look_eats_the_gap_from_below():
    gaps = closing(1, 9)
    (look,) = gaps.looks()
    gaps.looked(look, [2, 4], full=True)
    assert (spans(gaps), gaps.closed_ids) == ([(5, 9)], 2)
    (look,) = gaps.looks()
    gaps.looked(look, [9], full=True)
    assert (spans(gaps), gaps.closed_ids) == ([], 6)
    assert not gaps.is_pending


@pytest.mark.parametrize("members", ["", "a"])
def test_a_look_whose_turn_has_not_come_changes_nothing(members):
    gaps = Gaps()
    gaps.restore([(1, 9)])
    gaps.note_holders(holders(members), now=0.0)
    (look,) = gaps.looks()
    gaps.looked(look, [], full=True)
    assert (list(gaps), gaps.closed_ids, gaps.looks()) == ([look.gap], 0, [look])


def test_a_look_that_was_under_way_while_its_gap_was_joined_changes_nothing(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 2)
    gaps = closing(1, 3)
    (look,) = gaps.looks()
    gaps.passed(3, 9, [4, 8], now=0.0)
    gaps.age(now=1.0)
    assert spans(gaps) == [(1, 9)]
    gaps.looked(look, [], full=False)
    assert (spans(gaps), gaps.closed_ids) == ([(1, 9)], 0)
    assert gaps.wants_holders(now=1.0)  # begins again


def test_a_full_look_that_does_not_close_wants_another_at_the_rest():
    gaps = Gaps()
    gaps.restore([(1, 9)])
    gaps.note_holders(holders("a"), now=0.0)
    (look,) = gaps.looks()
    gaps.looked(look, [1, 4], full=True)
    assert spans(gaps) == [(2, 3), (5, 9)]
    assert asked(gaps) == [(5, 9)]
    assert not any(gap.is_closing for gap in gaps)


def test_at_the_bound_found_ids_stay_and_looks_go_page_by_page(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 2)
    gaps = Gaps()
    gaps.restore([(1, 9), (11, 11)])
    gaps.note_holders(holders("a b"), now=0.0)
    look, other = gaps.looks()
    gaps.looked(look, [2, 4], full=True)
    gaps.looked(other, [], full=True)
    assert (spans(gaps), asked(gaps)) == ([(1, 9), (11, 11)], [(11, 11), (5, 9)])  # by turns
    gaps.note_holders(holders("b"), now=0.1)
    assert asked(gaps) == [(11, 11), (1, 9)]  # all over again
    _, look = gaps.looks()
    gaps.looked(look, [7], full=False)
    assert (spans(gaps), asked(gaps)) == ([(1, 9), (11, 11)], [(11, 11)])


@pytest.mark.parametrize("reconnects", [False, True])
def test_a_closing_look_begins_at_the_low_end_wherever_an_earlier_one_stopped(monkeypatch, reconnects):
    """Id 1 is committed after a page had passed it, and its transaction was the last: only the closing look can find it."""
    monkeypatch.setattr(gaps_module, "OLD_MAX", 1)
    gaps = Gaps()
    gaps.restore([(1, 9)])
    gaps.note_holders(holders("a"), now=0.0)
    (look,) = gaps.looks()
    gaps.looked(look, [2, 4], full=True)
    if reconnects:
        gaps.forget_barriers()
    gaps.note_holders(holders(), now=0.1)
    assert gaps.looks() == [Look(look.gap, 1, 9, closes=True)]


# The bound of ranges


def test_neighbours_of_one_barrier_are_joined_the_closest_first_and_keep_it(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 8)
    gaps = Gaps()
    gaps.restore([(1, 1), (10, 10), (12, 12), (14, 14), (16, 16), (18, 18), (40, 40)])
    gaps.note_holders(holders("long"), now=0.0)
    assert look_at_all(gaps) == 7
    gaps.passed(40, 60, [50], now=0.0)
    gaps.age(now=1.0)
    assert spans(gaps) == [(1, 18), (40, 40), (41, 49), (51, 60)]  # the new ones have no barrier yet, but lie closer
    first = next(iter(gaps))
    assert first.barrier is not None
    assert not gaps.looks()  # nobody has left
    gaps.note_holders(holders("long b"), now=1.0)
    assert asked(gaps) == [(41, 49), (51, 60)]


def test_what_was_to_be_looked_at_still_is_when_it_is_joined(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 4)
    gaps = Gaps()
    gaps.restore([(1, 1), (3, 3), (5, 5), (7, 7)])
    gaps.note_holders(holders("long"), now=0.0)
    gaps.looked(gaps.looks()[0], [], full=False)
    gaps.passed(10, 11, [], now=0.0)
    gaps.age(now=1.0)
    assert spans(gaps) == [(1, 7), (11, 11)]
    assert (1, 7) in asked(gaps)


def test_if_too_few_are_of_one_barrier_any_are_joined_and_begin_again(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 4)
    gaps = Gaps()
    gaps.restore([(1, 1), (3, 3), (100, 100), (200, 200)])
    for n, gap in enumerate(gaps):
        gap.barrier = Barrier(frozenset(["long", f"v{n}"]))
    kept = list(gaps)[2]
    gaps.passed(200, 301, [300], now=0.0)  # a young id, and a run that joins
    assert 301 in gaps.young
    gaps.passed(301, 501, [400], now=0.0)
    gaps.age(now=1.0)
    assert len(gaps.old) <= 4
    assert {1, 3, 100, 200, 301} <= {event_id for event_id in range(502) if event_id in gaps}
    assert all(gap.barrier is None for gap in gaps if gap is not kept)


def test_a_young_id_between_ranges_that_are_joined_is_no_range_of_its_own(monkeypatch):
    monkeypatch.setattr(gaps_module, "OLD_MAX", 2)
    gaps = Gaps()
    gaps.restore([(1, 1), (3, 3)])
    gaps.passed(10, 12, [11], now=0.0)
    gaps.passed(12, 200, [], now=0.0)  # a range at once, above the young 12
    gaps.age(now=1.0)
    assert spans(gaps) == [(1, 200)]
    assert not gaps.young
    assert gaps.ranges() == IdRanges([(1, 200)])


def test_two_ranges_of_one_barrier_with_a_young_id_between_are_not_joined_under_it(monkeypatch):
    """Who may fill the young one is nobody that the barrier knows."""
    monkeypatch.setattr(gaps_module, "OLD_MAX", 2)
    gaps = Gaps()
    gaps.restore([(1, 1), (6, 6)])
    gaps.note_holders(holders("long"), now=0.0)
    gaps.young[4] = 0.5
    gaps.passed(10, 200, [], now=0.5)
    assert 4 in gaps
    assert all(gap.barrier is None for gap in gaps if gap.low <= 4 <= gap.high)


# When to look


def test_a_watched_gap_is_looked_at_when_a_holder_has_left():
    gaps = Gaps()
    gaps.restore([(1, 1), (5, 5)])
    gaps.note_holders(holders("a b"), now=0.0)
    assert look_at_all(gaps) == 2
    assert look_at_all(gaps) == 0
    gaps.note_holders(holders("a b c"), now=0.5)
    assert look_at_all(gaps) == 0
    gaps.note_holders(holders("a c"), now=0.6)
    assert look_at_all(gaps) == 2
    assert look_at_all(gaps) == 0


def test_a_look_covers_a_bounded_number_of_ranges():
    gaps = Gaps()
    gaps.restore([(2 * n, 2 * n) for n in range(1, 1_500)])
    gaps.note_holders(holders("a"), now=0.0)
    assert look_at_all(gaps) == 1_000
    assert look_at_all(gaps) == 499


def test_a_look_covers_a_bounded_number_of_ids():
    gaps = Gaps()
    gaps.restore([(1, 45_000), (50_000, 50_000)])
    gaps.note_holders(holders("a"), now=0.0)
    assert asked(gaps) == [(1, 20_000)]
    look_at_all(gaps)
    assert asked(gaps) == [(50_000, 50_000), (20_001, 39_999)]
    look_at_all(gaps)
    assert asked(gaps) == [(40_000, 45_000)]
    assert look_at_all(gaps) == 1
    assert not gaps.is_pending


def test_when_to_come_back():
    gaps = Gaps()
    assert gaps.next_at(5.0) == float("inf")
    assert not gaps.wants_holders(5.0)
    gaps.passed(0, 1, [], now=5.0)
    assert gaps.next_at(5.0) == 5.1
    gaps.age(now=5.1)
    assert gaps.next_at(5.1) == 5.1  # it has no barrier yet
    gaps.note_holders(holders("a"), now=5.1)
    assert gaps.next_at(5.1) == 5.1  # it wants a look
    assert look_at_all(gaps) == 1
    assert gaps.next_at(5.1) == pytest.approx(5.12)
    gaps.note_holders(holders("a"), now=6.2)
    assert gaps.next_at(6.2) == pytest.approx(6.45)  # nothing has changed for a second
    assert not gaps.wants_holders(6.3)
    assert gaps.wants_holders(6.46)


def test_ten_thousand_gaps_with_barriers_of_their_own_hold_nobody_up():
    """All behind one long transaction that ends: once quadratic, which froze the loop for seconds."""
    gaps = Gaps()
    gaps.restore([(2 * n, 2 * n) for n in range(1, 10_001)])
    gaps._new = {}
    for n, gap in enumerate(gaps):
        gap.barrier = Barrier(frozenset(["long", f"v{n}"]))
        gap.barrier.gaps[gap] = gaps._barriers[gap.barrier] = None
    began = time.process_time()
    gaps.note_holders(holders("v1 v2"), now=1.0)
    assert time.process_time() - began < 1.0
    assert len(gaps.looks()) == 1_000
    assert sum(gap.is_closing for gap in gaps) == 9_998


def test_what_one_large_transaction_left_takes_turns_with_a_neighbours_late_event():
    gaps = Gaps()
    gaps.restore([(1, 100_000)])
    gaps.note_holders(holders("load"), now=0.0)
    gaps.passed(200_000, 200_400, [200_250], now=0.0)
    gaps.note_holders(holders("load neighbour"), now=0.1)
    gaps.note_holders(holders(), now=0.3)  # both at once
    first = {asked(gaps)[0] for _ in range(2)}
    assert first == {(1, SUMMARY_IDS), (200_001, 200_250 - 1)}, "each begins every other look"


def test_a_summary_closes_what_one_large_transaction_left():
    gaps = closing(1, SUMMARY_IDS + LOOK_IDS_MAX)
    (look,) = gaps.looks()
    assert (look.low, look.high, look.sums) == (1, SUMMARY_IDS, True)
    gaps.summed([look], 7)
    assert (spans(gaps), gaps.closed_ids) == (
        [(SUMMARY_IDS + 1, SUMMARY_IDS + LOOK_IDS_MAX)],
        SUMMARY_IDS - 7,
    )


def test_where_a_summary_is_no_use_its_range_is_read_by_rows_and_the_next_is_summed_up():
    gaps = closing(1, 2 * LOOK_IDS_MAX)
    looks = gaps.looks()
    gaps.by_rows(looks)
    for found in ([5, 200], [300, SUMMARY_IDS]):
        (look,) = gaps.looks()
        assert (look.high, look.sums) == (SUMMARY_IDS, False)
        gaps.looked(look, found, full=found[-1] < SUMMARY_IDS)
    (look,) = gaps.looks()
    assert (look.low, look.high, look.sums) == (SUMMARY_IDS + 1, 2 * SUMMARY_IDS, True)


def test_what_may_still_come_is_not_summed_up():
    """Who reads it for himself passes what has not come yet."""
    gaps = Gaps()
    gaps.restore([(1, 2 * LOOK_IDS_MAX)])
    gaps.note_holders(holders("load other"), now=0.0)
    gaps.note_holders(holders("load"), now=0.1)
    (look,) = gaps.looks()
    assert (look.high, look.closes, look.sums) == (LOOK_IDS_MAX, False, False)


def test_after_a_summary_others_have_their_turns_for_a_while():
    """Five million rows kept the reader at summaries, one after another, for twelve seconds: others' p50 was eight times as long."""
    gaps = closing(1, 3 * LOOK_IDS_MAX)
    (look,) = gaps.looks(now=5.0)
    gaps.summed([look], 0)
    gaps.rest(now=5.1, took_s=0.01, events=600)
    then = 5.1 + SUMMARY_REST * 0.01
    assert (gaps.looks(now=5.12), gaps.is_pending) == ([], True)
    assert gaps.next_at(5.12) == then, "it comes back for the next, and not before"
    (look,) = gaps.looks(now=then)
    assert look.sums
    gaps.rest(now=6.0, took_s=600.0, events=600)  # the machine slept
    assert gaps.next_at(6.0) == 6.0 + SUMMARY_REST_MAX_S


def test_what_a_summary_was_no_use_for_is_read_at_once():
    gaps = closing(1, 3 * LOOK_IDS_MAX)
    looks = gaps.looks(now=5.0)
    gaps.by_rows(looks)
    gaps.rest(now=5.1, took_s=0.01, events=600)
    assert asked(gaps, now=5.1) == [(1, SUMMARY_IDS)]


def test_who_comes_late_is_not_kept_waiting_by_a_summary():
    gaps = Gaps()
    gaps.restore([(1, 3 * LOOK_IDS_MAX)])
    gaps.note_holders(holders("load"), now=0.0)
    gaps.passed(300_000, 300_400, [300_250], now=0.0)
    gaps.note_holders(holders("load neighbour"), now=0.1)
    gaps.note_holders(holders("neighbour"), now=0.2)
    gaps.rest(now=0.2, took_s=1.0, events=600)
    gaps.note_holders(holders(), now=0.3)
    assert asked(gaps, now=0.3) == [(300_001, 300_249), (300_251, 300_400)], "not what the load left"
    assert (1, SUMMARY_IDS) in {*asked(gaps, now=9.0), *asked(gaps, now=9.0)}


def test_where_nothing_is_a_summary_passes_more_ids():
    """Forty million skipped ids, a thousand a look with a pause after each, kept the checkpoint's gap for minutes."""
    gaps, now, sizes = closing(1, 40 * LOOK_IDS_MAX), 1.0, []
    for events in (0, 0, 0, 0, 0, 0, 900, 0):
        now += 1.0
        (look,) = gaps.looks(now)
        sizes.append(look.high + 1 - look.low)
        gaps.summed([look], events)
        gaps.rest(now, 0.01, events)
    assert sizes == [SUMMARY_IDS * n for n in (1, 2, 4, 8, 16)] + [LOOK_IDS_MAX] * 2 + [SUMMARY_IDS]
