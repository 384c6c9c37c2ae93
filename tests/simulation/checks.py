"""What must hold at every step, judged from outside: from the tables, from what receivers saw, and from each POST as it starts.

The first violation ends the run. Nothing here believes the engine's own bookkeeping where the tables or the receivers say the same; what
only the engine can know (slots, shares, tokens) is counted a second time.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dispatcher.domain.breaker import BreakerState
from dispatcher.domain.endpoint import FOREVER, EndpointState, pattern_matches
from dispatcher.domain.filters import Rule
from dispatcher.domain.run import RunSource, RunState
from dispatcher.engine import catchup, gaps, keys, lane, reader, recorder
from dispatcher.engine.config import LEASE_S
from dispatcher.engine.delivery import Delivery
from dispatcher.ports import Batch
from dispatcher.store.memory_tables import EndpointRow, LogRow, SubscriptionRow, Tables

if TYPE_CHECKING:
    from tests.simulation.process import Process, WatchedSender
    from tests.simulation.world import World

EARLY = 1e-6


@dataclass(frozen=True)
class Version:
    """An endpoint's configuration, and since when."""

    since: float
    row: EndpointRow | None
    subscriptions: tuple[SubscriptionRow, ...]


class Checker:
    def __init__(self, world: "World") -> None:
        self.world = world
        self.violation: str | None = None
        self.versions: dict[int, list[Version]] = {}
        self.epochs: list[tuple[float, int]] = [(0.0, 0)]  # since when which rules
        self.life_ended_at: dict[int, float] = {}
        self.posted: set[tuple[Any, ...]] = set()
        self.posts = 0
        self.recorded: set[tuple[int, int, int, int, int]] = set()  # epoch, and an attempt's key
        self.erased: dict[int, float] = {}  # event → since when
        self._visible_before: dict[int, frozenset[LogRow]] = {}  # run → the events that it may not pass over
        self._open: dict[int, LogRow] = {}  # events that aren't final everywhere
        self.spared: set[int] = set()  # endpoints of which no order is asked
        self._visible: dict[tuple[int, int], int] = {}  # event → the how manyth commit showed it
        self._commits = 0
        self.incarnations = 0

    @property
    def tables(self) -> Tables:
        return self.world.database.tables

    @property
    def now(self) -> float:
        return self.world.loop.time()

    def fail(self, what: str) -> None:
        if self.violation is None:
            self.violation = f"at {self.now:.4f} s: {what}"
            self.world.note(f"VIOLATION {what}")
            self.world.loop.stop()

    # ── the tables ──

    def wrote(self, function: Any, arguments: dict[str, Any]) -> None:
        """A transaction has been applied."""
        if function is Tables.record:
            self._recorded(arguments["batch"])
        elif function is Tables.commit:
            for change in arguments["changes"]:
                if change.func is Tables.erase_event:
                    self.erased.setdefault(change.keywords["event_id"], self.now)
            for row in arguments["rows"]:
                self._open[row.id] = row
            self._are_visible(arguments["rows"])
            if arguments["changed_endpoints"]:
                self.note_versions(arguments["changed_endpoints"])
                self.look_again()
                for run_id in self.tables.runs:
                    self._visible_before.setdefault(run_id, frozenset(self.tables.outbox.values()))
            self.invariant(row.id for row in arguments["rows"])
        elif function is Tables.end_prepared or getattr(function, "__name__", "") in ("_empty", "_end_retries"):
            self.look_again()
            self._are_visible(self.tables.outbox.values())
        elif function is Tables.raise_epoch:
            self.epochs.append((self.now, self.tables.epoch))

    def _are_visible(self, rows: Iterable[LogRow]) -> None:
        self._commits += 1
        for row in rows:
            self._visible.setdefault((row.id, row.created_us), self._commits)

    def came_before(self, one: LogRow, other: LogRow) -> bool:
        """Tell whether whoever sees `other` sees `one` too."""
        return self._visible[one.id, one.created_us] <= self._visible[other.id, other.created_us]

    def crashed(self, life: int | None) -> None:
        if life is not None:
            self.life_ended_at[life] = self.now
        self.epochs.append((self.now, self.tables.epoch))
        self.erased.clear()  # some may be there again, and ids be handed out again
        shown = {(row.id, row.created_us) for row in self.tables.outbox.values()}
        self._visible = {
            key: number for key, number in self._visible.items() if key in shown
        }  # others' commits were lost
        self._are_visible(self.tables.outbox.values())  # and so may a drop of old ones have been
        self.note_versions([*self.versions, *self.tables.endpoints])
        self.look_again()

    def note_versions(self, endpoint_ids: Iterable[int]) -> None:
        of_endpoint = defaultdict(list)
        for subscription in self.tables.subscriptions.values():
            of_endpoint[subscription.endpoint_id].append(subscription)
        for endpoint_id in dict.fromkeys(endpoint_ids):
            row = self.tables.endpoints.get(endpoint_id)
            version = Version(self.now, row, tuple(of_endpoint[endpoint_id]))
            self.versions.setdefault(endpoint_id, []).append(version)

    def recent(self, endpoint_id: int) -> list[Version]:
        """The versions that a dispatcher may go by: those that were in force within the time of a lease."""
        versions = self.versions.get(endpoint_id, [])
        at = len(versions) - 1
        while at > 0 and versions[at].since >= self.now - LEASE_S - EARLY:
            at -= 1
        return versions[max(at, 0) :]

    def look_again(self) -> None:
        self._open = dict(self.tables.outbox)
        self.invariant()

    def _recorded(self, batch: Batch) -> None:
        tables = self.tables
        self.world.trace(
            f"recorded {[(a.event_id, a.endpoint_id, a.run, a.number, a.fault is None) for a in batch.attempts]} {batch.checkpoint}"
        )
        for row in batch.attempts:
            self.recorded.add((batch.epoch, row.event_id, row.endpoint_id, row.run, row.number))
            event = tables.outbox.get(row.event_id)
            if event is None:
                continue
            if row.number == 0:
                if row.run or event.expires_us is None or event.expires_us > row.started_us:
                    return self.fail(f"{row} says that {event} has expired")
                continue
            of_run = {a.number: a for a in tables.attempts_of[row.event_id, row.endpoint_id] if a.run == row.run}
            if row.number > 1 and row.number - 1 not in of_run:
                return self.fail(f"attempt {row} has no predecessor")
            if any(a.fault is None for number, a in of_run.items() if number < row.number):
                return self.fail(f"attempt {row} follows a success")
            if row.fault is None and not self.world.was_answered(row.endpoint_id, event, row.number):
                return self.fail(f"attempt {row} is recorded as delivered, and its receiver has not said so")
        if batch.checkpoint is not None:
            write = batch.checkpoint
            if len(write.gaps) > recorder.CHECKPOINT_GAPS_MAX:
                return self.fail(f"{len(write.gaps)} gaps in the checkpoint")
            if any(len(row.holes) > self._holes_max() for row in write.lanes):
                return self.fail(f"too many holes: {write.lanes}")
            self.invariant()
            self._runs()
        else:
            self.invariant({row.event_id for row in batch.attempts})
        return None

    def _holes_max(self) -> int:
        """How many holes a lane's row may have, and after a start its memory: with those late in hand, also what was read ahead, and those
        held back by their keys."""
        settings = self.world.plan.settings
        hands_max = (
            settings.queue_events_max
            + settings.in_flight_max
            + settings.unrecorded_max
            + settings.slots
            + lane.URGENT_MAX
        )
        return lane.HOLES_MAX + keys.HELD_BACK_MAX + hands_max

    def invariant(self, event_ids: Iterable[int] | None = None) -> None:
        """DESIGN §4 for these events, or for all that aren't final."""
        tables = self.tables
        of_account: defaultdict[str, list[tuple[int, list[SubscriptionRow]]]] = defaultdict(list)
        of_endpoint: defaultdict[int, list[SubscriptionRow]] = defaultdict(list)
        for s in tables.subscriptions.values():
            of_endpoint[s.endpoint_id].append(s)
        for endpoint in tables.endpoints.values():
            if endpoint.state is not EndpointState.DELETED:
                of_account[endpoint.account_id].append((endpoint.id, of_endpoint[endpoint.id]))
        for event_id in list(self._open) if event_ids is None else event_ids:
            event = tables.outbox.get(event_id)
            if event is None:
                self._open.pop(event_id, None)
                continue
            is_final = True
            for endpoint_id, subscriptions in of_account[event.account_id]:
                matching = [s for s in subscriptions if matches(s, event)]
                if matching and not self._is_final(event, endpoint_id, matching):
                    is_final = False
            if is_final:
                self._open.pop(event_id, None)

    def _is_final(self, event: LogRow, endpoint_id: int, matching: list[SubscriptionRow]) -> bool:
        tables = self.tables
        attempts = [a for a in tables.attempts_of.get((event.id, endpoint_id), ()) if a.run == 0]
        if attempts:
            if attempts[-1].fault is None or attempts[-1].number == 0:
                if (event.id, 0) in tables.retries.get(endpoint_id, {}):
                    self.fail(f"event {event.id} is settled for endpoint {endpoint_id}, and a retry row is there")
                return True
            if (endpoint_id, event.id, 0) in tables.dead_letters:
                return True
            retry = tables.retries.get(endpoint_id, {}).get((event.id, 0))
            if retry is None or retry.number != attempts[-1].number + 1:
                self.fail(f"event {event.id}, endpoint {endpoint_id}: {attempts[-1]} failed, and {retry} follows")
            return False
        row = tables.lanes.get(endpoint_id)
        if not (
            event.id > tables.position
            or event.id in tables.gaps
            or (row is not None and (event.id > row.settled or event.id in row.holes))
            or any(not s.taken_up for s in matching)
        ):
            self.fail(
                f"event {event.id}, endpoint {endpoint_id}: neither settled nor to be read again "
                f"(position {tables.position}, gaps {tables.gaps}, lane {row})"
            )
        return False

    def _runs(self) -> None:
        """A run passes over what was visible when it was asked for; what commits later is delivered as any new event is."""
        tables = self.tables
        for run_id, (endpoint_id, run) in tables.runs.items():
            endpoint = tables.endpoints[endpoint_id]
            seen_before = self._visible_before[run_id]
            if endpoint.state is EndpointState.DELETED or self.world.plan.has("retention"):
                continue
            keys = [key for key in tables.attempts if key[1] == endpoint_id and key[2] == run_id]
            seen, delivered = {key[0] for key in keys}, sum(tables.attempts[key].fault is None for key in keys)
            if (run.attempted, run.delivered) != (len(seen), delivered):
                self.fail(f"{run} counts otherwise than its attempts say: {len(seen)} attempted, {delivered} delivered")
            if run.source is RunSource.LOG and not run.only_failed and run.state is not RunState.CANCELED:
                for row in tables.between(run.after_id + 1, min(run.upto_id, run.settled), 10_000, endpoint.account_id):
                    if (
                        row in seen_before
                        and row.id not in seen
                        and any(pattern_matches(p, row.type) for p in run.patterns)
                        and passes(run.rule, row.type, row.payload)
                    ):
                        self.fail(f"event {row.id} was passed over by {run}")

    # ── the end ──

    def unsettled(self) -> list[str]:
        """Say what isn't settled yet, once everything is well."""
        tables, found = self.tables, []
        last_id = self.world.database.last_id()
        if tables.position != last_id or tables.gaps.lows:
            found.append(f"position {tables.position} of {last_id}, gaps {tables.gaps}")
        live = {i for i, row in tables.endpoints.items() if row.state is not EndpointState.DELETED}
        found += [f"lane row {row}" for i, row in tables.lanes.items() if i in live]
        found += [f"retries {list(rows)[:3]} of {i}" for i, rows in tables.retries.items() if rows and i in live]
        found += [
            f"run {run_id} {run}" for run_id, (i, run) in tables.runs.items() if i in live and run_id not in tables.runs_finished
        ]  # fmt: skip
        found += [
            f"{s} is not taken up" for s in tables.subscriptions.values() if s.endpoint_id in live and not s.taken_up
        ]
        return found

    def undelivered(self) -> list[str]:
        """Say which delivery has no end though everything is settled."""
        tables, found = self.tables, []
        for event in tables.outbox.values():
            for endpoint in tables.endpoints.values():
                if endpoint.account_id != event.account_id or endpoint.state is EndpointState.DELETED:
                    continue
                if not any(matches(s, event) for s in tables.subscriptions.values() if s.endpoint_id == endpoint.id):
                    continue
                attempts = [a for a in tables.attempts_of.get((event.id, endpoint.id), ()) if a.run == 0]
                if (
                    not any(a.fault is None or a.number == 0 for a in attempts)
                    and (endpoint.id, event.id, 0) not in tables.dead_letters
                ):
                    found.append(f"event {event.id} was not delivered to endpoint {endpoint.id}: {attempts}")
        return found

    def left_over(self, process: "Process") -> list[str]:
        """Say what an idle dispatcher still holds."""
        incarnation = process.engine.incarnation
        assert incarnation is not None
        found = []
        sender, memory = incarnation.sender, incarnation.lanes.memory
        shares = sender.shares
        if sender.in_flight or shares._origins or any(s.held or s.line for s in shares._all):
            found.append(
                f"{sender.in_flight} in flight, shares {[(s.held, len(s.line)) for s in shares._all]}, {shares._origins}"
            )
        if memory.events or memory.bytes or incarnation.recorder.unrecorded:
            found.append(f"{memory.events} events in memory, {incarnation.recorder.unrecorded} unrecorded")
        for a_lane in incarnation.lanes:
            if (
                a_lane.hands
                or a_lane.late
                or a_lane.retry_hands
                or a_lane.connecting
                or a_lane.holes
                or not a_lane.live
            ):
                found.append(f"{a_lane}: hands {a_lane.hands}, late {a_lane.late}, {a_lane.retry_hands}")
            if a_lane.keys is not None and (len(a_lane.keys) or a_lane.keys.held_back or not a_lane.keys.are_known):
                found.append(f"{a_lane}: {a_lane.keys}")
            if a_lane.backlog or a_lane.runs or a_lane.low_in_flight or a_lane.row is not None:
                found.append(
                    f"{a_lane}: backlog {a_lane.backlog}, runs {a_lane.runs}, {a_lane.low_in_flight} low in flight"
                )
        return found

    def stopped(self, process: "Process") -> None:
        """After an orderly stop nothing that was answered is sent again, unless the database was away for longer than the stop may take."""
        incarnation = process.engine.incarnation
        if (
            incarnation is not None
            and not incarnation.recorder.unrecorded
            and (left := incarnation.sender.watch.left())
        ):
            self.fail(f"{process.name} has stopped, and {left} were answered, and not recorded")

    # ── memory ──

    def bounds(self, process: "Process") -> None:
        incarnation = process.engine.incarnation
        if process.halted or incarnation is None or incarnation.sender.abandoned:
            return
        settings, memory = self.world.plan.settings, incarnation.lanes.memory
        watch = incarnation.sender.watch
        held = {id(d.event) for d in watch.in_flight}
        for a_lane in incarnation.lanes:
            held.update(id(event) for event in a_lane.fresh())
            held.update(id(retry.event) for retry in a_lane.retries)
            if a_lane.queued() > settings.queue_events_max + settings.in_flight_max + lane.URGENT_MAX:
                self.fail(f"{a_lane}: {a_lane.queued()} queued")
            if a_lane.keys is not None:
                pages = reader.HEAD_ROWS + catchup.PAGE_ROWS
                if len(a_lane.keys) > keys.KEYS_MAX + pages or len(a_lane.keys.held_back) > keys.HELD_BACK_MAX:
                    self.fail(f"{a_lane}: {a_lane.keys}")
            if len(a_lane.holes) > self._holes_max():
                self.fail(f"{a_lane}: {len(a_lane.holes)} holes")
            if len(a_lane.retries) > lane.RETRIES_MAX + 1:
                self.fail(f"{a_lane}: {len(a_lane.retries)} retries")
        if memory.events != len(held):
            self.fail(f"{process.name}: {memory.events} events are counted in memory, {len(held)} are there")
        page = max(
            reader.HEAD_ROWS, catchup.PAGE_ROWS, lane.RETRIES_MAX, lane.URGENT_MAX
        )  # any of them may be the one that fills it
        if memory.events > settings.memory_events_max + page:
            self.fail(f"{process.name}: {memory.events} events in memory, of {settings.memory_events_max}")
        if len(incarnation.reader.gaps.old) > gaps.OLD_MAX or len(incarnation.reader.gaps.young) > gaps.YOUNG_MAX + 1:
            self.fail(f"{process.name}: {len(incarnation.reader.gaps.old)} gaps")
        if incarnation.recorder.unrecorded > settings.unrecorded_max + settings.slots:
            self.fail(f"{process.name}: {incarnation.recorder.unrecorded} results unrecorded")

    def watch_sender(self, sender: "WatchedSender", process: "Process") -> "SenderWatch":
        self.incarnations += 1
        return SenderWatch(self, sender, process, self.incarnations)


