"""An SMS platform's events, for the demo: pure, seeded, coherent.

Each message, reply and account has a *life*: a generator that yields events and pauses, and is sent the time at which
it goes on. `SmsPlatform` keeps the open lives in a heap by that time; `next(now)` resumes the one that is due, else
begins another.

    queued → sent → delivered → (previewed) → clicked …        exactly one of delivered, failed, expired, unconfirmed,
    canceled;
                             → replied → opted_out → opted_in   only a late receipt may follow unconfirmed

What takes days in life isn't pressed into seconds: a message that ends unconfirmed was sent 72 hours before the
stream began. The lives never look at a clock, and a life is all that is remembered of a message. `endpoint.*` events
are in the catalogue, but the dispatcher makes those.

Phone numbers are from the ranges that Ofcom and NANPA keep for fiction, links from a reserved domain, client
addresses from the documentation ranges.
"""

import heapq
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from random import Random
from typing import Any, NamedTuple

import orjson

# At 1,000 events a second some 2,300 lives are open. Beyond the bound, the earliest is hurried.
MAX_OPEN = 4_000

Data = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EventType:
    """Describe one type of the catalogue, as a customer sees it in the list of types to subscribe to."""

    name: str
    title: str
    description: str
    default_on: bool


CATALOGUE: tuple[EventType, ...] = tuple(
    EventType(*row)
    for row in (
        ("message.queued", "Message queued", "The message was accepted and waits: it is scheduled or paced.", False),
        ("message.sent", "Handed to the network", "The carrier accepted the message.", True),
        ("message.delivered", "Delivered", "The final receipt says that the message arrived.", True),
        ("message.failed", "Not delivered", "The message ended undelivered or rejected.", True),
        ("message.expired", "Expired", "The message's validity period ran out.", True),
        ("message.unconfirmed", "No final status", "No receipt came within the limit of 72 hours.", True),
        ("message.canceled", "Cancelled", "A scheduled message was cancelled.", False),
        ("message.replied", "Reply", "An inbound message answers one of your messages.", True),
        ("message.received", "Inbound message", "An inbound message that answers none of yours.", True),
        ("link.previewed", "Link previewed", "A preview robot or a scanner fetched the link.", True),
        ("link.clicked", "Link clicked", "A person opened the link.", True),
        ("contact.opted_out", "Opted out", "The contact wants no more messages, by STOP, link, form or carrier.", True),
        ("contact.opted_in", "Opted in again", "The contact wants messages again, by START or the like.", True),
        ("batch.completed", "Send completed", "Every message of a send has its final status.", False),
        ("account.balance_low", "Balance low", "The prepaid credit fell under its limit.", False),
        (
            "endpoint.failing",
            "Endpoint failing",
            "One of your other endpoints has not taken a delivery for a while. Its events wait and are tried again.",
            True,
        ),
        ("endpoint.disabled", "Endpoint disabled", "We stopped sending to one of your other endpoints.", True),
        ("endpoint.recovered", "Endpoint recovered", "One of your other endpoints takes deliveries again.", True),
        (
            "endpoint.events_expired",
            "Events expired",
            "Events waited for an endpoint for longer than they are kept, and will not be sent.",
            True,
        ),
        ("endpoint.test", "Test", "You asked for a test of this endpoint.", True),
    )
)


class SmsEvent(NamedTuple):
    """One event as a producer inserts it; `payload` is the envelope's `data`. A tuple, as hot loops make them."""

    account_id: str
    type: str
    payload: bytes
    occurred_at: datetime


# A life yields an event, or the seconds that pass before it goes on; it is sent the time at which it does.
Life = Generator[SmsEvent | float, datetime, None]


