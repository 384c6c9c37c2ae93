"""Ids are taken in order and become visible in commit order: the whole engine against real transactions that make the most of that.

Every event carries its own `n`, so the judge is outside of the reader: what was committed arrived, each exactly once at each endpoint;
what was rolled back never did. `at_rest` asks it at the end of each test, together with what must be back at nothing by then: gaps, hands,
the account of memory, lane rows.
"""

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import asyncpg
import orjson
import pytest

from dispatcher.engine import gaps as gaps_module
from dispatcher.engine import lane as lane_module
from dispatcher.engine import reader as reader_module
from dispatcher.engine import recorder as recorder_module
from dispatcher.engine.gaps import Gaps
from dispatcher.sink import Behaviour, Received
from dispatcher.store import embedded
from tests.conftest import SCHEMA, connected, make_server
from tests.rig import Rig, rig, until

INVARIANT = (Path(__file__).parent / "invariant.sql").read_text()
INSERT = """INSERT INTO webhook.outbox (account_id, type, payload)
            SELECT $1, 'load.event', json_build_object('n', n) FROM unnest($2::bigint[]) AS n"""
MANY = """INSERT INTO webhook.outbox (account_id, type, payload)
          SELECT $1, 'load.event', json_build_object('n', n) FROM generate_series($2::bigint, $3::bigint) AS n"""
SLOW_TRIGGER = """
CREATE FUNCTION webhook.dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.03 THEN PERFORM pg_sleep(0.05 + random() * 0.4); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER dawdle BEFORE INSERT ON webhook.outbox FOR EACH ROW EXECUTE FUNCTION webhook.dawdle();
"""
IS_SILENT = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND locktype = 'advisory' AND mode = 'ShareLock')"
PROMPT_S = 0.9  # whatever waits for a poll that is only there in case of need takes longer


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each second: each test waits for one or two, and more of them meet more moments."""
    monkeypatch.setattr(recorder_module, "CHECKPOINT_S", 0.1)


def n_of(event: Received) -> int:
    return orjson.loads(event.body)["data"]["n"]


def arrived(r: Rig, path: str = "/hook") -> Counter[int]:
    return Counter(n_of(event) for event in r.received if event.path == path)


def gaps_of(r: Rig) -> Gaps:
    return r.engine.incarnation.reader.gaps


def memory_of(r: Rig):
    return r.engine.incarnation.lanes.memory


async def at_rest(r: Rig, *, within_s: float = 30) -> None:
    """Wait until all is delivered and nothing is left over anywhere."""
    await r.settled(within_s=within_s)

    def empty() -> bool:
        lanes = r.engine.incarnation.lanes
        return (
            not gaps_of(r)
            and (lanes.memory.events, lanes.memory.bytes) == (0, 0)
            and not any(lane.hands or lane.late or lane.holes or lane.queue or not lane.live for lane in lanes)
        )

    await until(empty, within_s=5, what=lambda: "nothing left over")
    assert await r.db.fetch(INVARIANT) == []


async def insert(connection: asyncpg.Connection, *ns: int, account: str = "acct") -> None:
    await connection.execute(INSERT, account, list(ns))


@asynccontextmanager
async def transaction(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A transaction on a connection of its own; the test ends it, with COMMIT or ROLLBACK."""
    async with connected(dsn) as connection:
        await connection.execute("BEGIN")
        yield connection


async def holds_old_gap(r: Rig, ids: int) -> None:
    """Wait until so many ids stand in old gaps that somebody still holds open."""
    await until(
        lambda: sum(g.high + 1 - g.low for g in gaps_of(r) if g.barrier is not None and not g.is_closing) == ids,
        what=f"{ids} ids in watched gaps",
    )


# ── producers ──


