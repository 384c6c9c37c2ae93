"""The wall clock is the database's: within what its answers prove, whatever this machine's own clock does."""

from typing import Any, cast

import pytest

from dispatcher.engine.clock import Clock
from dispatcher.engine.config import ConfigWatcher
from dispatcher.engine.counters import Counters
from dispatcher.ports import ConfigChanges


def test_it_is_moved_only_as_far_as_an_answer_proves_it_wrong() -> None:
    clock = Clock(lambda: 10.0)
    clock.sync(50_000_000)  # at 10 s it is 50 s there
    clock.align(10.0, 50_002_000, 10.004)
    assert clock.wall_us() == 50_000_000  # 50.002 at the answer's earliest would be 49.998 now, at its latest 50.002
    clock.align(10.0, 50_002_000, 10.001)
    assert clock.wall_us() == 50_001_000  # too slow, even if that was read as the answer left
    clock.align(10.0, 50_000_500, 10.1)
    assert clock.wall_us() == 50_000_500  # too fast, even if it was read as the question left


@pytest.mark.parametrize("step_s", [-3_600, -1, 1, 3_600])
def test_a_step_of_the_databases_clock_is_followed(step_s: int) -> None:
    clock = Clock(lambda: 10.0)
    clock.sync(50_000_000_000)
    stepped_us = 50_000_000_000 + step_s * 1_000_000
    clock.align(10.0, stepped_us, 10.002)
    assert abs(clock.wall_us() - stepped_us) <= 2_000


async def test_every_look_at_the_configuration_tells_the_clock() -> None:
    """A dispatcher that was slow to start, or was suspended, had late retries and short latencies for as long as it lived."""

    class Store:
        async def config_changes(self, *_: Any) -> ConfigChanges:
            return ConfigChanges(0, 50_000_000)

    clock = Clock(lambda: 10.0)
    clock.sync(7_000_000)
    nothing = cast(Any, None)
    sender = cast(Any, type("Sender", (), {"lease_until": 1e9})())
    watcher = ConfigWatcher(
        cast(Any, Store()), nothing, sender, clock, Counters(), seq=0, epoch=1, endpoints=(), head=lambda: 0,
        changed=nothing, after_read=nothing,
    )  # fmt: skip
    await watcher.look()
    assert clock.wall_us() == 50_000_000
