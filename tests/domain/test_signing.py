"""Signatures, judged by the official library of Standard Webhooks, by the standard's own rules, and by a plain HMAC."""

import base64
import hashlib
import hmac
import time
from datetime import UTC, datetime

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dispatcher.domain.signing import (
    PRIVATE_PREFIX,
    SECRET_PREFIX,
    Signer,
    check_key,
    make_signer,
    new_private_key,
    new_secret,
    public_key,
    secret_key,
    signing_in,
)
from dispatcher.errors import InputError

no_deadline = settings(deadline=None)  # a busy machine is no defect

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the standard's example
OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()
EVENT_ID = b"msg_p5jXN8AQM9LWM0D4loKWxJek"
BODY = b'{"test": 2432232314}'


def text_of(key: bytes) -> str:
    return SECRET_PREFIX + base64.b64encode(key).decode()


def refusal(secret: str) -> str:
    with pytest.raises(InputError) as caught:
        secret_key(secret)
    return str(caught.value)


# Signatures


def test_the_known_signature():
    """Of the official libraries' own tests."""
    assert Signer([SECRET]).sign(EVENT_ID, b"1614265330", BODY) == b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@no_deadline
@given(
    keys=st.lists(st.binary(min_size=24, max_size=64), min_size=1, max_size=3),
    event_id=st.from_regex(rb"evt_[0-9a-f]{32}", fullmatch=True),
    timestamp=st.integers(0, 1 << 40),
    body=st.binary(max_size=300),
)
def test_every_secret_signs_in_order(keys, event_id, timestamp, body):
    signer = Signer([text_of(key) for key in keys])
    signed = b"%b.%d.%b" % (event_id, timestamp, body)
    expected = [b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in keys]
    for _ in range(2):  # a signer is used again and again
        assert signer.sign(event_id, b"%d" % timestamp, body) == b" ".join(expected)


@pytest.mark.parametrize("verifier", [SECRET, OTHER])
def test_the_official_library_verifies_it_with_either_secret_of_a_rotation(verifier):
    now = datetime.fromtimestamp(int(time.time()), UTC)
    signature = Signer([OTHER, SECRET]).sign(EVENT_ID, b"%d" % now.timestamp(), BODY).decode()
    headers = {
        "webhook-id": EVENT_ID.decode(),
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }
    assert Webhook(verifier).verify(BODY, headers) == {"test": 2432232314}
    for name, value in (("webhook-id", "msg_other"), ("webhook-timestamp", str(int(now.timestamp()) + 1))):
        with pytest.raises(WebhookVerificationError):
            Webhook(verifier).verify(BODY, headers | {name: value})
    with pytest.raises(WebhookVerificationError):
        Webhook(verifier).verify(BODY + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(BODY, headers)


def test_the_official_library_signs_the_same():
    now = datetime.fromtimestamp(1_700_000_000, UTC)
    theirs = Webhook(SECRET).sign(EVENT_ID.decode(), now, BODY.decode())
    assert Signer([SECRET]).sign(EVENT_ID, b"1700000000", BODY).decode() == theirs


# Secrets


def test_a_new_secret_is_good_and_new():
    secrets = {new_secret() for _ in range(50)}
    assert len(secrets) == 50
    assert {len(secret_key(secret)) for secret in secrets} == {32}


@pytest.mark.parametrize("length", [24, 32, 64])
def test_a_key_within_the_standards_bounds(length):
    key = bytes(range(length))
    assert secret_key(text_of(key)) == key


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("", "starts with whsec_"),
        (SECRET.removeprefix("whsec_"), "starts with whsec_"),
        ("WHSEC_" + SECRET.removeprefix("whsec_"), "starts with whsec_"),
        (" " + SECRET, "starts with whsec_"),
        ("whsec_", "24 to 64 bytes, this one 0"),
        (text_of(bytes(23)), "24 to 64 bytes, this one 23"),
        (text_of(bytes(65)), "24 to 64 bytes, this one 65"),
        (SECRET + "\n", "not base64"),
        (SECRET[:-1], "not base64"),
        (SECRET[:-1] + "-", "not base64"),  # the URL-safe alphabet is another one
        (SECRET[:-1] + "ü", "not base64"),
        (SECRET[:20] + " " + SECRET[20:], "not base64"),
    ],
)
def test_a_bad_secret_is_refused_with_its_trouble(secret, words):
    assert words in refusal(secret)