class SmsPlatform:
    """Produce one endless stream of events over `accounts`; the same `rng` and times give the same stream."""

    def __init__(self, rng: Random, accounts: Sequence[str]) -> None:
        if not accounts:
            raise ValueError("an SMS platform needs at least one account")
        self._rng = rng
        self._accounts = tuple(accounts)
        self._open: list[tuple[datetime, int, Life]] = []  # a heap; the number settles ties
        self._numbers = itertools.count()
        self._batch = self._new_batch()  # the send whose messages go out now

    @property
    def open(self) -> int:
        """Count the lives that go on later: at most MAX_OPEN."""
        return len(self._open)

    def next(self, now: datetime) -> SmsEvent:
        """Give the next event, as of `now` (aware, never going back)."""
        now = now.astimezone(UTC)
        while True:
            life = self._due(now)
            if life is None:
                life = self._begin(now)
                step = next(life)
            else:
                try:
                    step = life.send(now)
                except StopIteration:
                    continue
            wait_s = step if isinstance(step, float) else 0.0
            heapq.heappush(self._open, (now + timedelta(seconds=wait_s), next(self._numbers), life))
            if isinstance(step, SmsEvent):
                return step

    def _due(self, now: datetime) -> Life | None:
        if self._open and (self._open[0][0] <= now or len(self._open) >= MAX_OPEN):
            return heapq.heappop(self._open)[2]
        return None

    def _begin(self, now: datetime) -> Life:
        rng = self._rng
        kind = rng.random()
        if kind < 0.01:
            return _inbound(rng, rng.choice(self._accounts), now)
        if kind < 0.011:
            return _balance(rng, rng.choice(self._accounts), now)
        if kind < 0.016:
            return _unconfirmed(rng, _Batch(rng, rng.choice(self._accounts), size=1), now)
        if self._batch.unsent == 0:
            self._batch = self._new_batch()
        self._batch.unsent -= 1
        return _outbound(rng, self._batch, now)

    def _new_batch(self) -> "_Batch":
        # Most sends are one message, most messages are of larger sends. A send of one has no completion of its own to
        # tell.
        size = self._rng.choice((1, 1, 1, 1, 5, 20))
        return _Batch(self._rng, self._rng.choice(self._accounts), size)


def sample(name: str) -> Data:
    """Give an example of `data` for a type of the catalogue, always the same. Raises KeyError for any other type."""
    return dict(orjson.loads(_samples()[name]))


@cache
def _samples() -> dict[str, bytes]:
    # The first event of each type that one seeded run makes, so an example can't drift from what is really sent.
    platform = SmsPlatform(Random(11), ("acct_example",))  # noqa: S311 — an example, no secret  # nosec B311
    wanted = {kind.name for kind in CATALOGUE if not kind.name.startswith("endpoint.")}
    samples = {name: orjson.dumps(data) for name, data in ENDPOINT_SAMPLES.items()}
    now = datetime(2025, 3, 14, 9, 26, 53, 589_000, tzinfo=UTC)
    while not wanted <= samples.keys():
        event = platform.next(now)
        samples.setdefault(event.type, event.payload)
        now += timedelta(milliseconds=100)
    return samples


ENDPOINT_SAMPLES: dict[str, Data] = {
    "endpoint.failing": {
        "endpoint": {"id": 42, "name": "Orders, production", "url": "https://hooks.customer.example/"},
        "reason": "consecutive_failures",
        "failing_since": "2025-03-09T09:20:11.004Z",
    },
    "endpoint.disabled": {
        "endpoint": {"id": 42, "name": "Orders, production", "url": "https://hooks.customer.example/"},
        "reason": "consecutive_failures",
        "failing_since": "2025-03-09T09:20:11.004Z",
        "held_events": 1284,
    },
    "endpoint.recovered": {
        "endpoint": {"id": 42, "name": "Orders, production", "url": "https://hooks.customer.example/"},
        "reason": "enabled",
        "failing_since": "2025-03-09T09:20:11.004Z",
    },
    "endpoint.events_expired": {
        "endpoint": {"id": 42, "name": "Orders, production", "url": "https://hooks.customer.example/"},
        "deliveries": 1284,
        "from": "2025-03-07T00:00:12.870Z",
        "to": "2025-03-07T08:41:03.221Z",
    },
    "endpoint.test": {
        "endpoint": {"id": 42, "name": "Orders, production", "url": "https://hooks.customer.example/sms"},
        "challenge": "c7e1b0d9f3",
        "sent_by": "jo@customer.example",
    },
}


