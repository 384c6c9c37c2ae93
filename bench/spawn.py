"""Processes beside a uvloop, started by the standard library.

uvloop forks, has Python's at-fork hooks run in the child, and waits for the child to become the program: in a read, holding
the GIL. A child that a lock of another thread's keeps from it keeps this whole process from everything, its timeouts among it
(MagicStack/uvloop, issue 749). In what `subprocess` forks nothing of Python's runs.
"""

import asyncio
import subprocess
from typing import IO, Any

POLL_S = 0.01


class Spawned:
    """As `asyncio.subprocess.Process`, as far as it is needed here. `stdin` is a plain file."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.pid = popen.pid
        self.stdin: IO[bytes] | None = popen.stdin
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self.send_signal, self.kill, self.terminate = popen.send_signal, popen.kill, popen.terminate

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    async def wait(self) -> int:
        while (status := self._popen.poll()) is None:
            await asyncio.sleep(POLL_S)
        return status

    async def communicate(self) -> tuple[bytes, bytes]:
        """Read what it says until it ends; nothing of what isn't piped."""
        out, err, _ = await asyncio.gather(_all(self.stdout), _all(self.stderr), self.wait())
        return out, err


async def spawn(*command: str, limit: int = 1 << 16, **options: Any) -> Spawned:
    """Start a process; `limit` is of a line's bytes, `options` are those of `subprocess.Popen`."""
    started = Spawned(popen := subprocess.Popen(command, **options))
    started.stdout, started.stderr = await _reader(popen.stdout, limit), await _reader(popen.stderr, limit)
    return started


async def _all(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()


class _Pipe(asyncio.StreamReaderProtocol):
    def eof_received(self) -> bool:
        super().eof_received()
        return False  # there is no other direction: close


async def _reader(pipe: IO[bytes] | None, limit: int) -> asyncio.StreamReader | None:
    if pipe is None:
        return None
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit, loop)
    await loop.connect_read_pipe(lambda: _Pipe(reader, loop=loop), pipe)
    return reader
