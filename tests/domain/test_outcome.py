"""DESIGN §9's table, row by row, and the bounds that hold for any answer a receiver can think of."""

import random
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.domain.outcome import (
    BY_RECEIVER,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_MIN_S,
    Command,
    Decision,
    Fault,
    Outcome,
    RetryPolicy,
    Verdict,
    command_of,
    decide,
    describe,
    heeding,
    outcome_of_answer,
    retry_after_s,
)

no_deadline = settings(deadline=None)  # a busy machine is no defect

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
POLICY = RetryPolicy(schedule_s=(10, 100, 1_000), age_max_s=5_000)
DELIVERED, RETRY, DEAD = Verdict.DELIVERED, Verdict.RETRY, Verdict.DEAD


def decided(
    outcome: Outcome, number: int = 1, age_s: float = 0.0, policy: RetryPolicy = POLICY, seed: int = 1
) -> Decision:
    return decide(outcome, number, age_s, policy, NOW, random.Random(seed))


def answer(status: int, retry_after: str | None = None) -> Outcome:
    return outcome_of_answer(status, retry_after, b"HTTP/1.1 ...")


# What an answer is


@pytest.mark.parametrize(
    ("status", "fault"),
    [(199, Fault.STATUS), (200, None), (201, None), (204, None), (207, None), (299, None), (300, Fault.STATUS), (301, Fault.STATUS),
     (304, Fault.STATUS), (400, Fault.STATUS), (410, Fault.STATUS), (500, Fault.STATUS), (599, Fault.STATUS)],
)  # fmt: skip
def test_only_2xx_is_delivered(status, fault):
    outcome = answer(status, "7")
    assert (outcome.status, outcome.fault, outcome.delivered) == (status, fault, fault is None)
    if fault is not None:  # what is kept, is kept of failures
        assert (outcome.retry_after, outcome.response_head) == ("7", b"HTTP/1.1 ...")
    else:
        assert outcome.response_head is None


# What we do about it


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_a_2xx_is_delivered(status):
    assert decided(answer(status), number=99, age_s=1e9).verdict is DELIVERED


def test_gone_disables_the_endpoint():
    decision = decided(answer(410, "30"))
    assert (decision.verdict, decision.disable_reason, decision.lane_wait_s) == (DEAD, "gone", 0.0)


FAILURES = [
    *(answer(status) for status in (301, 307, 400, 401, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504)),
    *(Outcome(fault) for fault in Fault if fault is not Fault.STATUS),
    *(answer(status, "30") for status in (200 + 101, 400, 408, 500, 502, 504)),  # Retry-After means nothing here
    answer(429, "soon"),
    answer(503, ""),
]


@pytest.mark.parametrize("outcome", FAILURES, ids=lambda outcome: f"{describe(outcome)} {outcome.retry_after}")
def test_a_failure_is_retried_by_the_schedule(outcome):
    for number, wait_s in enumerate(POLICY.schedule_s, 1):
        decision = decided(outcome, number)
        assert decision.verdict is RETRY
        assert decision.due_in_s == wait_s * random.Random(1).uniform(0.8, 1.2)
        assert (decision.lane_wait_s, decision.counts, decision.disable_reason) == (0.0, True, None)
        assert decision.reason == describe(outcome)
    last = decided(outcome, 4)
    assert (last.verdict, last.counts, last.reason) == (DEAD, True, "attempt 4 was the last of the schedule")


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_when_the_lane_and_the_delivery_go_on(status):
    decision = decided(answer(status, "30"))
    assert (decision.verdict, decision.due_in_s, decision.lane_wait_s) == (RETRY, 30.0, 30.0)
    assert not decision.counts  # whoever asks us to wait isn't unwell


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_uses_a_step_of_the_schedule(status):
    assert decided(answer(status, "30"), number=3).verdict is RETRY
    decision = decided(answer(status, "30"), number=4)
    assert (decision.verdict, decision.lane_wait_s, decision.counts) == (
        DEAD,
        30.0,
        False,
    )  # the lane waits all the same


@pytest.mark.parametrize(
    ("outcome", "age_s", "verdict"),
    [
        (answer(503, "30"), 4_970.0, RETRY),
        (answer(503, "30"), 4_970.1, DEAD),
        (answer(500), 4_988.0, RETRY),
        (answer(500), 4_992.1, DEAD),
        (answer(500), 1e9, DEAD),
    ],
)
def test_a_delivery_that_would_be_too_old_is_given_up(outcome, age_s, verdict):
    decision = decided(outcome, age_s=age_s)
    assert decision.verdict is verdict
    if verdict is DEAD:
        assert decision.reason == "older than 5000 s at its next attempt"
        assert (decision.lane_wait_s, decision.counts) == ((30.0, False) if outcome.retry_after else (0.0, True))


def test_the_usual_schedule_ends_with_the_age():
    """Ten waits; jitter aside, they sum up to less than the age, so either bound is reached."""
    policy = RetryPolicy()
    assert sum(policy.schedule_s[:-1]) < policy.age_max_s
    assert len(policy.schedule_s) == 10


