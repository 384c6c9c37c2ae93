"""Field filters while the dispatcher runs: what they leave out is sent on no path and holds nothing up. Real PostgreSQL, real sockets."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest

from dispatcher.errors import InputError
from dispatcher.sink import Behaviour
from dispatcher.store import runs
from dispatcher.store.admin import Admin
from tests.conftest import connected
from tests.rig import SECRET, Rig, rig, until
from tests.test_endpoint_life import admin, quiet
from tests.test_runs import finished

QUICK = {"retry_schedule_s": (1, 1), "breaker_wait_s": 0.2, "breaker_wait_max_s": 0.4}


@pytest.fixture
async def r(dsn: str) -> AsyncIterator[Rig]:
    async with rig(dsn, **QUICK) as made:
        yield made


async def create(r: Rig, path: str, **filters: list[str]) -> int:
    config = {"url": r.sink.url + path, "filters": filters}
    view = await admin(r).create("acct", config, live=True, secret=SECRET)
    await until(lambda: r.has_taken_up(view.id), what=f"endpoint {view.id} is known and live")
    return view.id


async def emit(r: Rig | asyncpg.Connection, *colours: str) -> list[int]:
    """One event for each, of which `reference` is the colour."""
    db = r.db if isinstance(r, Rig) else r
    return [
        await db.fetchval(
            "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', $1) RETURNING id",
            orjson.dumps({"message": {"reference": colour}}).decode(),
        )
        for colour in colours
    ]


def colours_at(r: Rig, path: str, *, taken: bool = True) -> list[str]:
    bodies = [orjson.loads(e.body) for e in r.received if e.path == path and (e.status == 204) is taken]
    return sorted(body["data"]["message"]["reference"] for body in bodies)


async def attempted(r: Rig, endpoint_id: int, **where: Any) -> list[int]:
    return sorted({row["event_id"] for row in await r.attempts(endpoint_id=endpoint_id, **where)})


async def test_the_head_sends_what_passes_and_passes_the_rest(r: Rig) -> None:
    red, both, every = (
        await create(r, "/red", reference=["red"]),
        await create(r, "/both", reference=["red", "blue"]),
        await create(r, "/every"),
    )
    ids = await emit(r, "red", "blue", "green", "red")
    await r.settled()
    assert await attempted(r, red) == [ids[0], ids[3]]
    assert await attempted(r, both) == [ids[0], ids[1], ids[3]]
    assert await attempted(r, every) == ids
    assert colours_at(r, "/red") == ["red", "red"]
    await quiet(r)


async def test_names_are_anded_and_a_type_without_the_field_is_left_out(r: Rig) -> None:
    endpoint = await create(r, "/hook", reference=["red"], status=["delivered"])
    for payload, event_type in (
        ({"message": {"reference": "red"}, "receipt": {"status": "delivered"}}, "message.delivered"),
        ({"message": {"reference": "red"}, "receipt": {"status": "failed"}}, "message.failed"),
        ({"reference": "red"}, "contact.opted_out"),
        ({"message": {"reference": "red"}, "receipt": {"status": "delivered"}}, "something.else"),
    ):
        await r.emit(type=event_type, payload=orjson.dumps(payload).decode())
    await r.settled()
    assert len(await attempted(r, endpoint)) == 1


async def test_a_lane_that_lags(r: Rig) -> None:
    red = await create(r, "/red", reference=["red"])
    await admin(r).pause(red)
    lane = r.engine.incarnation.lanes.get(red)
    await until(lambda: lane.held)
    ids = await emit(r, *["green"] * 30, "red", *["green"] * 30)
    waiting = await admin(r).waiting(await admin(r).get(red))
    assert (waiting.held, waiting.before) == (1, 0), "only what passes is held"
    await admin(r).resume(red)
    await r.settled()
    assert await attempted(r, red) == [ids[30]]
    await quiet(r)


async def test_what_is_skipped_or_deleted_counts_what_passes_only(r: Rig) -> None:
    red = await create(r, "/red", reference=["red"])
    await admin(r).pause(red)
    await until(lambda: r.engine.incarnation.lanes.get(red).held)
    await emit(r, "green", "red", "green", "red")
    _, skipped = await admin(r).resume(red, "skip")
    assert skipped == 2
    await admin(r).pause(red)
    await emit(r, "green", "red", "blue")
    assert await admin(r).delete(red) == 1
    await until(lambda: r.engine.incarnation.lanes.get(red) is None)
    assert colours_at(r, "/red") == []


async def test_a_gap(r: Rig, dsn: str) -> None:
    red = await create(r, "/red", reference=["red"])
    async with connected(dsn) as late:
        transaction = late.transaction()
        await transaction.start()
        held = await emit(late, "green", "red", "green")
        after = await emit(r, "red", "green")
        await until(lambda: len(colours_at(r, "/red")) == 1)
        await transaction.commit()
    await r.settled()
    assert await attempted(r, red) == [held[1], after[0]]
    await quiet(r)


async def test_retries_go_on_after_an_edit_that_would_leave_them_out(r: Rig) -> None:
    """What was handed out before the edit is owed, by the filters of then."""
    endpoint = await create(r, "/hook", reference=["red"])
    r.sink.set_behaviour("/hook", Behaviour(status=500))
    [red] = await emit(r, "red")
    await until(lambda: r.db.fetchval("SELECT count(*) FROM webhook.retry"))
    await admin(r).update(endpoint, {"filters": {"reference": ["blue"]}}, live=True)
    r.sink.set_behaviour("/hook", Behaviour(status=204))
    after = await emit(r, "red", "blue")
    await until(lambda: len(colours_at(r, "/hook")) == 2)
    await r.settled()
    assert await attempted(r, endpoint) == [red, after[1]]
    await quiet(r)


async def test_an_edit_holds_for_what_is_committed_right_after_it(r: Rig) -> None:
    """However soon: the reader waits for the change that its page has seen, if nobody rang for it."""
    endpoint = await create(r, "/hook", reference=["red"])
    await r.settled()
    config = r.engine.incarnation.config
    config.ring = lambda: None
    expected = []
    for _ in range(10):
        await admin(r).update(endpoint, {"filters": {"reference": ["blue"]}}, live=True)
        expected.append((await emit(r, "red", "blue"))[1])
        await admin(r).update(endpoint, {"filters": {"reference": ["red"]}}, live=True)
        expected.append((await emit(r, "red", "blue"))[0])
    await until(lambda: len(colours_at(r, "/hook")) >= len(expected))
    await r.settled()
    assert await attempted(r, endpoint) == expected


async def test_an_edit_holds_from_one_id_on(r: Rig) -> None:
    endpoint = await create(r, "/hook", reference=["red"])
    await admin(r).pause(endpoint)
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)
    before = await emit(r, "red", "blue")
    await admin(r).update(endpoint, {"filters": {"reference": ["blue"]}}, live=True)
    between = await emit(r, "red", "blue")
    await admin(r).update(endpoint, {"filters": {}}, live=True)
    after = await emit(r, "red", "blue")
    await admin(r).resume(endpoint)
    await r.settled()
    assert await attempted(r, endpoint) == [before[0], between[1], *after]
    await quiet(r)


async def test_a_replay_passes_the_filters_of_now(r: Rig) -> None:
    endpoint = await create(r, "/hook")
    ids = await emit(r, "red", "blue", "red")
    await r.settled()
    await admin(r).update(endpoint, {"filters": {"reference": ["red"]}}, live=True)
    chosen = await runs.select(r.db, endpoint, only_failed=False, upto_id=ids[-1])
    assert chosen.total == 2, "what is counted is what is sent"
    run = await runs.create(r.db, chosen, None)
    await admin(r).update(endpoint, {"filters": {"reference": ["blue"]}}, live=True)
    await finished(r, run.id)
    assert await attempted(r, endpoint, run=run.id) == [ids[0], ids[2]]
    await quiet(r)


async def test_a_resend_takes_what_was_owed_or_passes_now_and_nothing_else(r: Rig) -> None:
    endpoint = await create(r, "/hook", reference=["red"])
    red, blue = await emit(r, "red", "blue")
    await r.settled()
    with pytest.raises(InputError, match="field filters that leave event"):
        await runs.resend(r.db, str(blue), endpoint)
    await admin(r).update(endpoint, {"filters": {"reference": ["blue"]}}, live=True)
    again = [await runs.resend(r.db, str(event), endpoint) for event in (red, blue)]
    await finished(r, *[run.id for run in again])
    assert colours_at(r, "/hook") == ["blue", "red", "red"]


async def test_dead_letters_that_a_replay_leaves_out_stay_open(r: Rig) -> None:
    endpoint = await create(r, "/hook")
    r.sink.set_behaviour("/hook", Behaviour(status=400))
    await r.db.execute("UPDATE webhook.endpoint SET retry_schedule_s = '{1}' WHERE id = $1", endpoint)
    red, blue = await emit(r, "red", "blue")
    await until(lambda: r.db.fetchval("SELECT count(*) = 2 FROM webhook.dead_letter"), within_s=30)
    await admin(r).update(endpoint, {"filters": {"reference": ["red"]}}, live=True)
    r.sink.set_behaviour("/hook", Behaviour(status=204))
    chosen = await runs.select(r.db, endpoint, only_failed=True)
    assert chosen.total == 1
    run = await runs.create(r.db, chosen, None)
    await finished(r, run.id)
    states = await r.db.fetch("SELECT event_id, state FROM webhook.dead_letter ORDER BY event_id")
    assert [tuple(row) for row in states] == [(red, "resent"), (blue, "open")]


async def test_a_restart_reads_on_past_what_was_left_out(r: Rig) -> None:
    red = await create(r, "/red", reference=["red"])
    await emit(r, *["green"] * 20)
    await r.settled()
    await r.stop()
    ids = await emit(r, "green", "red", "green")
    await r.start()
    await r.settled()
    assert await attempted(r, red) == [ids[1]]
    await quiet(r)


async def test_what_the_dispatcher_tells_is_not_filtered(r: Rig) -> None:
    await create(r, "/told", reference=["red"])
    other = await create(r, "/other")
    await admin(r).disable(other)
    await until(lambda: r.by_path()["/told"])
    assert [orjson.loads(e.body)["type"] for e in r.received if e.path == "/told"] == ["endpoint.disabled"]


async def test_an_event_says_that_a_filter_left_it_out(r: Rig) -> None:
    red = await create(r, "/red", reference=["red"])
    [green] = await emit(r, "green")
    await r.settled()
    [delivery] = (await admin(r).events.show(str(green)))["deliveries"]
    assert (delivery["endpoint_id"], delivery["fate"]) == (red, "not sent: its filters leave this event out")


async def test_filters_belong_to_the_tested_configuration(r: Rig) -> None:
    people: Admin = admin(r)
    endpoint = await create(r, "/hook", reference=["red"])
    view = await people.get(endpoint)
    edited = await people.update(endpoint, {"filters": {"reference": ["red", "blue"]}})
    assert edited.changes == {"filters": ({"reference": ["red"]}, {"reference": ["blue", "red"]})}
    assert edited.test_hash != view.test_hash
    withdrawn = await people.update(endpoint, {"filters": {"reference": ["red"]}})
    assert (withdrawn.proposed, withdrawn.test_hash) == (None, view.test_hash)
    with pytest.raises(InputError, match="not a field that the catalogue"):
        await people.update(endpoint, {"filters": {"colour": ["red"]}})
