"""Shares: bounded parts of the slots, and of an origin's sockets, for lanes that may keep them long."""

import pytest

from dispatcher.domain.url import Origin, Target
from dispatcher.engine.lane import Lane
from dispatcher.engine.shares import Shares
from tests.engine.build import make_lane

SLOTS, SOCKETS = 40, 8


def lane_at(host: str, kind: str = "untried", endpoint_id: int = 1) -> Lane:
    lane = make_lane(
        endpoint_id=endpoint_id, target=Target(f"http://{host}/", Origin("http", host, 80), "/", host, None)
    )
    lane.untried = kind == "untried"
    if kind == "slow":
        lane.latency_s = 2.0
    if kind == "failing":
        for _ in range(3):
            lane.breaker.failed(0.0, probe=False)
    return lane


def test_an_ordinary_lane_counts_into_none():
    shares, lane = Shares(1, 1), lane_at("a.test", "ordinary")
    assert shares.take(lane, 0.0) == ()
    assert shares.take(lane, 0.0) == ()
    assert shares.full(lane, 0.0) is None
    assert not shares._origins


def test_a_single_failure_makes_no_lane_failing():
    shares, lane = Shares(1, 1), lane_at("a.test", "ordinary")
    lane.last_success = 0.0
    lane.breaker.failed(0.0, probe=False)
    assert not lane.is_ordinary
    assert shares.take(lane, 1.0) == ()
    assert not shares._origins


def test_nobody_is_called_for_room_that_is_taken_again():
    """It would find the share full, and have lost its place in the line: of an even number every other one never came to its turn."""
    shares = Shares(4, 100)
    lanes = [lane_at("a.test", "untried") for _ in range(5)]
    held = shares.take(lanes[0], 0.0)
    for lane in lanes[1:]:
        full = shares.full(lane, 0.0)
        assert full is shares.untried
        shares.wait(lane, full)
    served = []
    for _ in range(8):
        shares.give_back(held)
        [lane] = shares.call()
        served.append(lanes.index(lane))
        held = shares.take(lane, 0.0)
        shares.wait(lane, shares.untried)
        assert shares.call() == []
    assert served == [1, 2, 3, 4] * 2


@pytest.mark.parametrize(("kind", "of_slots", "of_sockets"), [("untried", 10, 2), ("failing", 10, 2), ("slow", 20, 4)])
def test_an_origin_gives_a_part_of_its_sockets_and_all_together_a_part_of_the_slots(kind, of_slots, of_sockets):
    shares = Shares(SLOTS, SOCKETS)
    taken = []
    for n in range(of_slots // of_sockets):
        lane = lane_at(f"{n}.test", kind)
        for _ in range(of_sockets):
            assert shares.full(lane, 0.0) is None
            taken.append(shares.take(lane, 0.0))
        full = shares.full(lane, 0.0)
        assert full is not None
    assert shares.full(lane_at("another.test", kind), 0.0) in shares._all
    other_kind = "slow" if kind != "slow" else "failing"
    assert shares.full(lane_at("0.test", other_kind), 0.0) is None
    assert shares.full(lane_at("0.test", "ordinary"), 0.0) is None
    for each in taken:
        shares.give_back(each)
    assert [share.held for share in shares._all] == [0, 0, 0, 0]
    assert not shares._origins, "an origin where nothing is in flight is forgotten"


def test_a_quarter_is_always_for_who_is_of_no_kind():
    shares = Shares(8, 8)
    for n, kind in enumerate(["untried", "failing", "slow", "slow", "slow", "slow", "failing", "untried"]):
        lane = lane_at("a.test", kind)
        assert (shares.full(lane, 0.0) is None) == (n < 6)
        if n < 6:
            shares.take(lane, 0.0)
    assert shares.full(lane, 0.0) is shares.together
    assert shares.full(lane_at("a.test", "ordinary"), 0.0) is None


def test_a_lane_of_two_kinds_counts_into_both():
    shares, lane = Shares(SLOTS, SOCKETS), lane_at("a.test", "slow")
    lane.untried = True
    taken = shares.take(lane, 0.0)
    assert len(taken) == 6
    shares.give_back(taken)
    assert not shares._origins


def test_who_waits_for_an_origin_is_called_when_a_socket_of_it_is_given_back():
    shares = Shares(SLOTS, SOCKETS)
    here, there = lane_at("a.test"), lane_at("b.test")
    mine, others = [shares.take(here, 0.0) for _ in range(2)], [shares.take(there, 0.0) for _ in range(2)]
    waiting = [lane_at("a.test", endpoint_id=n) for n in (2, 3)]
    for lane in waiting:
        share = shares.full(lane, 0.0)
        assert share is not None
        assert share.origin == Origin("http", "a.test", 80)
        shares.wait(lane, share)
    assert shares.call() == []
    shares.give_back(others[0])
    assert shares.call() == []
    shares.give_back(mine[0])
    assert shares.call() == [waiting[0]]
    assert shares.call() == [waiting[1]], "the first may have had no use for it"
    assert shares.call() == []
    shares.give_back(mine[1])
    shares.give_back(others[1])
    assert not shares._origins


def test_a_lane_that_has_gone_is_not_called_and_keeps_nobody_waiting():
    shares = Shares(SLOTS, SOCKETS)
    taken = [shares.take(lane_at("a.test"), 0.0) for _ in range(2)]
    gone, waiting = lane_at("a.test", endpoint_id=2), lane_at("a.test", endpoint_id=3)
    for lane in (gone, waiting):
        shares.wait(lane, shares.full(lane, 0.0))
    gone.gone = True
    shares.give_back(taken[0])
    assert shares.call() == [waiting]
    shares.give_back(taken[1])
    assert not shares._origins


def test_when_only_those_who_have_gone_wait_the_origin_is_forgotten():
    shares = Shares(SLOTS, 4)
    taken = shares.take(lane_at("a.test"), 0.0)
    gone = lane_at("a.test", endpoint_id=2)
    shares.wait(gone, shares.full(gone, 0.0))
    gone.gone = True
    shares.give_back(taken)
    assert shares.call() == []
    assert not shares._origins


def test_more_slots_call_who_waits():
    shares = Shares(4, 100)
    shares.take(lane_at("a.test"), 0.0)
    waiting = lane_at("b.test", endpoint_id=2)
    shares.wait(waiting, shares.full(waiting, 0.0))
    shares.set_slots(8)
    assert shares.call() == [waiting]


@pytest.mark.parametrize("becomes", ["another origin's", "ordinary"])
def test_who_waits_in_vain_is_not_called(becomes):
    shares = Shares(SLOTS, SOCKETS)
    taken = [shares.take(lane_at("a.test"), 0.0) for _ in range(2)]
    moved, waiting = lane_at("a.test", endpoint_id=2), lane_at("a.test", endpoint_id=3)
    for lane in (moved, waiting):
        shares.wait(lane, shares.full(lane, 0.0))
    assert not shares.waits_in_vain(moved, 0.0)
    if becomes == "ordinary":
        moved.untried = False
    else:
        moved.configure(lane_at("b.test", endpoint_id=2).endpoint, 0.0)
    assert shares.waits_in_vain(moved, 0.0)
    moved.waits_for = None  # it goes into another line
    shares.give_back(taken[0])
    assert shares.call() == [waiting]
    shares.give_back(taken[1])
    assert shares.call() == []
    assert not shares._origins
