"""`dispatcher listen` beside a whole installation: what a laptop gets is what an endpoint of its own would get. And `dispatcher verify`."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook

from bench.spawn import Spawned, spawn
from dispatcher.domain.signing import new_private_key, new_secret, private_key, public_key
from tests.rig import Rig, rig, until
from tests.test_cli import Cli
from tests.web.conftest import Site, site
from tests.web.test_receiver import closed, free_port


class Laptop:
    """A developer's server, which verifies with the official library, and the verb that feeds it."""

    def __init__(self, web: Site, r: Rig) -> None:
        self.web = web
        self.rig = r
        self.got: list[tuple[Any, bytes]] = []
        self.status = 200
        self.url = ""
        self.shown: list[dict[str, Any]] = []
        self.said = ""

    async def serve(self, request: web.Request) -> web.Response:
        self.got.append((request.headers, await request.read()))
        return web.Response(status=self.status, text="thanks\n  a lot")

    @contextlib.asynccontextmanager
    async def listening(self, *args: str, stdin: int = subprocess.DEVNULL) -> AsyncIterator[Spawned]:
        process = await spawn(
            sys.executable, "-m", "dispatcher", "listen", "--forward-to", self.url, "--json", *args, stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"DISPATCHER_API_URL": self.web.url, "DISPATCHER_API_KEY": await self.web.key("acct")},
        )  # fmt: skip
        readers = [asyncio.create_task(self._read(process.stdout)), asyncio.create_task(self._hear(process.stderr))]
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), 30)
            finally:
                if process.returncode is None:
                    process.kill()
                await asyncio.gather(*readers)

    async def _read(self, stream: Any) -> None:
        async for line in stream:
            self.shown.append(json.loads(line))

    async def _hear(self, stream: Any) -> None:
        async for line in stream:
            self.said += line.decode()

    async def is_live(self) -> int:
        """Wait until the verb's endpoint gets what is inserted; return its id."""

        async def live() -> int | None:
            assert "error" not in self.said, self.said
            rows = await self.web.query("SELECT id FROM webhook.endpoint WHERE state = 'live'")
            return rows[0]["id"] if rows and self.rig.has_taken_up(rows[0]["id"]) else None

        found: int = await until(live, within_s=60, what="the endpoint is live")
        return found


@pytest.fixture
async def laptop(dsn: str) -> AsyncIterator[Laptop]:
    port = free_port()
    async with site(dsn, **closed(port)) as made, rig(dsn, allowed_networks="", web_connect=f"127.0.0.1:{port}") as r:
        laptop = Laptop(made, r)
        app = web.Application()
        app.router.add_post("/hooks", laptop.serve)
        runner = web.AppRunner(app)
        await runner.setup()
        server = web.TCPSite(runner, "127.0.0.1", 0)
        await server.start()
        laptop.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
        yield laptop
        await runner.cleanup()


async def test_what_is_delivered_comes_to_the_laptop_as_it_was_signed(laptop: Laptop) -> None:
    async with laptop.listening("--type", "message.*") as process:
        endpoint = await laptop.is_live()
        payload = '{"text":  "Grüße",  "n": 1}'
        await laptop.rig.emit(payload=payload)
        await laptop.rig.emit(type="other.thing")
        await until(lambda: len(laptop.shown) >= 2, within_s=60, what=laptop.said)
        test, shown = laptop.shown
        assert (test["type"], test["status"]) == ("endpoint.test", 200)
        assert (shown["type"], shown["signature"], shown["status"]) == ("message.sent", "valid", 200)
        assert (shown["answer"], shown["again"]) == ("thanks\n  a lot", False)
        [[secret]] = await laptop.web.query(
            "SELECT secret FROM webhook.endpoint_secret WHERE endpoint_id = $1", endpoint
        )
        assert secret in laptop.said, "the developer's server needs it"
        headers, body = laptop.got[1]
        assert payload.encode() in body, "byte for byte"
        Webhook(secret).verify(body, dict(headers))
        assert headers["webhook-id"] == shown["webhook_id"]
        assert headers["x-attempt"] == "1"
        assert headers["host"] == laptop.url.split("/")[2]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert await laptop.web.query("SELECT FROM webhook.endpoint WHERE state <> 'deleted'") == [], (
        "nothing is left behind"
    )
    assert await laptop.web.query("SELECT FROM webhook.receiver") == []


