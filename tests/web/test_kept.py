"""What all operators see is read once for all of them, and again when it is old."""

import asyncio

import pytest

from dispatcher.web.kept import Kept


class Read:
    """Counts how often it is asked; waits for `go`, fails while it `is_broken`."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()
        self.go.set()
        self.is_broken = False

    async def __call__(self, db: object) -> int:
        self.asked += 1
        await self.go.wait()
        if self.is_broken:
            raise OSError("away")
        return self.asked


async def test_it_is_read_once_for_all_who_ask_and_again_when_it_is_old():
    read = Read()
    kept = Kept(read, for_s=3600.0)
    read.go.clear()
    asking = [asyncio.create_task(kept.get(None)) for _ in range(5)]
    await asyncio.sleep(0)
    read.go.set()
    assert await asyncio.gather(*asking) == [1] * 5
    assert await kept.get(None) == 1
    old = Kept(read, for_s=0.0)
    assert (await old.get(None), await old.get(None)) == (2, 3)


async def test_a_reading_that_fails_is_not_kept():
    read = Read()
    kept = Kept(read, for_s=3600.0)
    read.is_broken = True
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            await kept.get(None)
    read.is_broken = False
    assert await kept.get(None) == 3
