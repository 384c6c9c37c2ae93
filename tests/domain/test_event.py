"""The envelope around the producer's bytes, its time stamp, and public ids that lead back to the row."""

import json
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.domain.event import Event, PublicIds, check_event_type, envelope, timestamp, traceparent_of
from dispatcher.errors import InputError

no_deadline = settings(deadline=None)  # a busy machine is no defect

KEY = bytes(range(16))
PUBLIC_ID = b"evt_00000000000000000000000000000001"
CREATED_US = 1_750_000_000_123_456
bigints = st.integers(-(1 << 63), (1 << 63) - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make_event(payload: bytes = b"{}", occurred_us: int | None = None) -> Event:
    return Event(7, "acc_1", "message.delivered", payload, CREATED_US, occurred_us, PUBLIC_ID)


# The envelope


def test_the_envelope_to_the_byte():
    assert make_event(b'{"a" : 1.0}').envelope() == (
        b'{"id":"evt_00000000000000000000000000000001","type":"message.delivered",'
        b'"timestamp":"2025-06-15T15:06:40.123Z","account_id":"acc_1","data":{"a" : 1.0}}'
    )


def test_what_happened_earlier_says_so():
    assert b'"timestamp":"1970-01-01T00:00:00.000Z"' in make_event(occurred_us=0).envelope()


def test_it_is_built_once():
    event = make_event()
    assert event.envelope() is event.envelope()


def test_a_test_is_marked():
    body = json.loads(envelope(PUBLIC_ID, "a.b", 0, "acc", b"{}", test=True))
    assert body["test"] is True
    assert "test" not in json.loads(make_event().envelope())


@no_deadline
@given(st.text(st.characters(exclude_categories=["Cs"])), json_values, st.booleans())
@example('"},"data":{"', {}, False)
@example("\\\0\u2028", None, True)
def test_any_account_and_data_come_out_as_they_went_in(account_id, data, ascii_only):
    written = json.dumps(data, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    body = envelope(PUBLIC_ID, "a.b", CREATED_US, account_id, written)
    assert body.endswith(b',"data":' + written + b"}")
    read = json.loads(body)
    assert list(read) == ["id", "type", "timestamp", "account_id", "data"]
    assert (read["account_id"], read["data"]) == (account_id, data)


@pytest.mark.parametrize("payload", [b'{"n":1e400,"k":1,"k":2}', b"1.10", b'"\\u0000"', b"[1 , 2]\n", b" null "])
def test_the_producers_bytes_stay(payload):
    """What a parser would change: spellings of numbers, repeated keys, escapes, white space."""
    assert make_event(payload).envelope().endswith(b'"data":' + payload + b"}")


def test_it_reads_well_in_a_failure():
    assert repr(make_event(b"12345")) == "Event(7 message.delivered of acc_1, 5 B)"


# Time stamps


@pytest.mark.parametrize(
    ("at_us", "text"),
    [
        (0, b"1970-01-01T00:00:00.000Z"),
        (999, b"1970-01-01T00:00:00.000Z"),
        (1_000, b"1970-01-01T00:00:00.001Z"),
        (999_999, b"1970-01-01T00:00:00.999Z"),
        (1_000_000, b"1970-01-01T00:00:01.000Z"),
        (-1, b"1969-12-31T23:59:59.999Z"),
        (1_709_164_800_000_000, b"2024-02-29T00:00:00.000Z"),
        (-61_000_000_000_000_000, b"0036-12-26T11:33:20.000Z"),  # four digits
        (-62_135_596_800_000_000, b"0001-01-01T00:00:00.000Z"),
        (253_402_300_799_999_999, b"9999-12-31T23:59:59.999Z"),
        # beyond what RFC 3339 can say: the nearest that it can
        (-62_135_596_800_000_001, b"0001-01-01T00:00:00.000Z"),
        (253_402_300_800_000_000, b"9999-12-31T23:59:59.999Z"),
        (-(1 << 63) + 946_684_800_000_000, b"0001-01-01T00:00:00.000Z"),  # PostgreSQL's -infinity
        ((1 << 63) - 1 + 946_684_800_000_000, b"9999-12-31T23:59:59.999Z"),  # and infinity
    ],
)
def test_a_time_stamp(at_us, text):
    assert timestamp(at_us) == text


@no_deadline
@given(st.lists(st.integers(-(10**15), 10**16), min_size=1, max_size=5))
def test_time_stamps_in_any_order(instants):
    """In any order, because the last second is kept."""
    for at_us in instants:
        for same_second in (at_us, at_us // 1_000_000 * 1_000_000):
            exact = datetime.fromisoformat(timestamp(same_second).decode())
            assert (exact - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() == pytest.approx(
                same_second // 1000 / 1000, abs=1e-4
            )


@no_deadline
@given(bigints)
def test_no_time_is_without_a_stamp(at_us):
    assert len(timestamp(at_us)) == 24


# Public ids


@no_deadline
@given(st.lists(st.tuples(st.integers(0, (1 << 63) - 1), st.integers(1, (1 << 63) - 1)), max_size=5))
def test_a_public_id_leads_back(pairs):
    ids = PublicIds(KEY)
    public = ids.encode(pairs)
    assert [ids.decode(public_id.decode()) for public_id in public] == pairs
    assert public == [one for pair in pairs for one in ids.encode([pair])]  # whatever it is encoded with
    assert len(set(public)) == len(set(pairs))


def test_the_known_public_id():
    """AES-128 of FIPS 197's appendix C.1: stable over versions, or customers' stored ids would lead nowhere."""
    assert PublicIds(KEY).encode([(0x0011223344556677, 0x8899AABBCCDDEEFF)]) == [
        b"evt_69c4e0d86a7b0430d8cdb78070b4c55a"
    ]


def test_an_id_that_was_handed_out_twice_differs():
    ids = PublicIds(KEY)
    assert ids.encode([(CREATED_US, 1)]) != ids.encode([(CREATED_US + 1, 1)])


def test_another_key_gives_other_ids():
    theirs = PublicIds(bytes(16)).encode([(CREATED_US, 1)])
    assert theirs != PublicIds(KEY).encode([(CREATED_US, 1)])
    assert PublicIds(KEY).decode(theirs[0].decode()) != (CREATED_US, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "evt_",
        "evt_" + "0" * 31,
        "evt_" + "0" * 33,
        "evt_" + "A" * 32,
        "evt_" + "g" * 32,
        "EVT_" + "0" * 32,
        "evt_" + "0" * 32 + "\n",
        " evt_" + "0" * 32,
        "evt_" + "０" * 32,
    ],
)
def test_what_is_not_a_public_id(text):
    with pytest.raises(InputError, match="is not an event id"):
        PublicIds(KEY).decode(text)


# Event types


@pytest.mark.parametrize("text", ["message.sent", "a.b", "a.b.c.d", "0._", "message_2.delivered", "a." + "b" * 126])
def test_an_event_type(text):
    assert check_event_type(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "message",
        "message.",
        ".sent",
        "message..sent",
        "Message.sent",
        "message.sent\n",
        "message sent.x",
        "message-x.sent",
        "message.*",
        "*",
        'a.b"',
        "ä.b",
        "a.１",
        "a." + "b" * 127,
    ],
)
def test_what_is_not_an_event_type(text):
    with pytest.raises(InputError, match="is not an event type"):
        check_event_type(text)


@pytest.mark.parametrize(
    ("event_type", "payload", "about"),
    [
        ("endpoint.disabled", b'{"endpoint": {"id": 3, "name": ""}, "reason": "gone"}', True),
        ("endpoint.recovered", b'{"endpoint": {"id": 3}}', True),
        ("endpoint.disabled", b'{"endpoint": {"id": 4}}', False),
        ("endpoint.test", b'{"endpoint": {"id": 3}}', False),
        ("message.sent", b'{"endpoint": {"id": 3}}', False),
        ("endpoint.disabled", b'{"endpoint": 3}', False),
        ("endpoint.disabled", b"[]", False),
        ("endpoint.disabled", b'"3"', False),
        ("endpoint.disabled", b'{"endpoint": {"id": NaN}}', False),  # PostgreSQL would not, but who knows
        ("endpoint.disabled", b"", False),
    ],
)
def test_whom_an_event_is_about(event_type, payload, about):
    event = Event(7, "acc_1", event_type, payload, CREATED_US, None, PUBLIC_ID)
    assert event.is_about(3) is about


@no_deadline
@given(st.text(alphabet='ab_.09"\\\n ', max_size=12))
def test_an_event_type_needs_no_escaping(text):
    try:
        check_event_type(text)
    except InputError:
        return
    assert orjson.dumps(text) == b'"%b"' % text.encode()


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", True),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nx-evil: 1", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n", False),
        ("", False),
    ],
)
def test_what_is_no_traceparent_is_left_out(text, is_one):
    """https://www.w3.org/TR/trace-context/#traceparent-header"""
    assert traceparent_of(text) == (text.encode() if is_one else None)
