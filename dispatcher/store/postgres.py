"""The store on PostgreSQL: five sessions, and the statements of queries.sql in the engine's words.

owner     holds the owner lock, nothing else after Start: losing it says that another may own the log
listener  LISTEN; wake-ups only, never data
reader    every read of the log, one after another; holds the doorbell's lock while the engine sleeps
recorder  every batch, one transaction each (recording.py)
config    configuration changes and the few updates of endpoint rows, so that nobody's open transaction on those
          stops the recorder
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import asyncpg
import structlog

from dispatcher.domain.endpoint import FOREVER, Endpoint, EndpointId, EndpointState, Subscription, like_pattern
from dispatcher.domain.event import Event, PublicIds, traceparent_of
from dispatcher.domain.filters import Rule
from dispatcher.domain.moment import from_us, to_us
from dispatcher.domain.ordering import parse_ordering
from dispatcher.domain.ranges import IdRanges
from dispatcher.domain.run import Run, RunSource, RunState
from dispatcher.domain.sealing import Keyring, secret_place
from dispatcher.domain.shape import PLAIN
from dispatcher.domain.signing import check_key, scheme_of
from dispatcher.domain.url import parse_url
from dispatcher.errors import DatabaseRefusedError, DispatcherError, InputError
from dispatcher.ports import (
    Batch,
    ConfigChanges,
    DueRetry,
    FencedError,
    HeadPage,
    Holders,
    Kinds,
    LaneRow,
    LifeLostError,
    Page,
    Ranges,
    Recorded,
    RetryPage,
    RunPage,
    Started,
    StoreAwayError,
    Summary,
)
from dispatcher.settings import Settings
from dispatcher.store import recording, standby
from dispatcher.store.credentials import shape_of
from dispatcher.store.recording import PG_EPOCH_US
from dispatcher.store.session import Connection, Session
from dispatcher.store.sql import SQL
from dispatcher.store.standby import Look, Watch, session_name

_log = structlog.get_logger(room="store")

RUN_SCAN_IDS_MAX = 200_000  # how many ids one page of a run may pass over
CACHED_SEQUENCE = (
    "the sequence webhook.outbox_id_seq has CACHE {cache}: sessions would commit ids long after their neighbours were read, "
    "and those events would be lost; run ALTER SEQUENCE webhook.outbox_id_seq CACHE 1"
)
START_S = 60.0  # bounds Start, once it has the lock: reading 100,000 endpoints took 9 s
BEAT_S = 1.0
START_PAGE_ROWS = 1_000
# Changes of a look, all applied in one turn of the loop: one of the catalogue may be one of every endpoint.
CONFIG_CHANGES = 500
LOCK_REFUSALS_MAX = 15  # about 10 s of asking for our lock, which another session has without raising the epoch

MAY_NOT_END = (
    "another dispatcher owns this database as role {role}, and {us} may not end its session: a standby that can't do that can't take over from "
    "an owner that is frozen or cut off; let both log in as the same role, or GRANT pg_signal_backend TO {us} (role {role} must not be a "
    "superuser then)"
)

# Without these a plan made while a table was empty would scan it for ever; custom plans would cost 0.5 ms each over many partitions.
_READER_PARAMETERS = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "enable_bitmapscan": "off"}
_RECORDER_PARAMETERS = {
    # A crash costs the recorder duplicates, never losses (DESIGN §10); producers keep their own setting.
    "synchronous_commit": "off",
    # A process that is frozen in the middle of a batch holds the fence, and its successor's Start would wait for that as long.
    "idle_in_transaction_session_timeout": "3s",
    # Its few joins look up a handful of rows. Planned while the log was small, one of them would hash all of it, and go on so as it grows.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


class PgStore:
    """The `Store` port on PostgreSQL."""

    def __init__(self, dsn: str, settings: Settings) -> None:
        timeout_s = settings.statement_timeout_s
        self._settings = settings
        self._keyring = settings.keyring
        # Whatever the server's default: an epoch that a crash could take back would fence nobody.
        # The lock timeout is for raise_epoch, see there.
        self._owner = Session(
            dsn, "owner", timeout_s=timeout_s, parameters={"synchronous_commit": "on", "lock_timeout": "500ms"}
        )
        self._listener = Session(dsn, "listener", timeout_s=timeout_s)
        self._reader = Session(dsn, "reader", timeout_s=timeout_s, setup=_plain_codecs, parameters=_READER_PARAMETERS)
        self._recorder = Session(
            dsn,
            "recorder",
            timeout_s=timeout_s,
            parameters=_RECORDER_PARAMETERS | {"statement_timeout": f"{timeout_s * 1000:.0f}ms"},
        )
        self._config = Session(dsn, "config", timeout_s=timeout_s, parameters={"lock_timeout": "300ms"})
        self._sessions = (self._owner, self._listener, self._reader, self._recorder, self._config)
        self._epoch = 0
        self._owner_pid = 0  # the backend that holds the owner lock for us
        self._lock_refusals = 0
        self._public_ids: PublicIds | None = None

    def round_trips(self) -> dict[str, tuple[int, int]]:
        """Return how many pieces of work each session did, and how often it connected."""
        return {session.name: (session.round_trips, session.connects) for session in self._sessions}

    # ── start and ownership ──

    async def start(self, owner: str, on_standby: Callable[[], None] = lambda: None) -> Started:
        await self.close()
        for session in self._sessions:
            session.life = None
        started = await self._start_if_free(owner)
        if started is None:
            on_standby()
            started = await self._stand_by(owner)
        return started

    async def _start_if_free(
        self, owner: str, *, waited_for: Look | None = None, version: int = 0, reason: str = ""
    ) -> Started | None:
        if not (await self._owner.run(lambda c: c.fetchrow(SQL.try_own)))["had"]:
            return None
        begin = partial(self._begin_if_free, owner=owner, waited_for=waited_for, version=version, reason=reason)
        return await self._owner.run(begin, timeout_s=START_S)

    async def _stand_by(self, owner: str) -> Started:
        """Wait until the owner's session ends, or its heartbeat (standby.py)."""
        await self._owner.run(lambda c: self._owner.set_parameter(c, "application_name", session_name(owner)))
        version = await self._owner.run(lambda c: c.fetchval(SQL.schema_version))
        watch, told = Watch(), None
        while True:
            look = await self._owner.run(_look_at_owner)
            if look.holder is not None and look.epoch != told:
                told = look.epoch
                _log.info("standby.waiting", owner=look.owner, epoch=look.epoch, heartbeat_age_s=look.heartbeat_age_s)
            reason = "the owner's session ended"
            if watch.is_dead(look):
                reason = "the owner's heartbeat stopped"
                await self._end_owner(look)
            elif look.holder is not None:
                await asyncio.sleep(standby.POLL_S)
            started = await self._start_if_free(owner, waited_for=look, version=version, reason=reason)
            if started is not None:
                return started

    async def _end_owner(self, look: Look) -> None:
        _log.warning("standby.ends_owner", owner=look.owner, heartbeat_age_s=look.heartbeat_age_s, pid=look.holder)
        heartbeat_at = None if look.heartbeat_us is None else from_us(look.heartbeat_us)
        await self._owner.run(lambda c: c.fetch(SQL.end_owner, look.holder, heartbeat_at))

    async def _begin_if_free(
        self, connection: Connection, owner: str, waited_for: Look | None, version: int, reason: str
    ) -> Started | None:
        """Begin on the connection that has the lock. It is taken once more: the connection may have been made again in between."""
        lock = await connection.fetchrow(SQL.try_own)
        if not lock["had"]:
            return None
        self._owner_pid, self._lock_refusals = lock["pid"], 0
        if waited_for is not None:
            _log.warning(
                "standby.taking_over",
                reason=reason,
                owner=waited_for.owner,
                epoch=waited_for.epoch,
                heartbeat_age_s=waited_for.heartbeat_age_s,
            )
            found = await connection.fetchval(SQL.schema_version)
            if found != version:  # it may have waited for weeks
                raise DatabaseRefusedError(
                    f"the schema went from version {version} to {found} while this standby waited; start the program that belongs to it"
                )
        await self._owner.set_parameter(connection, "application_name", "dispatcher owner")
        return await self._begin(connection, owner)

    async def _begin(self, connection: Connection, owner: str) -> Started:
        await connection.execute(SQL.begin_life)
        life = await connection.fetchval(SQL.life)
        epoch = await self._raise_epoch(connection, owner)
        loop = asyncio.get_running_loop()
        began = loop.time()
        beating = asyncio.create_task(self._beat(epoch))
        try:
            started = await self._read_start(connection, epoch)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        if loop.time() - began > BEAT_S:  # with so many endpoints the engine takes a while to make its lanes as well
            await connection.execute(SQL.beat, epoch)
        for session in self._sessions:
            session.life = life
        self._epoch = epoch
        return started

    async def _beat(self, epoch: int) -> None:
        """Be alive for a standby although nothing is recorded yet."""
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(StoreAwayError):
                await self._config.run(lambda c: c.execute(SQL.beat, epoch))

    async def _read_start(self, connection: Connection, epoch: int) -> Started:
        await connection.execute(SQL.forget_deleted)
        await connection.execute(SQL.trim_config_changes)
        self._public_ids = PublicIds(await connection.fetchval(SQL.id_key))
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            checkpoint = await connection.fetchrow(SQL.read_checkpoint)
            config_seq = await connection.fetchval(SQL.config_seq)
            lanes = [
                LaneRow(row["endpoint_id"], row["settled"], _ranges(row["holes"]), row["backlog"])
                for row in await connection.fetch(SQL.read_lanes)
            ]
            runs = await connection.fetch(SQL.open_runs, None)
            # By pages: a hundred thousand at once kept the loop busy, and without a heartbeat, for seconds. The server makes the next
            # page while we read this one.
            endpoints: list[Endpoint] = []
            cursor = await connection.cursor(SQL.endpoints, None)
            rows = await cursor.fetch(START_PAGE_ROWS)
            while rows:
                following = asyncio.create_task(cursor.fetch(START_PAGE_ROWS))
                for _ in range(2):
                    await asyncio.sleep(0)  # it is asked for; uvloop writes at the end of a turn
                endpoints += self._endpoints(rows, runs)
                rows = await following
            due = {row["id"]: to_us(row["due_at"]) for row in await connection.fetch(SQL.read_retries_due)}
        last_id = await connection.fetchval(SQL.last_id)
        return Started(
            epoch=epoch,
            position=checkpoint["position"],
            gaps=_ranges(checkpoint["gaps"]),
            lanes=lanes,
            endpoints=endpoints,
            config_seq=config_seq,
            last_id=last_id,
            retries_due=due,
            # Asked last: reading many endpoints takes seconds, by which the dispatcher's clock would be slow for as long as it lives.
            wall_us=to_us(await connection.fetchval(SQL.wall)),
        )

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions))

    async def _raise_epoch(self, connection: Connection, owner: str) -> int:
        """Durable before anything is read: whoever records under an older epoch is refused from here on."""
        while True:  # the session's timeout bounds it
            try:
                epoch: int = await connection.fetchval(SQL.raise_epoch, owner)
                return epoch
            except asyncpg.LockNotAvailableError:
                # A recorder that was frozen or cut off in the middle of a batch holds the checkpoint's row.
                ended = await connection.fetch(SQL.end_recorders)
                _log.warning("start.checkpoint_locked", recorders_ended=len(ended))

    def on_owner_lost(self, callback: Callable[[], None]) -> None:
        self._owner.on_lost(callback)
        if not self._owner.is_connected:
            callback()

    async def is_stood_by(self) -> bool:
        found: bool = await self._reader.run(lambda c: c.fetchval(SQL.is_stood_by))
        return found

    async def hold_ownership(self) -> None:
        async def work(connection: Connection) -> tuple[Any, int]:
            lock, epoch = await connection.fetchrow(SQL.try_own), await connection.fetchval(SQL.epoch)
            if not lock["had"] and epoch == self._epoch:
                # The server may take our former session for alive; whoever else has it stays.
                await connection.fetch(SQL.end_own_session, self._owner_pid)
                lock, epoch = await connection.fetchrow(SQL.try_own), await connection.fetchval(SQL.epoch)
            return lock, epoch

        lock, epoch = await self._owner.run(work)
        if epoch != self._epoch:
            raise FencedError(f"another dispatcher took over: epoch {epoch} rules, ours was {self._epoch}")
        if lock["had"]:
            self._owner_pid, self._lock_refusals = lock["pid"], 0
            return
        self._lock_refusals += 1
        if self._lock_refusals >= LOCK_REFUSALS_MAX:
            raise FencedError(f"another session keeps the owner lock from us, under our epoch {epoch}")
        raise StoreAwayError("owner: another session holds the lock, and has not raised the epoch yet")

    # ── reading ──

    async def head(self, after: int, limit: int, bytes_max: int, young: Sequence[int], *, attempted: bool) -> HeadPage:
        query = SQL.head_attempted if attempted else SQL.head
        rows = await self._reader.run(lambda c: c.fetch(query, after, limit, bytes_max, young))
        last_id, config_seq = rows[0][0], rows[0][1]
        if rows[0][2] is None:
            return HeadPage([], [] if attempted else None, False, last_id, config_seq)
        above = sum(1 for row in rows if row[2] > after) if young else len(rows)
        full = above >= limit or rows[-1][12] >= bytes_max
        skips = [row[13] for row in rows] if attempted else None
        return HeadPage(self._events(rows, 2), skips, full, last_id, config_seq)

    async def holders(self) -> Holders:
        rows = await self._reader.run(lambda c: c.fetch(SQL.holders))
        return Holders(
            frozenset(row["holder"] for row in rows if not row["prepared"]),
            frozenset(row["holder"] for row in rows if row["prepared"]),
        )

    async def probe(self, ranges: Ranges, limit: int, bytes_max: int, of: Kinds | None = None) -> list[Page]:
        lows, highs = [low for low, _ in ranges], [high for _, high in ranges]
        accounts, types = of or (None, None)
        rows = await self._reader.run(lambda c: c.fetch(SQL.probe, lows, highs, limit, bytes_max, accounts, types))
        return self._paged(rows, len(ranges), limit, bytes_max)

    async def summary(self, ranges: Ranges) -> list[Summary]:
        lows, highs = [low for low, _ in ranges], [high for _, high in ranges]
        return [Summary(*row) for row in await self._reader.run(lambda c: c.fetch(SQL.summary, lows, highs))]

    async def holes(
        self, account_id: str, ranges: Sequence[tuple[int, int]], limit: int, bytes_max: int, of: Sequence[int]
    ) -> list[Page]:
        lows, highs = [low for low, _ in ranges], [high for _, high in ranges]
        rows = await self._reader.run(lambda c: c.fetch(SQL.holes, account_id, lows, highs, limit, bytes_max, of))
        return self._paged(rows, len(ranges), limit, bytes_max)

    async def account(
        self, account_id: str, after: int, upto: int, types: Sequence[str] | None, limit: int, bytes_max: int, of: Sequence[int],
    ) -> Page:  # fmt: skip
        rows = await self._reader.run(
            lambda c: c.fetch(SQL.account, account_id, after, upto, types, limit, bytes_max, of)
        )
        return self._page(rows, limit, bytes_max)

    async def urgent(
        self, account_id: str, after: int, upto: int, limit: int, bytes_max: int, of: Sequence[int]
    ) -> Page:
        rows = await self._reader.run(lambda c: c.fetch(SQL.urgent, account_id, after, upto, limit, bytes_max, of))
        return self._page(rows, limit, bytes_max)

    async def keys(
        self, account_id: str, keys: Sequence[tuple[str, int]], upto: int, limit: int, bytes_max: int, of: Sequence[int],
    ) -> list[Page]:  # fmt: skip
        names, lows = [key for key, _ in keys], [low for _, low in keys]
        rows = await self._reader.run(lambda c: c.fetch(SQL.keys, account_id, names, lows, upto, limit, bytes_max, of))
        pages = self._paged(rows, len(keys), len(keys) * limit + 1, bytes_max)
        for page in pages:
            page.full = page.full or len(page.events) >= limit
        return pages

    async def held_keys(self, endpoint_id: int) -> list[tuple[str, int]]:
        return [(row[0], row[1]) for row in await self._reader.run(lambda c: c.fetch(SQL.held_keys, endpoint_id))]

    async def due_retries(
        self, wanted: Sequence[tuple[int, int]], bytes_max: int, *, without_runs: Sequence[int] = ()
    ) -> list[RetryPage]:
        endpoints, rooms = [endpoint_id for endpoint_id, _ in wanted], [room for _, room in wanted]
        rows = await self._reader.run(lambda c: c.fetch(SQL.due_retries, endpoints, rooms, bytes_max, without_runs))
        pages = [RetryPage([], True, None) for _ in wanted]
        for row in rows:
            pages[row[0] - 1] = RetryPage([], False, row[1])
        due = [row for row in rows if row[6] is not None]
        orphans = [row for row in rows if row[6] is None and row[2] is not None]
        if orphans:
            ids = [endpoints[row[0] - 1] for row in orphans], [row[2] for row in orphans], [row[3] for row in orphans]
            await self._reader.run(lambda c: c.execute(SQL.end_orphans, *ids))
            _log.warning("retries.orphaned", endpoints=sorted(set(ids[0])), rows=len(orphans))
            for row in orphans:
                pages[row[0] - 1].full = pages[row[0] - 1].orphaned = True
        for event, row in zip(self._events(due, 6), due, strict=True):
            pages[row[0] - 1].retries.append(DueRetry(event, row[3], row[4], row[5]))
        for page, room in zip(pages, rooms, strict=True):
            page.full = page.full or len(page.retries) >= room
        if due and due[-1][16] >= bytes_max:
            pages[due[-1][0] - 1].full = True
        return pages

    async def run_page(
        self, endpoint_id: int, account_id: str, run: Run, after: int, limit: int, bytes_max: int
    ) -> RunPage:
        upto, query = run.upto_id, SQL.run_page_dead
        if run.source is RunSource.LOG:
            upto = min(upto, after + RUN_SCAN_IDS_MAX)
            query = SQL.run_page_failed if run.only_failed else SQL.run_page
        types = [like_pattern(pattern) for pattern in run.patterns]
        rows = await self._reader.run(
            lambda c: c.fetch(query, account_id, after, upto, types, limit, endpoint_id, run.id, bytes_max)
        )
        full = bool(rows) and (len(rows) >= limit or rows[-1]["bytes"] >= bytes_max)
        events = self._events([row for row in rows if row["id"] is not None], 1, plain=True)
        return RunPage(events, rows[-1]["seen"] if full else upto)

    async def arm_doorbell(self) -> bool:
        armed: bool = await self._reader.run(lambda c: c.fetchval(SQL.arm_doorbell))
        return armed

    async def disarm_doorbell(self) -> None:
        await self._reader.run(lambda c: c.fetchval(SQL.disarm_doorbell))

    def _page(self, rows: Sequence[Any], limit: int, bytes_max: int) -> Page:
        full = bool(rows) and (len(rows) >= limit or rows[-1][10] >= bytes_max)
        return Page(self._events(rows, 0), [row[11] for row in rows], full)

    def _events(self, rows: Sequence[Any], at: int, *, plain: bool = False) -> list[Event]:
        """Make events of the ten event columns (`plain`: six) that start at column `at`; one cipher call for the page."""
        assert self._public_ids is not None
        public = self._public_ids.encode([(row[at + 4], row[at]) for row in rows])
        if plain:
            return [
                Event(row[at], row[at + 1], row[at + 2], row[at + 3], row[at + 4], row[at + 5], public_id)
                for row, public_id in zip(rows, public, strict=True)
            ]
        return [
            Event(
                row[at], row[at + 1], row[at + 2], row[at + 3], row[at + 4], row[at + 5], public_id, row[at + 6], row[at + 7], row[at + 8],
                None if row[at + 9] is None else traceparent_of(row[at + 9]),
            )
            for row, public_id in zip(rows, public, strict=True)
        ]  # fmt: skip

    def _paged(self, rows: Sequence[Any], ranges: int, limit: int, bytes_max: int) -> list[Page]:
        """Deal rows (n, event columns, bytes, attempted) out to one page a range. Where the statement's bound cut, that range and those
        after it are full."""
        pages = [Page([], [], False) for _ in range(ranges)]
        for event, row in zip(self._events(rows, 1), rows, strict=True):
            page = pages[row[0] - 1]
            page.events.append(event)
            assert page.attempted is not None
            page.attempted.append(row[12])
        if rows and (len(rows) >= limit or rows[-1][11] >= bytes_max):
            for page in pages[rows[-1][0] - 1 :]:
                page.full = True
        return pages

    # ── wake-ups ──

    async def listen(self, on_doorbell: Callable[[], None], on_config: Callable[[], None]) -> None:
        lost = asyncio.Event()
        self._listener.on_lost(lost.set)

        async def subscribe(connection: Connection) -> None:
            await connection.add_listener("webhook_doorbell", lambda *_: on_doorbell())
            await connection.add_listener("webhook_config", lambda *_: on_config())

        await self._listener.run(subscribe)
        connects = self._listener.connects
        on_doorbell()  # whatever rang while nobody listened
        on_config()
        while not lost.is_set():
            try:
                async with asyncio.timeout(5):
                    await lost.wait()
            except TimeoutError:
                # A connection that a middlebox dropped looks healthy from here until something is sent on it.
                await self._listener.run(lambda c: c.fetchval(SQL.ping))
                if self._listener.connects != connects:
                    break  # it was lost and made again in between, and nobody listens on the new one
        raise StoreAwayError("listener: the connection was closed")

    # ── recording ──

    async def record(self, batch: Batch) -> Recorded:
        try:
            return await self._recorder.run(lambda c: recording.write(c, batch, by_row=False))
        except asyncpg.PostgresError as exc:
            # COPY stores nothing if one row is refused: by a batch that is sent again, or by a value.
            if exc.sqlstate is None or exc.sqlstate[:2] not in ("22", "23"):
                raise
        return await self._recorder.run(lambda c: recording.write(c, batch, by_row=True), timeout_s=60)

    # ── configuration ──

    async def config_changes(self, after_seq: int, epoch: int, again: Sequence[int] = ()) -> ConfigChanges:
        rows = await self._config.run(lambda c: c.fetch(SQL.config_changes, after_seq, CONFIG_CHANGES))
        if rows[0]["cache"] != 1:
            raise DatabaseRefusedError(CACHED_SEQUENCE.format(cache=rows[0]["cache"]))
        if rows[0]["epoch"] != epoch:
            raise FencedError(f"another dispatcher took over: epoch {rows[0]['epoch']} rules, ours was {epoch}")
        changed = [row for row in rows if row["seq"] is not None]
        ids = sorted({row["endpoint_id"] for row in changed} | set(again))
        if not ids:
            return ConfigChanges(after_seq, to_us(rows[0]["wall"]))
        runs = await self._config.run(lambda c: c.fetch(SQL.open_runs, ids))
        endpoints = self._endpoints(await self._config.run(lambda c: c.fetch(SQL.endpoints, ids)), runs)
        return ConfigChanges(
            seq=changed[-1]["seq"] if changed else after_seq,
            wall_us=to_us(rows[0]["wall"]),
            endpoints=endpoints,
            gone=sorted(set(ids) - {endpoint.id for endpoint in endpoints}),
            forget=sorted({row["endpoint_id"] for row in changed if row["forget"]}),
            more=len(changed) == CONFIG_CHANGES,
        )

    async def note_failing(self, failing_since_us: dict[int, int | None]) -> None:
        values = [None if us is None else from_us(us) for us in failing_since_us.values()]
        await self._config.run(lambda c: c.execute(SQL.note_failing, list(failing_since_us), values, self._epoch))

    async def tell_failing(self, endpoint_id: int, failing_since_us: int) -> None:
        await self._config.run(
            lambda c: c.execute(SQL.tell_failing, endpoint_id, from_us(failing_since_us), self._epoch)
        )

    async def tell_recovered(self, endpoint_id: int, failing_since_us: int) -> None:
        await self._config.run(
            lambda c: c.execute(SQL.tell_recovered, endpoint_id, from_us(failing_since_us), self._epoch)
        )

    async def disable_endpoint(self, endpoint_id: int, reason: str, failing_since_us: int | None) -> None:
        since = None if failing_since_us is None else from_us(failing_since_us)
        await self._config.run(lambda c: c.execute(SQL.disable_endpoint, endpoint_id, reason, since, self._epoch))

    def _endpoints(self, rows: Sequence[Any], run_rows: Sequence[Any]) -> list[Endpoint]:
        runs: defaultdict[int, list[Run]] = defaultdict(list)
        for row in run_rows:
            runs[row["endpoint_id"]].append(_run(row))
        return [_endpoint(row, tuple(runs.get(row["id"], ())), self._settings, self._keyring) for row in rows]


