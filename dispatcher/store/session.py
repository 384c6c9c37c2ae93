"""One connection to PostgreSQL that is made again when it is lost, and the one place where foreign exceptions become
ours.

A session runs one thing at a time for one owner (reader, recorder, configuration, listener, owner lock). After any
failure the connection is thrown away, because what the server thinks of it is unknown. At every connect it compares
`life` with the one under which the state in memory was built: another one means that the server lost its memory (DESIGN
§11).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from dispatcher.errors import DatabaseAwayError, DatabaseRefusedError
from dispatcher.ports import LifeLostError, StoreAwayError
from dispatcher.store.sql import SQL

T = TypeVar("T")
Connection = Any  # asyncpg ships no types

# What means "not now" rather than "wrong": 08 connection, 53 resources, 57 operator intervention and shutdown, 58 system, 55P03 lock not
# available, 25006 and 0A000 (an UNLOGGED table read there) a standby that is about to be promoted, 40 serialization and deadlock,
# 25P03 and 25P04 a transaction that the server ended because we were frozen.
_AWAY_CLASSES = ("08", "53", "57", "58", "40")
_AWAY_STATES = ("55P03", "25006", "0A000", "25P03", "25P04")
# What means "never": 28 the login, 3D a database that isn't there.
_REFUSED_CLASSES = ("28", "3D")
GOODBYE_S = 0.5

# What every session sets, by a statement once it is connected: a pooler such as PgBouncer refuses them as startup parameters.
# It costs a connect about a millisecond.
_PARAMETERS = {
    "jit": "off",  # our statements are short; compiling one costs more than running it
    "timezone": "UTC",
    # A peer that has fallen silent is gone after 8 s, on both sides: 5 + 3 × 1 s for who only waits, and as long for who has sent something.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "8000",
}
_SOCKET_OPTIONS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 8_000}


def is_away(exc: BaseException) -> bool:
    """Tell whether an exception says that the database is away, as opposed to that it refused what we asked."""
    if isinstance(exc, asyncpg.PostgresError):
        state = exc.sqlstate or ""
        return state[:2] in _AWAY_CLASSES or state in _AWAY_STATES
    if isinstance(exc, ValueError) and not isinstance(exc, OSError):
        return False  # asyncpg refuses a value or a dsn so, as an InterfaceError too: asking again would be for ever
    return isinstance(exc, OSError | TimeoutError | asyncpg.InterfaceError | asyncpg.InternalClientError)


class Session:
    """`parameters` are set on each new connection, then `setup` prepares it (codecs)."""

    def __init__(
        self,
        dsn: str,
        name: str,
        *,
        timeout_s: float,
        setup: Callable[[Connection], Awaitable[None]] | None = None,
        parameters: dict[str, str] | None = None,
    ) -> None:
        self._dsn = dsn
        self.name = name
        self._timeout_s = timeout_s
        self._setup = setup
        self._parameters = _PARAMETERS | {"application_name": f"dispatcher {name}"} | (parameters or {})
        self._connection: Connection | None = None
        self._lost_callback: Callable[[], None] | None = None
        self.life: UUID | None = None  # set at Start; None: not compared
        self.round_trips = 0
        self.connects = 0

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the connection ends without our doing."""
        self._lost_callback = callback

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, timeout_s: float | None = None) -> T:
        """Run `work` on the connection, connecting first if need be. Raises StoreAwayError or LifeLostError; any other database error is
        the caller's to know."""
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = await self._connect()
        self.round_trips += 1
        late = False

        def hang_up() -> None:
            nonlocal late
            late = True
            self.drop()

        # Not asyncio.timeout(): asyncpg answers a cancellation by asking the server to cancel, and a transaction that unwinds waits for
        # the reply before its ROLLBACK, without a bound. A server that doesn't answer would hold us for as long as it is silent.
        timer = asyncio.get_running_loop().call_later(timeout_s or self._timeout_s, hang_up)
        try:
            return await work(connection)
        except BaseException as exc:
            if not isinstance(exc, asyncpg.PostgresError) or is_away(exc):
                self.drop()  # also when we were cancelled: the answer may still be on its way
            if is_away(exc):
                raise StoreAwayError(f"{self.name}: {'no answer in time' if late else _say(exc)}") from exc
            raise
        finally:
            timer.cancel()

    async def set_parameter(self, connection: Connection, name: str, value: str) -> None:
        """Set a parameter of the session: on this connection of its, and on every later one."""
        self._parameters[name] = value
        await _set_parameters(connection, {name: value})

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    def drop(self) -> None:
        """Throw the connection away without waiting."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close(connection)

    async def _connect(self) -> Connection:
        try:
            connection = await connect(self._dsn, f"dispatcher {self.name}", self._timeout_s)
        except Exception as exc:
            if is_away(exc):
                raise StoreAwayError(f"{self.name}: {_say(exc)}") from exc
            raise
        try:
            async with asyncio.timeout(self._timeout_s):
                await _set_parameters(connection, self._parameters)
                if self._setup is not None:
                    await self._setup(connection)
                if self.life is not None and await connection.fetchval(SQL.life) != self.life:
                    raise LifeLostError(f"{self.name}: the server was restarted after a crash, or promoted")
        except BaseException as exc:
            connection.terminate()
            if is_away(exc):
                raise StoreAwayError(f"{self.name}: {_say(exc)}") from exc
            raise
        self.connects += 1
        self._connection = connection
        connection.add_termination_listener(self._terminated)
        return connection

    def _terminated(self, connection: Connection) -> None:
        if connection is self._connection:  # else we dropped it ourselves
            self._connection = None
            if self._lost_callback is not None:
                self._lost_callback()


async def _set_parameters(connection: Connection, parameters: dict[str, str]) -> None:
    await connection.execute(SQL.set_parameters, list(parameters), list(parameters.values()))


async def connect(dsn: str, name: str, timeout_s: float, **options: Any) -> Connection:
    """Open one connection; nothing is set on it but its name. Raises DatabaseRefusedError when asking again won't help."""
    try:
        connection = await asyncpg.connect(
            dsn,
            timeout=timeout_s,
            command_timeout=None,  # Session.run bounds whole pieces of work
            server_settings={"application_name": name},
            **options,
        )
    except asyncpg.PostgresError as exc:
        if (exc.sqlstate or "")[:2] not in _REFUSED_CLASSES:
            raise
        raise DatabaseRefusedError(
            f"the database refused the login ({exc}); check user, password and database in DISPATCHER_DATABASE_URL"
        ) from exc
    except (ValueError, OverflowError) as exc:
        if isinstance(exc, OSError):
            raise  # a certificate that doesn't verify is both
        raise DatabaseRefusedError(
            f"DISPATCHER_DATABASE_URL is malformed ({exc}); it looks like postgresql://user:password@host:5432/database"
        ) from exc
    _watch_network(connection)
    return connection


async def close(connection: Connection) -> None:
    """Say goodbye, for as long as GOODBYE_S."""
    if not connection.is_closed():
        try:
            await connection.close(timeout=GOODBYE_S)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()  # a goodbye that fails leaves one way: hang up


def _watch_network(connection: Connection) -> None:
    """Have our kernel notice a cut network too. asyncpg shows no socket: where it isn't found, the bound of each call notices, later."""
    transport = getattr(connection, "_transport", None)
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SOCKET_OPTIONS.items():
        if hasattr(socket, name):  # as the system has it
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def connect_once(dsn: str, name: str) -> Connection:
    """Open one connection for a command-line verb, with errors for a person. It leaves nothing behind on a server connection that others
    may get: no parameters, no named statements."""
    try:
        return await connect(dsn, name, 10, statement_cache_size=0)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise DatabaseAwayError(
            f"the database can't be reached ({_say(exc)}); check DISPATCHER_DATABASE_URL and that the server runs"
        ) from exc


def _say(exc: BaseException) -> str:
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    return str(exc) or type(exc).__name__
