"""Mails go out over a real SMTP conversation: once a change, capped by the hour, tried again within bounds, by the owner alone."""

import asyncio
import email
import time
from collections.abc import AsyncIterator
from email.policy import SMTP as SMTP_POLICY
from typing import Any

import asyncpg
import pytest
from aiosmtpd.smtp import SMTP, Envelope

from dispatcher import settings as settings_module
from dispatcher.domain.mail import parse_smtp
from dispatcher.domain.principal import OPERATOR
from dispatcher.errors import InputError
from dispatcher.mail import mailer as mailer_module
from dispatcher.mail import smtp as smtp_module
from dispatcher.mail.mailer import Mailer
from dispatcher.sink import Behaviour
from dispatcher.store import alerts
from tests.rig import rig, until
from tests.store import people

TELL = "SELECT webhook.tell_of_endpoint($1, $2, 'consecutive_failures', now())"


class Server:
    """A mail server that keeps what it gets. `answers` come first, one a mail; `refuse` are addresses that it doesn't know."""

    def __init__(self) -> None:
        self.mails: list[Envelope] = []
        self.answers: list[str] = []
        self.refuse: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    async def handle_RCPT(self, server: Any, session: Any, envelope: Envelope, address: str, options: Any) -> str:  # noqa: N802 - the library names it
        if address in self.refuse:
            return "550 no such person"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:  # noqa: N802 - the same
        await self.gate.wait()
        if self.answers:
            return self.answers.pop(0)
        self.mails.append(envelope)
        return "250 kept"

    def message(self, n: int = -1) -> Any:
        content = self.mails[n].content
        assert isinstance(content, bytes)
        return email.message_from_bytes(content, policy=SMTP_POLICY)


@pytest.fixture
async def mailbox() -> AsyncIterator[Server]:
    made = Server()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: SMTP(made, loop=loop, hostname="mail.test"), "127.0.0.1", 0)
    made.port = listener.sockets[0].getsockname()[1]
    yield made
    made.gate.set()
    listener.close()
    await listener.wait_closed()


def make_mailer(dsn: str, mailbox: Server, *, owner: bool = True, **settings: Any) -> Mailer:
    given = {
        "smtp_url": f"smtp+plain://127.0.0.1:{mailbox.port}",
        "mail_from": "alerts@acme.example",
        "mail_sender_name": "Acme",
    }
    effective = settings_module.load(**given | settings)
    assert effective.mail_server is not None
    return Mailer(effective, effective.mail_server, dsn, lambda: owner)


async def tell(db: asyncpg.Connection, *types: str, account: str = "acct") -> int:
    endpoint = await people.endpoint(db, account)
    for type in types:
        await db.execute(TELL, endpoint, type)
    return endpoint


async def states(db: asyncpg.Connection) -> list[str]:
    return [row["state"] for row in await db.fetch("SELECT state FROM webhook.alert ORDER BY id")]


async def due_now(db: asyncpg.Connection) -> None:
    """Let the waits be over."""
    await db.execute("UPDATE webhook.alert SET due_at = clock_timestamp()")


@pytest.fixture
async def told(db: asyncpg.Connection) -> asyncpg.Connection:
    for address in ("one@example.com", "two@example.com"):
        await alerts.add_recipient(db, OPERATOR, account_id="acct", address=address)
    return db


async def drain(mailer: Mailer) -> None:
    while await mailer.look():
        pass


