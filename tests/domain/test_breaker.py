"""The breaker's table of transitions, its window, and its one promise under any order of events: at most one probe."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dispatcher.domain.breaker import WINDOW_S, BreakerLimits, BreakerState, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
LIMITS = BreakerLimits(failures=3, wait_s=5.0, wait_max_s=15.0)
MANY = BreakerLimits(failures=1_000)  # only the window can open it


def opened(now: float = 100.0, limits: BreakerLimits = LIMITS) -> CircuitBreaker:
    breaker = CircuitBreaker(limits)
    assert [breaker.failed(now, probe=False) for _ in range(limits.failures)] == [False] * (limits.failures - 1) + [
        True
    ]
    return breaker


def probing(now: float = 105.0) -> CircuitBreaker:
    breaker = opened()
    assert breaker.may_start(now)
    assert breaker.started()
    return breaker


# CLOSED


def test_it_begins_closed():
    breaker = CircuitBreaker(LIMITS)
    assert breaker.state is CLOSED
    assert breaker.may_start(0.0)
    assert not breaker.started()  # no probe


def test_failures_in_a_row_open_it():
    breaker = opened(now=100.0)
    assert (breaker.state, breaker.until, breaker.opened_times) == (OPEN, 105.0, 1)


def test_a_success_begins_the_row_anew():
    breaker = CircuitBreaker(LIMITS)
    for _ in range(5):
        assert not breaker.failed(1.0, probe=False)
        assert not breaker.failed(1.0, probe=False)
        assert not breaker.succeeded(1.0, probe=False)
    assert breaker.state is CLOSED


@pytest.mark.parametrize(
    ("successes", "failures", "opens"),
    [(0, 19, False), (0, 20, True), (10, 9, False), (10, 10, True), (20, 19, False), (20, 20, True), (11, 10, False)],
)
def test_half_of_twenty_within_the_window_open_it(successes, failures, opens):
    breaker = CircuitBreaker(MANY)
    for _ in range(successes):
        breaker.succeeded(100.0, probe=False)
    results = [breaker.failed(100.0, probe=False) for _ in range(failures)]
    assert results == [False] * (failures - 1) + [opens]


@pytest.mark.parametrize(
    ("later_s", "opens"),
    [(0, True), (WINDOW_S - 10, True), *((WINDOW_S + later_s, False) for later_s in range(0, 130, 10))],
)
def test_the_window_forgets(later_s, opens):
    breaker = CircuitBreaker(MANY)
    for _ in range(19):
        breaker.failed(100.0, probe=False)
    assert breaker.failed(100.0 + later_s, probe=False) is opens


def test_the_window_moves_in_steps():
    breaker = CircuitBreaker(MANY)
    for second in range(0, 600, 10):  # 3 calls in each slice: never 20 within the window
        for _ in range(3):
            assert not breaker.failed(float(second), probe=False)


def test_a_clock_that_steps_back_loses_no_count():
    breaker = CircuitBreaker(MANY)
    for _ in range(19):
        breaker.failed(100.0, probe=False)
    assert breaker.failed(95.0, probe=False)


# OPEN


def test_open_lets_nothing_start_until_the_wait_is_over():
    breaker = opened(now=100.0)
    assert not breaker.may_start(104.999)
    assert breaker.state is OPEN
    assert breaker.may_start(105.0)
    assert breaker.state is HALF_OPEN


def test_results_of_older_posts_count_for_nothing_while_it_is_open():
    breaker = opened(now=100.0)
    for _ in range(10):
        assert not breaker.failed(101.0, probe=False)
        assert not breaker.succeeded(101.0, probe=False)
    assert (breaker.state, breaker.until, breaker.opened_times) == (OPEN, 105.0, 1)


# HALF_OPEN


def test_one_probe_at_a_time():
    breaker = probing()
    assert not breaker.may_start(106.0)
    with pytest.raises(AssertionError):
        breaker.started()


def test_a_good_probe_closes_it_and_clears_everything():
    breaker = probing()
    assert breaker.succeeded(106.0, probe=True)
    assert (breaker.state, breaker.consecutive, breaker.wait_s) == (CLOSED, 0, 5.0)
    assert breaker.may_start(106.0)
    assert not breaker.failed(106.0, probe=False)


def test_closing_forgets_the_window():
    breaker = CircuitBreaker(MANY)
    for _ in range(20):
        breaker.failed(100.0, probe=False)
    assert breaker.may_start(200.0)
    breaker.started()
    assert breaker.succeeded(105.0, probe=True)
    assert not any(breaker.failed(105.0, probe=False) for _ in range(19))
    assert breaker.failed(105.0, probe=False)


def test_a_bad_probe_opens_it_for_twice_as_long_up_to_the_longest():
    breaker, now, waits = probing(), 105.0, []
    for _ in range(4):
        assert breaker.failed(now, probe=True)
        assert breaker.state is OPEN
        waits.append(breaker.until - now)
        now = breaker.until
        assert breaker.may_start(now)
        assert breaker.started()
    assert waits == [10.0, 15.0, 15.0, 15.0]
    assert breaker.opened_times == 5
    assert breaker.succeeded(now, probe=True)
    for _ in range(3):
        breaker.failed(now, probe=False)
    assert breaker.until == now + 5.0  # from the first wait again


def test_results_of_older_posts_count_for_nothing_while_it_is_half_open():
    breaker = probing()
    assert not breaker.succeeded(106.0, probe=False)
    assert not breaker.failed(106.0, probe=False)
    assert breaker.state is HALF_OPEN
    assert not breaker.may_start(106.0)  # the probe is still out


def test_an_abandoned_probe_lets_another_go():
    breaker = probing()
    breaker.abandoned(probe=False)
    assert not breaker.may_start(106.0)
    breaker.abandoned(probe=True)
    assert breaker.may_start(106.0)
    assert breaker.started()


def test_it_reads_well_in_a_failure():
    assert repr(opened(now=100.0)) == "CircuitBreaker(open, 3 in a row, until 105.000)"


class Traffic(RuleBasedStateMachine):
    """Any order of starts, results and waits, with many POSTs in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CircuitBreaker(LIMITS)
        self.now = 0.0
        self.in_flight: list[bool] = []  # is it a probe?

    @rule(wait_s=st.sampled_from([0.0, 0.5, 5.0, 20.0, 100.0]))
    def wait(self, wait_s):
        self.now += wait_s

    @rule()
    def start(self):
        if self.breaker.may_start(self.now):
            self.in_flight.append(self.breaker.started())

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), good=st.booleans())
    def end(self, data, good):
        before, wait_s = self.breaker.state, self.breaker.wait_s
        probe = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        if good:
            changed = self.breaker.succeeded(self.now, probe)
            assert changed == probe
        else:
            changed = self.breaker.failed(self.now, probe)
            assert changed == (before is not self.breaker.state)
            if changed and before is HALF_OPEN:
                assert self.breaker.wait_s == min(2 * wait_s, LIMITS.wait_max_s)
        if before is OPEN:
            assert not changed

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def abandon(self, data):
        self.breaker.abandoned(self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1))))

    @invariant()
    def there_is_one_probe_at_most(self):
        probes = sum(self.in_flight)
        assert probes <= 1
        assert (self.breaker.state is HALF_OPEN and self.breaker.probing) == (probes == 1)

    @invariant()
    def a_way_out_is_left(self):
        """Nothing in flight: it lets something start now, or at the instant it names."""
        if not self.in_flight and self.breaker.state is OPEN:
            assert self.breaker.until <= self.now + LIMITS.wait_max_s
        elif not self.in_flight:
            assert self.breaker.may_start(self.now)


TestTraffic = Traffic.TestCase
