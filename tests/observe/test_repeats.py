"""Repeats are counted, not shown: a bounded number of lines a kind and minute, and none of another's."""

import pytest
import structlog

from dispatcher import repeats as repeats_module
from dispatcher.repeats import TELLING, Repeats


class Log:
    """What is shown of what is logged."""

    def __init__(self, per_minute: int) -> None:
        self.now = 0.0
        self.lines: list[dict] = []
        self.repeats = Repeats(per_minute, now=lambda: self.now)

    def warning(self, event: str, **values: object) -> None:
        try:
            self.lines.append(dict(self.repeats(None, "warning", {"event": event, **values})))
        except structlog.DropEvent:
            pass

    def count(self, event: str, **values: object) -> int:
        return sum(line["event"] == event and values.items() <= line.items() for line in self.lines)


def test_the_first_are_shown_and_the_rest_told_with_the_next():
    log = Log(3)
    for _ in range(10):
        log.warning("delivery.attempted", endpoint_id=1)
    log.warning("delivery.attempted", endpoint_id=2)
    log.warning("breaker.opened", endpoint_id=1)
    assert log.count("delivery.attempted", endpoint_id=1) == 3
    assert log.count("delivery.attempted", endpoint_id=2) == 1
    assert log.count("breaker.opened", endpoint_id=1) == 1
    log.now = 61.0
    log.warning("delivery.attempted", endpoint_id=1)
    assert log.lines[-1] == {"event": "delivery.attempted", "endpoint_id": 1, "left_out": 7}
    log.warning("delivery.attempted", endpoint_id=1)
    assert "left_out" not in log.lines[-1], "told once"


def test_what_was_left_out_is_told_when_nothing_more_comes():
    log = Log(2)
    for _ in range(5):
        log.warning("reader.away")
    log.repeats.tell(log)
    assert log.count(TELLING) == 0, "its minute is not over"
    log.now = 61.0
    log.repeats.tell(log)
    assert log.lines[-1] == {"event": TELLING, "of": "reader.away", "of_endpoint_id": None, "left_out": 3}
    log.repeats.tell(log)
    assert log.count(TELLING) == 1


def test_counts_of_quiet_minutes_add_up():
    log = Log(1)
    for minute in range(3):
        log.now = minute * 61.0
        for _ in range(4):
            log.warning("a")
    log.now = 1_000.0
    log.repeats.tell(log)
    assert sum(line.get("left_out", 0) for line in log.lines) == 9, "every line that was left out is counted once"


def test_many_kinds_are_told_in_a_bounded_number_of_lines():
    log = Log(1)
    for endpoint_id in range(100):
        for _ in range(3):
            log.warning("delivery.attempted", endpoint_id=endpoint_id)
    log.now = 61.0
    log.repeats.tell(log)
    assert log.count(TELLING) == 21
    assert sum(line["left_out"] for line in log.lines if line["event"] == TELLING) == 200


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repeats_module, "KINDS_MAX", 10)
    log = Log(1)
    for endpoint_id in range(1_000):
        log.warning("delivery.attempted", endpoint_id=endpoint_id)
    assert len(log.repeats._shown) == 10
    assert log.count("delivery.attempted") == 1_000, "what can't be counted is shown"


def test_without_a_bound_everything_is_shown():
    log = Log(0)
    for _ in range(500):
        log.warning("a")
    assert log.count("a") == 500
