"""Standard Webhooks 1.0.0, rule by rule, each a test of its own against the whole dispatcher: real PostgreSQL, real sockets.

docs/standard-webhooks.md lists the rules in the specification's order with these names; test_page.py holds the two to each other.
"""

import base64
import hashlib
import hmac
import itertools
import json
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import asyncpg
import orjson
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dispatcher.demo.events import CATALOGUE, sample
from dispatcher.domain.event import check_event_type
from dispatcher.domain.outcome import Fault, Outcome, RetryPolicy, Verdict, decide, outcome_of_answer
from dispatcher.domain.signing import new_secret, secret_key
from dispatcher.domain.url import parse_url
from dispatcher.errors import InputError
from dispatcher.settings import Settings
from dispatcher.sink import Behaviour
from dispatcher.store import runs
from tests.rig import SECRET, Rig, rig, until
from tests.test_endpoint_life import Heard, admin
from tests.test_runs import finished

HERE = Path(__file__).parent
NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY_S = 86_400


@pytest.fixture
async def r(dsn: str) -> AsyncIterator[Rig]:
    async with rig(dsn, retry_schedule_s=(1, 600), breaker_wait_s=0.2, breaker_wait_max_s=0.4) as made:
        yield made


async def heard(r: Rig, count: int = 1, **endpoint) -> list[tuple[bytes, dict[str, str]]]:
    """Make an endpoint, send it one event, and return the first requests that came of it: body, headers."""
    listening = Heard(r)
    await r.endpoint(**endpoint)
    await r.emit()
    await until(lambda: len(listening.requests) >= count)
    return listening.requests


# ── payload ──


async def test_the_payload_is_the_body_and_json(r: Rig) -> None:
    [(body, headers)] = await heard(r)
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["data"] == {"n": 1}


async def test_the_payload_has_type_timestamp_and_data(r: Rig) -> None:
    [(body, _)] = await heard(r)
    payload = json.loads(body)
    assert payload["type"] == "message.sent"
    assert payload["data"] == {"n": 1}
    assert datetime.fromisoformat(payload["timestamp"]).utcoffset() == timedelta(0)


async def test_the_payloads_timestamp_is_when_the_event_occurred(r: Rig) -> None:
    listening = Heard(r)
    await r.endpoint()
    await r.db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload, occurred_at) VALUES ('acct', 'a.b', '{}', '2026-01-02T03:04:05.678Z')"
    )
    await until(lambda: listening.requests)
    [(body, headers)] = listening.requests
    assert json.loads(body)["timestamp"] == "2026-01-02T03:04:05.678Z"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60, "the attempt's is another"


def test_each_event_type_has_an_example() -> None:
    for event_type in CATALOGUE:
        assert sample(event_type.name), event_type.name


async def test_payloads_are_bounded(r: Rig) -> None:
    """256 kB unless the operator says otherwise; `dispatcher event send` advises to stay below 20 kB."""
    with pytest.raises(InputError, match="larger than the outbox accepts"):
        await admin(r).events.send("acct", "a.b", '"' + "x" * 262_144 + '"')


# ── metadata ──


async def test_the_headers_have_the_standards_names(r: Rig) -> None:
    [(_, headers)] = await heard(r)
    assert {name for name in headers if name.startswith("webhook-")} == {
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    }


async def test_the_id_has_no_dot_and_is_not_the_customers_to_choose(r: Rig) -> None:
    [(body, headers)] = await heard(r)
    assert "." not in headers["webhook-id"]
    assert headers["webhook-id"].startswith("evt_")
    assert json.loads(body)["id"] == headers["webhook-id"]


async def test_the_id_is_the_same_for_each_attempt_and_resend(r: Rig) -> None:
    listening = Heard(r)
    endpoint = await r.endpoint(behaviour=Behaviour(status=500))
    [event] = await r.emit()
    await until(lambda: len(listening.requests) == 2)
    r.sink.set_behaviour("/hook", Behaviour())
    run = await runs.resend(r.db, str(event), endpoint)
    await finished(r, run.id)
    assert len(listening.requests) >= 3
    assert len({headers["webhook-id"] for _, headers in listening.requests}) == 1


