"""From INSERT to recorded POST: the main path, end to end."""

import orjson
from standardwebhooks.webhooks import Webhook

from tests.rig import SECRET, rig, until


async def test_a_committed_row_is_posted_signed_and_recorded(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        [event_id] = await r.emit(payload='{"message": {"text":  "two  spaces stay"}}')
        await until(lambda: r.received)
        [got] = r.received
        assert got.signature_ok
        assert got.attempt == 1
        assert b'"data":{"message": {"text":  "two  spaces stay"}}}' in got.body
        envelope = orjson.loads(got.body)
        assert list(envelope) == ["id", "type", "timestamp", "account_id", "data"]
        assert envelope["id"] == got.webhook_id
        assert envelope["id"].startswith("evt_")
        await r.settled()
        [attempt] = await r.attempts()
        assert (attempt["event_id"], attempt["endpoint_id"], attempt["run"], attempt["number"]) == (
            event_id,
            endpoint,
            0,
            1,
        )
        assert attempt["status"] == 204
        assert attempt["fault"] is None


async def test_the_official_library_accepts_the_signature(dsn: str) -> None:
    async with rig(dsn) as r:
        raw: list[tuple[bytes, dict[str, str]]] = []
        r.sink._receive, inner = (lambda path, headers, body: _keep(raw, inner, path, headers, body)), r.sink._receive
        await r.endpoint()
        await r.emit()
        await until(lambda: raw)
        body, headers = raw[0]
        verified = Webhook(SECRET).verify(body, headers)
        assert verified["type"] == "message.sent"


def _keep(raw, inner, path, headers, body):
    raw.append((body, {name.decode().lower(): value.decode() for name, value in headers.items()}))
    return inner(path, headers, body)


async def test_a_rolled_back_row_is_never_sent(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.endpoint()
        transaction = r.db.transaction()
        await transaction.start()
        await r.emit(3, type="never.sent")
        await transaction.rollback()
        await r.emit(2, type="message.sent")
        await r.settled()
        assert [orjson.loads(event.body)["type"] for event in r.received] == ["message.sent"] * 2


async def test_events_that_nobody_wants_are_settled_and_counted(dsn: str) -> None:
    async with rig(dsn) as r:
        await r.endpoint(types=("message.*",))
        await r.emit(5, type="link.clicked")
        await r.emit(5, account="nobody")
        await until(lambda: r.engine.counters.events_unwanted == 10)
        await r.settled()
        assert r.received == []
        assert await r.attempts() == []