def matches(s: SubscriptionRow, event: LogRow) -> bool:
    until_id = FOREVER if s.until_id is None else s.until_id
    is_in_range = s.since_id < event.id <= until_id and pattern_matches(s.pattern, event.type)
    return is_in_range and passes(s.rule, event.type, event.payload)


def passes(rule: Rule | None, event_type: str, payload: bytes) -> bool:
    """Judge filters as people.py draws them, without the product's code."""
    if rule is None or event_type.startswith("endpoint."):
        return True
    colour = json.loads(payload).get("colour") if event_type in ("mail.sent", "link.clicked") else None
    return colour in rule._values["colour"]


@dataclass
class Meter:
    """A second count of tokens: never more than rate·t + burst."""

    bucket: Any
    rate: float
    burst: int
    tokens: float
    at: float


class SenderWatch:
    """One incarnation's POSTs."""

    def __init__(self, checker: Checker, sender: "WatchedSender", process: "Process", incarnation: int) -> None:
        self.checker, self.sender, self.process, self.incarnation = checker, sender, process, incarnation
        self.in_flight: dict[Delivery, None] = {}
        self.meters: dict[Any, Meter] = {}
        self.unrecorded: dict[tuple[int, int, int, int], None] = {}

    def left(self) -> list[tuple[int, int, int, int]]:
        """What was answered and never recorded, unless the server has lost its memory, or the event is gone."""
        checker, epoch = self.checker, self.sender._recorder._epoch
        if self.process.store._life != checker.world.database.life:
            return []
        return [
            key for key in self.unrecorded if (epoch, *key) not in checker.recorded and key[0] in checker.tables.outbox
        ]

    def occupied(self, delivery: Delivery) -> None:
        self.in_flight[delivery] = None

    def vacated(self, delivery: Delivery) -> None:
        if delivery not in self.in_flight:
            self.checker.fail(f"{delivery} ended twice")
        self.in_flight.pop(delivery, None)

    def answered(self, delivery: Delivery, outcome: Any) -> None:
        if not self.sender.abandoned:
            self.unrecorded[delivery.event.id, delivery.lane.id, delivery.run, delivery.number] = None
            self.checker.world.trace(f"{self.process.name} {delivery} {outcome.fault} {outcome.status}")

    def _key(self, delivery: Delivery) -> tuple[Any, ...]:
        return (self.incarnation, delivery.event.public_id, delivery.lane.id, delivery.run, delivery.number)

    def was_not_seen(self, delivery: Delivery) -> None:
        """The receiver has seen nothing of it, so it may be sent once more."""
        self.unrecorded.pop((delivery.event.id, delivery.lane.id, delivery.run, delivery.number), None)
        self.checker.posted.discard(self._key(delivery))

    def posting(self, delivery: Delivery, connection: Any) -> None:
        checker, sender, a_lane = self.checker, self.sender, delivery.lane
        checker.posts += 1
        checker.world.trace(f"{self.process.name} posts {delivery}{' again' if delivery.again else ''}")
        for judge in (
            self._may,
            self._limits,
            self._configuration,
            self._twice,
            self._erased,
            self._stale,
            self._order,
        ):
            wrong = judge(delivery, connection)
            if wrong:
                checker.fail(
                    f"{self.process.name}, epoch {sender._recorder._epoch}, posts {delivery}: {wrong}; {a_lane}"
                )

    def _may(self, delivery: Delivery, connection: Any) -> str | None:
        checker, sender = self.checker, self.sender
        if sender.abandoned or sender.held_by or checker.now >= sender.lease_until:
            return f"held by {sender.held_by}, lease until {sender.lease_until}"
        since, ruling = checker.epochs[-1]
        epoch = sender._recorder._epoch
        if epoch != ruling and since < checker.now - LEASE_S - EARLY:
            return f"epoch {ruling} has ruled since {since:.3f}"
        ended = checker.life_ended_at.get(self.process.store._life or 0, checker.now)
        if ended < checker.now - LEASE_S - EARLY:
            return f"the server lost its memory at {ended:.3f}"
        return None

    def _limits(self, delivery: Delivery, connection: Any) -> str | None:
        checker, sender, a_lane = self.checker, self.sender, delivery.lane
        settings = checker.world.plan.settings
        mine = [d for d in self.in_flight if d.lane is a_lane]
        if len(self.in_flight) != sender.in_flight or len(self.in_flight) > settings.slots:
            return f"{len(self.in_flight)} in flight, counted {sender.in_flight}, of {settings.slots} slots"
        allowed = a_lane.endpoint.in_flight_max or settings.in_flight_max
        if len(mine) != a_lane.in_flight or (len(mine) > allowed and not delivery.again):
            return f"{len(mine)} in flight, counted {a_lane.in_flight}, of {allowed}"
        everywhere = [(sender.shares._all, settings.slots, self.in_flight)]
        for origin, shares in sender.shares._origins.items():
            here = [d for d in self.in_flight if any(share.origin == origin for share in d.shares)]
            everywhere.append((shares, checker.world.network.limits.sockets_per_origin_max, here))
        for shares, room, deliveries in everywhere:
            for share, part in zip(shares, (0.25, 0.25, 0.5, 0.75), strict=True):
                held = sum(share in d.shares for d in deliveries)
                if held != share.held or held > max(1, int(room * part)):
                    return f"{held} in a share of {share.limit}, counted {share.held}"
        if a_lane.breaker.state is BreakerState.OPEN and not delivery.again:
            return "the breaker is open"
        if a_lane.breaker.state is BreakerState.HALF_OPEN and not delivery.again:
            probes = sum(d.probe for d in mine)
            if not delivery.probe or probes > 1:
                return f"the breaker is half-open, and {probes} probes are in flight"
        return None if delivery.again else self._rate(a_lane)

    def _rate(self, a_lane: Any) -> str | None:
        bucket, endpoint, now = a_lane.bucket, a_lane.endpoint, self.checker.now
        if bucket is None:
            return None
        rate, burst = endpoint.rate_per_s, endpoint.rate_burst or max(1, round(endpoint.rate_per_s))
        meter = self.meters.get(a_lane)
        if meter is None or meter.bucket is not bucket:
            meter = self.meters[a_lane] = Meter(bucket, rate, burst, burst, now)
        meter.tokens = min(burst, meter.tokens + (now - meter.at) * max(rate, meter.rate)) - 1
        meter.rate, meter.burst, meter.at = rate, burst, now
        return None if meter.tokens > -0.001 else f"above {rate}/s and {burst}: {meter}"

    def _configuration(self, delivery: Delivery, connection: Any) -> str | None:
        checker, endpoint = self.checker, delivery.lane.endpoint
        versions = [v for v in checker.recent(endpoint.id) if v.row is not None]
        if not any(v.row.state is EndpointState.LIVE for v in versions):
            return f"the endpoint has been {[v.row.state.value for v in versions]} for a second"
        if endpoint.target is None or connection.origin != endpoint.target.origin:
            return f"sent to {connection.origin} instead of {endpoint.target}"
        if not any(v.row.url == endpoint.target.url and endpoint.secrets in self._secrets(v.row) for v in versions):
            return f"sent to {endpoint.target.url} by an old configuration"
        if delivery.is_first and not any(
            s.since_id < delivery.event.id <= (FOREVER if s.until_id is None else s.until_id)
            and pattern_matches(s.pattern, delivery.event.type)
            and passes(s.rule, delivery.event.type, delivery.event.payload)
            for v in versions
            for s in v.subscriptions
        ):
            return f"no subscription is valid for it: {versions}"
        run = checker.tables.runs.get(delivery.run)
        if run is not None and not passes(run[1].rule, delivery.event.type, delivery.event.payload):
            return f"its run leaves it out: {run}"
        return None

    def _secrets(self, row: EndpointRow) -> list[tuple[str, ...]]:
        """Those that a dispatcher may sign with: valid now, or within the time of a lease. By a clock that steps, or that was read by a process
        which froze over it, it is any that once did."""
        now_us, plan = self.checker.world.database.now_us(), self.checker.world.plan
        if plan.has("wall clock") or plan.has("freeze"):
            return [row.at(at_us).secrets for at_us in (0, *(at_us for _, at_us in row.expiring))]
        since_us = now_us - int((LEASE_S + EARLY) * 1e6)
        ends = [at_us for _, at_us in row.expiring if since_us < at_us <= now_us]
        return [row.at(at_us).secrets for at_us in (since_us, now_us, *ends)]

    def _erased(self, delivery: Delivery, connection: Any) -> str | None:
        """What was erased is not sent; a dead letter's copy is another matter."""
        since = self.checker.erased.get(delivery.event.id, self.checker.now)
        if (
            since >= self.checker.now - LEASE_S - EARLY
            or delivery.again
            or self.process.store._life != self.checker.world.database.life
        ):
            return None
        return f"it was erased at {since:.3f}"

    def _twice(self, delivery: Delivery, connection: Any) -> str | None:
        checker = self.checker
        key = self._key(delivery)
        if key in checker.posted:
            return "sent a second time, and nothing explains it"
        checker.posted.add(key)
        tables = checker.tables
        if self._row(delivery) is None:
            return None
        if (delivery.event.id, delivery.lane.id, delivery.run, delivery.number) in tables.attempts:
            return "sent a second time, though the first is recorded"
        return None

    def _row(self, delivery: Delivery) -> LogRow | None:
        """The event's row, if the dispatcher is the one that rules and the server still knows what it has seen."""
        checker, event = self.checker, delivery.event
        row = checker.tables.outbox.get(event.id)
        if row is None or row.created_us != event.created_us or self.sender._recorder._epoch != checker.tables.epoch:
            return None
        return row if checker.world.database.life == self.process.store._life else None

    def _stale(self, delivery: Delivery, connection: Any) -> str | None:
        expires_us = delivery.event.expires_us
        if delivery.run or delivery.again or expires_us is None or expires_us > delivery.started_us:
            return None
        return f"it expired at {expires_us}, and it is {delivery.started_us}"

    def _order(self, delivery: Delivery, connection: Any) -> str | None:
        """No event of a key is sent for the first time while an earlier one of it, that could be seen, is not settled for good. A commit after
        its own explains it, and one that came so late that only a look into old gaps finds it."""
        checker, a_lane, key = self.checker, delivery.lane, delivery.event.ordering_key
        if not delivery.is_first or delivery.again or key is None or a_lane.keys is None or a_lane.id in checker.spared:
            return None
        event, incarnation = self._row(delivery), self.process.engine.incarnation
        if event is None or incarnation is None or incarnation.sender is not self.sender:
            return None
        for earlier in checker.tables.between(1, event.id - 1, event.id, event.account_id):
            if (
                earlier.ordering_key == key
                and any(
                    s.matches(earlier.type, earlier.id) and passes(s.rule, earlier.type, earlier.payload)
                    for s in a_lane.endpoint.subscriptions
                )
                and not self._is_over(earlier, a_lane.id)
                and checker.came_before(earlier, event)
                and not incarnation.reader.gaps.comes_late(earlier.id, a_lane.hands[event.id])
            ):
                return f"event {earlier.id} goes before it by key {key}, and is not settled"
        return None

    def _is_over(self, event: LogRow, endpoint_id: int) -> bool:
        tables = self.checker.tables
        attempts = [a for a in tables.attempts_of.get((event.id, endpoint_id), ()) if a.run == 0]
        return (endpoint_id, event.id, 0) in tables.dead_letters or any(
            a.fault is None or a.number == 0 for a in attempts
        )
