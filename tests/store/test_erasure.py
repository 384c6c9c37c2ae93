"""Erasure: what was said is gone from every table, what happened stays, and an interruption is completed."""

import asyncio
from typing import Any

import asyncpg
import pytest

from dispatcher import settings as settings_module
from dispatcher.domain.event import PublicIds
from dispatcher.domain.principal import OPERATOR
from dispatcher.errors import InputError, NotFoundError
from dispatcher.store import alerts, dead_letters, erasure, receivers, runs
from dispatcher.store.dead_letters import Filter
from dispatcher.store.erasure import ERASURE
from tests.conftest import connected
from tests.store.people import attempted, died, emit, endpoint, retention, retrying, states

SETTINGS = settings_module.Settings()

# Every text and byte that the database holds of an account's, wherever.
SAID = """
SELECT 'outbox', payload::text FROM webhook.outbox
UNION ALL SELECT 'dead_letter', payload::text FROM webhook.dead_letter WHERE payload IS NOT NULL
UNION ALL SELECT 'attempt', encode(response_head, 'escape') FROM webhook.attempt WHERE response_head IS NOT NULL
UNION ALL SELECT 'test', encode(request, 'escape') FROM webhook.test_attempt
UNION ALL SELECT 'secret', secret FROM webhook.endpoint_secret
UNION ALL SELECT 'endpoint', url || name || coalesce(draft::text, '') || coalesce(credentials, '') || omit::text FROM webhook.endpoint
WHERE url <> 'https://erased.invalid/' OR name <> '' OR draft IS NOT NULL
   OR credentials IS NOT NULL OR extra_signature IS NOT NULL OR omit <> '{}'
UNION ALL SELECT 'note', note FROM webhook.run WHERE note <> ''
UNION ALL SELECT 'retry', reason FROM webhook.retry
UNION ALL SELECT 'alert', said::text FROM webhook.alert
UNION ALL SELECT 'alert_recipient', address FROM webhook.alert_recipient
UNION ALL SELECT 'received', encode(body, 'escape') || headers::text FROM webhook.received
"""


async def said(db: asyncpg.Connection) -> dict[str, int]:
    counts: dict[str, int] = {}
    for table, _ in await db.fetch(SAID):
        counts[table] = counts.get(table, 0) + 1
    return counts


SHAPED: dict[str, Any] = {"credentials": '{"bearer": "said"}', "extra_signature": "hex:x-said", "omit": ["/said"]}


async def full_endpoint(db: asyncpg.Connection, account: str = "acct", **columns: Any) -> int:
    endpoint_id = await endpoint(db, account, name="Ann's", draft='{"url": "https://new.test/"}', **SHAPED, **columns)
    await db.execute(
        "INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw')",
        endpoint_id,
    )
    await db.execute(
        "INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, verdict, request) VALUES ($1, '', 1, '', 'said')",
        endpoint_id,
    )
    return endpoint_id


async def told_and_received(db: asyncpg.Connection, account: str, endpoint_id: int) -> None:
    """Let its recipients be told of the endpoint, and a receiver of its get something."""
    await alerts.add_recipient(db, OPERATOR, account_id=account, address="ann@example.com")
    await db.execute(
        "INSERT INTO webhook.alert (audience, account_id, endpoint_id, type, said) VALUES ('', $1, $2, 'endpoint.failing', '{}')",
        account,
        endpoint_id,
    )
    receiver = await receivers.create(db, OPERATOR, account)
    await receivers.keep(db, receiver.id, [], b"said", signature="unknown", endpoint_id=None, status=200)


async def public_id(db: asyncpg.Connection, event: int) -> str:
    created = await db.fetchval("SELECT created_at FROM webhook.outbox WHERE id = $1", event)
    [public] = PublicIds(await db.fetchval("SELECT id_key FROM webhook.instance")).encode(
        [(round(created.timestamp() * 1_000_000), event)]
    )
    return public.decode()


# ── an account ──


