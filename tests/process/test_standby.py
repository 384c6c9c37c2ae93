"""A second `dispatcher run` waits, and takes over when the first one ends, freezes or is cut off; a zombie that wakes sends and writes nothing.

All of it under load, with real processes. Each dispatcher has a User-Agent of its own, so that every POST says who sent it.
"""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.network import Network
from dispatcher.sink import Behaviour, Received
from tests.process.support import (
    ROOT,
    Dispatcher,
    Load,
    Watch,
    arrivals,
    dispatching,
    frozen,
    settle,
    standing_by,
    taken_up,
)
from tests.rig import Rig, rig, until

RETRY = {"retry_schedule_s": "1,1,1,1,1,1,1,1,1,1", "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.5}
LIGHT = {"producers": 2, "pace_s": 0.05}
PATHS = {"/steady": "acct", "/flaky": "acct", "/slow": "acct"}
LEASE_S = 0.9  # engine/config.py: POSTs may start for so long after the last look at the database
TAKEN_OVER = 7  # exit status


class Scene:
    """A rig without an engine, load, and who sent what."""

    def __init__(self, r: Rig, load: Load) -> None:
        self.r = r
        self.load = load
        self.senders: list[str] = []  # of r.received, one each
        told = r.sink._tell

        def tell(path: bytes, webhook_id: bytes | None, headers: dict[bytes, bytes], *rest: Any) -> None:
            self.senders.append(headers[b"user-agent"].decode())
            told(path, webhook_id, headers, *rest)

        r.sink._tell = tell  # type: ignore[method-assign]

    def of(self, sender: str, since: float = 0.0) -> list[Received]:
        return [
            got
            for got, who in zip(self.r.received, self.senders, strict=True)
            if who == sender and got.received_at > since
        ]

    def drop(self, late: list[Received]) -> None:
        """Take arrivals out of the account, after they were explained."""
        kept = [(got, who) for got, who in zip(self.r.received, self.senders, strict=True) if got not in late]
        self.r.received[:] = [got for got, _ in kept]
        self.senders[:] = [who for _, who in kept]

    async def taken_over(self, by: str, since: float) -> float:
        """Wait for the first POST by `by` and return how long it took."""
        await until(lambda: self.of(by), within_s=15, what=f"a POST by {by}")
        return self.of(by)[0].received_at - since

    def check_repeats(self, first: str, second: str, fault_at: float, until_s: float = 0.1) -> int:
        """What arrived twice was sent by `first` shortly before the fault (or so long after it), and then by `second`, once."""
        who_sent = dict(zip(map(id, self.r.received), self.senders, strict=True))
        repeats = 0
        for key, all_ in arrivals(self.r.received).items():
            if len(all_) > 1:
                repeats += 1
                assert [who_sent[id(one)] for one in all_] == [first, second], (key, all_)
                assert fault_at - 1.5 < all_[0].received_at < fault_at + until_s, (key, all_, fault_at)
        return repeats

    async def settle(self, last: Dispatcher) -> None:
        for path in PATHS:
            self.r.sink.set_behaviour(path, Behaviour())
        await settle(self.r, self.load, PATHS, last)


@contextlib.asynccontextmanager
async def scene(dsn: str) -> AsyncIterator[Scene]:
    async with rig(dsn, start=False) as r:
        await r.endpoint("/steady")
        await r.endpoint("/flaky", behaviour=Behaviour(fail_rate=0.1, delay_s=0.002))
        await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.1), in_flight_max=5)  # so that it lags
        async with Watch(dsn) as watch, Load(dsn, **LIGHT) as load:
            yield Scene(r, load)
            assert watch.checks > 20


@contextlib.asynccontextmanager
async def standby(dsn: str, name: str = "second", root: Path = ROOT) -> AsyncIterator[Dispatcher]:
    made = Dispatcher(dsn, root=root, user_agent=name, **RETRY)
    try:
        await made.launch()
        yield made
    finally:
        await made.kill()


@contextlib.asynccontextmanager
async def two(dsn: str, owner_dsn: str = "") -> AsyncIterator[tuple[Scene, Dispatcher, Dispatcher]]:
    """An owner and a standby; the owner has just delivered, and recorded a heartbeat."""
    async with (
        scene(dsn) as s,
        dispatching(owner_dsn or dsn, user_agent="first", **RETRY) as first,
        standby(dsn) as second,
    ):
        await second.said("standby.waiting")
        await standing_by(s.r.db)
        await s.load.more(150)
        assert s.of("second") == []
        yield s, first, second


def told(what: str, seconds: float, second: Dispatcher) -> None:
    print(f"{what}: the standby's first POST {seconds:.2f} s after it; {second.all('standby.taking_over')[-1]}")


async def test_the_owner_ends_by_sigterm(dsn: str) -> None:
    async with two(dsn) as (s, first, second):
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0, first
        ended_at = time.time()
        took = await s.taken_over("second", ended_at)
        told("SIGTERM, and its end", took, second)
        assert took < 2
        assert second.all("standby.taking_over")[0]["reason"] == "the owner's session ended"
        await s.load.more(50)
        await s.settle(second)
        assert s.check_repeats("first", "second", ended_at) == 0, "an orderly stop leaves nothing to repeat"


async def test_a_receiver_that_hangs_does_not_keep_the_standby_waiting(dsn: str) -> None:
    """Its POST is cut off, and sent again by the next; the others go on within two seconds of the signal."""
    async with two(dsn) as (s, first, second):
        await s.r.endpoint("/hang", account="other", behaviour=Behaviour(mode="hang"))
        await taken_up(s.r.db)
        await s.r.emit(account="other")
        await until(lambda: s.r.by_path()["/hang"] == 1)
        first.signal(signal.SIGTERM)
        signalled_at = time.time()
        took = await s.taken_over("second", signalled_at)
        told("SIGTERM, while a receiver hangs", took, second)
        assert took < 2
        assert await first.ended() == 0, first
        assert first.all("stopped")[-1]["cut_off"] == 1
        await s.load.more(50)
        await until(lambda: s.r.by_path()["/hang"] == 2, what="what was cut off is sent again")


