"""Install and check the schema.

`migrate` is safe to repeat: it installs schema.sql where nothing is, else applies the migrations that are missing
(migrations/N.sql leads to version N, each in one transaction; before it, beside the producers, what N.online.sql
has: online.py), and brings two things in line with the settings, the
payload bound and the doorbell trigger. `check` is what `run` asks before it starts: it changes nothing and refuses
what could lose events, with the remedy.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from dispatcher.domain.retention import DAY_S
from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError, InputError
from dispatcher.settings import Settings
from dispatcher.store import event_types, online
from dispatcher.store.partitions import STATEMENTS as PARTITIONS
from dispatcher.store.postgres import CACHED_SEQUENCE
from dispatcher.store.session import Connection
from dispatcher.store.sql import SQL, load

ADMIN = load(Path(__file__).with_name("admin.sql"))

SCHEMA_VERSION = 2
PRIVILEGES = "-- ─── Privileges ─"  # where they begin in schema.sql
SERVER_VERSION_MIN = 150_000


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did, in words; empty if there was nothing to do."""

    version: int
    done: tuple[str, ...]


def schema_sql() -> str:
    """Return schema.sql: beside this package where it is installed, at the root of a checkout."""
    package = Path(__file__).parent.parent
    for path in (package / "schema.sql", package.parent / "schema.sql"):
        if path.is_file():
            return path.read_text()
    raise DatabaseRefusedError("schema.sql is missing from this installation; install the package again")


def _nobody(_: str) -> None:
    pass


def _privileges() -> str:
    """Return the end of schema.sql, which grants the two roles what they need, where they are."""
    block = schema_sql().partition(PRIVILEGES)[2].partition(";\nEND\n$$;")
    return block[0][block[0].index("DO $$") :] + block[1]


async def migrate(connection: Connection, settings: Settings, tell: online.Tell = _nobody) -> Migrated:
    """Bring the database to this program's schema and settings, on a connection of its own. What takes long is told to `tell`."""
    await _check_server(connection)
    async with online.alone(connection, tell):
        return Migrated(SCHEMA_VERSION, tuple(await _migrate(connection, settings, tell)))


async def _migrate(connection: Connection, settings: Settings, tell: online.Tell) -> list[str]:
    done = []
    version = await _installed_version(connection)
    if version > SCHEMA_VERSION:
        raise DatabaseRefusedError(_newer(version))
    if version == 0:
        connection.add_log_listener(lambda _, said: tell(said.message) if "CREATEROLE" in said.message else None)
        try:
            await connection.execute(schema_sql())
        except asyncpg.InsufficientPrivilegeError as exc:
            raise DatabaseRefusedError(
                f"the schema can't be installed: {exc}. Grant CREATE on the database to this role, or let its owner run schema.sql"
            ) from exc
        done.append(f"installed schema version {SCHEMA_VERSION}")
    elif version < SCHEMA_VERSION:
        for step in range(version + 1, SCHEMA_VERSION + 1):
            await _upgrade(connection, step, tell)
            done.append(f"schema version {step - 1} → {step}")
    if version < SCHEMA_VERSION and await event_types.is_empty(connection):
        count = await event_types.install(connection, event_types.DEFAULT_CATALOGUE.read_bytes())
        done.append(f"installed the default catalogue, {count} event types")
    if version and await connection.fetchval(ADMIN.roles_lack):
        await _grant(connection)
        done.append("granted webhook_producer and webhook_dispatcher what they need")
    bound = await _payload_bound(connection)
    if bound != settings.payload_bytes_max:
        statement = ADMIN.replace_payload_bound.format(bytes=int(settings.payload_bytes_max))
        await online.briefly(connection, statement, "the payload's bound", tell)
        done.append(f"payload bound {bound} → {settings.payload_bytes_max} bytes")
    rings = await connection.fetchval(ADMIN.has_doorbell)
    if rings and settings.doorbell == "off":
        await online.briefly(connection, ADMIN.drop_doorbell, "the doorbell", tell)
        done.append("doorbell trigger dropped")
    elif not rings and settings.doorbell == "on":
        await online.briefly(connection, ADMIN.create_doorbell, "the doorbell", tell)
        done.append("doorbell trigger created")
    return done


async def _grant(connection: Connection) -> None:
    try:
        await connection.execute(_privileges())
    except asyncpg.InsufficientPrivilegeError as exc:
        raise DatabaseRefusedError(
            f"the privileges can't be granted: {exc}. Run `dispatcher migrate` as the role that installed the schema"
        ) from exc


