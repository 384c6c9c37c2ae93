"""Words and bytes from people who mean harm: in every field that a customer, a producer or a receiver fills, and on the wire."""

import asyncio
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.store import access, alerts, receivers, runs
from dispatcher.web import panel
from tests.conftest import connected
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_panel import HTML

MARK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}${7*7}"
PATHS = [route.path for route in panel.ROUTES if route.method == "GET" and not route.path.endswith("/live")]


async def hostile_things(site: Site) -> dict[str, Any]:
    """Make one of everything, with the mark wherever the database takes it."""
    async with connected(site.dsn) as db:
        endpoint = await people.endpoint(
            db, MARK, name=MARK, state_reason=MARK, failing_since=await db.fetchval("SELECT now() - interval '1 day'")
        )
        ids = await people.emit(db, 4, MARK)
        await db.execute(
            "UPDATE webhook.outbox SET payload = json_build_object('text', $1::text, 'reference', $1::text)", MARK
        )
        await people.attempted(db, endpoint, ids[:2], fault="status")
        await people.retrying(db, endpoint, ids[2:3])
        [letter] = await people.died(db, endpoint, ids[3:], reason=MARK)
        await db.execute(
            "UPDATE webhook.attempt SET response_head = convert_to('HTTP/1.1 500 ' || $1 || E'\r\nx-said: ' || $1, 'UTF8')",
            MARK,
        )
        await db.execute("UPDATE webhook.retry SET reason = $1", MARK)
        run = await runs.resend(db, str(ids[0]), endpoint, note=MARK)
        await access.create_key(db, OPERATOR, account_id=MARK, name=MARK)
        await access.begin_change(db, Principal(MARK, MARK), MARK, MARK, MARK)
        await alerts.add_recipient(db, OPERATOR, account_id=MARK, address="it@example.com")
        await db.execute("SELECT webhook.tell_of_endpoint($1, 'endpoint.failing', $2, now())", endpoint, MARK)
        receiver = await receivers.create(db, OPERATOR, MARK)
        await receivers.keep(
            db, receiver.id, [("x-said", MARK)], MARK.encode(), signature="unknown", endpoint_id=None, status=200
        )
        await db.execute(
            "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, status, verdict, request, response_head, response_body) "
            "VALUES ($1, '', 1, 500, $2::text, convert_to($2, 'UTF8'), convert_to('HTTP/1.1 500 ' || $2, 'UTF8'), convert_to($2, 'UTF8'))",
            endpoint, MARK,
        )  # fmt: skip
        await db.execute("UPDATE webhook.event_type SET title = $1, description = $1 WHERE name = 'message.sent'", MARK)
    return {
        "endpoint_id": endpoint, "event": ids[0], "event_id": ids[0], "letter_id": letter, "run_id": run.id, "receiver_id": receiver.id,
        "name": "message.sent",
    }  # fmt: skip


class Tags(HTMLParser):
    """What of a page a browser would run: `unsafe` are scripts and styles of its own, handlers, and addresses that are scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.unsafe: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "style" or (tag == "script" and not (given.get("src") or "").startswith("/static/")):
            self.unsafe.append(tag)
        if tag == "img" and not (given.get("src") or "").startswith("/static/"):
            self.unsafe.append(f"img {given}")
        for name, value in attrs:
            if (
                name.startswith("on")
                or name == "style"
                or (value or "").strip().lower().startswith(("javascript:", "data:text"))
            ):
                self.unsafe.append(f"{tag} {name}={value}")


async def test_no_page_runs_what_stands_in_a_row(web: Site):
    things = await hostile_things(web)
    shown = 0
    for account_id in (MARK, None):
        key = await web.key(account_id)
        for path in PATHS:
            page = await web.ask(
                "GET", re.sub(r"\{(\w+)[^/]*\}", lambda found: str(things[found[1]]), path), key=key, headers=HTML
            )
            if page.status == 403 and account_id is not None:
                continue  # an operators' page
            assert page.status == 200, f"{path}: {page.status}"
            tags = Tags(page.text)
            assert not tags.unsafe, f"{path} has {tags.unsafe}"
            assert "alert(1)&gt;49" not in page.text, f"{path} works out what it is to show"
            shown += "&lt;script&gt;alert" in page.text
    assert shown >= len(PATHS) / 2, "or this would pass on pages that show nothing"


async def send_raw(web: Site, data: bytes) -> bytes:
    """Send bytes as they are; return all that comes until the server hangs up, or has been quiet for a second after an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", web.server.port)
    try:
        writer.write(data)
        answer = b""
        async with asyncio.timeout(30):
            while True:
                try:
                    async with asyncio.timeout(1 if answer else 20):
                        part = await reader.read(65536)
                except TimeoutError:
                    return answer
                if not part:
                    return answer
                answer += part
    except ConnectionResetError:
        return answer
    finally:
        writer.close()


