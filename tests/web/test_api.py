"""The API as a program uses it: an endpoint's life on a real receiver, events byte by byte, searches, recovery."""

import asyncio
import json
from typing import Any
from urllib.parse import quote, urlencode

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies as st

from dispatcher.sink import Behaviour, Sink
from dispatcher.store import event_types, runs, search
from dispatcher.web.api import OPERATIONS
from dispatcher.web.api.models.base import Paged
from tests.conftest import connected
from tests.rig import until
from tests.store import people
from tests.web.conftest import Answer, Site, site

API = "/api/v1"


class Client:
    def __init__(self, site: Site, key: str) -> None:
        self.site = site
        self.key = key

    async def __call__(self, method: str, path: str, json: Any = None, **more: Any) -> Answer:
        return await self.site.ask(method, API + path, key=self.key, json=json, **more)

    async def ok(self, method: str, path: str, json: Any = None, **more: Any) -> Any:
        answer = await self(method, path, json, **more)
        assert answer.status < 300, f"{method} {path}: {answer.status} {answer.text}"
        return answer.json

    async def refused(self, status: int, method: str, path: str, json: Any = None, **more: Any) -> Any:
        answer = await self(method, path, json, **more)
        assert answer.status == status, f"{method} {path}: {answer.status} {answer.text}"
        assert answer.json["status"] == status
        return answer.json


@pytest.fixture
async def operator(web: Site) -> Client:
    return Client(web, await web.key())


@pytest.fixture
async def customer(web: Site) -> Client:
    return Client(web, await web.key("acct"))


@pytest.fixture
async def sink() -> Any:
    made = Sink()
    await made.start()
    yield made
    await made.stop()


# ── endpoints ──


@pytest.mark.parametrize(
    ("kept", "again"),
    [
        ({"bearer": "s3cret"}, {"bearer": "other"}),
        ({"basic": "user:s3cret"}, {"basic": None}),
        ({"headers": {"X-Api-Key": "s3cret"}}, {"headers": {"x-api-key": None}}),
    ],
)
async def test_credentials_do_not_follow_to_another_server(
    customer: Client, operator: Client, kept: dict[str, Any], again: dict[str, Any]
):
    """Nobody is shown them again; whoever may edit could have them sent to a server of their own."""
    made = await customer.ok("POST", "/endpoints", {"url": "https://a.example/hook"} | kept)
    path = f"/endpoints/{made['id']}"
    refused = await customer.refused(400, "PATCH", path, {"url": "https://b.example/hook"})
    assert refused["field"] == "url"
    assert "s3cret" not in refused["detail"]
    await customer.ok("PATCH", path, {"url": "https://a.example/other"})
    assert (await customer.ok("PATCH", path, {"url": "https://b.example/hook"} | again))[
        "url"
    ] == "https://b.example/hook"
    theirs = await customer.ok("POST", "/endpoints", {"url": "https://a.example/hook"} | kept)
    await operator.ok("PATCH", f"/endpoints/{theirs['id']}", {"url": "https://b.example/hook"})


async def test_create_test_go_live_edit_and_delete(customer: Client, sink: Sink):
    made = await customer.ok(
        "POST", "/endpoints", {"url": f"{sink.url}/hook", "name": "Mine", "event_types": ["message.*"]}
    )
    assert (made["state"], made["account_id"], made["tested"]) == ("draft", "acct", False)
    assert made["secret"].startswith("whsec_")
    path = f"/endpoints/{made['id']}"
    assert "has not passed a test" in (await customer.refused(409, "POST", f"{path}/go-live"))["detail"]

    sink.set_behaviour("/hook", Behaviour(status=500))
    failed = await customer.ok("POST", f"{path}/test")
    assert (failed["passed"], failed["status"]) == (False, 500)
    assert "500" in failed["verdict"]
    await customer.refused(409, "POST", f"{path}/go-live")

    sink.set_behaviour("/hook", Behaviour())
    passed = await customer.ok("POST", f"{path}/test")
    assert (passed["passed"], passed["status"]) == (True, 204)
    assert passed["request"].startswith("POST /hook HTTP/1.1\r\n")
    assert (await customer.ok("POST", f"{path}/go-live"))["state"] == "live"
    assert [one["passed"] for one in (await customer.ok("GET", f"{path}/tests"))["data"]] == [True, False]

    edited = await customer.ok("PATCH", path, {"timeout_ms": 5_000})
    assert (edited["timeout_ms"], edited["proposed"]["timeout_ms"], edited["tested"]) == (10_000, 5_000, False)
    await customer.ok("POST", f"{path}/test")
    assert (await customer.ok("POST", f"{path}/go-live"))["timeout_ms"] == 5_000

    assert (await customer.ok("POST", f"{path}/pause"))["state"] == "paused"
    assert (await customer.ok("POST", f"{path}/resume", {"choice": "send"}))["state"] == "live"
    assert (await customer.ok("DELETE", path)) == {"id": made["id"], "discarded": 0}
    await customer.refused(404, "GET", path)


