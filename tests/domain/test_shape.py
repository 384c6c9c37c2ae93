"""What an endpoint's requests may be made of: what is refused, what becomes of the rest, and that nothing secret is shown."""

import base64
import hashlib
import hmac

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.client import ClientIdentity, describe_certificate
from dispatcher.domain.shape import (
    CREDENTIALS,
    HEADERS_CHARS_MAX,
    HEADERS_MAX,
    HIDDEN,
    PLAIN,
    SHAPE,
    checked,
    make_shape,
    merged,
    redacted,
    shown,
)
from dispatcher.domain.url import parse_url
from dispatcher.errors import InputError

URL = "https://a.example/hook"


def shape(**config):
    return make_shape(checked({"url": URL} | config))


def refusal(**config) -> str:
    with pytest.raises(InputError) as caught:
        checked({"url": URL} | config)
    return str(caught.value)


@pytest.fixture(scope="module")
def identity() -> tuple[str, str]:
    issued = trustme.CA().issue_cert("client.example", common_name="client.example")
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    return chain.decode(), issued.private_key_pem.bytes().decode()


def test_nothing_particular_is_plain():
    assert checked({"url": URL}) == SHAPE | CREDENTIALS
    assert shape() == PLAIN
    assert PLAIN.is_plain


# ── headers ──

REFUSED = [
    "Host", "content-length", "Content-Type", "CONTENT-ENCODING", "User-Agent", "x-attempt", "Expect", "accept-encoding",
    "Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "HTTP2-Settings",
    "webhook-id", "Webhook-Signature", "webhook-anything", "Proxy-Authorization", "proxy-authenticate",
    "Forwarded", "Via", "X-Forwarded-For", "x-forwarded-host", "X-Real-IP", "Sec-Fetch-Site",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_are_not_the_customers(name):
    assert f"the header {name.lower()} is set by the dispatcher, or belongs to the connection" in refusal(
        headers={name: "x"}
    )
    assert f"the header {name.lower()} is set" in refusal(extra_signature=f"hex:{name}")


@pytest.mark.parametrize("name", ["", " x", "x ", "x y", "x:y", "x\r\ny", "x\0", "ü", "x\t", "(x)", "x" * 65])
def test_what_is_no_headers_name(name):
    assert "is not a header's name" in refusal(headers={name: "hunter2"})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hunter2\r\nx-evil: 1", "U+000D as character 8"),
        ("hunter2\nx", "U+000A as character 8"),
        ("hunter2\0", "U+0000 as character 8"),
        ("hunter2\tx", "U+0009"),
        ("hunter2\x7f", "U+007F"),
        ("hunter2ü", "U+00FC as character 8"),
        ("hunter2\u2028", "U+2028"),
        ("hunter2\x85", "U+0085"),
        (" hunter2", "begins or ends with a space"),
        ("hunter2 ", "begins or ends with a space"),
        ("", "isn't empty"),
        (7, "isn't empty"),
    ],
)
def test_a_value_that_could_end_its_header(value, words):
    text = refusal(headers={"x-key": value})
    assert words in text
    assert "the header x-key" in text
    assert "hunter2" not in text


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_is_accepted_is_one_line(name, value):
    try:
        fields = checked({"url": URL, "headers": {name: value}})
    except InputError:
        return
    [(kept, _)] = fields["headers"].items()
    assert kept == name.lower()
    assert f"{kept}: {value}".encode("ascii").split(b"\r\n") == [f"{kept}: {value}".encode()]
    assert value.isprintable()


def test_headers_have_bounds():
    assert len(checked({"url": URL, "headers": {f"x-{n}": "1" for n in range(HEADERS_MAX)}})["headers"]) == HEADERS_MAX
    assert "more than" in refusal(headers={f"x-{n}": "1" for n in range(HEADERS_MAX + 1)})
    assert checked({"url": URL, "headers": {"x": "1" * (HEADERS_CHARS_MAX - 1)}})
    assert f"{HEADERS_CHARS_MAX + 1} characters together" in refusal(headers={"x": "1" * HEADERS_CHARS_MAX})


