"""A real process under a service manager: readiness, status, watchdog, reload, and what a probe and a scrape get."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import orjson

from bench.network import Network
from dispatcher.observe.catalogue import METRICS, WEB_METRICS
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
            dsn, health_listen="127.0.0.1:0", web_listen="127.0.0.1:0", log_repeats_per_minute=3, breaker_failures=1000, retry_schedule_s=3600,
        ) as made:  # fmt: skip
            panel = (await made.said("web.listening"))["address"]
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
                async with client.get(f"http://{panel}/healthz") as answer:
                    assert answer.status == 200
                assert 'dispatcher_web_requests_total{area="health",status="2xx"} 1.0' in (await ask("/metrics"))[1]
            assert len(made.all("delivery.attempted")) == 3
            assert await made.stop() == 0


async def test_panel_and_api_alone_are_a_service_too(dsn, tmp_path, monkeypatch):
    """Readiness, life, probes, a scrape, a reload and an orderly end, by the same means as `run`."""
    path, config = tmp_path / "notify", tmp_path / "dispatcher.toml"
    config.write_text("")
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    listening = {"web_listen": "127.0.0.1:0", "health_listen": "127.0.0.1:0"}
    async with manager(path) as heard, dispatching(dsn, verb="web", config=config, **listening) as made:
        await heard.heard("READY=1\nSTATUS=web: port")
        await heard.heard("WATCHDOG=1", times=3)
        panel = (await made.said("web.listening"))["address"]
        health = (await made.said("health.listening"))["address"]
        async with aiohttp.ClientSession() as client:

            async def ask(where: str) -> tuple[int, str]:
                async with client.get(f"http://{where}") as answer:
                    return answer.status, await answer.text()

            assert await ask(f"{health}/livez") == (200, '{"alive": true}')
            status, text = await ask(f"{health}/readyz")
            assert (status, orjson.loads(text)) == (200, {"ready": True, "role": "web", "problems": []})
            assert (await ask(f"{panel}/login"))[0] == 200
            assert (await ask(f"{panel}/api/v1/me"))[0] == 401
            assert (await ask(f"{panel}/metrics"))[0] == 404, "not where the public may be"
            _, text = await ask(f"{health}/metrics")
            assert 'dispatcher_web_requests_total{area="panel",status="2xx"} 1.0' in text
            assert 'dispatcher_web_requests_total{area="api",status="4xx"} 1.0' in text
            assert "dispatcher_web_request_duration_seconds_count 3.0" in text
            assert "dispatcher_database_up 1.0" in text
            assert "process_open_fds" in text
            for spec in METRICS:
                assert (f"# TYPE {spec.full_name} " in text) == (spec in WEB_METRICS), spec.name

        config.write_text('log_level = "warning"\nweb_pool_size = 3\n')
        made.signal(signal.SIGHUP)
        line = await made.said("reloaded")
        assert line["changed"] == {"DISPATCHER_LOG_LEVEL": "warning"}
        assert line["need_restart"] == ["DISPATCHER_WEB_POOL_SIZE"]
        await heard.heard("RELOADING=1")
        await heard.heard("READY=1", times=2)
        made.signal(signal.SIGUSR1)
        assert (await made.said("log.level"))["now"] == "debug"
        assert await made.stop() == 0
        await heard.heard("STOPPING=1")
        assert [line["name"] for line in made.all("signal")] == ["SIGTERM"]
        assert made.errors == ""


async def test_panel_and_api_alone_are_not_ready_without_their_database(dsn):
    async with Network(dsn) as network:
        listening = {"web_listen": "127.0.0.1:0", "health_listen": "127.0.0.1:0"}
        async with dispatching(network.dsn, verb="web", **listening) as made, aiohttp.ClientSession() as client:
            health = (await made.said("health.listening"))["address"]

            async def status_of(path: str) -> int:
                async with client.get(f"http://{health}{path}") as answer:
                    return answer.status

            async def is_ready() -> bool:
                return await status_of("/readyz") == 200

            await until(is_ready, what="ready")
            network.cut()

            async def is_away() -> bool:
                return await status_of("/readyz") == 503

            await until(is_away, what="unready")
            assert await status_of("/livez") == 200
            network.heal()
            await until(is_ready, what="ready again")
            assert await made.stop() == 0


async def test_a_second_signal_ends_panel_and_api_at_once(dsn):
    async with dispatching(dsn, verb="web", web_listen="127.0.0.1:0") as made:
        made.signal(
            signal.SIGSTOP
        )  # so that it hears both at once: with nobody to wait for it may have ended in between
        made.signal(signal.SIGTERM)
        made.signal(signal.SIGINT)  # another: two of a kind would be one
        made.signal(signal.SIGCONT)
        assert await made.ended() > 128, made
        assert len(made.all("signal.forced")) == 1
        assert "Traceback" not in made.errors
