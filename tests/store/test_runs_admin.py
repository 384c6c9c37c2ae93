"""Resends and replays as people ask for them: what is counted is what the run's row says, and what can't be sent is told."""

import math
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.domain.event import PublicIds
from dispatcher.errors import InputError, NotFoundError, StateError
from dispatcher.store import runs
from dispatcher.store.runs import RunView, Selection
from tests.conftest import connected
from tests.store.people import attempted, died, emit, endpoint, retention, retrying, states

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


async def chosen(db: asyncpg.Connection, selection: Selection) -> list[int]:
    """The ids that the dispatcher would meet in the range, by account and type alone."""
    exact, prefixes = runs.split(selection.patterns)
    rows = await db.fetch(
        "SELECT id FROM webhook.outbox WHERE account_id = $1 AND id > $2 AND id <= $3 "
        "AND ($4::text[] IS NULL OR type = ANY ($4) OR type ^@ ANY ($5::text[])) ORDER BY id",
        selection.target.account_id, selection.after_id, selection.upto_id, exact, prefixes,
    )  # fmt: skip
    return [row["id"] for row in rows]


async def begin(db: asyncpg.Connection, endpoint_id: int, rate: float | None = 200, **select) -> RunView:
    return await runs.create(db, await runs.select(db, endpoint_id, **select), rate)


# ── choosing ──


