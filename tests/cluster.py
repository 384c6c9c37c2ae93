"""A PostgreSQL of the embedded server's programs that may do what that one won't: listen on TCP with TLS, stream to a replica, be promoted."""

import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import quote

from dispatcher.store import embedded


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


class Cluster:
    """One data directory and its server. `dsn` goes by the unix socket."""

    def __init__(self, like: embedded.EmbeddedServer) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dispatcher-cluster-", dir="/tmp"))
        shutil.chown(self.directory, like.data_dir.stat().st_uid, like.data_dir.stat().st_gid)
        self.port = free_port()
        self.data = self.directory / "data"
        self.dsn = f"postgresql://postgres@/postgres?host={quote(str(self.directory))}&port={self.port}"
        self._binaries = embedded._binaries(like.data_dir, like.version)

    def run(self, program: str, *args: str) -> None:
        done = embedded._run(self.directory, self._binaries / program, *args)
        assert done.returncode == 0, f"{program}: {done.stdout}\n{embedded._log_tail(self.directory)}"

    def initialize(self) -> None:
        self.run(
            "initdb",
            "-D",
            str(self.data),
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
        )

    def copy_of(self, primary: "Cluster", name: str) -> None:
        """Become the primary's streaming replica."""
        source = f"host={primary.directory} port={primary.port} user=postgres application_name={name}"
        self.run("pg_basebackup", "-D", str(self.data), "-d", source, "-R", "-X", "stream", "-c", "fast")

    def write(self, name: str, content: bytes | str) -> Path:
        """Put a file beside the data, for the server's account alone."""
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        shutil.chown(path, self.directory.stat().st_uid, self.directory.stat().st_gid)
        return path

    def start(self, **options: str) -> None:
        ours = {
            "unix_socket_directories": str(self.directory),
            "port": str(self.port),
            "listen_addresses": "",
            "max_connections": "60",
        }
        settings = " ".join(f"-c {name}='{value}'" for name, value in (ours | options).items())
        self.run(
            "pg_ctl", "-D", str(self.data), "-l", str(self.directory / "log"), "-o", settings, "-w", "-t", "60", "start"
        )

    def promote(self) -> None:
        self.run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "promote")

    def stop(self, mode: str = "immediate") -> None:
        if (self.data / "postmaster.pid").exists():
            self.run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", "60", "stop")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
