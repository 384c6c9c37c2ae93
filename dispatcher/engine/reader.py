"""The reader: the one coroutine that reads the log, one read after another.

A *turn* is the head with the young gaps, to their end, then one page of one other kind: old gaps, a lagging lane (what
has priority first), keys that are free again, an endpoint's due retries, or a run (a resend, a replay). So no lane that
is behind touches another's latency. What a read found is applied in one go, without an await: head, gaps, cursors and
queues change together.

When nothing is new, the reader polls a few times and then tries to sleep: it arms the doorbell, looks once more at the
head and at every open gap, and waits to be rung. While it sleeps it still serves lanes and retries, and looks once a
second in case a ring was lost. Rung, it reads and sleeps on; only when rings come fast does it disarm and poll.

A batch that was committed while a read was under way is released only after that read has been applied: what the read
saw may predate the commit, and only the lane's hands say then that an event is settled.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from math import inf

import structlog

from dispatcher.domain.event import Event
from dispatcher.engine.catchup import CATCH_UP_LEAVES, PAGE_ROWS, READ_BYTES_MAX, CatchUp, ReadGate
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.gaps import Gaps, Look
from dispatcher.engine.keys import NEVER
from dispatcher.engine.lane import Lane
from dispatcher.engine.lanes import CROWD, Lanes
from dispatcher.errors import DatabaseRefusedError
from dispatcher.ports import HeadPage, Page, Started, Store, Summary

_log = structlog.get_logger(room="reader")

HEAD_ROWS = 1_000
FIRST_ROWS = 16  # after a start each comes with the attempts of all endpoints; then twice as many a page
HEAD_OFFERS = 2_000  # deliveries that one page may become at once: events for ten thousand endpoints each would hold the loop for seconds
POLL_S = 0.0005  # between polls while events were just coming
POLLS_AT_ONCE = 2  # a timer of uvloop's waits a millisecond at the least, a poll takes a fifth of one
POLLS_BEFORE_SLEEP = 6
DOZE_RETRY_MAX_S = 0.02  # while a transaction that chose silence keeps us awake
ASLEEP_POLL_S = 1.0
RINGS_PER_S, RINGS_WINDOW_S = 100, 0.05  # above that rate the doorbell is disarmed, and the reader polls
FULL_WAIT_S = 0.02  # at the memory bound: 400 deliveries at 20,000 a second
CROWDS_S = 0.1  # between two looks for whose crowd it is: 12 ms with 10,000 lanes, a third of the process's time when each wait had one


class Reader:
    """`offered` is called for each lane that got something to send; `position` tells the highest position written or being written;
    `configured` waits until a change of configuration has been applied."""

    def __init__(
        self,
        store: Store,
        lanes: Lanes,
        clock: Clock,
        counters: Counters,
        *,
        offered: Callable[[Lane], None],
        position: Callable[[], int],
        configured: Callable[[int], Awaitable[None]],
        doorbell: bool,
        poll_s: float,
        gate: ReadGate,
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
        self._configured = configured
        self._doorbell = doorbell
        self._poll_s = poll_s
        self._last_id = 0  # the last id handed out, as of the read before
        self._start_last_id = 0
        self._head_rows, self._gap_rows = HEAD_ROWS, PAGE_ROWS
        self._crowds_at = 0.0  # when to look for one again
        self._wake = asyncio.Event()
        self._rung = True  # the head must be read
        self._head_first = False  # … before anything else
        self._rings = 0
        self._rings_since = 0.0
        self._gate = gate
        self.catch_up = CatchUp(
            store, lanes, clock, counters, self.gaps, gate, head=lambda: self.head, offered=offered, wake=self._wake.set
        )
        self._others: deque[Callable[[], Awaitable[bool]]] = deque(
            (
                self._read_gaps,
                self.catch_up.read_urgent,
                self.catch_up.read_keys,
                self.catch_up.read_lagging,
                self.catch_up.read_retries,
                self.catch_up.read_runs,
            )
        )

    # ── told by others; all atomic ──

    def begin(self, started: Started) -> None:
        self.head = started.position
        self._last_id = started.position
        self._start_last_id = started.last_id
        self._head_rows = self._gap_rows = FIRST_ROWS
        gaps = started.gaps.copy()
        gaps.clip(started.position)
        self.gaps.restore(gaps)
        for endpoint_id, due_us in started.retries_due.items():
            lane = self._lanes.get(endpoint_id)
            if lane is not None:
                self.catch_up.note_retry(lane, due_us)

    def ring(self) -> None:
        """Something was committed."""
        self._rung = True
        self._rings += 1
        self._wake.set()

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
            elif self.catch_up.is_wanted and self._lanes.memory.leaves(CATCH_UP_LEAVES):
                await asyncio.sleep(0)
            elif self.asleep:
                longest_s = self._asleep_since + ASLEEP_POLL_S - self._clock.now()
                await self._wait(min(longest_s, FULL_WAIT_S) if self.catch_up.is_wanted else longest_s)
            elif idle_polls <= POLLS_AT_ONCE:
                await asyncio.sleep(0)
            elif idle_polls < POLLS_BEFORE_SLEEP:
                await self._wait(POLL_S)
            elif not self._doorbell:
                await self._wait(self._poll_s)
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
        self._gate.applied()

    async def _wait(self, longest_s: float) -> None:
        """Wait for a wake-up, the next retry, the next look at a gap, or `longest_s`."""
        now = self._clock.now()
        wait_s = longest_s
        if self.gaps and not self._lanes.memory.is_full and (not self.asleep or self.gaps.is_pending):
            wait_s = min(wait_s, self.gaps.next_at(now) - now)
        wait_s = min(wait_s, self.catch_up.next_at() - now)
        try:
            async with asyncio.timeout(max(wait_s, POLL_S)):
                await self._wake.wait()
        except TimeoutError:
            pass  # the loop looks at everything there is to do

    # ── sleeping ──

    async def _fall_asleep(self) -> bool:
        """Arm the doorbell and look once more; False if someone who chose silence is still there, or something came."""
        self._gate.begin()
        armed = await self._store.arm_doorbell()
        self._gate.applied()
        if not armed:
            return False
        self.asleep = True
        self._asleep_since = self._clock.now()
        self._counters.sleeps += 1
        # Twice: the first read learns the last id after its snapshot, the second sees everything up to it.
        came = await self._read_head_to_end()
        came = await self._read_head_to_end() or came
        came = await self._read_gaps(holders=True) or came
        if came:
            await self._get_up()
        return True

    async def _get_up(self) -> None:
        self.asleep = False
        self._counters.wake_ups += 1
        self._gate.begin()
        await self._store.disarm_doorbell()
        self._gate.applied()

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
            self._gate.begin()
            page = await self._store.head(self.head, limit, READ_BYTES_MAX, young, attempted=attempted)
            self._counters.head_reads += 1
            await self._configured(page.config_seq)  # an edit holds for whatever is committed after it
            more = self._apply_head(page)
            self._gate.applied()
            came = came or bool(page.events)
            if not more:
                return came

    def _apply_head(self, page: HeadPage) -> bool:
        """Give a page's events to their lanes, as many as may be at once; return whether there is more to read."""
        if page.last_id < self._last_id:
            raise DatabaseRefusedError(
                f"the ids of webhook.outbox went back, from {self._last_id} to {page.last_id}, while events were read: was a backup restored "
                "under a running dispatcher? Start it again, and it says what to do"
            )
        now = self._clock.now()
        old_head, attempted = self.head, page.attempted
        offers = applied = 0
        above: list[int] = []
        for event in page.events:
            if offers >= HEAD_OFFERS:
                break
            skip = attempted[applied] if attempted is not None else ()
            applied += 1
            if event.id <= old_head:  # these come first: a lane without room for one falls behind at the old head
                self.gaps.found_young(event.id)
                offers += self._found(event, skip, now)
            else:
                above.append(event.id)
                offers += self._offer(event, skip, now)
        is_cut = applied < len(page.events)
        self._head_rows = max(1, applied) if is_cut else min(HEAD_ROWS, 2 * self._head_rows)
        more = page.full or is_cut
        last_seen = above[-1] if above else old_head
        self.head = last_seen if more else max(self._last_id, last_seen)
        self.gaps.passed(old_head, self.head, above, now)
        self.gaps.age(now)
        self._last_id = max(self._last_id, page.last_id)
        self._head_first = self._head_first and more
        self._counters.events_read += applied
        return more

    def _offer(self, event: Event, skip: Sequence[int], now: float) -> int:
        """Give an event above the old head to its live lanes; a lane without room falls behind before it. Return how many want it."""
        wanting = self._lanes.wanting(event)
        for lane in wanting:
            if not lane.live:
                lane.passed_by(event)
                if lane.urgent_after is not None:
                    self.catch_up.look(lane)
            elif event.id not in lane.hands and lane.id not in skip:
                if not lane.takes(now):
                    self._lanes.fall_behind(lane, event.id - 1, drop=lane.cant_send(now))
                    lane.passed_by(event)
                    self.catch_up.look(lane)
                elif self._lanes.take(lane, event, now):
                    self._offered(lane)
                else:
                    lane.backlog += 1
        if not wanting:
            self._counters.events_unwanted += 1
        return len(wanting)

    def _found(self, event: Event, skip: Sequence[int], now: float, unread_from: float = inf) -> int:
        """Give an event that appeared in a gap to its lanes. A lagging lane with its cursor below meets it itself. Return how many want it.
        A hole may be an earlier one of its key; among young ids from `unread_from` on there may be one that has come since they were read."""
        wanting = self._lanes.wanting(event)
        for lane in wanting:
            if event.id in lane.hands or lane.id in skip or event.id in lane.holes:
                continue
            if not lane.live and event.id > lane.cursor:
                lane.passed_by(event)
                if lane.urgent_after is not None:
                    self.catch_up.look(lane)
            elif lane.keys is not None and event.ordering_key is not None and lane.keys.holds(event.ordering_key):
                # Passed over, also where there is no room: the key's next is read from here on, or from a hole that may be an earlier one.
                self._lanes.take(lane, event, now)
                if lane.holes:
                    lane.keys.read_from(event.ordering_key, lane.holes.lows[0])
                lane.backlog += 1
            elif lane.takes(now) and (lane.keys is None or not (lane.holes or event.id > unread_from)):
                self._lanes.take(lane, event, now)
                if event.id <= self._position():
                    lane.late.add(event.id)
                self._offered(lane)
            else:
                lane.add_hole(event.id)
                lane.backlog += 1
                self._lanes.fall_behind(lane, self.head, drop=lane.cant_send(now))
                self.catch_up.look(lane)
        if not wanting:
            self._counters.events_unwanted += 1
        return len(wanting)

    async def _head_room(self) -> int:
        """Return how many rows the head may bring; 0 at the memory bound."""
        memory = self._lanes.memory
        room = 0 if memory.is_full else memory.events_max - memory.events
        if room >= memory.head_events:
            return min(self._head_rows, room)
        now = self._clock.now()
        if now >= self._crowds_at:
            for lane in self._lanes.crowds():
                # One lane's crowd, not the process's limit: that lane lags, the head goes on.
                self._lanes.fall_behind(lane, self.head, drop=True)
                self.catch_up.look(lane)
                self._counters.crowded_out += 1
                if not memory.is_full:
                    return min(self._head_rows, memory.head_events)
            self._crowds_at = now + CROWDS_S
        self._rung = True  # come back for the head
        self._counters.memory_waits += 1
        await self._wait(FULL_WAIT_S)
        return 0

    # ── other kinds, one page a turn ──

    async def _read_other(self) -> bool:
        """Read one page of one other kind, the kinds taking turns; return whether it brought something or there is more."""
        self.catch_up.look_again()
        if self._head_first:
            return False  # it had no room
        for _ in range(len(self._others)):
            read = self._others[0]
            self._others.rotate(-1)
            if await read():
                return True
        return False

    async def _read_gaps(self, *, holders: bool = False) -> bool:
        """Look at what may have come in old gaps; with `holders` first at who may still fill them, however quiet it is."""
        if not self.gaps.old:
            return False
        if holders or self.gaps.wants_holders(self._clock.now()):
            self._gate.begin()
            held_by = await self._store.holders()
            self.gaps.note_holders(held_by, self._clock.now())
            self._gate.applied()
        looks = self.gaps.looks(self._clock.now())
        if not looks or self._lanes.memory.is_full:
            return False
        if looks[0].sums:
            return await self._sum_up(looks)
        self._gate.begin()
        rows = min(PAGE_ROWS, self._gap_rows)
        pages = await self._store.probe([(look.low, look.high) for look in looks], rows, READ_BYTES_MAX)
        applied = self._found_all(pages)
        is_all = applied == sum(len(page.events) for page in pages)
        self._gap_rows = min(PAGE_ROWS, 2 * rows) if is_all else max(1, applied)
        for look, page in zip(looks, pages, strict=True):
            found = [event.id for event in page.events[:applied]]
            is_cut = applied < len(page.events)
            applied -= len(found)
            self.gaps.looked(look, found, page.full or is_cut)
        came = any(page.events for page in pages)
        self._counters.gap_reads += 1
        self._gate.applied()
        return came

    def _found_all(self, pages: Sequence[Page], *, at_once: bool = False) -> int:
        """Give what came in gaps to its lanes, as much as may be in one turn of the loop, or all; return how many of the events."""
        now, unread_from = self._clock.now(), min(self.gaps.young, default=inf)
        offers = applied = 0
        for page in pages:
            assert page.attempted is not None
            for event, skip in zip(page.events, page.attempted, strict=True):
                if offers >= HEAD_OFFERS and not at_once:
                    break
                applied += 1
                offers += self._found(event, skip, now, unread_from)
        if applied and unread_from < inf:
            self._rung = self._head_first = True  # it is read before what was passed over for it
        return applied

    async def _sum_up(self, looks: Sequence[Look]) -> bool:
        """Look at what one large transaction left, all of which has come. A lane that has a crowd of it, or is behind anyway, reads it for
        itself; the rest comes by its rows, and what nobody wants not at all."""
        ranges = [(look.low, look.high) for look in looks]
        began = self._clock.now()
        self._gate.begin()
        groups = await self._store.summary(ranges)
        wanted: list[tuple[Summary, dict[Lane, None]]] = []
        parts: dict[Lane, tuple[int, int]] = {}  # how many events there are for it, and from which id on
        for group in groups:
            routes = self._lanes.routes(group.account_id, group.event_type)
            lanes = {
                lane: None for lane, since_id, until_id, _ in routes if since_id < group.high and until_id >= group.low
            }
            wanted.append((group, lanes))
            for lane in lanes:
                events, low = parts.get(lane, (0, NEVER))
                parts[lane] = events + group.events, min(low, group.low)
        crowds = {lane: low for lane, (events, low) in parts.items() if events > CROWD}
        little = {lane for lane, (_, low) in parts.items() if lane not in crowds and (lane.live or lane.cursor >= low)}
        needed = [group for group, lanes in wanted if not little.isdisjoint(lanes)]
        accounts, types = {group.account_id for group in needed}, {group.event_type for group in needed}
        asked, rest = list[tuple[Summary, dict[Lane, None]]](), list[tuple[Summary, dict[Lane, None]]]()
        for group, lanes in wanted:
            (asked if group.account_id in accounts and group.event_type in types else rest).append((group, lanes))
        pages = list[Page]()
        too_many = (
            sum(group.events for group, _ in asked) >= PAGE_ROWS
            or sum(group.events * len(lanes) for group, lanes in asked) >= HEAD_OFFERS
        )
        if needed and not too_many:
            pages = await self._store.probe(ranges, PAGE_ROWS, READ_BYTES_MAX, (sorted(accounts), sorted(types)))
            too_many = any(page.full for page in pages)
        self._counters.gap_reads += 1
        if too_many:
            self.gaps.by_rows(looks)
        else:
            for lane, low in crowds.items():
                if not lane.gone and (lane.live or lane.cursor >= low):
                    self._lanes.go_back(lane, low - 1, self.head)
            for group, lanes in rest:
                for lane in lanes:
                    lane.passed_by_many(group.events, group.low - 1, urgent=group.urgent)
            self.gaps.summed(looks, sum(group.events for group in groups))
            self._found_all(pages, at_once=True)  # they are closed now
            for lane in parts:
                self.catch_up.look(lane)
        now = self._clock.now()
        self.gaps.rest(now, now - began, sum(group.events for group in groups))
        self._gate.applied()
        return bool(groups)