async def test_a_range_of_ids_is_counted_by_account_and_type(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    await emit(db, 3)
    ids = await emit(db, 5)
    await emit(db, 4, account="other")
    links = await emit(db, 2, type="link.clicked")
    await emit(db, 1)

    async def total(**how) -> int:
        return (await runs.select(db, to, only_failed=False, **how)).total

    assert await total() == 11
    assert await total(after_id=ids[0] - 1, upto_id=ids[-1]) == 5
    assert await total(patterns=["link.*"]) == 2
    assert await total(patterns=["link.clicked", "message.sent"]) == 11
    assert await total(patterns=["links.*"]) == 0
    assert await total(after_id=links[-1]) == 1
    assert await total(after_id=10**12) == 0
    selection = await runs.select(db, to, only_failed=False, upto_id=10**12)
    assert selection.upto_id == links[-1] + 1, "the end is fixed: the last id now"


async def test_without_types_it_is_the_endpoints_own(db: asyncpg.Connection) -> None:
    to = await endpoint(db, event_types=["link.*"])
    await emit(db, 5)
    await emit(db, 2, type="link.clicked")
    selection = await runs.select(db, to, only_failed=False)
    assert (selection.total, selection.patterns) == (2, ("link.*",))


async def test_only_failed_means_failed_without_success_or_a_retry_to_come(db: asyncpg.Connection) -> None:
    to, other = await endpoint(db), await endpoint(db)
    ids = await emit(db, 8)
    await attempted(db, to, ids[0:1])
    await attempted(db, to, ids[1:4], fault="status")
    await attempted(db, to, ids[1:2], number=2, fault="timeout")
    await attempted(db, to, ids[3:4], run=5)  # a resend delivered it
    await retrying(db, to, ids[4:5])
    await attempted(db, other, ids[5:7], fault="status")
    selection = await runs.select(db, to)
    assert selection.total == 2  # 1 and 2
    assert (await runs.select(db, to, patterns=["link.*"])).total == 0
    assert (await runs.select(db, to, upto_id=ids[1])).total == 1
    assert (await runs.select(db, other)).total == 2


async def test_times_become_ids_that_miss_nothing(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    ids = []
    for n in range(100):
        ids += await emit(db, at=NOON + timedelta(minutes=n))
        await emit(db, account="other", at=NOON + timedelta(minutes=n))

    async def range_of(since, until=None) -> list[int]:
        return await chosen(db, await runs.select(db, to, only_failed=False, since=since, until=until))

    def at(n: float) -> datetime:
        return NOON + timedelta(minutes=n)

    assert await range_of(at(10), at(20)) == ids[10:21], "both ends inclusive"
    assert await range_of(at(10.5), at(10.6)) == []
    assert await range_of(at(-5)) == ids
    assert await range_of(at(99)) == ids[99:]
    assert await range_of(at(99.5)) == []
    assert await range_of(at(0), at(0)) == ids[:1]
    assert await range_of(datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)) == ids
    mixed = await runs.select(db, to, only_failed=False, after_id=ids[3], until=at(7))
    assert await chosen(db, mixed) == ids[4:8]


async def test_so_long_ago_is_by_the_databases_clock(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    now = await db.fetchval("SELECT now()")
    await emit(db, 3, at=now - timedelta(hours=3))
    new = await emit(db, 2, at=now - timedelta(hours=1))
    assert await chosen(db, await runs.select(db, to, only_failed=False, since=timedelta(hours=2))) == new
    assert (await runs.select(db, to, only_failed=False, since=timedelta(hours=4), until=timedelta(hours=2))).total == 3
    with pytest.raises(InputError, match="longer ago"):
        await runs.select(db, to, since=timedelta.max)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jitter=st.lists(st.floats(0, 4.9), min_size=1, max_size=40),
    ends=st.tuples(st.floats(-10, 60), st.floats(-10, 60)),
)
async def test_ids_and_times_that_disagree_a_little_lose_nothing(
    jitter: list[float], ends: tuple[float, float], db: asyncpg.Connection
) -> None:
    account = f"acct{await db.fetchval('SELECT webhook.last_id()')}"
    to = await endpoint(db, account)
    for n, late in enumerate(jitter):
        await emit(db, account=account, at=NOON + timedelta(seconds=n + late))
    since, until = (NOON + timedelta(seconds=s) for s in sorted(ends))
    got = set(await chosen(db, await runs.select(db, to, only_failed=False, since=since, until=until)))
    rows = await db.fetch("SELECT id, created_at FROM webhook.outbox WHERE account_id = $1", account)
    wanted = {row["id"] for row in rows if since <= row["created_at"] <= until}
    assert wanted <= got
    others = [row["created_at"] for row in rows if row["id"] in got - wanted]
    assert all(since - runs.SKEW < at < until + runs.SKEW for at in others), "only what stands between them"


async def test_ranges_that_contradict_themselves_are_refused(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    with pytest.raises(InputError, match="as a time or as an id"):
        await runs.select(db, to, since=NOON, after_id=4)
    with pytest.raises(InputError, match="as a time or as an id"):
        await runs.select(db, to, until=NOON, upto_id=4)
    with pytest.raises(InputError, match="not an outbox id"):
        await runs.select(db, to, after_id=-1)
    with pytest.raises(InputError, match="event-type pattern"):
        await runs.select(db, to, patterns=["Message"])


async def test_counting_is_bounded(dsn: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    to = await endpoint(db)
    await emit(db, 5)
    monkeypatch.setattr(runs, "COUNT_MAX", 4)
    with pytest.raises(InputError, match="more than 4 deliveries"):
        await runs.select(db, to, only_failed=False)
    async with connected(dsn) as other, other.transaction():
        await other.execute("LOCK TABLE webhook.outbox IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(InputError, match=r"longer than 0\.05 s"):
            await runs._count(db, await runs.target(db, to), 0, 10, ["*"], False, 0.05)
    assert (await runs.select(db, to, only_failed=False, upto_id=3)).total == 3, "the bound was that transaction's only"


async def test_counting_needs_no_statistics(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A join planned without them took a minute for 30,000 failures; index by index it is a moment."""
    async with connected(dsn) as db:
        to = await endpoint(db)
        await died(db, to, await emit(db, 20_000))
        monkeypatch.setattr(runs, "COUNT_TIMEOUT_S", 8)
        selection = await runs.select(db, to)
        assert selection.total == 20_000
        await db.execute("SET statement_timeout = '8s'")
        assert (await runs.create(db, selection, None)).total == 20_000


# ── making ──


async def test_a_replay_is_made_as_it_was_counted(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    ids = await emit(db, 10)
    seq = await db.fetchval("SELECT coalesce(max(seq), 0) FROM webhook.config_change")
    selection = await runs.select(db, to, only_failed=False, after_id=ids[1], patterns=["message.*"])
    await emit(db, 5)
    run = await runs.create(db, selection, 50, "after the outage")
    assert (run.after_id, run.upto_id, run.total, run.settled) == (ids[1], ids[-1], 8, ids[1])
    assert (run.kind, run.source, run.state, run.rate_per_s, run.note) == (
        "replay",
        "log",
        "running",
        50,
        "after the outage",
    )
    assert (run.patterns, run.only_failed, run.attempted, run.retrying) == (("message.*",), False, 0, 0)
    assert (
        await db.fetchval("SELECT count(*) FROM webhook.config_change WHERE seq > $1 AND endpoint_id = $2", seq, to)
        == 1
    )
    assert await runs.get(db, run.id) == run


async def test_nothing_to_send_is_not_a_run(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    with pytest.raises(InputError, match="nothing to send"):
        await begin(db, to)
    assert await db.fetchval("SELECT count(*) FROM webhook.run") == 0


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, 100_001])
async def test_bad_rates_are_refused(db: asyncpg.Connection, rate: float) -> None:
    to = await endpoint(db)
    await emit(db)
    with pytest.raises(InputError, match="rate"):
        await begin(db, to, rate, only_failed=False)


async def test_who_can_have_a_run(db: asyncpg.Connection) -> None:
    await emit(db)
    with pytest.raises(NotFoundError, match="no endpoint 99"):
        await runs.select(db, 99)
    with pytest.raises(NotFoundError, match="was deleted"):
        await runs.select(db, await endpoint(db, state="deleted"))
    with pytest.raises(StateError, match="is a draft"):
        await runs.select(db, await endpoint(db, state="draft"))
    for state in ("paused", "disabled"):
        run = await begin(db, await endpoint(db, state=state), only_failed=False)
        assert run.endpoint_state == state


async def test_an_endpoint_has_a_bounded_number_of_them(db: asyncpg.Connection) -> None:
    to, other = await endpoint(db), await endpoint(db)
    [event] = await emit(db)
    made = [await runs.resend(db, str(event), to) for _ in range(runs.UNFINISHED_MAX)]
    with pytest.raises(StateError, match="20 is the most"):
        await runs.resend(db, str(event), to)
    await runs.resend(db, str(event), other)
    await db.execute("UPDATE webhook.run_progress SET finished_at = now() WHERE run_id = $1", made[3].id)
    await runs.resend(db, str(event), to)


async def test_an_endpoint_that_is_deleted_meanwhile_gets_none(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    letters = await died(db, to, await emit(db))
    selection = await runs.select(db, to)
    await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", to)
    with pytest.raises(NotFoundError, match="was deleted"):
        await runs.create(db, selection, None)
    assert await states(db) == {letters[0]: "open"}, "nothing of it is left"
    assert await db.fetchval("SELECT count(*) FROM webhook.run") == 0


async def test_a_bad_note_is_refused(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    for note in ("x" * 501, "a\x00b"):
        with pytest.raises(InputError, match="note"):
            await runs.resend(db, str(event), to, note)


# ── one event ──


async def test_a_resend_is_a_run_of_one_id(db: asyncpg.Connection) -> None:
    to = await endpoint(db, event_types=["link.*"])
    first, event, _ = await emit(db, 3)
    created = await db.fetchval("SELECT created_at FROM webhook.outbox WHERE id = $1", event)
    key = await db.fetchval("SELECT id_key FROM webhook.instance")
    [public] = PublicIds(key).encode([(round(created.timestamp() * 1_000_000), event)])
    for reference in (str(event), public.decode()):
        run = await runs.resend(db, reference, to)
        assert (run.kind, run.source, run.after_id, run.upto_id, run.total, run.patterns, run.rate_per_s) == (
            "resend", "log", first, event, 1, ("*",), None,
        )  # fmt: skip


async def test_what_cant_be_resent_is_told(db: asyncpg.Connection) -> None:
    to, theirs = await endpoint(db), await endpoint(db, "other")
    [event] = await emit(db)
    with pytest.raises(InputError, match=r"belongs to account acct, endpoint \d+ to account other"):
        await runs.resend(db, str(event), theirs)
    for nothing in ("999", "evt_" + "0" * 32, str((1 << 63) - 1)[:18]):
        with pytest.raises(NotFoundError, match="there is no event"):
            await runs.resend(db, nothing, to)
    with pytest.raises(InputError, match="not an event id"):
        await runs.resend(db, "nonsense", to)
    assert await db.fetchval("SELECT count(*) FROM webhook.run") == 0


async def test_after_retention_it_is_sent_from_its_dead_letter(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event, delivered] = await emit(db, 2)
    [letter] = await died(db, to, [event])
    await retention(db)
    with pytest.raises(NotFoundError, match="no dead letter of endpoint"):
        await runs.resend(db, str(delivered), to)
    run = await runs.resend(db, str(event), to)
    assert (run.source, run.kind, run.total, run.after_id, run.upto_id) == (
        "dead_letter",
        "resend",
        1,
        event - 1,
        event,
    )
    row = await db.fetchrow("SELECT state, resent_run FROM webhook.dead_letter WHERE id = $1", letter)
    assert tuple(row) == ("resent", run.id)
    with pytest.raises(StateError, match=f"dead letter {letter} was resent by run {run.id}"):
        await runs.resend(db, str(event), to)
    await db.execute("UPDATE webhook.dead_letter SET state = 'discarded', payload = NULL")
    with pytest.raises(StateError, match="was discarded"):
        await runs.resend(db, str(event), to)


# ── the dead letters that a run covers ──


async def test_a_run_takes_the_open_dead_letters_that_it_covers(db: asyncpg.Connection) -> None:
    to, other = await endpoint(db), await endpoint(db)
    ids = await emit(db, 4)
    [link] = await emit(db, type="link.clicked")
    a, b, c, d = await died(db, to, ids)
    [e] = await died(db, to, [link])
    [f] = await died(db, other, ids[1:2])
    await attempted(db, to, ids[2:3], run=7)  # delivered since
    await db.execute("UPDATE webhook.dead_letter SET state = 'discarded', payload = NULL WHERE id = $1", d)
    run = await begin(db, to, after_id=ids[0], patterns=["message.*"])
    assert run.total == 2, "the discarded one is still in the log"
    assert await states(db) == {a: "open", b: "resent", c: "open", d: "discarded", e: "open", f: "open"}
    run = await runs.resend(db, str(ids[2]), to)
    assert (await states(db))[c] == "resent"


async def test_a_canceled_run_gives_back_what_it_did_not_come_to(
    db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PAGE", 2)
    to = await endpoint(db)
    ids = await emit(db, 7)
    letters = await died(db, to, ids)
    steps: list[int] = []
    run = await runs.create(db, await runs.select(db, to), None, step=steps.append)
    assert steps == [2, 2, 2, 2]
    assert set((await states(db)).values()) == {"resent"}
    await attempted(db, to, ids[:1], run=run.id)  # delivered
    again = await died(db, to, ids[1:2], run=run.id)  # given up once more
    await attempted(db, to, ids[2:3], run=run.id, fault="status")  # its retry ends with the run
    canceled = await runs.cancel(db, run.id)
    assert (canceled.state, canceled.is_open, canceled.retrying) == ("canceled", False, 0)
    now = await states(db)
    assert [now[letter] for letter in letters] == ["resent", "resent", "open", "open", "open", "open", "open"]
    assert now[again[0]] == "open"
    assert await db.fetchval("SELECT count(*) FROM webhook.dead_letter WHERE resent_run IS NOT NULL") == 2
    assert (await runs.cancel(db, run.id)).state == "canceled", "safe to repeat"


# ── following and changing ──


async def test_states_and_who_may_change_them(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    [event] = await emit(db)
    run = await runs.resend(db, str(event), to)
    assert (await runs.pause(db, run.id)).state == "paused"
    with pytest.raises(StateError, match="is paused; only one that is running can become paused"):
        await runs.pause(db, run.id)
    assert (await runs.set_rate(db, run.id, 3)).rate_per_s == 3
    assert (await runs.set_rate(db, run.id, None)).rate_per_s is None
    assert (await runs.resume(db, run.id)).state == "running"
    await db.execute(
        "UPDATE webhook.run_progress SET attempted = 1, delivered = 1, finished_at = now() WHERE run_id = $1", run.id
    )
    assert (await runs.get(db, run.id)).state == "finished"
    for change in (runs.pause, runs.resume, runs.cancel):
        with pytest.raises(StateError, match="finished"):
            await change(db, run.id)
    with pytest.raises(StateError, match="finished; its rate"):
        await runs.set_rate(db, run.id, 5)
    for missing in (0, 99, 1 << 40):
        with pytest.raises(NotFoundError, match="there is no run"):
            await runs.get(db, missing)


async def test_the_list_by_endpoint_account_state_and_page(db: asyncpg.Connection) -> None:
    to, theirs = await endpoint(db), await endpoint(db, "other")
    [event], [their_event] = await emit(db), await emit(db, account="other")
    a = await runs.resend(db, str(event), to)
    b = await runs.resend(db, str(their_event), theirs)
    c = await runs.resend(db, str(event), to)
    d = await runs.resend(db, str(event), to)
    await db.execute("UPDATE webhook.run_progress SET finished_at = now() WHERE run_id = $1", a.id)
    await runs.cancel(db, c.id)
    await runs.pause(db, d.id)

    async def ids(**how) -> list[int]:
        return [run.id for run in await runs.find(db, **how)]

    assert await ids() == [a.id, b.id, c.id, d.id]
    assert await ids(limit=2, after=a.id) == [b.id, c.id]
    assert await ids(state="open") == [b.id, d.id]
    assert await ids(state="finished") == [a.id]
    assert await ids(state="canceled") == [c.id]
    assert await ids(state="paused", endpoint_id=to) == [d.id]
    assert await ids(account_id="other") == [b.id]
    await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", theirs)
    assert (await runs.get(db, b.id)).state == "canceled", "nothing goes to a deleted endpoint"
    assert await ids(state="open") == [d.id]


async def test_what_waits_for_a_retry(db: asyncpg.Connection) -> None:
    to = await endpoint(db)
    ids = await emit(db, 3)
    run = await begin(db, to, only_failed=False)
    assert await runs.next_due(db, run.id) is None
    await retrying(db, to, ids[:1], run=run.id)
    await db.execute("UPDATE webhook.run_progress SET attempted = 3, delivered = 1, dead = 1 WHERE run_id = $1", run.id)
    assert (await runs.get(db, run.id)).retrying == 1
    assert await runs.next_due(db, run.id) is not None


async def test_whether_a_dispatcher_is_at_work(db: asyncpg.Connection) -> None:
    assert not await runs.is_dispatching(db)
    await db.execute("UPDATE webhook.checkpoint SET heartbeat_at = clock_timestamp()")
    assert await runs.is_dispatching(db)


# ── plans ──


async def test_no_statement_reads_a_big_table_from_end_to_end(db: asyncpg.Connection) -> None:
    """With the numbers that a big database has; a seq scan of a table of a million would be seconds."""
    await db.execute(
        "SET enable_seqscan = off"
    )  # on tables this small they would always win; what has no index is found all the same
    arguments = {
        "first_event_from": "'a', 5", "first_since": "'a', 1, 9, now()", "last_until": "'a', 1, 9, now()",
        "count_all": "'a', 1, 9, NULL, '{}', 100, NULL", "count_failed": "'a', 1, 9, NULL, '{}', 100, 7, NULL", "event": "5",
        "dead_letters_bound": "1, 2, 3, 4", "take_dead_letters": "1, 7, 1, 9, NULL, '{}', true, NULL", "may_have": "5, 7, NULL",
        "dead_letters_of": "7, 5",
        "next_due": "3", "reopen_bound": "3, 0, 10", "reopen": "3, 0, 9", "target": "7",
    }  # fmt: skip
    for name, values in arguments.items():
        await db.execute(f"PREPARE s_{name} AS {getattr(runs.RUNS, name)}")
        plan = await db.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE s_{name} ({values})")
        assert "Seq Scan" not in plan, f"{name}: {plan}"


async def test_a_run_over_failures_takes_no_dead_letter_that_it_passes_over(db: asyncpg.Connection) -> None:
    """Of an event that has expired once: taken, it was never sent, and never open again."""
    to = await endpoint(db)
    ids = await emit(db, 2)
    await died(db, to, ids, run=5)
    await attempted(db, to, ids[:1], number=0, fault="expired")
    run = await runs.create(db, await runs.select(db, to), 5.0)
    taken = await db.fetch("SELECT event_id FROM webhook.dead_letter WHERE resent_run = $1", run.id)
    assert [row["event_id"] for row in taken] == ids[1:]