async def test_the_owner_is_killed(dsn: str) -> None:
    async with two(dsn) as (s, first, second):
        killed_at = time.time()
        await first.kill()
        took = await s.taken_over("second", killed_at)
        told("kill -9", took, second)
        assert took < 2
        await s.load.more(50)
        await s.settle(second)
        print(f"{s.check_repeats('first', 'second', killed_at)} arrived twice")


async def test_the_owner_freezes_and_wakes(dsn: str) -> None:
    """Its kernel keeps its sessions, so only the heartbeat tells. Awake again it is a zombie: what it had begun may end, and nothing else."""
    async with two(dsn) as (s, first, second):
        frozen_at = time.time()
        with frozen([first.process.pid]):
            took = await s.taken_over("second", frozen_at)
            told("SIGSTOP", took, second)
            assert took < 6
            assert second.all("standby.taking_over")[0]["reason"] == "the owner's heartbeat stopped"
            await s.load.more(50)
        thawed_at = time.time()
        assert await first.ended() == TAKEN_OVER, first
        assert time.time() - thawed_at < 5
        assert "another dispatcher took over" in first.errors
        assert "started again it waits as a standby" in first.errors
        assert "Traceback" not in first.errors
        # A freeze may come between the last look at the lease and the write of that one POST: it carries the time at which it began.
        late = s.of("first", since=frozen_at + 0.5)
        assert len(late) <= 1
        assert all(got.timestamp is not None and got.timestamp <= frozen_at for got in late)
        s.drop(late)
        await s.load.more(50)
        await s.settle(second)
        print(f"{s.check_repeats('first', 'second', frozen_at, until_s=0.5)} arrived twice")


async def test_the_owners_network_is_cut_and_heals(dsn: str) -> None:
    """The owner sends until its lease runs out, and records nothing of it; the standby sends that again, and the rest."""
    async with Network(dsn) as network, two(dsn, network.dsn) as (s, first, second):
        cut_at = time.time()
        network.cut()
        took = await s.taken_over("second", cut_at)
        told("network cut", took, second)
        assert took < 6
        await s.load.more(50)
        assert first.process.returncode is None
        network.heal()
        healed_at = time.time()
        assert await first.ended() == TAKEN_OVER, first
        print(f"the former owner stopped {time.time() - healed_at:.2f} s after the network had healed")
        assert "another dispatcher took over" in first.errors
        assert "Traceback" not in first.errors
        last = s.of("first")[-1]
        print(f"its last POST arrived {last.received_at - cut_at:.2f} s after the cut")
        assert last.received_at < cut_at + LEASE_S + 0.3
        await s.load.more(50)
        await s.settle(second)
        print(f"{s.check_repeats('first', 'second', cut_at, until_s=LEASE_S + 0.3)} arrived twice")


async def test_one_of_two_standbys_takes_over_and_the_other_after_it(dsn: str) -> None:
    async with two(dsn) as (s, first, second), standby(dsn, "third") as third:
        await standing_by(s.r.db, 2)
        for waiting in (second, third):
            await waiting.said("standby.waiting")  # a session is named before its first look
        killed_at = time.time()
        await first.kill()
        await until(lambda: s.of("second") or s.of("third"), what="a POST by either")
        winner, loser = (second, third) if s.of("second") else (third, second)
        names = {second.process.pid: "second", third.process.pid: "third"}
        assert time.time() - killed_at < 2
        await loser.said("standby.waiting", times=2)  # behind another owner now
        await s.load.more(100)
        assert loser.all("started") == []
        assert s.of(names[loser.process.pid]) == []
        again_at = time.time()
        await winner.kill()
        assert await s.taken_over(names[loser.process.pid], again_at) < 2
        await s.settle(loser)
        assert Counter(s.senders).keys() == {"first", "second", "third"}


async def test_a_former_owner_is_the_next_standby(dsn: str) -> None:
    """What a service manager does with exit status 7: there and back again."""
    async with two(dsn) as (s, first, second):
        with frozen([first.process.pid]):
            await s.taken_over("second", time.time())
        assert await first.ended() == TAKEN_OVER, first
        async with standby(dsn, "first again") as again:
            await again.said("standby.waiting")
            killed_at = time.time()
            await second.kill()
            assert await s.taken_over("first again", killed_at) < 2
            await s.load.more(50)
            s.drop([got for got in s.of("first") if (got.timestamp or 0) > killed_at])
            await s.settle(again)


async def test_an_owner_that_a_lock_keeps_from_recording_keeps_its_place(dsn: str) -> None:
    """Its heartbeat waits behind somebody's lock on the attempts: whoever took over would wait there too."""
    async with two(dsn) as (s, first, second):
        async with s.r.db.transaction():
            await s.r.db.execute("LOCK webhook.attempt IN SHARE MODE")
            locked_at = time.time()
            await until(lambda: time.time() > locked_at + 5)
            age = await s.r.db.fetchval(
                "SELECT extract(epoch FROM clock_timestamp() - heartbeat_at) FROM webhook.checkpoint"
            )
            assert age > 3
        await s.load.more(50)
        assert second.all("standby.taking_over") == []
        assert await second.stop() == 0
        await s.settle(first)
        assert s.check_repeats("first", "second", locked_at) == 0
