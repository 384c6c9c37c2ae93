"""One simulated run: phase one with the seed's faults, then everything is healed and must settle."""

import asyncio
import contextlib
import contextvars
import hashlib
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import structlog

from dispatcher.engine import catchup, gaps, janitor, keys, lane, reader, recorder, sender
from dispatcher.store.memory_database import MemoryDatabase
from dispatcher.store.memory_tables import LogRow, Operation
from tests.simulation.checks import Checker
from tests.simulation.disasters import Disasters
from tests.simulation.loop import Stuck, VirtualLoop
from tests.simulation.network import Network
from tests.simulation.people import People
from tests.simulation.plan import Plan, draw
from tests.simulation.process import Process, watched

EPOCH_US = 1_900_000_000_000_000
SETTLE_MAX_S = 90.0
CALLBACKS_MAX = 400_000
MODULES = {m.__name__.rpartition(".")[2]: m for m in (catchup, gaps, janitor, keys, lane, reader, recorder, sender)}


@dataclass
class Result:
    seed: int
    violation: str | None
    digest: str
    trace: list[str] = field(repr=False)
    stats: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.violation is None:
            return f"seed {self.seed}: fine"
        return (
            f"seed {self.seed}: {self.violation}\n"
            f"replay it with its trace: python -m tests.simulation --seed {self.seed}"
        )


class SimulatedDatabase(MemoryDatabase):
    """Tells the checker of every transaction, as soon as it is applied."""

    def __init__(self, world: "World", **options: Any) -> None:
        super().__init__(**options)
        self._world = world

    def write(self, operation: Operation, *, synchronous: bool) -> None:
        super().write(operation, synchronous=synchronous)
        if isinstance(operation, partial):
            self._world.checker.wrote(operation.func, operation.keywords)


