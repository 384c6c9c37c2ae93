"""Deliveries and events as people look for them, and one delivery with its attempts, its request made again, and a resend."""

import asyncio
import html
import json
import re
import shlex
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.domain.principal import OPERATOR
from dispatcher.store import erasure, search
from dispatcher.web.panel import deliveries as deliveries_page
from dispatcher.web.panel import events as events_page
from dispatcher.web.panel.rerender import SHOWN_BYTES_MAX
from tests.conftest import connected
from tests.rig import rig, until
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_panel import HTML, Browser


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


async def data(browser: Browser, path: str) -> Any:
    sep = "&" if "?" in path else "?"
    answer = await browser.web.ask("GET", f"{path}{sep}format=json", cookie=browser.cookie)
    assert answer.status == 200, answer.text
    return answer.json


# ── finding them ──


async def test_deliveries_are_found_by_each_filter(customer: Browser):
    async with connected(customer.web.dsn) as db:
        first, second = await people.endpoint(db, name="<First>"), await people.endpoint(db, name="Second")
        old = await people.emit(db, 2, at=await db.fetchval("SELECT '2026-01-01T00:00:00Z'::timestamptz"))
        ids = await people.emit(db, 3, type="link.clicked")
        await people.attempted(db, first, [*old, *ids[:1]])
        await people.retrying(db, first, ids[1:2])
        await people.died(db, first, ids[2:], fault="timeout")
        public = (await search.events(db, OPERATOR, limit=1)).rows[0]["public_id"]

    async def found(query: str) -> list[tuple[int, int]]:
        page = await data(customer, f"/deliveries?{query}")
        assert page["searched"]["complete"]
        return [(row["event_id"], row["endpoint_id"]) for row in page["data"]]

    of_first = [(event, first) for event in (*old, *ids)][::-1]
    assert len(await found("")) == 10
    assert await found(f"endpoint_id={first}") == of_first
    assert await found(f"endpoint_id={first}&type=link.*") == of_first[:3]
    assert await found("state=dead") == [(ids[2], first)]
    assert await found(f"endpoint_id={first}&state=retrying&type=message.*") == []
    assert await found("status=2") == [of_first[2], *of_first[3:]]
    assert await found(f"endpoint_id={first}&until=2026-01-01T00:01") == of_first[3:]
    assert await found(f"since=2026-01-01T00:01&endpoint_id={first}") == of_first[:3]
    assert await found(f"event={ids[0]}") == [(ids[0], second), (ids[0], first)]
    assert await found(f"event={public}") == [(ids[2], second), (ids[2], first)]
    assert await found(f"event={public}&state=waiting") == [(ids[2], second)]
    assert await found("reference=%22secret%22%20:%203") == [(ids[2], second), (ids[2], first)]
    page = (await customer.get(f"/deliveries?endpoint_id={first}&state=dead&type=link.*")).text
    for said in ("&lt;First&gt;", "given up", 'value="link.*"', "timeout", f'href="/deliveries/{ids[2]}/{first}"'):
        assert said in page, said


async def test_a_walk_over_deliveries_ends_at_its_bound_whatever_matches(
    customer: Browser, monkeypatch: pytest.MonkeyPatch
):
    """Also where nothing matches: what bounds it is what is looked at."""
    monkeypatch.setattr(search, "LOOKED_AT", 7)
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        wanted = await people.emit(db, 1, type="link.clicked")
        await people.emit(db, 20)
    for query in ("type=link.*", f"type=link.*&endpoint_id={endpoint}"):
        found, pages, path = [], 0, f"/deliveries?{query}"
        while path:
            page = await data(customer, path)
            assert page["searched"]["events"] <= 7
            found += [row["event_id"] for row in page["data"]]
            pages += 1
            path = f"/deliveries?{query}&cursor={page['next']}" if page["next"] else ""
        assert (found, pages) == (wanted, 4), "21 events by 7, and a look that finds no more"
    text = (await customer.get("/deliveries?type=link.*")).text
    assert "None among the events looked at so far" in text
    assert "type=link.%2A&amp;cursor=" in text, "the next page keeps the filters"
    assert "Looked at 7 events, back to" in text


