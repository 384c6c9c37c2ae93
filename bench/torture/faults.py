"""What breaks. A fault's coroutine returns when the fault is over: from then on nobody helps, and deliveries must flow again.

A fault that takes one receiver away is judged by that receiver's endpoints, any other by all.
"""

import asyncio
import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from bench.torture.plant import Kept, Plant, full

RESUME_S = 5.0
FROZEN_OWNER_S = 10.0  # counted from when it froze: a standby has to find out


@dataclass(frozen=True)
class Fault:
    """`strike` returns the receivers that it touched; none: all of them."""

    name: str
    strike: Callable[[Plant, random.Random], Awaitable[list[int] | None]]
    resume_s: float = RESUME_S
    from_start: bool = False


# ── dispatchers ──


async def kill_owner(plant: Plant, rng: random.Random) -> None:
    plant.dispatchers[await plant.owner()].signal(signal.SIGKILL)


async def kill_both(plant: Plant, rng: random.Random) -> None:
    for kept in plant.dispatchers:
        kept.signal(signal.SIGKILL)


async def stop_owner(plant: Plant, rng: random.Random) -> None:
    kept = plant.dispatchers[await plant.owner()]
    process = kept.process
    kept.signal(signal.SIGTERM)
    assert process is not None
    await process.wait()


async def freeze_owner(plant: Plant, rng: random.Random) -> None:
    """For longer than a standby waits: it wakes up to find another in its place."""
    async with _stopped(plant.dispatchers[await plant.owner()]):
        await asyncio.sleep(rng.uniform(8, 12))


async def freeze_owner_briefly(plant: Plant, rng: random.Random) -> None:
    async with _stopped(plant.dispatchers[await plant.owner()]):
        await asyncio.sleep(rng.uniform(0.2, 2))


async def fill_descriptors(plant: Plant, rng: random.Random) -> None:
    """Let the owner open nothing more, and take away what it has open to the database."""
    n = await plant.owner()
    pid = plant.dispatchers[n].pid
    with contextlib.suppress(ProcessLookupError):
        assert pid is not None
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))
        try:
            await asyncio.sleep(rng.uniform(0.5, 1))
            plant.networks[n].sever()
            await asyncio.sleep(rng.uniform(1, 4))
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


# ── the way to the database ──


async def sever(plant: Plant, rng: random.Random) -> None:
    plant.networks[await plant.owner()].sever()


async def black_hole(plant: Plant, rng: random.Random) -> None:
    network = plant.networks[await plant.owner()]
    network.cut()
    try:
        await asyncio.sleep(rng.uniform(1, 6))
    finally:
        network.heal()


async def black_hole_for_both(plant: Plant, rng: random.Random) -> None:
    try:
        for network in plant.networks:
            network.cut()
        await asyncio.sleep(rng.uniform(1, 6))
    finally:
        for network in plant.networks:
            network.heal()


async def kill_pooler(plant: Plant, rng: random.Random) -> None:
    assert plant.pooler is not None
    plant.pooler.signal(rng.choice((signal.SIGKILL, signal.SIGTERM)))
    await asyncio.sleep(0.01)
    await plant.pooler.running()


# ── PostgreSQL ──


async def restart_server_immediately(plant: Plant, rng: random.Random) -> None:
    await _restart_server(plant, rng, "immediate")


async def restart_server_orderly(plant: Plant, rng: random.Random) -> None:
    await _restart_server(plant, rng, "fast")


async def _restart_server(plant: Plant, rng: random.Random, mode: str) -> None:
    await asyncio.to_thread(plant.server.stop_now, mode)
    await asyncio.sleep(rng.choice((0, 0, 1.5)))
    await plant.up()


async def terminate_backend(plant: Plant, rng: random.Random) -> None:
    pids = await plant.backends("dispatcher %")
    if pids:
        await plant.query("SELECT pg_terminate_backend($1)", rng.choice(pids))


async def kill_backend(plant: Plant, rng: random.Random) -> None:
    """kill -9 of one backend: the server ends all the others, and goes through crash recovery."""
    pids = await plant.backends("dispatcher %")
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)
        await asyncio.sleep(0.2)
        await plant.up()


async def fill_disk(plant: Plant, rng: random.Random) -> None:
    assert plant.disk is not None
    async with full(plant.disk):
        await asyncio.sleep(rng.uniform(2, 5))
    await plant.up()


# ── receivers ──


async def kill_receiver(plant: Plant, rng: random.Random) -> list[int]:
    n = rng.randrange(len(plant.receivers))
    receiver = plant.receivers[n]
    receiver.hold()
    receiver.signal(signal.SIGKILL)
    await asyncio.sleep(rng.uniform(0.5, 4))
    receiver.release()
    await _listening(plant.ports[n])
    return [n]


async def freeze_receiver(plant: Plant, rng: random.Random) -> list[int]:
    n = rng.randrange(len(plant.receivers))
    async with _stopped(plant.receivers[n]):
        await asyncio.sleep(rng.uniform(0.5, 5))
    return [n]


@contextlib.asynccontextmanager
async def _stopped(kept: Kept) -> AsyncIterator[None]:
    pid = kept.pid
    kept.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if kept.pid == pid:
            kept.signal(signal.SIGCONT)


async def _listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


FAULTS = (
    Fault("kill -9 of the owner", kill_owner),
    Fault("kill -9 of both dispatchers", kill_both),
    Fault("SIGTERM to the owner", stop_owner),
    Fault("owner frozen for long", freeze_owner, FROZEN_OWNER_S, from_start=True),
    Fault("owner frozen briefly", freeze_owner_briefly),
    Fault("descriptors used up", fill_descriptors),
    Fault("connections cut", sever),
    Fault("black hole, owner", black_hole),
    Fault("black hole, both", black_hole_for_both),
    Fault("PgBouncer restarted", kill_pooler),
    Fault("PostgreSQL restarted, immediate", restart_server_immediately),
    Fault("PostgreSQL restarted, fast", restart_server_orderly),
    Fault("backend terminated", terminate_backend),
    Fault("backend killed with -9", kill_backend),
    Fault("disk full", fill_disk),
    Fault("receiver killed", kill_receiver),
    Fault("receiver frozen", freeze_receiver),
)
