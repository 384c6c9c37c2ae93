"""What the engine needs from the world, in the engine's words: a store that holds the log, and a transport that POSTs.

Each port has two adapters, the real one and an in-memory twin, that pass the same conformance suite (tests/store,
tests/transport). Library types stop at the adapters. Times that are stored are µs since 1970 by the database's clock.

What a store call may raise: `StoreAwayError` (not reachable now: nothing is known to have happened, call again),
`LifeLostError` (the server lost its memory: everything learnt from it is void, begin at Start), `FencedError` (another
dispatcher rules: stop).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from dispatcher.domain.endpoint import Endpoint
from dispatcher.domain.event import Event
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.retention import Span
from dispatcher.domain.run import Run
from dispatcher.domain.url import Origin


class StoreAwayError(Exception):
    """The database can't be reached, or took too long. Whether the call took effect is unknown; calling again is safe."""


class LifeLostError(Exception):
    """The server crashed or was promoted since Start: its asynchronous tail may be gone."""


class FencedError(Exception):
    """The epoch has moved on, or the owner lock is another's."""


class RefusedError(Exception):
    """What was asked of the partitions isn't safe, or isn't so any more: somebody else changed them. Look at their shape again."""


# ── reading ──


Ranges = Sequence[tuple[int, int]]  # of ids, from … to, both in
Kinds = tuple[Sequence[str], Sequence[str]]  # events of these accounts, and of these types


@dataclass(slots=True)
class Page:
    """Events in id order. `full`: cut by its row or byte bound, so there may be more. `attempted`, if asked for, has for each event
    the endpoints that already have a run-0 attempt of it."""

    events: list[Event]
    attempted: list[Sequence[int]] | None
    full: bool


@dataclass(slots=True)
class Summary:
    """What an account has of a type in some ranges: how many events, from which id to which; `urgent`: some have priority."""

    account_id: str
    event_type: str
    events: int
    urgent: bool
    low: int
    high: int


@dataclass(slots=True)
class HeadPage(Page):
    """`events` holds ids of the young gaps that have appeared, then ids above the head. `last_id`: the last id handed out, read after
    this page's snapshot: so it bounds the *next* page, and the pages need one round trip each instead of two. `config_seq`: the newest
    change of configuration in this snapshot; what was committed after a change is never read without it."""

    last_id: int
    config_seq: int


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds the lock that a writer of the log must hold: virtual transactions that run, and prepared ones."""

    running: frozenset[str]
    prepared: frozenset[str]


@dataclass(slots=True)
class DueRetry:
    event: Event
    run: int
    number: int
    first_attempt_us: int


@dataclass(slots=True)
class RunPage:
    """What a run has to send next, without what it has attempted already. `passed`: the id up to which the run has been read."""

    events: list[Event]
    passed: int


@dataclass(slots=True)
class RetryPage:
    """Of one endpoint. `next_due_us`: its earliest retry that is not due yet. `full`: more are due, or it wasn't looked at because the pages
    before it took all of the bytes. `orphaned`: some were of events that are gone, and have been ended: what keys they held is free."""

    retries: list[DueRetry]
    full: bool
    next_due_us: int | None
    orphaned: bool = False


# ── recording ──


@dataclass(slots=True)
class AttemptRow:
    event_id: int
    endpoint_id: int
    run: int
    number: int
    started_us: int
    duration_us: int
    status: int | None
    fault: Fault | None
    response_head: bytes | None


@dataclass(slots=True)
class RetryRow:
    endpoint_id: int
    event_id: int
    run: int
    number: int
    first_attempt_us: int
    due_us: int
    reason: str
    ordering_key: str | None = None  # which it holds back


@dataclass(slots=True)
class DeadRow:
    endpoint_id: int
    event_id: int
    run: int
    attempts: int
    first_attempt_us: int
    reason: str
    status: int | None
    fault: Fault


@dataclass(slots=True)
class LaneRow:
    endpoint_id: int
    settled: int
    holes: IdRanges
    backlog: int


@dataclass(slots=True)
class RunRow:
    """How far a run is; absolute, so that writing it twice changes nothing. `ended`: nothing is left to send, so it is finished if none of its
    retries is left either, or at once, retries and all, if it was `canceled`."""

    run: int
    endpoint_id: int
    settled: int
    attempted: int
    delivered: int
    dead: int
    ended: bool
    canceled: bool


@dataclass(slots=True)
class StatRow:
    """What an endpoint's attempts were like in one minute, as far as this dispatcher made them. `minute`: since 1970."""

    endpoint_id: int
    minute: int
    delivered: int
    failed: int
    dead: int
    duration_ms: int
    durations: list[int]
    expired: int = 0