class Producers:
    """Connections that insert in every way there is. They keep books: what they committed, and what they took back."""

    def __init__(self, dsn: str, seed: int, accounts: tuple[str, ...]) -> None:
        self.committed: dict[str, set[int]] = {account: set() for account in accounts}
        self.taken_back = 0
        self._dsn = dsn
        self._seed = seed
        self._n = count(1)

    def take(self, most: int) -> list[int]:
        return [next(self._n) for _ in range(self._rng.randint(1, most))]

    async def run(self, connections: int, rounds: int) -> None:
        self._rng = random.Random(self._seed)
        await asyncio.gather(*(self._produce(rounds) for _ in range(connections)))

    async def _produce(self, rounds: int) -> None:
        ways = (self.statement, self.statement, self.open_for_a_while, self.savepoints, self.copy, self.refused)
        async with connected(self._dsn) as connection:
            for _ in range(rounds):
                account = self._rng.choice(list(self.committed))
                kept, lost = await self._rng.choice(ways)(connection, account)
                self.committed[account].update(kept)
                self.taken_back += len(lost)

    async def statement(self, connection, account):
        ns = self.take(self._rng.choice([1, 1, 20]))
        await insert(connection, *ns, account=account)
        return ns, []

    async def open_for_a_while(self, connection, account):
        await connection.execute("BEGIN")
        ns = []
        for _ in range(self._rng.randint(1, 3)):
            more = self.take(5)
            ns += more
            await insert(connection, *more, account=account)
            await asyncio.sleep(
                self._rng.choice([0, 0.01, 0.15, 0.3])
            )  # the load itself: what others do in the meantime
        if self._rng.random() < 0.4:
            await connection.execute("ROLLBACK")
            return [], ns
        await connection.execute("COMMIT")
        return ns, []

    async def savepoints(self, connection, account):
        kept, lost = [], []
        await connection.execute("BEGIN")
        for _ in range(self._rng.randint(1, 4)):
            ns = self.take(4)
            await connection.execute("SAVEPOINT s")
            await insert(connection, *ns, account=account)
            if self._rng.random() < 0.5:
                await connection.execute("ROLLBACK TO s")
                lost += ns
            else:
                kept += ns
        await connection.execute("COMMIT")
        return kept, lost

    async def copy(self, connection, account):
        ns = self.take(50)
        rows = [(account, "load.event", f'{{"n": {n}}}') for n in ns]
        takes_back = self._rng.random() < 0.3
        if takes_back:
            await connection.execute("BEGIN")
        await connection.copy_records_to_table(
            "outbox", schema_name="webhook", columns=("account_id", "type", "payload"), records=rows
        )
        if takes_back:
            await connection.execute("ROLLBACK")
            return [], ns
        return ns, []

    async def refused(self, connection, account):
        """A statement that fails after it has taken ids."""
        ns = self.take(5)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute(
                """INSERT INTO webhook.outbox (account_id, type, payload)
                   SELECT $1, 'load.event', json_build_object('n', 1 / (n - $3::bigint)) FROM unnest($2::bigint[]) AS n""",
                account, ns, ns[-1],
            )  # fmt: skip
        return [], ns


@pytest.mark.parametrize(("queue", "seed"), [(1_000, 1), (5, 2)], ids=["live lanes", "lanes that keep falling behind"])
async def test_nothing_is_missed_and_nothing_comes_twice_or_without_a_commit(dsn: str, queue: int, seed: int) -> None:
    async with rig(dsn, queue_events_max=queue, memory_events_max=2_000) as r, transaction(dsn) as unrelated:
        await r.db.execute(SLOW_TRIGGER)
        await unrelated.execute("CREATE TABLE somebody_elses (n bigint)")
        await unrelated.execute("INSERT INTO somebody_elses SELECT pg_current_xact_id()::text::bigint")
        for path, account in {"/one": "a", "/two": "a", "/three": "b"}.items():
            await r.endpoint(path, account=account, in_flight_max=20)
        producers = Producers(dsn, seed, ("a", "b", "nobody"))
        load = asyncio.create_task(producers.run(24, 12))
        violations = []
        while not load.done():
            violations += await r.db.fetch(INVARIANT)
            await asyncio.wait([load], timeout=0.3)
        await load
        await at_rest(r)
        assert violations == []
        assert producers.taken_back > 200
        for path, account in {"/one": "a", "/two": "a", "/three": "b"}.items():
            assert arrived(r, path) == Counter(producers.committed[account]), path
        assert r.engine.counters.gap_reads > 10
        await unrelated.execute("ROLLBACK")


