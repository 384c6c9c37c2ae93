"""Everything that has ever kept a dispatcher from delivering, looked at one after the other: what was found, and what to do about it.

Each check is a function of the `Patient` that returns a `Finding`. Checks that raise are findings too, so that one that isn't
allowed to look doesn't keep the others from it. Nothing is changed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import asyncpg

from dispatcher.domain.text import amount
from dispatcher.errors import DispatcherError
from dispatcher.settings import Settings
from dispatcher.store.migrate import check
from dispatcher.store.observe import OBSERVE
from dispatcher.store.partitions import list_partitions
from dispatcher.store.sealing import check_keys
from dispatcher.store.session import Connection, is_away
from dispatcher.store.sql import load
from dispatcher.store.status import ALIVE, NONE, read_status

DOCTOR = load(Path(__file__).with_name("doctor.sql"))

WRITER_S = 60.0
TRANSACTION_S = 3_600.0
PREPARED_S = 300.0
GAP_RANGES = 500  # half of what a checkpoint keeps apart
LATE_S, TOO_LATE_S = 30.0, 600.0
NEARLY = 0.8  # of what the log may take
SKEW_S = 2.0
NOTIFY_S = 5.0
CONNECTIONS_SPARE = 10


class Grade(Enum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy`: what to do, unless it is good."""

    check: str
    grade: Grade
    found: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grade": self.grade.value}


@dataclass(slots=True)
class Patient:
    connection: Connection
    settings: Settings
    status: dict[str, Any]
    name: str = ""

    def good(self, found: str) -> list[Finding]:
        return [Finding(self.name, Grade.GOOD, found)]

    def warning(self, found: str, remedy: str) -> list[Finding]:
        return [Finding(self.name, Grade.WARNING, found, remedy)]

    def bad(self, found: str, remedy: str) -> list[Finding]:
        return [Finding(self.name, Grade.BAD, found, remedy)]


async def examine(connection: Connection, settings: Settings) -> list[Finding]:
    """Look at everything. Where the schema isn't as it must be nothing else can be looked at."""
    patient = Patient(connection, settings, {}, "schema")
    try:
        findings = [Finding("schema", Grade.WARNING, *_split(text)) for text in await check(connection, settings)]
    except DispatcherError as exc:
        return [Finding("schema", Grade.BAD, *_split(str(exc)))]
    findings = findings or patient.good(
        "installed, of this program's version; its privileges, its sequence and its settings are right"
    )
    patient.status = await read_status(connection)
    for name, look in CHECKS.items():
        patient.name = name
        try:
            findings += await look(patient)
        except (asyncpg.PostgresError, DispatcherError) as exc:
            if is_away(exc):
                raise
            findings += patient.warning(
                f"it can't be looked at: {exc}", "run this as the role of the service, or grant it pg_read_all_stats"
            )
    return findings


def _split(text: str) -> tuple[str, str]:
    """Part a sentence of the start's own checks into what is so and what to do: they have a semicolon or a colon between."""
    for mark in ("; ", ". ", ": "):
        found, separator, remedy = text.partition(mark)
        if separator:
            return found, remedy
    return text, text


async def _keys(p: Patient) -> list[Finding]:
    warnings = await check_keys(p.connection, p.settings.keyring)
    return [Finding(p.name, Grade.WARNING, *_split(text)) for text in warnings] or p.good(
        "every secret can be opened with the keys that are set"
    )


async def _owner(p: Patient) -> list[Finding]:
    owner, standbys = p.status["owner"], len(p.status["standbys"])
    if owner["state"] == NONE:
        return p.bad(
            "no dispatcher owns the database: nothing is sent", "start `dispatcher run`; its log says why it ended"
        )
    if owner["state"] != ALIVE:
        pid, silent_s = owner["backend_pid"], owner["heartbeat_age_s"]
        last = (
            "nobody has ever begun" if silent_s is None else f"{owner['name']} has given no sign for {silent_s:.0f} s"
        )
        return p.bad(
            f"session {pid} holds the owner lock, and {last}",
            "look whether its process is frozen or cut off from the database; a standby takes over where that session ends: "
            f"SELECT pg_terminate_backend({pid})",
        )
    if not standbys:
        return p.good(f"{owner['name']} delivers; nobody stands by (another `dispatcher run` would)")
    return p.good(f"{owner['name']} delivers, {standbys} standing by")


