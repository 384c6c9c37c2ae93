"""The words of a mail, in plain text. Whatever a customer has named is made visible before it stands in a header or a line.

An endpoint's URL may hold a secret in its path or query, so a mail names the host only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from urllib.parse import urlsplit

from dispatcher.domain.text import amount, clean
from dispatcher.store.alerts import OPERATORS, Alert, Mail

NAME_CHARS_MAX = 60
HAPPENED = {
    "endpoint.failing": "is failing",
    "endpoint.disabled": "was disabled",
    "endpoint.recovered": "takes deliveries again",
    "endpoint.events_expired": "has lost events that waited for too long",
}
ADVICE = {
    "endpoint.failing": (
        "No POST to it has succeeded since {failing_since}. Its events wait and are tried again, more and more slowly; if none succeeds for "
        "days it is disabled. Mend the receiver; a test in the panel tells whether it answers."
    ),
    "endpoint.disabled": (
        "Nothing is sent to it until somebody enables it; its events are held meanwhile (reason: {reason}). Mend the receiver, then enable "
        "the endpoint in the panel and choose whether to send or to skip what was held."
    ),
    "endpoint.recovered": "There is nothing to do: what waited is being sent ({reason}).",
    "endpoint.events_expired": (
        "{deliveries}, of events from {from} to {to}, waited for longer than events are kept. What waited is counted and will not be sent."
    ),
}


@dataclass(frozen=True, slots=True)
class Letterhead:
    """Whom mails come from, and where the panel is (None: nobody has said)."""

    product: str
    sender_name: str
    sender: str
    panel: str | None
    per_hour: int


def compose(mail: Mail, letterhead: Letterhead, now: datetime) -> EmailMessage:
    """Return the mail as it goes out. Recipients are in its envelope only: they needn't know of each other."""
    message = EmailMessage(policy=SMTP)
    message["From"] = Address(_header(letterhead.sender_name), addr_spec=letterhead.sender)
    message["To"] = "undisclosed-recipients:;"
    message["Subject"] = _header(f"[{letterhead.product}] {_subject(mail.alerts)}")
    message["Date"] = format_datetime(now)
    message["Message-ID"] = mail.message_id
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's vacation answers it
    message.set_content(_text(mail, letterhead), cte="quoted-printable")
    return message


def _header(text: str) -> str:
    """Return text that stays text in a header. The library reads encoded words (RFC 2047) in what it is given, and line ends within
    them come out as headers of their own."""
    return clean(text).replace("=?", "= ?")


def _subject(alerts: Sequence[Alert]) -> str:
    if len(alerts) == 1:
        return f"Endpoint {_name(alerts[0])} {HAPPENED.get(alerts[0].type, alerts[0].type)}"
    endpoints = len({alert.endpoint_id for alert in alerts})
    return f"{len(alerts)} changes at {amount(endpoints, 'endpoint')}"


def _text(mail: Mail, letterhead: Letterhead) -> str:
    if len(mail.alerts) == 1:
        parts = [_told(mail.alerts[0], letterhead, advice=True)]
    else:
        parts = [
            f"More happened than {amount(letterhead.per_hour, 'mail')} an hour could tell. This is all of it:",
            *(_told(alert, letterhead, advice=False) for alert in mail.alerts),
        ]
    whose = "all accounts" if mail.audience == OPERATORS else f"account {clean(mail.audience)}"
    where = "" if letterhead.panel is None else f": {letterhead.panel}/alerts"
    parts.append(
        "-- \n"
        f"You get this as a recipient of alerts of {whose} in {letterhead.product}, at most {amount(letterhead.per_hour, 'mail')} an hour.\n"
        f"Recipients are managed in its panel{where}"
    )
    return "\n\n".join(parts) + "\n"


def _told(alert: Alert, letterhead: Letterhead, *, advice: bool) -> str:
    what = f"{_when(alert.at)}: endpoint {_name(alert)} of account {clean(alert.account_id)} {HAPPENED.get(alert.type, alert.type)}."
    lines = [what]
    if advice and alert.type in ADVICE:
        facts = dict.fromkeys(("failing_since", "reason", "from", "to"), "an unknown time") | {
            name: clean(str(value)) for name, value in alert.said.items() if value is not None
        }
        count = alert.said.get("deliveries")
        facts["deliveries"] = amount(count, "delivery", "deliveries") if isinstance(count, int) else "Deliveries"
        lines.append(ADVICE[alert.type].format_map(facts))
    if letterhead.panel is not None:
        lines.append(f"{letterhead.panel}/endpoints/{alert.endpoint_id}")
    return "\n".join(lines)


def _name(alert: Alert) -> str:
    endpoint = alert.said.get("endpoint") or {}
    name, host = str(endpoint.get("name") or ""), _host(str(endpoint.get("url") or ""))
    shown = f'"{clean(name[:NAME_CHARS_MAX])}" ' if name else ""
    return f"{alert.endpoint_id} {shown}({clean(host[:NAME_CHARS_MAX])})"


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:  # saved by SQL, or under rules that were others
        return ""


def _when(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