# Lives.


def _outbound(rng: Random, batch: "_Batch", now: datetime) -> Life:
    """Live one message from its acceptance to what people do with it."""
    account, template = batch.account_id, batch.template
    message = _message(rng, batch)
    if rng.random() < 0.05:
        pace_s, canceled = 5.0, rng.random() < 0.3
        yield _event(
            account,
            "message.queued",
            now,
            message=message,
            scheduled_for=_rfc3339(now + timedelta(seconds=pace_s)),
            receipt=_receipt("queued", "platform", "QUEUED", 0, now),
        )
        now = yield pace_s / 2 if canceled else pace_s
        if canceled:
            receipt = _receipt("canceled", "platform", "CANCELED", 0, now)
            now = yield _event(account, "message.canceled", now, message=message, receipt=receipt, canceled_by="api")
            yield from batch.finish("canceled", message, now)
            return
    sent_at = now
    message["sent_at"] = _rfc3339(sent_at)
    receipt = _receipt("sent", "carrier", "ACCEPTD", 0, now)
    yield _event(account, "message.sent", now, message=message, receipt=receipt)
    fate = rng.random()
    if fate < 0.02:
        now = yield float(template.validity_s)
        yield from _expired(batch, message, sent_at, now)
    elif fate < 0.06:
        now = yield _latency_s(rng)
        yield from _failed(rng, batch, message, now)
    else:
        now = yield _latency_s(rng)
        now = yield _delivered(account, message, sent_at, now)
        yield from batch.finish("delivered", message, now)
        if template.link and rng.random() < 0.5:
            yield from _followed(rng, account, message, sent_at)
        if template.replies and rng.random() < 0.2:
            now = yield rng.uniform(3, 20)
            yield from _inbound(rng, account, now, message)


def _expired(batch: "_Batch", message: Data, sent_at: datetime, now: datetime) -> Life:
    # The platform may hurry a life that it has no room for, but a validity period never ends after its own event.
    valid_until = min(now, sent_at + timedelta(seconds=batch.template.validity_s))
    now = yield _event(
        batch.account_id,
        "message.expired",
        now,
        message=message,
        receipt=_receipt("expired", "carrier", "EXPIRED", 27, now),
        valid_until=_rfc3339(valid_until),
        failure=_failure("validity_expired", "carrier", False, "The handset stayed off until the validity ran out."),
    )
    yield from batch.finish("expired", message, now)


def _failed(rng: Random, batch: "_Batch", message: Data, now: datetime) -> Life:
    status, raw_status, raw_code, failure = rng.choice(FAILURES)
    receipt = _receipt(status, failure["stage"], raw_status, raw_code, now)
    now = yield _event(batch.account_id, "message.failed", now, message=message, receipt=receipt, failure=failure)
    yield from batch.finish("failed", message, now)


def _unconfirmed(rng: Random, batch: "_Batch", now: datetime) -> Life:
    """End a message that was sent before the stream began; sometimes its receipt comes after all."""
    message = _message(rng, batch)
    sent_at = now - timedelta(hours=UNCONFIRMED_HOURS)
    message["sent_at"] = _rfc3339(sent_at)
    receipt = _receipt("unconfirmed", "platform", "UNKNOWN", 0, now)
    yield _event(
        batch.account_id,
        "message.unconfirmed",
        now,
        message=message,
        receipt=receipt,
        waited_hours=UNCONFIRMED_HOURS,
    )
    if rng.random() < 0.3:
        now = yield rng.uniform(1, 10)
        yield _delivered(batch.account_id, message, sent_at, now)