async def _server(p: Patient) -> list[Finding]:
    row = await p.connection.fetchrow(DOCTOR.server)
    if row["fsync"] != "on" or row["full_page_writes"] != "on":
        return p.bad(
            f"fsync is {row['fsync']}, full_page_writes is {row['full_page_writes']}: a crash of the server loses what was committed",
            "set both to on in postgresql.conf and reload it",
        )
    free = row["connections_max"] - row["connections"]
    if free < CONNECTIONS_SPARE:
        return p.warning(
            f"{row['connections']} of {row['connections_max']} connections are in use",
            "raise max_connections, or put the platform's clients behind a pooler; a dispatcher needs 8, "
            "and DISPATCHER_WEB_POOL_SIZE + 2 where it serves the panel",
        )
    return p.good(f"commits are durable; {row['connections']} of {row['connections_max']} connections are in use")


async def _clock(p: Patient) -> list[Finding]:
    began, before = time.monotonic(), time.time()
    theirs = (await p.connection.fetchrow(DOCTOR.server))["now"].timestamp()
    skew_s = theirs - (before + (time.monotonic() - began) / 2)
    if abs(skew_s) > SKEW_S:
        return p.warning(
            f"the database's clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's",
            "run NTP on both: signatures carry the database's time, and receivers refuse one that is five minutes off",
        )
    return p.good(f"the database's clock and this machine's differ by {abs(skew_s):.1f} s")


async def _listen(p: Patient) -> list[Finding]:
    heard = asyncio.Event()
    connection = p.connection

    def on_notify(*_: object) -> None:
        heard.set()

    await connection.add_listener("webhook_doctor", on_notify)
    try:
        await connection.fetchval(DOCTOR.notify, "hello")
        async with asyncio.timeout(NOTIFY_S):
            await heard.wait()
    except TimeoutError:
        return p.bad(
            "a NOTIFY did not come back on the connection that listens, so events wait for the poll once a second",
            "point DISPATCHER_DATABASE_URL at PostgreSQL itself, or at a pool with pool_mode=session",
        )
    finally:
        await connection.remove_listener("webhook_doctor", on_notify)
    return p.good("a NOTIFY arrives")


async def _transactions(p: Patient) -> list[Finding]:
    writers = await p.connection.fetch(DOCTOR.writers, WRITER_S)
    seen = [row for row in writers if row["age_s"] is not None]
    if seen:
        return p.warning(
            f"{_who(seen[0])} has had the log open for writing for {seen[0]['age_s']:,.0f} s: ids that it took are looked for until it ends",
            "end it, or have producers commit soon; idle_in_transaction_session_timeout does so by itself",
        )
    oldest = await p.connection.fetchrow(DOCTOR.oldest_transaction)
    if oldest is not None and oldest["age_s"] > TRANSACTION_S:
        return p.warning(
            f"{_who(oldest)} has had a transaction open for {oldest['age_s']:,.0f} s: vacuum removes nothing that it may still see",
            "end it; deliveries don't wait for it, but tables that change grow",
        )
    hidden = (
        f"; {amount(len(writers), 'writes', 'write')} without showing since when (grant pg_read_all_stats to see)"
        if writers
        else ""
    )
    return p.good(f"no transaction has written to the log for over {WRITER_S:.0f} s{hidden}")


async def _prepared(p: Patient) -> list[Finding]:
    rows = await p.connection.fetch(DOCTOR.prepared)
    if rows and rows[0]["age_s"] > PREPARED_S:
        return p.warning(
            f"{amount(len(rows), 'prepared transaction')}; {rows[0]['gid']!r} of {rows[0]['user']} waits for {rows[0]['age_s']:,.0f} s",
            "COMMIT PREPARED or ROLLBACK PREPARED it: until then its events are not sent, and its ids stay open",
        )
    return p.good(amount(len(rows), "prepared transaction") if rows else "no prepared transaction")


async def _gaps(p: Patient) -> list[Finding]:
    log = p.status["log"]
    found = f"{amount(log['gap_ids'], 'id')} in {amount(log['gap_ranges'], 'range')} below the position, not visible or not settled"
    if log["gap_ranges"] > GAP_RANGES:
        return p.warning(
            found,
            "look for long transactions above; near 1,000 ranges they are merged, and more is read again than needed",
        )
    return p.good(found)