def test_names_are_lower_case_and_ordered_and_once():
    assert list(checked({"url": URL, "headers": {"X-B": "1", "X-A": "2"}})["headers"].items()) == [
        ("x-a", "2"),
        ("x-b", "1"),
    ]
    assert "given twice" in refusal(headers={"X-A": "1", "x-a": "2"})


# ── authentication ──


def test_basic_and_bearer_become_headers():
    assert shape(basic="Aladdin:open sesame").headers == (
        ("authorization", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
    )  # RFC 7617, 2
    assert shape(basic="ü:ß").headers == (("authorization", "Basic " + base64.b64encode("ü:ß".encode()).decode()),)
    assert shape(bearer="mF_9.B5f-4.1JqM").headers == (("authorization", "Bearer mF_9.B5f-4.1JqM"),)  # RFC 6750, 2.1
    assert shape(headers={"Authorization": "ApiKey x"}).headers == (("authorization", "ApiKey x"),)


@pytest.mark.parametrize(
    "basic", ["hunter2", ":hunter2", "user:", "user:hunter2\r\n", "user:hunter2\0", "u:" + "hunter2" * 400]
)
def test_bad_basic_authentication(basic):
    text = refusal(basic=basic)
    assert "user:password" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("bearer", ["", "hunter2 x", "hunter2\n", "hunter2ü", "hunter2:", "=hunter2", "hunter2" * 400])
def test_a_bad_bearer_token(bearer):
    text = refusal(bearer=bearer)
    assert "a bearer token has" in text
    assert "hunter2" not in text


def test_a_request_has_one_authorization():
    assert "one authorization" in refusal(basic="a:b", bearer="c")
    assert "one authorization" in refusal(basic="a:b", headers={"Authorization": "x"})


# ── the extra signature ──

KEY = "It's a Secret to Everybody"


def test_githubs_own_example():
    """From its documentation of X-Hub-Signature-256."""
    made = shape(extra_signature="hex:X-Hub-Signature-256:sha256=", extra_signature_key=KEY).extra_signature
    assert made.header == "x-hub-signature-256"
    assert made.value(b"1", b"Hello, World!") == (
        b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    )


def test_a_timestamped_one():
    """As Stripe describes it: over the timestamp, a dot, and the body; the key is the text as it stands."""
    made = shape(
        extra_signature="timestamped:Stripe-Signature", extra_signature_key="whsec_test_secret"
    ).extra_signature
    expected = hmac.new(b"whsec_test_secret", b'1492774577.{"a":1}', hashlib.sha256).hexdigest()
    assert made.value(b"1492774577", b'{"a":1}') == f"t=1492774577,v1={expected}".encode()


def test_a_key_is_made_if_none_is_given():
    first, second = (checked({"url": URL, "extra_signature": "hex:x-sig"})["extra_signature_key"] for _ in range(2))
    assert len(first) == len(second) == 64
    assert first != second


@pytest.mark.parametrize(
    "text", ["", "hex", "hex:", "md5:x-sig", "hex:x-sig:", "hex:x-sig:ü", "hex:x-sig:a:b", "timestamped:x:y", 5]
)
def test_what_is_no_signature(text):
    assert "is not a signature" in refusal(extra_signature=text)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"extra_signature_key": KEY}, "give both"),
        ({"extra_signature": "hex:x-sig", "extra_signature_key": "hunter2"}, "8 to 256"),
        ({"extra_signature": "hex:x-sig", "extra_signature_key": "hunter2\nhunter2"}, "U+000A"),
        ({"extra_signature": "hex:x-sig", "headers": {"X-Sig": "1"}}, "a signature and something else"),
        ({"extra_signature": "hex:authorization"}, "a signature and something else"),
        ({"extra_signature": "hex:x\r\ny"}, "is not a header's name"),
    ],
)
def test_a_signature_that_cannot_be(config, words):
    text = refusal(**config)
    assert words in text
    assert "hunter2" not in text


# ── client certificates ──