async def test_each_change_is_one_mail_to_all_recipients(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    await tell(told, "endpoint.failing", "endpoint.recovered")
    await tell(told, "endpoint.failing", account="other")  # nobody there is told
    mailer = make_mailer(dsn, mailbox)
    await drain(mailer)
    assert [mail.rcpt_tos for mail in mailbox.mails] == [["one@example.com", "two@example.com"]] * 2
    assert [mail.mail_from for mail in mailbox.mails] == ["alerts@acme.example"] * 2
    subjects = [mailbox.message(n)["Subject"] for n in range(2)]
    assert ["is failing" in subjects[0], "takes deliveries again" in subjects[1]] == [True, True]
    assert "example.com" not in str(mailbox.message()["To"]), "they needn't know of each other"
    assert await states(told) == ["mailed", "mailed"]
    assert await mailer.look() == 0


async def test_beyond_the_hours_bound_one_mail_tells_all(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    mailer = make_mailer(dsn, mailbox, alert_mails_per_hour=2)
    await tell(told, *["endpoint.failing", "endpoint.recovered"] * 3)
    await drain(mailer)
    assert len(mailbox.mails) == 2
    assert await states(told) == ["mailed"] * 2 + ["held"] * 4
    await due_now(told)
    await drain(mailer)
    assert len(mailbox.mails) == 2, "the hour is not over"
    await told.execute("UPDATE webhook.alert SET mailed_at = mailed_at - interval '61 minutes'")
    await due_now(told)
    await tell(told, "endpoint.disabled")
    await drain(mailer)
    assert len(mailbox.mails) == 3
    assert mailbox.message()["Subject"].endswith("5 changes at 2 endpoints")
    assert await states(told) == ["mailed"] * 7


async def test_operators_have_an_hour_of_their_own(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    await alerts.add_recipient(told, OPERATOR, account_id=None, address="noc@example.com")
    await tell(told, "endpoint.failing")
    await tell(told, "endpoint.failing", account="other")
    await drain(make_mailer(dsn, mailbox, alert_mails_per_hour=1))
    assert sorted(mail.rcpt_tos for mail in mailbox.mails) == [
        ["noc@example.com"],
        ["one@example.com", "two@example.com"],
    ]
    assert sorted(await states(told)) == ["held", "mailed", "mailed"]


async def test_a_failure_is_tried_again_under_the_same_id_and_given_up(
    dsn: str, told: asyncpg.Connection, mailbox: Server
) -> None:
    mailbox.answers = ["451 try later"] * 4
    await tell(told, "endpoint.failing")
    mailer = make_mailer(dsn, mailbox)
    for tries in range(1, 5):
        await drain(mailer)
        assert await told.fetchval("SELECT tries FROM webhook.alert") == tries
        assert await told.fetchval("SELECT due_at > clock_timestamp() + interval '50 s' FROM webhook.alert")
        await due_now(told)
    named = await told.fetchval("SELECT mail FROM webhook.alert")
    await drain(mailer)
    assert mailbox.message()["Message-ID"] == named
    assert await states(told) == ["mailed"]
    mailbox.answers = ["451 try later"] * 9
    await tell(told, "endpoint.disabled")
    for _ in range(9):
        await drain(mailer)
        await due_now(told)
    assert await states(told) == ["mailed", "given_up"]
    assert len(mailbox.answers) == 4, "five tries"


async def test_what_is_refused_for_good_is_given_up_at_once(
    dsn: str, told: asyncpg.Connection, mailbox: Server
) -> None:
    await tell(told, "endpoint.failing", "endpoint.recovered")
    mailbox.refuse = {"one@example.com"}
    mailbox.answers = ["552 too much"]
    await drain(make_mailer(dsn, mailbox))
    assert [mail.rcpt_tos for mail in mailbox.mails] == [["two@example.com"]]
    assert await states(told) == ["given_up", "mailed"]
    mailbox.refuse.add("two@example.com")
    await tell(told, "endpoint.failing")
    await drain(make_mailer(dsn, mailbox))
    assert await states(told) == ["given_up", "mailed", "given_up"]


async def test_a_server_that_is_away_or_silent_is_bounded(
    dsn: str, told: asyncpg.Connection, mailbox: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp_module, "SEND_S", 0.2)
    await tell(told, "endpoint.failing")
    mailbox.gate.clear()
    began = time.monotonic()
    await drain(make_mailer(dsn, mailbox))
    assert time.monotonic() - began < 5
    assert await states(told) == ["waiting"]
    await due_now(told)
    await drain(make_mailer(dsn, mailbox, smtp_url="smtp+plain://127.0.0.1:9"))
    assert await told.fetchval("SELECT tries FROM webhook.alert") == 2


async def test_starttls_is_insisted_on(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    """A server, or somebody before it, that says it has none gets neither password nor mail."""
    await tell(told, "endpoint.failing")
    await drain(make_mailer(dsn, mailbox, smtp_url=f"smtp://user:secret@127.0.0.1:{mailbox.port}"))
    assert mailbox.mails == []
    assert await states(told) == ["waiting"]


async def test_old_news_is_given_up_and_so_is_what_nobody_reads(
    dsn: str, told: asyncpg.Connection, mailbox: Server
) -> None:
    await tell(told, "endpoint.failing")
    await told.execute("UPDATE webhook.alert SET at = at - interval '25 hours'")
    await tell(told, "endpoint.failing")
    await told.execute("DELETE FROM webhook.alert_recipient")
    await drain(make_mailer(dsn, mailbox))
    assert await states(told) == ["given_up", "given_up"]
    assert mailbox.mails == []


async def test_two_at_once_send_it_once(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    """As an owner and its successor may be, for a moment."""
    await tell(told, "endpoint.failing")
    one, two = make_mailer(dsn, mailbox), make_mailer(dsn, mailbox)
    await asyncio.gather(one.look(), two.look())
    assert len(mailbox.mails) == 1


async def test_a_standby_sends_nothing(
    dsn: str, told: asyncpg.Connection, mailbox: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailer_module, "LOOK_S", 0.01)
    await tell(told, "endpoint.failing")
    looks = 0

    def is_owner() -> bool:
        nonlocal looks
        looks += 1
        return looks > 5 and bool(mailbox.answers)

    standby = make_mailer(dsn, mailbox)
    standby._is_owner = is_owner
    task = asyncio.create_task(standby.run())
    await until(lambda: looks > 10)
    assert mailbox.mails == []
    mailbox.answers = ["451 not yet"]  # now it is the owner
    await until(lambda: not mailbox.answers)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await told.fetchval("SELECT tries FROM webhook.alert") == 1


async def test_deliveries_do_not_wait_for_a_mail_server(
    dsn: str, mailbox: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with a server that never answers: an endpoint fails, its account is told, the other endpoint gets its events."""
    monkeypatch.setattr(mailer_module, "LOOK_S", 0.01)
    mailbox.gate.clear()
    async with rig(dsn, retry_schedule_s="1,1,1,1", failing_after_s=0) as r:
        await alerts.add_recipient(r.db, OPERATOR, account_id="acct", address="ops@example.com")
        mailer = asyncio.create_task(make_mailer(dsn, mailbox).run())
        await r.endpoint("/a", behaviour=Behaviour(status=500))
        await r.endpoint("/b")
        await people.emit(r.db, 1)
        await until(lambda: r.db.fetchval("SELECT tries = 1 FROM webhook.alert"))
        before = len(r.received)
        await people.emit(r.db, 20)
        await until(lambda: sum(one.path == "/b" for one in r.received[before:]) >= 20)
        assert mailbox.mails == []
        mailbox.gate.set()
        await until(lambda: mailbox.mails)
        mailer.cancel()
        await asyncio.gather(mailer, return_exceptions=True)
    assert "is failing" in mailbox.message()["Subject"]


@pytest.mark.parametrize(
    "url",
    [
        "mail.example.com",
        "http://mail.example.com",
        "smtp://",
        "smtp://user@mail.example.com",
        "smtp://a:b@h:port",
        "smtp://h/path",
    ],
)
def test_what_is_no_mail_server_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match="SMTP_URL") as caught:
        settings_module.load(smtp_url=url.replace("a:b", "a:hunter2"), mail_from="a@b.example")
    assert "hunter2" not in str(caught.value)


def test_mails_come_from_somebody() -> None:
    with pytest.raises(InputError, match="DISPATCHER_MAIL_FROM"):
        settings_module.load(smtp_url="smtp://h")
    with pytest.raises(InputError, match="DISPATCHER_MAIL_FROM"):
        settings_module.load(mail_from="a@b\r\nBcc: c@d.example")


def test_a_mail_servers_url_is_read() -> None:
    server = parse_smtp("smtp://me%40here:p%3Aw@mail.example.com")
    assert (server.host, server.port, server.security, server.user, server.password) == (
        "mail.example.com", 587, "starttls", "me@here", "p:w"
    )  # fmt: skip
    assert "p:w" not in repr(server)
    assert (parse_smtp("smtps://h").port, parse_smtp("smtp+plain://h").port) == (465, 25)


async def test_what_was_held_is_told_with_what_comes_next(dsn: str, told: asyncpg.Connection, mailbox: Server) -> None:
    """Not after it: the held one waits for its next look, which a fresh one needn't."""
    mailer = make_mailer(dsn, mailbox, alert_mails_per_hour=1)
    await tell(told, "endpoint.failing", "endpoint.recovered")
    await drain(mailer)
    assert await states(told) == ["mailed", "held"]
    await told.execute("UPDATE webhook.alert SET mailed_at = mailed_at - interval '61 minutes'")
    await tell(told, "endpoint.disabled")
    await drain(mailer)
    assert mailbox.message()["Subject"].strip().endswith("2 changes at 2 endpoints")