async def _partitions(p: Patient) -> list[Finding]:
    row = await p.connection.fetchrow(DOCTOR.in_default)
    if row["events"] or row["attempts"]:
        what = " and ".join(name for name in ("events", "attempts") if row[name])
        return p.warning(
            f"the DEFAULT partition holds {what}: nobody made partitions in time",
            "let `dispatcher run` adopt it, or run `dispatcher maintain`; then see in its log what keeps the janitor",
        )
    ahead = sum(1 for leaf in await list_partitions(p.connection) if leaf["state"] == "ahead")
    if not ahead:
        return p.warning(
            "no partition is ahead of the last id",
            "run `dispatcher maintain`, or see in the service's log what keeps the janitor",
        )
    return p.good(f"{ahead} ahead, the DEFAULT partition is empty")


async def _oldest(p: Patient) -> list[Finding]:
    age_s = (await p.connection.fetchrow(OBSERVE.oldest))["log_s"] or 0.0
    if age_s <= LATE_S:
        return p.good(
            "no event waits for the dispatcher itself"
            if not age_s
            else f"the oldest event that isn't settled is {age_s:.1f} s old"
        )
    grade = Grade.BAD if age_s > TOO_LATE_S else Grade.WARNING
    remedy = "see `owner` above; then the dispatcher's metrics: in flight at its bound, memory at its bound, or a slow recorder"
    return [
        Finding(p.name, grade, f"the oldest event that the dispatcher has not come to is {age_s:,.0f} s old", remedy)
    ]


async def _lanes(p: Patient) -> list[Finding]:
    lanes = p.status["lanes"]
    behind = [lane for lane in lanes["top"] if lane["state"] == "live" and lane["backlog"]]
    if not behind:
        return p.good("no live endpoint is behind")
    top = behind[0]
    behind_s = (await p.connection.fetchrow(OBSERVE.oldest))["behind_s"] or 0.0
    return p.warning(
        f"{amount(lanes['behind'], 'endpoint is', 'endpoints are')} behind with {amount(lanes['backlog'], 'event')}; "
        f"endpoint {top['endpoint_id']} of {top['account_id']} with "
        f"{top['backlog']:,}; the oldest was made {behind_s:,.0f} s ago",
        "`dispatcher endpoint show` says whether it fails, is slow or has a rate limit; `endpoint update --live` raises the limit; "
        "`endpoint pause --skip` ends what comes from then on, `endpoint delete` what waits too",
    )


async def _retention(p: Patient) -> list[Finding]:
    days, retry_days = p.settings.retention_days, p.settings.retry_age_max_s / 86_400
    found = f"events are kept for {days:g} days, a delivery is retried for up to {retry_days:g}"
    # A backlog must fit in between: an endpoint that was down until its retries ended still has fresh events waiting.
    if days < 1.5 * retry_days:
        return p.warning(
            found,
            "raise DISPATCHER_RETENTION_DAYS to twice the retries' time, or what waits behind a dead endpoint goes unsent",
        )
    bytes_max = p.settings.retention_bytes_max
    if bytes_max is not None:
        kept = await p.connection.fetchrow(DOCTOR.kept)
        kept_days = (kept["age_s"] or 0.0) / 86_400
        if kept["bytes"] > NEARLY * bytes_max and kept_days < min(days, 1.5 * retry_days):
            return p.warning(
                f"the log is at {kept['bytes'] / bytes_max:.0%} of its {bytes_max:,} bytes, "
                f"and its oldest event is {kept_days:.1f} days old; {found}",
                "raise DISPATCHER_RETENTION_BYTES_MAX, or what waits behind a dead endpoint goes unsent before its retries end",
            )
    return p.good(found)


CHECKS: dict[str, Callable[[Patient], Awaitable[list[Finding]]]] = {
    "owner": _owner,
    "server": _server,
    "clock": _clock,
    "listen": _listen,
    "encryption": _keys,
    "transactions": _transactions,
    "prepared transactions": _prepared,
    "gaps": _gaps,
    "partitions": _partitions,
    "oldest event": _oldest,
    "endpoints behind": _lanes,
    "retention": _retention,
}


def _who(row: Any) -> str:
    return f"{row['application_name'] or 'a session'} of {row['user']} (pid {row['pid']}, {row['state']})"
