"""The janitor's parts by themselves: what keeps partitions ahead of a log that grows as it likes, and what stalls a lane."""

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from dispatcher.domain.ordering import Ordering
from dispatcher.domain.retention import DAY_S, MARGIN_IDS, Span
from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.janitor import Janitor, _has_in_hand, _is_open_below
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.provision import Patience, Provisioner
from dispatcher.engine.runs import LaneRun
from dispatcher.ports import LogShape, Parent, RefusedError, SweptDeadLetters, SweptRetries
from dispatcher.settings import Settings
from dispatcher.store.memory import MemoryStore
from dispatcher.store.memory_database import MemoryDatabase
from dispatcher.store.memory_partitions import MemoryPartitions
from tests.engine.build import LIMITS, check_bounds, make_endpoint, make_event, make_lane, make_retry

# ── patience ──


def test_patience_grows_and_ends():
    patience = Patience(30.0, 100.0)
    assert patience.is_over(0)
    for now, until in ((0, 30), (30, 90), (90, 190), (190, 290)):
        patience.tried(now, had=False)
        assert not patience.is_over(until - 1)
        assert patience.is_over(until)
    patience.tried(300, had=True)
    assert patience.is_over(300)
    patience.tried(300, had=False)
    assert patience.is_over(330)


# ── provisioning ──


class World:
    """A log, and time that passes only when it is told to."""

    def __init__(self, retention_days: float = 7) -> None:
        self.now = 1_000.0
        self.is_held = False
        self.database = MemoryDatabase(now_us=lambda: int(self.now * 1e6) + 1_700_000_000_000_000, rng=random.Random(1))
        self.partitions = MemoryPartitions(self.database, MemoryStore(self.database))
        self.counters = Counters()
        self.provisioner = Provisioner(
            self.partitions, Clock(lambda: self.now), self.counters, retention_days=retention_days
        )

    async def turn(self, seconds: float = 10.0) -> LogShape:
        """Let time pass, then the janitor have its turns until it has nothing to do."""
        self.now += seconds
        for _ in range(50):
            shape = await self.partitions.shape()
            if not await self.provisioner.turn(shape):
                return shape
        raise AssertionError("it never ends")

    def grow(self, ids: int) -> None:
        """Hand out ids, of which one event remains."""
        self.database._sequence += ids - 1
        self.database.insert()


def check(shape: LogShape) -> None:
    """Leaves follow each other, and every event has its attempts in the same leaf or in a narrower one."""
    for table in (shape.outbox, shape.attempt):
        assert all(a.high == b.low for a, b in pairwise(table.leaves))
        assert (table.leaves[0].low, table.fence) == (0, None)
    assert {leaf.low for leaf in shape.outbox.leaves} <= {leaf.low for leaf in shape.attempt.leaves}
    assert shape.outbox.leaves[-1].high == shape.attempt.leaves[-1].high


@pytest.mark.parametrize("seed", range(30))
async def test_a_log_never_outruns_its_partitions(seed: int) -> None:
    """At any rate up to 20,000 a second, in bursts too, and with an open transaction now and then."""
    rng = random.Random(seed)
    world = World(retention_days=rng.choice([0.5, 7, 90]))
    rate = 10 ** rng.uniform(-1, 4.3)
    holder: Any = None
    for _ in range(400):
        if rng.random() < 0.05:
            rate = 10 ** rng.uniform(-1, 4.3)
        if rng.random() < 0.05 and holder is None:
            holder = world.database.begin()
            holder.insert()
        elif rng.random() < 0.2 and holder is not None:
            holder.commit()
            holder = None
        step_s = rng.choice([10, 10, 10, 10, 45])
        world.grow(max(1, int(rate * step_s)))
        shape = await world.turn(step_s)
        check(shape)
        assert shape.outbox.outside == [], (seed, shape.last_id)
        covered = shape.outbox.leaves[-1].high - shape.last_id
        assert covered > min(1_000_000, rate * 45)


async def test_how_many_ids_are_left_is_known_and_nought_once_the_log_outran_its_partitions() -> None:
    world = World()
    shape = await world.turn()
    assert world.provisioner.ids_ahead == shape.outbox.leaves[-1].high - 1 - shape.last_id
    world.grow(shape.outbox.leaves[-1].high - shape.last_id)
    await world.provisioner.turn(await world.partitions.shape())
    assert world.provisioner.ids_ahead == 0