@dataclass(slots=True)
class CheckpointWrite:
    position: int
    gaps: IdRanges
    lanes: list[LaneRow]
    lanes_gone: list[int]
    taken_up: list[int]  # subscription ids


@dataclass(slots=True)
class Batch:
    """One transaction. `settled_retries`: (endpoint_id, event_id, run) whose retry row ends."""

    epoch: int
    attempts: list[AttemptRow] = field(default_factory=list)
    retries: list[RetryRow] = field(default_factory=list)
    settled_retries: list[tuple[int, int, int]] = field(default_factory=list)
    dead: list[DeadRow] = field(default_factory=list)
    runs: list[RunRow] = field(default_factory=list)
    stats: list[StatRow] = field(default_factory=list)
    checkpoint: CheckpointWrite | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a batch found: the subscriptions that it marked as taken up, and the runs that have finished with it."""

    taken_up: list[int]
    runs_finished: list[int]


# ── starting and configuration ──


@dataclass(slots=True)
class Started:
    """What Start learnt, in one snapshot. `last_id` is read after it: above it no event can have an attempt by an earlier owner."""

    epoch: int
    position: int
    gaps: IdRanges
    lanes: list[LaneRow]
    endpoints: list[Endpoint]
    config_seq: int
    last_id: int
    retries_due: dict[int, int]  # endpoint_id → earliest due_us
    wall_us: int  # the database's clock


@dataclass(slots=True)
class ConfigChanges:
    """`endpoints` are new versions; `gone` are ids that have none (deleted). `forget`: events of these endpoints were erased. `wall_us`: the
    database's clock. `more`: there are further changes, to be asked for at once."""

    seq: int
    wall_us: int
    endpoints: list[Endpoint] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    forget: list[int] = field(default_factory=list)
    more: bool = False


class Store(Protocol):
    """One dispatcher's view of the database. Reads are made by one task at a time, records by another, configuration by a third."""

    async def start(self, owner: str, on_standby: Callable[[], None] = lambda: None) -> Started:
        """Take the owner lock, raise the epoch durably, and read where to begin. While another holds the lock, `on_standby` is called
        once and this waits, for as long as that one's heartbeat goes on; one without is ended, and its place taken."""

    async def close(self) -> None: ...

    def on_owner_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the owner's session is lost, at once if it is already."""

    async def hold_ownership(self) -> None:
        """Take the owner lock again after its session was lost. Raises FencedError if the epoch moved or the lock stays another's, and
        StoreAwayError while it is another's that has yet to raise the epoch."""

    async def is_stood_by(self) -> bool:
        """Tell whether another dispatcher waits to take over. By the reader's session, so nobody may be reading."""

    async def head(
        self, after: int, limit: int, bytes_max: int, young: Sequence[int], *, attempted: bool
    ) -> HeadPage: ...

    async def holders(self) -> Holders: ...

    async def probe(self, ranges: Ranges, limit: int, bytes_max: int, of: Kinds | None = None) -> list[Page]:
        """Read ranges of ids, each from its low end; a page beyond the bounds is empty and full. `of`: some kinds only."""

    async def summary(self, ranges: Ranges) -> list[Summary]:
        """Tell what is in ranges of ids, by account and type."""

    async def account(
        self,
        account_id: str,
        after: int,
        upto: int,
        types: Sequence[str] | None,
        limit: int,
        bytes_max: int,
        of: Sequence[int],
    ) -> Page:
        """Read an account's events in (after, upto], with the attempts of some endpoints (`of`, here and below)."""

    async def holes(
        self, account_id: str, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int, of: Sequence[int]
    ) -> list[Page]: ...

    async def urgent(
        self, account_id: str, after: int, upto: int, limit: int, bytes_max: int, of: Sequence[int]
    ) -> Page:
        """Read as `account` does, events with priority only."""

    async def keys(
        self,
        account_id: str,
        keys: Sequence[tuple[str, int]],
        upto: int,
        limit: int,
        bytes_max: int,
        of: Sequence[int],
    ) -> list[Page]:
        """Read the first `limit` events of each (ordering key, lowest id); a page beyond the byte bound comes back empty and full."""

    async def held_keys(self, endpoint_id: int) -> list[tuple[str, int]]:
        """Read the (ordering key, event id) of the endpoint's retries that hold back a key."""

    async def due_retries(
        self, wanted: Sequence[tuple[int, int]], bytes_max: int, *, without_runs: Sequence[int] = ()
    ) -> list[RetryPage]:
        """Read due retries, oldest first, of each of the endpoints (id, how many at most) but those of some runs; a page for each."""

    async def run_page(
        self, endpoint_id: int, account_id: str, run: Run, after: int, limit: int, bytes_max: int
    ) -> RunPage:
        """Read what `run` has to send above `after`. Bounded in ids passed too: an empty page that passed something is not the end."""

    async def arm_doorbell(self) -> bool:
        """Try to make producers ring from now on; False while a transaction that chose silence is open."""

    async def disarm_doorbell(self) -> None: ...

    async def listen(self, on_doorbell: Callable[[], None], on_config: Callable[[], None]) -> None:
        """Deliver wake-ups until the connection is lost (StoreAwayError). What rang meanwhile is lost: look after every call."""

    async def record(self, batch: Batch) -> Recorded:
        """Write the batch in one transaction; repeating it is safe."""

    async def config_changes(self, after_seq: int, epoch: int, again: Sequence[int] = ()) -> ConfigChanges:
        """Read what changed, and the endpoints of `again` in any case. Raises FencedError if `epoch` no longer rules."""

    async def note_failing(self, failing_since_us: dict[int, int | None]) -> None: ...

    async def tell_failing(self, endpoint_id: int, failing_since_us: int) -> None:
        """Tell the account's other endpoints, by an operational event, that this one has been failing for long; once until it recovers."""

    async def tell_recovered(self, endpoint_id: int, failing_since_us: int) -> None:
        """Tell the account's other endpoints that this one takes deliveries again, if they were told that it is failing."""

    async def disable_endpoint(self, endpoint_id: int, reason: str, failing_since_us: int | None) -> None: ...


