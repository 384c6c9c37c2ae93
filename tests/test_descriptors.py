"""How many sockets the limit of descriptors leaves."""

import resource
from typing import Any

import pytest
import structlog

from dispatcher.main import allowed_sockets

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "sockets", "raised_to"),
    [
        (INFINITE, INFINITE, 5_000, None),
        (5_100, 5_100, 5_000, None),
        (1_024, 65_536, 5_000, 5_100),
        (1_024, INFINITE, 5_000, 5_100),
        (1_024, 4_096, 3_996, 4_096),
        (64, 64, 1, 64),
    ],
)
def test_as_many_as_may_be_and_a_line_where_that_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, sockets: int, raised_to: int | None
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, new: limits.append(new))
    with structlog.testing.capture_logs() as logged:
        assert allowed_sockets(5_000, spare=100) == sockets
    assert [new for new, _ in limits[1:]] == ([] if raised_to is None else [raised_to])
    told: list[Any] = [(line["event"], line["limit"], line["sockets"]) for line in logged]
    assert told == ([] if sockets == 5_000 else [("descriptors.few", hard, sockets)])