async def test_a_page_that_a_first_look_does_not_fill_looks_on(customer: Browser):
    """It looks at twice as many events as it has rows, most often enough, and only then at all that it may."""
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        wanted = await people.emit(db, 3, type="link.clicked")
        newest = await people.emit(db, 150)
    for path, rows in (("/deliveries", 30), (f"/deliveries?endpoint_id={endpoint}", 30), ("/events", 50)):
        page = await data(customer, path)
        ids = [row.get("event_id") or row["id"] for row in page["data"]]
        assert ids == newest[::-1][:rows]
        assert page["searched"]["events"] == rows
        rare = await data(customer, f"{path}{'&' if '?' in path else '?'}type=link.*")
        assert [row.get("event_id") or row["id"] for row in rare["data"]] == wanted[::-1]
        assert (rare["searched"]["events"], rare["searched"]["complete"], rare["next"]) == (153, True, None)


async def test_a_page_looks_at_a_bounded_number_of_pairs(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "PAIRS_MAX", 10)
    async with connected(customer.web.dsn) as db:
        for _ in range(4):
            await people.endpoint(db)
        await people.emit(db, 5)
    found, cursor, looked_at = [], "", []
    while True:
        page = await data(customer, f"/deliveries?{cursor}")
        found += [(row["event_id"], row["endpoint_id"]) for row in page["data"]]
        looked_at.append(page["searched"]["events"])
        if page["next"] is None:
            break
        cursor = f"cursor={page['next']}"
    assert len(set(found)) == len(found) == 20
    assert looked_at == [2, 2, 1]


async def test_an_event_of_a_large_account_is_told_page_by_page(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "PAIRS_MAX", 4)
    monkeypatch.setattr(events_page, "ENDPOINTS_MAX", 4)
    async with connected(customer.web.dsn) as db:
        [old] = await people.emit(db)
        endpoints = [await people.endpoint(db, name=f"number {n}") for n in range(10)]
        others = await people.endpoint(db, event_types=["link.*"])
        [event] = await people.emit(db)
        await people.attempted(db, endpoints[3], [event])
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", endpoints[3])
    told, not_for, pages, path = [], [], 0, f"/events/{event}"
    while path:
        part = (await data(customer, path))["event"]
        told += [one["endpoint_id"] for one in part["deliveries"]]
        not_for += [one["endpoint_id"] for one in part["not_for"]]
        pages += 1
        path = f"/events/{event}?cursor={part['next']}" if part["next"] else ""
    assert (told, not_for, pages) == (endpoints, [others], 3)
    page = (await customer.get(f"/events/{event}")).text
    assert "More of the account's endpoints" in page
    found, path = [], "/deliveries?"
    while path:
        part = await data(customer, path)
        found += [(row["event_id"], row["endpoint_id"]) for row in part["data"]]
        path = f"/deliveries?cursor={part['next']}" if part["next"] else ""
    assert found == [(event, one) for one in endpoints[::-1]] + [
        (old, one) for one in endpoints[::-1] if one != endpoints[3]
    ]
    shown = await customer.web.ask("GET", f"/api/v1/events/{event}?limit=3", cookie=customer.cookie)
    assert (len(shown.json["deliveries"]), shown.json["next"]) == (3, str(endpoints[2]))


ODD = {
    "/deliveries": ("since=yesterday", "endpoint_id=x", "state=odd", "status=x", "status=0", "event=evt_1", "cursor=x", "type=No"),
    "/events": ("since=yesterday", "until=x", "event=evt_1", "cursor=x", "type=No"),
    "/dead-letters": ("endpoint_id=x", "state=odd", "cursor=x", "type=No"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "query"), [(path, query) for path, queries in ODD.items() for query in queries])
async def test_what_can_not_be_looked_for_is_said_beside_the_form(customer: Browser, path: str, query: str):
    page = await customer.get(f"{path}?{query}")
    assert page.status == 400
    assert 'role="alert"' in page.text
    assert "<button>Show</button>" in page.text
    refused = await customer.web.ask("GET", f"{path}?{query}&format=json", cookie=customer.cookie)
    assert (refused.status, refused.headers["Content-Type"]) == (400, "application/problem+json")


async def test_empty_lists_say_what_to_do(customer: Browser):
    assert "No deliveries yet" in (await customer.get("/deliveries")).text
    assert "No events yet" in (await customer.get("/events")).text
    assert "Nothing kept fits these filters" in (await customer.get("/deliveries?type=link.*")).text
    assert (await customer.get("/events?event=17")).status == 404
    assert 'role="alert"' in (await customer.get("/events?event=17")).text