async def test_an_account_has_a_bounded_number_of_endpoints(dsn: str):
    async with site(dsn, endpoints_per_account_max=2) as web:
        customer, operator = Client(web, await web.key("acct")), Client(web, await web.key())
        url = {"url": "https://receiver.test/hook"}
        made = await asyncio.gather(
            *(web.ask("POST", "/api/v1/endpoints", key=customer.key, json=url) for _ in range(5))
        )
        assert sorted(answer.status for answer in made) == [201, 201, 409, 409, 409], "at once, too"
        assert "the most it may have" in (await customer.refused(409, "POST", "/endpoints", url))["detail"]
        await operator.ok("POST", "/endpoints", url | {"account_id": "acct"})
        ids = [row["id"] for row in (await customer.ok("GET", "/endpoints"))["data"]]
        for endpoint_id in ids[:2]:
            await customer.ok("DELETE", f"/endpoints/{endpoint_id}")
        await customer.ok("POST", "/endpoints", url)


async def test_an_account_replays_at_the_usual_rate_at_most(customer: Client, operator: Client, web: Site):
    async with connected(web.dsn) as db:
        endpoint = await people.endpoint(db)
        [event] = await people.emit(db)
        [letter] = await people.died(db, endpoint, await people.emit(db))
    start = f"/endpoints/{endpoint}/replays"
    body = {"only_failed": False, "after_id": 0, "upto_id": event}
    for given in ({"unlimited": True}, {"rate_per_s": 201}):
        assert "at most 200 deliveries a second" in (await customer.refused(400, "POST", start, body | given))["detail"]
        await customer.refused(400, "POST", "/dead-letters/resend", {"ids": [letter]} | given)
    run = await customer.ok("POST", start, body | {"rate_per_s": 200})
    for rate in (None, 201):
        await customer.refused(400, "PATCH", f"/runs/{run['id']}", {"rate_per_s": rate})
    assert (await operator.ok("PATCH", f"/runs/{run['id']}", {"rate_per_s": None}))["rate_per_s"] is None


async def test_runs_that_are_open_are_bounded(customer: Client, web: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "UNFINISHED_MAX", 2)
    async with connected(web.dsn) as db:
        endpoint, other = await people.endpoint(db), await people.endpoint(db)
        [event] = await people.emit(db)
    resend = f"/events/{event}/deliveries/%d/resend"
    made = [await customer.ok("POST", resend % endpoint) for _ in range(2)]
    assert "and 2 is the most" in (await customer.refused(409, "POST", resend % endpoint))["detail"]
    await customer.ok("POST", resend % other)
    await web.query("UPDATE webhook.run_progress SET finished_at = now() WHERE run_id = $1", made[0]["id"])
    await customer.ok("POST", resend % endpoint)


async def test_tests_are_at_most_ten_a_minute(customer: Client, web: Site):
    made = await customer.ok("POST", "/endpoints", {"url": "https://receiver.test/hook"})
    await web.query(
        "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, verdict, request) "
        "SELECT $1, '', 1, '', '' FROM generate_series(1, 10)",
        made["id"],
    )
    answer = await customer("POST", f"/endpoints/{made['id']}/test")
    assert (answer.status, answer.headers["Retry-After"]) == (429, "60")


