"""Ordering by key: what holds a key, what is passed over meanwhile, and what is read when the key is free."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.ordering import Ordering, parse_ordering
from dispatcher.engine import keys as keys_module
from dispatcher.engine.keys import NEVER, Keys
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, Memory
from dispatcher.errors import InputError
from tests.engine.build import LIMITS, make_endpoint, make_event


def event(event_id: int, key: str | None = "k"):
    return make_event(event_id, ordering_key=key)


def known() -> Keys:
    keys = Keys()
    keys.know([], [])
    return keys


def make_ordered(*, live: bool = True, cursor: int = 0, **endpoint) -> tuple[Lanes, Lane]:
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(ordering=Ordering(), **endpoint), 0.0, live=live, cursor=cursor)
    lane.keys.know([], [])
    return lanes, lane


@pytest.mark.parametrize(
    ("text", "ordering"),
    [("off", None), ("block", Ordering()), ("give_up_after 1", Ordering(1)), ("give_up_after 99", Ordering(99))],
)
def test_an_ordering_is_said_in_words(text, ordering):
    assert parse_ordering(text) == ordering


@pytest.mark.parametrize("text", ["", "on", "BLOCK", "give_up_after", "give_up_after 0", "give_up_after 100", "block "])
def test_other_words_are_refused(text):
    with pytest.raises(InputError, match="give_up_after N"):
        parse_ordering(text)


def test_a_key_is_held_until_its_event_is_settled():
    keys = known()
    keys.hold(event(1))
    assert keys.holds("k")
    assert not keys.holds("other")
    keys.release("k", 7)
    assert keys.holds("k"), "that one doesn't hold it"
    keys.release("k", 1)
    assert (len(keys), keys.to_read(9)) == (0, []), "nothing was held back: there is nothing to read"


def test_what_was_held_back_is_read_from_the_lowest_on():
    keys = known()
    keys.hold(event(1))
    for event_id in (5, 4, 9):
        keys.hold_back(event(event_id))
    assert list(keys.held_back) == [(4, 5), (9, 9)]
    keys.release("k", 1)
    assert keys.to_read(9) == [("k", 4)]
    assert keys.holds("k"), "what passes now must not overtake 4"
    keys.take(event(4), next_id=5)
    assert (keys.to_read(9), list(keys.held_back)) == ([], [(5, 5), (9, 9)])
    keys.release("k", 4)
    keys.take(event(5), next_id=9)
    keys.release("k", 5)
    keys.pass_over("k", NEVER)  # 9 was not for this endpoint after all
    keys.trim()
    assert (len(keys), len(keys.held_back)) == (0, 0)


def test_an_event_that_is_let_go_of_is_next():
    keys = known()
    keys.hold(event(3))
    keys.hold_back(event(8))
    keys.give_back(event(3))
    assert (keys.to_read(9), list(keys.held_back)) == ([("k", 3)], [(3, 3), (8, 8)])


def test_free_keys_take_turns():
    keys = known()
    for n, key in enumerate("abc", start=1):
        keys.hold(event(n, key))
        keys.hold_back(event(10 + n, key))
        keys.release(key, n)
    assert keys.to_read(2) == [("a", 11), ("b", 12)]
    keys.pass_over("a", 20)
    assert keys.to_read(2) == [("b", 12), ("c", 13)]


def test_the_retry_table_says_what_holds_keys_but_for_what_is_in_hand():
    keys = Keys()
    assert not keys.are_known
    for n, key in enumerate(("hand", "gone", "ended"), start=1):
        keys.hold(event(n, key))
    keys.hold_back(event(12, "gone"))
    keys.know([("retry", 7), ("hand", 4)], in_hand=[1])
    assert keys.are_known
    assert keys.to_read(9) == [("gone", 12)], "retention took what held it"
    assert not keys.holds("ended")
    keys.release("hand", 1)
    assert keys.holds("hand"), "an earlier retry holds it as well"
    keys.release("retry", 7)
    assert not keys.holds("retry")


def test_ranges_that_were_held_back_are_bounded(monkeypatch):
    monkeypatch.setattr(keys_module, "HELD_BACK_MAX", 3)
    keys = known()
    keys.hold(event(1))
    held_back = list(range(2, 40, 2))
    for event_id in held_back:
        keys.hold_back(event(event_id))
        assert len(keys.held_back) <= 3
    assert all(event_id in keys.held_back for event_id in held_back), "they may say too much, never too little"
    keys.release("k", 1)
    for event_id in held_back:
        keys.take(event(event_id), next_id=event_id + 2)
        assert len(keys.held_back) <= 3
        keys.release("k", event_id)


def test_a_lane_passes_over_an_event_of_a_held_key_and_goes_on():
    lanes, lane = make_ordered()
    assert lanes.take(lane, event(1, "a"), 0.0)
    assert not lanes.take(lane, event(2, "a"), 0.0)
    assert lanes.take(lane, event(3, "b"), 0.0)
    assert lanes.take(lane, event(4, None), 0.0)
    assert lanes.take(lane, event(5, None), 0.0), "events without a key are in no order"
    assert [e.id for e in lane.queue] == [1, 3, 4, 5]
    assert (lanes.memory.events, list(lane.open_late())) == (4, [(2, 2)])
    for event_id in (1, 3, 4, 5):
        lane.settle(event_id)
    assert lane.mark(5) == 5, "what is held back doesn't hold the mark"
    assert not lane.is_settled, "and the lane's row must say so"


def test_without_ordering_a_key_means_nothing():
    lanes = Lanes(LIMITS, Memory(100, 10_000))
    lane = lanes.add(make_endpoint(), 0.0, live=True, cursor=0)
    assert all(lanes.take(lane, event(n), 0.0) for n in (1, 2, 3))


def test_a_lane_takes_nothing_before_it_knows_its_keys_nor_when_they_are_too_many(monkeypatch):
    monkeypatch.setattr(keys_module, "KEYS_MAX", 2)
    _, lane = make_ordered(live=False)
    lane.keys.are_known = False
    assert (lane.takes(0.0), lane.room(0.0), lane.urgent_room(0.0), lane.keys_room(0.0)) == (False, 0, 0, 0)
    lane.keys.know([("a", 1), ("b", 2)], [])
    assert (lane.takes(0.0), lane.room(0.0)) == (False, 0)
    lane.keys.release("a", 1)
    assert (lane.takes(0.0), lane.room(0.0)) == (True, LIMITS.queue_max)


def test_a_queue_that_is_let_go_of_keeps_the_order():
    lanes, lane = make_ordered()
    for n, key in ((5, "a"), (6, "a"), (7, None), (8, "b")):
        lanes.take(lane, event(n, key), 0.0)
    lanes.fall_behind(lane, 9, drop=True)
    assert (lane.cursor, lanes.memory.events) == (6, 0)
    assert lane.keys.to_read(9) == [("a", 5), ("b", 8)]
    assert not lanes.take(lane, event(8, "b"), 1.0), "the cursor meets it, and its key is not read yet"


def test_ordering_is_switched_off_and_on():
    lanes, lane = make_ordered()
    for n in (5, 6):
        lanes.take(lane, event(n, "a"), 0.0)
    lanes.configure(make_endpoint(), 1.0, head=9)
    assert (lane.keys, lane.live, list(lane.holes)) == (None, False, [(5, 6)])
    lanes.configure(make_endpoint(ordering=Ordering()), 1.0, head=9)
    assert lane.keys is not None
    assert not lane.keys.are_known
    lanes.configure(make_endpoint(ordering=Ordering(3), state=EndpointState.PAUSED), 1.0, head=9)
    assert lane.key_policy.schedule_s == LIMITS.retry.schedule_s, "the schedule is shorter than that"
    lanes.configure(make_endpoint(ordering=Ordering(2)), 1.0, head=9)
    assert lane.key_policy.schedule_s == LIMITS.retry.schedule_s[:1]
    assert lane.retry_policy.schedule_s == LIMITS.retry.schedule_s


steps = st.lists(
    st.tuples(st.sampled_from(("meet", "settle", "drop", "read")), st.sampled_from("ab"), st.integers(0, 3)),
    max_size=60,
)


@settings(deadline=None)
@given(steps)
def test_no_event_overtakes_another_of_its_key(taken_steps):
    """A log that grows, a lane that meets it, and settles, lets go and reads in any order: of each key, ids are taken in order."""
    keys, log, in_hand, settled = known(), [], {}, []
    for what, key, _ in taken_steps:
        if what == "meet":
            log.append((len(log) + 1, key))
            met = event(*log[-1])
            if keys.holds(key):
                keys.hold_back(met)
            else:
                keys.hold(met)
                in_hand[key] = met
        elif what == "settle" and key in in_hand:
            settled.append((in_hand[key].id, key))
            keys.release(key, in_hand.pop(key).id)
        elif what == "drop" and key in in_hand:
            keys.give_back(in_hand.pop(key))
        elif what == "read":
            for wanted, low in keys.to_read(1):
                rest = [n for n, other in log if other == wanted and n >= low and (n, wanted) not in settled]
                if rest:
                    in_hand[wanted] = event(rest[0], wanted)
                    keys.take(in_hand[wanted], rest[1] if len(rest) > 1 else NEVER)
                else:
                    keys.pass_over(wanted, NEVER)
    for key in "ab":
        of_key = [n for n, other in log if other == key]
        done = [n for n, other in settled if other == key]
        assert done == of_key[: len(done)]
        waiting = [n for n in of_key[len(done) :] if key not in in_hand or n != in_hand[key].id]
        assert all(n in keys.held_back for n in waiting)
