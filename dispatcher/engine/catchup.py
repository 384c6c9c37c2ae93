"""Catching up: what lanes have to read for themselves, one page a turn of the reader.

A lagging lane reads its holes, then its account's events after its cursor, until it meets the head; before them, those
with priority, wherever they are. A lane that orders by key reads what is next of the keys that are free again. An
endpoint's due retries come from their table; a run (a resend or a replay) reads its range once more. Each is bounded in rows, bytes and
ids passed, each kind has a line in which lanes wait for their page, and whoever wants another goes to its end.

What a page found is applied without an await, and thrown away if its lane or run has moved meanwhile.
"""

import heapq
from collections.abc import Callable, Sequence
from math import inf

from dispatcher.domain.breaker import CLOSED
from dispatcher.domain.event import Event
from dispatcher.domain.run import ORIGINAL
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.keys import NEVER
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes
from dispatcher.engine.runs import LaneRun
from dispatcher.ports import DueRetry, Page, RetryPage, RunPage, Store

PAGE_ROWS = 200  # a page must not hold up the head
# Rows times lanes of a page that lanes share, as of the head's: all of it is applied in one turn of the loop.
PAGE_OFFERS = 2_000
READ_BYTES_MAX = 4 << 20
# How much of the memory is left when they stop reading, in what the head needs at the least: a page of 200 rows more leaves that.
CATCH_UP_LEAVES = 4  # lanes that are behind, and runs
DUE_LEAVES = 2  # what is next of a key, due, or has priority
RELOOK_US = 20_000
# Of two times for a lane so close to each other the first will do: the database's clock is followed in steps.
NOTED_S = 0.001
KEY_ROWS = 2  # the next event of a key, and whether there is another
SCAN_IDS_MAX = 200_000  # how many ids one page of a lagging lane may pass over


class ReadGate:
    """Says whether a read is under way, and keeps what must not happen before its result is applied: a batch that was committed meanwhile is
    released only then, because what the read saw may predate the commit, and only the lane's hands say that an event is settled."""

    def __init__(self) -> None:
        self.is_reading = False
        self._waiting: list[Callable[[], None]] = []

    def begin(self) -> None:
        self.is_reading = True

    def applied(self) -> None:
        """The read has been applied, or never will be."""
        self.is_reading = False
        if self._waiting:
            actions, self._waiting = self._waiting, []
            for action in actions:
                action()

    def after(self, action: Callable[[], None]) -> None:
        """Run `action` when no read is under way that began before now."""
        if self.is_reading:
            self._waiting.append(action)
        else:
            action()


