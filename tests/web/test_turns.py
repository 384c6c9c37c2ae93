"""Pages leave the loop to deliveries between their turns."""

import asyncio

from dispatcher.web.turns import others_first


async def test_what_is_under_way_comes_to_its_end_between_two_turns_of_a_page():
    """As an event does: a read's answer wakes the reader, which wakes who posts."""
    answered, read = asyncio.Event(), asyncio.Event()
    posted = []

    async def reader() -> None:
        await answered.wait()
        read.set()

    async def sender() -> None:
        await read.wait()
        posted.append("event")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reader())
        tasks.create_task(sender())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(answered.set)
        await others_first()
        assert posted == ["event"]