async def test_what_the_receiver_cut_short_is_said_and_not_sent_on(laptop: Laptop) -> None:
    async with laptop.listening():
        await laptop.is_live()
        await laptop.rig.emit(payload=json.dumps({"text": "x" * 20_000}))
        await laptop.rig.emit()
        await until(lambda: len(laptop.shown) >= 3, within_s=60, what=laptop.said)
        large = next(one for one in laptop.shown if one["body_bytes"] > 16_384)
        assert large["status"] is None
        assert "not sent on" in large["answer"]
        assert len(laptop.got) == 2


async def test_a_server_that_fails_or_is_away_is_shown_and_can_have_it_again(laptop: Laptop) -> None:
    laptop.status = 500
    keyboard, terminal = os.openpty()
    try:
        async with laptop.listening(stdin=terminal):
            await laptop.is_live()
            [[event_id]] = [await laptop.rig.emit()]
            await until(lambda: len(laptop.shown) >= 2, within_s=60, what=laptop.said)
            assert laptop.shown[1]["status"] == 500
            await laptop.rig.settled()  # the dispatcher was answered by the receiver
            assert [row["status"] for row in await laptop.rig.attempts(event_id=event_id)] == [200]
            laptop.status = 200
            os.write(keyboard, b"\n")
            await until(lambda: len(laptop.shown) >= 3, within_s=60, what=laptop.said)
            os.write(keyboard, f"{laptop.shown[0]['id']}\n".encode())
            await until(lambda: len(laptop.shown) >= 4, within_s=60, what=laptop.said)
            os.write(keyboard, b"999999\n")
            await until(lambda: "no request 999999" in laptop.said, within_s=60)
    finally:
        os.close(keyboard)
        os.close(terminal)
    last, first = laptop.shown[2:]
    assert (last["id"], last["status"], last["again"]) == (laptop.shown[1]["id"], 200, True)
    assert (first["id"], first["again"]) == (laptop.shown[0]["id"], True)
    assert laptop.got[2][1] == laptop.got[1][1]


async def test_a_receiver_that_is_there_is_followed_and_replayed_from(laptop: Laptop) -> None:
    key = await laptop.web.key("acct")
    receiver = (await laptop.web.ask("POST", "/api/v1/receivers", key=key)).json
    path = receiver["url"].removeprefix(laptop.web.url)
    for body in (b'{"type": "a.b"}', b"\xff\xfe"):
        assert (await laptop.web.ask("POST", path, data=body, headers={"X-Of-Mine": "kept"})).status == 200
    first, binary = [row["id"] for row in await laptop.web.query("SELECT id FROM webhook.received ORDER BY id")]

    async def replay(request_id: int) -> int:
        async with laptop.listening("--receiver", str(receiver["id"]), "--replay", str(request_id)) as process:
            return await asyncio.wait_for(process.wait(), 60)

    assert await replay(first) == 0
    assert laptop.got[0][1] == b'{"type": "a.b"}'
    assert laptop.got[0][0]["x-of-mine"] == "kept"
    assert await replay(binary) == 1, "it wasn't kept as it came"
    assert await replay(binary + 1) == 3
    laptop.url = "http://127.0.0.1:9/hooks"
    assert await replay(first) == 1
    assert "no answer" in laptop.shown[-1]["answer"]
    async with laptop.listening("--receiver", str(receiver["id"])) as process:
        await until(lambda: "listening" in laptop.said, within_s=60)
        assert (await laptop.web.ask("DELETE", f"/api/v1/receivers/{receiver['id']}", key=key)).status == 200
        assert await asyncio.wait_for(process.wait(), 60) == 3
    assert "or none any more" in laptop.said


