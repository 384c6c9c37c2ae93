"""What is the same for all who look: read once, and shown to everybody for a moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from dispatcher.store.session import Connection

T = TypeVar("T")


class Kept(Generic[T]):
    """`get` returns what `read` found at most `for_s` seconds ago. Who asks while it is read waits for that; where it fails, each asks for
    himself. What it returns is shared: leave it as it is."""

    def __init__(self, read: Callable[[Connection], Awaitable[T]], *, for_s: float) -> None:
        self._read = read
        self.for_s = for_s
        self._found: T | None = None
        self._until = 0.0
        self._reading = asyncio.Lock()

    async def get(self, db: Connection) -> T:
        async with self._reading:
            if self._found is None or time.monotonic() >= self._until:
                self._found = await self._read(db)
                self._until = time.monotonic() + self.for_s
            return self._found