async def test_a_load_of_millions_makes_a_handful_of_leaves() -> None:
    """At 100,000 ids a second what an hour takes moves as fast: a leaf at each turn was dozens, and every read of the head paid for them."""
    world = World()
    world.grow(1)
    before = len((await world.turn()).outbox.leaves)
    for _ in range(50):
        world.grow(1_000_000)
        shape = await world.turn(10)
    check(shape)
    assert len(shape.outbox.leaves) < before + 20


async def test_a_slow_log_ends_with_narrow_leaves() -> None:
    world = World()
    for _ in range(300):
        world.grow(1_000)
        await world.turn(DAY_S / 10)
    shape = await world.turn()
    used = [leaf for leaf in shape.outbox.leaves if 200_000 < leaf.low <= shape.last_id]
    assert len(used) >= 5
    assert all(leaf.high - leaf.low <= 40_000 for leaf in used)


async def test_a_leaf_that_a_burst_has_reached_meanwhile_stays_as_wide_as_it_is() -> None:
    """It was told as a failure of the janitor's, with a trace."""
    world = World()
    refused: list[Parent] = []

    async def refuses(parent: Parent, *_: Any) -> bool:
        refused.append(parent)
        raise RefusedError("it is in use")

    world.partitions.recut = refuses  # type: ignore[method-assign]
    world.database._sequence = 60_000
    for _ in range(60):
        world.grow(1)
        await world.turn()
    assert 0 < len(refused) <= 6


async def test_a_log_that_outran_them_is_adopted_with_as_few_leaves() -> None:
    world = World()
    world.database._sequence = 39_999_999
    for _ in range(20):
        world.grow(500_000)
    shape = await world.turn()
    check(shape)
    assert shape.outbox.outside == []
    assert shape.outbox.leaves[4].low == 40_000_000
    assert len(shape.outbox.leaves) <= 8


async def test_a_sequence_that_was_set_far_ahead_leaves_a_hole_behind_it() -> None:
    """Nothing is in the DEFAULT partition, and nothing can be attached below the last id."""
    world = World()
    world.database._sequence = 90_000_000
    shape = await world.turn()
    assert shape.outbox.leaves[-1].high > 91_000_000
    first = next(leaf for leaf in shape.outbox.leaves if leaf.low > 40_000_000)
    assert first.low - 90_000_000 >= MARGIN_IDS
    world.grow(10)
    shape = await world.turn()
    assert shape.outbox.outside == []
    assert Span(40_000_000, first.low) in shape.outbox.leaves


async def test_what_is_not_to_be_had_is_not_asked_for_at_every_turn() -> None:
    world = World()
    asked: list[Parent] = []
    recut = world.partitions.recut

    async def counted(parent: Parent, *arguments: Any) -> bool:
        asked.append(parent)
        return await recut(parent, *arguments)

    world.partitions.recut = counted  # type: ignore[method-assign]
    world.database._sequence = 60_000
    holder = world.database.begin()
    holder.insert()
    for _ in range(60):  # ten minutes
        world.grow(1)
        await world.turn()
    assert asked.count("outbox") <= 6
    assert asked.count("attempt") == 1  # done at the first try, and not again
    assert not world.provisioner.is_complete
    holder.commit()
    for _ in range(60):
        await world.turn()
    assert world.provisioner.is_complete
    shape = await world.turn()
    check(shape)
    assert shape.outbox.leaves[1].high == 110_000


