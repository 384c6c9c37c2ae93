"""The demo's events hang together: whatever the seed and the pace, a stream tells a story that could have happened."""

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.demo import events
from dispatcher.demo.events import CATALOGUE, SmsEvent, SmsPlatform, sample

START = datetime(2025, 3, 14, 9, 26, 53, tzinfo=UTC)
ACCOUNTS = ("acct_a", "acct_b")
FINALS = {f"message.{status}" for status in ("delivered", "failed", "expired", "unconfirmed", "canceled")}

# DOMAIN's keys of `data`, by type
KEYS = {
    "message.queued": "message scheduled_for receipt",
    "message.sent": "message receipt",
    "message.delivered": "message receipt latency_ms",
    "message.failed": "message receipt failure",
    "message.expired": "message receipt valid_until failure",
    "message.unconfirmed": "message receipt waited_hours",
    "message.canceled": "message receipt canceled_by",
    "message.replied": "inbound in_reply_to opt_out",
    "message.received": "inbound opt_out",
    "link.previewed": "link client classification since_sent_ms preview_number",
    "link.clicked": "link client classification click_number first_click since_sent_ms",
    "contact.opted_out": "contact method keyword scope inbound_message_id last_message_id reference",
    "contact.opted_in": "contact method keyword scope inbound_message_id last_message_id reference",
    "batch.completed": "batch counts cost",
    "account.balance_low": "balance limit estimated_hours_left",
    "endpoint.failing": "endpoint reason failing_since",
    "endpoint.disabled": "endpoint reason failing_since held_events",
    "endpoint.recovered": "endpoint reason failing_since",
    "endpoint.events_expired": "endpoint deliveries from to",
    "endpoint.test": "endpoint challenge sent_by",
}


def stream(seed: int, count: int, step_s: float) -> list[SmsEvent]:
    platform = SmsPlatform(Random(seed), ACCOUNTS)
    return [platform.next(START + timedelta(seconds=step_s * n)) for n in range(count)]