# ── bad input ──


def test_listen_refuses_what_it_can_not_do() -> None:
    cli = Cli("")
    asked = ("listen", "--api-key", "k", "--api-url")
    for args, said in (
        ((*asked, "http://127.0.0.1:9", "--forward-to", "localhost:3000"), "--forward-to is a URL"),
        ((*asked, "http://127.0.0.1:9", "--forward-to", "http://l/", "--replay", "1"), "--replay needs --receiver"),
        ((*asked, "http://127.0.0.1:9", "--forward-to", "http://l/"), "can't be reached"),
        ((*asked, "nothing", "--forward-to", "http://l/"), "is no URL"),
    ):
        assert said in str(cli(*args).exception), args


# ── verify ──


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Cli, str, list[str]]:
    secret, body = new_secret(), b'{"n":  1}'
    (tmp_path / "body").write_bytes(body)
    (tmp_path / "secret").write_text(secret + "\n")
    now = time.time()
    signature = Webhook(secret).sign("evt_1", _utc(now), body.decode())
    (tmp_path / "headers").write_text(
        f"POST /hooks HTTP/1.1\r\nWebhook-Id: evt_1\r\nwebhook-timestamp: {int(now)}\r\nWEBHOOK-SIGNATURE: {signature}\r\n\r\n"
    )
    return Cli(""), str(tmp_path), ["verify", "--secret", f"@{tmp_path}/secret", "--headers", f"{tmp_path}/headers"]


def _utc(at: float) -> Any:
    return datetime.fromtimestamp(at, UTC)


def test_verify_tells_whether_a_signature_fits(signed: tuple[Cli, str, list[str]]) -> None:
    cli, at, verify = signed
    assert cli.ok(*verify, f"{at}/body").startswith("valid")
    assert cli.ok(*verify, "-", input=b'{"n":  1}').startswith("valid")
    assert cli.json(*verify, f"{at}/body")["webhook_id"] == "evt_1"
    wrong = cli(*verify, "-", input=b'{"n": 1}')
    assert (wrong.exit_code, wrong.output[:5]) == (1, "wrong")
    missing = cli("verify", "--secret", f"@{at}/secret", f"{at}/body")
    assert (missing.exit_code, missing.output[:7]) == (1, "missing")


def test_verify_looks_past_the_time_if_asked(signed: tuple[Cli, str, list[str]]) -> None:
    cli, at, _ = signed
    text = Path(at, "secret").read_text().strip()
    old = Webhook(text).sign("evt_1", _utc(1_700_000_000), '{"n":  1}')
    args = ["verify", "--secret", text, "--header", "webhook-id: evt_1", "--header", "webhook-timestamp: 1700000000"]
    args += ["--header", f"webhook-signature: {old}", f"{at}/body"]
    assert cli(*args).output.startswith("old")
    assert cli.ok(*args, "--any-time").startswith("valid")


def test_verify_takes_public_keys(signed: tuple[Cli, str, list[str]]) -> None:
    cli, at, _ = signed
    private = new_private_key()
    now = int(time.time())
    signature = base64.b64encode(private_key(private).sign(f"evt_1.{now}.".encode() + b'{"n":  1}')).decode()
    args = [
        "--header",
        "webhook-id: evt_1",
        "--header",
        f"webhook-timestamp: {now}",
        "--header",
        f"webhook-signature: v1a,{signature}",
    ]
    assert cli.ok("verify", "--secret", public_key(private), *args, f"{at}/body").startswith("valid")


@pytest.mark.parametrize("key", ["whsec_!", "whsec_YQ==", "whpk_YQ==", "whpk_!", "nothing", "@/no/such/file"])
def test_verify_refuses_what_is_no_key_without_showing_it(signed: tuple[Cli, str, list[str]], key: str) -> None:
    cli, at, _ = signed
    result = cli("verify", "--secret", key, f"{at}/body")
    assert getattr(result.exception, "exit_code", None) == 2
    assert "YQ==" not in str(result.exception)