# ── partitions ──


@dataclass(frozen=True, slots=True)
class TableShape:
    """The leaves of outbox or attempt, ascending. `outside`: ranges that no leaf covers and that have rows, all in the DEFAULT partition.
    `fence`: the DEFAULT partition is being adopted as this leaf."""

    leaves: list[Span]
    outside: list[Span]
    fence: Span | None


@dataclass(frozen=True, slots=True)
class LogShape:
    outbox: TableShape
    attempt: TableShape
    position: int
    gaps: IdRanges
    last_id: int
    wall_us: int

    def of(self, parent: "Parent") -> TableShape:
        return self.outbox if parent == "outbox" else self.attempt


@dataclass(frozen=True, slots=True)
class Loss:
    """Deliveries to an endpoint that retention has ended: not tried once (`unsent`), or waiting for a retry. The times are the events'."""

    endpoint_id: int
    unsent: int
    retries: int
    first_us: int
    last_us: int

    @property
    def deliveries(self) -> int:
        return self.unsent + self.retries


@dataclass(frozen=True, slots=True)
class Expired:
    losses: list[Loss]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class SweptRetries:
    """`passed` is where the next page begins, None at the end; `deliveries` of live endpoints were ended and counted."""

    deliveries: int
    passed: tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class SweptDeadLetters:
    """`passed` is where the next page begins, None if there is nothing old any more; `open` ones are among the `deleted`."""

    deleted: int
    open: int
    passed: int | None


Parent = Literal["outbox", "attempt"]
Sweep = Literal["tests", "stats", "runs", "event_keys"]


class Partitions(Protocol):
    """What the janitor does to the log's tables; one task calls it. A lock that others hold isn't waited for: the call returns False or None,
    "not now", having changed nothing; what isn't safe raises RefusedError. Behind one that waits for a whole table all producers wait, so try
    rarely."""

    async def begin(self) -> None:
        """Forget what an earlier life was; from here on the server's life is watched as the store does."""

    async def close(self) -> None: ...

    async def shape(self) -> LogShape: ...

    async def newest_us(self, leaf: Span) -> tuple[int | None, int | None]:
        """Return when the leaf's last event was created, and when the last attempt of its events began; None where there is none."""

    async def total_bytes(self) -> int:
        """Return what outbox and attempt take on disk."""

    async def first_id_since(self, since_us: int, after: int, upto: int) -> tuple[int, int] | None:
        """Return (id, created_us) of the first event in (after, upto] created at or after `since_us`, taking times to ascend with ids."""

    async def attach(self, parent: Parent, leaf: Span) -> bool:
        """Add an empty leaf above the last id. Within MARGIN_IDS of it, the whole table's lock is needed."""

    async def recut(self, parent: Parent, leaf: Span, cuts: Sequence[int]) -> bool:
        """Replace an empty leaf above the last id by those between the cuts; without cuts, drop one that is settled (of attempts: join it to
        the oldest, which must be the one below). Needs the whole table's lock."""

    async def adopt(self, parent: Parent, leaf: Span) -> str | None:
        """Make the DEFAULT partition this leaf, a step a call: fenced, validated, adopted; or below, unfenced (schema.sql:
        adopt_default). The last step needs the whole table's lock."""

    async def retrying_below(self, bound: int) -> list[int]:
        """Return the endpoints that have a retry of an event with an id below `bound`."""

    async def expire(self, epoch: int, leaf: Span) -> Expired | None:
        """Empty a settled leaf and its attempts; count, keep and tell what endpoints lose by it, all or nothing. Raises FencedError."""

    async def sweep_retries(self, after: tuple[int, int, int], limit: int) -> SweptRetries:
        """Look through a page of retries, and end those whose event is gone."""

    async def sweep_attempts(self, below: int, before_us: int, limit: int) -> int:
        """Delete a page of attempts that began before `before_us`, of events with ids below `below`; return how many."""

    async def sweep_dead_letters(self, after: int, before_us: int, limit: int) -> SweptDeadLetters: ...

    async def sweep(self, what: Sweep, before_us: int, limit: int) -> int:
        """Delete a page of what is older than `before_us`; return how many rows."""