class Story:
    """Follow one stream and fail at the first event that can't follow what came before."""

    def __init__(self) -> None:
        self.messages: dict[str, dict[str, Any]] = {}  # as first told
        self.accounts: dict[str, str] = {}  # of a message, batch or inbound
        self.last: dict[str, str] = {}  # type of a message's latest event
        self.finals: Counter[str] = Counter()
        self.batches: dict[str, Counter[str]] = {}
        self.costs: dict[str, Decimal] = {}
        self.completed: set[str] = set()
        self.inbound: dict[str, dict[str, Any]] = {}
        self.previews: Counter[str] = Counter()
        self.clicks: Counter[str] = Counter()

    def add(self, event: SmsEvent) -> None:
        data = orjson.loads(event.payload)
        assert sorted(data) == sorted(KEYS[event.type].split()), event.type
        group, _, name = event.type.partition(".")
        if "message" in data:
            self.outbound(event, data["message"], data)
        elif "inbound" in data:
            self.answered(event, data)
        else:
            getattr(self, f"{group}_{name}")(event, data)

    def outbound(self, event: SmsEvent, message: dict[str, Any], data: dict[str, Any]) -> None:
        before = self.last.get(message["id"])
        may_follow = {
            "message.queued": {None},
            "message.sent": {None, "message.queued"},
            "message.delivered": {"message.sent", "message.unconfirmed"},
            "message.failed": {"message.sent"},
            "message.expired": {"message.sent"},
            "message.unconfirmed": {None},
            "message.canceled": {"message.queued"},
        }
        assert before in may_follow[event.type]
        self.last[message["id"]] = event.type
        first = self.messages.setdefault(message["id"], message)
        assert {**first, "sent_at": message["sent_at"]} == message
        assert self.accounts.setdefault(message["id"], event.account_id) == event.account_id
        assert self.accounts.setdefault(message["batch_id"], event.account_id) == event.account_id
        assert (message["sent_at"] is None) == (event.type in ("message.queued", "message.canceled"))
        status = event.type.removeprefix("message.")
        final = event.type in FINALS
        assert data["receipt"]["final"] == final
        assert data["receipt"]["status"] in ({"undelivered", "rejected"} if status == "failed" else {status})
        assert message["batch_id"] not in self.completed
        if final and before != "message.unconfirmed":
            self.finals[message["id"]] += 1
            self.batches.setdefault(message["batch_id"], Counter())[status] += 1
            cost = Decimal(0) if status == "canceled" else Decimal(message["price"]["amount"])
            self.costs[message["batch_id"]] = self.costs.get(message["batch_id"], Decimal(0)) + cost
        if event.type == "message.expired":
            assert message["sent_at"] <= data["valid_until"] <= data["receipt"]["done_at"]
        if event.type == "message.delivered":
            assert data["latency_ms"] >= 0

    def answered(self, event: SmsEvent, data: dict[str, Any]) -> None:
        inbound = data["inbound"]
        assert inbound["id"] not in self.inbound  # exactly one of replied and received
        self.inbound[inbound["id"]] = inbound
        assert data["opt_out"] == (inbound["keyword"] == "STOP")
        assert inbound["to_kind"] == ("long_code" if inbound["to"].startswith("+") else "short_code")
        if event.type == "message.replied":
            message = data["in_reply_to"]
            assert self.last[message["id"]] == "message.delivered"
            assert self.accounts[message["id"]] == event.account_id
            assert (inbound["from"], inbound["to"]) == (message["to"], message["from"])

    def link_previewed(self, event: SmsEvent, data: dict[str, Any]) -> None:
        self.fetched(event, data)
        assert data["classification"]["kind"] in ("preview", "scanner")
        assert data["classification"]["reasons"]
        assert not self.clicks[data["link"]["id"]]
        self.previews[data["link"]["id"]] += 1
        assert data["preview_number"] == self.previews[data["link"]["id"]]

    def link_clicked(self, event: SmsEvent, data: dict[str, Any]) -> None:
        self.fetched(event, data)
        assert data["classification"] == {"kind": "click", "fetched_by": "handset", "reasons": []}
        assert self.previews[data["link"]["id"]]
        self.clicks[data["link"]["id"]] += 1
        assert data["click_number"] == self.clicks[data["link"]["id"]]
        assert data["first_click"] == (data["click_number"] == 1)

    def fetched(self, event: SmsEvent, data: dict[str, Any]) -> None:
        link = data["link"]
        message = self.messages[link["message_id"]]
        assert self.last[message["id"]] == "message.delivered"
        assert self.accounts[message["id"]] == event.account_id
        assert link["short_url"] in message["text"]
        for name in ("batch_id", "campaign_id", "reference", "to"):
            assert link[name] == message[name]

    def contact_opted_out(self, event: SmsEvent, data: dict[str, Any], keyword: str = "STOP") -> None:
        inbound = self.inbound[data["inbound_message_id"]]
        assert inbound["keyword"] == data["keyword"] == keyword
        assert data["contact"]["phone"] == inbound["from"]
        assert data["scope"] == {"kind": "sender", "from": inbound["to"]}
        if data["last_message_id"] is not None:
            assert self.messages[data["last_message_id"]]["reference"] == data["reference"]

    def contact_opted_in(self, event: SmsEvent, data: dict[str, Any]) -> None:
        self.contact_opted_out(event, data, "START")

    def batch_completed(self, event: SmsEvent, data: dict[str, Any]) -> None:
        batch = data["batch"]["id"]
        assert batch not in self.completed
        self.completed.add(batch)
        assert self.accounts[batch] == event.account_id
        assert data["counts"] == self.batches[batch]
        assert Decimal(data["cost"]["amount"]) == self.costs[batch]
        assert sum(data["counts"].values()) == data["batch"]["size"]

    def account_balance_low(self, event: SmsEvent, data: dict[str, Any]) -> None:
        assert float(data["balance"]["amount"]) < float(data["limit"]["amount"])


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """List every named value of a document, with the name it stands under."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in ((key, inner), *leaves(inner, key))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner, name)]
    return []


SHAPES = {
    "mcc": r"\d{3}",
    "mnc": r"\d{2,3}",
    "amount": r"\d+\.\d{2,4}",
    "currency": r"[A-Z]{3}",
    "to": r"\+447700900\d{3}|\+1\d{3}55501\d{2}|\d{5}",
    "phone": r"\+447700900\d{3}|\+1\d{3}55501\d{2}",
    "done_at": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "received_at": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "valid_until": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "scheduled_for": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), step_s=st.sampled_from([0.0, 0.001, 0.1, 1.0, 30.0]))
def test_a_stream_is_coherent(seed: int, step_s: float) -> None:
    story = Story()
    for event in stream(seed, 800, step_s):
        story.add(event)
    assert set(story.finals.values()) <= {1}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_values_have_the_domains_shapes(seed: int) -> None:
    types = {kind.name for kind in CATALOGUE}
    for event in stream(seed, 300, 0.5):
        assert event.type in types
        assert event.account_id in ACCOUNTS
        for name, value in leaves(orjson.loads(event.payload)):
            if name in SHAPES:
                assert isinstance(value, str), (name, value)
                assert re.fullmatch(SHAPES[name], value), (name, value)


def test_every_message_ends_exactly_once() -> None:
    story = Story()
    platform = SmsPlatform(Random(3), ACCOUNTS)
    for step in range(5_000):
        story.add(platform.next(START + timedelta(seconds=0.1 * step)))
    sent = set(story.messages)
    # Far in the future all that is open is due, and comes before anything new begins.
    later = START + timedelta(days=1)
    for hour in range(20_000):
        if all(story.finals[message] for message in sent):
            break
        story.add(platform.next(later + timedelta(hours=hour)))
    assert all(story.finals[message] == 1 for message in sent)
    assert story.completed


def test_the_same_seed_gives_the_same_stream() -> None:
    assert stream(5, 500, 0.01) == stream(5, 500, 0.01)
    assert stream(5, 500, 0.01) != stream(6, 500, 0.01)


def test_open_lives_are_bounded_and_stay_coherent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_OPEN", 10)
    platform = SmsPlatform(Random(1), ACCOUNTS)
    story = Story()
    highest = 0
    for _ in range(3_000):  # time stands still, so nothing would ever be due
        story.add(platform.next(START))
        highest = max(highest, platform.open)
    assert highest == 10
    assert "message.expired" in story.last.values()  # hurried, and still no later than its own validity


def test_most_events_are_sent_and_delivered() -> None:
    events_ = stream(2, 20_000, 0.002)
    counts = Counter(event.type for event in events_)
    assert set(counts) == {kind.name for kind in CATALOGUE if not kind.name.startswith("endpoint.")}
    assert counts["message.sent"] + counts["message.delivered"] > 0.6 * len(events_)
    assert 0.02 < counts["message.failed"] / counts["message.sent"] < 0.08


def test_payloads_have_the_size_of_real_ones() -> None:
    sizes = [len(event.payload) for event in stream(2, 5_000, 0.01)]
    assert 0.9 * len(sizes) < sum(400 <= size <= 900 for size in sizes)
    assert max(sizes) < 1_000


def test_unconfirmed_messages_waited_their_72_hours() -> None:
    unconfirmed = [event for event in stream(4, 5_000, 0.1) if event.type == "message.unconfirmed"]
    assert unconfirmed
    for event in unconfirmed:
        data = orjson.loads(event.payload)
        sent_at = datetime.fromisoformat(data["message"]["sent_at"])
        assert event.occurred_at - sent_at >= timedelta(hours=data["waited_hours"])


def test_an_account_is_required() -> None:
    with pytest.raises(ValueError, match="at least one account"):
        SmsPlatform(Random(1), ())


def test_the_catalogue_is_the_domains() -> None:
    assert [kind.name for kind in CATALOGUE] == list(KEYS)
    assert {kind.name for kind in CATALOGUE if not kind.default_on} == {
        "message.queued",
        "message.canceled",
        "batch.completed",
        "account.balance_low",
    }
    assert all(kind.title and kind.description.endswith(".") for kind in CATALOGUE)


@pytest.mark.parametrize("name", KEYS)
def test_every_type_has_its_sample(name: str) -> None:
    data = sample(name)
    assert sorted(data) == sorted(KEYS[name].split())
    data.clear()
    assert sample(name)  # the caller's copy was the caller's


def test_an_unknown_type_has_no_sample() -> None:
    with pytest.raises(KeyError):
        sample("message.imagined")
