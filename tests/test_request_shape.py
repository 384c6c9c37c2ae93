"""What an endpoint's requests are made of, from its configuration to what arrives: real PostgreSQL, real sockets, both transports."""

import base64
import hmac
import io
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks.webhooks import Webhook

from dispatcher import log
from dispatcher.domain.sealing import new_encryption_key
from dispatcher.domain.shape import HIDDEN
from dispatcher.errors import InputError, SealedError, StateError
from dispatcher.settings import Settings
from dispatcher.sink import Behaviour, Sink
from dispatcher.store.endpoint import EndpointView
from dispatcher.store.sealing import check_keys
from tests.rig import Rig, rig, until
from tests.test_endpoint_life import Heard, admin, stops, tried

TRANSPORTS = pytest.mark.parametrize("transport", ["thin", "aiohttp"])
OWN_TO_AN_ATTEMPT = ("webhook-id", "webhook-timestamp", "webhook-signature", "x-attempt", "content-length", "x-sig")
SECRETS = {
    "headers": {"X-Tenant": "header-hunter2"},
    "bearer": "bearer-hunter2",
    "extra_signature_key": "signature-hunter2",
}
SHAPED = SECRETS | {"signing": "v1,v1a", "omit": ["/text", "/client/ip"], "extra_signature": "timestamped:X-Sig"}
PAYLOAD = '{"id": "m_1", "text": "private", "client": {"ip": "203.0.113.7", "os": "x"}}'


async def gone_live(r: Rig, **config: Any) -> EndpointView:
    """Create an endpoint as its owner would: a draft, its test, live."""
    made = await admin(r).create("acct", {"url": r.sink.url + "/hook"} | config)
    assert await tried(r, made.id)
    view = await admin(r).go_live(made.id)
    await until(lambda: r.has_taken_up(made.id))
    return view


def v1a_signers(body: bytes, headers: dict[str, str], *public_keys: str) -> list[int]:
    """Which keys' signatures are there, in their order; by the standard's text."""
    signed = b"%b.%b.%b" % (headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body)
    found = []
    for signature in headers["webhook-signature"].split(" "):
        if not signature.startswith("v1a,"):
            continue
        for n, text in enumerate(public_keys):
            key = Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix("whpk_")))
            try:
                key.verify(base64.b64decode(signature.removeprefix("v1a,")), signed)
            except InvalidSignature:
                continue
            found.append(n)
    return found


@TRANSPORTS
async def test_all_of_it_arrives_and_a_test_sends_precisely_the_same(dsn: str, transport: str) -> None:
    async with rig(dsn, transport=transport) as r:
        heard = Heard(r)
        view = await gone_live(r, **SHAPED)
        await r.emit(payload=PAYLOAD)
        await until(lambda: len(heard.requests) == 2)
        (test_body, test_headers), (body, headers) = heard.requests
        assert body.endswith(b'"data":{"id": "m_1","client": {"os": "x"}}}')
        assert (headers["x-tenant"], headers["authorization"]) == ("header-hunter2", "Bearer bearer-hunter2")
        same = [name for name in headers if name not in OWN_TO_AN_ATTEMPT]
        assert list(test_headers) == list(headers)
        assert [test_headers[name] for name in same] == [headers[name] for name in same]
        for got, named in heard.requests:
            assert Webhook(view.secrets[1]).verify(got, named), "the official library finds its own"
            assert v1a_signers(got, named, *view.public_keys) == [0]
            signed = named["webhook-timestamp"].encode() + b"." + got
            expected = hmac.new(b"signature-hunter2", signed, "sha256").hexdigest()
            assert named["x-sig"] == f"t={named['webhook-timestamp']},v1={expected}"
        assert b'"test":true' in test_body
        [kept] = await r.db.fetch("SELECT request FROM webhook.test_attempt")
        assert b"hunter2" not in kept["request"]
        assert b"authorization: (hidden)" in kept["request"]


@TRANSPORTS
async def test_the_payload_alone(dsn: str, transport: str) -> None:
    async with rig(dsn, transport=transport) as r:
        heard = Heard(r)
        view = await gone_live(r, body_format="payload", basic="user:hunter2")
        await r.emit(payload=PAYLOAD)
        await until(lambda: len(heard.requests) == 2)
        body, headers = heard.requests[-1]
        assert body == PAYLOAD.encode()
        assert headers["authorization"] == "Basic " + base64.b64encode(b"user:hunter2").decode()
        assert Webhook(view.secrets[0]).verify(body, headers)


