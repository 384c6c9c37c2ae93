"""What the engine needs from the world, in the engine's words: a store that holds the log, and a transport that POSTs.

Each port has two adapters, the real one and an in-memory twin, that pass the same conformance suite (tests/store,
tests/transport). Library types stop at the adapters. Times that are stored are µs since 1970 by the database's clock.

What a store call may raise: `StoreAwayError` (not reachable now: nothing is known to have happened, call again),
`LifeLostError` (the server lost its memory: everything learnt from it is void, begin at Start), `FencedError` (another
dispatcher rules: stop).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dispatcher.domain.endpoint import Endpoint
from dispatcher.domain.event import Event
from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.url import Origin


class StoreAwayError(Exception):
    """The database can't be reached, or took too long. Whether the call took effect is unknown; calling again is safe."""


class LifeLostError(Exception):
    """The server crashed or was promoted since Start: its asynchronous tail may be gone."""


class FencedError(Exception):
    """The epoch has moved on, or the owner lock is another's."""


# ── reading ──


@dataclass(slots=True)
class Page:
    """Events in id order. `full`: cut by its row or byte bound, so there may be more. `attempted`, if asked for, has for each event
    the endpoints that already have a run-0 attempt of it."""

    events: list[Event]
    attempted: list[Sequence[int]] | None
    full: bool


@dataclass(slots=True)
class HeadPage(Page):
    """`events` holds ids of the young gaps that have appeared, then ids above the head. `last_id`: the last id handed out, read after
    this page's snapshot: so it bounds the *next* page, and the pages need one round trip each instead of two."""

    last_id: int


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
class RetryPage:
    """`next_due_us`: the earliest retry of the endpoint that is not due yet. `full`: more are due."""

    retries: list[DueRetry]
    full: bool
    next_due_us: int | None


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
    checkpoint: CheckpointWrite | None = None


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
    """`endpoints` are new versions; `gone` are ids that have none (deleted)."""

    seq: int
    endpoints: list[Endpoint]
    gone: list[int]


class Store(Protocol):
    """One dispatcher's view of the database. Reads are made by one task at a time, records by another, configuration by a third."""

    async def start(self, owner: str) -> Started:
        """Take the owner lock, raise the epoch durably, and read where to begin. Raises FencedError when another holds the lock."""

    async def close(self) -> None: ...

    def on_owner_lost(self, callback: Callable[[], None]) -> None: ...

    async def hold_ownership(self) -> None:
        """Take the owner lock again after its session was lost. Raises FencedError if the epoch moved or the lock is another's."""

    async def head(
        self, after: int, limit: int, bytes_max: int, young: Sequence[int], *, attempted: bool
    ) -> HeadPage: ...

    async def holders(self) -> Holders: ...

    async def probe(self, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int) -> list[Page]:
        """Read ranges of ids, each from its low end; a page beyond the bounds comes back empty and full."""

    async def account(
        self, account_id: str, after: int, upto: int, types: Sequence[str] | None, limit: int, bytes_max: int
    ) -> Page: ...

    async def holes(
        self, account_id: str, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int
    ) -> list[Page]: ...

    async def due_retries(self, endpoint_id: int, limit: int, bytes_max: int) -> RetryPage: ...

    async def arm_doorbell(self) -> bool:
        """Try to make producers ring from now on; False while a transaction that chose silence is open."""

    async def disarm_doorbell(self) -> None: ...

    async def listen(self, on_doorbell: Callable[[], None], on_config: Callable[[], None]) -> None:
        """Deliver wake-ups until the connection is lost (StoreAwayError). What rang meanwhile is lost: look after every call."""

    async def record(self, batch: Batch) -> list[int]:
        """Write the batch in one transaction; repeating it is safe. Returns the subscriptions that were marked as taken up."""

    async def config_changes(self, after_seq: int, epoch: int) -> ConfigChanges:
        """Read what changed. Raises FencedError if `epoch` no longer rules."""

    async def note_failing(self, failing_since_us: dict[int, int | None]) -> None: ...

    async def disable_endpoint(self, endpoint_id: int, reason: str, failing_since_us: int | None) -> None: ...

    async def wall_us(self) -> int: ...


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


class Connection(Protocol):
    def post(self, request: bytes, timeout_s: float, on_done: Callable[[Outcome], None]) -> None:
        """Send one ready-made request. `on_done` is called exactly once, never from within this call; the connection looks after
        itself then: back to its pool, or closed."""


class Transport(Protocol):
    """A bounded pool of connections by origin."""

    def try_acquire(self, origin: Origin) -> Connection | None:
        """Take an idle connection. The caller posts on it or gives it back."""

    def release(self, connection: Connection) -> None:
        """Give back a connection that was acquired and not used."""

    def connect(self, origin: Origin, on_ready: Callable[[Connection | Outcome], None], *, fresh: bool = False) -> None:
        """Ask for a connection; wait for room, name and handshake hold no slot of the engine's. `on_ready` is called once, later, with a
        connection that must be used or released, or with the outcome that says why there is none. `fresh`: not a kept-alive one."""

    async def close(self) -> None: ...