@no_deadline
@given(st.text(alphabet="QZxz019+/ ü", max_size=80).map("{}-hunter2".format))  # "-" is in no base64 of ours
def test_a_refusal_never_shows_the_secret(secret):
    for text in (secret, SECRET_PREFIX + secret):
        with pytest.raises(InputError) as caught:
            secret_key(text)
        assert "hunter2" not in f"{caught.value} {caught.value.__cause__}"


def test_one_bad_secret_spoils_a_signer():
    with pytest.raises(InputError):
        Signer([SECRET, "whsec_"])


# v1a. The official libraries skip it; so it is judged by the standard's text and a well-known implementation of Ed25519.

PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="


def verify_v1a(public: str, signature: bytes, signed: bytes) -> None:
    scheme, _, encoded = signature.partition(b",")
    assert scheme == b"v1a"
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix("whpk_"), validate=True))
    key.verify(base64.b64decode(encoded, validate=True), signed)


@no_deadline
@given(
    event_id=st.from_regex(rb"evt_[0-9a-f]{32}", fullmatch=True),
    timestamp=st.integers(0, 1 << 40),
    body=st.binary(max_size=300),
)
def test_an_asymmetric_signature_is_over_id_timestamp_and_body(event_id, timestamp, body):
    signature = make_signer([PRIVATE]).sign(event_id, b"%d" % timestamp, body)
    signed = event_id + b"." + str(timestamp).encode() + b"." + body
    verify_v1a(PUBLIC, signature, signed)
    with pytest.raises(InvalidSignature):
        verify_v1a(PUBLIC, signature, signed + b" ")


def test_both_schemes_and_rotation_sign_in_order():
    new = new_private_key()
    signatures = make_signer([new, SECRET, PRIVATE]).sign(EVENT_ID, b"1614265330", BODY).split(b" ")
    signed = EVENT_ID + b".1614265330." + BODY
    verify_v1a(public_key(new), signatures[0], signed)
    assert signatures[1] == b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    verify_v1a(PUBLIC, signatures[2], signed)


def test_the_official_library_finds_its_own_among_both_schemes():
    now = int(time.time())
    headers = {
        "webhook-id": EVENT_ID.decode(),
        "webhook-timestamp": str(now),
        "webhook-signature": make_signer([PRIVATE, SECRET]).sign(EVENT_ID, b"%d" % now, BODY).decode(),
    }
    assert Webhook(SECRET).verify(BODY, headers) == {"test": 2432232314}
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(BODY, headers)


def test_secrets_alone_make_the_plain_signer():
    assert type(make_signer([SECRET, OTHER])) is Signer


def test_the_public_key_belongs_to_the_private_one():
    assert public_key(PRIVATE) == PUBLIC
    seed_only = PRIVATE_PREFIX + base64.b64encode(base64.b64decode(PRIVATE.removeprefix(PRIVATE_PREFIX))[:32]).decode()
    assert public_key(seed_only) == PUBLIC
    made = {new_private_key() for _ in range(20)}
    assert len(made) == 20
    assert all(len(base64.b64decode(text.removeprefix(PRIVATE_PREFIX))) == 64 for text in made)


def test_what_signs_in_a_scheme():
    secrets = (PRIVATE, SECRET, OTHER)
    assert signing_in(secrets, "v1") == (SECRET, OTHER)
    assert signing_in(secrets, "v1a") == (PRIVATE,)
    assert signing_in(secrets, "v1,v1a") == secrets


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "starts with whsk_"),
        (SECRET, "starts with whsk_"),
        (PUBLIC, "starts with whsk_"),
        ("whsk_hunter2!", "not base64"),
        ("whsk_aHVudGVyMg==", "32 or 64 bytes, this one 7"),
        (PRIVATE_PREFIX + base64.b64encode(bytes(range(64))).decode(), "don't belong together"),
    ],
)
def test_a_bad_private_key_is_refused_without_showing_it(key, words):
    with pytest.raises(InputError, match=words) as caught:
        check_key(key, "v1a")
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__}"
    assert len(key) < 10 or key not in str(caught.value)
