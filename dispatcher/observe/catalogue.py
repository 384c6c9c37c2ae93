"""The metrics, once: name, kind, label, help, and where the value is read. Names and units by the conventions of Prometheus.

Labels are bounded: no endpoint, account or type is ever one. What only an owner knows is left out of a standby's scrape, and what only the
database knows is left out while it is away, rather than told as 0. docs/metrics.md is written from this table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from dispatcher.domain.outcome import Fault
from dispatcher.engine.engine import Incarnation, State
from dispatcher.engine.histogram import Histogram
from dispatcher.observe.figures import Figures, ProcessFigures
from dispatcher.store.observe import Seen

if TYPE_CHECKING:
    from dispatcher.web.server import WebServer

PREFIX = "dispatcher_"
VERSION = version("dispatcher")
READS = ("head", "gap", "lag", "retry", "run", "urgent", "key")
DATABASE_SILENT_S = 15.0  # three looks

Kind = Literal["counter", "gauge", "seconds", "size"]  # the last two: histograms, of µs shown as seconds, and of counts
Value = float | Mapping[str, float] | Mapping[tuple[str, str], float] | Histogram | None
F = TypeVar("F", bound=ProcessFigures, contravariant=True)

FAULTS = [fault.value for fault in Fault if fault not in (Fault.STATUS, Fault.EXPIRED, Fault.STALE)]
OUTCOMES = ("delivered", "1xx", "3xx", "4xx", "5xx", *FAULTS)


@dataclass(frozen=True, slots=True)
class Spec(Generic[F]):
    """`value` returns a number, one for each value of the `label` (of two, with a space between them: for each pair), a histogram,
    or None: not known now."""

    name: str
    kind: Kind
    help: str
    value: Callable[[F], Value]
    label: str | None = None

    @property
    def full_name(self) -> str:
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple((self.label or "").split())


def counted(name: str, field: str, help: str) -> Spec[Figures]:
    """A counter of the engine's, as it is."""
    return Spec(name, "counter", help, lambda f: getattr(f.of.engine.counters, field))


def _web(f: ProcessFigures, value: Callable[["WebServer"], Value]) -> Value:
    """Read what panel and API know; None where this process doesn't serve them."""
    return None if f.of.web is None else value(f.of.web)


# What `dispatcher web` shows, which serves panel and API alone.
WEB_METRICS: tuple[Spec[ProcessFigures], ...] = (
    # ── any process ──
    Spec("build_info", "gauge", "Always 1; the version.", lambda f: {VERSION: 1}, "version"),
    Spec(
        "loop_lag_seconds",
        "seconds",
        "How late a timer of 0.1 s was: whether one core suffices.",
        lambda f: f.of.pulse.loop_lag_us,
    ),
    Spec(
        "database_up",
        "gauge",
        "1 if the last look at the database was answered, at most 15 s ago.",
        lambda f: float(f.of.observer.silent_s <= DATABASE_SILENT_S),
    ),
    # ── panel and API ──
    Spec(
        "web_requests",
        "counter",
        "Requests to panel and API: api, panel, receiver, stream, static or health; by the class of the status, or left by their client.",
        lambda f: _web(f, lambda server: server.requests.counts),
        "area status",
    ),
    Spec(
        "web_request_duration_seconds",
        "seconds",
        "How long answers took; not of streams, files and /healthz.",
        lambda f: _web(f, lambda server: server.requests.answer_us),
    ),
    Spec(
        "web_connections",
        "gauge",
        "Connections to panel and API.",
        lambda f: _web(f, lambda server: server.connections),
    ),
    Spec(
        "web_connections_max",
        "gauge",
        "DISPATCHER_WEB_CONNECTIONS_MAX.",
        lambda f: _web(f, lambda _: f.of.settings.web_connections_max),
    ),
    Spec("web_streams", "gauge", "Live streams that are open.", lambda f: _web(f, lambda server: server.streams)),
    Spec(
        "web_streams_max",
        "gauge",
        "DISPATCHER_WEB_STREAMS_MAX.",
        lambda f: _web(f, lambda _: f.of.settings.web_streams_max),
    ),
)