class CatchUp:
    """The reader's other half. `offered` is called for each lane that got something to send, `wake` when there is something to read."""

    def __init__(
        self,
        store: Store,
        lanes: Lanes,
        clock: Clock,
        counters: Counters,
        gaps: Gaps,
        gate: ReadGate,
        *,
        head: Callable[[], int],
        offered: Callable[[Lane], None],
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._lanes = lanes
        self._clock = clock
        self._counters = counters
        self._gaps = gaps
        self._gate = gate
        self._head = head
        self._offered = offered
        self._wake = wake
        self._lagging: dict[Lane, None] = {}  # want a page, in turn
        self._urgent: dict[Lane, None] = {}
        self._keyed: dict[Lane, None] = {}
        self._retrying: dict[Lane, None] = {}
        self._running: dict[Lane, None] = {}
        # Heap of (when, endpoint id): a retry due, a run's next page. By the monotonic clock, since the wall clock may step back.
        self._look_times: list[tuple[float, int]] = []
        self._noted: dict[int, list[float]] = {}  # of those, a lane's for retries, the next one last

    @property
    def is_wanted(self) -> bool:
        """Tell whether a lane waits for a page."""
        return bool(self._lagging or self._retrying or self._running or self._urgent or self._keyed)

    def next_at(self) -> float:
        """Return the monotonic time when a lane must be looked at next; inf if none."""
        return self._look_times[0][0] if self._look_times else inf

    def look(self, lane: Lane) -> None:
        """A lane may want a page now: it has room, may send again, or has retries due."""
        if lane.gone:
            return
        now = self._clock.now()
        if (not lane.live or lane.holes) and lane.room(now):
            self._lagging[lane] = None
            self._wake()
        if lane.urgent_after is not None and lane.urgent_room(now):
            self._urgent[lane] = None
            self._wake()
        if lane.keys is not None and (not lane.keys.are_known or lane.keys_room(now)):
            self._keyed[lane] = None
            self._wake()
        if lane.next_retry_at is not None and lane.next_retry_at <= now and lane.retry_room(now):
            self._retrying[lane] = None
            self._wake()
        if lane.runs and lane.retry_room(now):
            at = lane.next_run_at()
            if at <= now:
                self._running[lane] = None
                self._wake()
            elif at < inf and at != lane.look_at:
                lane.look_at = at
                heapq.heappush(self._look_times, (at, lane.id))
                self._wake()

    def note_retry(self, lane: Lane, due_us: int) -> None:
        """A retry row is there, due at `due_us`."""
        at = self._clock.monotonic(due_us)
        if lane.next_retry_at is None or at < lane.next_retry_at:
            lane.next_retry_at = at
            self._look_at(lane, at)

    def _look_at(self, lane: Lane, at: float) -> None:
        """Have a lane looked at for its retries then. One that is looked at before is looked at again after that: else, of a retry that is due
        in a day, there would be one entry for each read in between."""
        noted = self._noted.setdefault(lane.id, [])
        if not noted or at < noted[-1] - NOTED_S:
            noted.append(at)
            heapq.heappush(self._look_times, (at, lane.id))
            self._wake()

    def look_again(self) -> None:
        """Look at the lanes whose time has come."""
        now = self._clock.now()
        while self._look_times and self._look_times[0][0] <= now:
            at, endpoint_id = heapq.heappop(self._look_times)
            noted = self._noted.get(endpoint_id)
            if noted and noted[-1] == at:
                noted.pop()
                if not noted:
                    del self._noted[endpoint_id]
            lane = self._lanes.get(endpoint_id)
            if lane is not None:
                self.look(lane)
                if lane.next_retry_at is not None and lane.next_retry_at > now:
                    self._look_at(lane, lane.next_retry_at)

    # ── lagging lanes ──

    async def read_lagging(self) -> bool:
        while self._lagging and self._lanes.memory.leaves(CATCH_UP_LEAVES):
            lane = next(iter(self._lagging))
            del self._lagging[lane]
            room = 0 if lane.gone else lane.room(self._clock.now())
            if not room or (lane.live and not lane.holes):
                continue
            try:
                return await (self._read_holes(lane, room) if lane.holes else self._read_account(lane, room))
            finally:
                self.look(lane)  # to the end of the line, if it wants more; also when the read failed
        return False

    async def _read_holes(self, lane: Lane, room: int) -> bool:
        """Holes first: they are the oldest. A range is done as far as a page has passed it."""
        holes = lane.holes.page(100)
        self._gate.begin()
        pages = await self._store.holes(
            lane.endpoint.account_id, holes, min(room, PAGE_ROWS), READ_BYTES_MAX, [lane.id]
        )
        now = self._clock.now()
        progress = False
        for (low, high), page in zip(holes, pages, strict=True):
            assert page.attempted is not None
            if lane.gone or (page.full and not page.events):
                continue
            passed = high
            for event, skip in zip(page.events, page.attempted, strict=True):
                if event.id not in lane.holes or self._is_in_gap(lane, event):
                    continue
                if self._is_due(lane, event, skip):
                    if not lane.accepts(now) or event.id in self._gaps.young:
                        passed = event.id - 1
                        break
                    if self._lanes.take(lane, event, now):
                        lane.late.add(event.id)
                        lane.backlog = max(0, lane.backlog - 1)
                        self._offered(lane)
            else:
                if page.full:
                    passed = page.events[-1].id
            # Also over ids in open gaps: the gap path delivers those. (A hole that waited for a gap to close kept the lane from reading on.)
            if low <= passed:
                progress = lane.fill_holes(low, passed) or progress
        self._gate.applied()
        return progress

    async def _read_account(self, first: Lane, room: int) -> bool:
        """Read the next page of an account for `first` and every other lagging lane of it that stands within the page."""
        head = self._head()
        first.pass_over(head)
        after = first.cursor
        upto = min(head, after + SCAN_IDS_MAX)
        account_id = first.endpoint.account_id
        sharers = [
            lane for lane in self._lanes.of_account(account_id)
            if lane is not first and not lane.live and not lane.holes and after <= lane.cursor < upto and lane.room(self._clock.now())
        ]  # fmt: skip
        types = first.endpoint.exact_types() if not sharers else None
        moved = {lane: lane.moved for lane in (first, *sharers)}
        limit = max(1, min(PAGE_ROWS, PAGE_OFFERS // len(moved))) if sharers else min(room, PAGE_ROWS)
        self._gate.begin()
        page = await self._store.account(
            account_id, after, upto, types, limit, READ_BYTES_MAX, [lane.id for lane in moved]
        )
        self._counters.lag_reads += 1
        now = self._clock.now()
        passed = page.events[-1].id if page.full else upto
        progress = False
        for lane, at in moved.items():
            if lane.gone or lane.live or lane.moved != at or lane.cursor > passed:
                continue
            self._take_page(lane, page.events, page.attempted or [], passed, now)
            progress = progress or lane.moved != at or lane.live
            self._lagging.pop(lane, None)
            self.look(lane)
        self._gate.applied()
        return progress

    def _take_page(
        self, lane: Lane, events: Sequence[Event], attempted: Sequence[Sequence[int]], passed: int, now: float
    ) -> None:
        """Move a lagging lane over a page: up to `passed`, or to where it has no more room. At the head it is live again."""
        before = lane.cursor
        for event, skip in zip(events, attempted, strict=True):
            if event.id <= before or self._is_in_gap(lane, event) or event.id in lane.holes:
                continue
            if not self._is_due(lane, event, skip):
                continue
            if not lane.accepts(now) or event.id in self._gaps.young:
                passed = event.id - 1
                break
            if self._lanes.take(lane, event, now):
                lane.late.discard(event.id)
                lane.backlog = max(0, lane.backlog - 1)
                self._offered(lane)
        if passed > before:
            lane.cursor = passed
            lane.moved += 1
        if lane.cursor >= self._head() and not lane.holes and not lane.cant_send(now):
            lane.live = True
            lane.urgent_after = None
            if lane.keys is None or not lane.keys.held_back:
                lane.backlog = 0
            self._counters.caught_up += 1

    def _is_due(self, lane: Lane, event: Event, skip: Sequence[int]) -> bool:
        """Tell whether an event that was read again still has to be sent: valid, without an attempt row, and not in the lane's hands."""
        if event.id in lane.hands or lane.id in skip or event.is_about(lane.id):
            return False
        return lane.is_for(event)

    def _is_in_gap(self, lane: Lane, event: Event) -> bool:
        """Tell whether the gap path is to deliver it. Not what goes by its key: from an old gap an earlier event of a key is better taken now
        than found later (a look at an old gap tells who has had it), and at a young one a page ends: the very next read of the head fills it."""
        return (lane.keys is None or event.ordering_key is None) and event.id in self._gaps

    # ── what has priority ──

    async def read_urgent(self) -> bool:
        """Read what has priority above the cursor of a lagging lane, up to the head."""
        while self._urgent and self._lanes.memory.leaves(DUE_LEAVES):
            lane = next(iter(self._urgent))
            del self._urgent[lane]
            room = 0 if lane.gone else lane.urgent_room(self._clock.now())
            if not room or lane.urgent_after is None:
                continue
            after, upto, moved = max(lane.urgent_after, lane.cursor), self._head(), lane.moved
            self._gate.begin()
            try:
                page = await self._store.urgent(lane.endpoint.account_id, after, upto, room, READ_BYTES_MAX, [lane.id])
                self._counters.urgent_reads += 1
                if not lane.gone and not lane.live and lane.moved == moved:
                    self._take_urgent(lane, page)
            finally:
                self.look(lane)
            self._gate.applied()
            return bool(page.events)
        return False

    def _take_urgent(self, lane: Lane, page: Page) -> None:
        now = self._clock.now()
        passed = page.events[-1].id if page.full else None
        for event, skip in zip(page.events, page.attempted or (), strict=True):
            if self._is_in_gap(lane, event) or not self._is_due(lane, event, skip):
                continue
            if lane.keys is not None and event.ordering_key is not None:
                continue  # its key's order goes before its priority
            if lane.cant_send(now) or (lane.breaker.state is not CLOSED and not lane.accepts(now)):
                passed = event.id - 1
                break
            self._lanes.take(lane, event, now)
            lane.backlog = max(0, lane.backlog - 1)
            self._offered(lane)
        lane.urgent_after = passed

    # ── keys that are free ──

    async def read_keys(self) -> bool:
        """Read what is next of the keys of a lane that are free; before anything else, which keys its retries hold."""
        while self._keyed and self._lanes.memory.leaves(DUE_LEAVES):
            lane = next(iter(self._keyed))
            del self._keyed[lane]
            if lane.gone or lane.keys is None:
                continue
            if not lane.keys.are_known:
                await self._read_held_keys(lane)
                return True
            room = lane.keys_room(self._clock.now())
            if not room:
                continue
            wanted, moved = lane.keys.to_read(room), lane.moved
            upto = self._head() if lane.live else lane.cursor
            self._gate.begin()
            try:
                pages = await self._store.keys(
                    lane.endpoint.account_id, wanted, upto, KEY_ROWS, READ_BYTES_MAX, [lane.id]
                )
                self._counters.key_reads += 1
                if not lane.gone and lane.moved == moved:
                    for (key, _), page in zip(wanted, pages, strict=True):
                        self._take_key(lane, key, page)
            finally:
                self.look(lane)
            self._gate.applied()
            return True
        return False

    async def _read_held_keys(self, lane: Lane) -> None:
        keys = lane.keys
        assert keys is not None
        self._gate.begin()
        try:
            retrying = await self._store.held_keys(lane.id)
            if lane.keys is keys:
                in_hand = [event_id for event_id, run in lane.retry_hands if run == ORIGINAL]
                keys.know(retrying, (*lane.hands, *in_hand))
        finally:
            self.look(lane)
        self._gate.applied()

    def _take_key(self, lane: Lane, key: str, page: Page) -> None:
        """Take the first of a key's events that is due, if the lane has room."""
        keys, now = lane.keys, self._clock.now()
        assert keys is not None
        if key not in keys.free or (page.full and not page.events):
            return
        rest = page.events[-1].id + 1 if page.full else NEVER
        for n, (event, skip) in enumerate(zip(page.events, page.attempted or (), strict=True)):
            if not self._is_due(lane, event, skip):
                continue
            if not lane.accepts(now) or event.id in self._gaps.young:
                keys.pass_over(key, event.id)
                return
            keys.take(event, page.events[n + 1].id if n + 1 < len(page.events) else rest)
            self._lanes.take_held(lane, event, now)
            lane.late.add(event.id)
            lane.backlog = max(0, lane.backlog - 1)
            self._offered(lane)
            return
        keys.pass_over(key, rest)

    # ── retries ──

    async def read_retries(self) -> bool:
        """Read due retries, of as many lanes as fit into a page: of a failing one it is a single one, to probe with."""
        wanted: list[tuple[Lane, int, int]] = []  # with its room, and where it stands
        rows = 0
        while self._retrying and rows < PAGE_ROWS and self._lanes.memory.leaves(DUE_LEAVES):
            lane = next(iter(self._retrying))
            del self._retrying[lane]
            room = 0 if lane.gone else lane.retry_room(self._clock.now())
            if room:
                lane.next_retry_at = None  # what is noted from here on is younger than the page
                wanted.append((lane, room, lane.moved))
                rows += room
        if not wanted:
            return False
        self._gate.begin()
        try:
            pages = await self._store.due_retries(
                [(lane.id, room + len(lane.retry_hands)) for lane, room, _ in wanted],
                READ_BYTES_MAX,
                without_runs=[run for lane, *_ in wanted for run in lane.idle_runs()],
            )
        except BaseException:
            for lane, *_ in wanted:
                self.note_retry(lane, 0)  # it still wants them
            raise
        self._counters.retry_reads += 1
        came = False
        for (lane, room, moved), page in zip(wanted, pages, strict=True):
            came = self._take_retries(lane, room, moved, page) or came
        self._gate.applied()
        return came

    def _take_retries(self, lane: Lane, room: int, moved: int, page: RetryPage) -> bool:
        more, came = page.full, False
        if lane.moved != moved and (lane.held or lane.stalled):
            more = True
        elif not lane.gone:
            for retry in page.retries:
                key = (retry.event.id, retry.run)
                run = lane.runs.get(retry.run)
                if key in lane.retry_hands or (run is not None and not run.is_running):
                    continue  # a run that was paused meanwhile looks again when it goes on
                if len(lane.retries) >= room:
                    more = True
                    break
                lane.retry_hands.add(key)
                lane.retries.append(retry)
                lane.may_expire = lane.may_expire or retry.event.expires_us is not None
                self._lanes.memory.hold(retry.event)
                came = True
            if came:
                self._offered(lane)
            if page.orphaned and lane.keys is not None:
                lane.keys.are_known = False
                self.look(lane)
        # A page may be cut by its bytes with all of it in hand, or the server's clock may have been put back: then not at once again.
        now_us = self._clock.wall_us()
        if more:
            self.note_retry(lane, 0 if came else now_us + RELOOK_US)
        elif page.next_due_us is not None:
            self.note_retry(lane, page.next_due_us if page.next_due_us > now_us else now_us + RELOOK_US)
        return came

    # ── runs ──

    async def read_runs(self) -> bool:
        """Read a page of a resend or replay: the same look at a range of the log as a lagging lane's, for the queue of the lower class."""
        while self._running and self._lanes.memory.leaves(CATCH_UP_LEAVES):
            lane = next(iter(self._running))
            del self._running[lane]
            now = self._clock.now()
            room = 0 if lane.gone else lane.retry_room(now)
            run = lane.next_run(now) if room else None
            if run is None:
                continue
            moved, after = run.moved, run.cursor
            self._gate.begin()
            try:
                page = await self._store.run_page(
                    lane.id, lane.endpoint.account_id, run.spec, after, run.page_rows(room), READ_BYTES_MAX
                )
                self._counters.run_reads += 1
                self._take_run_page(lane, run, page, moved)
            finally:
                self.look(lane)  # to the end of the line, if it wants more; also when the read failed
            self._gate.applied()
            return bool(page.events) or run.cursor > after
        return False

    def _take_run_page(self, lane: Lane, run: LaneRun, page: RunPage, moved: int) -> None:
        if lane.gone or lane.held or lane.stalled or not run.is_running or run.moved != moved:
            return
        taken = 0
        for event in page.events:
            if event.id in run.hands or not run.spec.is_for(event, lane.payloads):
                continue
            run.hands[event.id] = None
            lane.retries.append(DueRetry(event, run.spec.id, 1, 0))
            self._lanes.memory.hold(event)
            taken += 1
        run.cursor = page.passed
        run.took(taken, self._clock.now())
        if taken:
            self._offered(lane)