async def test_an_account_is_erased_everywhere_and_others_are_not(
    db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "PAGE", 3)
    theirs = await full_endpoint(db, "other")
    await died(db, theirs, await emit(db, 2, "other"))
    before = await said(db)
    live, gone, draft = (
        await full_endpoint(db),
        await full_endpoint(db, state="deleted"),
        await full_endpoint(db, state="draft"),
    )
    ids = await emit(db, 10)
    await died(db, live, ids[:5])
    await retrying(db, live, ids[5:7])
    await attempted(db, gone, ids[:4], fault="timeout")
    await runs.resend(db, str(ids[0]), live, "for Ann")
    await told_and_received(db, "acct", live)
    letters = [letter["id"] for letter in await dead_letters.find(db, Filter(account_id="acct"))]
    found = await erasure.look_at_account(db, "acct")
    assert (found.endpoints, found.events, found.response_heads, found.dead_letters, found.tests, found.began) == (
        3, 10, 11, 5, 3, False,
    )  # fmt: skip
    steps: dict[str, float] = {}
    done = await erasure.erase_account(
        db, SETTINGS, "acct", step=lambda what, n: steps.__setitem__(what, steps.get(what, 0) + n)
    )
    assert await said(db) == before
    assert steps == {"endpoints": 3, "events": 10, "answers": 11, "dead letters": 5}
    assert (done.account_id, done.event_id, done.endpoints, done.events, done.response_heads, done.dead_letters, done.tests) == (
        "acct", None, 3, 10, 11, 5, 3,
    )  # fmt: skip
    assert done.ended_at is not None
    assert done.erased_by == await db.fetchval("SELECT session_user")
    rows = await db.fetch("SELECT id, state, url FROM webhook.endpoint WHERE account_id = 'acct' ORDER BY id")
    assert [tuple(row) for row in rows] == [(e, "deleted", "https://erased.invalid/") for e in (live, gone, draft)]
    assert {(await states(db))[letter] for letter in letters} == {"erased"}
    assert (
        await db.fetchval("SELECT count(*) FROM webhook.attempt WHERE endpoint_id = ANY ($1::bigint[])", [live, gone])
        == 11
    )
    discarded = await db.fetchval(
        "SELECT sum(deliveries) FROM webhook.discard WHERE endpoint_id = $1 AND reason = 'deleted'", live
    )
    assert discarded == 2 + 3, "waiting for a retry, and never attempted"
    forget = await db.fetch("SELECT endpoint_id FROM webhook.config_change WHERE forget ORDER BY seq")
    assert {row["endpoint_id"] for row in forget} == {live, gone, draft}
    assert await erasure.find(db) == [done]
    assert await erasure.find(db, account_id="other") == []
    with pytest.raises(NotFoundError, match="nothing of account acct"):
        await erasure.look_at_account(db, "acct")


async def test_an_interrupted_erasure_is_completed(db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "PAGE", 2)
    to = await full_endpoint(db)
    await died(db, to, await emit(db, 9))

    def step(what: str, n: float) -> None:
        if n:
            raise KeyboardInterrupt

    interruptions = 0
    while True:
        try:
            await erasure.erase_account(db, SETTINGS, "acct", step=step)
            break
        except KeyboardInterrupt:
            interruptions += 1
            [row] = await erasure.find(db)
            assert row.ended_at is None
            assert (await erasure.look_at_account(db, "acct")).began
    assert interruptions == 1 + 3 * 5, "after the endpoint, and after each page of events, letters and answers"
    assert await said(db) == {}
    [row] = await erasure.find(db)
    assert row.ended_at is not None
    assert (row.events, row.response_heads, row.dead_letters, row.tests, row.endpoints) == (9, 9, 9, 1, 1), (
        "each counted once"
    )


