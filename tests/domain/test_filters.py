"""Field filters: what passes, what is refused, and how often a payload is parsed."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain import filters
from dispatcher.domain.event import Event
from dispatcher.domain.filters import Payloads, Rule, check_filters
from dispatcher.errors import InputError

FIELDS = {
    "message.sent": {"from": [["message", "from"]], "status": [["receipt", "status"]]},
    "message.replied": {"from": [["inbound", "from"], ["in_reply_to", "from"]]},
    "list.item": {"from": [["items", "1", "from"]]},
}
KNOWN = ("from", "status")


def passes(values: dict[str, list[str]], event_type: str, data: object) -> bool:
    return Rule(values, FIELDS).passes(event_type, orjson.dumps(data))


def test_or_inside_a_list_and_between_names():
    rule = {"from": ["A", "B"], "status": ["delivered"]}
    for sender, status, wanted in (
        ("A", "delivered", True), ("B", "delivered", True), ("C", "delivered", False), ("A", "failed", False), ("C", "failed", False),
    ):  # fmt: skip
        data = {"message": {"from": sender}, "receipt": {"status": status}}
        assert passes(rule, "message.sent", data) is wanted, (sender, status)


def test_a_name_is_another_place_in_another_type_and_one_place_is_enough():
    assert passes({"from": ["A"]}, "message.replied", {"inbound": {"from": "A"}})
    assert passes({"from": ["A"]}, "message.replied", {"inbound": {"from": "B"}, "in_reply_to": {"from": "A"}})
    assert not passes({"from": ["A"]}, "message.replied", {"message": {"from": "A"}})
    assert passes({"from": ["A"]}, "list.item", {"items": [{"from": "B"}, {"from": "A"}]})


@pytest.mark.parametrize(
    ("event_type", "data"),
    [
        ("message.sent", {}), ("message.sent", {"message": None}), ("message.sent", {"message": {"from": None}}),
        ("message.sent", {"message": {"from": ["A"]}}), ("message.sent", {"message": {"from": {"A": "A"}}}), ("message.sent", []),
        ("message.sent", "A"), ("message.sent", {"message": "A"}), ("message.replied", {}), ("list.item", {"items": [{"from": "A"}]}),
        ("list.item", {"items": {"1": None}}), ("other.type", {"message": {"from": "A"}}), ("message.sent", {"from": "A"}),
    ],
)  # fmt: skip
def test_an_event_without_the_field_has_not_got_the_value(event_type, data):
    assert not passes({"from": ["A"]}, event_type, data)


def test_a_type_that_lacks_one_of_the_names_never_passes():
    assert not passes({"from": ["A"], "status": ["delivered"]}, "message.replied", {"inbound": {"from": "A"}})


@pytest.mark.parametrize(
    ("found", "text"),
    [(7, "7"), (-7, "-7"), (True, "true"), (False, "false"), ("7", "7"), ("", ""), (10**17, f"1{'0' * 17}")],
)
def test_what_has_a_text(found, text):
    assert passes({"from": [text]}, "message.sent", {"message": {"from": found}})


@pytest.mark.parametrize(("found", "text"), [(7.0, "7.0"), (None, "null"), (10**18, f"1{'0' * 18}"), ([], "[]")])
def test_what_has_none(found, text):
    assert not passes({"from": [text]}, "message.sent", {"message": {"from": found}})


@pytest.mark.parametrize(
    "payload", [b"", b'{"message":', b'{"message":{"from":"\\ud800"}}', b"[" * 2_000 + b"]" * 2_000]
)
def test_what_cannot_be_read_has_no_fields(payload):
    assert not Rule({"from": ["A"]}, FIELDS).passes("message.sent", payload)


def test_what_the_dispatcher_tells_is_not_filtered():
    assert passes({"from": ["A"]}, "endpoint.disabled", {})
    assert not passes({"from": ["A"]}, "endpoints.disabled", {})


# ── one form ──


def test_the_one_form():
    assert check_filters({"status": ["b", "a", "b"], "from": ["+27821234567"]}, KNOWN) == {
        "from": ["+27821234567"],
        "status": ["a", "b"],
    }
    assert list(check_filters({"status": ["b"], "from": ["a"]}, KNOWN)) == ["from", "status"]
    assert check_filters({}, ()) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"to": ["x"]}, "there are: from, status"), ({"from": []}, "1 to 100"), ({"from": [str(n) for n in range(101)]}, "1 to 100"),
        ({"from": [""]}, "1 to 255 bytes"), ({"from": ["é" * 128]}, "1 to 255 bytes"), ({"from": ["a\r\nb"]}, "printable"),
        ({"from": ["a\x00"]}, "printable"), ({"from": ["\x1b[31m"]}, "printable"), ({f"n{n}": ["x"] for n in range(11)}, "more than 10"),
    ],
)  # fmt: skip
def test_what_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        check_filters(given, KNOWN)
    check_filters({"from": ["é" * 127], "status": [str(n) for n in range(100)]}, KNOWN)  # the edges


# ── parsing ──


def event(n: int, payload: bytes = b'{"message":{"from":"A"}}') -> Event:
    return Event(n, "acc", "message.sent", payload, 0, None, b"evt")


def test_a_payload_is_parsed_once_for_all_who_ask(monkeypatch):
    parses = []
    monkeypatch.setattr(filters, "parsed", lambda payload: parses.append(payload) or {})
    payloads, events = Payloads(), [event(n) for n in range(50)]
    for _ in range(3):  # as many endpoints
        for one in events:
            payloads.of(one)
    assert len(parses) == 50


@pytest.mark.parametrize(("size", "kept_max"), [(10, filters.MEMO_EVENTS_MAX), (filters.MEMO_BYTES_MAX // 4, 4)])
def test_few_are_kept(size, kept_max):
    payloads = Payloads()
    for n in range(1_000):
        payloads.of(event(n, b'"' + b"x" * (size - 2) + b'"'))
        assert len(payloads._parsed) <= kept_max
    assert payloads.of(event(1_001, b"[" + b" " * 2 * filters.MEMO_BYTES_MAX + b"]")) == [], (
        "one that is larger than all"
    )


@given(st.lists(st.sampled_from(["A", "B", "C"])), st.sampled_from(["A", "B", "D"]))
def test_more_values_let_more_pass(values, sender):
    data = {"message": {"from": sender}}
    assert passes({"from": values}, "message.sent", data) is (sender in values)