METRICS: tuple[Spec[Figures], ...] = (
    *WEB_METRICS,
    # ── the process ──
    Spec(
        "state",
        "gauge",
        "1 for the state it is in. Exactly one process should be owner.",
        lambda f: {state.value: float(f.of.engine.state is state) for state in State},
        "state",
    ),
    counted("starts", "starts", "Times it became the owner; again without a new process: the server lost its memory."),
    # ── the log ──
    Spec(
        "head_id", "gauge", "The id up to which the log has been looked at.", lambda f: _own(f, lambda i: i.reader.head)
    ),
    Spec(
        "position_id",
        "gauge",
        "The id up to which everything is settled, but for gaps and lanes that are behind.",
        lambda f: _own(f, lambda i: i.recorder.position),
    ),
    Spec(
        "oldest_undelivered_seconds",
        "gauge",
        "Age of the oldest event not yet settled: above the position (log), or of live endpoints that are behind (behind).",
        lambda f: _seen(f, lambda seen: {"log": seen.log_s, "behind": seen.behind_s}),
        "part",
    ),
    Spec(
        "gaps",
        "gauge",
        "Ids (young) and ranges of ids (old) below the head that are not visible yet.",
        lambda f: gaps(f),
        "age",
    ),
    Spec(
        "reads",
        "counter",
        "Reads of the log, by what for.",
        lambda f: {kind: getattr(f.of.engine.counters, f"{kind}_reads") for kind in READS},
        "kind",
    ),
    counted("events_read", "events_read", "Events read at the head."),
    counted("events_unwanted", "events_unwanted", "Events that no endpoint subscribes to."),
    Spec("reader_quiet_seconds", "gauge", "Since the reader's last turn.", lambda f: f.of.pulse.reader_quiet_s),
    counted("doorbell_sleeps", "sleeps", "Times the reader fell asleep, and producers began to ring."),
    counted("doorbell_wake_ups", "wake_ups", "Times it got up to poll."),
    # ── deliveries ──
    Spec(
        "event_received_seconds",
        "seconds",
        "From an event's row (created_at) to the 2xx that answered its first attempt.",
        lambda f: f.of.engine.histograms.received_us,
    ),
    Spec("attempt_duration_seconds", "seconds", "How long attempts took.", lambda f: f.of.engine.histograms.attempt_us),
    Spec(
        "attempts",
        "counter",
        "Attempts by outcome: delivered, the class of a failed answer's status, or what went wrong.",
        lambda f: attempts(f),
        "outcome",
    ),
    counted("retries", "retried", "Failed attempts that will be repeated."),
    counted("dead_letters", "dead", "Deliveries given up."),
    counted("expired", "expired", "Deliveries settled unsent, because the event's expires_at had passed."),
    counted("throttled", "throttled", "Answers that asked for less: 429, 502, 503, 504."),
    Spec(
        "retries_waiting",
        "gauge",
        "Deliveries that wait for a retry; ends at 100,001.",
        lambda f: _seen(f, lambda seen: seen.retries),
    ),
    Spec(
        "dead_letters_open",
        "gauge",
        "Dead letters that nobody has dealt with; ends at 100,001.",
        lambda f: _seen(f, lambda seen: seen.dead_letters),
    ),
    Spec("in_flight", "gauge", "POSTs in flight.", lambda f: _own(f, lambda i: i.sender.in_flight)),
    Spec("in_flight_max", "gauge", "DISPATCHER_SLOTS.", lambda f: f.of.settings.slots),
    counted(
        "rate_waits",
        "rate_waits",
        "Turns that an endpoint gave up because of its rate limit, or of the pace its receiver asked for.",
    ),
    # ── lanes ──
    Spec(
        "lanes",
        "gauge",
        "Endpoints: live, lagging (reading on from where they are behind), held (paused, disabled).",
        lambda f: f.lanes.lanes if f.incarnation else None,
        "state",
    ),
    Spec(
        "backlog_events",
        "gauge",
        "Events that wait for endpoints which are behind, as counted in passing.",
        lambda f: f.lanes.backlog if f.incarnation else None,
        "state",
    ),
    Spec(
        "queued_events",
        "gauge",
        "Deliveries in lanes' queues: fresh, or again (retries, resends, replays).",
        lambda f: f.lanes.queued if f.incarnation else None,
        "kind",
    ),
    Spec("memory_events", "gauge", "Events in memory.", lambda f: _own(f, lambda i: i.lanes.memory.events)),
    Spec(
        "memory_events_max",
        "gauge",
        "DISPATCHER_MEMORY_EVENTS_MAX.",
        lambda f: _own(f, lambda i: i.lanes.memory.events_max),
    ),
    Spec("memory_bytes", "gauge", "Payload bytes in memory.", lambda f: _own(f, lambda i: i.lanes.memory.bytes)),
    Spec(
        "memory_bytes_max",
        "gauge",
        "DISPATCHER_MEMORY_BYTES_MAX.",
        lambda f: _own(f, lambda i: i.lanes.memory.bytes_max),
    ),
    counted("memory_waits", "memory_waits", "Times the head waited at the memory bound."),
    Spec(
        "breakers",
        "gauge",
        "Endpoints by the state of their breaker.",
        lambda f: f.lanes.breakers if f.incarnation else None,
        "state",
    ),
    counted("breaker_opened", "breaker_opened", "Times a breaker opened."),
    Spec(
        "paced",
        "gauge",
        "Endpoints that are sent to at a pace, because they asked for less.",
        lambda f: f.lanes.paced if f.incarnation else None,
    ),
    # ── connections ──
    Spec("sockets", "gauge", "Connections to receivers, open and opening.", lambda f: f.of.transport.count),
    Spec("sockets_max", "gauge", "How many there may be.", lambda f: f.of.transport.sockets_max),
    Spec(
        "connections_awaited",
        "gauge",
        "POSTs that wait for a connection, by the doubt whether it comes: none, endpoint not tried yet, endpoint not reached the last time. The "
        "latter two may wait for others of their kind.",
        lambda f: f.lanes.awaited if f.incarnation else None,
        "doubt",
    ),
    Spec("connections_opened", "counter", "Connections made.", lambda f: f.of.transport.opened),
    Spec("connections_reused", "counter", "Times a kept connection was used again.", lambda f: f.of.transport.reused),
    Spec(
        "connections_failed", "counter", "Connections that came to nothing.", lambda f: f.of.transport.connect_failures
    ),
    counted(
        "connections_stale", "stale", "Kept connections that turned out to be closed; the POST went out once more."
    ),
    # ── recording and the database ──
    Spec("batch_rows", "size", "Attempts a recorded batch.", lambda f: f.of.engine.histograms.batch_rows),
    Spec(
        "batch_seconds",
        "seconds",
        "From a batch that is built to its commit, waits for the database included.",
        lambda f: f.of.engine.histograms.batch_us,
    ),
    counted("batch_retries", "batch_retries", "Times a batch was sent once more, because the database was away."),
    counted("checkpoints", "checkpoints", "Checkpoints written; about one a second."),
    Spec(
        "unrecorded", "gauge", "Results that wait to be recorded.", lambda f: _own(f, lambda i: i.recorder.unrecorded)
    ),
    Spec(
        "unrecorded_max",
        "gauge",
        "DISPATCHER_UNRECORDED_MAX: beyond it nothing new is sent.",
        lambda f: f.of.settings.unrecorded_max,
    ),
    Spec(
        "recorder_quiet_seconds",
        "gauge",
        "Since the last commit; an idle dispatcher commits a checkpoint a second.",
        lambda f: f.of.pulse.recorder_quiet_s,
    ),
    counted("database_away", "store_away", "Times a session of the dispatcher found the database away."),
    Spec(
        "database_round_trips",
        "counter",
        "Pieces of work that a session did.",
        lambda f: {name: trips for name, (trips, _) in f.of.round_trips().items()},
        "session",
    ),
    Spec(
        "database_connects",
        "counter",
        "Connections that a session made.",
        lambda f: {name: connects for name, (_, connects) in f.of.round_trips().items()},
        "session",
    ),
    # ── the janitor ──
    counted("partitions_made", "partitions_made", "Partitions made ahead."),
    counted("partitions_expired", "partitions_expired", "Partitions emptied by retention."),
    Spec(
        "partition_ids_ahead",
        "gauge",
        "Ids that the log's partitions have left; 0: its rows go to the DEFAULT partition.",
        lambda f: _own(f, lambda i: None if i.janitor is None else i.janitor.ids_ahead),
    ),
    Spec(
        "deliveries_expired",
        "counter",
        "Deliveries that retention ended before they were made: told to their accounts, and lost. Held: the endpoint is paused or disabled.",
        lambda f: expired(f),
        "state",
    ),
    counted("janitor_failures", "janitor_failures", "Rounds of maintenance that failed."),
)


def attempts(f: Figures) -> dict[str, float]:
    failures = f.of.engine.histograms.failures
    return (
        {"delivered": f.of.engine.counters.delivered}
        | {kind: failures.get(kind, 0) for kind in OUTCOMES[1:]}
        | failures
    )


def expired(f: Figures) -> dict[str, float]:
    counters = f.of.engine.counters
    return {
        "live": counters.deliveries_expired - counters.deliveries_expired_held,
        "held": counters.deliveries_expired_held,
    }


def gaps(f: Figures) -> Value:
    incarnation = f.incarnation
    if incarnation is None:
        return None
    found = incarnation.reader.gaps
    return {"young": len(found.young), "old": len(found.old)}


def _own(f: Figures, value: Callable[[Incarnation], float | None]) -> float | None:
    """Read a figure of the incarnation; None unless this process owns the log."""
    return None if f.incarnation is None else value(f.incarnation)


def _seen(f: Figures, value: Callable[[Seen], Value]) -> Value:
    """Read what the last look at the database saw; None if it saw nothing."""
    seen = f.of.observer.seen
    return None if seen is None else value(seen)