async def test_the_same_load_loses_events_when_the_barrier_is_off(dsn: str) -> None:
    """The control: if this can't lose any, the test above can't fail."""
    async with rig(dsn, make_gaps=lambda: Gaps(barrier_off=True)) as r:
        await r.db.execute(SLOW_TRIGGER)
        await r.endpoint("/one", account="a")
        producers = Producers(dsn, 1, ("a", "nobody"))
        await producers.run(24, 5)
        await until(lambda: r.db.fetchval("SELECT position >= webhook.last_id() FROM webhook.checkpoint"))
        await until(lambda: not gaps_of(r))
        got = arrived(r, "/one")
        assert len(producers.committed["a"] - got.keys()) > 20
        assert set(got) <= producers.committed["a"]


# ── prepared transactions ──


@pytest.fixture(scope="module")
def own_server() -> Iterator[embedded.EmbeddedServer]:
    """One that may be stopped."""
    server, directory = make_server()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


async def test_a_prepared_transaction_is_waited_for_over_a_restart_of_the_server(
    own_server: embedded.EmbeddedServer,
) -> None:
    dsn = own_server.dsn
    async with connected(dsn) as db:
        await db.execute(SCHEMA)
        await db.execute("DROP TRIGGER outbox_doorbell ON webhook.outbox")  # as `migrate` does when the doorbell is off
    async with rig(dsn, doorbell="off") as r:
        await r.endpoint()
        async with transaction(dsn) as kept, transaction(dsn) as dropped, transaction(dsn) as late:
            await insert(kept, 1, 2)
            await insert(r.db, 3)
            await insert(dropped, 4)
            await insert(late, 5)
            await insert(r.db, 6)
            await holds_old_gap(r, 4)  # two ranges
            await kept.execute("PREPARE TRANSACTION 'kept'")
            await dropped.execute("PREPARE TRANSACTION 'dropped'")
            await until(lambda: len(arrived(r)) == 2)
            # `late` is a member of the barrier that dies with the restart; both others come back under other names.
            await asyncio.to_thread(own_server.stop_now, "fast")
            await asyncio.to_thread(own_server.start_again)
        await r.db.close()
        r.db = await asyncpg.connect(dsn)
        await insert(r.db, 7)
        await until(lambda: arrived(r) == Counter([3, 6, 7]))
        await holds_old_gap(r, 4)
        await r.db.execute("COMMIT PREPARED 'kept'")
        await until(lambda: arrived(r) == Counter([1, 2, 3, 6, 7]))
        await holds_old_gap(r, 2)  # 5's transaction is gone, but its range is 4's as well
        await r.db.execute("ROLLBACK PREPARED 'dropped'")
        await at_rest(r)
        assert arrived(r) == Counter([1, 2, 3, 6, 7])
        assert r.engine.counters.starts == 1  # an orderly restart keeps `life`: nothing was begun again


# ── bulk ──


async def test_a_million_uncommitted_rows_hold_up_nobody_and_close_soon_once_rolled_back(dsn: str) -> None:
    async with rig(dsn) as r, transaction(dsn) as bulk:
        await r.endpoint()
        loading = asyncio.create_task(bulk.execute(MANY, "acct", -1_000_000, -1))
        waits = []
        for n in count(1):
            if loading.done() and n > 20:
                break
            await insert(r.db, n)
            committed_at = time.monotonic()
            await until(lambda n=n: len(r.received) == n)
            waits.append(time.monotonic() - committed_at)
        await loading
        assert max(waits) < PROMPT_S
        await until(lambda: gaps_of(r).ranges().count() >= 1_000_000)
        await bulk.execute("ROLLBACK")
        await until(lambda: not gaps_of(r), within_s=5, what="the gap of a million ids closed")
        await at_rest(r)
        assert len(r.received) == len(waits)