async def _upgrade(connection: Connection, step: int, tell: online.Tell) -> None:
    """Apply one migration: what goes beside the producers step by step, the rest at once or not at all. Safe beside a running dispatcher, whose
    order of locks it keeps: what it waits for longer than the lock timeout ends it, and so does a deadlock with others."""
    text = (Path(__file__).parent / "migrations" / f"{step}.sql").read_text()
    try:
        await online.change(connection, step, tell)
        async with connection.transaction():
            await connection.execute(ADMIN.migration_lock_timeout)
            await connection.execute(ADMIN.migration_lock)
            await connection.execute(text)
    except asyncpg.InsufficientPrivilegeError as exc:
        raise DatabaseRefusedError(
            f"the schema can't be brought to version {step}: {exc}. Run `dispatcher migrate` as the role that installed it"
        ) from exc
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as exc:
        raise DatabaseAwayError(
            f"the schema can't be brought to version {step} now: another transaction holds a lock ({exc.args[0]}); what was made of it so far "
            "is kept and changes nothing yet, run it again"
        ) from exc


async def check(connection: Connection, settings: Settings) -> list[str]:
    """Raise DatabaseRefusedError where running would be unsafe; return warnings for the rest."""
    if settings.retention_days * DAY_S <= settings.retry_age_max_s:
        raise InputError(
            f"DISPATCHER_RETENTION_DAYS ({settings.retention_days:g} days) must be longer than DISPATCHER_RETRY_AGE_MAX_S "
            f"({settings.retry_age_max_s} s, {settings.retry_age_max_s / DAY_S:g} days): deliveries would still be retried when their "
            "events are gone. Raise the one or lower the other"
        )
    role = await _check_server(connection)
    version = await _installed_version(connection)
    if version == 0:
        raise DatabaseRefusedError("the schema is not installed in this database; run `dispatcher migrate`")
    if version > SCHEMA_VERSION:
        raise DatabaseRefusedError(_newer(version))
    if version < SCHEMA_VERSION:
        raise DatabaseRefusedError(
            f"the schema has version {version}, this program needs {SCHEMA_VERSION}; run `dispatcher migrate`"
        )
    missing = [row["missing"] for row in await connection.fetch(SQL.missing_privileges)]
    if missing:
        raise DatabaseRefusedError(
            f"role {role} lacks privileges on schema webhook: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; "
            f"GRANT webhook_dispatcher TO {role}, or use the role that installed the schema"
        )
    functions = [row["missing"] for row in await connection.fetch(PARTITIONS.missing_functions)]
    if functions:
        raise DatabaseRefusedError(
            f"role {role} may not call {', '.join(functions)}, so it can't keep the partitions; GRANT webhook_dispatcher TO {role}, "
            "or GRANT EXECUTE ON these functions"
        )
    cache = await connection.fetchval(SQL.sequence_cache)
    if cache != 1:
        raise DatabaseRefusedError(CACHED_SEQUENCE.format(cache=cache))
    warnings = []
    bound = await _payload_bound(connection)
    if bound != settings.payload_bytes_max:
        warnings.append(
            f"the outbox accepts payloads up to {bound} bytes, DISPATCHER_PAYLOAD_BYTES_MAX says {settings.payload_bytes_max}; "
            "run `dispatcher migrate` to apply it"
        )
    if settings.doorbell == "on" and not await connection.fetchval(ADMIN.has_doorbell):
        warnings.append(
            "the doorbell trigger is missing, so events wait for the 1 s poll; run `dispatcher migrate`, or set DISPATCHER_DOORBELL=off"
        )
    return warnings


async def _check_server(connection: Connection) -> str:
    """Refuse a server that can't hold the log; return the role's name."""
    row = await connection.fetchrow(SQL.fitness)
    if row["version_num"] < SERVER_VERSION_MIN:
        raise DatabaseRefusedError(f"the server is PostgreSQL {row['version_num'] // 10_000}; 15 or newer is needed")
    if row["encoding"] != "UTF8":
        raise DatabaseRefusedError(
            f"the database's encoding is {row['encoding']}; payloads are sent as they are stored, so it must be UTF8: "
            "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    if row["in_recovery"]:
        raise DatabaseRefusedError(
            "the server is a standby (in recovery); DISPATCHER_DATABASE_URL must point at the primary"
        )
    role: str = row["role"]
    return role


async def _installed_version(connection: Connection) -> int:
    try:
        version: int | None = await connection.fetchval(SQL.schema_version)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return 0
    except asyncpg.InsufficientPrivilegeError as exc:
        raise DatabaseRefusedError(
            f"this role may not read schema webhook ({exc}); GRANT webhook_dispatcher TO it"
        ) from exc
    return version or 0


async def _payload_bound(connection: Connection) -> int:
    definition = await connection.fetchval(ADMIN.constraint_definition)
    found = re.search(r"<= (\d+)", definition or "")
    return int(found[1]) if found else 0


def _newer(version: int) -> str:
    return f"the schema has version {version}, newer than this program's {SCHEMA_VERSION}; install the program that belongs to it"
