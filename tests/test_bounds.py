"""What is far too large, in small: memory and descriptors stay within their bounds. `python -m bench.bounds --full` has the real sizes."""

from collections.abc import Iterator
from typing import Any

import pytest

from bench import bounds

SIZES = {
    "10 GB in an answer": 5,
    "ten million headers": 5,
    "a byte a second": 1,
    "connections refused in a row": 1_000,
    "retries due at once": 3_000,
    "payloads at the limit": 300,  # 79 MB: more than may be in memory
    "rows in one transaction, committed": 5_000,
    "rows in one transaction, rolled back": 20_000,
    "rows in one transaction, held open": 20_000,
    "endpoints of one account": 200,
    "Retry-After of an hour": 5_000,
}
OUTCOMES = {"10 GB in an answer": "delivered", "ten million headers": "protocol", "a byte a second": "timeout"}


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    with bounds.receivers() as made:
        yield made


@pytest.mark.parametrize("name", bounds.SCENARIOS)
async def test_it_stays_within_its_bounds(dsn: str, ports: dict[str, int], name: str) -> None:
    figures = await bounds.run(name, dsn, ports, SIZES[name])
    print(figures)
    assert bounds.exceeded(figures) == [], figures
    assert figures.get("outcomes") == OUTCOMES.get(name)
    if name == "connections refused in a row":
        assert figures["refused"] == SIZES[name]
    else:
        assert figures["beside_events"] > 0
    if name == "Retry-After of an hour":
        assert figures["attempts"] <= 100, "it went on asking"


@pytest.mark.parametrize(
    ("what", "by"), [("rss_max_mb", bounds.MEMORY_GROWTH_MB), ("descriptors_max", bounds.DESCRIPTORS_MAX)]
)
def test_a_bound_that_is_exceeded_is_told(what: str, by: float) -> None:
    figures: dict[str, Any] = {"rss_start_mb": 0.0, "rss_max_mb": 1.0, "descriptors_max": 10.0}
    assert bounds.exceeded(figures) == []
    assert len(bounds.exceeded(figures | {what: by + 1})) == 1
