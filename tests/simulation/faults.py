"""Deliberate faults: each removes one rule of the design from the engine while a simulation runs, and must be caught.

By patches from here, never by flags in the product. `shows`: a part of what the checker says. `seed`: one that caught it when this was
written; the search for one begins there.
"""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from dispatcher.domain.breaker import CLOSED, CircuitBreaker
from dispatcher.domain.bucket import TokenBucket
from dispatcher.domain.outcome import Outcome
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.run import Run
from dispatcher.engine import config, lanes, sender
from dispatcher.engine.catchup import CatchUp, ReadGate
from dispatcher.engine.gaps import Barrier, Gaps, Look
from dispatcher.engine.keys import NEVER, Keys
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.reader import Reader
from dispatcher.engine.recorder import Recorder
from dispatcher.engine.sender import Sender
from dispatcher.engine.shares import Share, Shares
from dispatcher.ports import Batch, CheckpointWrite, Holders, Page
from dispatcher.store import memory
from dispatcher.store.memory import MemoryStore
from tests.simulation.plan import draw

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Fault:
    name: str
    patches: Sequence[Patch]
    shows: str
    needs: frozenset[str] = frozenset()  # kinds without which it can't show: seeds without them are passed over
    seed: int = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target, name, replacement in self.patches:
                stack.enter_context(mock.patch.object(target, name, replacement))
            yield


# ── gaps ──

_holders, _probe = MemoryStore.holders, MemoryStore.probe


async def _holders_after_a_look(self: Any) -> Holders:
    self.looked_at = set(self._database.tables.outbox)
    await asyncio.sleep(0.03)  # the snapshot of a probe that takes long
    return await _holders(self)


async def _probe_of_that_look(self: Any, ranges: Any, limit: int, bytes_max: int) -> list[Page]:
    pages = await _probe(self, ranges, limit, bytes_max)
    for page in pages:
        seen = [(e, a) for e, a in zip(page.events, page.attempted or (), strict=True) if e.id in self.looked_at]
        page.events, page.attempted = [e for e, _ in seen], [a for _, a in seen]
    return pages


def _note_without_prepared(self: Barrier, holders: Holders) -> bool:
    now = holders.running | holders.prepared
    left = self.members - now
    self.members &= now
    return bool(left)


def _full_look_is_the_end(self: Gaps, look: Look, found: list[int], full: bool) -> None:
    _looked(self, look, found, full and not look.closes)


def _sum_up_in_any_case(self: Gaps, looks: Any) -> None:
    self.summed(looks, 0)


def _go_back_when_behind(self: Lanes, lane: Lane, after: int, head: int) -> None:
    if not lane.live:
        _go_back(self, lane, after, head)


_looked, _cut, _go_back = Gaps.looked, memory._cut, Lanes.go_back


# ── the checkpoint ──

_checkpoint, _build, _stop = Recorder._checkpoint, Recorder._build, Recorder.stop


async def _checkpoint_at_the_head(self: Recorder, results: Any) -> CheckpointWrite:
    write = await _checkpoint(self, results)
    write.position = self.head()
    return write


async def _checkpoint_without_gaps(self: Recorder, results: Any) -> CheckpointWrite:
    write = await _checkpoint(self, results)
    write.gaps = IdRanges()
    return write


async def _checkpoint_without_live_lanes(self: Recorder, results: Any) -> CheckpointWrite:
    write = await _checkpoint(self, results)
    write.lanes = [
        row for row in write.lanes if (a_lane := self._lanes.get(row.endpoint_id)) is None or not a_lane.live
    ]
    return write


async def _checkpoint_without_what_closed_meanwhile(self: Recorder, results: Any) -> CheckpointWrite:
    closed = self.gaps.ranges()
    write = await _checkpoint(self, results)
    for low, high in self.gaps.ranges():
        closed.remove(low, high)
    for low, high in closed:
        write.gaps.remove(low, high)
    return write


async def _checkpoint_without_what_is_joined_meanwhile(self: Recorder, results: Any) -> CheckpointWrite:
    gaps = self.gaps
    self.gaps = cast(Any, SimpleNamespace(ranges=gaps.ranges))
    try:
        return await _checkpoint(self, results)
    finally:
        self.gaps = gaps


