"""The bucket's two promises: never more than rate·t + burst in any span, and never later than it need be."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.domain.bucket import EARLY_S, TokenBucket

no_deadline = settings(deadline=None)  # a busy machine is no defect

RATE_MAX = 100_000.0  # schema.sql's bound
rates = st.floats(0.001, RATE_MAX)
bursts = st.integers(1, 20)
instants = st.floats(0, 1e8)  # three years of uptime


def test_a_full_bucket_gives_its_burst_at_once_and_then_the_rate():
    bucket = TokenBucket(4, 3, now=100.0)
    assert [bucket.try_take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.ready_at(100.0) == 100.25
    assert not bucket.try_take(100.2)
    assert bucket.try_take(100.25)
    assert bucket.ready_at(100.25) == 100.5


def test_it_never_holds_more_than_its_burst():
    bucket = TokenBucket(4, 3, now=0.0)
    assert [bucket.try_take(1e6) for _ in range(4)] == [True, True, True, False]


def test_a_token_that_is_there_is_there_now():
    bucket = TokenBucket(4, 1, now=7.0)
    assert bucket.ready_at(7.0) == 7.0
    assert bucket.ready_at(9.0) == 9.0


def test_looking_takes_nothing():
    bucket = TokenBucket(1, 1, now=0.0)
    for _ in range(5):
        bucket.ready_at(0.0)
    assert bucket.try_take(0.0)
    assert [bucket.ready_at(now) for now in (0.0, 0.25, 0.5)] == [1.0, 1.0, 1.0]


def test_a_clock_that_steps_back_gives_nothing():
    bucket = TokenBucket(1, 1, now=10.0)
    assert bucket.try_take(10.0)
    assert not bucket.try_take(5.0)
    assert not bucket.try_take(10.5)
    assert bucket.try_take(11.0)


def test_a_clock_that_steps_back_takes_nothing():
    assert TokenBucket(1, 1, now=10.0).try_take(5.0)


@pytest.mark.parametrize(
    ("rate_per_s", "burst", "taken_at_once", "next_at"),
    [
        (1, 2, 2, 1.0),  # a smaller burst: what is above it is gone
        (2, 10, 5, 0.5),  # a larger one: it has to fill first
        (8, 5, 5, 0.125),
    ],
)
def test_changed_limits_hold_from_now_on(rate_per_s, burst, taken_at_once, next_at):
    bucket = TokenBucket(1, 5, now=0.0)
    bucket.change(rate_per_s, burst, now=0.0)
    assert [bucket.try_take(0.0) for _ in range(taken_at_once + 1)] == [True] * taken_at_once + [False]
    assert bucket.ready_at(0.0) == next_at
    bucket.change(rate_per_s * 2, burst, now=next_at / 2)  # what has accrued, has at the old rate
    assert bucket.ready_at(next_at / 2) == pytest.approx(next_at * 0.75)


@pytest.mark.parametrize(("rate_per_s", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_limits_that_let_nothing_through_are_a_defect(rate_per_s, burst):
    with pytest.raises(AssertionError):
        TokenBucket(rate_per_s, burst, now=0.0)


@no_deadline
@given(rates, bursts, instants, st.integers(1, 50))
@example(10_000.0, 1, 1e6, 50)
@example(RATE_MAX, 1, 1e8, 50)
@example(1 / 3, 1, 86_400.1, 50)
def test_at_the_instant_it_names_the_token_is_there(rate_per_s, burst, now, times):
    """Who sleeps until `ready_at` gets a token: else the sender would wake for nothing, or trust an answer that isn't so."""
    bucket = TokenBucket(rate_per_s, burst, now)
    for _ in range(times):
        at = bucket.ready_at(now)
        assert at >= now
        assert bucket.ready_at(at) == at
        assert bucket.try_take(at)
        now = at


@no_deadline
@given(rates, bursts, instants, st.lists(st.floats(0, 3), max_size=60))
def test_ready_now_and_try_take_never_disagree(rate_per_s, burst, now, waits):
    bucket = TokenBucket(rate_per_s, burst, now)
    for wait in waits:
        now += wait / rate_per_s
        assert (bucket.ready_at(now) <= now) == bucket.try_take(now)


@no_deadline
@given(rates, bursts, st.floats(0, 1e6), st.lists(st.floats(0, 3), max_size=60))
@example(10_000.0, 1, 1e6, [1 - 5e-5] * 60)
def test_in_any_span_at_most_the_burst_and_the_rate_start(rate_per_s, burst, now, waits):
    """Greedy: whatever may start, starts. Also in the long run: what a rounding error gave early is owed."""
    bucket = TokenBucket(rate_per_s, burst, now)
    starts = []
    for wait in waits:
        now += wait / rate_per_s
        while bucket.try_take(now):
            starts.append(now)
        now = max(now, bucket.ready_at(now))
        assert bucket.try_take(now)
        starts.append(now)
    for first, since in enumerate(starts):
        for last in range(first, len(starts)):
            assert last - first + 1 <= rate_per_s * (starts[last] - since + 2 * EARLY_S) + burst + 1e-9


def test_tokens_taken_early_are_not_one_too_many_in_the_end():
    bucket = TokenBucket(1_000, 1, now=0.0)
    now, taken = 0.0, 0
    for _ in range(100_000):
        now = max(now, bucket.ready_at(now) - 0.9 * EARLY_S)  # as early as it lets us
        assert bucket.try_take(now)
        taken += 1
    assert taken <= 1_000 * now + 1 + 0.001