async def test_a_leaf_that_was_begun_is_finished_with_its_bounds_whatever_the_pace_is_by_then() -> None:
    """`attempt` has it, `outbox` was not to be had, and a kill, a takeover or the next measuring comes between."""
    world = World()
    attach = world.partitions.attach

    async def not_the_outbox(parent: Parent, leaf: Span) -> bool:
        return parent == "attempt" and await attach(parent, leaf)

    world.database._sequence = 9_000_000
    world.partitions.attach = not_the_outbox  # type: ignore[method-assign]
    shape = await world.turn()
    begun = [leaf for leaf in shape.attempt.leaves if leaf not in shape.outbox.leaves]
    assert len(begun) == 1
    world.partitions.attach = attach  # type: ignore[method-assign]
    world.provisioner = Provisioner(world.partitions, Clock(lambda: world.now), world.counters, retention_days=7)
    while shape.outbox.leaves[-1].high <= begun[0].low:
        world.grow(200_000)
        shape = await world.turn()
    assert begun[0] in shape.outbox.leaves
    assert shape.outbox.leaves == shape.attempt.leaves


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("beyond", [-1_000_000, -100_001, -100_000, -99_999, -1, 0, 1, 50_000, 5_000_000])
async def test_a_log_that_outran_its_leaves_and_meets_one_that_was_begun(beyond: int, rows: bool) -> None:
    """`beyond`: how far the last id is above the begun leaf's low, with or without events in the DEFAULT partition."""
    world = World()
    attach = world.partitions.attach

    async def not_the_outbox(parent: Parent, leaf: Span) -> bool:
        return parent == "attempt" and await attach(parent, leaf)

    world.database._sequence = 45_000_000  # above what a new log's leaves hold
    world.partitions.attach = not_the_outbox  # type: ignore[method-assign]
    await world.turn()
    shape = await world.partitions.shape()
    begun = shape.attempt.leaves[-1]
    assert begun.low > 45_000_000 > shape.outbox.leaves[-1].high
    world.partitions.attach = attach  # type: ignore[method-assign]
    world.provisioner = Provisioner(world.partitions, Clock(lambda: world.now), world.counters, retention_days=7)
    world.database._sequence = begun.low + beyond - rows
    if rows:
        world.database.insert()
    check_bounds(await world.turn())
    for _ in range(8):
        world.grow(1_000_000)
        check_bounds(await world.turn())


@pytest.mark.parametrize("seeds", [range(n, n + 50) for n in range(0, 300, 50)], ids=str)
async def test_bounds_agree_whatever_was_not_to_be_had_and_however_the_log_grows(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        world = World()
        hold_now_and_then(world, rng)
        for _ in range(30):
            for _ in range(rng.randrange(3)):
                world.grow(int(10 ** rng.uniform(0, rng.choice([5, 7, 7.7]))))
            await world.turn(rng.choice([10, 700]))
        world.is_held = False
        for _ in range(5):
            shape = await world.turn(700)
        check_bounds(shape)


def hold_now_and_then(world: World, rng: random.Random) -> None:
    """Let every second try be for nothing while the world `is_held`."""
    attach, adopt, recut = world.partitions.attach, world.partitions.adopt, world.partitions.recut
    world.is_held = True

    def is_not_now() -> bool:
        return world.is_held and rng.random() < 0.5

    async def maybe_attach(parent: Parent, leaf: Span) -> bool:
        return not is_not_now() and await attach(parent, leaf)

    async def maybe_adopt(parent: Parent, leaf: Span) -> str | None:
        return None if is_not_now() else await adopt(parent, leaf)

    async def maybe_recut(parent: Parent, leaf: Span, cuts: Sequence[int]) -> bool:
        return not is_not_now() and await recut(parent, leaf, cuts)

    world.partitions.attach = maybe_attach  # type: ignore[method-assign]
    world.partitions.adopt = maybe_adopt  # type: ignore[method-assign]
    world.partitions.recut = maybe_recut  # type: ignore[method-assign]


# ── stalling ──


def test_a_stalled_lane_takes_nothing_that_is_read_again():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=False, cursor=10)
    for event_id in (11, 12):
        lanes.take(lane, make_event(event_id), 0.0)
    lane.cursor = 12
    moved = lane.moved
    lanes.stall(lane)
    assert (lane.cursor, list(lane.hands), lane.live) == (10, [], False)
    assert lane.moved > moved
    assert (lane.room(0.0), lane.retry_room(0.0), lanes.memory.events) == (0, 0, 0)
    lane.stalled = False
    assert lane.room(0.0) > 0


def test_a_live_lane_that_is_stalled_goes_on_with_fresh_events():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    lanes.take(lane, make_event(11), 0.0)
    retry = make_retry(3)
    lanes.memory.hold(retry.event)
    lane.retries.append(retry)
    lane.retry_hands.add((3, 0))
    lanes.stall(lane)
    assert lane.live
    assert list(lane.hands) == [11]
    assert lane.takes(0.0)
    assert not lane.accepts(0.0)
    assert (len(lane.retries), lane.retry_hands, lane.next_retry_at, lanes.memory.events) == (0, set(), 0, 1)


