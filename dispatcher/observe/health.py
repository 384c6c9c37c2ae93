"""Alive, and ready? Judged from what the process knows already: a probe never waits for the database.

Alive is a process whose loop answers. The database is no part of that: to start a dispatcher again does not bring it back. Ready is an owner
that delivers (its database answers, its reader and its recorder move), or a standby that could take over. Panel and API alone are ready when
they listen and their database answers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dispatcher.engine.engine import Engine, State
from dispatcher.observe.catalogue import DATABASE_SILENT_S
from dispatcher.observe.pulse import Pulse
from dispatcher.store.observe import Observer

if TYPE_CHECKING:
    from dispatcher.web.server import WebServer

AWAY = "the database does not answer"
QUIET_S = 15.0  # both move once a second at the least


@dataclass(frozen=True, slots=True)
class Health:
    """`problems` has a sentence for each thing that is wrong; ready is who has none."""

    role: str
    problems: tuple[str, ...]

    @property
    def is_ready(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ready": self.is_ready, "role": self.role, "problems": list(self.problems)}


def judge(engine: Engine, pulse: Pulse, observer: Observer) -> Health:
    problems = []
    if engine.state not in (State.OWNER, State.STANDBY):
        problems.append(f"it is {engine.state.value}: neither the owner nor a standby")
    if observer.silent_s > DATABASE_SILENT_S:
        problems.append(AWAY)
    for what, quiet_s in (("reader", pulse.reader_quiet_s), ("recorder", pulse.recorder_quiet_s)):
        if quiet_s > QUIET_S:
            problems.append(f"the {what} has not moved for {quiet_s:.0f} s")
    return Health(engine.state.value, tuple(problems))


def describe(engine: Engine, health: Health) -> str:
    """Say in a line how the service is, for `systemctl status`."""
    if not health.is_ready:
        return f"{health.role}: {'; '.join(health.problems)}"
    incarnation = engine.incarnation
    if engine.state is not State.OWNER or incarnation is None:
        return health.role
    counters = engine.counters
    return (
        f"owner: settled up to {incarnation.recorder.position:,} of {incarnation.reader.head:,}, {incarnation.sender.in_flight:,} in flight, "
        f"{counters.delivered:,} delivered and {counters.failed:,} failed since it began"
    )


def judge_web(server: "WebServer", observer: Observer) -> Health:
    """Judge panel and API that are served alone."""
    problems = []
    if not server.ready.is_set():
        problems.append("panel and API do not listen yet")
    if observer.silent_s > DATABASE_SILENT_S:
        problems.append(AWAY)
    return Health("web", tuple(problems))


def describe_web(server: "WebServer", health: Health) -> str:
    if not health.is_ready:
        return f"{health.role}: {'; '.join(health.problems)}"
    return f"web: port {server.port}, {server.connections:,} connections, {server.streams:,} live streams"
