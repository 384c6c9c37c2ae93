"""An endpoint's life while the dispatcher runs: held and sent, held and skipped, disabled and enabled, edited behind the gate, its secret
rotated, deleted; and what its account's other endpoints are told of it. Real PostgreSQL, real sockets."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from dispatcher.domain.shape import make_shape
from dispatcher.domain.signing import new_secret
from dispatcher.domain.url import parse_url
from dispatcher.engine.trial import TEST_TYPE, try_endpoint
from dispatcher.errors import InputError, StateError
from dispatcher.sink import Behaviour
from dispatcher.store.admin import SECRETS_MAX, Admin, Choice
from tests.rig import SECRET, Rig, rig, until

VIOLATIONS = (Path(__file__).parent / "invariant.sql").read_text()


def admin(r: Rig) -> Admin:
    return Admin(r.db, r.settings)


def types_at(r: Rig, path: str) -> list[str]:
    """The types of what arrived at a path and was taken, in order."""
    return [orjson.loads(e.body)["type"] for e in r.received if e.path == path and e.status == 204]


def numbers_at(r: Rig, path: str = "/hook") -> list[int]:
    """The payloads' n of what arrived at a path and was taken, in order."""
    bodies = [orjson.loads(e.body) for e in r.received if e.path == path and e.status == 204]
    return [body["data"]["n"] for body in bodies if "n" in body["data"]]


async def emit(r: Rig, *numbers: int, **columns: Any) -> list[int]:
    return [(await r.emit(payload=f'{{"n": {n}}}', **columns))[0] for n in numbers]


async def discards(r: Rig, endpoint_id: int) -> list[tuple[str, int, int, int]]:
    rows = await r.db.fetch(
        "SELECT reason, after_id, upto_id, deliveries FROM webhook.discard WHERE endpoint_id = $1 ORDER BY id",
        endpoint_id,
    )
    return [tuple(row) for row in rows]


async def stops(r: Rig, endpoint_id: int) -> None:
    """Wait until the engine holds the endpoint's lane."""
    assert r.engine.incarnation is not None
    lane = r.engine.incarnation.lanes.get(endpoint_id)
    assert lane is not None
    await until(lambda: lane.held, what=f"endpoint {endpoint_id} is held")


async def passed_by(r: Rig, event_ids: Sequence[int]) -> None:
    """Wait until the reader has passed these events: whoever takes them live has taken them."""
    await until(lambda: r.engine.incarnation is not None and r.engine.incarnation.reader.head >= max(event_ids))


async def quiet(r: Rig) -> None:
    """Wait until every lane is live with nothing in hand, and check the invariant."""

    def idle() -> bool:
        assert r.engine.incarnation is not None
        return all(
            lane.held or (lane.live and not lane.hands and not lane.in_flight) for lane in r.engine.incarnation.lanes
        )

    await until(idle, what="lanes idle")
    assert [tuple(row) for row in await r.db.fetch(VIOLATIONS)] == []


# ── pause: hold and send, hold and skip, skip ──


