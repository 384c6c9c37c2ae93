"""PostgreSQL crashes, restarts or isn't there, while the dispatcher lives. On a server of its own, which is killed."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from dispatcher.sink import Behaviour
from dispatcher.store import embedded
from tests.conftest import SCHEMA, connected, dsn_of, make_server
from tests.process.support import (
    Dispatcher,
    Load,
    Watch,
    backends,
    dispatching,
    frozen,
    longest_silence,
    recorded,
    server_pids,
    settle,
    taken_up,
)
from tests.rig import Rig, rig, until

RETRY = {"retry_schedule_s": "1,1,1,1,1,1,1,1,1,1", "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.5}
PATHS = {"/steady": "acct", "/flaky": "acct", "/slow": "acct"}


@pytest.fixture(scope="module")
def own_server() -> Iterator[embedded.EmbeddedServer]:
    # The WAL writer sleeps for long, so that a crash takes a good part of the asynchronous commits with it.
    server, directory = make_server(wal_writer_delay="10s", wal_writer_flush_after="1GB", checkpoint_timeout="1h")
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def own_dsn(own_server: embedded.EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    name = f"own_{abs(hash(request.node.name))}"
    async with connected(own_server.dsn) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
    dsn = dsn_of(own_server.dsn, name)
    async with connected(dsn) as connection:
        await connection.execute(SCHEMA)
    yield dsn
    async with connected(own_server.dsn) as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def receivers(r: Rig) -> None:
    await r.endpoint("/steady")
    await r.endpoint("/flaky", behaviour=Behaviour(fail_rate=0.1, delay_s=0.002))
    await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.1), in_flight_max=5)


async def reconnect(r: Rig) -> None:
    r.db.terminate()
    r.db = await asyncpg.connect(r.dsn)


@contextlib.asynccontextmanager
async def down(r: Rig, server: embedded.EmbeddedServer, mode: str) -> AsyncIterator[None]:
    """The server is down while inside."""
    await asyncio.to_thread(server.stop_now, mode)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start_again)
        await reconnect(r)


async def test_a_crash_under_load(own_server: embedded.EmbeddedServer, own_dsn: str) -> None:
    async with rig(own_dsn, start=False) as r:
        await receivers(r)
        async with Watch(own_dsn) as watch, Load(own_dsn) as load, dispatching(own_dsn, **RETRY) as d:
            await taken_up(r.db)
            for crash in range(1, 3):
                await load.more(200)
                began = time.time()
                async with down(r, own_server, "immediate"):
                    pass
                up = time.time()
                await d.said("started", times=crash + 1)
                await load.more(200)
                await until(lambda: r.received[-1].received_at > up)  # noqa: B023
                print(f"crash: server away {up - began:.2f} s, silence {longest_silence(r, began):.2f} s")
            for path in PATHS:
                r.sink.set_behaviour(path, Behaviour())
            print(
                f"{await settle(r, load, PATHS, d)} sent twice of {len(load.committed)} events, {len(load.unknown)} unknown"
            )
            assert len(d.all("life.lost")) == 2
            assert watch.checks > 20
            assert d.errors == ""


async def test_a_crash_takes_the_recorders_tail_with_it(own_server: embedded.EmbeddedServer, own_dsn: str) -> None:
    """Recorded without a flush, visible to everybody, and gone: the state in memory says delivered, and is wrong."""
    async with rig(own_dsn, start=False) as r:
        # So slow that most is recorded after the last producer's COMMIT, which flushes what was written before it.
        await r.endpoint("/steady", behaviour=Behaviour(delay_s=0.02), in_flight_max=10)
        async with Watch(own_dsn), Load(own_dsn) as load, dispatching(own_dsn) as d:
            await load.more(200)
            await load.stop()
            await taken_up(r.db)

            async def all_recorded() -> bool:
                return len(await recorded(r.db)) == len(load.committed)

            await until(all_recorded)
            async with down(r, own_server, "immediate"):
                pass
            await d.said("life.lost")
            duplicates = await settle(r, load, {"/steady": "acct"}, d)
            print(f"{duplicates} of {len(load.committed)} attempt rows gone")
            assert duplicates > 0, "the crash took nothing, so nothing was tested"


async def test_a_backend_that_is_killed_hard_is_a_crash(own_server: embedded.EmbeddedServer, own_dsn: str) -> None:
    async with rig(own_dsn, start=False) as r:
        await receivers(r)
        async with Watch(own_dsn), Load(own_dsn) as load, dispatching(own_dsn, **RETRY) as d:
            await load.more(300)
            began = time.time()
            [pid] = await backends(r.db, "recorder")
            os.kill(pid, signal.SIGKILL)
            await d.said("started", times=2)

            async def back() -> bool:
                try:
                    await reconnect(r)
                except (OSError, asyncpg.PostgresError):
                    return False
                return True

            await until(back)
            up = time.time()
            await until(lambda: r.received[-1].received_at > up)
            print(f"kill -9 of a backend: silence {longest_silence(r, began):.2f} s")
            for path in PATHS:
                r.sink.set_behaviour(path, Behaviour())
            await settle(r, load, PATHS, d)


async def test_a_clean_restart_keeps_the_state_in_memory(own_server: embedded.EmbeddedServer, own_dsn: str) -> None:
    async with rig(own_dsn, start=False) as r:
        await receivers(r)
        async with Watch(own_dsn), Load(own_dsn) as load, dispatching(own_dsn, **RETRY) as d:
            await load.more(300)
            began = time.time()
            async with down(r, own_server, "fast"):
                await until(lambda: d.all("owner.away") and d.all("config.away"))
            up = time.time()
            await load.more(100)
            await until(lambda: r.received[-1].received_at > up)
            print(f"restart: server away {up - began:.2f} s, silence {longest_silence(r, began):.2f} s")
            for path in PATHS:
                r.sink.set_behaviour(path, Behaviour())
            assert await settle(r, load, PATHS, d) == 0
            assert len(d.all("started")) == 1


async def test_sigterm_and_a_start_while_the_server_is_down(own_server: embedded.EmbeddedServer, own_dsn: str) -> None:
    """It waits a little for the server to take the results, says that it hasn't, and ends; they are sent again.

    Who starts meanwhile is told at once.
    """
    async with rig(own_dsn, start=False) as r:
        await r.endpoint("/steady", behaviour=Behaviour(delay_s=0.05))
        async with Load(own_dsn) as load, dispatching(own_dsn, grace_s=0.5) as d:
            await load.more(100)
            await load.stop()
            async with down(r, own_server, "immediate"):
                another = await Dispatcher(own_dsn).launch()
                began = time.monotonic()
                assert await d.stop() == 0, d
                assert time.monotonic() - began < 7
                assert d.all("stopped.unrecorded")[0]["results"] > 0, d
                assert await another.ended() == 6, another
                assert another.errors.startswith("error: the database can't be reached")
                assert "DISPATCHER_DATABASE_URL" in another.errors
                assert another.errors.count("\n") == 1
        async with dispatching(own_dsn) as d:
            await settle(r, load, {"/steady": "acct"}, d)


async def test_a_pause_holds_also_when_the_server_freezes_right_after_it(
    own_server: embedded.EmbeddedServer, own_dsn: str
) -> None:
    """The notice of the pause never arrives: the lease runs out instead. The server thaws, and all goes on."""
    async with rig(own_dsn, start=False) as r:
        endpoint_id = await r.endpoint("/slow", behaviour=Behaviour(delay_s=0.02), in_flight_max=5)
        async with Watch(own_dsn), Load(own_dsn) as load, dispatching(own_dsn, statement_timeout_s=1) as d:
            await load.more(300)
            await load.stop()
            before = len(r.received)
            # These before the pause, so that no notice can be quicker than the freeze.
            with frozen(await backends(r.db, "config", "listener")):
                await r.db.execute(
                    "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1",
                    endpoint_id,
                )
                returned = time.time()
                with frozen(server_pids(own_server)):
                    await d.said("record.away")
                    await d.said("config.away")
                    await until(lambda: time.time() > returned + 1.6)
            await until(lambda: d.all("endpoint.configured"))
            assert len(r.received) > before, "it had enough in memory to go on"
            print(f"the last POST arrived {r.received[-1].received_at - returned:.3f} s after the pause")
            assert r.received[-1].received_at < returned + 1
            await r.db.execute(
                "UPDATE webhook.endpoint SET state = 'live', paused_at_id = NULL, in_flight_max = NULL WHERE id = $1",
                endpoint_id,
            )
            assert await settle(r, load, {"/slow": "acct"}, d) == 0
            assert len(d.all("started")) == 1


async def test_a_wrong_url_is_told_at_once(own_server: embedded.EmbeddedServer) -> None:
    malformed = "DISPATCHER_DATABASE_URL is malformed"
    cases = {
        "postgresql://postgres@127.0.0.1:1/webhook": (6, "can't be reached"),
        "mysql://root@127.0.0.1/webhook": (5, malformed),
        "not a url": (5, malformed),
        "postgresql://postgres@127.0.0.1:port/webhook": (5, malformed),
        dsn_of(own_server.dsn, "nowhere"): (5, 'database "nowhere" does not exist'),
        own_server.dsn: (5, "run `dispatcher migrate`"),
    }
    running = {url: await Dispatcher(url).launch() for url in cases}
    for url, (status, says) in cases.items():
        d = running[url]
        assert await d.ended() == status, d
        assert says in d.errors
        assert "Traceback" not in d.errors
        assert d.lines == []