def _followed(rng: Random, account: str, message: Data, sent_at: datetime) -> Life:
    """Fetch the link of a delivered message: robots first, then perhaps the person."""
    link = {
        "id": _id(rng, "lnk"),
        "short_url": "https://s.example/" + message["text"].rpartition("/")[2],
        "url": "https://www.shop.example/track?o=" + message["reference"],
        **{name: message[name] for name in ("batch_id", "campaign_id", "reference", "to")},
        "message_id": message["id"],
    }
    for number in range(1, rng.choice((2, 2, 3))):
        now = yield rng.uniform(0.2, 1.5)
        client, classification = rng.choice(ROBOTS)
        yield _event(
            account,
            "link.previewed",
            now,
            link=link,
            client=client,
            classification=classification,
            since_sent_ms=_ms(now - sent_at),
            preview_number=number,
        )
    client = rng.choice(BROWSERS)
    for number in range(1, rng.choice((1, 2, 2, 3))):
        now = yield rng.uniform(2, 20)
        yield _event(
            account,
            "link.clicked",
            now,
            link=link,
            client=client,
            classification={"kind": "click", "fetched_by": "handset", "reasons": []},
            click_number=number,
            first_click=number == 1,
            since_sent_ms=_ms(now - sent_at),
        )


def _inbound(rng: Random, account: str, now: datetime, message: Data | None = None) -> Life:
    """Receive a message: a reply to `message`, or one out of the blue. STOP opts the contact out; START undoes it."""
    opt_out = rng.random() < 0.15
    text = "STOP" if opt_out else rng.choice(ANSWERS)
    if message is None:
        network, phone = _phone(rng)
        inbound = _inbound_data(rng, phone, SHORT_CODE, text, network, now)
        yield _event(account, "message.received", now, inbound=inbound, opt_out=opt_out)
    else:
        inbound = _inbound_data(rng, message["to"], message["from"], text, message["network"], now)
        yield _event(account, "message.replied", now, inbound=inbound, in_reply_to=message, opt_out=opt_out)
    if opt_out:
        now = yield 0.0
        yield _preference(account, "contact.opted_out", inbound, message, now)
        if rng.random() < 0.3:
            now = yield rng.uniform(5, 30)
            inbound = _inbound_data(rng, inbound["from"], inbound["to"], "START", inbound["network"], now)
            now = yield _event(account, "message.received", now, inbound=inbound, opt_out=False)
            yield _preference(account, "contact.opted_in", inbound, message, now)


def _balance(rng: Random, account: str, now: datetime) -> Life:
    cents = rng.randrange(500, 5000)
    yield _event(
        account,
        "account.balance_low",
        now,
        balance={"amount": f"{cents / 100:.2f}", "currency": "GBP"},
        limit={"amount": "50.00", "currency": "GBP"},
        estimated_hours_left=cents // 200,
    )


class _Batch:
    """One send: what its messages share, and the count that tells when all of them are final."""

    __slots__ = ("account_id", "campaign_id", "cost", "counts", "id", "size", "template", "unsent")

    def __init__(self, rng: Random, account_id: str, size: int) -> None:
        self.id = _id(rng, "bat")
        self.account_id = account_id
        self.campaign_id = _id(rng, "cmp") if size > 1 else None
        self.template = rng.choice(TEMPLATES)
        self.size = size
        self.unsent = size
        self.counts: dict[str, int] = {}
        self.cost = Decimal(0)

    def finish(self, status: str, message: Data, now: datetime) -> Life:
        """Count one message's final status; the last one of a larger send completes it."""
        self.counts[status] = self.counts.get(status, 0) + 1
        if status != "canceled":
            self.cost += Decimal(message["price"]["amount"])
        if self.size > 1 and sum(self.counts.values()) == self.size:
            yield _event(
                self.account_id,
                "batch.completed",
                now,
                batch={"id": self.id, "campaign_id": self.campaign_id, "size": self.size},
                counts=self.counts,
                cost={"amount": str(self.cost), "currency": "GBP"},
            )


# Shared objects of `data`.


def _event(account: str, kind: str, now: datetime, **data: Any) -> SmsEvent:
    return SmsEvent(account, kind, orjson.dumps(data), now)