async def test_what_was_held_is_sent_on_resume(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await emit(r, 1, 2)
        await until(lambda: len(r.received) == 2)
        await admin(r).pause(endpoint)
        await stops(r, endpoint)
        await passed_by(r, await emit(r, 3, 4, 5))
        view = await admin(r).get(endpoint)
        waiting = await admin(r).waiting(view)
        assert (waiting.held, waiting.before, waiting.retries, waiting.skipping) == (3, 0, 0, False)
        assert numbers_at(r) == [1, 2]
        _, skipped = await admin(r).resume(endpoint)
        await emit(r, 6)
        await r.settled()
        assert (skipped, sorted(numbers_at(r))) == (0, [1, 2, 3, 4, 5, 6])
        assert await discards(r, endpoint) == []
        await quiet(r)


async def test_what_was_held_is_skipped_and_counted_and_what_came_before_is_sent(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(types=("message.*",), rate_per_s=0.01, rate_burst=1)
        await emit(r, 1, 2, 3)
        await until(lambda: len(r.received) == 1)  # two wait for a token
        paused = await admin(r).pause(endpoint)
        await stops(r, endpoint)
        last = await emit(r, 4, 5, 6)
        await emit(r, 7, type="link.clicked")
        await emit(r, 8, account="another")
        waiting = await admin(r).waiting(paused)
        assert (waiting.held, waiting.before) == (3, 2)
        _, skipped = await admin(r).resume(endpoint, "skip")
        assert skipped == 3
        await r.db.execute("UPDATE webhook.endpoint SET rate_per_s = NULL, rate_burst = NULL")
        await emit(r, 9)
        await until(lambda: 9 in numbers_at(r))
        await quiet(r)
        assert sorted(numbers_at(r)) == [1, 2, 3, 9]
        assert await discards(r, endpoint) == [("skipped", paused.paused_at_id, last[-1] + 2, 3)]


async def test_a_pause_that_skips_holds_nothing(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(types=("message.*",), event_types=["message.*"])
        await emit(r, 1)
        await until(lambda: r.received)
        paused = await admin(r).pause(endpoint, skip=True)
        await stops(r, endpoint)
        await emit(r, 2, 3)
        assert (await admin(r).waiting(paused)).skipping
        assert (await admin(r).waiting(paused)).held == 0
        # An edit doesn't bring the events back by the back door.
        edited = await admin(r).update(endpoint, {"event_types": ["message.*", "link.*"]}, live=True)
        assert (edited.state, edited.state_reason) == ("paused", "by operator; edited live")
        await emit(r, 4, type="link.clicked")
        with pytest.raises(StateError, match="nothing to send"):
            await admin(r).resume(endpoint, "send")
        _, skipped = await admin(r).resume(endpoint)
        assert skipped == 3
        await emit(r, 5)
        await emit(r, 6, type="link.clicked")
        await until(lambda: len(r.received) == 3)
        await quiet(r)
        assert sorted(numbers_at(r)) == [1, 5, 6]
        assert [(reason, count) for reason, _, _, count in await discards(r, endpoint)] == [("skipped", 3)]


async def test_a_pattern_that_was_opened_or_closed_while_paused_is_skipped_too(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(types=("message.*",), event_types=["message.*"])
        await admin(r).pause(endpoint)
        await stops(r, endpoint)
        await emit(r, 1)
        await admin(r).update(endpoint, {"event_types": ["link.*"]}, live=True)
        await emit(r, 2, type="link.clicked")  # held by the new pattern
        await emit(r, 3)  # nobody's
        assert (await admin(r).waiting(await admin(r).get(endpoint))).held == 2
        assert (await admin(r).resume(endpoint, "skip"))[1] == 2
        await emit(r, 4, type="link.clicked")
        await until(lambda: r.received)
        await quiet(r)
        assert numbers_at(r) == [4]


async def test_a_pause_that_was_skipped_before_the_engine_saw_it(dsn: str) -> None:
    """Pause and resume within one look of the engine: what is queued and no longer owed is not sent."""
    async with rig(dsn) as r:
        endpoint = await r.endpoint(rate_per_s=0.01, rate_burst=1)
        await passed_by(r, await emit(r, 1, 2))
        await until(lambda: r.received)
        async with r.db.transaction():
            await admin(r).pause(endpoint)
            await passed_by(r, await _by_another(r, 3))
            assert (await admin(r).resume(endpoint, "skip"))[1] == 1
        await r.db.execute("UPDATE webhook.endpoint SET rate_per_s = NULL, rate_burst = NULL")
        await emit(r, 4)
        await until(lambda: 4 in numbers_at(r))
        await quiet(r)
        assert sorted(numbers_at(r)) == [1, 2, 4]


async def _by_another(r: Rig, n: int) -> list[int]:
    connection = await asyncpg.connect(r.dsn)
    try:
        return [
            await connection.fetchval(
                "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', $1) RETURNING id",
                f'{{"n": {n}}}',
            )
        ]
    finally:
        await connection.close()


@pytest.mark.parametrize("choice", ["send", "skip"])
async def test_bounds_hold_over_a_restart(dsn: str, choice: Choice) -> None:
    """Nobody was running when it happened: the bounds in the database decide."""
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await emit(r, 1)
        await r.settled()
        await r.kill()
        await emit(r, 2)  # handed out before the pause
        await admin(r).pause(endpoint)
        await emit(r, 3, 4)
        await admin(r).resume(endpoint, choice)
        await emit(r, 5)
        await r.start()
        await until(lambda: 5 in numbers_at(r))
        await quiet(r)
        assert sorted(set(numbers_at(r))) == ([1, 2, 3, 4, 5] if choice == "send" else [1, 2, 5])


async def test_bounds_hold_for_events_that_are_committed_late(dsn: str) -> None:
    """What was handed out before the pause is owed though it becomes visible after it; what was handed out during it is not."""
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        before, during = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        insert = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'message.sent', $1)"
        early, late = before.transaction(), during.transaction()
        await early.start()
        await before.execute(insert, '{"n": 1}')
        await admin(r).pause(endpoint)
        await late.start()
        await during.execute(insert, '{"n": 2}')
        await stops(r, endpoint)
        assert (await admin(r).resume(endpoint, "skip"))[1] == 0
        await emit(r, 3)
        await until(lambda: 3 in numbers_at(r))
        await late.commit()
        await early.commit()
        await until(lambda: 1 in numbers_at(r))
        await r.settled()
        assert sorted(numbers_at(r)) == [1, 3]
        await before.close()
        await during.close()


async def test_ten_thousand_skipped_events_are_not_read(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await admin(r).pause(endpoint)
        await stops(r, endpoint)
        await passed_by(r, await r.emit(10_000))
        assert (await admin(r).resume(endpoint, "skip"))[1] == 10_000
        reads = r.engine.counters.lag_reads
        await emit(r, 1)
        await until(lambda: r.received)
        await quiet(r)
        assert r.engine.counters.lag_reads - reads < 10, "fifty pages of 200"
        assert numbers_at(r) == [1]


# ── disabled and enabled ──


@pytest.mark.parametrize("choice", ["send", "skip"])
async def test_disabled_by_410_and_enabled_again(dsn: str, choice: Choice) -> None:
    async with rig(dsn) as r:
        gone = await r.endpoint("/gone", behaviour=Behaviour(status=410))
        await r.endpoint("/other", types=("endpoint.*",))
        await emit(r, 1)
        await until(lambda: types_at(r, "/other") == ["endpoint.disabled"])
        await until(lambda: r.db.fetchval("SELECT count(*) FROM webhook.dead_letter"))
        view = await admin(r).get(gone)
        assert (view.state, view.state_reason, view.dead_letters) == ("disabled", "gone", 1)
        await emit(r, 2, 3)
        with pytest.raises(
            StateError, match=r"has held events since it was disabled \(2\): .* say --send .* or --skip"
        ):
            await admin(r).enable(gone)
        with pytest.raises(StateError, match=f"dispatcher endpoint enable {gone}"):
            await admin(r).resume(gone)
        r.sink.set_behaviour("/gone", Behaviour())
        _, skipped = await admin(r).enable(gone, choice)
        await emit(r, 4)
        await until(lambda: 4 in numbers_at(r, "/gone"))
        await until(lambda: len(types_at(r, "/other")) == 2)
        await quiet(r)
        assert sorted(numbers_at(r, "/gone")) == ([2, 3, 4] if choice == "send" else [4])
        assert skipped == (0 if choice == "send" else 2)
        assert set(types_at(r, "/gone")) == {"message.sent"}, "it is not told of itself"
        told = [orjson.loads(e.body)["data"] for e in r.received if e.path == "/other"]
        about = {"id": gone, "name": "", "url": r.sink.url + "/"}  # others aren't told its path
        assert [(data["endpoint"], data["reason"]) for data in told] == [(about, "gone"), (about, "enabled")]
        assert told[0]["failing_since"] == told[1]["failing_since"]


async def test_nothing_held_needs_no_choice(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        view = await admin(r).disable(endpoint, "ticket 4711")
        assert (view.state, view.state_reason) == ("disabled", "ticket 4711")
        await stops(r, endpoint)
        view, skipped = await admin(r).enable(endpoint)
        assert (view.state, view.state_reason, skipped) == ("live", None, 0)
        await emit(r, 1)
        await until(lambda: numbers_at(r) == [1])
        await quiet(r)


async def test_an_endpoint_that_is_paused_and_then_disabled_has_held_since_the_pause(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint()
        await admin(r).pause(endpoint)
        await stops(r, endpoint)
        await emit(r, 1)
        await admin(r).disable(endpoint)
        await emit(r, 2)
        assert (await admin(r).enable(endpoint, "skip"))[1] == 2
        await emit(r, 3)
        await until(lambda: numbers_at(r) == [3])
        await quiet(r)


async def test_the_other_endpoints_are_told_and_never_itself(dsn: str) -> None:
    """Both are subscribed to everything and live. The reader mostly meets the event before the engine knows of the change."""
    async with rig(dsn) as r:
        a, b = await r.endpoint("/a"), await r.endpoint("/b")
        for n in range(1, 6):
            await admin(r).disable(a)
            await until(lambda n=n: len(types_at(r, "/b")) == 2 * n - 1)
            await admin(r).enable(a)
            await until(lambda n=n: len(types_at(r, "/b")) == 2 * n)
        await admin(r).disable(b)
        await until(lambda: types_at(r, "/a") == ["endpoint.disabled"])
        await quiet(r)
        assert types_at(r, "/b") == ["endpoint.disabled", "endpoint.recovered"] * 5
        told = [orjson.loads(e.body)["data"] for e in r.received if e.path == "/b"]
        assert {data["endpoint"]["id"] for data in told} == {a}
        assert [data["reason"] for data in told] == ["by_operator", "enabled"] * 5
        assert [set(data) for data in told[:2]] == [
            {"endpoint", "reason", "failing_since", "held_events"},
            {"endpoint", "reason", "failing_since"},
        ]
        # Not even later: the lane that reads everything once more finds that it is not for it.
        await r.stop()
        await r.start()
        await admin(r).enable(b, "send")
        await until(lambda: types_at(r, "/a") == ["endpoint.disabled", "endpoint.recovered"])
        await quiet(r)
        assert types_at(r, "/b") == ["endpoint.disabled", "endpoint.recovered"] * 5


@pytest.mark.parametrize("failing_after_s", [0, 900])
async def test_a_long_trouble_and_its_end_are_told(dsn: str, failing_after_s: int) -> None:
    async with rig(dsn, retry_schedule_s="1,1,1,1,1,1,1,1", failing_after_s=failing_after_s) as r:
        endpoint = await r.endpoint("/a", behaviour=Behaviour(status=500))
        await r.endpoint("/b", types=("endpoint.*",))
        await emit(r, 1)
        noted = "SELECT failing_since FROM webhook.endpoint WHERE id = $1"
        since = await until(lambda: r.db.fetchval(noted, endpoint))
        if failing_after_s == 0:
            await until(lambda: types_at(r, "/b") == ["endpoint.failing"])
        r.sink.set_behaviour("/a", Behaviour())

        async def recovered() -> bool:
            return await r.db.fetchval(noted, endpoint) is None

        await until(recovered)
        if failing_after_s == 0:
            await until(lambda: len(types_at(r, "/b")) == 2)
        await quiet(r)
        told = [orjson.loads(e.body)["data"] for e in r.received if e.path == "/b"]
        assert types_at(r, "/b") == (["endpoint.failing", "endpoint.recovered"] if failing_after_s == 0 else [])
        reasons = ["consecutive_failures", "delivered"][: len(told)]
        assert [(data["endpoint"]["id"], data["reason"]) for data in told] == [(endpoint, reason) for reason in reasons]
        for data in told:
            assert data["failing_since"] == since.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        assert types_at(r, "/a") == ["message.sent"]


async def test_enabling_forgets_for_how_long_it_had_been_failing(dsn: str) -> None:
    """Else the first failure after five days' worth would disable it again."""
    async with rig(dsn, disable_after_s=86_400, retry_schedule_s="1,1,1,1,1,1,1,1", breaker_wait_s=0.1) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500))
        await r.stop()
        await r.db.execute("UPDATE webhook.endpoint SET failing_since = now() - interval '2 days'")
        await r.start()
        await emit(r, 1)

        async def is_disabled() -> bool:
            return (await admin(r).get(endpoint)).state == "disabled"

        await until(is_disabled)
        await stops(r, endpoint)
        await admin(r).enable(endpoint)
        count = len(r.received)
        await until(lambda: len(r.received) >= count + 2)
        assert not await is_disabled()


# ── the gate ──


async def tried(r: Rig, endpoint_id: int) -> bool:
    """Test an endpoint as the command does."""
    view = await admin(r).get(endpoint_id)
    trial = await try_endpoint(
        r.transport, parse_url(view.to_test["url"], r.settings.address_policy), view.secrets, view.account_id, timeout_s=5,
        user_agent=r.settings.user_agent, event_type=TEST_TYPE, data={}, shape=make_shape(view.to_test),
    )  # fmt: skip
    await admin(r).record_test(
        view, passed=trial.passed, duration_us=trial.duration_us, status=trial.outcome.status, fault=None, verdict=trial.verdict,
        request=trial.request, response_head=None,
    )  # fmt: skip
    return trial.passed


async def test_an_edit_is_a_draft_until_its_own_test_has_passed(dsn: str) -> None:
    async with rig(dsn) as r:
        made = await admin(r).create("acct", {"url": r.sink.url + "/old"})
        endpoint = made.id
        await emit(r, 0)  # a draft gets nothing
        with pytest.raises(StateError, match="has not passed a test"):
            await admin(r).go_live(endpoint)
        assert await tried(r, endpoint)
        view = await admin(r).go_live(endpoint)
        assert (view.state, view.state_reason, view.tested) == ("live", None, True)
        await until(lambda: r.has_taken_up(endpoint))
        await emit(r, 1)
        await until(lambda: numbers_at(r, "/old") == [1])

        r.sink.set_behaviour("/new", Behaviour(status=500))
        view = await admin(r).update(endpoint, {"url": r.sink.url + "/new"})
        assert not view.tested
        assert view.changes == {"url": (r.sink.url + "/old", r.sink.url + "/new")}
        assert not await tried(r, endpoint)
        with pytest.raises(StateError, match="has not passed a test"):
            await admin(r).go_live(endpoint)
        await emit(r, 2)
        await until(lambda: numbers_at(r, "/old") == [1, 2])

        r.sink.set_behaviour("/new", Behaviour())
        assert await tried(r, endpoint)
        # The test belongs to the exact configuration: another edit, or another secret, needs its own.
        assert (await admin(r).get(endpoint)).tested
        assert not (await admin(r).update(endpoint, {"timeout_ms": 5_000})).tested
        assert (await admin(r).update(endpoint, {"timeout_ms": 10_000})).tested
        assert not (await admin(r).rotate_secret(endpoint, overlap_s=0)).tested
        assert await tried(r, endpoint)
        view = await admin(r).go_live(endpoint)
        assert (view.config["url"], view.proposed, view.tested) == (r.sink.url + "/new", None, True)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.target.url.endswith("/new"))
        await emit(r, 3)
        await until(lambda: numbers_at(r, "/new") == [3])
        await quiet(r)
        assert numbers_at(r, "/old") == [1, 2]


async def test_an_edit_that_leads_back_is_withdrawn(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        endpoint = (await admin(r).create("acct", {"url": r.sink.url + "/a"}, live=True)).id
        assert (await admin(r).update(endpoint, {"name": "Ann's"})).proposed is not None
        assert (await admin(r).update(endpoint, {"name": ""})).proposed is None


async def test_force_is_logged_by_the_dispatcher_and_stays_in_the_record(dsn: str) -> None:
    async with rig(dsn) as r:
        with capture_logs() as logs:
            draft = (await admin(r).create("acct", {"url": r.sink.url + "/hook"})).id
            view = await admin(r).go_live(draft, force=True)
            assert (view.state, view.state_reason) == ("live", "forced without a test")
            await until(lambda: r.has_taken_up(draft))
            await admin(r).update(draft, {"name": "edited"})
            view = await admin(r).go_live(draft, force=True)
            assert (view.config["name"], view.state_reason) == ("edited", "edit forced without a test")

            def warned() -> list[str]:
                return [
                    line["reason"]
                    for line in logs
                    if line["event"] == "endpoint.configured" and line["log_level"] == "warning"
                ]

            await until(lambda: set(warned()) == {"forced without a test", "edit forced without a test"})
        # With a passed test the record is clean again.
        await admin(r).update(draft, {"name": "tested"})
        assert await tried(r, draft)
        assert (await admin(r).go_live(draft)).state_reason is None


# ── secrets ──


class Heard:
    """What arrived at a sink, raw, with the database's time of its arrival as near as this process's clock says."""

    def __init__(self, r: Rig) -> None:
        self.requests: list[tuple[bytes, dict[str, str]]] = []
        inner = r.sink._receive

        def receive(path: bytes, headers: dict[bytes, bytes], body: bytes) -> Any:
            named = {name.decode().lower(): value.decode() for name, value in headers.items()}
            self.requests.append((body, named))
            return inner(path, headers, body)

        r.sink._receive = receive

    def signers(self, secrets: Sequence[str], n: int = -1) -> list[int]:
        """Which of the secrets signed a request, in the order of the signatures."""
        body, headers = self.requests[n]
        found = []
        for signature in headers["webhook-signature"].split(" "):
            for number, secret in enumerate(secrets):
                try:
                    Webhook(secret).verify(body, headers | {"webhook-signature": signature})
                except WebhookVerificationError:
                    continue
                found.append(number)
        return found


async def test_both_secrets_sign_during_the_overlap_and_then_only_the_new_one(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        endpoint = await r.endpoint()
        new = new_secret()
        await emit(r, 1)
        await until(lambda: len(heard.requests) == 1)
        assert heard.signers([SECRET, new]) == [0]
        view = await admin(r).rotate_secret(endpoint, overlap_s=1.0, secret=new)
        assert view.secrets == (new, SECRET)
        expires_at = view.signing[1].expires_at
        assert expires_at is not None
        seen: list[tuple[float, list[int]]] = []  # seconds after the expiry by the database's clock, who signed
        after = 0.0
        while after < 1.5 and (not seen or seen[-1][1] != [1]):
            await r.emit()
            count = len(seen) + 2
            await until(lambda count=count: len(heard.requests) >= count)
            after = (await admin(r).now() - expires_at).total_seconds()
            seen.append((after, heard.signers([SECRET, new])))
            await asyncio.sleep(0.02)
        assert seen[-1][1] == [1], "the old one still signs"
        assert seen[-1][0] < 1.0, "within a second of its expiry, with no other change"
        both = [after for after, signers in seen if signers == [1, 0]]
        assert both, "both signed, the new one first"
        assert max(both) > -0.2, "until the end"
        assert all(signers == [0] for after, signers in seen if after < both[0]), (
            "the old one alone before it was known"
        )
        # Nobody asks for this endpoint again.
        assert r.engine.incarnation.config._reload_at == {}


async def test_an_overlap_of_nothing_ends_the_old_secret_at_once(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        endpoint = await r.endpoint()
        first = await admin(r).rotate_secret(endpoint, overlap_s=3600)
        assert len(first.secrets) == 2
        view = await admin(r).rotate_secret(endpoint, overlap_s=0)
        assert len(view.secrets) == 1
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.secrets == view.secrets)
        await emit(r, 1)
        await until(lambda: heard.requests)
        assert heard.signers([SECRET, first.secrets[0], view.secrets[0]]) == [2]
        assert await r.db.fetchval("SELECT count(*) FROM webhook.endpoint_secret") == 1, "what has expired is not kept"


async def test_secrets_that_sign_are_few_and_the_first_to_expire_stays_so(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        endpoint = await r.endpoint()
        view = await admin(r).rotate_secret(endpoint, overlap_s=60)
        sooner = view.signing[1].expires_at
        for _ in range(SECRETS_MAX - 2):
            view = await admin(r).rotate_secret(endpoint, overlap_s=3600)
        assert len(view.signing) == SECRETS_MAX
        assert view.signing[-1].expires_at == sooner
        with pytest.raises(StateError, match="an overlap of 0"):
            await admin(r).rotate_secret(endpoint, overlap_s=60)
        with pytest.raises(InputError, match="already"):
            await admin(r).rotate_secret(endpoint, overlap_s=0, secret=view.secrets[2])
        with pytest.raises(InputError, match="30 days"):
            await admin(r).rotate_secret(endpoint, overlap_s=31 * 86_400)
        assert (await admin(r).get(endpoint)).secrets == view.secrets
        assert len((await admin(r).rotate_secret(endpoint, overlap_s=0)).secrets) == 1


# ── deleted ──


async def test_what_waits_for_a_deleted_endpoint_is_counted_once(dsn: str) -> None:
    async with rig(dsn, retry_schedule_s="600") as r:
        endpoint = await r.endpoint("/a", behaviour=Behaviour(fail_rate=1.0))
        await r.endpoint("/b")
        await emit(r, 1, 2)

        async def retrying() -> bool:
            return (await admin(r).get(endpoint)).retries == 2

        await until(retrying)
        await admin(r).pause(endpoint)
        await stops(r, endpoint)
        ids = await emit(r, 3, 4, 5)
        run = await r.db.fetchval(
            "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, total) VALUES ($1, 0, $2, 5) RETURNING id",
            endpoint,
            ids[-1],
        )
        await r.db.execute("INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, 0)", run)
        waiting = await admin(r).waiting(await admin(r).get(endpoint))
        assert (waiting.held, waiting.before, waiting.retries) == (3, 0, 2)
        assert await admin(r).delete(endpoint) == 5
        await until(lambda: r.engine.incarnation.lanes.get(endpoint) is None)
        await emit(r, 6)
        await until(lambda: len(numbers_at(r, "/b")) == 6)
        await r.stop()
        await r.start()  # nothing of it is taken up again, or counted again
        assert await discards(r, endpoint) == [("deleted", 0, ids[-1], 5)]
        assert await r.db.fetchval("SELECT state FROM webhook.run") == "canceled"
        assert await r.db.fetchval("SELECT count(*) FROM webhook.retry") == 0
        assert await r.db.fetchval("SELECT count(*) FROM webhook.lane WHERE endpoint_id = $1", endpoint) == 0
        assert len([e for e in r.received if e.path == "/a"]) == 2
        await quiet(r)


async def test_a_delivery_in_flight_ends_and_is_recorded(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(delay_s=0.7))
        [event_id] = await emit(r, 1)
        await until(lambda: r.received)
        await admin(r).delete(endpoint)
        await until(lambda: r.engine.incarnation.lanes.get(endpoint) is None)
        await until(lambda: r.engine.counters.rows_recorded == 1)
        [attempt] = await r.attempts()
        assert (attempt["event_id"], attempt["status"]) == (event_id, 204)


async def test_deleting_counts_what_lags_behind_a_failing_receiver(dsn: str) -> None:
    """Never paused: what waits lies between the lane's mark and the head, in its queue, and in its retries."""
    async with rig(dsn, breaker_wait_s=60, breaker_failures=1, retry_schedule_s="600") as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500))
        other = await r.endpoint("/b")
        await emit(r, 1)
        await until(lambda: r.engine.counters.breaker_opened)
        await passed_by(r, await r.emit(300))
        await until(lambda: r.by_path()["/b"] == 301)
        view = await admin(r).get(endpoint)
        failed = await until(lambda: r.db.fetchval("SELECT count(*) FROM webhook.retry"))
        waiting = await admin(r).waiting(view)
        assert (waiting.held, waiting.before + failed) == (0, 301)
        assert await admin(r).delete(endpoint) == 301
        assert await admin(r).delete(other) == 0
        assert [row[0] for row in await discards(r, other)] == []


async def test_a_draft_is_deleted_without_a_trace(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        draft = (await admin(r).create("acct", {"url": r.sink.url})).id
        await emit(r, 1)
        assert await admin(r).delete(draft) == 0
        assert await discards(r, draft) == []


# ── what is erased is forgotten ──


async def test_erased_events_are_let_go_of(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = await r.endpoint(rate_per_s=0.01, rate_burst=1)
        ids = await emit(r, 1, 2, 3, 4)
        await until(lambda: r.received)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: len(lane.queue) == 3)
        async with r.db.transaction():
            await r.db.execute("DELETE FROM webhook.outbox WHERE id = ANY ($1::bigint[])", ids[1:3])
            await r.db.execute("SELECT webhook.note_erasure($1)", [endpoint])
        await until(lambda: len(lane.queue) < 3)
        await r.db.execute("UPDATE webhook.endpoint SET rate_per_s = NULL, rate_burst = NULL")
        await until(lambda: 4 in numbers_at(r))
        await quiet(r)
        assert numbers_at(r) == [1, 4]
