"""Configuration while running: what changed, and the lease that lets deliveries start.

A NOTIFY or at the latest 0.4 s later, changes are read by their number. Each successful look is also a **lease** on
sending, counted from the moment before it began: nothing starts more than 0.9 s after the last look. So no POST starts
later than a second after a pause has returned, also when the database stops answering; and a process that was frozen
starts nothing before it has seen that its epoch still rules.

The few updates of endpoint rows (disabled, failing since) go through here as well, on the configuration's own session:
somebody's open transaction on such a row delays the note, never the recorder.
"""

import asyncio
from collections.abc import Callable

import structlog

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
        self, store: Store, lanes: Lanes, sender: Sender, clock: Clock, counters: Counters, *, seq: int, epoch: int, head: Callable[[], int],
        changed: Callable[[Lane], None],
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
        self._wake = asyncio.Event()
        self._failing: dict[int, int | None] = {}  # endpoint → since µs, to be noted
        self._disable: dict[int, tuple[str, int | None]] = {}

    def ring(self) -> None:
        self._wake.set()

    def note_failing(self, lane: Lane) -> None:
        self._failing[lane.id] = lane.failing_since_us

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
        began = self._clock.now()
        changes = await self._store.config_changes(self._seq, self._epoch)
        now, head = self._clock.now(), self._head()
        for endpoint in changes.endpoints:
            if is_wanted(endpoint):
                lane = self._lanes.configure(endpoint, now, head)
                _log.info("endpoint.configured", endpoint_id=endpoint.id, state=endpoint.state.value)
                self._changed(lane)
        for endpoint_id in changes.gone:
            if self._lanes.remove(endpoint_id) is not None:
                _log.info("endpoint.deleted", endpoint_id=endpoint_id)
        self._seq = changes.seq
        if began + LEASE_S > self._sender.lease_until:
            lapsed = self._sender.lease_until <= now
            self._sender.lease_until = began + LEASE_S
            if lapsed:
                self._sender.pump_soon()

    async def _write_notes(self) -> None:
        for endpoint_id, (reason, since_us) in list(self._disable.items()):
            await self._store.disable_endpoint(endpoint_id, reason, since_us)
            del self._disable[endpoint_id]
            self._wake.set()  # read our own change
        if self._failing:
            notes, self._failing = self._failing, {}
            try:
                await self._store.note_failing(notes)
            except StoreAwayError:
                self._failing = notes | self._failing
                raise