async def test_an_event_is_found_by_its_id_and_tells_of_each_endpoint(customer: Browser):
    async with connected(customer.web.dsn) as db:
        good = await people.endpoint(db, name="Good")
        paused = await people.endpoint(db, name="Paused", state="paused")
        await people.endpoint(db, name="<Links>", event_types=["link.*"])
        [event] = await people.emit(db)
        await people.attempted(db, good, [event])
        public = (await search.events(db, OPERATOR)).rows[0]["public_id"]
    answer = await customer.get(f"/events?event={public}")
    assert (answer.status, answer.headers["Location"]) == (303, f"/events/{event}")
    page = (await customer.get(f"/events/{public}")).text
    for said in (
        "delivered", "held: the endpoint is paused", "&lt;Links&gt;", "it doesn&#39;t subscribe to message.sent",
        f'href="/deliveries/{event}/{paused}"', "&#34;secret&#34;",
    ):  # fmt: skip
        assert said in page, said
    shown = (await data(customer, f"/events/{event}"))["event"]
    assert [(one["endpoint_id"], one["attempts"]) for one in shown["deliveries"]] == [(good, 1), (paused, 0)]


# ── one delivery ──


async def test_a_delivery_says_what_happened_and_what_it_means(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, name="Shop", url="https://receiver.test/hook")
        [event] = await people.emit(db)
        await people.retrying(db, endpoint, [event])
    page = (await customer.get(f"/deliveries/{event}/{endpoint}")).text
    for said in (
        "waiting for attempt 2, due", "500: the receiver failed; its logs will say why", "HTTP/1.1 500 said", "Next attempt",
        "Made again now", "webhook-id: evt_", "data&#34;:{&#34;secret&#34; : 1}",
    ):  # fmt: skip
        assert said in page, said
    shown = await data(customer, f"/deliveries/{event}/{endpoint}")
    assert shown["delivery"]["attempts"][0]["status"] == 500
    assert shown["next_attempt_at"] is not None
    assert (await customer.get(f"/deliveries/{event}/999")).status == 404
    assert (await customer.get(f"/deliveries/999/{endpoint}")).status == 404


@pytest.fixture
async def raw_receiver() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A receiver that keeps the very bytes, and answers 204."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head)
        assert size is not None
        got.append(head + await reader.readexactly(int(size[1])))
        writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", got
    server.close()


async def test_the_request_made_again_is_the_one_that_was_sent(
    customer: Browser, raw_receiver: tuple[str, list[bytes]]
):
    url, got = raw_receiver
    credentials = json.dumps({"headers": {"x-token": "s3cret-value"}, "basic": "user:s3cret-pass"})
    payload = '{"it\'s": "a \\"quote\\", $(x) `y` \\\\ é <b>"}'
    async with rig(customer.web.dsn) as r:
        endpoint = await r.endpoint(url=f"{url}/a?b=c", credentials=credentials)
        [event] = await r.emit(payload=payload)
        await until(lambda: r.db.fetchval("SELECT count(*) = 1 FROM webhook.attempt"))
    shown = await data(customer, f"/deliveries/{event}/{endpoint}")
    [sent] = got
    timestamp = re.search(rb"webhook-timestamp: (\d+)", sent)
    assert timestamp is not None
    expected = re.sub(r"(authorization|x-token): .*", r"\1: (hidden)", sent.decode().replace("\r\n", "\n"))
    again = shown["request"]
    # The attempt's time is kept to the microsecond and begins a moment before the request is made, which may be a second earlier.
    if f"webhook-timestamp: {timestamp[1].decode()}" not in again:
        expected, again = (re.sub(r"webhook-(timestamp|signature): .*", "", text) for text in (expected, again))
    assert again == expected
    everything = json.dumps(shown) + (await customer.get(f"/deliveries/{event}/{endpoint}")).text
    assert "s3cret" not in everything
    # As a command it is what a shell would send, without what is secret.
    words = shlex.split(shown["curl"].replace(" \\\n", " "))
    assert words[:3] == ["curl", "-i", f"{url}/a?b=c"]
    assert words[-1].encode() == sent.partition(b"\r\n\r\n")[2]
    assert {"x-token: (hidden)", "authorization: (hidden)", "webhook-signature: (hidden)"} <= set(words)
    echoed = subprocess.run(
        ["sh", "-c", shown["curl"].replace("curl", "printf '%s\\n'", 1)], capture_output=True, text=True, check=True
    )
    assert echoed.stdout.splitlines() == words[1:]


