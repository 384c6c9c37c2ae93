"""What an account is told of an endpoint's trouble: the beginning and the end of it, or neither, whatever the database does meanwhile."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dispatcher.engine.clock import Clock
from dispatcher.engine.config import ConfigWatcher
from dispatcher.engine.counters import Counters
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.ports import ConfigChanges, StoreAwayError
from tests.engine.build import LIMITS, make_endpoint, make_event

SINCE = 1_700_000_000_000_000


class Told:
    """A store that keeps what is told; `away` makes the next calls fail, `meanwhile` happens during one."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.away = 0
        self.meanwhile: Any = None

    async def _tell(self, what: str) -> None:
        await asyncio.sleep(0)
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        if self.away:
            self.away -= 1
            raise StoreAwayError("away")
        self.told.append(what)

    async def tell_failing(self, endpoint_id: int, since_us: int) -> None:
        await self._tell("failing")

    async def tell_recovered(self, endpoint_id: int, since_us: int) -> None:
        await self._tell("recovered")

    async def note_failing(self, notes: dict[int, int | None]) -> None:
        pass


class Trouble:
    """One lane and its watcher."""

    def __init__(self) -> None:
        self.store = Told()
        self.lane = cast(Any, SimpleNamespace(id=7, failing_since_us=SINCE, failing_told=False))
        nothing = cast(Any, None)
        self.watcher = ConfigWatcher(
            cast(Any, self.store), nothing, nothing, Clock(), Counters(), seq=0, epoch=1, endpoints=(), head=lambda: 0,
            changed=nothing, after_read=nothing,
        )  # fmt: skip

    def fail(self) -> None:
        self.lane.failing_since_us = SINCE
        self.watcher.tell_failing(self.lane)

    def recover(self) -> None:
        self.lane.failing_since_us = None
        self.watcher.note_failing(self.lane, SINCE)

    async def write(self) -> None:
        await self.watcher._write_notes()


async def test_the_beginning_and_the_end_are_told() -> None:
    it = Trouble()
    it.fail()
    await it.write()
    it.recover()
    await it.write()
    await it.write()
    assert it.store.told == ["failing", "recovered"]


async def test_what_was_over_before_it_could_be_told_is_not() -> None:
    it = Trouble()
    it.fail()
    it.recover()
    await it.write()
    it.fail()
    await it.write()
    it.recover()
    it.fail()  # again, before anybody was told that it was over
    await it.write()
    assert it.store.told == ["failing"]


async def test_who_was_not_told_of_the_beginning_is_not_told_of_the_end() -> None:
    it = Trouble()
    it.recover()
    await it.write()
    assert it.store.told == []


async def test_a_recovery_while_the_beginning_is_being_told_is_told_too() -> None:
    it = Trouble()
    it.fail()
    it.store.meanwhile = it.recover
    await it.write()
    await it.write()
    assert it.store.told == ["failing", "recovered"]


async def test_while_the_database_is_away_it_waits() -> None:
    it = Trouble()
    it.fail()
    it.store.away = 2
    for _ in range(2):
        with pytest.raises(StoreAwayError):
            await it.write()
    await it.write()
    assert it.store.told == ["failing"]


async def test_a_recovery_while_that_fails_asks_for_the_end_only() -> None:
    """Nobody knows whether the beginning was told: the store tells the end if it was."""
    it = Trouble()
    it.fail()
    it.store.away = 1
    it.store.meanwhile = it.recover
    with pytest.raises(StoreAwayError):
        await it.write()
    await it.write()
    assert it.store.told == ["recovered"]


async def test_more_changes_than_a_look_brings_are_read_before_anything_may_start():
    """What is paused may be among the rest: only the last look extends the lease."""

    class Many:
        def __init__(self) -> None:
            self.asked: list[int] = []

        async def config_changes(self, after_seq: int, *args: Any) -> ConfigChanges:
            self.asked.append(after_seq)
            return ConfigChanges(after_seq + 500, 0, more=after_seq < 1_000)

    store, sender = Many(), SimpleNamespace(lease_until=-math.inf, pump_soon=lambda: None)
    watcher = ConfigWatcher(
        cast(Any, store), Lanes(LIMITS, Memory(100, 10_000)), cast(Any, sender), Clock(), Counters(), seq=0, epoch=1,
        endpoints=(), head=lambda: 9, changed=lambda lane: None, after_read=lambda action: None,
    )  # fmt: skip
    leases = []
    for _ in range(3):
        watcher._wake.clear()
        await watcher.look()
        leases.append((sender.lease_until > 0, watcher._wake.is_set()))
    assert store.asked == [0, 500, 1_000]
    assert leases == [(False, True), (False, True), (True, False)]


async def test_what_is_erased_is_let_go_of_also_while_a_read_hangs():
    """It was kept until the read had been applied, and sent meanwhile, for as long as a lost connection went unnoticed."""

    class Erased:
        async def config_changes(self, *args: Any) -> ConfigChanges:
            return ConfigChanges(2, 0, forget=[1])

    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    lanes.take(lane, make_event(5), 0.0)
    later: list[Any] = []
    watcher = ConfigWatcher(
        cast(Any, Erased()), lanes, cast(Any, SimpleNamespace(lease_until=math.inf)), Clock(), Counters(), seq=1, epoch=1,
        endpoints=(), head=lambda: 9, changed=lambda lane: None, after_read=later.append,
    )  # fmt: skip
    await watcher.look()
    assert (lane.queued(), lane.live, lane.cursor) == (0, False, 4)
    lanes.take(lane, make_event(4), 0.0)  # by that read
    for action in later:
        action()
    assert (lane.queued(), lane.cursor) == (0, 3)
