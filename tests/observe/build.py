"""What tells of an engine, around a rig: a health listener on a free port, and a way to ask it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp

from dispatcher.engine.engine import State
from dispatcher.observe.figures import Subject
from dispatcher.observe.health import judge
from dispatcher.observe.metrics import scrape
from dispatcher.observe.pulse import Pulse
from dispatcher.observe.server import HealthServer
from dispatcher.store.observe import Observer
from dispatcher.store.partitions import PgPartitions
from dispatcher.web.server import WebServer
from tests.rig import Rig, rig, until


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
async def kept(dsn: str) -> AsyncIterator[Rig]:
    """An engine with a janitor, which has looked at the partitions."""
    async with rig(dsn, start=False) as r:
        r.make_partitions = lambda: PgPartitions(r.dsn, timeout_s=10)
        await r.start()
        await until(lambda: r.engine.incarnation.janitor.ids_ahead is not None, what="the janitor's first look")
        yield r


@contextlib.asynccontextmanager
async def observed(r: Rig, *, looking: bool = True) -> AsyncIterator[Observed]:
    pulse, observer = Pulse(r.engine), Observer(r.dsn, lambda: r.engine.state is State.OWNER, every_s=0.02)
    subject = Subject(
        engine=r.engine,
        transport=r.transport,
        settings=r.settings,
        pulse=pulse,
        observer=observer,
        round_trips=r.engine._store.round_trips,
        web=WebServer(r.settings, r.dsn, r.transport),  # which doesn't run
    )
    server = HealthServer("127.0.0.1:0", lambda: judge(r.engine, pulse, observer), lambda: scrape(subject))
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
