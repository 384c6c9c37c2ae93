"""The reader: the one coroutine that reads the log, one read after another.

A *turn* is the head with the young gaps, to their end, then one page of one other kind: old gaps, a lagging lane, or an
endpoint's due retries. So no lane that is behind touches another's latency. What a read found is applied in one go,
without an await: head, gaps, cursors and queues change together.

When nothing is new, the reader polls a few times and then tries to sleep: it arms the doorbell, looks once more at the
head and at every open gap, and waits to be rung. While it sleeps it still serves lanes and retries, and looks once a
second in case a ring was lost. Rung, it reads and sleeps on; only when rings come fast does it disarm and poll.

A batch that was committed while a read was under way is released only after that read has been applied: what the read
saw may predate the commit, and only the lane's hands say then that an event is settled.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from dispatcher.domain.event import Event
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import Lanes, wanting
from dispatcher.ports import HeadPage, Started, Store

_log = structlog.get_logger(room="reader")

HEAD_ROWS = 1_000
PAGE_ROWS = 200  # of other kinds: a page must not hold up the head
READ_BYTES_MAX = 4 << 20
SCAN_IDS_MAX = 200_000  # how many ids one page of a lagging lane may pass over
POLL_S = 0.0005  # between polls while events were just coming
POLLS_AT_ONCE = 2  # a timer of uvloop's waits a millisecond at the least, a poll takes a fifth of one
POLLS_BEFORE_SLEEP = 6
DOZE_RETRY_MAX_S = 0.02  # while a transaction that chose silence keeps us awake
ASLEEP_POLL_S = 1.0
RINGS_PER_S, RINGS_WINDOW_S = 100, 0.05  # above that rate the doorbell is disarmed, and the reader polls
FULL_WAIT_S = 0.02  # at the memory bound: 400 deliveries at 20,000 a second


class Reader:
    """`offered` is called for each lane that got something to send; `position` tells the highest position written or being written."""

    def __init__(
        self,
        store: Store,
        lanes: Lanes,
        clock: Clock,
        counters: Counters,
        *,
        offered: Callable[[Lane], None],
        position: Callable[[], int],
        doorbell: bool,
        poll_s: float,
        gaps: Gaps | None = None,
    ) -> None:
        self.head = 0
        self.gaps = Gaps() if gaps is None else gaps  # an empty one is falsy
        self.asleep = False
        self._store = store
        self._lanes = lanes
        self._clock = clock
        self._counters = counters
        self._offered = offered
        self._position = position
        self._doorbell = doorbell
        self._poll_s = poll_s
        self._last_id = 0  # the last id handed out, as of the read before
        self._start_last_id = 0
        self._wake = asyncio.Event()
        self._rung = True  # the head must be read
        self._rings = 0
        self._rings_since = 0.0
        self._reading = False
        self._after_read: list[Callable[[], None]] = []
        self._lagging: dict[Lane, None] = {}  # want a page, in turn
        self._retrying: dict[Lane, None] = {}
        self._retry_times: list[tuple[int, int]] = []  # heap of (due_us, endpoint id); stale entries are skipped
        self._others: deque[Callable[[], object]] = deque()

    # ── told by others; all atomic ──

    def begin(self, started: Started) -> None:
        self.head = started.position
        self._last_id = started.position
        self._start_last_id = started.last_id
        gaps = started.gaps.copy()
        gaps.clip(started.position)
        self.gaps.restore(gaps)
        for endpoint_id, due_us in started.retries_due.items():
            lane = self._lanes.get(endpoint_id)
            if lane is not None:
                self.note_retry(lane, due_us)

    def ring(self) -> None:
        """Something was committed."""
        self._rung = True
        self._rings += 1
        self._wake.set()

    def look(self, lane: Lane) -> None:
        """A lane may want a page now: it has room, may send again, or has retries due."""
        if lane.gone:
            return
        now = self._clock.now()
        if (not lane.live or lane.holes) and lane.room(now):
            self._lagging[lane] = None
            self._wake.set()
        if lane.next_retry_us is not None and lane.next_retry_us <= self._clock.wall_us() and lane.retry_room(now):
            self._retrying[lane] = None
            self._wake.set()

    def note_retry(self, lane: Lane, due_us: int) -> None:
        """A retry row is there, due at `due_us`."""
        if lane.next_retry_us is None or due_us < lane.next_retry_us:
            lane.next_retry_us = due_us
            heapq.heappush(self._retry_times, (due_us, lane.id))
            self._wake.set()

    def after_read(self, action: Callable[[], None]) -> None:
        """Run `action` when no read is under way that began before now."""
        if self._reading:
            self._after_read.append(action)
        else:
            action()

    # ── the loop ──

    async def run(self) -> None:
        """Read for ever. Raises what the store raises; StoreAwayError leaves everything as it was, so `run` may be called again."""
        idle_polls = 0
        doze_retry_s = POLL_S
        while True:
            self._wake.clear()
            rung, self._rung = self._rung, False
            came = False
            if rung:
                self.gaps.watch_now()
            if rung or not self.asleep or self._slept_long():
                came = await self._read_head_to_end()
                if came and self.asleep and (not rung or self._rings_often()):
                    await self._get_up()
            if await self._read_other() or came:
                idle_polls, doze_retry_s = 0, POLL_S
                await asyncio.sleep(0)  # others' turn, also when every read is answered at once
                continue
            idle_polls += 1
            if self._lanes.memory.is_full:
                await self._wait(FULL_WAIT_S)
            elif self._lagging or self._retrying:
                await asyncio.sleep(0)
            elif self.asleep:
                await self._wait(self._asleep_since + ASLEEP_POLL_S - self._clock.now())
            elif not self._doorbell:
                await self._wait(self._poll_s)
            elif idle_polls <= POLLS_AT_ONCE:
                await asyncio.sleep(0)
            elif idle_polls < POLLS_BEFORE_SLEEP:
                await self._wait(POLL_S)
            elif not await self._fall_asleep():
                doze_retry_s = min(doze_retry_s * 2, DOZE_RETRY_MAX_S)
                await self._wait(doze_retry_s)

    def lost_connection(self) -> None:
        """The reader's session was lost: the doorbell's lock and what was known about lock holders went with it."""
        self.asleep = False
        self._rung = True
        self.gaps.forget_barriers()
        self.stopped()

    def stopped(self) -> None:
        """Whatever read was under way will never be applied: release what waited for it."""
        self._applied()

    async def _wait(self, longest_s: float) -> None:
        """Wait for a wake-up, the next retry, the next look at a gap, or `longest_s`."""
        now = self._clock.now()
        wait_s = longest_s
        if self.gaps and not self._lanes.memory.is_full and (not self.asleep or self.gaps.is_pending):
            wait_s = min(wait_s, self.gaps.next_at(now) - now)
        if self._retry_times:
            wait_s = min(wait_s, (self._retry_times[0][0] - self._clock.wall_us()) / 1e6)
        try:
            async with asyncio.timeout(max(wait_s, POLL_S)):
                await self._wake.wait()
        except TimeoutError:
            pass  # the loop looks at everything there is to do

    # ── sleeping ──

    async def _fall_asleep(self) -> bool:
        """Arm the doorbell and look once more; False if someone who chose silence is still there, or something came."""
        self._reading = True
        armed = await self._store.arm_doorbell()
        self._applied()
        if not armed:
            return False
        self.asleep = True
        self._asleep_since = self._clock.now()
        self._counters.sleeps += 1
        # Twice: the first read learns the last id after its snapshot, the second sees everything up to it.
        came = await self._read_head_to_end()
        came = await self._read_head_to_end() or came
        came = await self._read_gaps(every=True) or came
        if came:
            await self._get_up()
        return True

    async def _get_up(self) -> None:
        self.asleep = False
        self._counters.wake_ups += 1
        self._reading = True
        await self._store.disarm_doorbell()
        self._applied()

    def _rings_often(self) -> bool:
        """Tell whether ringing costs producers more than polling costs us.

        A NOTIFY holds a database-wide lock through its commit's flush, so ringing commits come one flush after another: on
        a disk that takes a millisecond for it, a thousand a second at the most. Below the bound the doorbell stays armed
        while events come one by one: a ring arrives sooner than the next poll.
        """
        now = self._clock.now()
        elapsed = now - self._rings_since
        if elapsed < RINGS_WINDOW_S:
            return False
        often = self._rings > RINGS_PER_S * elapsed
        self._rings, self._rings_since = 0, now
        return often

    def _slept_long(self) -> bool:
        now = self._clock.now()
        if self.asleep and now - self._asleep_since >= ASLEEP_POLL_S:
            self._asleep_since = now
            return True
        return False

    # ── the head ──

    async def _read_head_to_end(self) -> bool:
        """Read until nothing more is there; return whether anything was."""
        came = False
        while True:
            limit = await self._head_room()
            if limit == 0:
                return came
            young = list(self.gaps.young)
            attempted = self._start_last_id > 0 and (
                self.head < self._start_last_id or any(event_id <= self._start_last_id for event_id in young)
            )
            if not attempted:
                self._start_last_id = 0  # everything from here on is this owner's alone
            self._reading = True
            page = await self._store.head(self.head, limit, READ_BYTES_MAX, young, attempted=attempted)
            self._counters.head_reads += 1
            moved = self._apply_head(page)
            self._applied()
            came = came or moved
            if not page.full:
                return came

    def _apply_head(self, page: HeadPage) -> bool:
        now = self._clock.now()
        old_head = self.head
        attempted = page.attempted
        split = 0
        # Before the head moves: a lane without room for one of these falls behind at the old head, or it would never see what lies above.
        for event in page.events:
            if event.id > old_head:
                break
            self.gaps.found_young(event.id)
            self._found(event, attempted[split] if attempted is not None else (), now)
            split += 1
        above = page.events[split:]
        last_seen = above[-1].id if above else old_head
        self.head = last_seen if page.full else max(self._last_id, last_seen)
        self.gaps.passed(old_head, self.head, [event.id for event in above], now)
        for n, event in enumerate(above, start=split):
            self._offer(event, attempted[n] if attempted is not None else (), now)
        self.gaps.age(now)
        self._last_id = max(self._last_id, page.last_id)
        self._counters.events_read += len(page.events)
        return bool(page.events)

    def _offer(self, event: Event, skip: Sequence[int], now: float) -> None:
        """Give an event above the old head to its live lanes; a lane without room falls behind before it."""
        wanted = False
        for lane in wanting(self._lanes.routes(event.account_id, event.type), event.id):
            wanted = True
            if not lane.live:
                lane.backlog += 1
            elif event.id not in lane.hands and lane.id not in skip:
                if lane.takes(now):
                    self._lanes.take(lane, event, now)
                    self._offered(lane)
                else:
                    self._lanes.fall_behind(lane, event.id - 1, drop=lane.cant_send(now))
                    lane.backlog += 1
                    self.look(lane)
        if not wanted:
            self._counters.events_unwanted += 1

    def _found(self, event: Event, skip: Sequence[int], now: float) -> None:
        """Give an event that appeared in a gap to its lanes. A lagging lane whose cursor is below meets it by itself."""
        wanted = False
        for lane in wanting(self._lanes.routes(event.account_id, event.type), event.id):
            wanted = True
            if (
                event.id in lane.hands
                or lane.id in skip
                or event.id in lane.holes
                or (not lane.live and event.id > lane.cursor)
            ):
                continue
            fits = lane.takes(now)
            if fits:
                self._lanes.take(lane, event, now)
                if event.id <= self._position():
                    lane.late.add(event.id)
                self._offered(lane)
            else:
                lane.add_hole(event.id)
                self._lanes.fall_behind(lane, self.head, drop=lane.cant_send(now))
                self.look(lane)
        if not wanted:
            self._counters.events_unwanted += 1

    async def _head_room(self) -> int:
        """Return how many rows the head may bring; 0 at the memory bound."""
        memory = self._lanes.memory
        least = min(HEAD_ROWS, memory.events_max) // 4  # a read for a handful of rows costs what one for hundreds costs
        room = 0 if memory.is_full else memory.events_max - memory.events
        if room >= least:
            return min(HEAD_ROWS, room)
        largest, mean = self._lanes.largest()
        if largest is not None and len(largest.queue) > 4 * mean + 64:
            # One lane's crowd, not the process's limit: that lane lags, the head goes on.
            self._lanes.fall_behind(largest, self.head, drop=True)
            self.look(largest)
            self._counters.crowded_out += 1
            return least if not memory.is_full else 0
        self._rung = True  # come back for the head
        self._counters.memory_waits += 1
        await self._wait(FULL_WAIT_S)
        return 0

    # ── other kinds, one page a turn ──

    async def _read_other(self) -> bool:
        """Read one page of one other kind, the kinds taking turns; return whether it brought something or there is more."""
        if not self._others:
            self._others.extend((self._read_gaps, self._read_lagging, self._read_retries))
        self._due_retries()
        for _ in range(len(self._others)):
            read = self._others[0]
            self._others.rotate(-1)
            result = read()
            if await result:  # type: ignore[misc]
                return True
        return False

    async def _read_gaps(self, *, every: bool = False) -> bool:
        now = self._clock.now()
        if not self.gaps.old:
            return False
        if every or self.gaps.wants_holders(now):
            self._reading = True
            holders = await self._store.holders()
            self.gaps.note_holders(holders, self._clock.now())
            self._applied()
        wanted = self.gaps.to_probe(now, every=every)
        if not wanted or self._lanes.memory.is_full:
            return False
        # Whether it closes is decided before the read: only a statement that begins after the barrier opened may close.
        asked = [(gap, self.gaps.asked(gap), gap.is_closing) for gap in wanted]
        for gap in wanted:
            gap.probe_now = gap.is_closing
        began = self._clock.now()
        self._reading = True
        pages = await self._store.probe([span for _, span, _ in asked], PAGE_ROWS, READ_BYTES_MAX)
        now = self._clock.now()
        found_any = False
        for (gap, span, closing), page in zip(asked, pages, strict=True):
            assert page.attempted is not None
            if page.full and not page.events:
                gap.probe_now = True
            self.gaps.probed(gap, span, closing, [event.id for event in page.events], page.full)
            for event, skip in zip(page.events, page.attempted, strict=True):
                found_any = True
                self._found(event, skip, now)
        self.gaps.probe_took(found_any, now - began, now)
        self._counters.gap_reads += 1
        self._applied()
        return found_any

    async def _read_lagging(self) -> bool:
        while self._lagging and not self._lanes.memory.is_full:
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
        self._reading = True
        pages = await self._store.holes(lane.endpoint.account_id, holes, min(room, PAGE_ROWS), READ_BYTES_MAX)
        now = self._clock.now()
        progress = False
        for (low, high), page in zip(holes, pages, strict=True):
            assert page.attempted is not None
            if lane.gone or (page.full and not page.events):
                continue
            passed = high
            for event, skip in zip(page.events, page.attempted, strict=True):
                if event.id not in lane.holes or event.id in self.gaps:
                    continue
                if self._is_due(lane, event, skip):
                    if not lane.accepts(now):
                        passed = event.id - 1
                        break
                    self._lanes.take(lane, event, now)
                    lane.late.add(event.id)
                    self._offered(lane)
            else:
                if page.full:
                    passed = page.events[-1].id
            progress = self._fill_holes(lane, low, passed) or progress
        self._applied()
        return progress

    def _fill_holes(self, lane: Lane, low: int, high: int) -> bool:
        """Take low … high out of the lane's holes, also ids in open gaps: the gap path delivers those. (A hole that waited for a gap to close
        kept the lane from reading on.)"""
        if high < low:
            return False
        before = lane.holes.count()
        lane.holes.remove(low, high)
        return lane.holes.count() < before

    async def _read_account(self, first: Lane, room: int) -> bool:
        """Read the next page of an account for `first` and every other lagging lane of it that stands within the page."""
        head, after = self.head, first.cursor
        upto = min(head, after + SCAN_IDS_MAX)
        account_id = first.endpoint.account_id
        sharers = [
            lane for lane in self._lanes.of_account(account_id)
            if lane is not first and not lane.live and not lane.holes and after <= lane.cursor < upto and lane.room(self._clock.now())
        ]  # fmt: skip
        types = first.endpoint.exact_types() if not sharers else None
        moved = {lane: lane.moved for lane in (first, *sharers)}
        limit = PAGE_ROWS if sharers else min(room, PAGE_ROWS)
        self._reading = True
        page = await self._store.account(account_id, after, upto, types, limit, READ_BYTES_MAX)
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
        self._applied()
        return progress

    def _take_page(
        self, lane: Lane, events: Sequence[Event], attempted: Sequence[Sequence[int]], passed: int, now: float
    ) -> None:
        """Move a lagging lane over a page: up to `passed`, or to where it has no more room. At the head it is live again."""
        before = lane.cursor
        for event, skip in zip(events, attempted, strict=True):
            if event.id <= before or event.id in self.gaps or event.id in lane.holes:
                continue
            if not self._is_due(lane, event, skip):
                continue
            if not lane.accepts(now):
                passed = event.id - 1
                break
            self._lanes.take(lane, event, now)
            lane.late.discard(event.id)
            lane.backlog = max(0, lane.backlog - 1)
            self._offered(lane)
        if passed > before:
            lane.cursor = passed
            lane.moved += 1
        if lane.cursor >= self.head and not lane.holes and not lane.cant_send(now):
            lane.live = True
            lane.backlog = 0
            self._counters.caught_up += 1

    def _is_due(self, lane: Lane, event: Event, skip: Sequence[int]) -> bool:
        """Tell whether an event that was read again still has to be sent: valid, without an attempt row, and not in the lane's hands."""
        if event.id in lane.hands or lane.id in skip:
            return False
        return any(s.matches(event.type, event.id) for s in lane.endpoint.subscriptions)

    # ── retries ──

    def _due_retries(self) -> None:
        """Find whose retries have become due."""
        now_us = self._clock.wall_us()
        while self._retry_times and self._retry_times[0][0] <= now_us:
            _, endpoint_id = heapq.heappop(self._retry_times)
            lane = self._lanes.get(endpoint_id)
            if lane is not None and lane.next_retry_us is not None and lane.next_retry_us <= now_us:
                self.look(lane)

    async def _read_retries(self) -> bool:
        while self._retrying and not self._lanes.memory.is_full:
            lane = next(iter(self._retrying))
            del self._retrying[lane]
            room = 0 if lane.gone else lane.retry_room(self._clock.now())
            if not room:
                continue
            in_hand = len(lane.retry_hands)
            lane.next_retry_us = None  # what is noted from here on is younger than the page
            moved = lane.moved
            self._reading = True
            try:
                page = await self._store.due_retries(lane.id, room + in_hand, READ_BYTES_MAX)
            except BaseException:
                self.note_retry(lane, 0)  # it still wants them
                raise
            self._counters.retry_reads += 1
            more = page.full
            came = False
            if lane.moved != moved and lane.held:
                more = True
            elif not lane.gone:
                for retry in page.retries:
                    key = (retry.event.id, retry.run)
                    if key in lane.retry_hands:
                        continue
                    if len(lane.retries) >= room:
                        more = True
                        break
                    lane.retry_hands.add(key)
                    lane.retries.append(retry)
                    self._lanes.memory.hold(retry.event)
                    came = True
                if came:
                    self._offered(lane)
            if more:
                self.note_retry(lane, 0)
            elif page.next_due_us is not None:
                self.note_retry(lane, page.next_due_us)
            self._applied()
            return came
        return False

    # ── after a read ──

    def _applied(self) -> None:
        """A read has been applied: release what waited for that."""
        self._reading = False
        if self._after_read:
            actions, self._after_read = self._after_read, []
            for action in actions:
                action()
