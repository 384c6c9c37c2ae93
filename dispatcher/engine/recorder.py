"""The recorder: results in, one transaction a batch out, and the checkpoint that says what is settled.

Results collect for a few milliseconds or until a batch is full. A batch is built once; if the fate of its COMMIT is
unknown it is sent again, because every row of it is idempotent and the fence waits for the first one to end. While the
database is away results wait; above `unrecorded_max` nothing new is started. About once a second, and with the last
batch, the checkpoint goes along: position, gaps, and the rows of lanes that are behind.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable

import structlog

from dispatcher.domain.outcome import Fault, Outcome, Verdict
from dispatcher.domain.run import ORIGINAL, RunState
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.gaps import Gaps
from dispatcher.engine.histogram import Histograms
from dispatcher.engine.lane import NOTHING, Lane
from dispatcher.engine.lanes import Lanes
from dispatcher.engine.runs import LaneRun
from dispatcher.engine.stats import MINUTE_US, OVER, Stat
from dispatcher.ports import (
    AttemptRow,
    Batch,
    CheckpointWrite,
    DeadRow,
    LaneRow,
    Recorded,
    RetryRow,
    RunRow,
    StatRow,
    Store,
    StoreAwayError,
)

_log = structlog.get_logger(room="recorder")

CHECKPOINT_S = 1.0
# Of the work of a checkpoint in one turn of the loop, 0.9 µs each (0.3 where nobody else is on the two cores); and, up to five times as much, a
# fifth of the lanes that it looks at: results wait to be recorded meanwhile.
CHECKPOINT_TURN = 500
CHECKPOINT_PAUSE_S = 0.0  # between these: the loop's other turns, and in a simulation much that happens meanwhile
CHECKPOINT_GAPS_MAX = 1_000
BACKLOG_TURNS = 60  # checkpoints, in one of which the count of what waits is written to the last event
UNSETTLED_MAX_S = 5.0  # a POST that takes longer doesn't hold the checkpoint: its id becomes a hole
AWAY_WAIT_S, AWAY_WAIT_MAX_S = 0.05, 1.0
STATS_MAX = 1_000  # a batch
EXPIRED, STATUS = Verdict.EXPIRED, Fault.STATUS  # looking a member up in its Enum costs 40 ns


class Recorder:
    """`wired` by the engine: the reader's head and gaps, `after_read`, and what to do when results pile up or drain."""

    def __init__(
        self,
        store: Store,
        lanes: Lanes,
        clock: Clock,
        counters: Counters,
        *,
        epoch: int,
        position: int,
        rows_max: int,
        wait_s: float,
        unrecorded_max: int,
    ) -> None:
        self.position = position  # committed
        self.position_under_way = position  # the highest written or being written
        self.head: Callable[[], int] = lambda: position
        self.gaps: Gaps = Gaps()
        self.after_read: Callable[[Callable[[], None]], None] = lambda action: action()
        self.note_retry: Callable[[Lane, int], None] = lambda lane, due_us: None
        self.look: Callable[[Lane], None] = lambda lane: None
        self.piled_up: Callable[[bool], None] = lambda yes: None
        self.histograms = Histograms()
        self._store = store
        self._lanes = lanes
        self._clock = clock
        self._counters = counters
        self._epoch = epoch
        self._rows_max = rows_max
        self._rows_enough = max(1, rows_max // 5)
        self._wait_s = wait_s
        self._unrecorded_max = unrecorded_max
        self._results: list[Delivery] = []
        self._under_way = 0
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._stopping = False
        self._checkpoint_at = clock.now() + CHECKPOINT_S
        self._is_piled_up = False
        # At the last checkpoint; if they still are once it is written, the next needn't look at them.
        self._settled: list[Lane] = []
        self._minutes: dict[Lane, Stat] = {}  # under way, in the order in which they began
        self._minutes_over: list[StatRow] = []  # to be written

    @property
    def unrecorded(self) -> int:
        return len(self._results) + self._under_way

    def add(self, delivery: Delivery) -> None:
        results = self._results
        results.append(delivery)
        if len(results) == 1:
            self._some.set()
        elif len(results) >= self._rows_enough:
            self._enough.set()
        if not self._is_piled_up and len(results) + self._under_way >= self._unrecorded_max:
            self._is_piled_up = True
            self.piled_up(True)

    def stop(self) -> None:
        """Write what is there, a last checkpoint with it, and end `run`."""
        self._stopping = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        while True:
            await self._collect()
            last = self._stopping
            now = self._clock.now()
            checkpoint = last or now >= self._checkpoint_at
            results, self._results = self._results[: self._rows_max], self._results[self._rows_max :]
            if results or checkpoint:
                self._under_way = len(results)
                batch = self._build(results, checkpoint=checkpoint)
                if checkpoint:
                    batch.checkpoint = await self._checkpoint(results)
                last = last and not self._results and not self._minutes and not self._minutes_over
                recorded = await self._write(batch)
                self.histograms.batch_us.add(int((self._clock.now() - now) * 1e6))
                self.histograms.batch_rows.add(len(results))
                self._under_way = 0
                self._committed(results, batch, recorded)
            if last:
                return

    async def _collect(self) -> None:
        """Wait until there is something to write: results (and a little for others to join), or the checkpoint's time."""
        if not self._results and not self._stopping:
            self._some.clear()
            if not await _within(self._some, self._checkpoint_at - self._clock.now()):
                return
        if len(self._results) < self._rows_enough and not self._stopping:
            self._enough.clear()
            await _within(self._enough, self._wait_s)

    async def _write(self, batch: Batch) -> Recorded:
        wait_s = AWAY_WAIT_S
        while True:
            try:
                return await self._store.record(batch)
            except StoreAwayError as exc:
                self._counters.batch_retries += 1
                self._counters.store_away += 1
                _log.warning("record.away", error=str(exc), rows=len(batch.attempts), retry_in_s=wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, AWAY_WAIT_MAX_S)

    # ── building ──

    def _build(self, results: list[Delivery], *, checkpoint: bool) -> Batch:
        batch = Batch(self._epoch)
        now_us = self._clock.wall_us()
        attempts = batch.attempts
        minute = now_us // MINUTE_US
        runs: dict[LaneRun, tuple[Lane, set[int]]] = {}
        histograms = self.histograms
        attempt_counts, received_counts = histograms.attempt_us.counts, histograms.received_us.counts
        attempt_us = received_us = 0
        for r in results:
            outcome, verdict = r.outcome, r.decision.verdict
            attempts.append(
                AttemptRow(
                    r.event.id,
                    r.lane.id,
                    r.run,
                    r.number if verdict is not EXPIRED else 0,
                    r.started_us,
                    r.duration_us,
                    outcome.status,
                    outcome.fault,
                    outcome.response_head,
                )
            )
            stat = r.lane.stat
            if stat is None or stat.minute != minute:
                stat = self._begin_minute(r.lane, minute)
            if verdict is EXPIRED:
                stat.expired += 1
                if r.number > 1:
                    batch.settled_retries.append((r.lane.id, r.event.id, r.run))
                continue
            stat.duration_us += r.duration_us
            stat.durations[(r.duration_us // 1000).bit_length()] += 1
            # Counted in place, here and below: 0.25 µs a result, a third of what two calls cost.
            attempt_counts[r.duration_us.bit_length()] += 1
            attempt_us += r.duration_us
            if r.run != ORIGINAL and not self._count_into_run(r, runs):
                verdict = Verdict.DELIVERED  # of a canceled run: nothing follows
            if outcome.fault is None:
                stat.delivered += 1
                if r.number == 1 and r.run == ORIGINAL:
                    latency_us = r.started_us + r.duration_us - r.event.created_us
                    if latency_us < 0:  # clocks agree as far as a question and its answer tell, and may be set back
                        latency_us = 0
                    received_counts[latency_us.bit_length()] += 1
                    received_us += latency_us
            else:
                stat.failed += 1
                self._count_failure(outcome)
            if verdict is Verdict.DELIVERED:
                if r.number > 1:
                    batch.settled_retries.append((r.lane.id, r.event.id, r.run))
                continue
            assert outcome.fault is not None
            if verdict is Verdict.RETRY:
                due_us = now_us + int(r.decision.due_in_s * 1e6)
                key = r.event.ordering_key if r.holds_key else None
                if r.event.expires_us is not None and r.run == ORIGINAL:
                    due_us = max(now_us, min(due_us, r.event.expires_us))  # looked at, then, to be settled unsent
                batch.retries.append(
                    RetryRow(
                        r.lane.id,
                        r.event.id,
                        r.run,
                        r.number + 1,
                        r.first_attempt_us,
                        due_us,
                        r.decision.reason,
                        key,
                    )
                )
            else:
                stat.dead += 1
                batch.dead.append(
                    DeadRow(
                        r.lane.id,
                        r.event.id,
                        r.run,
                        r.number,
                        r.first_attempt_us,
                        r.decision.reason,
                        outcome.status,
                        outcome.fault,
                    )
                )
                if r.number > 1:
                    batch.settled_retries.append((r.lane.id, r.event.id, r.run))
        histograms.attempt_us.total += attempt_us
        histograms.received_us.total += received_us
        if checkpoint:
            for lane in self._lanes.running:
                for run in lane.runs.values():
                    runs.setdefault(run, (lane, set()))
            self._end_minutes(minute)
        for run, (lane, done) in runs.items():
            is_busy = run.spec.state is RunState.CANCELED and any(of == run.spec.id for _, of in lane.retry_hands)
            row = run.row(lane.id, done, is_busy=is_busy)
            if row != run.written or row.ended:
                run.written = row
                batch.runs.append(row)
        batch.stats = self._minutes_over[:STATS_MAX]
        del self._minutes_over[:STATS_MAX]
        return batch

    def _count_into_run(self, r: Delivery, runs: "dict[LaneRun, tuple[Lane, set[int]]]") -> bool:
        """Count a result into its run; False if the run was canceled meanwhile."""
        run = r.lane.runs.get(r.run)
        if run is None:
            return False
        _, done = runs.setdefault(run, (r.lane, set()))
        if r.number == 1:
            done.add(r.event.id)
            run.attempted += 1
        if r.outcome.fault is None:
            run.delivered += 1
        elif run.spec.state is RunState.CANCELED:
            return False
        elif r.decision.verdict is Verdict.DEAD:
            run.dead += 1
        return True

    # ── statistics ──

    def _count_failure(self, outcome: Outcome) -> None:
        assert outcome.fault is not None
        kind = outcome.fault.value if outcome.fault is not STATUS else f"{(outcome.status or 0) // 100}xx"
        self.histograms.failures[kind] = self.histograms.failures.get(kind, 0) + 1

    def _begin_minute(self, lane: Lane, minute: int) -> Stat:
        stat = lane.stat
        if stat is None:
            stat = lane.stat = Stat()
        elif self._minutes.pop(lane, None) is not None:
            self._minutes_over.append(stat.row(lane.id))
        stat.begin(minute)
        self._minutes[lane] = stat
        return stat

    def _end_minutes(self, minute: int) -> None:
        """Hand over what is over, or at the end everything; a bounded number of lanes, those that began first."""
        over: list[tuple[Lane, Stat]] = []
        is_last = self._stopping and not self._results  # else more of the same minute would find its row written
        for lane, stat in self._minutes.items():
            if (stat.minute == minute and not is_last) or len(over) == STATS_MAX:
                break
            over.append((lane, stat))
        for lane, stat in over:
            self._minutes_over.append(stat.row(lane.id))
            del self._minutes[lane]
            stat.minute = OVER  # the clock may be set back into it

    async def _checkpoint(self, results: list[Delivery]) -> CheckpointWrite:
        """Say what is settled once this batch is. For every lane without a row all ids at or below `position` and outside `gaps` are; a lane
        with a row speaks for itself. (DESIGN §4, and the executable model's `record`.)

        Thousands of lanes are looked at in many turns of the loop: an event's way takes four, and each waits for the slice of the turn. (In one,
        5 to 15 ms, it was the longest turn there is.) Head and what is taken up are of the first turn, and what is said of a lane is of its own.
        Gaps are those of the first turn and what is joined after it: what is found in one may be given to a lane that was looked at already, and
        what a lane has passed over because it is in a gap, it relies on that gap for. So what comes between is above that head, among these
        gaps, or for a subscription that isn't told as taken up, and a start meets it again."""
        head, written = self.head(), self.position
        gaps = self.gaps.ranges()
        joined = self.gaps.joined = []
        rows_gone, taking_up = sorted(self._lanes.rows_gone), sorted(self._lanes.taking_up)
        done: defaultdict[Lane, set[int]] = defaultdict(set)
        for r in results:
            if r.is_first:
                done[r.lane].add(r.event.id)
        position = head
        before = self._clock.now() - UNSETTLED_MAX_S
        said: list[tuple[Lane, LaneRow]] = []  # of those that may have to speak for themselves
        late, holes = list[int](), list[tuple[int, int]]()  # of those that rest on the gaps
        self._settled = []
        turn = self._counters.checkpoints
        lanes = list(self._lanes.unsettled)
        left = share = min(max(CHECKPOINT_TURN, len(lanes) // 5), 5 * CHECKPOINT_TURN)
        for lane in lanes:
            if left <= 0:
                await asyncio.sleep(CHECKPOINT_PAUSE_S)
                left = share
            if lane.keys is not None:
                lane.trim_keys()
            hands = lane.hands
            if not hands and lane.is_settled:
                left -= 1
                self._settled.append(lane)
                continue  # since the last checkpoint: its mark is the head
            row = lane.row
            left -= 3 if row is None or lane.said_in is row.holes else 3 + len(hands)
            if row is not None and lane not in done and lane.rests_on(row):  # as thousands do that are parked
                if lane.is_off(row, exactly=self._stopping or (turn + lane.id) % BACKLOG_TURNS == 0):
                    said.append((lane, LaneRow(lane.id, row.settled, row.holes, lane.backlog)))
                continue
            left -= 2 + len(hands)
            for event_id, taken_at in hands.items():  # in the order in which they were taken
                if taken_at > before:
                    break
                lane.late.add(event_id)  # becomes a hole, so that one slow POST never holds the checkpoint
            settled = done.get(lane, NOTHING)
            mark = lane.mark(head, settled)
            # What is open below its mark then stands among the checkpoint's gaps; it has no row of its own.
            rests = lane.live and row is None and lane.keys is None
            if rests and lane.late:
                late += lane.late_ids(settled)
            if rests and lane.holes.lows:
                holes += lane.holes
            if rests and mark >= written:  # as most do
                if mark < position:
                    position = mark
                continue
            if lane.live and (mark >= written or row is not None):
                position = min(position, max(mark, written))
            # Of the others there is nothing to say: `position` will be at or below their marks.
            own = lane.open_late(settled)
            own = row.holes if row is not None and row.holes == own else own.copy()
            said.append((lane, LaneRow(lane.id, mark, own, lane.backlog)))
        self.gaps.joined = None
        position = max(position, written)
        gaps.update((*joined, *holes, *zip(late, late, strict=True)))
        gaps.shrink(CHECKPOINT_GAPS_MAX)
        write = CheckpointWrite(position, gaps, [], rows_gone, taking_up)
        for lane, row in said:
            if left <= 0:
                await asyncio.sleep(CHECKPOINT_PAUSE_S)
                left = share
            left -= 2
            # One that orders by key speaks for itself: after a start it must meet its holes before what is new, and gaps are looked at later.
            speaks = row.settled < position or (row.holes if lane.keys is not None else not gaps.covers_all(row.holes))
            if not speaks:
                if lane.row is not None:
                    write.lanes_gone.append(lane.id)
            elif row != lane.row:
                write.lanes.append(row)
        self.position_under_way = max(self.position_under_way, position)
        return write

    # ── after the commit ──

    def _committed(self, results: list[Delivery], batch: Batch, recorded: Recorded) -> None:
        self._counters.batches += 1
        self._counters.rows_recorded += len(batch.attempts)
        for row in batch.retries:
            lane = self._lanes.get(row.endpoint_id)
            if lane is not None:
                self.note_retry(lane, row.due_us)
        self._counters.retried += len(batch.retries)
        self._counters.dead += len(batch.dead)
        if results:
            self.after_read(lambda: self._release(results))
        finished = set(recorded.runs_finished)
        for run_row in batch.runs:
            lane = self._lanes.get(run_row.endpoint_id)
            if lane is not None and run_row.run in finished:
                self._finish_run(lane, run_row)
        write = batch.checkpoint
        if write is not None:
            self._checkpoint_at = self._clock.now() + CHECKPOINT_S
            self._counters.checkpoints += 1
            self.position = write.position
            for lane_row in write.lanes:
                lane = self._lanes.get(lane_row.endpoint_id)
                if lane is not None:
                    lane.row = lane_row
                else:
                    self._lanes.rows_gone.add(lane_row.endpoint_id)  # deleted while this batch was written
            for endpoint_id in write.lanes_gone:
                lane = self._lanes.get(endpoint_id)
                if lane is not None:
                    lane.row = None
            self._lanes.rows_gone.difference_update(set(write.lanes_gone) - {row.endpoint_id for row in write.lanes})
            self._lanes.taking_up.difference_update(recorded.taken_up)
            for lane in self._settled:
                if lane.is_settled:
                    self._lanes.unsettled.pop(lane, None)
        if self._is_piled_up and self.unrecorded < self._unrecorded_max // 2:
            self._is_piled_up = False
            self.piled_up(False)

    def _release(self, results: list[Delivery]) -> None:
        for r in results:
            if r.event.ordering_key is not None and r.holds_key:
                self._release_key(r)
            if r.is_first:
                r.lane.settle(r.event.id)
                continue
            if r.number > 1:
                r.lane.retry_hands.discard((r.event.id, r.run))
            elif run := r.lane.runs.get(r.run):
                # Its retry may be in hand already, by a read that took as long as it had to wait.
                run.hands.pop(r.event.id, None)

    def _release_key(self, r: Delivery) -> None:
        """The result is committed: unless a retry follows, the next of its key may go."""
        assert r.event.ordering_key is not None
        assert r.lane.keys is not None
        if r.decision.verdict is not Verdict.RETRY:
            r.lane.keys.release(r.event.ordering_key, r.event.id)
            self.look(r.lane)  # for the next of the key; or the lane has room for another key now

    def _finish_run(self, lane: Lane, row: RunRow) -> None:
        lane.runs.pop(row.run, None)
        lane.runs_done.append(row.run)
        if not lane.runs:
            self._lanes.running.pop(lane, None)
        _log.info(
            "run.canceled" if row.canceled else "run.finished",
            run=row.run,
            endpoint_id=lane.id,
            attempted=row.attempted,
            delivered=row.delivered,
            dead=row.dead,
        )


async def _within(event: asyncio.Event, wait_s: float) -> bool:
    """Wait for `event` at most `wait_s`; tell whether it came."""
    if event.is_set():
        return True
    try:
        async with asyncio.timeout(max(0.0, wait_s)):
            await event.wait()
    except TimeoutError:
        return False
    return True