def _delivered(account: str, message: Data, sent_at: datetime, now: datetime) -> SmsEvent:
    receipt = _receipt("delivered", "handset", "DELIVRD", 0, now)
    return _event(account, "message.delivered", now, message=message, receipt=receipt, latency_ms=_ms(now - sent_at))


def _preference(account: str, kind: str, inbound: Data, message: Data | None, now: datetime) -> SmsEvent:
    return _event(
        account,
        kind,
        now,
        contact={"phone": inbound["from"]},
        method="keyword",
        keyword=inbound["keyword"],
        scope={"kind": "sender", "from": inbound["to"]},
        inbound_message_id=inbound["id"],
        last_message_id=message and message["id"],
        reference=message and message["reference"],
    )


def _message(rng: Random, batch: _Batch) -> Data:
    template = batch.template
    network, phone = _phone(rng)
    reference = f"order-{rng.randrange(10**5, 10**6)}"
    text = template.text.format(
        name=rng.choice(NAMES), code=rng.randrange(10**5, 10**6), link=f"https://s.example/{rng.getrandbits(32):08x}"
    )
    segments = _segments(text)
    return {
        "id": _id(rng, "msg"),
        "batch_id": batch.id,
        "campaign_id": batch.campaign_id,
        "reference": reference,
        "from": template.sender,
        "to": phone,
        "text": text,
        "segments": segments,
        "network": network,
        "price": {"amount": str(PRICE * segments["count"]), "currency": "GBP"},
        "metadata": {"team": template.team, "template": template.name},
        "sent_at": None,
    }


def _receipt(status: str, level: str, raw_status: str, raw_code: int, now: datetime) -> Data:
    return {
        "status": status,
        "final": status not in ("queued", "sent"),
        "level": level,
        "raw_status": raw_status,
        "raw_code": f"{raw_code:03d}",
        "done_at": _rfc3339(now),
    }


def _failure(code: str, stage: str, permanent: bool, detail: str) -> Data:
    return {"code": code, "stage": stage, "permanent": permanent, "detail": detail}


def _inbound_data(rng: Random, sender: str, to: str, text: str, network: Data, now: datetime) -> Data:
    return {
        "id": _id(rng, "inb"),
        "from": sender,
        "to": to,
        "to_kind": "long_code" if to.startswith("+") else "short_code",
        "keyword": text.split()[0].upper(),
        "text": text,
        "segments": _segments(text),
        "network": network,
        "received_at": _rfc3339(now),
    }


