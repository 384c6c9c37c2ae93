"""A real process under a service manager: readiness, status, watchdog, reload, and what a probe and a scrape get."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from dispatcher.sink import Behaviour
from tests.process.support import SESSIONS, Dispatcher, backends, dispatching, standing_by
from tests.rig import rig, until


class Manager(asyncio.DatagramProtocol):
    """What systemd would hear."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.messages.append(data.decode())

    async def heard(self, line: str, *, times: int = 1) -> None:
        def found() -> bool:
            return sum(line in message for message in self.messages) >= times

        await until(found, what=f"{line} in {self.messages[-5:]}")


@contextlib.asynccontextmanager
async def manager(path: Path) -> AsyncIterator[Manager]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Manager, sock=sock)
    try:
        yield protocol
    finally:
        transport.close()


async def test_systemd_hears_of_readiness_status_life_and_the_end(dsn, tmp_path, monkeypatch):
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    async with manager(path) as heard, dispatching(dsn) as owner:
        await heard.heard("READY=1")
        await heard.heard("WATCHDOG=1", times=3)
        await heard.heard("STATUS=owner: settled up to")
        assert await owner.stop() == 0
        await heard.heard("STOPPING=1")


async def test_a_standby_is_ready_too(dsn, db, tmp_path, monkeypatch):
    async with dispatching(dsn):
        path = tmp_path / "notify"
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        async with manager(path) as heard:
            standby = await Dispatcher(dsn).launch()
            try:
                await standing_by(db)
                await heard.heard("READY=1")
                assert "READY=1\nSTATUS=standby" in heard.messages, "whoever is ready has no problem to tell of"
            finally:
                await standby.kill()


async def test_sighup_changes_what_can_change_and_names_the_rest(dsn, db, tmp_path):
    config = tmp_path / "dispatcher.toml"
    config.write_text('log_level = "warning"\nslots = 100\n')
    settings = {"config": config, "health_listen": "127.0.0.1:0"}
    made = Dispatcher(dsn, **settings)
    try:
        await made.launch()

        async def runs() -> bool:  # at this level nothing is said of the start
            return len(await backends(db)) == len(SESSIONS)

        await until(runs, what="its sessions")
        config.write_text('log_level = "info"\nslots = 60\npoll_ms = 7\nproxy_url = "http://u:hunter2@127.0.0.1:1"\n')
        made.signal(signal.SIGHUP)
        line = await made.said("reloaded")
        assert line["changed"]["DISPATCHER_SLOTS"] == 60
        assert line["need_restart"] == ["DISPATCHER_POLL_MS", "DISPATCHER_PROXY_URL"]
        config.write_text("slots = 0\n")
        made.signal(signal.SIGHUP)
        refused = await made.said("reload.refused")
        assert "DISPATCHER_SLOTS" in refused["error"]
        made.signal(signal.SIGUSR1)
        assert (await made.said("log.level"))["now"] == "debug"
        made.signal(signal.SIGUSR1)
        assert (await made.said("log.level", times=2))["now"] == "info"
        assert await made.stop() == 0
        assert not any("hunter2" in str(said) for said in made.lines)
    finally:
        await made.kill()


async def test_a_service_answers_probes_and_scrapes_and_the_log_of_a_failing_endpoint_is_bounded(dsn):
    async with rig(dsn, start=False) as r:
        await r.endpoint("/bad", behaviour=Behaviour(status=400))
        async with dispatching(
            dsn, health_listen="127.0.0.1:0", log_repeats_per_minute=3, breaker_failures=1000, retry_schedule_s=3600
        ) as made:
            address = (await made.said("health.listening"))["address"]
            async with aiohttp.ClientSession() as client:

                async def ask(path: str) -> tuple[int, str]:
                    async with client.get(f"http://{address}{path}") as answer:
                        return answer.status, await answer.text()

                await r.emit(15)

                async def failed() -> bool:
                    return 'dispatcher_attempts_total{outcome="4xx"} 15.0' in (await ask("/metrics"))[1]

                await until(failed, what="fifteen failures in a scrape")

                async def is_ready() -> bool:
                    return (await ask("/readyz"))[0] == 200

                await until(is_ready, what="ready")
                assert (await ask("/livez"))[0] == 200
            assert len(made.all("delivery.attempted")) == 3
            assert await made.stop() == 0
