"""The reader's decisions about one event, without a store."""

from typing import Any

import pytest

from dispatcher.domain.endpoint import Endpoint, Subscription
from dispatcher.domain.ordering import Ordering
from dispatcher.domain.ranges import IdRanges
from dispatcher.engine.catchup import PAGE_ROWS, ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.engine.reader import CROWDS_S, FIRST_ROWS, POLL_S, POLLS_AT_ONCE, POLLS_BEFORE_SLEEP, Reader
from dispatcher.errors import DatabaseRefusedError
from dispatcher.ports import HeadPage, Holders, Page, Started, Summary
from tests.engine.build import LIMITS, make_endpoint, make_event


@pytest.mark.parametrize("ordering", [None, Ordering()])
def test_what_came_late_waits_for_an_earlier_hole_of_a_lane_that_orders_by_key(ordering):
    """After a start, an old gap may be looked at before the lane's holes are read: taken at once, it went before an earlier event of its key."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(ordering=ordering), 0.0, live=False, cursor=200)
    if lane.keys is not None:
        lane.keys.know([], [])
    lane.add_hole(67)
    offered = []
    reader = Reader(
        None, lanes, Clock(lambda: 1.0), Counters(), offered=offered.append, position=lambda: 200, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.head = 200
    reader._found(make_event(160, ordering_key="k"), (), 1.0)
    if ordering is None:
        assert (offered, [event.id for event in lane.queue], 160 in lane.holes) == ([lane], [160], False)
    else:
        assert (offered, list(lane.queue), list(lane.holes)) == ([], [], [(67, 67), (160, 160)])


@pytest.mark.parametrize("ordering", [None, Ordering()])
@pytest.mark.parametrize("young", [150, 170])
async def test_what_an_old_gap_brings_lets_the_young_ids_before_it_go_first(ordering, young):
    """Both may have come since the young ones were read, and the later one of a key went first."""

    class Log:
        async def holders(self) -> Holders:
            return Holders(frozenset(), frozenset())

        async def probe(self, ranges, rows, size) -> list[Page]:
            assert ranges == [(160, 160)]
            return [Page([make_event(160, ordering_key="k")], [()], full=False)]

        async def holes(self, account, ranges, rows, size, of) -> list[Page]:
            assert of == [1]
            assert ranges == [(150, 150), (160, 160)]
            return [Page([make_event(n, ordering_key="k")], [()], full=False) for n, _ in ranges]

    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(ordering=ordering), 0.0, live=True, cursor=0)
    if lane.keys is not None:
        lane.keys.know([], [])
    reader = Reader(
        Log(), lanes, Clock(lambda: 1.0), Counters(), offered=lambda lane: None, position=lambda: 200, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.head = 200
    reader.gaps.restore([(160, 160)])
    reader.gaps.young[young] = 1.0
    reader._rung = False
    assert await reader._read_gaps()
    if ordering is not None and young < 160:
        assert (lane.queued(), list(lane.holes), reader._rung) == (0, [(160, 160)], True)
        assert not await reader._read_other(), "the head has had no room yet"
        reader._apply_head(HeadPage([make_event(150, ordering_key="k")], None, False, 200, 0))
        assert list(lane.holes) == [(150, 150), (160, 160)]
        await reader._read_other()
        assert (lane.queued(), lane.queue[0].id) == (1, 150)
    else:
        assert (lane.queued(), list(lane.holes)) == (1, [])


def test_what_comes_late_goes_next_of_its_key_however_full_its_lane_is():
    """As a hole it waited for room, and what its key held back went before it."""
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(ordering=Ordering()), 0.0, live=True, cursor=0)
    lane.keys.know([], [])
    reader = Reader(
        None, lanes, Clock(lambda: 1.0), Counters(), offered=lambda lane: None, position=lambda: 0, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    for n in range(LIMITS.queue_max):
        lanes.take(lane, make_event(100 + n, ordering_key=f"k{n}"), 1.0)
    lanes.take(lane, make_event(150, ordering_key="k0"), 1.0)
    assert not lane.takes(1.0)
    reader._found(make_event(120, ordering_key="k0"), (), 1.0)
    assert (lane.live, list(lane.holes), list(lane.keys.held_back)) == (True, [], [(120, 120), (150, 150)])
    lane.add_hole(110)
    reader._found(make_event(160, ordering_key="k0"), (), 1.0)
    lane.keys.release("k0", 100)
    assert lane.keys.to_read(1) == [("k0", 110)], "the hole may be an earlier one of it"


class Load:
    """Ten ids of a transaction, all of which has come; nobody asks for its rows without a need."""

    def __init__(self, *groups: tuple[str, str, int], rows: Page | None = None) -> None:
        self.groups = [
            Summary(account, event_type, events, account == "urgent", 103, 107)
            for account, event_type, events in groups
        ]
        self.rows = rows
        self.asked: list[Any] = []

    async def holders(self) -> Holders:
        return Holders(frozenset(), frozenset())

    async def summary(self, ranges) -> list[Summary]:
        assert ranges == [(101, 110)]
        return self.groups

    async def probe(self, ranges, rows, size, of=None) -> list[Page]:
        self.asked.append(of)
        return [self.rows]


async def look_at(
    log: Load, monkeypatch: pytest.MonkeyPatch, *endpoints: Endpoint, cursor: int = 200
) -> tuple[Reader, list[Lane]]:
    monkeypatch.setattr("dispatcher.engine.gaps.LOOK_IDS_MAX", 5)
    monkeypatch.setattr("dispatcher.engine.reader.CROWD", 4)
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    added = [lanes.add(endpoint, 0.0, live=cursor == 200, cursor=cursor) for endpoint in endpoints]
    reader = Reader(
        log, lanes, Clock(lambda: 1.0), Counters(), offered=lambda lane: None, position=lambda: 200, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.head = 200
    reader.gaps.restore([(101, 110)])
    assert await reader._read_gaps()
    return reader, added


async def test_a_lane_that_has_a_crowd_of_a_large_transaction_reads_it_for_itself(monkeypatch):
    log = Load(("acc", "a.b", 3), ("acc", "c.d", 2), ("nobody", "a.b", 5))
    reader, [lane] = await look_at(log, monkeypatch, make_endpoint(1, "*", "a.*"))
    assert (lane.live, lane.cursor, lane.backlog, lane in reader._lanes.unsettled) == (False, 102, 5, True)
    assert (list(reader.gaps), log.asked, reader.catch_up.is_wanted) == ([], [], True)


@pytest.mark.parametrize("ends", [102, 103])
async def test_a_subscription_that_ended_before_it_wants_nothing_of_it(ends, monkeypatch):
    log = Load(("acc", "a.b", 5))
    _, [lane] = await look_at(log, monkeypatch, make_endpoint(1, Subscription(100, "*", 0, until_id=ends)))
    assert lane.live is (ends == 102)


async def test_a_lane_that_is_behind_a_large_transaction_reads_it_anyway(monkeypatch):
    log = Load(("urgent", "a.b", 2))
    reader, [lane] = await look_at(log, monkeypatch, make_endpoint(account_id="urgent"), cursor=50)
    assert (lane.cursor, lane.backlog) == (50, 2)
    assert (list(reader.gaps), log.asked) == ([], [])
    lane.urgent_after = None
    lane.passed_by_many(3, 100, urgent=True)
    assert (lane.backlog, lane.urgent_after) == (5, 100)


async def test_who_has_little_of_a_large_transaction_gets_it_by_its_rows(monkeypatch):
    """Gone back for two events, ten thousand lanes would be behind, and their fresh events with them."""
    log = Load(
        ("acc", "a.b", 2), ("acc", "c.d", 8), rows=Page([make_event(103), make_event(104)], [(), ()], full=False)
    )
    reader, [few, many] = await look_at(log, monkeypatch, make_endpoint(1, "a.b"), make_endpoint(2))
    assert (few.live, [event.id for event in few.queue], few.late) == (True, [103, 104], {103, 104})
    assert (many.live, many.cursor, many.queued(), many.backlog) == (False, 102, 0, 10)
    assert (list(reader.gaps), log.asked) == ([], [(["acc"], ["a.b"])])


@pytest.mark.parametrize("bound", ["rows", "bytes", "offers"])
async def test_what_too_many_have_little_of_is_read_by_its_rows(bound, monkeypatch):
    monkeypatch.setattr("dispatcher.engine.reader.PAGE_ROWS", 2 if bound == "rows" else 200)
    monkeypatch.setattr("dispatcher.engine.reader.HEAD_OFFERS", 2 if bound == "offers" else 200)
    log = Load(("acc", "a.b", 2), ("other", "a.b", 8), rows=Page([make_event(101)], [()], full=True))
    reader, [few, many] = await look_at(log, monkeypatch, make_endpoint(1), make_endpoint(2, account_id="other"))
    assert (few.queued(), many.live) == (0, True), "nothing has been done yet"
    assert len(log.asked) == (bound == "bytes")
    for found, full in (([101], True), ([102], False), ([109], False)):
        log.rows = Page([make_event(n) for n in found], [()] * len(found), full=full)
        assert await reader._read_gaps()
    assert [event.id for event in few.queue] == [101, 102, 109]
    assert (log.asked[-3:], list(reader.gaps)) == ([None] * 3, [])


async def test_with_the_doorbell_off_it_polls_as_it_does_with_it_on_before_it_would_sleep(monkeypatch):
    """What comes one after another is read at once, not each after the time that an idle dispatcher waits."""
    reader = Reader(
        None, Lanes(LIMITS, Memory(100, 10_000)), Clock(lambda: 1.0), Counters(), offered=None, position=lambda: 0, configured=None,
        doorbell=False, poll_s=0.25, gate=ReadGate(),
    )  # fmt: skip
    reads_before_wait: list[int] = []
    waits: list[float] = []

    class EnoughError(Exception):
        pass

    async def head() -> bool:
        reads_before_wait.append(len(waits))
        return len(reads_before_wait) == 1

    async def other() -> bool:
        return False

    async def wait(longest_s: float) -> None:
        waits.append(longest_s)
        if len(waits) == POLLS_BEFORE_SLEEP:
            raise EnoughError

    monkeypatch.setattr(reader, "_read_head_to_end", head)
    monkeypatch.setattr(reader, "_read_other", other)
    monkeypatch.setattr(reader, "_wait", wait)
    with pytest.raises(EnoughError):
        await reader.run()
    assert reads_before_wait.count(0) == 1 + POLLS_AT_ONCE + 1
    polled = POLLS_BEFORE_SLEEP - POLLS_AT_ONCE - 1
    assert waits == [POLL_S] * polled + [0.25] * (POLLS_BEFORE_SLEEP - polled)


async def test_at_the_memory_bound_crowds_are_looked_for_now_and_then_and_fall_behind(monkeypatch):
    """At each wait, that took a third of the process's time; never, a single lane would keep the head from all others."""
    now = [1.0]
    lanes = Lanes(LIMITS, Memory(1_000, 1 << 20))
    crowd, *others = (lanes.add(make_endpoint(n), 1.0, live=True, cursor=0) for n in range(1, 11))
    reader = Reader(
        None, lanes, Clock(lambda: now[0]), Counters(), offered=None, position=lambda: 0, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    looks: list[float] = []
    crowds = lanes.crowds
    monkeypatch.setattr(lanes, "crowds", lambda: looks.append(now[0]) or crowds())

    async def wait(longest_s: float) -> None:
        now[0] += longest_s

    monkeypatch.setattr(reader, "_wait", wait)
    for n in range(1_000):
        lanes.take([crowd, *others][n % 10], make_event(n), now[0])
    while now[0] < 1.3:
        assert await reader._head_room() == 0, "the queues are even"
    assert 3 <= len(looks) <= 0.3 / CROWDS_S + 1
    for lane in others:
        lanes.fall_behind(lane, reader.head, drop=True)
        lanes.take(lane, make_event(1_000 + lane.id), now[0])
    for n in range(2_000, 2_891):
        lanes.take(crowd, make_event(n), now[0])
    now[0] += CROWDS_S
    assert await reader._head_room() > 0
    assert (crowd.live, crowd.queued(), lanes.memory.events) == (False, 0, len(others))


def test_ids_that_go_back_end_it():
    """A backup that was restored under it: what is new was never read, and nobody was told."""
    reader = Reader(
        None, Lanes(LIMITS, Memory(100, 10_000)), Clock(lambda: 1.0), Counters(), offered=None, position=lambda: 0, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader._apply_head(HeadPage([], None, False, 200, 0))
    reader._apply_head(HeadPage([], None, False, 200, 0))
    with pytest.raises(DatabaseRefusedError, match="from 200 to 30"):
        reader._apply_head(HeadPage([], None, False, 30, 0))


async def test_what_came_for_many_lanes_is_given_to_them_a_part_a_turn(monkeypatch):
    """Two hundred events for ten thousand endpoints each held the loop for seconds."""
    monkeypatch.setattr("dispatcher.engine.reader.HEAD_OFFERS", 5)
    came, asked = [101, 102, 103, 104, 108], list[int]()

    class Log:
        async def holders(self) -> Holders:
            return Holders(frozenset(), frozenset())

        async def probe(self, ranges, rows, size) -> list[Page]:
            asked.append(rows)
            return [
                Page(events := [make_event(n) for n in came if low <= n <= high], [()] * len(events), full=False)
                for low, high in ranges
            ]

    lanes = Lanes(LIMITS, Memory(100, 10_000))
    added = [lanes.add(make_endpoint(n), 0.0, live=True, cursor=200) for n in range(1, 4)]
    reader = Reader(
        Log(), lanes, Clock(lambda: 1.0), Counters(), offered=lambda lane: None, position=lambda: 200, configured=None,
        doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.head = 200
    reader.gaps.restore([(101, 105), (107, 110)])
    for found, left, closed in (
        ([101, 102], [(103, 105), (107, 110)], 0), ([108, 103], [(104, 105)], 3), ([104], [], 4)
    ):  # fmt: skip
        before = [len(lane.queue) for lane in added]
        assert await reader._read_gaps()
        assert [[event.id for event in lane.queue][n:] for lane, n in zip(added, before, strict=True)] == [found] * 3
        assert (list(reader.gaps.ranges()), reader.gaps.closed_ids) == (left, closed)
    assert asked == [PAGE_ROWS, 2, 2], "no more is read than can be given to them"


async def test_after_a_start_the_first_pages_are_short():
    """Each event comes with the attempts of all endpoints: a thousand rows of ten thousand each were ten million."""
    asked = []

    class Log:
        async def head(self, after, limit, size, young, *, attempted) -> HeadPage:
            asked.append((limit, attempted))
            ids = range(after + 1, min(after + limit, 100) + 1)
            return HeadPage([make_event(n) for n in ids], [()] * len(ids), len(ids) == limit, 100, 0)

    async def configured(seq: int) -> None:
        pass

    reader = Reader(
        Log(), Lanes(LIMITS, Memory(2_000, 100_000)), Clock(lambda: 1.0), Counters(), offered=lambda lane: None, position=lambda: 0,
        configured=configured, doorbell=False, poll_s=1.0, gate=ReadGate(),
    )  # fmt: skip
    reader.begin(Started(1, 0, IdRanges(), [], [], 0, 100, {}, 0))
    assert await reader._read_head_to_end()
    assert asked == [(FIRST_ROWS * n, True) for n in (1, 2, 4)]