async def _look_at_owner(connection: Connection) -> Look:
    row = await connection.fetchrow(SQL.look_at_owner)
    if row["pid"] is not None and not row["may_end"]:
        raise DatabaseRefusedError(MAY_NOT_END.format(role=row["role"], us=row["us"]))
    heartbeat_at = row["heartbeat_at"]
    return Look(
        holder=row["pid"],
        owner=row["owner"],
        epoch=row["epoch"],
        heartbeat_us=None if heartbeat_at is None else to_us(heartbeat_at),
        held_up=row["held_up"],
        now_us=to_us(row["now"]),
    )


async def _plain_codecs(connection: Connection) -> None:
    """Payloads stay bytes, timestamps become µs since 1970: a datetime per event would cost a microsecond and be turned back at once."""
    await connection.set_type_codec("json", schema="pg_catalog", encoder=bytes, decoder=bytes, format="binary")
    await connection.set_type_codec(
        "timestamptz",
        schema="pg_catalog",
        encoder=lambda us: (us - PG_EPOCH_US,),
        decoder=lambda t: t[0] + PG_EPOCH_US,
        format="tuple",
    )


def _run(row: Any) -> Run:
    return Run(
        id=row["id"],
        source=RunSource(row["source"]),
        after_id=row["after_id"],
        upto_id=row["upto_id"],
        patterns=tuple(row["patterns"]),
        only_failed=row["only_failed"],
        rate_per_s=row["rate_per_s"],
        state=RunState(row["state"]),
        settled=row["settled"],
        attempted=row["attempted"],
        delivered=row["delivered"],
        dead=row["dead"],
        rule=None if row["rule"] is None else Rule.from_json(row["rule"]),
    )