async def test_ids_of_different_events_differ(r: Rig) -> None:
    await r.endpoint()
    await r.emit(200)
    await until(lambda: len(r.received) == 200)
    assert len({event.webhook_id for event in r.received}) == 200


async def test_the_timestamp_is_in_whole_seconds_and_the_attempts_own(r: Rig) -> None:
    requests = await heard(r, 2, behaviour=Behaviour(status=500))
    attempts = await until(lambda: two_attempts(r))
    told = [headers["webhook-timestamp"] for _, headers in requests[:2]]
    assert told == [str(int(attempt["started_at"].timestamp())) for attempt in attempts[:2]]


async def two_attempts(r: Rig) -> list[asyncpg.Record]:
    attempts = await r.attempts()
    return attempts if len(attempts) >= 2 else []


# ── signatures ──


async def test_the_signed_content_is_id_timestamp_and_the_body_as_it_is_sent(r: Rig) -> None:
    [(body, headers)] = await heard(r)
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"


async def test_v1_verifies_with_the_official_python_library(r: Rig) -> None:
    [(body, headers)] = await heard(r)
    assert Webhook(SECRET).verify(body, headers)["data"] == {"n": 1}


def npm_library() -> bool:
    """Tell whether node is there, and the official package beside this file: `npm install --prefix tests/standard_webhooks` brings it."""
    return shutil.which("node") is not None and (HERE / "node_modules" / "standardwebhooks").exists()


VERIFY = """
const { Webhook } = require("standardwebhooks");
const { secret, body, headers } = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(new Webhook(secret).verify(body, headers)));
"""


@pytest.mark.skipif(
    not npm_library(), reason="needs node, and `npm install --prefix tests/standard_webhooks` (.ci/run does it)"
)
async def test_v1_verifies_with_the_official_npm_library(r: Rig) -> None:
    [(body, headers)] = await heard(r)

    def verify(**change: str) -> subprocess.CompletedProcess[str]:
        given = json.dumps({"secret": SECRET, "body": body.decode(), "headers": headers} | change)
        return subprocess.run(["node", "-e", VERIFY], cwd=HERE, input=given, capture_output=True, text=True, timeout=30)

    said = verify()
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["data"] == {"n": 1}
    assert "No matching signature" in verify(body=body.decode() + " ").stderr


async def test_whoever_changes_body_id_or_timestamp_does_not_verify(r: Rig) -> None:
    [(body, headers)] = await heard(r)
    later = str(int(headers["webhook-timestamp"]) + 1)
    for what, changed in ((body + b" ", {}), (body, {"webhook-id": "evt_0"}), (body, {"webhook-timestamp": later})):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(what, headers | changed)


def test_secrets_are_random_of_24_to_64_bytes_and_serialized_as_whsec() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(secret.startswith("whsec_") and len(secret_key(secret)) == 32 for secret in made)
    for size, fits in ((23, False), (24, True), (64, True), (65, False)):
        text = "whsec_" + base64.b64encode(bytes(size)).decode()
        if fits:
            assert len(secret_key(text)) == size
        else:
            with pytest.raises(InputError):
                secret_key(text)


async def test_each_endpoint_has_a_secret_of_its_own(r: Rig) -> None:
    made = [await admin(r).create("acct", {"url": r.sink.url}) for _ in range(3)]
    assert len({view.secrets for view in made}) == 3


async def test_while_a_secret_is_rotated_the_old_one_signs_too(r: Rig) -> None:
    listening = Heard(r)
    endpoint = await r.endpoint()
    new = new_secret()
    await admin(r).rotate_secret(endpoint, overlap_s=3600, secret=new)
    lane = r.engine.incarnation.lanes.get(endpoint)
    await until(lambda: len(lane.endpoint.secrets) == 2)
    await r.emit()
    await until(lambda: listening.requests)
    [(body, headers)] = listening.requests
    assert len(headers["webhook-signature"].split(" ")) == 2, "space delimited"
    for secret in (new, SECRET):
        assert Webhook(secret).verify(body, headers)