async def test_only_operators_go_around_the_test(customer: Client, operator: Client):
    await customer.refused(403, "POST", "/endpoints", {"url": "https://receiver.test/", "live": True})
    made = await customer.ok("POST", "/endpoints", {"url": "https://receiver.test/"})
    path = f"/endpoints/{made['id']}"
    await customer.refused(403, "POST", f"{path}/go-live", {"force": True})
    await customer.refused(403, "PATCH", path, {"live": True})
    await customer.refused(403, "POST", f"{path}/disable")
    assert (await operator.ok("POST", f"{path}/go-live", {"force": True}))["state_reason"] == "forced without a test"


async def test_secrets_are_revealed_rotated_and_hidden(customer: Client):
    made = await customer.ok(
        "POST", "/endpoints", {"url": "https://receiver.test/", "bearer": "t0ken", "headers": {"x-a": "b"}}
    )
    path = f"/endpoints/{made['id']}"
    shown = await customer("GET", path)
    assert (shown.json["bearer"], shown.json["headers"]) == ("(hidden)", {"x-a": "(hidden)"})
    assert made["secret"] not in shown.text
    rotated = await customer.ok("POST", f"{path}/rotate-secret", {"overlap_s": 60})
    assert [one["secret"] for one in rotated["secrets"]][1] == made["secret"]
    assert (await customer.ok("POST", f"{path}/reveal-secrets"))["secrets"] == rotated["secrets"]
    changes = (await customer.ok("GET", "/audit"))["data"]
    assert [one["action"] for one in changes] == [
        "endpoint.reveal_secrets",
        "endpoint.rotate_secret",
        "endpoint.create",
    ]


async def test_each_edit_s_own_key_of_the_extra_signature_is_revealed(customer: Client, operator: Client):
    made = await customer.ok("POST", "/endpoints", {"url": "https://receiver.test/", "extra_signature": "hex:x-sig"})
    path = f"/endpoints/{made['id']}"
    await operator.ok("POST", f"{path}/go-live", {"force": True})

    async def keys() -> tuple[str | None, str | None]:
        shown = await customer.ok("POST", f"{path}/reveal-secrets")
        return shown["extra_signature_key"], shown["proposed_extra_signature_key"]

    first, none = await keys()
    assert (len(str(first)), none) == (64, None)
    await customer.ok("PATCH", path, {"name": "another"})
    assert await keys() == (first, None), "an edit that keeps it has none of its own"
    await customer.ok("PATCH", path, {"extra_signature_key": "a key of mine"})
    assert await keys() == (first, "a key of mine"), "what is in force signs until the edit is live"
    await operator.ok("POST", f"{path}/go-live", {"force": True})
    assert await keys() == ("a key of mine", None)


async def test_who_paused_it_is_on_record(customer: Client, operator: Client):
    made = await customer.ok("POST", "/endpoints", {"url": "https://receiver.test/"})
    path = f"/endpoints/{made['id']}"
    await operator.ok("POST", f"{path}/go-live", {"force": True})
    for who, reason in ((customer, "by its account"), (operator, "by operator")):
        assert (await who.ok("POST", f"{path}/pause"))["state_reason"] == reason
        await who.ok("POST", f"{path}/resume")