def run_of(source: RunSource, settled: int) -> LaneRun:
    return LaneRun(Run(7, source, 0, 500, ("*",), False, None, RunState.RUNNING, settled))


def test_which_lanes_a_leaf_has_to_wait_for():
    assert not _is_open_below(make_lane(live=True), 100)
    assert not _is_open_below(make_lane(live=False, cursor=99), 100)
    assert _is_open_below(make_lane(live=False, cursor=98), 100)
    for hole, is_open in ((99, True), (100, False)):
        lane = make_lane(live=True)
        lane.add_hole(hole)
        assert _is_open_below(lane, 100) is is_open
    for hand, is_open in ((99, True), (100, False)):
        lane = make_lane(live=True)
        lane.take(make_event(hand), 0.0)
        assert _has_in_hand(lane, 100) is is_open
        lane = make_lane(live=True)
        lane.retry_hands.add((hand, 0))
        assert _has_in_hand(lane, 100) is is_open
    for source, settled, is_open in (
        (RunSource.LOG, 98, True),
        (RunSource.LOG, 99, False),
        (RunSource.DEAD_LETTER, 5, False),  # it has copies
    ):
        lane = make_lane(live=True)
        lane.runs[7] = run_of(source, settled)
        assert _is_open_below(lane, 100) is is_open
        lane.runs[7].hands[50] = None
        lane.retry_hands.add((50, 7))
        assert _has_in_hand(lane, 100) is (source is RunSource.LOG)


# ── sweeping ──


async def test_old_rows_are_swept_page_by_page_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    swept: list[tuple[Any, ...]] = []
    left = {"event_keys": 7_000, "tests": 12_000, "stats": 0, "runs": 250}

    async def sweep(what: str, before_us: int, limit: int) -> int:
        deleted = min(limit, left[what])
        left[what] -= deleted
        swept.append((what, deleted))
        return deleted

    async def sweep_dead_letters(after: int, before_us: int, limit: int) -> SweptDeadLetters:
        swept.append(("letters", after))
        return SweptDeadLetters(3, 1, after + 5 if after < 10 else None)

    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(asyncio, "sleep", at_once)
    monkeypatch.setattr(world.partitions, "sweep", sweep)
    monkeypatch.setattr(world.partitions, "sweep_dead_letters", sweep_dead_letters)
    monkeypatch.setattr(world.partitions, "_call", lambda what, work: _now(work))
    clock = Clock(lambda: world.now)
    janitor = Janitor(
        world.partitions,
        Lanes(LIMITS, Memory(1, 1)),
        clock,
        world.counters,
        Settings(),
        epoch=0,
        look=lambda lane: None,
    )
    await janitor.turn()
    expected = [
        ("event_keys", 5_000),
        ("event_keys", 2_000),
        ("tests", 5_000),
        ("tests", 5_000),
        ("tests", 2_000),
        ("stats", 0),
        ("runs", 100),
        ("runs", 100),
        ("runs", 50),
    ]
    assert swept == [*expected, ("letters", 0), ("letters", 5), ("letters", 10)]
    assert world.counters.dead_letters_expired == 9
    world.now += 59
    await janitor.turn()
    assert len(swept) == 12
    world.now += 3_540
    await janitor.turn()
    assert swept[12:] == [("event_keys", 0)], "keys, every minute"
    world.now += 1
    await janitor.turn()
    assert len(swept) == 19


async def _now(work: Any) -> Any:
    return work()


async def test_keys_are_asked_for_once_a_read_that_is_under_way_has_been_applied():
    """Asked for before, that read told of the retries that are gone, and the key that one had held stood still."""
    lanes, later = Lanes(LIMITS, Memory(1, 1)), []
    lane = lanes.add(make_endpoint(ordering=Ordering()), 0.0, live=True, cursor=0)

    class Swept:
        async def sweep_retries(self, after: Any, rows: int) -> SweptRetries:
            return SweptRetries(1, None)

    janitor = Janitor(
        Swept(), lanes, Clock(lambda: 1.0), Counters(), Settings(), epoch=1, look=lambda lane: None, after_read=later.append
    )  # fmt: skip
    janitor._keys_swept_at = janitor._swept_at = 1.0
    await janitor._sweep(None)
    lane.keys.know([], [])  # by the read
    for action in later:
        action()
    assert not lane.keys.are_known