SMUGGLED = b"GET /api/v1/me HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nkey=",
        b"Content-Length: +4\r\n\r\nkey=",
        b"Content-Length: 4, 4\r\n\r\nkey=",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x4\r\nkey=\r\n0\r\n\r\n",
        b"X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_a_request_that_two_parsers_would_read_differently_is_refused(
    web: Site, head: bytes, caplog: pytest.LogCaptureFixture
):
    answer = await send_raw(web, b"POST /login HTTP/1.1\r\nHost: x\r\n" + head + SMUGGLED)
    assert re.match(rb"HTTP/1.[01] 400 ", answer), answer[:200]
    assert answer.count(b"HTTP/1.") == 1, "what stood behind it was taken for a request"
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "anybody could fill the log"


@pytest.mark.parametrize(
    ("request_head", "body", "status"),
    [
        (b"POST /login HTTP/1.1\r\nOrigin: http://[\r\nContent-Length: 0", b"", 403),
        (b"POST /login HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 1", b"x", 415),
        (b"POST /login HTTP/1.1\r\nTransfer-Encoding: chunked", b"4\r\nkey=\r\nzz\r\n", 400),
        (b"POST /r/nobody HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 1", b"x", 404),
    ],
)
async def test_what_no_client_means_is_its_own_fault(
    web: Site, request_head: bytes, body: bytes, status: int, caplog: pytest.LogCaptureFixture
):
    """Not ours: a 500 each, with a trace, would wake somebody."""
    answer = await send_raw(web, request_head + b"\r\nHost: x\r\nConnection: close\r\n\r\n" + body)
    assert re.match(rb"HTTP/1.[01] %d " % status, answer), answer[:300]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_heads_are_bounded(web: Site):
    for head in (b"X-A: " + b"a" * 20_000, b"\r\n".join(b"X-%d: a" % n for n in range(20_000))):
        answer = await send_raw(web, b"GET /login HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert answer == b"" or re.match(rb"HTTP/1.[01] 4", answer), answer[:200]
    answer = await send_raw(web, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert re.match(rb"HTTP/1.[01] 4", answer), answer[:200]
    assert (await web.ask("GET", "/login")).status == 200


@pytest.mark.parametrize(
    "path",
    ["/static/../../settings.py", "/static/a/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/static/a/..%2f..%2fetc%2fpasswd",
     "/static/a//etc/passwd", "/static/a/%00", "//etc/passwd", "/..%5c..%5cetc", "/%2e%2e/schema.sql"],
)  # fmt: skip
async def test_no_path_leads_to_a_file(web: Site, path: str):
    answer = await send_raw(web, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.[01] (303|400|403|404) ", answer), answer[:200]
    assert b"root:" not in answer
    assert b"CREATE TABLE" not in answer


@pytest.mark.parametrize(
    "value", ["'; DROP TABLE webhook.endpoint; --", "1) OR (1=1", "%' OR '%'='", "\\'; SELECT pg_sleep(9)", "a\u2028b"]
)
async def test_no_filter_is_sql(web: Site, value: str):
    key = await web.key("acct")
    async with connected(web.dsn) as db:
        await people.endpoint(db, "others", name="theirs")
    for path, name in (
        ("/endpoints", "state"), ("/endpoints", "account_id"), ("/endpoints", "cursor"), ("/deliveries", "state"), ("/deliveries", "type"),
        ("/events", "type"), ("/events", "text"), ("/runs", "state"), ("/dead-letters", "fault"), ("/dead-letters", "reason"),
    ):  # fmt: skip
        answer = await web.ask("GET", f"/api/v1{path}", key=key, headers={})
        assert answer.status == 200
        async with web.http.get(
            f"{web.url}/api/v1{path}", params={name: value}, headers={"Authorization": f"Bearer {key}"}
        ) as got:
            assert got.status in (200, 400, 403), f"{path}?{name}: {got.status}"
            assert "theirs" not in await got.text()
    assert await web.query("SELECT count(*) FROM webhook.endpoint") == [(1,)]
