"""How a receiver that asks for less is met."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.pace import CUT_EVERY_S, OVER_S, RATE_MIN_PER_S, Pace


def test_it_begins_at_half_of_what_was_too_much_and_is_back_in_ten_seconds():
    pace = Pace(100.0, 0.0)
    assert pace.rate_per_s == 50.0
    pace.ready_at(10.0)
    assert pace.rate_per_s == pytest.approx(100.0)
    pace.ready_at(10.9)
    assert pace.rate_per_s == pytest.approx(100.0), "it grows by the second"


def test_each_round_of_answers_cuts_once():
    pace = Pace(64.0, 0.0)
    assert not pace.throttled(-0.1, 5.0), "that POST began before the last cut"
    assert not pace.throttled(0.1, CUT_EVERY_S / 2), "too soon after it"
    assert pace.throttled(0.1, CUT_EVERY_S)
    assert pace.rate_per_s == pytest.approx((32.0 + 3.2) / 2)
    assert pace.cut_at == CUT_EVERY_S


def test_it_never_falls_to_a_standstill():
    pace = Pace(1.0, 0.0)
    for n in range(1, 20):
        assert pace.throttled(n, n)
    assert pace.rate_per_s == RATE_MIN_PER_S


def test_it_is_over_a_minute_after_the_last_cut():
    pace = Pace(10.0, 0.0)
    assert not pace.is_over(OVER_S - 0.1)
    assert pace.throttled(30.0, 30.0)
    assert not pace.is_over(OVER_S)
    assert pace.is_over(30.0 + OVER_S)


@settings(deadline=None)
@given(st.floats(0.1, 5_000), st.lists(st.floats(0, 2), max_size=60))
def test_no_more_starts_than_the_rate_allows(rate_per_s, waits):
    pace, now, starts, most = Pace(rate_per_s, 0.0), 0.0, 0, 0.0
    for wait in waits:
        now += wait
        if pace.ready_at(now) <= now:
            pace.take(now)
            starts += 1
        most = max(most, pace.rate_per_s)
    assert starts <= now * most + max(1, most * 0.02) + 1e-3