def test_a_client_certificate_is_part_of_the_origin(identity):
    certificate, key = identity
    target = parse_url(URL, AddressPolicy())
    made = shape(client_certificate=certificate, client_key=key)
    aimed = made.aimed(target)
    assert aimed.origin != target.origin
    assert aimed.origin[:3] == target.origin[:3]
    again = make_shape(checked({"url": URL, "client_certificate": certificate, "client_key": key})).aimed(target)
    assert (aimed.origin, hash(aimed.origin)) == (again.origin, hash(again.origin)), "loaded again it is the same"
    assert PLAIN.aimed(target) is target
    assert made.is_plain, "the requests are as any other's"


def test_a_client_certificate_that_cannot_be_used(identity):
    certificate, key = identity
    other = trustme.CA().issue_cert("b.example").private_key_pem.bytes().decode()
    locked = load_pem_private_key(key.encode(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    assert "give both" in refusal(client_certificate=certificate)
    assert "give both" in refusal(client_key=key)
    assert "doesn't belong" in refusal(client_certificate=certificate, client_key=other)
    assert "passphrase" in refusal(client_certificate=certificate, client_key=locked.decode())
    assert "not a private key" in refusal(client_certificate=certificate, client_key="hunter2")
    assert "not a certificate" in refusal(client_certificate="hunter2", client_key=key)
    assert "holds a private key" in refusal(client_certificate=certificate + key, client_key=key)
    assert "longer than" in refusal(client_certificate=certificate * 100, client_key=key)
    assert "use an https URL" in refusal(url="http://a.example/", client_certificate=certificate, client_key=key)


# ── body and scheme ──


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"signing": "v2"}, "signing is 'v2'"),
        ({"signing": "v1a,v1"}, "must be one of 'v1', 'v1a', 'v1,v1a'"),
        ({"body_format": "xml"}, "envelope or payload"),
        ({"omit": ["text"]}, "not a JSON pointer"),
    ],
)
def test_other_fields_are_checked(config, words):
    assert words in refusal(**config)


# ── changing and showing ──


def test_headers_are_changed_one_by_one():
    old = checked({"url": URL, "headers": {"x-a": "1", "x-b": "2"}})
    assert merged(old, {"headers": {"X-B": None, "x-c": "3"}})["headers"] == {"x-a": "1", "x-c": "3"}
    assert merged(old, {"headers": None})["headers"] == {}
    assert merged(old, {})["headers"] == {"x-a": "1", "x-b": "2"}


def test_what_is_given_instead_takes_the_other_out():
    old = checked({"url": URL, "basic": "a:b", "extra_signature": "hex:x-sig"})
    assert merged(old, {"bearer": "c"})["basic"] is None
    assert merged(old, {"extra_signature": None})["extra_signature_key"] is None
    assert merged(old, {"extra_signature": "hex:x-other"})["extra_signature_key"] == old["extra_signature_key"]
    assert checked({"url": URL} | merged(old, {"basic": None}))["basic"] is None


def test_nothing_secret_is_shown(identity):
    certificate, key = identity
    config = checked(
        {
            "url": URL, "headers": {"x-key": "hunter2"}, "bearer": "hunter2", "extra_signature": "hex:x-sig",
            "extra_signature_key": "hunter2-hunter2", "client_certificate": certificate, "client_key": key,
        }
    )  # fmt: skip
    made, visible = make_shape(config), shown(config)
    text = f"{made!r} {made.aimed(parse_url(URL, AddressPolicy()))!r} {visible!r}"
    assert "hunter2" not in text
    assert "PRIVATE KEY" not in text
    assert visible["headers"] == {"x-key": HIDDEN}
    assert "client.example" in visible["client_certificate"]
    assert "until" in describe_certificate(certificate)
    assert ClientIdentity.of(certificate, key).fingerprint in repr(made.identity)


def test_a_request_is_kept_without_them():
    made = shape(headers={"x-key": "hunter2"}, bearer="hunter2")
    request = (
        b"POST / HTTP/1.1\r\nx-key: hunter2\r\nwebhook-id: evt_1\r\nauthorization: Bearer hunter2\r\n\r\nx-key: body"
    )
    assert redacted(request, made) == (
        b"POST / HTTP/1.1\r\nx-key: (hidden)\r\nwebhook-id: evt_1\r\nauthorization: (hidden)\r\n\r\nx-key: body"
    )
    assert redacted(request, PLAIN) == request
