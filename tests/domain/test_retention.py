"""How wide a partition is, when the next one is needed, which may go."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.retention import (
    CUT_LEAVES,
    DAY_S,
    LEAD_IDS_MIN,
    LEAD_S,
    LEAF_IDS_MAX,
    LEAF_IDS_MIN,
    LEAVES_MAX,
    MARGIN_IDS,
    TOO_WIDE,
    Pace,
    Span,
    adoption_end,
    cuts,
    is_expired,
    is_settled,
    lead_ids,
    leaf_ids,
    next_leaf,
)

FRESH = [Span(0, 100_000), Span(100_000, 1_000_000), Span(1_000_000, 10_000_000), Span(10_000_000, 40_000_000)]
rates = st.floats(0, 3e9)
retentions = st.floats(0.01, 3_650)


def pace(ids_per_day: float = 0, peak_per_s: float = 0) -> Pace:
    made = Pace()
    made.ids_per_day, made.peak_per_s = ids_per_day, peak_per_s
    return made


@pytest.mark.parametrize(
    ("ids_per_day", "retention_days", "ids"),
    [
        (0, 7, LEAF_IDS_MIN),
        (1_000, 7, LEAF_IDS_MIN),
        (1_000_000, 7, 1_000_000),  # a day's
        (1_000_000, 1, 250_000),  # a quarter of a short retention
        (1_000_000, 365, 9_125_000),  # a fortieth of a long one
        (80_000_000, 7, LEAF_IDS_MAX),
        (20_000 * DAY_S, 7, 302_400_000),  # narrower, they would be more than forty
    ],
)
def test_how_wide_a_leaf_is(ids_per_day, retention_days, ids):
    assert leaf_ids(ids_per_day, retention_days) == ids


@given(rates, retentions)
def test_live_leaves_are_few(ids_per_day, retention_days):
    ids = leaf_ids(ids_per_day, retention_days)
    assert ids >= LEAF_IDS_MIN
    assert ids_per_day * retention_days / ids <= LEAVES_MAX + 1e-6


def test_the_pace_remembers_a_peak_and_forgets_it():
    made = Pace()
    made.saw(1_000, 0.0)
    assert made.peak_per_s == 0  # what came before we looked says nothing
    made.saw(901_000, 9.9)
    assert made.peak_per_s == 0  # too short a time
    made.saw(201_000, 10.0)
    assert made.peak_per_s == 20_000
    made.saw(201_000, 10.0)
    made.saw(201_000, 3_610.0)
    assert made.peak_per_s == pytest.approx(10_000)
    made.saw(201_000 + 30_000 * 10, 3_620.0)
    assert made.peak_per_s == 30_000
    made.saw(10**12, 3_640.0)
    assert made.peak_per_s == 100_000  # somebody has set the sequence
    made.measured(1_000, 10)  # a log that is ten seconds old: as if in an hour
    assert made.ids_per_day == 24_000
    made.measured(1_000_000, DAY_S)
    assert made.ids_per_day == 1_000_000
    assert "1000000 a day" in repr(made)


def test_ahead_at_20000_a_second():
    fast = pace(1_000_000, 20_000)
    assert lead_ids(20_000) == 72_000_000
    assert next_leaf(40_000_000, 3, 50_000, fast, 7) == Span(40_000_000, 108_050_001)
    assert next_leaf(108_050_001, 4, 50_000, fast, 7) is None


def test_two_leaves_are_ahead_also_where_one_would_do():
    assert next_leaf(40_000_000, 1, 100, pace(), 7) == Span(40_000_000, 40_010_000)
    assert next_leaf(40_010_000, 2, 100, pace(), 7) is None


@given(st.integers(0, 10**12), st.integers(1, 10**9), st.integers(0, 5), rates, st.floats(0, 50_000), retentions)
def test_what_is_added_covers_the_lead(last_id, beyond, ahead, ids_per_day, peak_per_s, retention_days):
    end, how_fast = last_id + beyond, pace(ids_per_day, peak_per_s)
    leaf = next_leaf(end, ahead, last_id, how_fast, retention_days)
    covered = end if leaf is None else leaf.high
    assert covered - 1 - last_id >= max(LEAD_IDS_MIN, peak_per_s * LEAD_S - 1)
    if leaf is None:
        assert ahead >= 2
    else:
        assert leaf.low == end
        assert leaf.high - leaf.low >= leaf_ids(ids_per_day, retention_days)
        assert next_leaf(leaf.high, 2, last_id, how_fast, retention_days) is None


@given(st.integers(0, 10**12), rates, retentions)
def test_an_adopted_leaf_reaches_beyond_the_margin(last_id, ids_per_day, retention_days):
    assert adoption_end(last_id, pace(ids_per_day), retention_days) - last_id > 2 * MARGIN_IDS


def test_a_slow_log_cuts_narrow_leaves_off_the_front():
    slow = pace(2_000)
    assert cuts(FRESH, 40_000, slow, 7) is None  # the leaf in use is not half full
    leaf, bounds = cuts(FRESH, 60_000, slow, 7)
    assert leaf == FRESH[1]
    assert bounds == [100_000, 110_000, 120_000, 130_000, 140_000, 1_000_000]
    after = [FRESH[0], *(Span(low, high) for low, high in pairwise(bounds)), *FRESH[2:]]
    assert cuts(after, 99_999, slow, 7) is None  # now the next one fits
    assert cuts(after, 131_000, slow, 7) is None
    assert cuts(after, 136_000, slow, 7)[0] == Span(140_000, 1_000_000)


def test_a_fast_log_cuts_nothing():
    assert cuts(FRESH, 60_000, pace(300_000), 7) is None
    leaf, bounds = cuts(FRESH, 900_000, pace(1_000_000), 7)
    assert (leaf, bounds) == (FRESH[2], [1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000, 10_000_000])


def test_nothing_is_cut_beside_a_hole_or_at_the_end():
    assert cuts([Span(0, 100), Span(200, 10_000_000)], 90, pace(), 7) is None
    assert cuts(FRESH[:1], 90_000, pace(), 7) is None
    assert cuts(FRESH, 50_000_000, pace(), 7) is None
    assert cuts([], 0, pace(), 7) is None


@given(st.integers(0, 39_999_999), rates, retentions)
@settings(max_examples=300)
def test_cuts_divide_an_unused_leaf(last_id, ids_per_day, retention_days):
    found = cuts(FRESH, last_id, pace(ids_per_day), retention_days)
    if found is None:
        return
    leaf, bounds = found
    width = leaf_ids(ids_per_day, retention_days)
    assert leaf in FRESH
    assert leaf.low > last_id + 1
    assert leaf.high - leaf.low > TOO_WIDE * width
    assert bounds == sorted(set(bounds))
    assert (bounds[0], bounds[-1], len(bounds)) == (leaf.low, leaf.high, CUT_LEAVES + 2)
    assert bounds[1] - bounds[0] == width


@pytest.mark.parametrize(
    ("position", "gaps", "settled"),
    [
        (198, [], False),
        (199, [], True),
        (10_000, [], True),
        (10_000, [(100, 100)], False),
        (10_000, [(199, 199)], False),
        (10_000, [(1, 1_000)], False),
        (10_000, [(1, 99), (200, 300)], True),
    ],
)
def test_only_what_is_settled_may_go(position, gaps, settled):
    assert is_settled(Span(100, 200), position, gaps) is settled


def test_when_a_leaf_is_old_enough():
    now_us = 1_700_000_000_000_000
    assert not is_expired(now_us - 7 * DAY_S * 1_000_000, now_us, 7)
    assert is_expired(now_us - 7 * DAY_S * 1_000_000 - 1, now_us, 7)
    assert is_expired(now_us - 864_000_001, now_us, 0.01)


def test_spans_overlap():
    assert Span(0, 10).overlaps(Span(9, 20))
    assert not Span(0, 10).overlaps(Span(10, 20))
    assert Span(5, 6).overlaps(Span(0, 100))
