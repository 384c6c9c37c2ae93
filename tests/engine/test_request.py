"""Whole requests as they go out: to the byte, and verified as their receivers would."""

import base64
import hashlib
import hmac
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks.webhooks import Webhook

from dispatcher.domain.shape import PLAIN, checked, make_shape
from dispatcher.domain.signing import new_private_key, public_key
from dispatcher.engine.request import Requests, ShapedRequests, make_requests
from tests.engine.build import SECRET, TARGET, make_event

PAYLOAD = b'{"message": {"id": "m_1", "text": "hello", "price": 1.10}, "client": {"ip": "203.0.113.7"}}'
TIMESTAMP = b"1700000000"


def requests(secrets=(SECRET,), **config) -> Requests:
    shape = make_shape(checked({"url": TARGET.url} | config)) if config else PLAIN
    return make_requests(TARGET, "tests", secrets, shape)


def cut(request: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    assert first == "POST /hook?x=1 HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(headers) == len(lines), "a header twice"
    assert int(headers["content-length"]) == len(body)
    return headers, body


def rendered(**config) -> tuple[dict[str, str], bytes]:
    return cut(requests(**config).render(make_event(7, payload=PAYLOAD), TIMESTAMP, 3))


def test_a_plain_request_to_the_byte():
    event = make_event(7, payload=b"{}")
    made = requests()
    assert type(made) is Requests
    body = b'{"id":"evt_%032x","type":"a.b","timestamp":"1970-01-01T00:00:00.000Z","account_id":"acc","data":{}}' % 7
    signed = b"evt_%032x.1700000000.%b" % (7, body)
    signature = base64.b64encode(hmac.digest(base64.b64decode(SECRET[6:]), signed, hashlib.sha256))
    assert made.render(event, TIMESTAMP, 1) == (
        b"POST /hook?x=1 HTTP/1.1\r\nhost: a.example\r\nuser-agent: tests\r\ncontent-type: application/json\r\n"
        b"webhook-id: evt_%032x\r\nwebhook-timestamp: 1700000000\r\nwebhook-signature: v1,%b\r\nx-attempt: 1\r\ncontent-length: %d\r\n\r\n%b"
        % (7, signature, len(body), body)
    )


def test_headers_and_authentication_are_in_the_head_and_cost_nothing_more():
    headers = {"X-Tenant": "a b", "x-key": "k"}
    made = requests(headers=headers, bearer="t")
    assert type(made) is Requests
    found, _ = cut(made.render(make_event(7), TIMESTAMP, 1))
    assert list(found)[:6] == ["host", "user-agent", "content-type", "x-key", "x-tenant", "authorization"]
    assert (found["x-tenant"], found["x-key"], found["authorization"]) == ("a b", "k", "Bearer t")


def test_fields_are_left_out_of_data_and_the_signature_is_over_what_is_sent():
    headers, body = rendered(omit=["/message/text", "/client/ip"])
    assert body.endswith(b'"data":{"message": {"id": "m_1","price": 1.10},"client": {}}}')
    assert json.loads(body)["id"] == headers["webhook-id"]
    signed = Webhook(SECRET)
    expected = hmac.digest(signed._whsecret, b"%b.%b.%b" % (headers["webhook-id"].encode(), TIMESTAMP, body), "sha256")
    assert headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()


def test_the_payload_bare_to_the_byte():
    assert rendered(body_format="payload")[1] == PAYLOAD
    assert rendered(body_format="payload", omit=["/message"])[1] == b'{"client": {"ip": "203.0.113.7"}}'


def test_one_endpoints_body_is_not_anothers():
    event = make_event(7, payload=PAYLOAD)
    plain = cut(requests().render(event, TIMESTAMP, 1))[1]
    cut(requests(omit=["/message"]).render(event, TIMESTAMP, 1))
    assert cut(requests().render(event, TIMESTAMP, 1))[1] == plain
    assert event.body == plain


@pytest.mark.parametrize("more", [{}, {"body_format": "payload"}, {"omit": ["/message/text"]}])
def test_extra_signatures_are_over_the_body_that_is_sent(more):
    headers, body = rendered(extra_signature="hex:x-hub-signature-256:sha256=", extra_signature_key="hunter22", **more)
    assert headers["x-hub-signature-256"] == "sha256=" + hmac.new(b"hunter22", body, "sha256").hexdigest()
    headers, body = rendered(extra_signature="timestamped:x-sig", extra_signature_key="hunter22", **more)
    expected = hmac.new(b"hunter22", TIMESTAMP + b"." + body, "sha256").hexdigest()
    assert headers["x-sig"] == f"t={headers['webhook-timestamp']},v1={expected}"
    assert headers["webhook-signature"].startswith("v1,"), "the standard's is there too"


def test_an_asymmetric_signature():
    key = new_private_key()
    headers, body = rendered(secrets=(key, SECRET), signing="v1,v1a")
    asymmetric, symmetric = headers["webhook-signature"].split(" ")
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key(key).removeprefix("whpk_")))
    signed = b"%b.%b.%b" % (headers["webhook-id"].encode(), TIMESTAMP, body)
    public.verify(base64.b64decode(asymmetric.removeprefix("v1a,")), signed)
    assert symmetric.startswith("v1,")


def test_only_what_depends_on_the_event_is_shaped():
    for config in ({"signing": "v1a"}, {"headers": {"x": "1"}}, {"basic": "a:b"}):
        assert type(requests(**config)) is Requests
    for config in ({"body_format": "payload"}, {"omit": ["/a"]}, {"extra_signature": "hex:x-sig"}):
        assert type(requests(**config)) is ShapedRequests


@pytest.mark.parametrize("config", [{}, {"body_format": "payload"}, {"extra_signature": "hex:x-signed"}])
def test_a_producers_trace_is_passed_on(config):
    trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    if "extra_signature" in config:
        config = config | {"extra_signature_key": "k" * 24}
    request = requests(**config).render(make_event(7, payload=PAYLOAD, traceparent=trace), TIMESTAMP, 1)
    assert cut(request)[0]["traceparent"] == trace.decode()
    plain = requests(**config).render(make_event(7, payload=PAYLOAD), TIMESTAMP, 1)
    assert request.replace(b"traceparent: %b\r\n" % trace, b"") == plain, "and nothing else differs"