async def test_it_waits_for_what_is_in_flight_and_erases_that_too(dsn: str, db: asyncpg.Connection) -> None:
    to = await full_endpoint(db, timeout_ms=100)
    [event] = await emit(db)
    await db.execute("UPDATE webhook.checkpoint SET heartbeat_at = clock_timestamp()")
    assert await erasure.in_flight_s(db, "acct") == pytest.approx(2.1)
    waited = 0.0

    async def late() -> None:
        """What a POST that was in flight leaves behind."""
        async with connected(dsn) as other:
            await attempted(other, to, [event], fault="status")

    recorded: asyncio.Task[None] | None = None

    def step(what: str, n: float) -> None:
        nonlocal waited, recorded
        if what == "waiting":
            waited += n
            if recorded is None:
                recorded = asyncio.create_task(late())

    done = await erasure.erase_account(db, SETTINGS, "acct", step=step)
    assert waited == pytest.approx(2.1)
    assert recorded is not None
    await recorded
    assert done.response_heads == 1
    assert await said(db) == {}


async def test_accounts_that_arent_there_or_cant_be(db: asyncpg.Connection) -> None:
    with pytest.raises(NotFoundError, match="nothing of account Acct"):
        await erasure.look_at_account(db, "Acct")
    for bad in ("", "x" * 256, "a\x00b"):
        with pytest.raises(InputError, match="1 to 255 bytes"):
            await erasure.look_at_account(db, bad)
    await emit(db, 2, "acct")
    found = await erasure.look_at_account(db, "acct")
    assert (found.endpoints, found.events) == (0, 2), "an account without endpoints has events"
    assert (await erasure.erase_account(db, SETTINGS, "acct")).events == 2