async def asymmetric(r: Rig, signing: str) -> tuple[list[str], bytes, dict[str, str]]:
    """Make an endpoint with keys of its own and send it an event; return its public keys, and the request: body, headers."""
    listening = Heard(r)
    view = await admin(r).create(
        "acct", {"url": f"{r.sink.url}/hook", "event_types": ["*"], "signing": signing}, live=True
    )
    await until(lambda: r.engine.incarnation.lanes.get(view.id) is not None)
    await r.emit()
    await until(lambda: listening.requests)
    [(body, headers)] = listening.requests
    return list(view.public_keys), body, headers


def check_v1a(public: str, body: bytes, headers: dict[str, str]) -> None:
    """The specification's text: Ed25519 over the same content, `v1a,` before it, the key base64 after `whpk_`."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix("whpk_"), validate=True))
    [signature] = [one for one in headers["webhook-signature"].split(" ") if one.startswith("v1a,")]
    key.verify(base64.b64decode(signature.removeprefix("v1a,"), validate=True), signed)


async def test_v1a_is_ed25519_over_the_same_content(r: Rig) -> None:
    [public], body, headers = await asymmetric(r, "v1a")
    assert public.startswith("whpk_")
    check_v1a(public, body, headers)
    with pytest.raises(InvalidSignature):
        check_v1a(public, body + b" ", headers)


async def test_both_schemes_sign_beside_each_other_and_the_official_library_finds_its_own(r: Rig) -> None:
    [public], body, headers = await asymmetric(r, "v1,v1a")
    assert sorted(one.partition(",")[0] for one in headers["webhook-signature"].split(" ")) == ["v1", "v1a"]
    check_v1a(public, body, headers)
    [view] = [await admin(r).get(1)]
    [secret] = [known.secret for known in view.signing if known.public_key is None]
    assert Webhook(secret).verify(body, headers)["data"] == {"n": 1}


async def test_private_keys_are_serialized_as_whsk_and_only_the_public_ones_are_published(r: Rig) -> None:
    view = await admin(r).create("acct", {"url": r.sink.url, "signing": "v1a"})
    [known] = view.signing
    private = base64.b64decode(known.secret.removeprefix("whsk_"), validate=True)
    public = base64.b64decode(view.public_keys[0].removeprefix("whpk_"), validate=True)
    assert known.secret.startswith("whsk_")
    assert Ed25519PrivateKey.from_private_bytes(private[:32]).public_key().public_bytes_raw() == public
    assert known.secret not in json.dumps(view.as_dict(), default=str)


# ── event types ──


@pytest.mark.parametrize(
    ("text", "good"),
    [("user.created", True), ("a.b_c.d1", True), ("user", False), ("user-created.x", False), ("a..b", False), ("a.b ", False), ("a.b/c", False)],
)  # fmt: skip
def test_event_types_are_words_joined_by_full_stops(text: str, good: bool) -> None:
    if good:
        assert check_event_type(text) == text
    else:
        with pytest.raises(InputError):
            check_event_type(text)


async def test_receivers_choose_their_event_types(r: Rig) -> None:
    await r.endpoint("/some", types=("message.*",))
    await r.endpoint("/all")
    for event_type in ("message.sent", "link.clicked"):
        await r.emit(type=event_type)
    await r.settled()
    assert r.by_path() == {"/some": 1, "/all": 2}


# ── deliverability ──


def due_in_s(number: int, policy: RetryPolicy, seed: int = 1, age_s: float = 0.0) -> float:
    decision = decide(outcome_of_answer(500), number, age_s, policy, NOW, random.Random(seed))
    assert decision.verdict is Verdict.RETRY
    return decision.due_in_s


def test_the_schedule_of_retries_spans_days_and_backs_off() -> None:
    settings = Settings()
    schedule = settings.retry_schedule_s
    assert sum(schedule) > 1.9 * DAY_S
    assert settings.retry_age_max_s == 3 * DAY_S
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(schedule))
    policy = RetryPolicy(schedule, settings.retry_age_max_s)
    for number, wait_s in enumerate(schedule, start=1):
        assert due_in_s(number, policy) == pytest.approx(wait_s, rel=0.2)
    over = decide(outcome_of_answer(500), len(schedule) + 1, 0.0, policy, NOW, random.Random(1))
    assert over.verdict is Verdict.DEAD, "and then it is a dead letter, not forgotten"


def test_retries_have_jitter() -> None:
    policy = RetryPolicy()
    waits = [due_in_s(4, policy, seed) for seed in range(200)]
    assert len(set(waits)) == 200
    assert min(waits) >= 0.8 * 600
    assert max(waits) <= 1.2 * 600
    assert max(waits) - min(waits) > 0.3 * 600


async def test_an_endpoint_that_fails_for_days_is_disabled_and_its_account_is_told(r: Rig) -> None:
    await r.endpoint("/other")
    failing = await r.endpoint(behaviour=Behaviour(status=500))
    assert Settings().disable_after_s == 5 * DAY_S
    await r.db.execute(
        "UPDATE webhook.endpoint SET failing_since = now() - interval '6 days', timeout_ms = 9000 WHERE id = $1",
        failing,
    )
    await r.stop()
    await r.start()
    await r.emit()
    await until(lambda: r.db.fetchval("SELECT state = 'disabled' FROM webhook.endpoint WHERE id = $1", failing))
    await until(
        lambda: any(orjson.loads(e.body)["type"] == "endpoint.disabled" for e in r.received if e.path == "/other")
    )
    told = [orjson.loads(e.body) for e in r.received if e.path == "/other"]
    [notice] = [event["data"] for event in told if event["type"] == "endpoint.disabled"]
    assert (notice["endpoint"]["id"], notice["reason"]) == (failing, "consecutive_failures")


# ── success and failure ──


def test_only_2xx_is_a_success() -> None:
    for status in range(200, 600):
        assert outcome_of_answer(status).delivered is (200 <= status <= 299)


@pytest.mark.parametrize("mode", ["reset", "close", "reset_midway", "garbage"])
async def test_whatever_is_not_an_answer_is_a_failure_and_tried_again(r: Rig, mode: str) -> None:
    await heard(r, 2, behaviour=Behaviour(mode=mode))
    [first, *_] = await r.attempts()
    assert first["fault"] in ("reset", "protocol")


async def test_3xx_is_a_failure_and_not_followed(r: Rig) -> None:
    await heard(r, 2, behaviour=Behaviour(mode="redirect"))
    assert set(r.by_path()) == {"/hook"}
    assert [row["status"] for row in await r.attempts()][:1] == [302]


async def test_410_disables_the_endpoint(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=410))
    await r.emit()
    await until(
        lambda: r.db.fetchval(
            "SELECT state = 'disabled' AND state_reason = 'gone' FROM webhook.endpoint WHERE id = $1", endpoint
        )
    )
    sent = len(r.received)
    await until(lambda: r.engine.incarnation.lanes.get(endpoint).held)
    await r.emit(5)
    await until(lambda: r.db.fetchval("SELECT backlog = 5 FROM webhook.lane WHERE endpoint_id = $1", endpoint))
    assert len(r.received) == sent, "nothing more is sent to it"


@pytest.mark.parametrize("status", [429, 502, 504])
async def test_429_502_and_504_slow_the_endpoint_down(r: Rig, status: int) -> None:
    endpoint = await r.endpoint()
    await r.emit(60)
    lane = r.engine.incarnation.lanes.get(endpoint)
    await until(lambda: len(r.received) == 60 and lane.in_flight == 0)
    at_its_best = lane.in_flight_limit
    assert at_its_best > 4
    r.sink.set_behaviour("/hook", Behaviour(status=status))
    await r.emit(3)
    await until(lambda: len(r.received) >= 63)
    await until(lambda: lane.in_flight == 0)
    assert lane.in_flight_limit <= at_its_best / 2


def retry_after(value: str, status: int) -> float:
    decision = decide(Outcome(Fault.STATUS, status, value), 1, 0.0, RetryPolicy(), NOW, random.Random(1))
    assert decision.verdict is Verdict.RETRY
    assert decision.lane_wait_s == decision.due_in_s, "the endpoint's other deliveries wait too"
    return decision.due_in_s


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_obeyed(status: int) -> None:
    assert retry_after("120", status) == 120.0


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_as_a_date_is_obeyed(status: int) -> None:
    assert retry_after(format_datetime(NOW + timedelta(seconds=90), usegmt=True), status) == 90.0


async def test_retry_after_reaches_the_schedule(r: Rig) -> None:
    await r.endpoint(behaviour=Behaviour(status=503, retry_after="100"))
    await r.emit()
    await until(lambda: r.db.fetchval("SELECT count(*) FROM webhook.retry"))
    wait_s = await r.db.fetchval("SELECT extract(epoch FROM due_at - first_attempt_at)::float8 FROM webhook.retry")
    assert wait_s == pytest.approx(100, abs=5)


async def test_a_request_that_takes_too_long_is_a_failure(r: Rig) -> None:
    await r.endpoint(behaviour=Behaviour(mode="hang"), timeout_ms=100)
    await r.emit()
    await until(r.attempts)
    [attempt, *_] = await r.attempts()
    assert attempt["fault"] == "timeout"
    assert attempt["duration_us"] >= 99_000, "the loop's clock has milliseconds"


# ── where to ──


def test_https_is_enforced() -> None:
    with pytest.raises(InputError, match="use https"):
        parse_url("http://example.com/", Settings().address_policy)


def test_internal_addresses_are_refused() -> None:
    """tests/test_ssrf.py has the whole table."""
    for host in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "[fd00:ec2::254]"):
        with pytest.raises(InputError):
            parse_url(f"https://{host}/", Settings().address_policy)


# ── beyond delivery ──


async def test_an_event_goes_to_every_endpoint_that_wants_it(r: Rig) -> None:
    for n in range(3):
        await r.endpoint(f"/{n}")
    await r.emit()
    await r.settled()
    assert r.by_path() == {"/0": 1, "/1": 1, "/2": 1}


async def test_failures_are_shown_with_their_reason(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=500, body=b"out of order"))
    [event] = await r.emit()
    await until(r.attempts)
    shown = await admin(r).events.show(str(event))
    [delivery] = shown["deliveries"]
    assert delivery["endpoint_id"] == endpoint
    assert delivery["attempts"][0]["status"] == 500
    assert "out of order" in delivery["attempts"][0]["response"]


async def test_a_message_is_replayed_by_hand(r: Rig) -> None:
    endpoint = await r.endpoint()
    [event] = await r.emit()
    await r.settled()
    await finished(r, (await runs.resend(r.db, str(event), endpoint)).id)
    assert len(r.received) == 2


async def test_failures_within_a_range_are_recovered(r: Rig) -> None:
    endpoint = await r.endpoint(behaviour=Behaviour(status=500, command="abort-message"), response_control=True)
    ids = await r.emit(20)
    await until(lambda: r.db.fetchval("SELECT count(*) = 20 FROM webhook.dead_letter"))
    r.sink.set_behaviour("/hook", Behaviour())
    chosen = await runs.select(r.db, endpoint, after_id=ids[4], upto_id=ids[14])
    assert chosen.total == 10
    await finished(r, (await runs.create(r.db, chosen, None)).id)
    recovered = [row["event_id"] for row in await r.attempts() if row["fault"] is None]
    assert recovered == ids[5:15]
