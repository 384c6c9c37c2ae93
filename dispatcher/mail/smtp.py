"""Handing a mail to a server: one conversation a mail, bounded as a whole."""

import asyncio
import socket
from collections.abc import Sequence
from email.message import EmailMessage

import aiosmtplib

from dispatcher.domain.mail import MailServer

SEND_S = 30.0


class MailError(Exception):
    """The server did not take the mail. `is_permanent`: nor would it another time."""

    def __init__(self, said: str, *, is_permanent: bool = False) -> None:
        super().__init__(said)
        self.is_permanent = is_permanent


async def send(server: MailServer, sender: str, addresses: Sequence[str], message: EmailMessage) -> dict[str, str]:
    """Send one mail to all addresses; return those that were refused, with why, while others took it. Raises MailError."""
    try:
        async with asyncio.timeout(SEND_S):
            refused, _ = await aiosmtplib.send(
                message,
                sender=sender,
                recipients=list(addresses),
                hostname=server.host,
                port=server.port,
                username=server.user,
                password=server.password,
                use_tls=server.security == "tls",
                start_tls=server.security == "starttls",
                validate_certs=True,
                local_hostname=socket.gethostname(),  # its own way looks a name up
                timeout=SEND_S,
            )
    except TimeoutError as exc:
        raise MailError(f"no end within {SEND_S:g} s") from exc
    except aiosmtplib.SMTPRecipientsRefused as exc:
        codes = [refusal.code for refusal in exc.recipients]
        said = "; ".join(f"{refusal.code} {refusal.message}" for refusal in exc.recipients)
        raise MailError(f"every address was refused: {said}", is_permanent=all(code >= 500 for code in codes)) from exc
    except aiosmtplib.SMTPResponseException as exc:
        raise MailError(f"{exc.code} {exc.message}", is_permanent=exc.code >= 500 and exc.code not in _OURS) from exc
    except (aiosmtplib.SMTPException, OSError) as exc:
        raise MailError(f"{type(exc).__name__}: {exc}") from exc
    return {address: f"{answer.code} {answer.message}" for address, answer in refused.items()}


# Of our login or its server, not of the mail: an operator will mend it.
_OURS = (530, 534, 535, 538, 554)