def _mark_where_it_reads(self: Lane, head: int, done: Any = ()) -> int:
    return head if self.live else self.cursor


def _build_without_retries(self: Recorder, results: Any, *, checkpoint: bool) -> Batch:
    batch = _build(self, results, checkpoint=checkpoint)
    batch.retries = [row for row in batch.retries if row.number != 3]
    return batch


def _build_without_settling(self: Recorder, results: Any, *, checkpoint: bool) -> Batch:
    batch = _build(self, results, checkpoint=checkpoint)
    batch.settled_retries = []
    return batch


def _stop_without_flush(self: Recorder) -> None:
    self._results.clear()
    _stop(self)


# ── lanes ──


def _is_due_in_hand_or_not(self: CatchUp, lane: Lane, event: Any, skip: Sequence[int]) -> bool:
    return lane.id not in skip and lane.is_for(event)


def _is_due_attempted_or_not(self: CatchUp, lane: Lane, event: Any, skip: Sequence[int]) -> bool:
    return event.id not in lane.hands and lane.is_for(event)


def _is_for_by_type(self: Lane, event: Any) -> bool:
    return any(s.matches(event.type, event.id) for s in self.endpoint.subscriptions)


def _take_up_only_here(self: Lanes, lane: Lane, head: int) -> None:
    self.taking_up.update(s.id for s in lane.endpoint.subscriptions if not s.taken_up)


def _remove_and_go_on(self: Lanes, endpoint_id: int) -> Lane | None:
    lane = self.get(endpoint_id)
    if lane is not None:
        self.rows_gone.add(endpoint_id)
    return lane


def _configure_without_holding(self: Lane, endpoint: Any, now: float) -> None:
    _configure(self, endpoint, now)
    self.held = False


_configure, _drop_queue = Lane.configure, Lane.drop_queue


def _drop_queue_and_go_on(self: Lane) -> list[Any]:
    cursor = self.cursor
    dropped = _drop_queue(self)
    self.cursor = cursor
    return dropped


# ── the server's memory, and who rules ──

_connection, _record, _config_changes = MemoryStore._connection, MemoryStore.record, MemoryStore.config_changes


async def _connection_of_any_life(self: MemoryStore, session: str) -> Any:
    if self._life is not None:
        self._life = self._database.life
    return await _connection(self, session)


async def _record_under_any_epoch(self: MemoryStore, batch: Batch) -> Any:
    batch.epoch = self._database.tables.epoch
    return await _record(self, batch)


async def _config_under_any_epoch(self: MemoryStore, after_seq: int, epoch: int, again: Sequence[int] = ()) -> Any:
    return await _config_changes(self, after_seq, self._database.tables.epoch, again)


async def _own_in_any_case(self: MemoryStore) -> None:
    await self._call("owner", "hold_ownership", lambda connection: None)


# ── sending ──

_accrue, _let_go, _answered = TokenBucket._accrue, Memory.let_go, Sender.answered


def _accrue_twice(self: TokenBucket, now: float) -> None:
    stamp = self.stamp
    _accrue(self, now)
    self.stamp = stamp
    _accrue(self, now)


def _started_without_probe(self: CircuitBreaker) -> bool:
    return False


def _let_go_of_some(self: Memory, event: Any) -> None:
    if event.id % 7:
        _let_go(self, event)


def _answered_well(self: Sender, delivery: Any, outcome: Outcome) -> None:
    _answered(self, delivery, Outcome(None, 200) if outcome.status == 404 else outcome)


def _full_of_all_slots(self: Shares, lane: Lane, now: float) -> Share | None:
    share = _full(self, lane, now)
    return None if share is None or share.origin is not None else share


_full = Shares.full


def _call_nobody(self: Sender) -> None:
    pass


def _on_timer_as_it_was(self: Sender) -> None:
    self._timer_when = float("inf")
    now = self._clock.now()
    while self._timers and self._timers[0][0] <= now:
        at, _, lane = heapq.heappop(self._timers)
        if lane.timer_at == at:
            lane.timer_at = float("inf")
            self._look(lane)
            self.offer(lane)
    self._set_timer()


def _limit_without_limit(self: Lane) -> int:
    return 1_000 if self.breaker.state is CLOSED else 1


