"""`webhook-delivery` in an answer: obeyed where the endpoint says so, and only there. Real PostgreSQL, real sockets."""

from collections.abc import AsyncIterator

import pytest

from dispatcher.sink import Behaviour
from dispatcher.store import runs
from tests.rig import Rig, rig, until
from tests.test_endpoint_life import admin, quiet


@pytest.fixture
async def r(dsn: str) -> AsyncIterator[Rig]:
    async with rig(dsn, retry_schedule_s=(1, 1)) as made:
        yield made


async def state_of(r: Rig, endpoint_id: int) -> tuple[str, str | None]:
    return tuple(await r.db.fetchrow("SELECT state, state_reason FROM webhook.endpoint WHERE id = $1", endpoint_id))


async def dead_letters(r: Rig, count: int) -> bool:
    return await r.db.fetchval("SELECT count(*) = $1 FROM webhook.dead_letter", count)


async def test_abort_message_is_a_dead_letter_after_one_attempt(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=500, command="abort-message"), response_control=True)
    ids = await r.emit(10)
    await until(lambda: dead_letters(r, 10))
    rows = await r.db.fetch("SELECT event_id, attempts, reason, state FROM webhook.dead_letter ORDER BY event_id")
    assert [tuple(row) for row in rows] == [(event, 1, "aborted by its receiver", "open") for event in ids]
    lane = r.engine.incarnation.lanes.get(endpoint)
    assert (lane.breaker.consecutive, lane.failing_since_us) == (0, None), "ten in a row, and it is healthy"
    await quiet(r)


@pytest.mark.parametrize("status", [204, 500])
async def test_disable_stops_the_endpoint_and_loses_nothing(r: Rig, status: int) -> None:
    other = await r.endpoint("/other")
    endpoint = await r.endpoint(behaviour=Behaviour(status=status, command="disable"), response_control=True)
    first = await r.emit()
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)
    assert await state_of(r, endpoint) == ("disabled", "by_receiver")
    await until(lambda: r.db.fetchval("SELECT count(*) > 0 FROM webhook.outbox WHERE type = 'endpoint.disabled'"))
    second = await r.emit()
    r.sink.set_behaviour("/hook", Behaviour())
    await admin(r).enable(endpoint, "send")
    await r.settled()
    delivered = [row["event_id"] for row in await r.attempts(endpoint_id=endpoint) if row["fault"] is None]
    assert {*first, *second} <= {*delivered}
    assert len(delivered) == len({*delivered}), "what was delivered by the answer that disabled is not sent again"
    assert await r.attempts(endpoint_id=other)
    await quiet(r)


@pytest.mark.parametrize("command", ["disable", "abort-message"])
async def test_who_did_not_ask_for_it_is_not_obeyed(r: Rig, command: str) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=500, command=command))
    [event] = await r.emit()
    await until(lambda: r.db.fetchval("SELECT number = 3 FROM webhook.retry"))
    assert await state_of(r, endpoint) == ("live", None)
    assert len(await r.attempts(event_id=event)) >= 2


async def test_a_change_is_taken_up(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=204, command="disable"))
    await r.emit()
    await r.settled()
    await admin(r).update(endpoint, {"response_control": True}, live=True)
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).endpoint.response_control)
    await r.emit()
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)


async def test_an_aborted_delivery_can_be_resent(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=500, command="abort-message"), response_control=True)
    [event] = await r.emit()
    await until(lambda: dead_letters(r, 1))
    r.sink.set_behaviour("/hook", Behaviour())
    await runs.resend(r.db, str(event), endpoint)
    await until(lambda: any(e.status == 204 for e in r.received))
