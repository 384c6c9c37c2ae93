"""What a scrape is made of. Plain counters are read as they stand; lanes are counted in slices, so that a hundred thousand of them never hold
the loop for long: such a count is of a moment or two, not of an instant."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dispatcher.domain.breaker import BreakerState
from dispatcher.engine.engine import Engine, Incarnation, State
from dispatcher.observe.pulse import Pulse
from dispatcher.ports import Doubt
from dispatcher.settings import Settings
from dispatcher.store.observe import Observer
from dispatcher.transport.room import Room

if TYPE_CHECKING:
    from dispatcher.web.server import WebServer

SLICE_LANES = 500  # 0.8 ms
LIVE, LAGGING, HELD = "live", "lagging", "held"  # held: paused, disabled, or without a usable URL
NO_DOUBT = "none"

RoundTrips = Callable[[], Mapping[str, tuple[int, int]]]  # session → round trips, connects


@dataclass(slots=True)
class LaneCounts:
    lanes: dict[str, int] = field(default_factory=lambda: dict.fromkeys((LIVE, LAGGING, HELD), 0))
    backlog: dict[str, int] = field(default_factory=lambda: dict.fromkeys((LAGGING, HELD), 0))
    breakers: dict[str, int] = field(default_factory=lambda: dict.fromkeys((state.value for state in BreakerState), 0))
    queued: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("fresh", "again"), 0))
    awaited: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((NO_DOUBT, *(doubt.value for doubt in Doubt)), 0)
    )
    paced: int = 0


@dataclass(slots=True, kw_only=True)
class Process:
    """What every process has that is told of. `web`: panel and API, where it serves them."""

    settings: Settings
    pulse: Pulse
    observer: Observer
    web: "WebServer | None" = None


@dataclass(slots=True, kw_only=True)
class Subject(Process):
    """One that delivers, or would."""

    engine: Engine
    transport: Room
    round_trips: RoundTrips


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    of: Process


@dataclass(frozen=True, slots=True)
class Figures(ProcessFigures):
    of: Subject
    lanes: LaneCounts

    @property
    def incarnation(self) -> Incarnation | None:
        """What is in memory about the log; None unless this process owns it."""
        return self.of.engine.incarnation if self.of.engine.state is State.OWNER else None


async def take_figures(subject: Subject) -> Figures:
    return Figures(subject, await count_lanes(subject.engine))


async def count_lanes(engine: Engine) -> LaneCounts:
    counts = LaneCounts()
    if engine.incarnation is None or engine.state is not State.OWNER:
        return counts
    for n, lane in enumerate(list(engine.incarnation.lanes)):
        if n % SLICE_LANES == SLICE_LANES - 1:
            await asyncio.sleep(0)
        state = HELD if lane.held else LIVE if lane.live else LAGGING
        counts.lanes[state] += 1
        if state != LIVE:
            counts.backlog[state] += lane.backlog
        counts.breakers[lane.breaker.state.value] += 1
        counts.queued["fresh"] += lane.queued()
        counts.queued["again"] += len(lane.retries)
        if lane.connecting:
            counts.awaited[NO_DOUBT if lane.doubt is None else lane.doubt.value] += lane.connecting
        counts.paced += lane.pace is not None
    return counts
