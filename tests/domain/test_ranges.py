"""IdRanges against Python's own sets: whatever is done to both, they hold the same ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.ranges import IdRanges, runs

no_deadline = settings(deadline=None)  # a busy machine is no defect

ID_MAX = 40
spans = st.tuples(st.integers(1, ID_MAX), st.integers(0, 8)).map(lambda span: (span[0], span[0] + span[1]))
sets = st.lists(spans, max_size=12).map(IdRanges)


def ids(ranges: IdRanges) -> set[int]:
    return {event_id for low, high in ranges for event_id in range(low, high + 1)}


def is_canonical(ranges: IdRanges) -> bool:
    """Ascending, disjoint, and no two ranges that could be one."""
    bounds = [bound for span in ranges for bound in span]
    return bounds == sorted(bounds) and all(
        low > high + 1 for high, low in zip(ranges.highs, ranges.lows[1:], strict=False)
    )


# add and remove


@pytest.mark.parametrize(
    ("before", "add", "after"),
    [
        ([], (5, 5), [(5, 5)]),
        ([(1, 3)], (5, 6), [(1, 3), (5, 6)]),
        ([(5, 6)], (1, 3), [(1, 3), (5, 6)]),
        ([(1, 3)], (4, 6), [(1, 6)]),  # neighbours join
        ([(4, 6)], (1, 3), [(1, 6)]),
        ([(1, 3), (5, 6)], (4, 4), [(1, 6)]),
        ([(1, 9)], (4, 5), [(1, 9)]),
        ([(4, 5)], (1, 9), [(1, 9)]),
        ([(1, 2), (4, 5), (8, 9)], (3, 7), [(1, 9)]),
        ([(1, 2), (5, 6), (9, 10)], (4, 6), [(1, 2), (4, 6), (9, 10)]),
    ],
)
def test_adding(before, add, after):
    ranges = IdRanges(before)
    ranges.add(*add)
    assert list(ranges) == after


@pytest.mark.parametrize(
    ("before", "remove", "after"),
    [
        ([], (1, 9), []),
        ([(4, 6)], (1, 3), [(4, 6)]),
        ([(4, 6)], (7, 9), [(4, 6)]),
        ([(4, 6)], (4, 6), []),
        ([(4, 6)], (1, 4), [(5, 6)]),
        ([(4, 6)], (6, 9), [(4, 5)]),
        ([(1, 9)], (4, 6), [(1, 3), (7, 9)]),  # split
        ([(1, 3), (5, 6), (8, 10)], (3, 8), [(1, 2), (9, 10)]),
        ([(1, 3), (5, 6)], (4, 4), [(1, 3), (5, 6)]),
    ],
)
def test_removing(before, remove, after):
    ranges = IdRanges(before)
    ranges.remove(*remove)
    assert list(ranges) == after


@pytest.mark.parametrize("method", ["add", "remove"])
def test_an_upside_down_range_is_a_defect(method):
    with pytest.raises(AssertionError):
        getattr(IdRanges([(1, 9)]), method)(5, 4)


@no_deadline
@given(st.lists(st.tuples(st.booleans(), spans), max_size=40))
def test_it_is_the_same_as_a_set(steps):
    ranges, model = IdRanges(), set()
    for adds, (low, high) in steps:
        if adds:
            ranges.add(low, high)
            model |= set(range(low, high + 1))
        else:
            ranges.remove(low, high)
            model -= set(range(low, high + 1))
        assert ids(ranges) == model
        assert is_canonical(ranges)
        assert ranges.count() == len(model)
        assert [event_id in ranges for event_id in range(ID_MAX + 10)] == [
            event_id in model for event_id in range(ID_MAX + 10)
        ]


# questions


@no_deadline
@given(sets, sets, spans)
def test_what_a_set_covers(ranges, other, span):
    assert ranges.covers(*span) == (set(range(span[0], span[1] + 1)) <= ids(ranges))
    assert ranges.covers_all(other) == (ids(other) <= ids(ranges))
    assert (ranges == other) == (ids(ranges) == ids(other))


@no_deadline
@given(sets, sets)
def test_a_union_has_the_ids_of_both(ranges, other):
    union = ranges.copy()
    union.update(other)
    assert ids(union) == ids(ranges) | ids(other)


@no_deadline
@given(sets, st.integers(0, ID_MAX + 10))
def test_clipping_leaves_what_is_not_above(ranges, high):
    clipped = ranges.copy()
    clipped.clip(high)
    assert ids(clipped) == {event_id for event_id in ids(ranges) if event_id <= high}


@no_deadline
@given(sets, st.integers(0, 15))
def test_a_page_is_the_lowest_ranges(ranges, count):
    assert ranges.page(count) == list(ranges)[:count]
    assert len(ranges) == len(list(ranges))


def test_a_copy_is_its_own():
    ranges = IdRanges([(1, 3)])
    twin = ranges.copy()
    twin.add(9, 9)
    ranges.remove(1, 1)
    assert (list(ranges), list(twin)) == ([(2, 3)], [(1, 3), (9, 9)])


def test_it_reads_well_in_a_failure():
    assert repr(IdRanges([(1, 3), (7, 7)])) == "IdRanges(1–3, 7)"
    assert IdRanges() != ()


# the bound


def test_shrinking_joins_the_closest_neighbours():
    ranges = IdRanges([(1, 1), (4, 4), (6, 6), (20, 20), (23, 23)])
    ranges.shrink(3)
    assert list(ranges) == [(1, 1), (4, 6), (20, 23)] or list(ranges) == [(1, 6), (20, 20), (23, 23)]
    ranges.shrink(2)
    assert list(ranges) == [(1, 6), (20, 23)]
    ranges.shrink(1)
    assert list(ranges) == [(1, 23)]


@no_deadline
@given(sets, st.integers(1, 12))
def test_shrinking_keeps_every_id_and_the_bound(ranges, ranges_max):
    before, count = ids(ranges), len(ranges)
    outer = (ranges.lows[:1], ranges.highs[-1:])
    ranges.shrink(ranges_max)
    assert len(ranges) == min(count, ranges_max)
    assert before <= ids(ranges)
    assert (ranges.lows[:1], ranges.highs[-1:]) == outer  # nothing is added below or above
    assert is_canonical(ranges)
    if count <= ranges_max:
        assert ids(ranges) == before


@no_deadline
@given(st.sets(st.integers(1, ID_MAX)))
def test_runs_are_the_fewest_ranges_of_the_ids(numbers):
    found = list(runs(sorted(numbers)))
    assert IdRanges(found) == IdRanges((event_id, event_id) for event_id in numbers)
    assert len(found) == len(IdRanges(found))