# ── transport ──


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard bounds of one transport; seconds and bytes."""

    sockets_max: int = 5_000
    sockets_per_origin_max: int = 1_000
    idle_s: float = 30.0
    connect_s: float = 5.0
    headers_s: float = 10.0
    header_bytes_max: int = 32_768
    body_bytes_max: int = 65_536
    head_kept_bytes: int = 2_048
    dns_ttl_s: float = 30.0


class Doubt(Enum):
    """Why a connection that is asked for may never come: its endpoint was not tried yet, or could not be connected to the last time."""

    UNTRIED = "untried"
    UNREACHED = "unreached"


TRACED_BODY_BYTES = 4_096


@dataclass(slots=True)
class Trace:
    """What a test wants to know of its POST besides the outcome: when it came how far, in seconds of one clock (None: it didn't), and what was
    answered, of a success too. Filled in by the transport; a delivery has none and pays nothing for it."""

    began: float | None = None  # to look the name up; what waiting for room took is not in it
    resolved: float | None = None
    connected: float | None = None  # to the peer, or to the proxy and through it
    secured: float | None = None  # by TLS; of plain http never
    sent: float | None = None
    answered: float | None = None  # the first byte
    ended: float | None = None
    address: str | None = None  # of the peer; not with a proxy, where it is the proxy's to know
    head: bytes = b""  # status line and headers of the final answer, as they came
    body: bytes = b""  # its first TRACED_BODY_BYTES, without chunk framing; of what isn't HTTP, what came

    def timing_ms(self) -> dict[str, float | None]:
        """Return how long each part took; None: it was not come to, or isn't needed. They follow each other; `total` is from the beginning to
        the end of the answer, or of patience."""
        return {
            "dns": _ms(self.began, self.resolved), "connect": _ms(self.resolved, self.connected), "tls": _ms(self.connected, self.secured),
            "first_byte": _ms(self.sent, self.answered), "total": _ms(self.began, self.ended),
        }  # fmt: skip


def _ms(since: float | None, until: float | None) -> float | None:
    return None if since is None or until is None else round((until - since) * 1_000, 3)


class Connection(Protocol):
    def post(
        self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None], commands: bool = False
    ) -> None:
        """Send one ready-made request. `on_done` is called exactly once, never from within this call; the connection looks after
        itself then: back to its pool, or closed. `commands`: a success is looked through for one too, which takes a parse."""


class Transport(Protocol):
    """A bounded pool of connections by origin."""

    @property
    def sockets_per_origin_max(self) -> int: ...

    def sockets_at(self, origin: Origin) -> int:
        """Count the connections to an origin, those being opened too."""

    def try_acquire(self, origin: Origin) -> Connection | None:
        """Take an idle connection. The caller posts on it or gives it back."""

    def release(self, connection: Connection) -> None:
        """Give back a connection that was acquired and not used."""

    def connect(
        self,
        origin: Origin,
        on_ready: Callable[[Connection | Outcome], None],
        *,
        fresh: bool = False,
        turn_of: Hashable = None,
        doubt: Doubt | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Ask for a connection; wait for room, name and handshake hold no slot of the engine's. `on_ready` is called once, later, with a
        connection that must be used or released, or with the outcome that says why there is none. `fresh`: not a kept-alive one. Where
        an origin has no room, those who wait for it (`turn_of`: an endpoint) take turns, however many POSTs each waits with. In `doubt`
        it may have to wait for others that are being opened in such a doubt. With a
        `trace`, which wants a fresh one, the connection is for one POST and fills it in."""

    async def close(self) -> None: ...
