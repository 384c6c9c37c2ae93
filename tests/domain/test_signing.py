"""Signatures, judged by the official library of Standard Webhooks, by the standard's own rules, and by a plain HMAC."""

import base64
import hashlib
import hmac
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dispatcher.domain.signing import SECRET_PREFIX, Signer, new_secret, secret_key
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
