"""Counts in words."""

import pytest

from dispatcher.domain.text import amount


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("event",), "0 events"),
        (1, ("event",), "1 event"),
        (2_000, ("dead letter",), "2,000 dead letters"),
        (1, ("delivery waits", "deliveries wait"), "1 delivery waits"),
        (5, ("delivery waits", "deliveries wait"), "5 deliveries wait"),
        (1.0, ("POST",), "1 POST"),
        (0.5, ("POST",), "0.5 POSTs"),
        (1_250.5, ("POST",), "1,250.5 POSTs"),
    ],
)
def test_one_is_one_and_others_are_several(number, words, said):
    assert amount(number, *words) == said
