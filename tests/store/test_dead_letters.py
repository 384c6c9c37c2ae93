"""Dead letters: found by what people remember of them, resent once, discarded for good."""

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.store import dead_letters, runs
from dispatcher.store.dead_letters import LETTERS, Filter
from tests.store.people import attempted, died, emit, endpoint, retention, states

OPEN = Filter()


async def ids(db: asyncpg.Connection, chosen: Filter = OPEN, **page) -> list[int]:
    return [letter["id"] for letter in await dead_letters.find(db, chosen, **page)]


async def resend(
    db: asyncpg.Connection, endpoint_id: int, chosen: Filter = OPEN, rate: float | None = 200
) -> runs.RunView:
    fixed, _ = await dead_letters.total(db, chosen)
    run = await dead_letters.resend(db, fixed, endpoint_id, rate)
    assert run is not None
    return run


# ── finding ──


async def test_they_are_found_by_what_is_known_of_them(db: asyncpg.Connection) -> None:
    to, second, theirs = await endpoint(db), await endpoint(db), await endpoint(db, "other")
    old = datetime(2026, 11, 1, 12, tzinfo=UTC)
    a = await died(db, to, await emit(db), died_at=old)
    b = await died(
        db,
        to,
        await emit(db, type="link.clicked"),
        fault="timeout",
        status=None,
        reason="older than 72 h at its NEXT attempt",
    )
    c = await died(db, second, await emit(db), status=503)
    d = await died(db, theirs, await emit(db, account="other"))

    async def found(**how) -> list[int]:
        return await ids(db, Filter(**how))

    assert await found() == a + b + c + d
    assert await found(endpoint_id=to) == a + b
    assert await found(account_id="other") == d
    assert await found(account_id="other", endpoint_id=to) == []
    assert await found(patterns=("link.*",)) == b
    assert await found(patterns=("link.clicked", "message.sent")) == a + b + c + d
    assert await found(since=timedelta(hours=1)) == b + c + d
    assert await found(until=old) == a, "inclusive"
    assert await found(since=old, until=timedelta(days=1)) == (a if datetime.now(UTC) > old + timedelta(days=1) else [])
    assert await found(fault="timeout") == b
    assert await found(status=503) == c
    assert await found(reason="next ATTEMPT") == b
    assert await found(reason="%") == [], "words, not a pattern"
    assert await found(ids=(a[0], c[0], 999)) == a + c
    await db.execute("UPDATE webhook.dead_letter SET state = 'discarded', payload = NULL WHERE id = $1", c[0])
    assert await found() == a + b + d
    assert await found(state=None) == a + b + c + d
    assert await found(state=None, endpoint_id=second) == c
    assert await found(state="discarded") == c
    with pytest.raises(NotFoundError, match="no endpoint 99"):
        await found(endpoint_id=99)
    with pytest.raises(InputError, match="event-type pattern"):
        await found(patterns=("Message",))