def _segments(text: str) -> Data:
    # The texts below are GSM 7-bit where they are ASCII; the real alphabet has more, and fewer, characters.
    encoding, one, many = ("gsm7", 160, 153) if text.isascii() else ("ucs2", 70, 67)
    length = len(text.encode("utf-16-le")) // 2  # an emoji takes two
    return {"count": 1 if length <= one else -(-length // many), "encoding": encoding}


def _phone(rng: Random) -> tuple[Data, str]:
    network = rng.choice(NETWORKS)
    if network["country"] == "GB":
        return network, f"+447700900{rng.randrange(1000):03d}"
    return network, f"+1{rng.choice(US_AREAS)}55501{rng.randrange(100):02d}"


def _id(rng: Random, prefix: str) -> str:
    return f"{prefix}_{rng.getrandbits(80):020x}"


def _latency_s(rng: Random) -> float:
    return rng.lognormvariate(0.3, 0.6)  # half within 1.3 s, one in a hundred after more than 5 s


def _rfc3339(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _ms(span: timedelta) -> int:
    return span // timedelta(milliseconds=1)


# What the platform sends, to whom, and what goes wrong.


class _Template(NamedTuple):
    name: str
    team: str
    sender: str
    text: str
    link: bool = False
    replies: bool = False
    validity_s: int = 60


SHORT_CODE = "60999"
LONG_CODE = "+447700900123"
PRICE = Decimal("0.0420")
UNCONFIRMED_HOURS = 72

TEMPLATES = (
    _Template(
        "parcel", "logistics", "PARCEL", "{name}, your parcel comes today, 14:00 to 16:00. Follow it: {link}", True
    ),
    _Template("offer", "marketing", "SHOP", "Hi {name} 👋 20 % off until Sunday, only for you: {link}", True),
    _Template("login", "security", "BANK", "{code} is your sign-in code. It works for 20 seconds.", validity_s=20),
    _Template(
        "visit", "clinic", LONG_CODE, "{name}, see you on Friday at 10:30. Reply YES, or NO to change it.", replies=True
    ),
    _Template("survey", "support", SHORT_CODE, "{name}, how did we do, 1 to 5? Reply STOP to opt out.", replies=True),
)
NAMES = ("Ada", "Bola", "Chen", "Dilnoza", "Eve", "Farid", "Zoë")
ANSWERS = ("YES", "NO", "5", "4 thanks", "INFO", "Yes please, see you then", "Can I come at 11 instead?")

NETWORKS: tuple[Data, ...] = (
    {"mcc": "234", "mnc": "10", "country": "GB", "carrier": "O2"},
    {"mcc": "234", "mnc": "15", "country": "GB", "carrier": "Vodafone"},
    {"mcc": "234", "mnc": "30", "country": "GB", "carrier": "EE"},
    {"mcc": "310", "mnc": "260", "country": "US", "carrier": "T-Mobile"},
    {"mcc": "311", "mnc": "480", "country": "US", "carrier": "Verizon"},
)
US_AREAS = ("202", "212", "303", "415", "617")

# status, raw status and raw code of the receipt, and the failure
FAILURES: tuple[tuple[str, str, int, Data], ...] = (
    ("undelivered", "UNDELIV", 1, _failure("number_not_in_service", "carrier", True, "The number is not in use.")),
    ("undelivered", "UNDELIV", 6, _failure("landline", "carrier", True, "A landline can't receive messages.")),
    ("undelivered", "UNDELIV", 31, _failure("handset_unreachable", "handset", False, "The handset is switched off.")),
    ("undelivered", "UNDELIV", 34, _failure("carrier_unreachable", "carrier", False, "The carrier didn't answer.")),
    ("rejected", "REJECTD", 40, _failure("blocked_by_carrier", "carrier", False, "The carrier blocked the sender.")),
    ("rejected", "REJECTD", 41, _failure("spam_filtered", "carrier", False, "The carrier took it for spam.")),
    ("rejected", "BLIST", 0, _failure("recipient_opted_out", "platform", True, "The contact has opted out.")),
    ("rejected", "NOROUTE", 0, _failure("no_route", "platform", True, "No carrier serves this number.")),
    ("undelivered", "UNKNOWN", 99, _failure("unknown", "carrier", False, "The carrier gave no reason.")),
)

_Fetch = tuple[Data, Data]
ROBOTS: tuple[_Fetch, ...] = (
    (
        {
            "ip": "192.0.2.44",
            "user_agent": "facebookexternalhit/1.1",
            "device": "robot",
            "os": None,
            "browser": None,
            "country": "US",
        },
        {"kind": "preview", "fetched_by": "messaging_service", "reasons": ["user_agent", "datacentre_ip"]},
    ),
    (
        {
            "ip": "198.51.100.7",
            "user_agent": "Mozilla/5.0 (compatible; LinkScanner/2.1)",
            "device": "robot",
            "os": None,
            "browser": None,
            "country": "IE",
        },
        {"kind": "scanner", "fetched_by": "security_scanner", "reasons": ["head_method", "too_fast"]},
    ),
)
BROWSERS: tuple[Data, ...] = (
    {
        "ip": "203.0.113.18",
        "user_agent": "Mozilla/5.0 (iPhone; CPU iPhone OS 18_3 like Mac OS X) AppleWebKit/605.1.15 Safari/604.1",
        "device": "phone",
        "os": "iOS",
        "browser": "Safari",
        "country": "GB",
    },
    {
        "ip": "203.0.113.91",
        "user_agent": "Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 Chrome/133.0 Mobile Safari/537.36",
        "device": "phone",
        "os": "Android",
        "browser": "Chrome",
        "country": "GB",
    },
)
