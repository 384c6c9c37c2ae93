"""Who sends the mails: one task of the process that owns the database, with a connection of its own.

Alerts are rows, written with the change that they tell of; so nothing is lost while mail, or this process, is away. The task looks every few
seconds and sends one mail after the other. Deliveries don't wait for it, whatever a mail server does: it shares the loop with them and nothing
else, and a conversation is over after half a minute.

A mail counts as tried before it is sent and as sent after the server took it. Whoever dies in between leaves it to the next owner, who sends it
again a minute later, under the same Message-ID: a restart or a takeover may repeat the one mail that was under way, and loses none. A mail that
fails is tried five times within four hours, then given up, which is logged; so is what could not be told within a day.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from dispatcher.domain.mail import MailServer
from dispatcher.domain.text import clean
from dispatcher.errors import DispatcherError
from dispatcher.mail.message import Letterhead, compose
from dispatcher.mail.smtp import MailError, send
from dispatcher.settings import Settings
from dispatcher.store import alerts
from dispatcher.store.alerts import OPERATORS, Mail
from dispatcher.store.pool import Pool

_log = structlog.get_logger(room="mail")

LOOK_S = 5.0
AUDIENCES = 20  # a look; each gets one mail, then it is another's turn
ERROR_CHARS_MAX = 500


class Mailer:
    """`run` until cancelled. `is_owner` says whether this process delivers now; a standby sends nothing."""

    def __init__(self, settings: Settings, server: MailServer, dsn: str, is_owner: Callable[[], bool]) -> None:
        assert settings.mail_from is not None, "settings hold the two together"
        self._server = server
        self._is_owner = is_owner
        self._pool = Pool(dsn, size=1, statement_timeout_s=settings.web_statement_timeout_s)
        self._domain = settings.mail_from.rpartition("@")[2]
        self._letterhead = Letterhead(
            product=settings.product_name,
            sender_name=settings.mail_sender_name or settings.product_name,
            sender=settings.mail_from,
            panel=settings.public_url,
            per_hour=settings.alert_mails_per_hour,
        )

    async def run(self) -> None:
        try:
            while True:
                try:
                    while self._is_owner() and await self.look():
                        pass  # there may be more
                except DispatcherError as exc:
                    _log.info("mail.look", error=str(exc))  # the database is away or busy: later
                except Exception:  # noqa: BLE001 - logged with its trace; deliveries must not end because of a mail
                    _log.exception("mail.look")
                await asyncio.sleep(LOOK_S)
        finally:
            await self._pool.close()

    async def look(self) -> int:
        """Send a mail to each audience that is to get one now; return how many were taken."""
        async with self._pool.connection() as db:
            due = await alerts.audiences_due(db, AUDIENCES)
        taken = 0
        for audience in due:
            async with self._pool.connection() as db:
                mail = await alerts.take(db, audience, per_hour=self._letterhead.per_hour, domain=self._domain)
            if mail is not None:
                taken += 1
                await self._send(mail)
        return taken

    async def _send(self, mail: Mail) -> None:
        whose = "operators" if mail.audience == OPERATORS else mail.audience
        try:
            message = compose(mail, self._letterhead, datetime.now(UTC))
            refused = await send(self._server, self._letterhead.sender, mail.addresses, message)
        except MailError as exc:
            error = clean(str(exc))[:ERROR_CHARS_MAX]
            is_over = exc.is_permanent or mail.is_last_try
            _log.warning("mail.failed", audience=whose, mail=mail.message_id, error=error, given_up=is_over)
            if is_over:
                async with self._pool.connection() as db:
                    await alerts.give_up(db, mail.ids)
            return
        async with self._pool.connection() as db:
            await alerts.note_mailed(db, mail.ids)
        for answer in refused.values():
            _log.warning("mail.refused", audience=whose, mail=mail.message_id, error=clean(answer)[:ERROR_CHARS_MAX])
        _log.info(
            "mail.sent", audience=whose, mail=mail.message_id, alerts=len(mail.alerts), addresses=len(mail.addresses)
        )