class World:
    def __init__(self, plan: Plan, *, verbose: bool = False) -> None:
        self.plan = plan
        self.verbose = verbose
        self.loop = VirtualLoop()
        self.lines: list[str] = []
        self.healed = False
        self.calls = 0
        self.down_until = 0.0
        self.clock_step_us = 0
        self.paths: dict[str, int] = {}  # of URLs → endpoint
        self.processes: list[Process] = []
        self.checker = Checker(self)
        self.loop.on_surprise = self.checker.fail
        self.network = Network(plan, random.Random(f"network {plan.seed}"))
        self.network.on_request = self._on_request
        self.database = SimulatedDatabase(self, now_us=self._now_us, rng=random.Random(f"database {plan.seed}"))
        self.people = People(self)
        self.disasters = Disasters(self)
        self._rng = random.Random(f"world {plan.seed}")
        self._context = contextvars.copy_context()
        self.people.found()
        self.database.flush()
        self.founded = self.database._flushed

    # ── for its parts ──

    def trace(self, what: str) -> None:
        self.lines.append(f"{self.loop.time():9.4f}  {what}")

    note = trace

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.loop.create_task(work, context=self._context.copy())

    def call_later(self, after_s: float, action: Callable[[], None]) -> None:
        self.loop.call_later(after_s, action, context=self._context.copy())

    def reap_later(self, after_s: float) -> None:
        self.call_later(after_s, self.database.reap)

    async def until_up(self) -> None:
        while not self.database.is_up:
            await asyncio.sleep(0.1)

    def was_answered(self, endpoint_id: int, event: LogRow, attempt: int) -> bool:
        [public_id] = self.database.public_ids.encode([(event.created_us, event.id)])
        return any(
            (f"/{path}", public_id, attempt) in self.network.answered
            for path, i in self.paths.items()
            if i == endpoint_id
        )

    def _now_us(self) -> int:
        return EPOCH_US + int(self.loop.time() * 1e6) + self.clock_step_us

    def _on_request(self, host: str, path: str, public_id: bytes, attempt: int, request: bytes) -> None:
        if f"\r\nhost: {host}\r\n".encode() not in request:
            self.checker.fail(f"{host} got a request for another host: {request[:200]!r}")
        created_us, event_id = self.database.public_ids.decode(public_id.decode())
        row = self.database.tables.outbox.get(event_id)
        if row is not None and row.created_us == created_us and not request.endswith(b'"data":' + row.payload + b"}"):
            self.checker.fail(f"{path} got another payload for event {event_id}: {request!r}")

    # ── the run ──

    def run(self) -> Result:
        task = self.spawn(self._run())
        try:
            if not self.loop.run(task, callbacks_max=CALLBACKS_MAX) and self.checker.violation is None:
                self.checker.fail(f"{CALLBACKS_MAX} callbacks: something spins")
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise task.exception()
        except Stuck:
            self.checker.fail("nothing is ready, and no timer is set")
        finally:
            self.loop.wind_up(self.processes)
        digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        stats = {
            "posts": self.checker.posts,
            "callbacks": self.loop.callbacks,
            "events": len(self.database.tables.outbox),
        }
        return Result(self.plan.seed, self.checker.violation, digest, self.lines, stats)

    async def _run(self) -> None:
        self.note(str(self.plan))
        going_wrong = [
            self.spawn(work)
            for work in (
                self.people.produce(), self.people.operate(), self.disasters.strike(), self.disasters.change_moods(), self._come_up(),
            )
        ]  # fmt: skip
        for n in range(2 if self.plan.has("standby") else 1):
            self.spawn(self._keep(f"dispatcher {n}"))
        watching = self.spawn(self._watch())
        await asyncio.sleep(self.plan.duration_s)
        self.note("heal")
        for task in going_wrong:
            task.cancel()
        self.healed = True
        self.database.is_up = True
        self.database.reap()
        self.network.heal()
        self.people.put_right()
        for process in self.processes:
            process.thaw()
        await self._settle()
        watching.cancel()

    async def _keep(self, name: str) -> None:
        """Start the dispatcher again whenever it has ended, as a service manager does."""
        n = 0
        while True:
            n += 1
            process = Process(self, f"{name}.{n}")
            self.processes.append(process)
            self.note(f"{process.name} begins")
            await process.ended.wait()
            await asyncio.sleep(self._rng.choice((0.05, 0.5, 1.5)))

    async def _come_up(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if not self.database.is_up and self.loop.time() >= self.down_until:
                self.database.is_up = True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for process in self.processes:
                if process.end is None:
                    self.checker.bounds(process)

    async def _settle(self) -> None:
        deadline = self.loop.time() + SETTLE_MAX_S
        while (found := self.checker.unsettled()) or (found := self._left_over()):
            if self.loop.time() > deadline:
                self.checker.fail(f"not settled {SETTLE_MAX_S:.0f} s after everything was well: {'; '.join(found[:4])}")
                return
            await asyncio.sleep(0.5)
            self.people.put_right()
        for what in (*self.checker.undelivered(), *self.database.tables.violations()):
            self.checker.fail(what)

    def _left_over(self) -> list[str]:
        owners = [p for p in self.processes if p.end is None and p.engine.state.value == "owner"]
        if len(owners) != 1:
            return [f"{len(owners)} owners"]
        return self.checker.left_over(owners[0])


@contextlib.contextmanager
def bounds(values: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            module, _, constant = name.partition(".")
            stack.enter_context(mock.patch.object(MODULES[module], constant, value))
        yield


@contextlib.contextmanager
def logging_to(world: World | None) -> Iterator[None]:
    """Let the engine's log go into the trace, or nowhere."""
    before = structlog.get_config()

    def into_trace(logger: Any, method: str, event: dict[str, Any]) -> str:
        assert world is not None
        what = event.pop("event")
        world.note(f"    log {what} " + " ".join(f"{k}={v}" for k, v in event.items() if v is not None))
        raise structlog.DropEvent

    if world is None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    else:
        structlog.configure(processors=[structlog.processors.format_exc_info, into_trace])
    try:
        yield
    finally:
        structlog.configure(**before)


def simulate(seed: int, *, verbose: bool = False) -> Result:
    """Run one seed. `verbose` puts the engine's log into the trace."""
    plan = draw(seed)
    with watched(), bounds(plan.bounds):
        world = World(plan)
        with logging_to(world if verbose else None):
            return world.run()
