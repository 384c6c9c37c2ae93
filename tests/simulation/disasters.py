"""What goes wrong, at random times and in ambush: in the middle of a call, where a time drawn at random would rarely fall."""

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.world import World


class Disasters:
    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = random.Random(f"disasters {world.plan.seed}")

    async def strike(self) -> None:
        """Let one disaster after another happen until cancelled."""
        world, rng = self.world, self.rng
        kinds = {
            "crash": self.crash, "failover": self.fail_over, "restart": self.restart, "outage": self.outage, "sever": self.sever,
            "wall clock": self.step_clock, "kill": self.kill, "stop": self.stop, "freeze": self.freeze,
        }  # fmt: skip
        possible = [strike for kind, strike in kinds.items() if world.plan.has(kind)]
        while possible:
            await asyncio.sleep(rng.expovariate(1 / world.plan.disaster_every_s))
            rng.choice(possible)()

    async def change_moods(self) -> None:
        """Receivers fall ill and recover; the server's WAL writer flushes now and then; rings get lost."""
        world, rng = self.world, self.rng
        database = world.database
        if world.plan.has("lost rings"):
            database.loses_notification = lambda: not world.healed and rng.random() < 0.2
        while True:
            await asyncio.sleep(rng.expovariate(1 / 0.4))
            rng.choice(list(world.network.hosts.values())).change_mood()
            if rng.random() < 0.5:
                database.flush()

    def ambush(self, process: "Process") -> None:
        kinds: dict[str, Callable[[], None]] = {
            "crash": self.crash, "failover": self.fail_over, "restart": self.restart, "sever": self.sever,
            "kill": lambda: self.kill(process), "freeze": lambda: self.freeze(process), "stop": lambda: self.stop(process),
        }  # fmt: skip
        possible = [strike for kind, strike in kinds.items() if self.world.plan.has(kind)]
        if possible and not process.halted:
            self.world.note("ambush")
            self.rng.choice(possible)()

    # ── the server ──

    def crash(self) -> None:
        self.world.note("the server crashes")
        self._crash()

    def _crash(self) -> None:
        world = self.world
        life = world.database.life
        world.database.crash()
        world.checker.crashed(life)
        self._down(self.rng.choice((0.0, 0.3, 2.0)))

    def fail_over(self) -> None:
        """A standby that lacks a part of the WAL, flushed or not, takes the server's place."""
        database = self.world.database
        lost = self.rng.choice((1, 3, 20))
        self.world.note(f"failover without the last {lost} of the WAL")
        # The schema and the first endpoints have long been there.
        database._flushed = max(self.world.founded, database._flushed - lost)
        self._crash()

    def restart(self) -> None:
        if self.world.database.is_up:
            self.world.note("the server restarts")
            self.world.database.restart()
            self._down(self.rng.choice((0.0, 0.2)))

    def outage(self) -> None:
        if self.world.database.is_up:
            self.world.note("the server can't be reached")
            self._down(self.rng.choice((0.05, 0.5, 1.5, 4.0)))

    def _down(self, for_s: float) -> None:
        if for_s:
            self.world.database.is_up = False
            self.world.down_until = max(self.world.down_until, self.world.loop.time() + for_s)

    def sever(self) -> None:
        process = self._some()
        if process is not None:
            session, lingering = self.rng.choice(process.store.SESSIONS), self.rng.random() < 0.3
            self.world.note(f"{process.name} loses its {session} session{', unnoticed' if lingering else ''}")
            process.store.sever(session, lingering=lingering)
            if lingering:
                self.world.reap_later(self.rng.choice((0.5, 5.0)))

    def step_clock(self) -> None:
        step_s = self.rng.choice((-8.0, -1.0, -0.05, 0.05, 1.0, 8.0))
        self.world.note(f"the server's clock steps by {step_s} s")
        self.world.clock_step_us += int(step_s * 1e6)

    # ── dispatchers ──

    def _some(self) -> "Process | None":
        processes = [p for p in self.world.processes if p.end is None]
        return self.rng.choice(processes) if processes else None

    def kill(self, process: "Process | None" = None) -> None:
        process = process or self._some()
        if process is not None:
            lingering = self.rng.random() < 0.2
            process.kill(lingering=lingering)
            if lingering:
                self.world.reap_later(self.rng.choice((0.5, 6.0)))

    def stop(self, process: "Process | None" = None) -> None:
        process = process or self._some()
        if process is not None:
            self.world.note(f"SIGTERM for {process.name}")
            process.stop()

    def freeze(self, process: "Process | None" = None) -> None:
        process = process or self._some()
        if process is not None and not process.halted:
            process.freeze()
            self.world.call_later(self.rng.choice((0.01, 0.3, 1.0, 2.5, 5.0, 8.0)), process.thaw)