async def test_a_big_transaction_that_commits_late_is_delivered_within_the_memory_bound(dsn: str) -> None:
    """Its rows lie in a gap below the written position; meanwhile another endpoint's events go on."""
    total, bound = 200_000, 2_000
    async with rig(dsn, memory_events_max=bound) as r, transaction(dsn) as bulk:
        await r.endpoint("/bulk", account="bulk")
        await r.endpoint("/hook")
        # Every fifth is wanted; two hundred thousand POSTs would take half a minute.
        await bulk.execute(MANY.replace("$1,", "CASE WHEN n % 5 = 0 THEN $1 ELSE 'nobody' END,"), "bulk", 1, total)
        await insert(r.db, 0)
        await until(lambda: r.db.fetchval("SELECT position > $1 FROM webhook.checkpoint", total))
        await bulk.execute("COMMIT")
        most, waits = 0, []
        got: dict[str, Counter[int]] = {"/bulk": Counter(), "/hook": Counter()}

        def tally() -> None:
            nonlocal most
            most = max(most, memory_of(r).events)
            for event in r.received:
                got[event.path][n_of(event)] += 1
            r.received.clear()

        def has_come(n: int) -> bool:
            tally()
            return n in got["/hook"]

        while got["/bulk"].total() < total // 5:
            n = len(waits) + 1
            await insert(r.db, n)
            committed_at = time.monotonic()
            await until(lambda n=n: has_come(n))
            waits.append(time.monotonic() - committed_at)
        await at_rest(r)
        tally()
        assert most <= bound + 200
        assert sorted(waits)[len(waits) // 2] < PROMPT_S
        assert max(waits) < 5 * PROMPT_S, "on a machine that runs other tests"
        assert got["/bulk"] == Counter(range(5, total + 1, 5))
        assert got["/hook"] == Counter(range(len(waits) + 1))


async def test_more_gaps_than_the_bound_are_merged_and_nothing_is_lost(dsn: str) -> None:
    every_other = gaps_module.OLD_MAX + 2_000
    async with rig(dsn, queue_events_max=100) as r, transaction(dsn) as late:
        await r.endpoint()
        await insert(late, 0)  # holds the lock on the log, so that nothing closes
        # Two ids a row, one of them for later.
        await r.db.execute(
            """INSERT INTO webhook.outbox (id, account_id, type, payload) OVERRIDING SYSTEM VALUE
               SELECT nextval('webhook.outbox_id_seq') + 0 * nextval('webhook.outbox_id_seq'), 'acct', 'load.event', json_build_object('n', n)
               FROM generate_series(1, $1::integer) AS n""",
            every_other,
        )
        await until(lambda: gaps_of(r).ranges().count() > every_other + 1, what="ranges merged over ids that came")
        assert len(gaps_of(r).old) <= gaps_module.OLD_MAX
        await until(lambda: r.db.fetchval("SELECT position >= webhook.last_id() - 1 FROM webhook.checkpoint"))
        ids = await r.db.fetch("SELECT id + 1 AS id FROM webhook.outbox WHERE id % 10 = 2")
        await late.executemany(
            """INSERT INTO webhook.outbox (id, account_id, type, payload) OVERRIDING SYSTEM VALUE
               VALUES ($1::bigint, 'acct', 'load.event', json_build_object('n', -$1::bigint))""",
            ids,
        )
        assert len(arrived(r)) <= every_other
        await late.execute("COMMIT")
        await at_rest(r)
        assert len(ids) > 1_000
        assert arrived(r) == Counter([0, *range(1, every_other + 1), *(-row["id"] for row in ids)])


# ── lanes that are behind ──


async def pause(r: Rig, endpoint: int) -> None:
    await r.db.execute(
        "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1", endpoint
    )
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)


async def resume(r: Rig, endpoint: int) -> None:
    await r.db.execute("UPDATE webhook.endpoint SET state = 'live', paused_at_id = NULL WHERE id = $1", endpoint)


