"""Configuration while running: what changed, and the lease that lets deliveries start.

A NOTIFY or at the latest 0.4 s later, changes are read by their number. Each successful look is also a **lease** on
sending, counted from the moment before it began: nothing starts more than 0.9 s after the last look. So no POST starts
later than a second after a pause has returned, also when the database stops answering; and a process that was frozen
starts nothing before it has seen that its epoch still rules.

What changes by time alone is asked for again at its time: a secret that expires stops signing though nobody changed a
row.

The few updates of endpoint rows (disabled, failing since, recovered) go through here as well, on the configuration's
own session: somebody's open transaction on such a row delays the note, never the recorder.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

import structlog

from dispatcher.domain.endpoint import FORCED, Endpoint
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, is_wanted
from dispatcher.engine.sender import Sender
from dispatcher.ports import Store, StoreAwayError

_log = structlog.get_logger(room="config")

POLL_S = 0.4
LEASE_S = 0.9
AWAY_WAIT_S = 0.1


class ConfigWatcher:
    def __init__(
        self, store: Store, lanes: Lanes, sender: Sender, clock: Clock, counters: Counters, *, seq: int, epoch: int,
        endpoints: Iterable[Endpoint], head: Callable[[], int], changed: Callable[[Lane], None],
        after_read: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._lanes = lanes
        self._sender = sender
        self._clock = clock
        self._counters = counters
        self._seq = seq
        self._epoch = epoch
        self._head = head
        self._changed = changed
        self._after_read = after_read
        self._wake = asyncio.Event()
        self._looked = asyncio.Event()
        self._failing: dict[int, int | None] = {}  # endpoint → since µs, to be noted
        self._failing_long: dict[int, int] = {}  # endpoint → since when, to be told
        self._recovered: dict[int, int] = {}  # endpoint → since when it had been failing, to be told
        self._disable: dict[int, tuple[str, int | None]] = {}
        self._reload_at: dict[int, int] = {}  # endpoint → µs, when it reads differently without a change
        for endpoint in endpoints:
            self._note_reload(endpoint)

    def ring(self) -> None:
        self._wake.set()

    async def reached(self, seq: int) -> None:
        """Return when every change up to `seq` has been applied."""
        while self._seq < seq:
            self._wake.set()
            self._looked.clear()
            await self._looked.wait()

    def note_failing(self, lane: Lane, was_us: int | None) -> None:
        """A lane began to fail, or delivers again after it had been failing since `was_us`. Who was told of the one is told of the other."""
        self._failing[lane.id] = lane.failing_since_us
        if was_us is not None and lane.failing_told:
            lane.failing_told = False
            if self._failing_long.pop(lane.id, None) is None:
                self._recovered[lane.id] = was_us

    def tell_failing(self, lane: Lane) -> None:
        """A lane has been failing for long: its account is told once, until it has recovered."""
        assert lane.failing_since_us is not None
        lane.failing_told = True
        if self._recovered.pop(lane.id, None) is None:  # of that nobody was told yet, so nothing has changed
            self._failing_long[lane.id] = lane.failing_since_us
        self._wake.set()

    def disable(self, lane: Lane, reason: str) -> None:
        """Ask for the endpoint to be disabled; its lane stops when the change comes back."""
        if lane.id not in self._disable and not lane.held:
            _log.warning("endpoint.disabling", endpoint_id=lane.id, reason=reason)
            self._disable[lane.id] = (reason, lane.failing_since_us)
            self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.look()
                await self._write_notes()
            except StoreAwayError as exc:
                self._counters.store_away += 1
                _log.warning("config.away", error=str(exc))
                await asyncio.sleep(AWAY_WAIT_S)
                continue
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # poll

    async def look(self) -> None:
        """Read and apply what changed, then extend the lease."""
        began, wall_us = self._clock.now(), self._clock.wall_us()
        again = [endpoint_id for endpoint_id, at_us in self._reload_at.items() if at_us <= wall_us]
        changes = await self._store.config_changes(self._seq, self._epoch, again)
        now, head = self._clock.now(), self._head()
        self._clock.align(began, changes.wall_us, now)
        for endpoint in changes.endpoints:
            self._note_reload(endpoint)
            if is_wanted(endpoint):
                lane = self._lanes.configure(endpoint, now, head)
                _log_configured(endpoint)
                self._changed(lane)
        for endpoint_id in changes.gone:
            self._reload_at.pop(endpoint_id, None)
            if self._lanes.remove(endpoint_id) is not None:
                _log.info("endpoint.deleted", endpoint_id=endpoint_id)
        for endpoint_id in changes.forget:
            self._forget(endpoint_id)
            # A read that is under way may have seen them, and may take its time: once it has been applied, all of that is let go of too.
            self._after_read(partial(self._forget, endpoint_id))
        self._seq = changes.seq
        self._looked.set()
        if changes.more:
            self._wake.set()
            return  # no lease: what is paused may be among the rest
        if began + LEASE_S > self._sender.lease_until:
            lapsed = self._sender.lease_until <= now
            self._sender.lease_until = began + LEASE_S
            if lapsed:
                self._sender.pump_soon()

    def _note_reload(self, endpoint: Endpoint) -> None:
        if endpoint.reload_at_us is None:
            self._reload_at.pop(endpoint.id, None)
        else:
            self._reload_at[endpoint.id] = endpoint.reload_at_us

    def _forget(self, endpoint_id: int) -> None:
        """Events were erased: let go of what is in memory; what is left of it is read again."""
        lane = self._lanes.get(endpoint_id)
        if lane is not None:
            self._lanes.fall_behind(lane, self._head(), drop=True)
            if lane.keys is not None:
                lane.keys.are_known = False  # retries were erased too
            self._changed(lane)

    async def _write_notes(self) -> None:
        for endpoint_id, (reason, since_us) in list(self._disable.items()):
            await self._store.disable_endpoint(endpoint_id, reason, since_us)
            del self._disable[endpoint_id]
            self._wake.set()  # read our own change
        for endpoint_id, since_us in list(self._recovered.items()):
            # Before the note that it isn't failing: by the older note the store knows that this was not told yet.
            await self._store.tell_recovered(endpoint_id, since_us)
            _log.info("endpoint.recovered", endpoint_id=endpoint_id)
            del self._recovered[endpoint_id]
        for endpoint_id, since_us in list(self._failing_long.items()):
            del self._failing_long[endpoint_id]  # first: a recovery meanwhile is to be told of too
            try:
                await self._store.tell_failing(endpoint_id, since_us)
            except StoreAwayError:
                if endpoint_id not in self._recovered:
                    self._failing_long[endpoint_id] = since_us
                raise
            _log.warning("endpoint.failing", endpoint_id=endpoint_id)
        if self._failing:
            notes, self._failing = self._failing, {}
            try:
                await self._store.note_failing(notes)
            except StoreAwayError:
                self._failing = notes | self._failing
                raise


def _log_configured(endpoint: Endpoint) -> None:
    tell = _log.warning if FORCED in (endpoint.state_reason or "") else _log.info
    tell("endpoint.configured", endpoint_id=endpoint.id, state=endpoint.state.value, reason=endpoint.state_reason)
