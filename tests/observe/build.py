"""What tells of an engine, around a rig: a health listener on a free port, and a way to ask it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp

from dispatcher.engine.engine import State
from dispatcher.observe.figures import Subject
from dispatcher.observe.pulse import Pulse
from dispatcher.observe.server import HealthServer
from dispatcher.store.observe import Observer
from tests.rig import Rig


@dataclass
class Observed:
    pulse: Pulse
    observer: Observer
    server: HealthServer
    client: aiohttp.ClientSession

    async def ask(self, path: str) -> tuple[int, str]:
        async with self.client.get(f"http://127.0.0.1:{self.server.port}{path}") as answer:
            return answer.status, await answer.text()

    async def scrape(self) -> str:
        status, text = await self.ask("/metrics")
        assert status == 200
        return text


@contextlib.asynccontextmanager
async def observed(r: Rig, *, looking: bool = True) -> AsyncIterator[Observed]:
    pulse, observer = Pulse(r.engine), Observer(r.dsn, lambda: r.engine.state is State.OWNER, every_s=0.02)
    server = HealthServer(
        "127.0.0.1:0", Subject(r.engine, r.transport, r.settings, pulse, observer, r.engine._store.round_trips)
    )
    running = [pulse.run(), server.run(), *([observer.run()] if looking else [])]
    tasks = [asyncio.create_task(part) for part in running]
    try:
        await server.ready.wait()
        async with aiohttp.ClientSession() as client:
            yield Observed(pulse, observer, server, client)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