def _after_at_once(self: ReadGate, action: Callable[[], None]) -> None:
    action()


def _know_nothing_of_retries(self: Keys, retrying: Any, in_hand: Any) -> None:
    _know(self, [], in_hand)


def _take_key_without_next(self: Keys, event: Any, next_id: int) -> None:
    _take(self, event, NEVER)


_know, _take = Keys.know, Keys.take


FAULTS = [
    Fault("drop the barrier", [(Barrier, "is_open", property(lambda self: True))], "neither"),
    Fault(
        "read the barrier and the last probe in one snapshot",
        [(MemoryStore, "holders", _holders_after_a_look), (MemoryStore, "probe", _probe_of_that_look)],
        "neither settled nor to be read again",
        needs=frozenset({"long transactions"}),
        seed=20,
    ),
    Fault(
        "forget that prepared transactions change their names",
        [(Barrier, "note", _note_without_prepared)],
        "neither",
        needs=frozenset({"prepared", "restart", "long transactions"}),
        seed=1_072,
    ),
    Fault("close a gap by a probe that was cut", [(Gaps, "looked", _full_look_is_the_end)], "neither", seed=2),
    Fault(
        "take a byte-cut read for the end",
        [(memory, "_cut", lambda rows, bytes_max: (_cut(rows, bytes_max)[0], False))],
        "neither",
    ),
    Fault("write a lane's read mark as its settled mark", [(Lane, "mark", _mark_where_it_reads)], "neither"),
    Fault(
        "let the row of one that lags stand",
        [(Lane, "rests_on", lambda self, row: not self.live)],
        "neither",
    ),
    Fault("forget the found but unsettled ids", [(Lane, "open_late", lambda self, done=(): self.holes)], "neither"),
    Fault("move the checkpoint early", [(Recorder, "_checkpoint", _checkpoint_at_the_head)], "neither"),
    Fault(
        "look at gaps once lanes were looked at",
        [(Recorder, "_checkpoint", _checkpoint_without_what_closed_meanwhile)],
        "neither",
        seed=1_012,
    ),
    Fault(
        "forget what is joined while lanes are looked at",
        [(Recorder, "_checkpoint", _checkpoint_without_what_is_joined_meanwhile)],
        "neither",
        seed=1_638,
    ),
    Fault("keep gaps out of the checkpoint", [(Recorder, "_checkpoint", _checkpoint_without_gaps)], "neither"),
    Fault(
        "write rows of lagging lanes only",
        [(Recorder, "_checkpoint", _checkpoint_without_live_lanes)],
        "neither",
        seed=6,
    ),
    Fault("delete a lane's row that has holes", [(IdRanges, "covers_all", lambda self, other: True)], "neither"),
    Fault("lose a retry row", [(Recorder, "_build", _build_without_retries)], "failed, and"),
    Fault(
        "keep the retry rows of what was delivered",
        [(Recorder, "_build", _build_without_settling)],
        "a retry row is there",
    ),
    Fault(
        "lose the recorder's last flush", [(Recorder, "stop", _stop_without_flush)], "were answered, and not recorded"
    ),
    Fault(
        "release a batch while a read is under way", [(ReadGate, "after", _after_at_once)], "second time", seed=1_008
    ),
    Fault("forget what is in hand", [(CatchUp, "_is_due", _is_due_in_hand_or_not)], "second time", seed=65),
    Fault("forget what has an attempt", [(CatchUp, "_is_due", _is_due_attempted_or_not)], "second time"),
    Fault(
        "apply a page though its lane has moved",
        [(Lane, "moved", property(lambda self: 0, lambda self, value: None))],
        "",
        seed=1_008,
    ),
    Fault("let go of a queue and not go back", [(Lane, "drop_queue", _drop_queue_and_go_on)], "neither"),
    Fault(
        "take up a subscription without going back",
        [(Lanes, "take_up", _take_up_only_here)],
        "neither",
        needs=frozenset({"subscriptions"}),
        seed=5_421,
    ),
    Fault(
        "take what nobody reads for himself as summed up", [(Gaps, "by_rows", _sum_up_in_any_case)], "neither", seed=28
    ),
    Fault(
        "leave a lane at the head when it is to go back", [(Lanes, "go_back", _go_back_when_behind)], "neither", seed=41
    ),
    Fault("go on after the server lost its memory", [(MemoryStore, "_connection", _connection_of_any_life)], ""),
    Fault(
        "forget the epoch",
        [
            (MemoryStore, "record", _record_under_any_epoch),
            (MemoryStore, "config_changes", _config_under_any_epoch),
            (MemoryStore, "hold_ownership", _own_in_any_case),
        ],
        "",
        seed=16,
    ),
    Fault("send without a lease", [(config, "LEASE_S", 60.0)], "", needs=frozenset({"slow", "pause"}), seed=923),
    Fault("send to a paused endpoint", [(Lane, "configure", _configure_without_holding)], "for a second"),
    Fault("send to a deleted endpoint", [(Lanes, "remove", _remove_and_go_on)], "for a second", seed=19),
    Fault(
        "send to the new path on the old host",
        [(sender, "_has_moved", lambda lane, origin: False)],
        "instead of",
        seed=241,
    ),
    Fault(
        "send what a subscription that has ended let in",
        [(lanes, "_ended", lambda before, after: False)],
        "no subscription",
        needs=frozenset({"subscriptions"}),
        seed=4_773,
    ),
    Fault(
        "sign with a secret that has expired",
        [(config.ConfigWatcher, "_note_reload", lambda self, endpoint: None)],
        "by an old configuration",
        needs=frozenset({"expiring secrets"}),
        seed=1_056,
    ),
    Fault(
        "send what was erased",
        [(config.ConfigWatcher, "_forget", lambda self, endpoint_id: None)],
        "it was erased",
        needs=frozenset({"erasure", "slow answers"}),
        seed=8_798,
    ),
    Fault(
        "filter at the head only",
        [(Lane, "is_for", _is_for_by_type)],
        "no subscription",
        needs=frozenset({"filters"}),
    ),
    Fault(
        "replay what the filters leave out",
        [(Run, "is_for", lambda self, event, payloads: True)],
        "its run leaves it out",
        needs=frozenset({"filters", "runs"}),
    ),
    Fault("count a token twice", [(TokenBucket, "_accrue", _accrue_twice)], "above"),
    Fault("probe without counting", [(CircuitBreaker, "started", _started_without_probe)], "half-open"),
    Fault("open shares", [(Shares, "full", lambda self, lane, now: None)], "in a share"),
    Fault("open an origin's shares only", [(Shares, "full", _full_of_all_slots)], "in a share"),
    Fault("ignore a lane's limit", [(Lane, "limit", _limit_without_limit)], "in flight"),
    Fault("take a 404 for a success", [(Sender, "answered", _answered_well)], "its receiver has not said so"),
    Fault("keep events in memory", [(Memory, "let_go", _let_go_of_some)], "events"),
    Fault("call nobody when a share has room", [(Sender, "_call_next", _call_nobody)], "not settled"),
    Fault(
        "forget who waits for more than a token",
        [(Sender, "_on_timer", _on_timer_as_it_was)],
        "not settled",
        seed=2_928,
    ),
    Fault("send though its key is held", [(Keys, "holds", lambda self, key: False)], "by key", frozenset({"ordering"})),
    Fault(
        "forget over a start which keys are held",
        [(Keys, "know", _know_nothing_of_retries)],
        "by key",
        frozenset({"ordering", "failing", "kill"}),
    ),
    Fault(
        "forget what was held back",
        [(Keys, "take", _take_key_without_next)],
        "neither",
        frozenset({"ordering"}),
    ),
    Fault(
        "keep what was held back out of the lane's row",
        [(Keys, "trim", lambda self: self.held_back.clip(0))],
        "neither",
        frozenset({"ordering"}),
    ),
    Fault(
        "send what has expired", [(Sender, "_is_stale", lambda self, event: False)], "it expired", frozenset({"expiry"})
    ),
    Fault("sleep without a look each second", [(Reader, "_slept_long", lambda self: False)], "not settled"),
]


def seeds_for(fault: Fault) -> Iterator[int]:
    """Return seeds in which the fault can show, those first that are known to show it."""
    return (seed for seed in itertools.count(fault.seed) if fault.needs <= draw(seed).kinds)