@no_deadline
@given(st.integers(1, 3), st.integers(0, 1 << 32))
def test_jitter_stays_within_a_fifth(number, seed):
    due_in_s = decided(answer(500), number, seed=seed).due_in_s
    assert 0.8 <= due_in_s / POLICY.schedule_s[number - 1] <= 1.2


def test_jitter_spreads():
    waits = [decided(answer(500), seed=seed).due_in_s for seed in range(200)]
    assert min(waits) < 8.2
    assert max(waits) > 11.8


@no_deadline
@given(
    st.integers(100, 999),
    st.none() | st.text(max_size=40),
    st.integers(1, 20),
    st.floats(0, 1e7),
)
def test_whatever_the_answer_the_decision_is_within_its_bounds(status, retry_after, number, age_s):
    decision = decided(answer(status, retry_after), number, age_s)
    assert (decision.verdict is DELIVERED) == (200 <= status <= 299)
    assert decision.lane_wait_s == 0 or (
        status in (429, 503) and RETRY_AFTER_MIN_S <= decision.lane_wait_s <= RETRY_AFTER_MAX_S
    )
    assert decision.counts or decision.lane_wait_s
    assert (decision.disable_reason == "gone") == (status == 410)
    if decision.verdict is RETRY:
        assert number <= len(POLICY.schedule_s)
        assert age_s + decision.due_in_s <= POLICY.age_max_s
        assert decision.due_in_s > 0
    if decision.verdict is not DELIVERED:
        assert decision.reason


# Retry-After


def http_date(seconds: float, zone: timezone = UTC) -> str:
    return format_datetime((NOW + timedelta(seconds=seconds)).astimezone(zone), usegmt=zone is UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("1e3", None),
        ("٣٠", None),  # digits, but not ours
        ("²", None),
        ("0", 1.0),
        ("1", 1.0),
        ("30", 30.0),
        (" 30\t", 30.0),
        ("3600", 3_600.0),
        ("3601", 3_600.0),
        ("9" * 5_000, 3_600.0),
        (http_date(90), 90.0),
        (http_date(90, timezone(timedelta(hours=5))), 90.0),
        (http_date(-90), 1.0),
        (http_date(7_200), 3_600.0),
        ("Sun, 01 Mar 2026 12:00:40 -0000", 40.0),
        ("Sunday, 01-Mar-26 12:00:40 GMT", 40.0),  # RFC 850's
        ("Sun Mar  1 12:00:40 2026", 40.0),  # asctime's
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3_600.0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 1.0),
        ("Sun, 32 Mar 2026 12:00:40 GMT", None),
        ("Fri, 31 Dec 10000 23:59:59 GMT", None),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2026 23:59:59 +99999999999999999999", None),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after_s(value, NOW) == seconds


parts = st.sampled_from(
    ["Sun,", "01", "Mar", "2026", "12:00:40", "GMT", "99999999999999999999", "+99999999999999999999", "-0000", "0", ":", "-",
     "12:00:99999999999", "\0", "²", "1 Mar 2026 12:00:40 "]
)  # fmt: skip


@no_deadline
@given(st.one_of(st.text(), st.lists(parts, max_size=8).map(" ".join)))
@example("01 Mar 99999999999999999999 12:00:40")
def test_no_retry_after_is_more_than_a_number_within_its_bounds(value):
    seconds = retry_after_s(value, NOW)
    assert seconds is None or RETRY_AFTER_MIN_S <= seconds <= RETRY_AFTER_MAX_S


# In words


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (answer(204), "delivered (204)"),
        (answer(503), "answered 503"),
        (Outcome(Fault.TIMEOUT), "timeout"),
        (Outcome(Fault.CONNECT, detail="refused"), "connect: refused"),
        (Outcome(Fault.TIMEOUT, 200, detail="body"), "timeout: body"),
    ],
)
def test_an_outcome_in_words(outcome, words):
    assert describe(outcome) == words


# What a receiver may ask for


@pytest.mark.parametrize(
    ("value", "command"),
    [("disable", Command.DISABLE), (" Abort-Message ", Command.ABORT), ("", None), ("abort", None), ("disable, abort-message", None)],
)  # fmt: skip
def test_what_is_a_command(value, command):
    assert command_of(value) is command


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("status", [400, 410, 429, 500, 503])
def test_an_aborted_delivery_is_a_dead_letter_at_once_and_says_nothing_of_its_endpoint(status, number):
    decision = decided(answer(status, "20"), number)
    aborted = heeding(decision, Command.ABORT)
    assert (aborted.verdict, aborted.counts, aborted.due_in_s) == (DEAD, False, 0.0)
    assert (aborted.lane_wait_s, aborted.disable_reason) == (decision.lane_wait_s, decision.disable_reason)


def test_an_answer_that_disables_keeps_its_retry():
    decision = decided(answer(500))
    disabling = heeding(decision, Command.DISABLE)
    assert (disabling.verdict, disabling.due_in_s, disabling.disable_reason) == (RETRY, decision.due_in_s, BY_RECEIVER)
    assert heeding(decided(answer(410)), Command.DISABLE).disable_reason == "gone", "the older rule goes first"