async def test_late_commits_below_and_above_the_cursor_of_a_paused_lane(dsn: str) -> None:
    async with rig(dsn) as r, transaction(dsn) as below, transaction(dsn) as above, transaction(dsn) as later:
        endpoint = await r.endpoint()
        await r.endpoint("/watch")
        await insert(below, 1, 2)
        await insert(r.db, 3)
        await until(lambda: arrived(r) == Counter([3]))
        await pause(r, endpoint)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.held and not lane.live)
        await insert(above, 4)
        await insert(r.db, 5)
        await insert(later, 6)
        await insert(r.db, 7)
        await holds_old_gap(r, 4)
        await below.execute("COMMIT")
        await above.execute("COMMIT")
        await until(lambda: arrived(r, "/watch") == Counter([1, 2, 3, 4, 5, 7]))
        assert lane.holes.count() == 2  # below the cursor; what is above is met on the way
        await until(
            lambda: r.db.fetchval("SELECT upper(holes) IS NOT NULL FROM webhook.lane WHERE endpoint_id = $1", endpoint)
        )
        assert await r.db.fetch(INVARIANT) == []
        await resume(r, endpoint)
        await until(lambda: arrived(r) == Counter([1, 2, 3, 4, 5, 7]))
        await until(lambda: lane.live)
        await later.execute("COMMIT")
        await at_rest(r)
        assert arrived(r) == arrived(r, "/watch") == Counter(range(1, 8))


@pytest.mark.parametrize("seed", range(2))
async def test_late_commits_around_a_lane_whose_queue_is_full(dsn: str, seed: int) -> None:
    rng = random.Random(seed)
    async with rig(dsn, queue_events_max=4) as r:
        await r.endpoint(behaviour=Behaviour(delay_s=0.002), in_flight_max=2)
        ns = count(1)
        async with asyncio.TaskGroup() as producers:

            async def produce() -> None:
                async with connected(dsn) as connection:
                    for _ in range(12):
                        await connection.execute("BEGIN")
                        await insert(connection, *(next(ns) for _ in range(rng.randint(1, 3))))
                        await asyncio.sleep(rng.choice([0, 0.005, 0.05, 0.2]))  # the load itself
                        await insert(connection, next(ns))
                        await connection.execute("COMMIT")

            for _ in range(12):
                producers.create_task(produce())
        await at_rest(r)
        assert arrived(r) == Counter(range(1, next(ns)))
        assert r.engine.counters.caught_up > 1


async def test_a_lane_that_falls_behind_by_a_young_gap_sees_what_came_with_it(dsn: str) -> None:
    """One read brings an id from a gap and ids above the head, and the lane has no room for the first: the others lie above its cursor."""
    async with rig(dsn, queue_events_max=6) as r, transaction(dsn) as late:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.5), in_flight_max=1)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await insert(r.db, *range(1, 7))
        await until(lambda: len(lane.queue) == 5 and lane.in_flight == 1)
        r.sink.set_behaviour("/hook", Behaviour())
        await insert(late, 0)
        await insert(r.db, 7)
        await until(lambda: len(lane.queue) == 6 and gaps_of(r).young)
        await insert(late, *range(8, 30))
        await late.execute("COMMIT")
        await at_rest(r)
        assert r.engine.counters.gap_reads == 0  # it was found while it was young
        assert arrived(r) == Counter(range(30))


async def test_a_hole_around_an_open_gap_neither_keeps_a_lane_behind_nor_the_reader_busy(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "HOLES_MAX", 1)
    async with (
        rig(dsn) as r, transaction(dsn) as first, transaction(dsn) as still_open, transaction(dsn) as third
    ):  # fmt: skip
        endpoint = await r.endpoint()
        for n, connection in enumerate((first, still_open, third), start=1):
            await insert(connection, n)
        await insert(r.db, 4)
        await until(lambda: arrived(r) == Counter([4]))
        await holds_old_gap(r, 3)
        await pause(r, endpoint)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.held)
        await first.execute("COMMIT")
        await third.execute("COMMIT")
        await until(lambda: lane.holes.count() == 3, what="one hole over the late ids and the open gap between them")
        await resume(r, endpoint)
        await insert(r.db, 5)
        await until(lambda: arrived(r) == Counter([1, 3, 4, 5]))
        await until(lambda: lane.live)
        assert await reads_per_s(r) < 200
        await still_open.execute("COMMIT")
        await at_rest(r)
        assert arrived(r) == Counter([1, 2, 3, 4, 5])