async def test_an_endpoint_that_can_have_no_more_runs_does_not_stop_the_others(
    customer: Client, web: Site, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runs, "UNFINISHED_MAX", 1)
    async with connected(web.dsn) as db:
        free, full, gone = await people.endpoint(db), await people.endpoint(db), await people.endpoint(db)
        [event] = await people.emit(db)
        letters = [await people.died(db, one, [event]) for one in (free, full, gone)]
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
    await customer.ok("POST", f"/events/{event}/deliveries/{full}/resend")
    async with connected(web.dsn) as db:
        again = await people.died(db, full, await people.emit(db))
    ids = [letters[0][0], letters[2][0], *again]
    answer = await customer.ok("POST", "/dead-letters/resend", {"ids": ids})
    assert [run["endpoint_id"] for run in answer["data"]] == [free]
    assert [(one["endpoint_id"], one["letters"]) for one in answer["skipped"]] == [(full, 1), (gone, 1)]
    assert "1 is the most" in answer["skipped"][0]["why"]
    refused = await customer.refused(409, "POST", "/dead-letters/resend", {"ids": ids[1:]})
    assert "none of these dead letters can be sent" in refused["detail"]
    async with connected(web.dsn) as db:
        assert [(await people.states(db))[one] for one in ids] == ["resent", "open", "open"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "http://10.0.0.1/"}, "url"), ({"url": "ftp://a.example"}, "url"), ({}, "url"), ({"url": 5}, "url"),
        ({"url": "https://a.example/", "timeout_ms": 5}, "timeout_ms"), ({"url": "https://a.example/", "timeout_ms": "5000"}, "timeout_ms"),
        ({"url": "https://a.example/", "event_types": ["A"]}, "event_types.0"), ({"url": "https://a.example/", "color": "red"}, "color"),
        ({"url": "https://a.example/", "rate_burst": 5}, "rate_burst"), ({"url": "https://a.example/", "name": "a\nb"}, "name"),
    ],
)  # fmt: skip
async def test_a_bad_endpoint_names_the_field(customer: Client, body: dict[str, Any], field: str):
    problem = await customer.refused(400, "POST", "/endpoints", body)
    assert (problem["code"], problem["field"]) == ("bad_input", field)