async def test_a_long_body_is_cut_and_curl_reads_a_file(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        await db.execute(
            "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', $1)",
            json.dumps({"text": "é" * 60_000}, ensure_ascii=False),
        )
    shown = await data(customer, f"/deliveries/1/{endpoint}")
    assert shown["request_is_cut"]
    assert len(shown["request"].encode()) < SHOWN_BYTES_MAX + 2_000
    assert shown["curl"].endswith("--data-binary @body.json")


async def test_what_is_erased_or_deleted_is_not_made_again(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint, gone = await people.endpoint(db), await people.endpoint(db)
        [event] = await people.emit(db)
        await people.died(db, endpoint, [event])
        await people.attempted(db, gone, [event], fault="status")
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
        shown = await data(customer, f"/deliveries/{event}/{gone}")
        assert "deleted" in shown["no_request"]
        assert "Send it again" not in (await customer.get(f"/deliveries/{event}/{gone}")).text
        await erasure.erase_event(db, await erasure.look_at_event(db, str(event)))
    shown = await data(customer, f"/deliveries/{event}/{endpoint}")
    assert shown["request"] is shown["curl"] is None
    assert "erased" in shown["no_request"]
    page = (await customer.get(f"/deliveries/{event}/{endpoint}")).text
    assert "secret&#34;" not in page
    assert "HTTP/1.1 500 said" not in page
    assert "Nothing has kept it" in (await customer.get(f"/events/{event}")).text


async def test_a_url_that_may_not_be_used_any_more_is_said(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, url="http://10.1.2.3/hook")
        [event] = await people.emit(db)
    shown = await data(customer, f"/deliveries/{event}/{endpoint}")
    assert shown["request"] is None
    assert "10.1.2.3" in shown["no_request"]


async def test_sending_it_again_is_a_run_of_its_own(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        [event] = await people.emit(db)
        await people.attempted(db, endpoint, [event])
    at = f"/deliveries/{event}/{endpoint}"
    assert await customer.ok(f"{at}/resend", [("note", "asked for it")]) == at
    [run] = await customer.web.query("SELECT id, after_id, upto_id, note FROM webhook.run")
    assert tuple(run)[1:] == (event - 1, event, "asked for it")
    page = html.unescape((await customer.get(at)).text)
    assert f"resend (run {run['id']})" in page
    assert "as asked" not in page
    [row] = await customer.web.query("SELECT action, subject FROM webhook.audit WHERE action = 'delivery.resend'")
    assert f"run_id={run['id']}" in row["subject"]


async def test_a_delivery_is_followed_live(customer: Browser, monkeypatch: pytest.MonkeyPatch):
    """Who opens it is told at once how it stands, also who joins others: what happened between page and stream is not missed."""
    monkeypatch.setattr(deliveries_page, "LIVE_EVERY_S", 0.05)

    async def told(response: Any) -> dict[str, Any]:
        while not (line := await response.content.readline()).startswith(b"data:"):
            pass
        return dict(json.loads(line.removeprefix(b"data:")))

    async with connected(customer.web.dsn) as db, asyncio.timeout(20):
        endpoint = await people.endpoint(db)
        [event] = await people.emit(db)
        at, headers = f"{customer.web.url}/deliveries/{event}/{endpoint}/live", {"Cookie": customer.cookie}
        first = await customer.web.http.get(at, headers=headers)
        assert (await told(first))["attempts"] == []
        await people.attempted(db, endpoint, [event], fault="status")
        seen = await told(first)
        assert [one["number"] for one in seen["attempts"]] == [1]
        assert seen["attempts"][0]["verdict"]
        second = await customer.web.http.get(at, headers=headers)
        assert await told(second) == seen
        await people.attempted(db, endpoint, [event], number=2)
        for response in (first, second):
            seen = await told(response)
            assert (seen["fate"], seen["tone"]) == ("delivered", "good")
            assert [one["fate"] for one in seen["runs"]] == ["delivered"]
            response.close()


async def test_pages_say_all_without_color_alone_and_load_nothing_from_elsewhere(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        [event] = await people.emit(db)
        await people.attempted(db, endpoint, [event])
    for path in (
        "/deliveries",
        f"/deliveries/{event}/{endpoint}",
        "/events",
        f"/events/{event}",
        "/recover",
        "/dead-letters",
    ):
        page = (await customer.web.ask("GET", path, cookie=customer.cookie, headers=HTML)).text
        assert page.count("<h1") == 1, path
        assert "style=" not in page, path
        assert not re.search(r'(?:src|href)="https?://(?!127\.0\.0\.1|receiver\.test)', page), path
        labelled = set(re.findall(r'<label for="([^"]+)"', page))
        fields = set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"', page))
        assert fields == labelled, path