async def test_a_count_that_takes_too_long_does_not_stop_it(
    dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await emit(db, 2)
    monkeypatch.setattr(erasure, "COUNT_TIMEOUT_S", 0.05)
    async with connected(dsn) as other, other.transaction():
        await other.execute("LOCK TABLE webhook.outbox IN ACCESS EXCLUSIVE MODE")
        found = await erasure.look_at_account(db, "acct")
    assert found.events is None
    assert not found.is_empty


# ── one event ──


async def test_an_event_is_erased_everywhere_and_its_neighbours_are_not(db: asyncpg.Connection) -> None:
    to, second, held = await endpoint(db), await endpoint(db), await endpoint(db, state="paused")
    theirs = await endpoint(db, "other")
    before, event, after = await emit(db, 3)
    await died(db, to, [before, event])
    await retrying(db, second, [event, after])
    await attempted(db, second, [event], run=3, fault="status")
    reference = await public_id(db, event)
    found = await erasure.look_at_event(db, reference)
    assert found == await erasure.look_at_event(db, str(event))
    assert (found.id, found.account_id, found.in_log, found.response_heads, found.dead_letters, found.owed) == (
        event, "acct", True, 3, 1, 2,
    )  # fmt: skip
    receiver = await receivers.create(db, OPERATOR, "acct")
    await receivers.keep(db, receiver.id, [], b"said", signature="unknown", endpoint_id=None, status=200)
    done = await erasure.erase_event(db, found)
    assert await receivers.received(db, receiver.id) == []
    assert (done.event_id, done.events, done.response_heads, done.dead_letters, done.endpoints) == (event, 1, 3, 1, 0)
    assert done.ended_at is not None
    assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 2
    assert await db.fetchval("SELECT count(response_head) FROM webhook.attempt WHERE event_id = $1", event) == 0
    assert await db.fetchval("SELECT count(response_head) FROM webhook.attempt WHERE event_id <> $1", event) == 2
    assert list((await states(db)).values()) == ["open", "erased"]
    assert [row["event_id"] for row in await db.fetch("SELECT event_id FROM webhook.retry")] == [after]
    rows = await db.fetch(
        "SELECT endpoint_id, reason, after_id, upto_id, deliveries FROM webhook.discard ORDER BY endpoint_id"
    )
    assert [tuple(row) for row in rows] == [(second, "erased", before, event, 1), (held, "erased", before, event, 1)]
    forget = [
        row["endpoint_id"]
        for row in await db.fetch("SELECT endpoint_id FROM webhook.config_change WHERE forget ORDER BY endpoint_id")
    ]
    assert forget == [to, second, held]
    assert theirs not in forget
    for again in (reference, str(event)):
        with pytest.raises(NotFoundError, match="was erased on"):
            await erasure.look_at_event(db, again)


async def test_an_event_that_retention_has_taken_is_erased_from_its_dead_letter(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event, other] = await emit(db, 2)
    await died(db, to, [event])
    reference = await public_id(db, event)
    await retention(db)
    with pytest.raises(NotFoundError, match="no dead letter and no answer is left"):
        await erasure.look_at_event(db, str(other))
    found = await erasure.look_at_event(db, reference)
    assert (found.in_log, found.dead_letters) == (False, 1)
    done = await erasure.erase_event(db, found)
    assert (done.events, done.dead_letters) == (0, 1)
    with pytest.raises(NotFoundError, match="was erased on"):
        await erasure.look_at_event(db, reference)


async def test_an_answer_that_is_left_alone_is_erased_by_the_outbox_id(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    reference = await public_id(db, event)
    await attempted(db, to, [event], fault="status")
    await db.execute("DELETE FROM webhook.outbox")
    with pytest.raises(NotFoundError, match="there is no event"):
        await erasure.look_at_event(db, reference)  # nothing is left that says it was this one
    found = await erasure.look_at_event(db, str(event))
    assert (await erasure.erase_event(db, found)).response_heads == 1


@pytest.mark.parametrize("reference", ["77", "evt_" + "0" * 32])
async def test_events_that_arent_there(db: asyncpg.Connection, reference: str) -> None:
    with pytest.raises(NotFoundError, match=f"there is no event {reference}"):
        await erasure.look_at_event(db, reference)


async def test_an_event_in_flight_is_waited_for_and_an_interruption_is_completed(db: asyncpg.Connection) -> None:
    to = await endpoint(db, timeout_ms=100)
    [event] = await emit(db)
    await db.execute("UPDATE webhook.checkpoint SET heartbeat_at = clock_timestamp()")

    def step(what: str, n: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await erasure.erase_event(db, await erasure.look_at_event(db, str(event)), step=step)
    assert await db.fetchval("SELECT count(*) FROM webhook.outbox") == 0
    await retrying(db, to, [event])  # recorded meanwhile
    found = await erasure.look_at_event(db, str(event))
    assert found.began is not None
    done = await erasure.erase_event(db, found)
    assert (done.id, done.events, done.response_heads, done.ended_at is not None) == (found.began, 1, 1, True)
    assert await said(db) == {"endpoint": 1}


async def test_a_delivered_event_is_not_waited_for(db: asyncpg.Connection) -> None:
    to = await endpoint(db, timeout_ms=60_000)
    [event] = await emit(db)
    await attempted(db, to, [event])
    await db.execute("UPDATE webhook.checkpoint SET heartbeat_at = clock_timestamp()")

    def step(what: str, n: float) -> None:
        raise AssertionError("nothing can be in flight")

    assert (await erasure.erase_event(db, await erasure.look_at_event(db, str(event)), step=step)).events == 1


# ── plans ──


async def test_no_statement_reads_a_big_table_from_end_to_end(db: asyncpg.Connection) -> None:
    await db.execute("SET enable_seqscan = off")
    arguments = {
        "count_events": "'a'", "count_dead_letters": "'a'", "count_response_heads": "'{1,2}'", "count_tests": "'{1}'", "delete_tests": "1",
        "events_bound": "'a', 1, 9, 5", "delete_events": "'a', 1, 9", "dead_letters_bound": "'a', 1, 5", "erase_dead_letters": "'a', 1, 9",
        "response_heads_bound": "1, 2, 5", "erase_response_heads": "1, 2, 9", "retries_bound": "1, 2, 5", "delete_retries": "1, 2, 9",
        "event": "5", "dead_letters_of_event": "5, NULL", "attempts_of_event": "5", "owed_of_event": "5, 'a'", "delete_event": "5",
        "delete_retries_of_event": "5, 'a'", "erase_response_heads_of_event": "5", "erase_dead_letters_of_event": "5, 'a'",
        "delete_secrets": "1", "clear_notes": "1",
    }  # fmt: skip
    for name, values in arguments.items():
        await db.execute(f"PREPARE s_{name} AS {getattr(ERASURE, name)}")
        plan = await db.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE s_{name} ({values})")
        assert "Seq Scan" not in plan, f"{name}: {plan}"
