"""Who writes to the database besides the dispatcher: producers with their transactions, and operators who change the configuration.

Each transaction is a task of its own, so that they overlap, commit out of order, and are cut off wherever a crash finds them.
"""

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dispatcher.domain.endpoint import EndpointState
from dispatcher.domain.filters import Rule
from dispatcher.domain.run import RunState
from dispatcher.store.memory_database import CannotPrepareError, Transaction, TransactionOverError, WouldBlockError

if TYPE_CHECKING:
    from tests.simulation.world import World

ACCOUNTS = ("a", "a", "b")
TYPES = ("mail.sent", "mail.sent", "mail.bounced", "link.clicked")
PATTERNS = ("*", "mail.*", "mail.sent", "link.clicked")
COLOURS = (b"red", b"red", b"blue", b"green")
ENDPOINTS_MAX = 9
EVENTS_MAX = 220  # a run


class People:
    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = random.Random(f"people {world.plan.seed}")
        self.options = random.Random(f"options {world.plan.seed}")
        self.later = random.Random(f"later {world.plan.seed}")
        self.erased: dict[int, str] = {}  # event → account
        self.filters = random.Random(f"filters {world.plan.seed}")
        self.prepared = 0
        self.labels = 0
        self.events = 0

    # ── producers ──

    async def produce(self) -> None:
        """Begin transactions until cancelled."""
        world, rng, plan = self.world, self.rng, self.world.plan
        while self.events < EVENTS_MAX:
            await asyncio.sleep(rng.expovariate(1 / plan.event_every_s))
            if world.database.is_up:
                world.spawn(self._transaction())
                if plan.has("bursts") and rng.random() < 0.05:
                    for _ in range(10):
                        world.spawn(self._transaction())

    async def _transaction(self) -> None:
        world, rng, plan = self.world, self.rng, self.world.plan
        tx = world.database.begin()
        try:
            if plan.has("long transactions") and rng.random() < 0.15:
                tx.lock_log()
                await asyncio.sleep(rng.choice((0.01, 0.3, 2.0)))
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                colour = b',"colour":"%b"' % self.filters.choice(COLOURS) if plan.has("filters") else b""
                payload = b'{"n":%d%b}' % (self.events, colour) + b" " * rng.choice((0, 0, 0, 40, 300))
                tx.write_row(rng.choice(ACCOUNTS), rng.choice(TYPES), payload, **self._event_options())
                self.events += 1
                if plan.has("late trigger") and rng.random() < 0.5:
                    await asyncio.sleep(rng.choice((0.0, 0.001, 0.01)))
                tx.ring()
            await asyncio.sleep(self._how_long())
            if plan.has("unknown commits") and self.later.random() < 0.1:
                await self._end_unknown(tx)
            else:
                self._end(tx)
        except TransactionOverError:
            pass  # the server is another now

    def _event_options(self) -> dict[str, Any]:
        """What producers say of an event beside what it is."""
        rng, has = self.options, self.world.plan.has
        options: dict[str, Any] = {}
        if has("ordering"):
            options["ordering_key"] = rng.choice((None, "k1", "k1", "k2", "k3", f"k{self.events}"))
        if has("expiry") and rng.random() < 0.4:
            options["expires_us"] = self.world.database.now_us() + int(rng.choice((-1.0, 0.0, 0.2, 1.0, 3.0)) * 1e6)
        if has("priority"):
            options["priority"] = rng.choice((None, None, None, 0, -3, 1, 5))
        return options

    def _how_long(self) -> float:
        rng = self.rng
        if self.world.plan.has("long transactions") and rng.random() < 0.1:
            return rng.choice((0.05, 0.15, 0.4, 1.5, 4.0))
        return rng.choice((0.0, 0.0005, 0.002, 0.01))

    def _end(self, tx: Transaction) -> None:
        rng, plan = self.rng, self.world.plan
        chance = rng.random()
        if plan.has("rollback") and chance < 0.15:
            self.world.trace(f"{[row.id for row in tx.rows]} rolled back")
            tx.rollback()
        elif plan.has("prepared") and chance < 0.3:
            self.prepared += 1
            name = f"p{self.prepared}"
            try:
                tx.prepare(name)
            except CannotPrepareError:
                return
            self.world.trace(f"{[row.id for row in tx.rows]} prepared as {name}")
            self.world.spawn(self._end_prepared(name))
        else:
            asynchronous = plan.has("asynchronous") and chance > 0.8
            self.world.trace(f"{[row.id for row in tx.rows]} committed{' asynchronously' if asynchronous else ''}")
            tx.commit(asynchronous=asynchronous)

    async def _end_unknown(self, tx: Transaction) -> None:
        """The producer is cut off during COMMIT: the server ends the transaction one way or the other, and the producer says it all again."""
        await asyncio.sleep(self.later.choice((0.0, 0.3, 2.0)))
        committed = self.later.random() < 0.5
        self.world.trace(
            f"{[row.id for row in tx.rows]} {'committed' if committed else 'rolled back'}, and nobody knows"
        )
        (tx.commit if committed else tx.rollback)()
        await self.world.until_up()
        with self.world.database.begin() as again:
            for row in tx.rows:
                again.insert(row.account_id, row.type, row.payload)

    async def _end_prepared(self, name: str) -> None:
        await asyncio.sleep(self.rng.choice((0.01, 0.2, 1.0, 4.0)))
        await self.world.until_up()
        self.end_prepared(name)

    def end_prepared(self, name: str) -> None:
        database = self.world.database
        if name in database.tables.prepared:
            committed = self.rng.random() < 0.7
            self.world.trace(f"{name} {'committed' if committed else 'rolled back'}")
            (database.commit_prepared if committed else database.rollback_prepared)(name)

    # ── operators ──

    def found(self) -> None:
        """Make the first endpoints, before there is any event."""
        with self.world.database.begin() as tx:
            for _ in range(self.rng.choice((2, 3, 5))):
                self._add(tx)

    async def operate(self) -> None:
        world, rng = self.world, self.rng
        changes = self._changes()
        while changes:
            await asyncio.sleep(rng.expovariate(1 / (1.5 * world.plan.disaster_every_s)))
            if world.database.is_up:
                world.spawn(self._change(rng.choice(changes)))

    def _changes(self) -> list[Callable[[Transaction], object]]:
        has = self.world.plan.has
        changes: list[Callable[[Transaction], object]] = []
        if has("pause"):
            changes += [self._pause, self._resume, self._resume]
        if has("delete"):
            changes += [self._delete, self._add]
        if has("change"):
            changes += [self._move, self._rotate, self._limit]
        if has("subscriptions"):
            changes += [self._subscribe, self._unsubscribe, self._add]
        if has("ordering"):
            changes += [self._order]
        if has("filters"):
            changes += [self._refilter]
        if has("runs"):
            changes += [self._replay, self._replay, self._resend_dead, self._change_run]
        if has("expiring secrets"):
            changes += [self._rotate_with_overlap, self._rotate_with_overlap]
        if has("skip"):
            changes += [self._pause, self._resume_and_skip]
        if has("erasure"):
            changes += [self._erase]
        return changes

    async def _change(self, change: Callable[[Transaction], object]) -> None:
        tx = self.world.database.begin()
        try:
            change(tx)
            if self.rng.random() < 0.4:
                await asyncio.sleep(self.rng.choice((0.001, 0.1, 0.6)))
            if self.rng.random() < 0.1:
                tx.rollback()
            else:
                tx.commit()
                self.world.note(f"{change.__name__.lstrip('_')} {tx.changed_endpoints}")
        except TransactionOverError:
            pass
        except WouldBlockError:
            tx.rollback()

    def _some(self, *states: EndpointState) -> int | None:
        rows = [row.id for row in self.world.database.tables.endpoints.values() if row.state in states]
        return self.rng.choice(rows) if rows else None

    def _url(self) -> str:
        self.labels += 1
        return f"http://{self.rng.choice(list(self.world.network.hosts))}/{self.labels}"

    def _secret(self) -> str:
        return "whsec_" + self.rng.choice(("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "LaLaSw8GKYqrTwjUPD8ILPZIo2MfKQ9r"))

    def _limits(self) -> dict[str, float | int | None]:
        rng = self.rng
        return {
            "rate_per_s": rng.choice((None, None, 8.0, 30.0, 0.9 if rng.random() < 0.2 else 5.0)),
            "rate_burst": rng.choice((None, 1, 3)),
            "in_flight_max": rng.choice((None, 1, 2, 5)),
        }

    def _add(self, tx: Transaction) -> None:
        if len(self.world.database.tables.endpoints) >= ENDPOINTS_MAX:
            return
        url = self._url()
        patterns = self.rng.choice((("*",), (self.rng.choice(PATTERNS),), ("mail.sent", "link.clicked")))
        timeout_ms = self.rng.choice((300, 1_000, 3_000))
        account_id = self.rng.choice(ACCOUNTS)
        ordering = self._ordering() if self.world.plan.has("ordering") else "off"
        endpoint_id = tx.add_endpoint(
            account_id, url, patterns=patterns, secrets=(self._secret(),), timeout_ms=timeout_ms, ordering=ordering, **self._limits(),
            rule=self._rule() if self.world.plan.has("filters") else None,
        )  # fmt: skip
        self.world.paths[url.rpartition("/")[2]] = endpoint_id

    def _pause(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE)) is not None:
            tx.pause(endpoint_id)

    def _resume(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.PAUSED, EndpointState.DISABLED)) is not None:
            tx.resume(endpoint_id)

    def _delete(self, tx: Transaction) -> None:
        if (
            self.rng.random() < 0.4
            and (endpoint_id := self._some(EndpointState.LIVE, EndpointState.PAUSED)) is not None
        ):
            tx.delete_endpoint(endpoint_id)

    def _move(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE)) is not None:
            url = self._url()
            self.world.paths[url.rpartition("/")[2]] = endpoint_id
            tx.update_endpoint(endpoint_id, url=url)

    def _rotate(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE)) is not None:
            tx.update_endpoint(endpoint_id, secrets=(self._secret(),))

    def _rotate_with_overlap(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE)) is not None:
            tx.rotate_secret(endpoint_id, self._secret(), int(self.rng.choice((0.2, 1.5, 4.0)) * 1e6))

    def _resume_and_skip(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.PAUSED)) is not None:
            tx.resume_and_skip(endpoint_id)

    def _erase(self, tx: Transaction) -> None:
        tables = self.world.database.tables
        dead = self._dead()
        found = [row for row in tables.outbox.values() if row.id not in dead]
        waiting = [row for row in found if row.id not in tables.attempted]
        if found:
            row = self.rng.choice(waiting or found)
            tx.erase_event(row.id, row.account_id)
            self.erased[row.id] = row.account_id

    def _dead(self) -> set[int]:
        """The events with dead letters, whose copies this doesn't erase."""
        return {event_id for _, event_id, _ in self.world.database.tables.dead_letters}

    def _limit(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE)) is not None:
            tx.update_endpoint(endpoint_id, **self._limits())

    def _ordering(self) -> str:
        return self.options.choice(("off", "block", "block", "give_up_after 1", "give_up_after 2"))

    def _order(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE, EndpointState.PAUSED)) is not None:
            tx.update_endpoint(endpoint_id, ordering=self._ordering())
            self.world.checker.spared.add(endpoint_id)  # order counts from then on, and nobody knows when that was

    def _rule(self) -> Rule | None:
        """Draw filters, or none. `mail.bounced` has no colour to filter by."""
        colours = self.filters.choice(((), ("red",), ("blue", "green")))
        fields = {event_type: {"colour": [["colour"]]} for event_type in ("mail.sent", "link.clicked")}
        return Rule({"colour": colours}, fields) if colours else None

    def _refilter(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE, EndpointState.PAUSED)) is not None:
            self.world.checker.spared.add(endpoint_id)  # as in _subscribe
            tx.refilter(endpoint_id, self._rule())

    def _subscribe(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE, EndpointState.PAUSED)) is not None:
            self.world.checker.spared.add(endpoint_id)  # it is sent what it was not subscribed to when it passed
            rule = self.world.database.tables.endpoints[endpoint_id].rule
            tx.subscribe(endpoint_id, self.rng.choice(PATTERNS), rule=rule)

    def _unsubscribe(self, tx: Transaction) -> None:
        open_ones = [s.id for s in self.world.database.tables.subscriptions.values() if s.until_id is None]
        if open_ones:
            tx.unsubscribe(self.rng.choice(open_ones))

    def _replay(self, tx: Transaction) -> None:
        if (endpoint_id := self._some(EndpointState.LIVE, EndpointState.PAUSED)) is not None:
            last_id = self.world.database.last_id()
            after_id = self.rng.randint(0, last_id)
            upto_id = self.rng.randint(after_id, last_id)
            patterns = self.rng.choice((("*",), ("mail.*",)))
            rate = self.rng.choice((None, 20.0, 5.0))
            only_failed = self.rng.random() < 0.3
            tx.add_run(
                endpoint_id, upto_id, after_id=after_id, patterns=patterns, only_failed=only_failed, rate_per_s=rate
            )

    def _resend_dead(self, tx: Transaction) -> None:
        letters = [key for key, dead in self.world.database.tables.dead_letters.items() if dead.resent_run is None]
        if letters:
            first = self.rng.choice(letters)
            tx.add_run(
                first[0], dead=[key for key in letters if key[0] == first[0] and self.rng.random() < 0.7] or [first]
            )

    def _change_run(self, tx: Transaction) -> None:
        tables = self.world.database.tables
        runs = [(i, run) for i, (_, run) in tables.runs.items() if i not in tables.runs_finished]
        if runs:
            run_id, run = self.rng.choice(runs)
            if run.state is RunState.PAUSED:
                tx.update_run(run_id, state=RunState.RUNNING)
            elif run.state is RunState.RUNNING:
                tx.update_run(run_id, state=self.rng.choice((RunState.PAUSED, RunState.CANCELED)))

    # ── the end ──

    def put_right(self) -> None:
        """End every transaction, put every endpoint live and every run to work."""
        database = self.world.database
        for tx in database.open_transactions:
            tx.rollback() if self.rng.random() < 0.5 else tx.commit()
        for name in list(database.tables.prepared):
            self.end_prepared(name)
        with database.begin() as tx:
            dead = self._dead()  # one is again that a crash brought back
            for event_id, account_id in self.erased.items():
                if event_id not in dead:
                    tx.erase_event(event_id, account_id)  # what was in flight may have come back since
            for row in list(database.tables.endpoints.values()):
                if row.state in (EndpointState.PAUSED, EndpointState.DISABLED):
                    tx.resume(row.id)
                if row.rate_per_s is not None and row.rate_per_s < 10:
                    tx.update_endpoint(row.id, rate_per_s=10.0)
            for run_id, (_, run) in database.tables.runs.items():
                if run_id not in database.tables.runs_finished and run.state is RunState.PAUSED:
                    tx.update_run(run_id, state=RunState.RUNNING)
