"""`dispatcher status`: the owner alive, frozen, gone; who stands by; how far behind, in sentences and in JSON."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.spawn import spawn
from dispatcher.engine import recorder
from dispatcher.engine.engine import Engine, State
from dispatcher.sink import Behaviour
from dispatcher.store import status as status_module
from dispatcher.store.postgres import PgStore
from dispatcher.store.status import read_status
from tests.process.support import Dispatcher, dispatching, frozen, standing_by
from tests.rig import Rig, rig, until

ROOT = Path(__file__).parent.parent


async def status(dsn: str, *options: str) -> tuple[int, str]:
    process = await spawn(
        sys.executable, "-m", "dispatcher", "status", *options,
        cwd=ROOT, env=os.environ | {"DISPATCHER_DATABASE_URL": dsn},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert err == b""
    assert process.returncode is not None
    return process.returncode, out.decode()


async def as_json(dsn: str) -> tuple[int, dict[str, Any]]:
    code, out = await status(dsn, "--json")
    return code, json.loads(out)


async def test_nobody_ever_ran(dsn: str) -> None:
    code, found = await as_json(dsn)
    assert code == 1
    assert (found["owner"]["state"], found["owner"]["name"], found["owner"]["since"]) == ("none", None, None)
    assert found["log"]["behind_ids"] == 0
    code, out = await status(dsn)
    assert code == 1
    assert "none: nothing is sent until a `dispatcher run` starts" in out
    assert "nothing waits" in out


async def test_an_owner_its_standby_and_what_becomes_of_them(dsn: str) -> None:
    async with rig(dsn, start=False) as r, dispatching(dsn) as first:
        second = Dispatcher(dsn)
        try:
            await second.launch()
            await standing_by(r.db)
            code, found = await as_json(dsn)
            owner = found["owner"]
            assert (code, owner["state"], owner["epoch"]) == (0, "alive", 1)
            assert owner["name"].endswith(f":{first.process.pid}")
            assert owner["heartbeat_age_s"] < 3
            assert owner["since_s"] >= owner["heartbeat_age_s"]
            assert owner["since"] is not None
            assert [one["name"].endswith(f":{second.process.pid}") for one in found["standbys"]] == [True]
            since = owner["since"]
            code, out = await status(dsn)
            assert code == 0
            assert f":{first.process.pid} is alive, heartbeat" in out
            assert f":{second.process.pid} waits since" in out
            assert await second.stop() == 0
            assert (await as_json(dsn))[1]["standbys"] == []
            assert (await as_json(dsn))[1]["owner"]["since"] == since, "a checkpoint doesn't change since when"
            with frozen([first.process.pid]):

                async def silent() -> bool:
                    return (await read_status(r.db))["owner"]["state"] == "not answering"

                await until(silent, within_s=6)
                code, out = await status(dsn)
                assert code == 1
                assert "NOT ANSWERING: it holds the lock, heartbeat" in out
        finally:
            await second.kill()
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0
        code, out = await status(dsn)
        assert code == 1
        assert f":{first.process.pid}, heartbeat" in out
        assert "the last one was" in out


async def test_what_an_engine_says_of_itself(dsn: str) -> None:
    async with rig(dsn) as first, rig(dsn, start=False) as second:
        new = Engine(PgStore(dsn, second.settings), second.transport, second.settings, owner="new")
        assert new.state is State.STARTING
        assert first.engine.state is State.OWNER
        starting = asyncio.create_task(second.start())
        await until(lambda: second.task is not None and second.engine.state is State.STANDBY)
        await standing_by(first.db)
        await first.stop()
        assert first.engine.state is State.STOPPED
        await starting
        assert second.engine.state is State.OWNER
        assert second.engine.ready.is_set()
        starting = asyncio.create_task(first.start())
        await until(lambda: first.engine.state is State.STANDBY)
        first.engine.stop()
        await starting
        assert first.engine.state is State.STOPPED


async def test_how_far_behind(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "COUNT_MAX", 3)
    monkeypatch.setattr(status_module, "LANES_MAX", 2)
    monkeypatch.setattr(recorder, "BACKLOG_TURNS", 1)  # counted to the event, not once a minute only
    async with rig(dsn, queue_events_max=5, retry_schedule_s="600") as r:
        await r.endpoint("/steady")
        await r.endpoint("/failing", behaviour=Behaviour(status=500), account="other")
        paused = [await r.endpoint(f"/paused{n}", account=f"paused{n}") for n in range(3)]
        await r.db.execute(
            "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = ANY ($1)", paused
        )
        for n in range(3):
            await r.emit(10 * (n + 1), account=f"paused{n}")
        await r.emit(20)
        await r.emit(6, account="other")
        last_id = (await r.emit(1))[0]

        async def behind() -> Any:
            found = await read_status(r.db)
            lanes = found["lanes"]
            return found if (lanes["backlog"], found["retries"], found["log"]["behind_ids"]) == (60, 4, 0) else None

        found = await until(behind, what="all passed, and the lanes' rows say so")
        assert found["log"]["last_id"] == found["log"]["position"] == last_id
        assert found["lanes"]["behind"] == 3
        assert [(lane["endpoint_id"], lane["backlog"]) for lane in found["lanes"]["top"]] == [
            (paused[2], 30),
            (paused[1], 20),
        ]
        assert 0 < found["lanes"]["top"][0]["oldest_s"] < found["log"]["oldest_undelivered_s"] + 0.001 < 60
        assert found["dead_letters"] == 0
        await r.stop()
        await gap(r)
        code, out = await status(dsn)
        assert code == 1
        assert "3 endpoints behind, 60 events waiting" in out
        assert "6 deliveries failed and will be tried again" in out
        assert "5 ids below are not visible or not settled yet" in out
        heads, *rows = (line.split() for line in out.splitlines()[-4:])
        assert heads == ["ENDPOINT", "ACCOUNT", "NAME", "STATE", "BACKLOG", "OLDEST"]
        assert [row[:2] + row[-4:-2] for row in rows] == [
            [str(paused[n]), f"paused{n}", "paused", str(10 * (n + 1))] for n in (2, 1, 0)
        ]


async def gap(r: Rig) -> None:
    await r.db.execute("UPDATE webhook.checkpoint SET gaps = '{[3,5),[7,10)}'")