# ── kill and start again ──


@pytest.mark.parametrize("when", ["in its gap", "in flight", "in flight after a checkpoint"])
async def test_a_late_commit_below_the_written_position_survives_a_kill(dsn: str, when: str) -> None:
    async with rig(dsn) as r, transaction(dsn) as late:
        await r.endpoint()
        await insert(late, 1, 2)
        await insert(r.db, 3, 4)
        await until(lambda: r.db.fetchval("SELECT position >= 4 AND gaps = '{[1,3)}' FROM webhook.checkpoint"))
        await until(lambda: arrived(r) == Counter([3, 4]))
        r.sink.set_behaviour("/hook", Behaviour(mode="hang"))
        if when == "in its gap":
            await r.kill()
            await late.execute("COMMIT")
        else:
            await late.execute("COMMIT")
            await until(lambda: arrived(r) == Counter([1, 2, 3, 4]) and not gaps_of(r))
            if when == "in flight after a checkpoint":
                checkpoints = r.engine.counters.checkpoints
                await until(lambda: r.engine.counters.checkpoints >= checkpoints + 2)
            await r.kill()
        assert await r.db.fetch(INVARIANT) == []
        r.received.clear()
        r.sink.set_behaviour("/hook", Behaviour())
        await r.start()
        await insert(r.db, 5)
        await at_rest(r)
        assert arrived(r) == Counter([1, 2, 5])


# ── the doorbell ──