def _endpoint(row: Any, runs: tuple[Run, ...], settings: Settings, keyring: Keyring) -> Endpoint:
    schedule = row["retry_schedule_s"]
    shape, signing = PLAIN, tuple[str, ...]()
    try:
        place = secret_place(row["id"])
        signing = tuple(keyring.open(secret, place) for secret in row["secrets"])
        for secret in signing:
            check_key(secret, scheme_of(secret))
        shape = shape_of(row, keyring)
        if not signing:
            raise InputError(
                f"it has no secret to sign with in scheme {shape.signing}; give it one: `dispatcher endpoint rotate-secret`"
            )
        target = shape.aimed(parse_url(row["url"], settings.address_policy))
    except DispatcherError as exc:
        # Saved by hand, under other settings, or with a key that we don't have. An endpoint that is left out would count as deleted, and its
        # events as settled.
        _log.error("endpoint.unusable", endpoint_id=row["id"], error=str(exc))
        target = None
    return Endpoint(
        id=EndpointId(row["id"]),
        account_id=row["account_id"],
        target=target,
        state=EndpointState(row["state"]),
        secrets=signing,
        subscriptions=tuple(
            Subscription(
                s[0],
                s[1],
                s[2],
                FOREVER if s[3] is None else s[3],
                s[4],
                None if s[5] is None else Rule.from_json(s[5]),
            )
            for s in row["subscriptions"]
        ),
        timeout_s=row["timeout_ms"] / 1000,
        rate_per_s=row["rate_per_s"],
        rate_burst=row["rate_burst"],
        in_flight_max=row["in_flight_max"],
        retry_schedule_s=None if schedule is None else tuple(schedule),
        failing_since_us=None if row["failing_since"] is None else to_us(row["failing_since"]),
        failing_told=row["failing_told"],
        state_reason=row["state_reason"],
        response_control=row["response_control"],
        reload_at_us=None if row["reload_at"] is None else to_us(row["reload_at"]),
        runs=runs,
        shape=shape,
        ordering=parse_ordering(row["ordering"]),
    )


def _ranges(multirange: Any) -> IdRanges:
    return IdRanges((r.lower, r.upper - 1) for r in multirange)


__all__ = ["LifeLostError", "PgStore"]