@TRANSPORTS
async def test_a_client_certificate(dsn: str, transport: str, tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(tls)
    ca.configure_trust(tls)
    tls.verify_mode = ssl.CERT_REQUIRED
    issued = ca.issue_cert("ann.example", common_name="ann.example")
    pem = {
        "client_certificate": issued.cert_chain_pems[0].bytes().decode(),
        "client_key": issued.private_key_pem.bytes().decode(),
    }
    async with rig(dsn, transport=transport, ca_file=tmp_path / "ca.pem", encryption_keys=new_encryption_key()) as r:
        receiver = Sink()
        await receiver.start(ssl=tls)
        try:
            url = receiver.url + "/hook"
            made = await admin(r).create("acct", {"url": url})
            assert not await tried(r, made.id), "without a certificate it is refused"
            await admin(r).update(made.id, pem)
            assert await tried(r, made.id)
            view = await admin(r).go_live(made.id)
            await until(lambda: r.has_taken_up(made.id))
            opened = r.transport.opened
            for n in range(1, 4):
                await r.emit()
                await until(lambda n=n: receiver.received == n + 1)
            assert r.transport.opened - opened <= 1, "the connection is kept"
            shown = view.as_dict()
            assert "ann.example" in shown["client_certificate"]
            assert shown["client_key"] == HIDDEN
            await r.settled()
        finally:
            await receiver.stop()


async def test_an_edit_of_credentials_needs_its_own_test(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        endpoint = (await gone_live(r, bearer="old-hunter2")).id
        view = await admin(r).update(endpoint, {"headers": {"X-New": "new-hunter2"}, "omit": ["/text"]})
        assert view.changes == {"omit": ([], ["/text"]), "headers": ({}, {"x-new": HIDDEN})}
        assert "hunter2" not in repr(view.as_dict())
        with pytest.raises(StateError, match="has not passed a test"):
            await admin(r).go_live(endpoint)
        await r.emit(payload=PAYLOAD)
        await until(lambda: len(heard.requests) == 2)
        assert "x-new" not in heard.requests[-1][1], "the old one is in force until then"
        assert await tried(r, endpoint)
        assert heard.requests[-1][1]["x-new"] == "new-hunter2"
        await admin(r).update(endpoint, {"headers": {"x-new": "other-hunter2"}})
        with pytest.raises(StateError, match="has not passed a test"):
            await admin(r).go_live(endpoint)
        assert (await admin(r).get(endpoint)).changes["headers"] == ({}, {"x-new": HIDDEN})
        assert await tried(r, endpoint)
        view = await admin(r).go_live(endpoint)
        assert view.credentials["headers"] == {"x-new": "other-hunter2"}
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.shape.pointers == ("/text",))
        await r.emit(payload=PAYLOAD)
        await until(lambda: len(heard.requests) == 5)
        body, headers = heard.requests[-1]
        assert (headers["x-new"], headers["authorization"]) == ("other-hunter2", "Bearer old-hunter2")
        assert b"private" not in body


async def test_an_edit_of_a_credential_alone_is_taken_up_and_withdrawn(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        endpoint = (await gone_live(r, bearer="old-hunter2")).id
        assert (await admin(r).update(endpoint, {"bearer": "new-hunter2"})).proposed is not None
        assert (await admin(r).update(endpoint, {"bearer": "old-hunter2"})).proposed is None, "it leads back"
        await admin(r).update(endpoint, {"bearer": "new-hunter2"}, live=True)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.shape.headers == (("authorization", "Bearer new-hunter2"),))
        await r.emit()
        await until(lambda: len(heard.requests) == 2)
        assert heard.requests[-1][1]["authorization"] == "Bearer new-hunter2"


async def test_the_hash_of_what_was_tested_is_of_every_field(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        made = await admin(r).create("acct", {"url": r.sink.url + "/hook"})
        hashes = {made.test_hash}
        for change in (
            {"signing": "v1,v1a"}, {"body_format": "payload"}, {"omit": ["/a"]}, {"extra_signature": "hex:x-sig"},
            {"extra_signature_key": "hunter22"}, {"headers": {"x-a": "1"}}, {"headers": {"x-a": "2"}}, {"basic": "a:b"}, {"bearer": "b"},
        ):  # fmt: skip
            hashes.add((await admin(r).update(made.id, change)).test_hash)
        hashes.add((await admin(r).rotate_secret(made.id, scheme="v1a")).test_hash)
        hashes.add((await admin(r).rotate_secret(made.id, scheme="v1")).test_hash)
        assert len(hashes) == 12


# ── asymmetric keys ──


async def test_both_keys_sign_during_the_overlap(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        view = await gone_live(r, signing="v1a")
        endpoint, [old] = view.id, view.public_keys
        assert [secret.scheme for secret in view.signing] == ["v1a"]
        view = await admin(r).rotate_secret(endpoint, overlap_s=3600)
        new = view.public_keys[0]
        assert view.public_keys == (new, old)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.secrets == view.secrets)
        await r.emit()
        await until(lambda: len(heard.requests) == 2)
        assert v1a_signers(*heard.requests[-1], old, new) == [1, 0]
        view = await admin(r).rotate_secret(endpoint, overlap_s=0)
        await until(lambda: lane.endpoint.secrets == view.secrets)
        await r.emit()
        await until(lambda: len(heard.requests) == 3)
        assert v1a_signers(*heard.requests[-1], old, new, view.public_keys[0]) == [2]


async def test_rotating_one_scheme_leaves_the_other(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        view = await admin(r).create("acct", {"url": r.sink.url, "signing": "v1,v1a"})
        by_scheme = {secret.scheme: secret.secret for secret in view.signing}
        view = await admin(r).rotate_secret(view.id, overlap_s=0, scheme="v1a")
        assert by_scheme["v1"] in view.secrets
        assert by_scheme["v1a"] not in view.secrets
        with pytest.raises(InputError, match="starts with whsk_"):
            await admin(r).rotate_secret(view.id, scheme="v1a", secret=by_scheme["v1"])
        with pytest.raises(InputError, match="not a signature scheme"):
            await admin(r).rotate_secret(view.id, scheme="v2")


async def test_a_scheme_gets_its_key_when_it_is_proposed(dsn: str) -> None:
    async with rig(dsn) as r:
        heard = Heard(r)
        endpoint = (await gone_live(r)).id
        view = await admin(r).update(endpoint, {"signing": "v1a"})
        assert len(view.public_keys) == 1, "its receiver can be told before the edit is in force"
        await r.emit()
        await until(lambda: len(heard.requests) == 2)
        assert heard.requests[-1][1]["webhook-signature"].startswith("v1,")
        assert await tried(r, endpoint)
        assert v1a_signers(*heard.requests[-1], *view.public_keys) == [0]
        await admin(r).go_live(endpoint)
        lane = r.engine.incarnation.lanes.get(endpoint)
        await until(lambda: lane.endpoint.shape.signing == "v1a")
        await r.emit()
        await until(lambda: len(heard.requests) == 4)
        body, headers = heard.requests[-1]
        assert headers["webhook-signature"].count(",") == 1
        assert v1a_signers(body, headers, *view.public_keys) == [0]
        assert (await admin(r).update(endpoint, {"signing": "v1,v1a"})).public_keys == view.public_keys


async def test_an_endpoint_whose_scheme_has_no_key_is_held(dsn: str) -> None:
    async with rig(dsn) as r:
        endpoint = (await gone_live(r, signing="v1a")).id
        await r.db.execute("DELETE FROM webhook.endpoint_secret")
        await stops(r, endpoint)
        await r.emit()
        await admin(r).rotate_secret(endpoint)
        await r.settled()
        assert len(r.received) == 2


# ── at rest ──

KEY, OTHER = new_encryption_key(), new_encryption_key()


async def everything(r: Rig) -> str:
    """All that the tables hold, as text."""
    tables = await r.db.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'webhook'::regnamespace AND relkind = 'r'"
    )
    rows = [await r.db.fetch(f"SELECT t::text AS row FROM webhook.{table['relname']} AS t") for table in tables]
    plain = [row["row"] for table in rows for row in table]
    raw = [row["request"].decode() for row in await r.db.fetch("SELECT request FROM webhook.test_attempt")]
    return "\n".join(plain + raw)


async def test_nothing_secret_is_in_the_database(dsn: str) -> None:
    async with rig(dsn, encryption_keys=KEY) as r:
        view = await gone_live(r, **SHAPED)
        view = await admin(r).update(view.id, {"bearer": "proposed-hunter2"})
        view = await admin(r).rotate_secret(view.id, scheme="v1a")
        await r.emit(payload=PAYLOAD)
        await r.settled()
        stored = await everything(r)
        assert "hunter2" not in stored
        for secret in view.secrets:
            assert secret not in stored
        assert "whsec_" not in stored
        assert "whsk_" not in stored
        assert stored.count("sealed:") == 5, "three secrets, the credentials, those of the draft"
        assert all(public in stored for public in view.public_keys)


async def test_without_its_key_an_endpoint_is_held_and_nothing_is_lost(dsn: str) -> None:
    async with rig(dsn, encryption_keys=KEY) as r:
        endpoint = (await gone_live(r, bearer="hunter2")).id
        await r.stop()
    async with rig(dsn, encryption_keys=OTHER) as r:
        with pytest.raises(SealedError, match="DISPATCHER_ENCRYPTION_KEYS"):
            await check_keys(r.db, r.settings.keyring)
        assert r.engine.incarnation.lanes.get(endpoint).held
        other = await r.endpoint("/other")
        await r.emit(2)
        await until(lambda: r.by_path() == {"/other": 2})
        view = await admin(r).get(endpoint)
        shown = view.as_dict()
        assert (shown["tested"], shown["bearer"]) == (None, None)
        assert "DISPATCHER_ENCRYPTION_KEYS" in shown["sealed"]
        for needs_it in (lambda: view.secrets, lambda: view.to_test, lambda: view.tested):
            with pytest.raises(SealedError):
                needs_it()
        await admin(r).pause(endpoint)  # what stops it works without
        await admin(r).resume(endpoint)
        assert (await admin(r).waiting(await admin(r).get(other))).held == 0
        await r.stop()
    async with rig(dsn, start=False, encryption_keys=f"{OTHER},{KEY}") as r:
        await r.db.execute("UPDATE webhook.endpoint SET url = $2 WHERE id = $1", endpoint, r.sink.url + "/hook")
        await r.db.execute("UPDATE webhook.endpoint SET url = $2 WHERE id = $1", other, r.sink.url + "/other")
        await r.start()
        await r.settled()
        assert r.by_path() == {"/hook": 2}


async def test_what_was_moved_from_another_row_does_not_open(dsn: str) -> None:
    async with rig(dsn, encryption_keys=KEY) as r:
        ann = (await gone_live(r, bearer="ann")).id
        bob = (await gone_live(r, bearer="bob")).id
        await r.db.execute(
            "UPDATE webhook.endpoint SET credentials = (SELECT credentials FROM webhook.endpoint WHERE id = $1), signing = signing"
            " WHERE id = $2",
            ann, bob,
        )  # fmt: skip
        await stops(r, bob)
        with pytest.raises(SealedError, match="moved from another row"):
            _ = (await admin(r).get(bob)).credentials
        assert not r.engine.incarnation.lanes.get(ann).held


async def test_a_deleted_endpoint_keeps_no_credentials(dsn: str) -> None:
    async with rig(dsn, start=False) as r:
        view = await admin(r).create("acct", {"url": r.sink.url} | SHAPED, live=True)
        await admin(r).update(view.id, {"bearer": "x-hunter2"})
        await admin(r).delete(view.id)
        assert "hunter2" not in await everything(r)


# ── logs ──


@pytest.fixture
def logged() -> Iterator[io.BytesIO]:
    """All that is logged, by us and by libraries, at the lowest level."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, write_through=True)
    before = structlog.get_config()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    log.configure(Settings(log_level="debug", log_format="json"), stream=stream)
    yield buffer
    root.removeHandler(handler)
    root.setLevel(level)
    structlog.configure(**before)
    stream.detach()


@TRANSPORTS
async def test_no_secret_is_ever_logged(dsn: str, transport: str, logged: io.BytesIO) -> None:
    """A whole run at debug: tests, deliveries, failures, retries, edits, rotations, a key that is missing, a stop."""
    secrets: list[str] = [KEY, "hunter2"]
    ca = trustme.CA()
    issued = ca.issue_cert("ann.example")
    pem = {
        "client_certificate": issued.cert_chain_pems[0].bytes().decode(),
        "client_key": issued.private_key_pem.bytes().decode(),
    }
    secrets += issued.private_key_pem.bytes().decode().splitlines()[1:-1]
    async with rig(dsn, transport=transport, encryption_keys=KEY, log_level="debug", retry_schedule_s="1") as r:
        view = await gone_live(r, **SHAPED)
        r.sink.set_behaviour("/hook", Behaviour(status=500, body=b"no"))
        await r.emit(3, payload=PAYLOAD)
        await until(lambda: len(r.received) >= 4)
        assert not await tried(r, view.id)
        r.sink.set_behaviour("/hook", Behaviour())
        view = await admin(r).rotate_secret(view.id, scheme="v1a")
        await admin(r).update(view.id, {"basic": "user:basic-hunter2"}, live=True)
        failing = await admin(r).create("acct", {"url": "https://127.0.0.1:1024/hook"} | pem, live=True)
        await until(lambda: r.has_taken_up(failing.id))
        await r.emit()
        await until(lambda: r.engine.counters.failed >= 4)
        await r.db.execute(
            "UPDATE webhook.endpoint_secret SET secret = 'sealed:00000000:AAAA', scheme = scheme WHERE endpoint_id = $1",
            view.id,
        )
        await stops(r, view.id)
        secrets += [secret.removeprefix("whsk_").removeprefix("whsec_") for secret in view.secrets + failing.secrets]
        await r.stop()
    text = logged.getvalue().decode()
    assert '"delivery.attempted"' in text
    assert '"endpoint.unusable"' in text
    assert '"stopped"' in text
    for secret in secrets:
        assert secret not in text
        assert base64.b64encode(secret.encode()).decode().rstrip("=") not in text