async def test_pages_follow_each_other(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    letters = await died(db, to, await emit(db, 7))
    pages = [
        await ids(db, Filter(endpoint_id=to), after=after, limit=3) for after in (0, letters[2], letters[5], letters[6])
    ]
    assert pages == [letters[:3], letters[3:6], letters[6:], []]


async def test_one_is_shown_with_its_payload_and_attempts_also_after_retention(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    await attempted(db, to, [event], number=2, fault="timeout")
    [letter] = await died(db, to, [event])
    shown = await dead_letters.show(db, letter)
    assert shown["payload"] == '{"secret" : 1}'
    assert shown["public_id"].startswith("evt_")
    assert [(a["number"], a["fault"], a["response"]) for a in shown["made"]] == [
        (1, "status", "HTTP/1.1 500 said"), (2, "timeout", "HTTP/1.1 500 said"),
    ]  # fmt: skip
    assert not shown["delivered_since"]
    await attempted(db, to, [event], run=4)
    assert (await dead_letters.show(db, letter))["delivered_since"]
    await retention(db)
    shown = await dead_letters.show(db, letter)
    assert (shown["payload"], shown["made"]) == ('{"secret" : 1}', [])
    with pytest.raises(NotFoundError, match="no dead letter 99"):
        await dead_letters.show(db, 99)
    with pytest.raises(InputError, match="not the id"):
        await dead_letters.show(db, -1)


# ── counting ──


async def test_a_choice_is_counted_by_endpoint_and_its_end_is_fixed(db: asyncpg.Connection) -> None:
    to, gone, draft = await endpoint(db, rate_per_s=5.0), await endpoint(db), await endpoint(db)
    events = await emit(db, 3)
    letters = await died(db, to, events)
    await died(db, to, events[:1], run=4)  # the same delivery, given up twice
    await died(db, gone, events[:1])
    last = await died(db, draft, events[:2])
    await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
    await db.execute("UPDATE webhook.endpoint SET state = 'draft' WHERE id = $1", draft)
    fixed, totals = await dead_letters.total(db, Filter())
    assert [(t.endpoint_id, t.letters, t.events, t.rate_per_s, t.why_not) for t in totals] == [
        (to, 4, 3, 5.0, None), (gone, 1, 1, None, "was deleted"), (draft, 2, 2, None, "is a draft"),
    ]  # fmt: skip
    assert fixed.upto_id == last[-1]
    await died(db, to, await emit(db))
    run = await dead_letters.resend(db, fixed, to, None)
    assert run is not None
    assert run.total == 3, "of deliveries; what died after the count isn't among them"
    assert len([state for state in (await states(db)).values() if state == "resent"]) == 4
    assert letters[0] in await ids(db, Filter(state="resent"))
    with pytest.raises(NotFoundError, match="was deleted"):
        await dead_letters.resend(db, fixed, gone, None)
    with pytest.raises(StateError, match="is a draft"):
        await dead_letters.resend(db, fixed, draft, None)


async def test_named_ones_must_all_be_there_and_open(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    a, b, c = await died(db, to, await emit(db, 3))
    run = await resend(db, to, Filter(ids=(a,)))
    await dead_letters.discard(db, Filter(ids=(b,)))
    for chosen, says in (
        ((c, a), f"dead letter {a} was resent by run {run.id}"), ((c, b), f"dead letter {b} was discarded"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=says):
            await dead_letters.total(db, Filter(ids=chosen))
    with pytest.raises(NotFoundError, match="no dead letter 99"):
        await dead_letters.total(db, Filter(ids=(c, 99)))
    with pytest.raises(InputError, match="more than 1000 ids"):
        await dead_letters.total(db, Filter(ids=tuple(range(1, 1002))))
    assert (await states(db))[c] == "open"


# ── resending ──


async def test_a_resend_is_one_run_over_their_own_copies(
    db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "PAGE", 3)
    to, other = await endpoint(db), await endpoint(db)
    events = await emit(db, 10)
    letters = await died(db, to, events)
    await died(db, other, events[:2])
    await retention(db)
    seq = await db.fetchval("SELECT coalesce(max(seq), 0) FROM webhook.config_change")
    steps: list[int] = []
    fixed, totals = await dead_letters.total(db, Filter(endpoint_id=to))
    assert [(t.endpoint_id, t.letters) for t in totals] == [(to, 10)]
    run = await dead_letters.resend(db, fixed, to, 50, "again", step=steps.append)
    assert run is not None
    assert steps == [3, 3, 3, 1]
    assert (run.source, run.kind, run.total, run.after_id, run.upto_id, run.rate_per_s, run.note, run.patterns) == (
        "dead_letter", "resend", 10, events[0] - 1, events[-1], 50, "again", ("*",),
    )  # fmt: skip
    rows = await db.fetch(
        "SELECT id FROM webhook.dead_letter WHERE resent_run = $1 AND state = 'resent' ORDER BY id", run.id
    )
    assert [row["id"] for row in rows] == letters
    assert (
        await db.fetchval("SELECT count(*) FROM webhook.config_change WHERE seq > $1 AND endpoint_id = $2", seq, to)
        == 1
    )
    assert await dead_letters.resend(db, fixed, to, 50) is None, "none is open any more"
    assert await db.fetchval("SELECT count(*) FROM webhook.run") == 1
    canceled = await runs.cancel(db, run.id)
    assert canceled.state == "canceled"
    assert await ids(db, Filter(endpoint_id=to)) == letters, "canceled before it came to them: open again"


async def test_a_resend_that_cant_be_made_marks_nothing(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    [letter] = await died(db, to, [event])
    fixed, _ = await dead_letters.total(db, Filter())
    with pytest.raises(InputError, match="rate"):
        await dead_letters.resend(db, fixed, to, 0)
    with pytest.raises(InputError, match="note"):
        await dead_letters.resend(db, fixed, to, None, "x" * 501)
    assert await states(db) == {letter: "open"}
    assert await db.fetchval("SELECT count(*) FROM webhook.run") == 0


async def test_failed_again_it_is_another_one_that_can_be_resent(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    [first] = await died(db, to, [event])
    run = await resend(db, to)
    [second] = await died(db, to, [event], run=run.id)
    assert await states(db) == {first: "resent", second: "open"}
    again = await resend(db, to)
    assert await states(db) == {first: "resent", second: "resent"}
    assert again.id != run.id


# ── discarding ──


async def test_a_discard_gives_up_the_payload_and_keeps_the_record(
    db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "PAGE", 2)
    to = await endpoint(db)
    events = await emit(db, 6)
    letters = await died(db, to, events)
    run = await resend(db, to, Filter(ids=(letters[0],)))
    fixed, totals = await dead_letters.total(db, Filter(endpoint_id=to))
    late = await died(db, to, await emit(db))
    steps: list[int] = []
    assert await dead_letters.discard(db, fixed, step=steps.append) == totals[0].letters == 5
    assert steps == [2, 2, 1]
    assert await states(db) == {letters[0]: "resent"} | dict.fromkeys(letters[1:], "discarded") | {late[0]: "open"}
    assert await db.fetchval("SELECT count(*) FROM webhook.dead_letter WHERE payload IS NOT NULL") == 2
    shown = await dead_letters.show(db, letters[1])
    assert (shown["payload"], shown["state"], shown["attempts"]) == (None, "discarded", 1)
    assert shown["state_changed_at"] is not None
    assert await dead_letters.discard(db, fixed) == 0, "safe to repeat"
    assert run.total == 1


# ── plans ──


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        (Filter(endpoint_id=3), "dead_letter_open"),
        (Filter(account_id="a7"), "dead_letter_account_id"),
        (Filter(endpoint_id=3, state=None), "dead_letter_account_id"),
        (Filter(), "dead_letter_pkey"),
        (Filter(ids=(5, 6)), "dead_letter_pkey"),
    ],
)
async def test_a_page_is_found_by_an_index_in_the_order_of_ids(
    db: asyncpg.Connection, chosen: Filter, index: str
) -> None:
    await db.execute(
        "INSERT INTO webhook.endpoint (account_id, url, state) SELECT 'a' || n, 'https://x.test/', 'live' FROM generate_series(1, 50) n;"
        "INSERT INTO webhook.dead_letter "
        "(endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, reason, fault, state, resent_run) "
        "SELECT e.id, n, 0, e.account_id, 'm.s', '{}', now(), 1, now(), 'x', 'status', "
        "CASE WHEN n % 5 > 0 THEN 'resent' ELSE 'open' END, 1 FROM webhook.endpoint e, generate_series(1, 400) n ORDER BY n; "
        "ANALYZE webhook.dead_letter"
    )
    settled = await dead_letters._settle(db, chosen)
    for name in ("page", "ids"):
        async with db.transaction():
            await db.execute(LETTERS.plan_each)
            rows = await db.fetch(f"EXPLAIN {getattr(LETTERS, name)}", *settled.values(100), 20)
        plan = "\n".join(row[0] for row in rows)
        assert "Seq Scan on dead_letter" not in plan, plan
        assert index in plan, plan


async def test_marking_is_by_index(db: asyncpg.Connection) -> None:
    await db.execute("SET enable_seqscan = off")
    for name, values in {
        "mark_resent": "'{1,2}', 5",
        "discard": "'{1,2}'",
        "resent_range": "5",
        "attempts": "5, 7",
        "states": "'{1}'",
    }.items():
        await db.execute(f"PREPARE s_{name} AS {getattr(LETTERS, name)}")
        plan = await db.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE s_{name} ({values})")
        assert "Seq Scan" not in plan, f"{name}: {plan}"
