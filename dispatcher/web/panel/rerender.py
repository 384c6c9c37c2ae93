"""A delivery's request, made once more from the event and the endpoint as it is now. Requests aren't kept; what they are made of is.

It is what a next attempt would send, but for the time: the endpoint may have changed since, and whoever shows it says so. Values of the
endpoint's own headers are hidden, as everywhere. As curl the signatures are hidden too, which were too old to be accepted by then.
"""

import shlex
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dispatcher.domain.event import Event, traceparent_of
from dispatcher.domain.moment import to_us
from dispatcher.domain.shape import HIDDEN, make_shape, redacted
from dispatcher.domain.signing import signing_in
from dispatcher.domain.url import parse_url
from dispatcher.engine.request import make_requests
from dispatcher.errors import DispatcherError
from dispatcher.settings import Settings
from dispatcher.store.endpoint import EndpointView

SHOWN_BYTES_MAX = 16_384  # of a body
_BY_CURL = ("host", "content-length", "user-agent")


@dataclass(frozen=True, slots=True)
class Rerendered:
    """The request as text and as a command, or in words why there is none. `cut`: the body goes on."""

    request: str | None = None
    curl: str | None = None
    cut: bool = False
    why_not: str | None = None


def rerender(
    settings: Settings, view: EndpointView | None, event: dict[str, Any], number: int, at: datetime
) -> Rerendered:
    """Make attempt `number` of an event (as `Admin.show` tells it) at an endpoint once more."""
    if event["payload"] is None:
        return Rerendered(why_not="nothing has kept the event's data: it was erased, given up, or taken by retention")
    if view is None:
        return Rerendered(why_not="the endpoint was deleted, and what its requests were made of with it")
    try:
        config = view.config | view.credentials
        shape = make_shape(config)
        target = parse_url(view.config["url"], settings.address_policy)
        requests = make_requests(target, settings.user_agent, signing_in(view.secrets, shape.signing), shape)
    except DispatcherError as exc:
        return Rerendered(why_not=exc.message)
    happened_us = None if event["occurred_at"] is None else to_us(event["occurred_at"])
    made = Event(
        event["id"], event["account_id"], event["type"], event["payload"].encode(), to_us(event["created_at"]), happened_us,
        event["event_id"].encode(), traceparent=traceparent_of(event["traceparent"] or ""),
    )  # fmt: skip
    raw = redacted(requests.render(made, b"%d" % int(at.timestamp()), number), shape)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")[1:]
    cut = len(body) > SHOWN_BYTES_MAX
    shown = body[:SHOWN_BYTES_MAX].decode("utf-8", "ignore" if cut else "replace")
    signatures = {"webhook-signature"}
    if shape.extra_signature is not None:
        signatures.add(shape.extra_signature.header)
    request = f"{head.decode('latin-1')}\n\n{shown}".replace("\r\n", "\n")
    return Rerendered(request, as_curl(target.url, lines, None if cut else shown, signatures), cut)


def as_curl(url: str, headers: list[str], body: str | None, signatures: set[str]) -> str:
    """Return a request as a command. Each text is quoted for the shell; a body that isn't shown whole is a file's."""
    parts = [f"curl -i {shlex.quote(url)}"]
    for line in headers:
        name, _, value = line.partition(": ")
        if name not in _BY_CURL:
            parts.append(f"-H {shlex.quote(f'{name}: {HIDDEN if name in signatures else value}')}")
    parts.append(f"--data-binary {'@body.json' if body is None else shlex.quote(body)}")
    return " \\\n  ".join(parts)
