"""What a mail says, and that nothing in it comes to be more than its words."""

import email
from datetime import UTC, datetime
from email.policy import SMTP
from typing import Any

import pytest

from dispatcher.mail.message import Letterhead, compose
from dispatcher.store.alerts import Alert, Mail

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
LETTERHEAD = Letterhead("Acme Hooks", "Acme, Inc. <support>", "alerts@acme.example", "https://hooks.acme.example", 10)


def alert(type: str = "endpoint.failing", **said: Any) -> Alert:
    endpoint = {"id": 7, "name": "Shop", "url": "https://shop.example:8443/hook?token=s3cret"}
    facts = {"endpoint": endpoint, "reason": "consecutive_failures", "failing_since": "2026-11-24T11:00:00.000Z"}
    return Alert(1, "acct", 7, type, facts | said, NOW)


def composed(*alerts: Alert, audience: str = "acct") -> tuple[Any, str]:
    mail = Mail(audience, alerts, ("a@example.com",), "<alert-1-1@acme.example>", is_last_try=False)
    message = email.message_from_bytes(compose(mail, LETTERHEAD, NOW).as_bytes(), policy=SMTP)
    return message, message.get_content().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("told", "subject", "said"),
    [
        (alert(), 'Endpoint 7 "Shop" (shop.example:8443) is failing', "since 2026-11-24T11:00:00.000Z"),
        (
            alert("endpoint.disabled", reason="gone"),
            'Endpoint 7 "Shop" (shop.example:8443) was disabled',
            "(reason: gone)",
        ),
        (alert("endpoint.recovered"), 'Endpoint 7 "Shop" (shop.example:8443) takes deliveries again', "nothing to do"),
        (
            alert("endpoint.events_expired", deliveries=12, **{"from": "F", "to": "T"}),
            'Endpoint 7 "Shop" (shop.example:8443) has lost events that waited for too long',
            "12 deliveries, of events from F to T",
        ),
    ],
)
def test_each_change_has_its_words(told: Alert, subject: str, said: str) -> None:
    message, text = composed(told)
    assert message["Subject"].strip() == f"[Acme Hooks] {subject}"
    assert said in " ".join(text.split())
    assert "https://hooks.acme.example/endpoints/7\n" in text
    assert "s3cret" not in text
    assert text.endswith("Recipients are managed in its panel: https://hooks.acme.example/alerts\n")
    assert str(message["From"].addresses[0].display_name) == "Acme, Inc. <support>"
    assert message["From"].addresses[0].addr_spec == "alerts@acme.example"
    assert message.get_content_type() == "text/plain"


@pytest.mark.parametrize(
    "name",
    [
        "a\r\nBcc: victim@example.com",
        "a\nX: 1",
        "\x1b[2J",
        "a\u202eb",
        "=?utf-8?q?=0d=0aBcc=3a?=",
        "ü" * 200,
        "{reason.__class__}",
        "a\u2028b",
    ],
)
def test_a_name_is_never_a_header_nor_a_line(name: str) -> None:
    endpoint = {"id": 7, "name": name, "url": f"https://h.example{name}/"}
    message, text = composed(alert("endpoint.disabled", endpoint=endpoint, reason=name))
    raw = compose(
        Mail("acct", (alert(endpoint=endpoint),), ("a@example.com",), "<1@a>", is_last_try=False), LETTERHEAD, NOW
    )
    assert sorted(message.keys()) == sorted(raw.keys()) == sorted(
        ["From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "Content-Type", "Content-Transfer-Encoding", "MIME-Version"]
    )  # fmt: skip
    assert message.get("Bcc") is None
    assert message["Subject"].isprintable()
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_summary_tells_all_that_was_held() -> None:
    message, text = composed(alert(), alert("endpoint.recovered"), audience="")
    assert message["Subject"] == "[Acme Hooks] 2 changes at 1 endpoint"
    assert "More happened than 10 mails an hour could tell" in text
    assert text.count("of account acct") == 2
    assert "alerts of all accounts" in text


def test_a_type_without_words_is_named() -> None:
    message, text = composed(alert("endpoint.new_kind"))
    assert message["Subject"].endswith("endpoint.new_kind")
    assert "endpoint.new_kind" in text
