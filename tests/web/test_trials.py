"""Tests of an endpoint, by panel and API: what they show of the answer, and what "all chosen types" does."""

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator, Callable

import pytest

from dispatcher.sink import Behaviour, Sink
from dispatcher.web import trial
from dispatcher.web.limits import TRIALS_OF_ACCOUNT_MAX
from tests.rig import until
from tests.web.conftest import Site
from tests.web.test_panel import HTML, Browser, is_open

__all__ = ["customer", "sink"]

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    made = Sink()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


@contextlib.asynccontextmanager
async def answering(answer: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """A receiver that answers with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        writer.write(answer(await reader.readexactly(length)))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"


async def draft(customer: Browser, url: str, *types: str) -> str:
    """Save step 1; return the endpoint's path."""
    fields = [("url", url), *(("type", name) for name in types)] if types else [("url", url), ("all_types", "1")]
    setup = await customer.ok("/endpoints/new", fields)
    return setup.removesuffix("/setup")


async def test_what_a_receiver_answers_is_shown_as_text_and_nothing_else(customer: Browser):
    head = f"HTTP/1.1 200 OK\r\nx-{'a' * 8}: {HOSTILE}\r\nset-cookie: dispatcher=stolen\r\nlocation: javascript:alert(1)\r\n"
    body = HOSTILE.encode() + b"\x00\xff\x1b[2J"
    async with answering(lambda _: head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body) as url:
        endpoint = await draft(customer, url)
        answer = await customer.post(f"{endpoint}/test")
        assert answer.cookies() == []
        page = await customer.get(f"{endpoint}/setup")
    assert "<script>alert" not in page.text
    assert "<img src=x" not in page.text
    assert page.text.count(html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) == 2
    assert "set-cookie: dispatcher=stolen" in page.text
    assert 'href="javascript' not in page.text
    for part in ("Name look-up", "Connect", "First byte", "In all"):
        assert f'data-label="{part}"' in page.text
    [kept] = (await customer.web.ask("GET", f"/api/v1{endpoint}/tests", cookie=customer.cookie)).json["data"]
    assert {"name": f"x-{'a' * 8}", "value": HOSTILE} in kept["response_headers"]
    assert kept["response_body"].startswith(HOSTILE)
    assert (kept["passed"], kept["at_fault"], kept["type"], kept["timing"]["tls"]) == (
        True,
        None,
        "endpoint.test",
        None,
    )
    assert kept["timing"]["total"] > 0


async def test_a_redirect_says_where_to(customer: Browser):
    async with answering(
        lambda _: b"HTTP/1.1 301 M\r\nLocation: https://b.example/<b>\r\ncontent-length: 0\r\n\r\n"
    ) as url:
        endpoint = await draft(customer, url)
        key = await customer.web.key("acct")
        told = (await customer.web.ask("POST", f"/api/v1{endpoint}/test", key=key)).json
    assert (told["passed"], told["at_fault"]) == (False, "redirect")
    assert told["verdict"].endswith("give the final address: https://b.example/<b>")
    page = await customer.get(f"{endpoint}/setup")
    assert "give the final address: https://b.example/&lt;b&gt;" in page.text
    assert "Look at: the address" in page.text


async def test_all_chosen_types_go_one_after_another_until_one_fails(customer: Browser):
    seen: list[bytes] = []

    def answer(body: bytes) -> bytes:
        seen.append(body)
        refused = b'"type":"message.failed"' in body and len(seen) < 4
        return b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % (500 if refused else 204)

    async with answering(answer) as url:
        endpoint = await draft(customer, url, "message.delivered", "message.failed", "message.sent")
        await customer.ok(f"{endpoint}/test-types")
        assert [b'"test":true' in body for body in seen] == [True, True]
        page = await customer.get(f"{endpoint}/setup")
        assert "Passed in this configuration: 1 of 3" in page.text
        assert is_open(page), "one passed test is enough to go live"
        key = await customer.web.key("acct")
        told = (await customer.web.ask("POST", f"/api/v1{endpoint}/test-types", key=key)).json
        assert [one["type"] for one in told["tests"]] == ["message.failed"], "those that have not passed go first"
        assert (told["passed"], told["left"]) == (False, ["message.failed", "message.sent"])
        told = (await customer.web.ask("POST", f"/api/v1{endpoint}/test-types", key=key)).json
        assert (told["passed"], told["left"], len(told["tests"])) == (True, [], 3)
    assert "Passed in this configuration: 3 of 3" in (await customer.get(f"{endpoint}/setup")).text
    assert await customer.web.query("SELECT FROM webhook.outbox") == []
    assert await customer.web.query("SELECT FROM webhook.attempt") == []
    assert await customer.web.query("SELECT FROM webhook.endpoint_stat") == []


async def test_all_chosen_types_stay_within_the_ten_a_minute(customer: Browser, sink: Sink):
    endpoint = await draft(customer, f"{sink.url}/hook")  # every type there is
    sink.set_behaviour("/hook", Behaviour())
    key = await customer.web.key("acct")
    told = (await customer.web.ask("POST", f"/api/v1{endpoint}/test-types", key=key)).json
    assert (len(told["tests"]), told["passed"]) == (trial.TESTS_A_MINUTE, False)
    assert (await customer.web.ask("POST", f"/api/v1{endpoint}/test-types", key=key)).status == 429
    await customer.web.query("UPDATE webhook.test_attempt SET started_at = started_at - interval '1 minute'")
    again = (await customer.web.ask("POST", f"/api/v1{endpoint}/test-types", key=key)).json
    done = {one["type"] for one in told["tests"]} & {one["type"] for one in again["tests"]}
    assert again["passed"]
    assert again["left"] == []
    assert len(done) < len(again["tests"])


async def test_types_without_samples_can_not_be_tested_so(customer: Browser):
    endpoint = await draft(customer, "https://receiver.test/hook")
    await customer.web.query("UPDATE webhook.event_type SET sample = NULL")
    assert (await customer.post(f"{endpoint}/test-types")).status == 400
    assert (
        "Test all"
        not in (await customer.web.ask("GET", f"{endpoint}/setup", cookie=customer.cookie, headers=HTML)).text
    )


async def test_receivers_that_say_nothing_keep_nobody_else_from_long_work(customer: Browser, sink: Sink):
    """Two tests under way had both connections for what takes long, of every account and of the operators."""
    sink.set_behaviour("/hook", Behaviour(mode="hang"))
    endpoint = await draft(customer, f"{sink.url}/hook")
    tests = [asyncio.create_task(customer.post(f"{endpoint}/test")) for _ in range(TRIALS_OF_ACCOUNT_MAX)]
    try:
        await until(lambda: sum(customer.web.web.trials._of.values()) == TRIALS_OF_ACCOUNT_MAX)
        pool = customer.web.web.pool
        async with pool.connection(long=True), pool.connection(long=True), pool.connection() as db:
            assert await db.fetchval("SELECT 1") == 1
        assert (await customer.post(f"{endpoint}/test")).status == 503, "one more of this account"
        await sink.stop()
        assert {(await made).status for made in tests} == {303}
    finally:
        for made in tests:
            made.cancel()
    assert not customer.web.web.trials._of