@pytest.mark.parametrize(
    ("doorbell", "gets_up", "rounds"),
    [("on", False, 200), ("on", True, 300), ("off", False, 100)],
    ids=["sleeps on", "gets up at every ring", "off"],
)
async def test_no_commit_waits_for_the_safety_poll(
    dsn: str, doorbell: str, gets_up: bool, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round waits for its events, so that the reader falls asleep between the rounds, and at any point of one."""
    if gets_up:
        monkeypatch.setattr(reader_module, "RINGS_PER_S", 0)
        monkeypatch.setattr(reader_module, "RINGS_WINDOW_S", 0)
    async with rig(dsn, doorbell=doorbell) as r:
        if doorbell == "off":
            await r.db.execute("DROP TRIGGER outbox_doorbell ON webhook.outbox")
        await r.endpoint()
        reader = r.engine.incarnation.reader
        rng = random.Random(7)
        ns = count(1)
        slowest, kept = 0.0, 0
        came: dict[int, asyncio.Event] = {}
        r.sink._on_event = lambda event: (r.received.append(event), came[n_of(event)].set())

        async def produce() -> None:
            nonlocal slowest, kept
            async with connected(dsn) as connection:
                for _ in range(rounds):
                    mine = [next(ns) for _ in range(2)]
                    came.update((n, asyncio.Event()) for n in mine)
                    way = rng.randrange(5)
                    pause_s = rng.choice(
                        [0, 0, 0.001, 0.003, 0.006]
                    )  # so that the reader falls asleep in the midst of it
                    if way == 0:
                        await insert(connection, *mine)
                    elif way == 1:
                        await connection.execute("BEGIN")
                        for n in mine:
                            await insert(connection, n)
                            await asyncio.sleep(pause_s)
                        await connection.execute("COMMIT")
                    elif way == 2:  # the lock that was silence's price goes with the savepoint
                        await connection.execute("BEGIN; SAVEPOINT s")
                        await insert(connection, -1)
                        await connection.execute("ROLLBACK TO s")
                        await asyncio.sleep(pause_s)
                        await insert(connection, *mine)
                        await connection.execute("COMMIT")
                    elif way == 3:
                        await connection.execute("BEGIN; SAVEPOINT s")
                        await insert(connection, *mine)
                        await connection.execute("RELEASE s; SAVEPOINT t")
                        await asyncio.sleep(pause_s)
                        await insert(connection, -1)
                        await connection.execute("ROLLBACK TO t; COMMIT")
                    else:
                        await connection.copy_records_to_table(
                            "outbox", schema_name="webhook", columns=("account_id", "type", "payload"),
                            records=[("acct", "load.event", f'{{"n": {n}}}') for n in mine],
                        )  # fmt: skip
                    committed_at = time.monotonic()
                    kept += len(mine)
                    async with asyncio.timeout(10):
                        for n in mine:
                            await came[n].wait()
                    slowest = max(slowest, time.monotonic() - committed_at)
                    if gets_up and rng.random() < 0.7:
                        await until(lambda: reader.asleep)
                    else:
                        await asyncio.sleep(rng.choice([0, 0.001, 0.004]))

        await produce()
        await at_rest(r)
        assert slowest < PROMPT_S
        assert arrived(r) == Counter(range(1, kept + 1))
        if gets_up:
            assert r.engine.counters.sleeps > rounds // 2
        else:
            assert (r.engine.counters.sleeps > 0) == (doorbell == "on")


# ── at rest, and under full load ──


async def reads_per_s(r: Rig) -> float:
    """Measure the rate of the reader's round trips."""
    session = r.engine._store._reader
    before, began = session.round_trips, time.monotonic()
    await asyncio.sleep(0.5)  # what is measured is that nothing happens
    return (session.round_trips - before) / (time.monotonic() - began)


async def test_the_reader_rests_while_a_gap_is_open_and_a_lane_is_behind(dsn: str) -> None:
    async with rig(dsn) as r, transaction(dsn) as silent, transaction(dsn) as ringing:
        await r.endpoint()
        await pause(r, await r.endpoint("/paused"))
        reader = r.engine.incarnation.reader
        await until(lambda: reader.asleep)
        await insert(ringing, 1)
        await insert(r.db, 2)
        await until(lambda: arrived(r) == Counter([2]))
        await holds_old_gap(r, 1)
        await until(lambda: reader.asleep)
        assert await reads_per_s(r) < 20

        # Right after the safety poll has looked: only the ring is left to tell.
        looked_at = reader._asleep_since
        await until(
            lambda: (
                reader.asleep
                and looked_at < reader._asleep_since < gaps_of(r)._watched_at
                and not gaps_of(r).is_pending
                and not reader._gate.is_reading
            )
        )
        committed_at = time.monotonic()
        await ringing.execute("COMMIT")
        await until(lambda: arrived(r) == Counter([1, 2]))
        assert time.monotonic() - committed_at < 0.5

        # An insert that meets the reader awake, or its session gone, is silent, and the reader can't fall asleep before it ends.
        await r.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'dispatcher reader' AND datname = current_database()"
        )
        await insert(silent, 3)
        assert await r.db.fetchval(IS_SILENT, silent.get_server_pid())
        await insert(r.db, 4)
        await holds_old_gap(r, 1)
        assert not reader.asleep
        assert await reads_per_s(r) < 200
        committed_at = time.monotonic()
        await silent.execute("COMMIT")
        await until(lambda: arrived(r) == Counter([1, 2, 3, 4]))
        assert time.monotonic() - committed_at < 0.5
        assert await r.db.fetch(INVARIANT) == []


@pytest.mark.parametrize(("slots", "statements", "rows"), [(4_000, 40, 500), (40, 4, 500), (4, 10, 100)])
async def test_a_hundred_accounts_at_full_speed(dsn: str, slots: int, statements: int, rows: int) -> None:
    """However few the slots: lanes that wait for a share of them are all called in the end."""
    async with rig(
        dsn, slots=slots, headers_timeout_s=60
    ) as r:  # the receiver shares the loop: on a busy machine it answers late
        for n in range(100):
            await r.endpoint(f"/{n}", account=f"a{n}", timeout_ms=60_000)
        for _ in range(statements):
            await r.db.execute(
                """INSERT INTO webhook.outbox (account_id, type, payload)
                   SELECT 'a' || n % 100, 'load.event', json_build_object('n', n) FROM generate_series(0, $1::integer - 1) AS n""",
                rows,
            )
        await at_rest(r)
        assert len(r.received) == statements * rows