async def test_statistics(customer: Client, web: Site):
    made = await customer.ok("POST", "/endpoints", {"url": "https://receiver.test/"})
    durations = [0, 90, 0, 0, 0, 10] + [0] * 14
    await web.query(
        "INSERT INTO webhook.endpoint_stat (minute, endpoint_id, epoch, delivered, failed, dead, duration_ms, durations) "
        "SELECT date_trunc('minute', now()) - n * interval '1 min', $1, e, 45, 5, 1, 500, $2 "
        "FROM generate_series(1, 3) AS n, generate_series(1, 2) AS e",
        made["id"], [count // 2 for count in durations],
    )  # fmt: skip
    points = (await customer.ok("GET", f"/endpoints/{made['id']}/stats?step_min=5"))["data"]
    assert sum(point["delivered"] for point in points) == 270
    hour = await web.query("SELECT to_char(now() - interval '1 h', 'YYYY-MM-DD\"T\"HH24:MI:SSZ') AS at")
    points = (await customer.ok("GET", f"/endpoints/{made['id']}/stats?since={hour[0]['at']}"))["data"]
    assert len(points) == 3
    await customer.refused(400, "GET", f"/endpoints/{made['id']}/stats?step_min=1")
    assert {k: points[0][k] for k in ("delivered", "failed", "dead", "success_rate", "mean_ms", "p50_ms", "p95_ms")} == {
        "delivered": 90, "failed": 10, "dead": 2, "success_rate": 0.9, "mean_ms": 10.0, "p50_ms": 2, "p95_ms": 32,
    }  # fmt: skip
    [row] = (await customer.ok("GET", "/endpoints?stats=true"))["data"]
    assert (row["stats_24h"]["delivered"], row["stats_24h"]["p95_ms"]) == (270, 32)
    await customer.refused(
        400, "GET", f"/endpoints/{made['id']}/stats?since=2026-01-01T00:00:00Z&until=2025-01-01T00:00:00Z"
    )


# ── events ──

VERBATIM = '{ "price" : 1.10,\t"big": 12345678901234567890123, "a":1, "a":2, "é": "\\u00e9" }'


async def test_an_events_data_is_kept_byte_by_byte(operator: Client, web: Site):
    body = f'{{"account_id": "acct", "type": "message.sent", "data": {VERBATIM}}}'.encode()
    headers = {"Content-Type": "application/json"}
    one = await operator("POST", "/events", data=body, headers=headers)
    assert one.status == 201, one.text
    many = await operator("POST", "/events/batch", data=b'{"events": [' + body + b"," + body + b"]}", headers=headers)
    assert many.status == 201, many.text
    rows = await web.query("SELECT payload::text AS payload FROM webhook.outbox ORDER BY id")
    assert [row["payload"] for row in rows] == [VERBATIM] * 3
    shown = await operator.ok("GET", f"/events/{one.json['event_id']}")
    assert (shown["id"], shown["data"]["price"]) == (one.json["id"], 1.1)


async def test_a_batch_is_all_or_none(operator: Client, web: Site):
    good = {"account_id": "acct", "type": "message.sent", "data": {}}
    for bad in (
        good | {"type": "Bad"}, good | {"account_id": ""}, {"account_id": "acct", "type": "message.sent"}, good | {"type": "endpoint.disabled"},
        good | {"data": "x" * 300_000},
    ):  # fmt: skip
        await operator.refused(400, "POST", "/events/batch", {"events": [good, bad]})
    assert await web.query("SELECT FROM webhook.outbox") == []
    ids = [one["id"] for one in (await operator.ok("POST", "/events/batch", {"events": [good] * 200}))["data"]]
    assert ids == sorted(ids)
    await operator.refused(400, "POST", "/events/batch", {"events": [good] * 201})
    await operator.refused(400, "POST", "/events/batch", {"events": []})


async def test_the_same_key_sends_once(operator: Client, web: Site):
    event = {"account_id": "acct", "type": "message.sent", "data": {"n": 1}}
    headers = {"Idempotency-Key": "k1"}
    answers = await asyncio.gather(*(operator("POST", "/events", event, headers=headers) for _ in range(4)))
    assert {answer.status for answer in answers} == {201}, [answer.text for answer in answers]
    assert len({answer.json["event_id"] for answer in answers}) == 1
    assert len(await web.query("SELECT FROM webhook.outbox")) == 1
    await operator.refused(409, "POST", "/events", event | {"data": {"n": 2}}, headers=headers)
    await operator.refused(400, "POST", "/events", event, headers={"Idempotency-Key": "é"})
    other = await operator("POST", "/events", event, headers={"Idempotency-Key": "k2"})
    assert other.json["event_id"] != answers[0].json["event_id"]


async def test_a_request_that_failed_does_not_use_its_key_up(operator: Client):
    headers = {"Idempotency-Key": "k1"}
    event = {"account_id": "acct", "type": "message.sent", "data": "x" * 300_000}
    await operator.refused(400, "POST", "/events", event, headers=headers)
    await operator.ok("POST", "/events", event | {"data": "x"}, headers=headers)


async def test_why_an_event_did_not_arrive(customer: Client, operator: Client, web: Site):
    async with connected(web.dsn) as db:
        delivered = await people.endpoint(db, name="delivered")
        waiting = await people.endpoint(db, name="waiting", state="paused")
        other = await people.endpoint(db, name="other", event_types=["link.*"])
        draft = await people.endpoint(db, name="draft", state="draft")
        await db.execute("DELETE FROM webhook.subscription WHERE endpoint_id = $1", draft)
        [event] = await people.emit(db)
        await people.attempted(db, delivered, [event])
    shown = await customer.ok("GET", f"/events/{event}")
    assert [(one["endpoint_id"], one["fate"]) for one in shown["deliveries"]] == [
        (delivered, "delivered"), (waiting, "held: the endpoint is paused"),
    ]  # fmt: skip
    assert [(one["endpoint_id"], one["why"]) for one in shown["not_for"]] == [
        (other, "it doesn't subscribe to message.sent"), (draft, "it is a draft, which gets nothing"),
    ]  # fmt: skip
    assert (await customer.ok("GET", f"/events/{event}/deliveries/{delivered}"))["attempts"][0]["status"] == 200
    await customer.refused(404, "GET", f"/events/{event}/deliveries/{draft}")


async def test_a_search_goes_on_until_it_is_complete(customer: Client, web: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "LOOKED_AT", 7)
    monkeypatch.setattr(search, "LOOKED_AT_TEXT", 7)
    async with connected(web.dsn) as db:
        wanted = await people.emit(db, 1, type="link.clicked")
        await people.emit(db, 20)
        await people.emit(db, 5, account="other")
        wanted += await people.emit(db, 2, type="link.clicked")
    found, cursor, pages = [], "", 0
    while True:
        page = await customer.ok("GET", f"/events?type=link.*&limit=1{cursor}")
        pages += 1
        found += [row["id"] for row in page["data"]]
        assert page["searched"]["events"] <= 7
        assert page["searched"]["complete"] == (page["next"] is None)
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert found == sorted(wanted, reverse=True)
    assert pages == 6
    page = await customer.ok("GET", "/events?text=%22secret%22%20:%2020&limit=5")
    assert page["searched"] == {"events": 7, "back_to": page["searched"]["back_to"], "complete": False}
    await customer.refused(400, "GET", "/events?cursor=x")


async def test_events_of_a_time(customer: Client, web: Site):
    async with connected(web.dsn) as db:
        for minute in range(5):
            at = await db.fetchval("SELECT '2026-01-01T00:00:00Z'::timestamptz + $1 * interval '1 min'", minute)
            await people.emit(db, 2, at=at)
    page = await customer.ok("GET", "/events?since=2026-01-01T00:01:00Z&until=2026-01-01T00:02:00Z")
    assert [row["id"] for row in page["data"]] == [6, 5, 4, 3]
    assert page["searched"]["complete"]


async def test_deliveries_by_state_and_page_by_page(customer: Client, operator: Client, web: Site):
    async with connected(web.dsn) as db:
        first = await people.endpoint(db, name="first")
        await people.endpoint(db, name="second")
        ids = await people.emit(db, 6)
        await people.attempted(db, first, ids[:2])
        await people.retrying(db, first, ids[2:4])
        await people.died(db, first, ids[4:5])
        await people.endpoint(db, "other")
        await people.emit(db, 3, "other")

    async def states(query: str, client: Client = customer) -> list[tuple[int, int, str]]:
        found, cursor = [], ""
        for _ in range(20):
            page = await client.ok("GET", f"/deliveries?{query}{cursor}")
            found += [(row["event_id"], row["endpoint_id"], row["state"]) for row in page["data"]]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"
        raise AssertionError("the pages have no end")

    expected = ["delivered"] * 2 + ["retrying"] * 2 + ["dead", "waiting"]
    of_first = [(event, first, state) for event, state in zip(ids, expected, strict=True)][::-1]
    assert await states(f"endpoint_id={first}") == of_first
    assert await states(f"endpoint_id={first}&limit=1") == of_first
    assert await states(f"endpoint_id={first}&state=retrying&state=dead") == of_first[1:4]
    assert await states(f"endpoint_id={first}&status=5") == of_first[1:4]
    assert await states(f"endpoint_id={first}&fault=status&limit=2") == of_first[1:4]
    assert await states("state=delivered") == of_first[4:]
    everything = await states("limit=4")
    assert len(everything) == 12
    assert len(set(everything)) == 12
    assert everything == sorted(everything, key=lambda row: (-row[0], -row[1]))
    assert len(await states("limit=4", operator)) == 15
    assert await states("type=link.*") == []
    row = (await customer.ok("GET", f"/deliveries?endpoint_id={first}&state=dead"))["data"][0]
    assert (row["attempts"], row["status"], row["fault"], row["dead_letter_id"]) == (1, 500, "status", 1)


# ── recovery ──


async def test_count_replay_follow_and_cancel(customer: Client, web: Site):
    async with connected(web.dsn) as db:
        endpoint = await people.endpoint(db)
        ids = await people.emit(db, 5)
        await people.attempted(db, endpoint, ids[:3])
    path = f"/endpoints/{endpoint}/replays"
    counted = await customer.ok("GET", f"{path}/count?only_failed=false&types=message.*")
    assert (counted["total"], counted["upto_id"]) == (5, ids[-1])
    fixed = {name: counted[name] for name in ("after_id", "upto_id", "only_failed")}
    run = await customer.ok("POST", path, fixed | {"rate_per_s": 5, "note": "ticket 1"})
    assert (run["state"], run["total"], run["rate_per_s"]) == ("running", 5, 5)
    one = f"/runs/{run['id']}"
    assert (await customer.ok("POST", f"{one}/pause"))["state"] == "paused"
    await customer.refused(409, "POST", f"{one}/pause")
    assert (await customer.ok("PATCH", one, {"rate_per_s": 7}))["rate_per_s"] == 7
    assert (await customer.ok("POST", f"{one}/resume"))["state"] == "running"
    assert [row["id"] for row in (await customer.ok("GET", "/runs?state=open"))["data"]] == [run["id"]]
    assert (await customer.ok("POST", f"{one}/cancel"))["state"] == "canceled"
    assert (await customer.ok("GET", one))["state"] == "canceled"
    await customer.refused(400, "POST", path, {"after_id": ids[-1]})
    await customer.refused(400, "POST", path, {"rate_per_s": 1, "unlimited": True, "only_failed": False})


async def test_dead_letters_are_shown_resent_and_discarded(customer: Client, web: Site):
    async with connected(web.dsn) as db:
        endpoint = await people.endpoint(db)
        letters = await people.died(db, endpoint, await people.emit(db, 4))
        theirs = await people.died(db, await people.endpoint(db, "other"), await people.emit(db, 1, "other"))
    page = await customer.ok("GET", "/dead-letters?limit=3")
    assert ([row["id"] for row in page["data"]], page["next"]) == (letters[:3], str(letters[2]))
    assert (await customer.ok("GET", f"/dead-letters/{letters[0]}"))["data"] == {"secret": 1}
    await customer.refused(404, "POST", "/dead-letters/resend", {"ids": [letters[0], theirs[0]]})
    for body in ({}, {"ids": [1], "all": True}, {"ids": [1], "status": 500}):
        await customer.refused(400, "POST", "/dead-letters/discard", body)
    [run] = (await customer.ok("POST", "/dead-letters/resend", {"ids": letters[:1]}))["data"]
    assert (run["kind"], run["total"]) == ("resend", 1)
    assert await customer.ok("POST", "/dead-letters/discard", {"all": True, "status": 500}) == {"discarded": 3}
    states = await web.query("SELECT state, count(*) FROM webhook.dead_letter GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in states] == [("discarded", 3), ("open", 1), ("resent", 1)]


# ── catalogue, accounts, erasure ──


async def test_the_default_catalogue_is_good(operator: Client, web: Site):
    async with connected(web.dsn) as db:
        assert await event_types.install(db, event_types.DEFAULT_CATALOGUE.read_bytes()) == 20
    page = await operator.ok("GET", "/event-types")
    assert len(page["data"]) == 20
    for one in page["data"]:
        jsonschema.Draft202012Validator.check_schema(one["json_schema"])
        jsonschema.Draft202012Validator(one["json_schema"]).validate(one["sample"])
        for pointers in one["filter_fields"].values():
            for pointer in pointers:
                value = one["sample"]
                for part in pointer.split("/")[1:]:
                    value = value[part]


async def test_event_types_are_put_and_deleted(operator: Client, customer: Client):
    given = {"title": "Sold", "sample": {"n": 1}, "json_schema": {"type": "object"}, "filter_fields": {"n": ["/n"]}}
    assert (await operator("PUT", "/event-types/order.sold", given)).status == 201
    assert (await operator("PUT", "/event-types/order.sold", given)).status == 200
    assert (await customer.ok("GET", "/event-types/order.sold"))["sample"] == {"n": 1}
    for bad in (
        {"title": ""},
        {"title": "a", "filter_fields": {"n": ["n"]}},
        {"title": "a", "json_schema": 5},
        {"title": "a", "sample": "x" * 70_000},
    ):
        await operator.refused(400, "PUT", "/event-types/order.sold", bad)
    await operator.ok("DELETE", "/event-types/order.sold")
    await operator.refused(404, "GET", "/event-types/order.sold")


async def test_accounts(operator: Client, web: Site):
    async with connected(web.dsn) as db:
        for account, state in (("b", "live"), ("a", "live"), ("a", "disabled"), ("c", "deleted"), ("d", "draft")):
            await people.endpoint(db, account, state)
    page = await operator.ok("GET", "/accounts?limit=2")
    assert [(row["account_id"], row["endpoints"], row["disabled"]) for row in page["data"]] == [
        ("a", 2, 1),
        ("b", 1, 0),
    ]
    page = await operator.ok("GET", f"/accounts?limit=2&cursor={page['next']}")
    assert ([row["account_id"] for row in page["data"]], page["next"]) == (["d"], None)


async def test_erasing_an_account_and_an_event(operator: Client, web: Site):
    async with connected(web.dsn) as db:
        await people.endpoint(db, "gone")
        await people.emit(db, 3, "gone")
        [event] = await people.emit(db, 1, "stays")
    theirs = Client(web, await web.key("gone"))
    begun = await operator("POST", "/erasures", {"account_id": "gone"})
    assert begun.status == 202

    async def ended() -> Any:
        [row] = (await operator.ok("GET", "/erasures?account_id=gone"))["data"]
        return row["ended_at"] and row

    row = await until(ended)
    assert (row["events"], row["endpoints"]) == (3, 1)
    await theirs.refused(401, "GET", "/me")
    assert (await operator.ok("POST", "/erasures", {"event": str(event)}))["events"] == 1
    await operator.refused(404, "POST", "/erasures", {"event": str(event)})
    for body in ({}, {"account_id": "a", "event": "1"}):
        await operator.refused(400, "POST", "/erasures", body)


async def test_an_account_makes_keys_of_its_own_only(customer: Client):
    made = await customer.ok("POST", "/keys", {"name": "second"})
    assert made["account_id"] == "acct"
    await customer.refused(403, "POST", "/keys", {"account_id": "other"})
    await customer.ok("DELETE", f"/keys/{made['id']}")
    assert made["id"] not in [one["id"] for one in (await customer.ok("GET", "/keys"))["data"]]
    assert made["id"] in [one["id"] for one in (await customer.ok("GET", "/keys?revoked=true"))["data"]]


# ── form ──


async def test_what_is_no_request_is_told_so(operator: Client, web: Site):
    json = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b'{"a":1}', b"\xff", b'{"account_id": "\\ud800"}', b"[" * 5_000):
        assert (await operator("POST", "/keys", data=body, headers=json)).status == 400, body[:20]
    assert (await operator("POST", "/keys", data=b"{}", headers={"Content-Type": "text/plain"})).status == 415
    assert (await operator("GET", "/me?a=1")).status == 400
    assert (await operator("GET", "/keys?limit=1&limit=2")).status == 400
    assert (await operator("GET", "/endpoints/0")).status == 400
    assert (await operator("GET", "/endpoints/99999999999999999999")).status == 400
    wrong = await operator("PUT", "/me")
    assert (wrong.status, wrong.json["code"], wrong.headers["Allow"]) == (405, "wrong_method", "GET")
    assert (await operator("GET", "/nothing")).json["code"] == "not_found"


async def test_no_sentence_speaks_of_the_command_line(operator: Client):
    for method, path in (
        ("GET", "/endpoints/9"),
        ("GET", "/runs/9"),
        ("GET", "/dead-letters/9"),
        ("POST", "/endpoints/9/replays"),
    ):
        problem = await operator.refused(404, method, path, {} if method == "POST" else None)
        assert "`" not in problem["detail"]
        assert "--" not in problem["detail"]


@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(data=st.data())
async def test_whatever_is_sent_is_answered(operator: Client, data: st.DataObject):
    """Any operation, any path, query, headers and body: never a 5xx, and always a form that it promises."""
    operation = data.draw(st.sampled_from(OPERATIONS))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    path = operation.path
    for name in operation.parameters:
        path = path.replace(f"{{{name}}}", quote(data.draw(text | st.integers(-1, 1 << 70).map(str)), safe="") or "-")
    fields = sorted((operation.query or operation.body or Paged).model_fields)
    query = data.draw(st.lists(st.tuples(st.sampled_from([*fields, "x"]), text), max_size=3))
    values = st.none() | st.booleans() | st.integers() | st.floats() | text
    anything = st.recursive(
        values,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(fields) | text, inner, max_size=4),
    )
    body = data.draw(st.binary(max_size=30) | anything.map(lambda value: json.dumps(value).encode()))
    headers = {
        "Content-Type": data.draw(st.sampled_from(["application/json", "text/plain", "a", "multipart/form-data"]))
    }
    target = f"{path}?{urlencode(query)}" if query else path
    answer = await operator(operation.method, target, data=None if operation.method == "GET" else body, headers=headers)
    assert answer.status < 500, answer.text
    if answer.status >= 400:
        assert set(answer.json) == {"type", "title", "status", "code", "detail", "field"}
