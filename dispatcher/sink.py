"""A webhook receiver for trying things out: it counts, checks signatures, and misbehaves on request.

    peer ⇄ _Connection (parse, answer in order) → Sink (count, verify, tell) ⇠ Behaviour per path

A request is *recorded* the moment its last byte is parsed and *answered* by the `Behaviour` of its path. Behaviours
are rendered to bytes when they are set, so the common case (204 at once) is a lookup and a write: the demo, the tests
and the benchmarks all lean on this file, and it must not be the limit of any of them. That is also why it is a bare
`asyncio.Protocol` on httptools.

There are no tasks here. A connection owns at most one timer (its delay, its next byte, its next chunk) and drops it
when the peer leaves; the `Sink` owns the set of connections, and `stop()` aborts them all. Reading never stops while
an answer is pending, else a peer that left would go unnoticed.

What it never does: change its answer because a signature is bad, look at the method, or keep a body unasked.
"""

import asyncio
import base64
import binascii
import hmac
import random
import signal
import socket
import ssl
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, NamedTuple, cast, get_args

import click
import httptools
import orjson
import uvloop
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dispatcher.errors import InputError

Mode = Literal[
    "answer",
    "hang",
    "reset",
    "reset_midway",
    "close",
    "redirect",
    "endless",
    "huge_headers",
    "slow_headers",
    "garbage",
    "junk_after",
    "informational",
    "trailers",
]
Then = Literal["next", "close", "reset", "hang", "drip", "pump"]

MAX_BODY_BYTES = 1 << 20  # four times the largest payload that the outbox accepts by default
MAX_HEAD_BYTES = 1 << 16  # what nginx and Apache refuse by default is smaller still
MAX_OWED = 1_000  # pipelined requests that wait for their answers on one connection; beyond it the peer is cut off
# An id is remembered for at least so many more ids, and for at most twice as many: two million of them took 193 MB.
MAX_IDS = 1_000_000
Key = bytes | Ed25519PublicKey
TOLERANCE_S = 300  # Standard Webhooks leaves it open; its official libraries use five minutes
HANDSHAKE_TIMEOUT_S = 5.0
LINGER_S = 1.0  # closing on unread bytes sends a reset, which can overtake the refusal that explains it
BACKLOG = 4_096  # asyncio's 100 drops connections when a benchmark opens a thousand at once

ENDLESS_CHUNK = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
HUGE_HEADERS = "".join(f"x-huge-{n}: {'x' * 1_024}\r\n" for n in range(1_024))
GARBAGE = b"\x00\xff\x16\x03 this is not HTTP\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Say what a path does to a request. By default it answers 204 at once.

    `delay_s` plus a uniform share of `delay_jitter_s` pass before anything is sent. Then `fail_rate` of the requests
    get `fail_status`, and the others get what `mode` says: "answer" gives `status` and `body`, the rest are hostile.
    `retry_after`, and `command` as webhook-delivery, go with either status. "slow_headers" sends the answer one byte every `drip_s`.
    """

    delay_s: float = 0
    delay_jitter_s: float = 0
    fail_rate: float = 0.0
    fail_status: int = 500
    status: int = 204
    retry_after: str | None = None
    command: str | None = None
    mode: Mode = "answer"
    body: bytes = b""
    drip_s: float = 1.0

    def __post_init__(self) -> None:
        if not (self.delay_s >= 0 and self.delay_jitter_s >= 0 and self.drip_s >= 0):
            raise InputError("a sink's delays are seconds, 0 or more")
        if not 0 <= self.fail_rate <= 1:
            raise InputError(f"fail rate {self.fail_rate} is not a share; give 0 to 1")
        for status in (self.status, self.fail_status):
            if not 200 <= status <= 599:
                raise InputError(f"status {status} is not a final HTTP status; give 200 to 599")
        if self.body and self.status in (204, 304):
            raise InputError(f"an answer with status {self.status} has no body; give another status or no body")
        if self.retry_after is not None and not self.retry_after.isprintable():
            raise InputError("Retry-After is one printable line: seconds or an HTTP date")
        if self.command is not None and not self.command.isprintable():
            raise InputError("webhook-delivery is one printable line: disable, or abort-message")
        if self.mode not in get_args(Mode):
            raise InputError(f"mode {self.mode!r} is unknown; give one of {', '.join(get_args(Mode))}")


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived. `signature_ok` is None where no secret is known, `status` where no whole answer will be given."""

    path: str
    webhook_id: str | None
    timestamp: int | None
    attempt: int | None
    received_at: float
    body: bytes
    signature_ok: bool | None
    status: int | None


class Sink:
    """Receive webhooks on one address; each URL path may behave in its own way.

    `secrets` is one `whsec_…` or `whpk_…` for every path, or one by path. `on_event` is called in the loop for each request: it
    must be quick. The last `keep` requests stay in `kept`. The counts are plain attributes. `duplicates` are requests
    whose webhook-id came before on the same path, whatever the answer was then, so retries after our own failures are
    among them; ids are remembered as `max_ids` says (see MAX_IDS).
    """

    def __init__(
        self,
        *,
        secrets: Mapping[str, str] | str | None = None,
        behaviour: Behaviour | None = None,
        on_event: Callable[[Received], None] | None = None,
        rng: random.Random | None = None,
        keep: int = 0,
        max_ids: int = MAX_IDS,
    ) -> None:
        self.received = 0
        self.distinct = 0
        self.duplicates = 0
        self.bad_signature = 0
        self.by_status: Counter[int] = Counter()  # whole answers; our refusals (400, 413, 431) included
        self.kept: deque[Received] = deque(maxlen=keep)
        self.port = 0
        self._host = ""
        self._scheme = "http"
        self._on_event = on_event
        self._rng = rng or random.Random()  # noqa: S311 — dice for failures and jitter, no secret  # nosec B311
        self._one_key = read_key(secrets) if isinstance(secrets, str) else None
        by_path = secrets if isinstance(secrets, Mapping) else {}
        self._keys = {path.encode(): read_key(secret) for path, secret in by_path.items()}
        self._wants_body = bool(on_event or keep or secrets)
        self._default = _plan(behaviour or Behaviour())
        self._plans: dict[bytes, _Plan] = {}
        # Two generations of ids: dropping the older set whole is cheap, where taking the first key out of a large
        # dict again and again is not.
        self._max_ids = max_ids
        self._ids: set[bytes] = set()
        self._older_ids: set[bytes] = set()
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()  # each adds and removes itself
        self._empty = asyncio.Event()

    @property
    def url(self) -> str:
        """Give the address without a path, e.g. `http://127.0.0.1:8080`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}"

    @property
    def connections(self) -> int:
        """Count the connections that are open now."""
        return len(self._connections)

    def set_behaviour(self, path: str, behaviour: Behaviour) -> None:
        """Let `path` (exact, without query) behave like this from the next request on."""
        self._plans[path.encode()] = _plan(behaviour)

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, ssl: ssl.SSLContext | None = None, reuse_port: bool = False
    ) -> None:
        """Listen. Port 0 takes a free one, told by `port`. Raises OSError when the address is taken."""
        server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self),
            host,
            port,
            ssl=ssl,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if ssl else None,
            backlog=BACKLOG,
            reuse_port=reuse_port or None,
        )
        self._server = server
        self._host = host
        self._scheme = "https" if ssl else "http"
        self.port = server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and drop every connection, answered or not. Twice is fine.

        A peer that hangs in its TLS handshake isn't ours yet; the loop drops it within HANDSHAKE_TIMEOUT_S.
        """
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        while self._connections:
            for connection in tuple(self._connections):
                connection.abort()
            self._empty.clear()
            await self._empty.wait()
        await server.wait_closed()

    def _opened(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        if self._server is None:  # its handshake ended after stop()
            connection.abort()

    def _lost(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _receive(self, path: bytes, headers: dict[bytes, bytes], body: bytes) -> "_Reply":
        """Record one request and decide its answer."""
        self.received += 1
        plan = self._plans.get(path, self._default)
        reply = plan.reply
        if plan.dice:
            reply = self._roll(plan)
        webhook_id = headers.get(b"webhook-id")
        if webhook_id is not None:
            self._note_id(path + b" " + webhook_id)
        if self._wants_body:
            self._tell(path, webhook_id, headers, body, reply.status or None)
        return reply

    def _roll(self, plan: "_Plan") -> "_Reply":
        behaviour = plan.behaviour
        delay_s = behaviour.delay_s + self._rng.random() * behaviour.delay_jitter_s
        reply = plan.failure if self._rng.random() < behaviour.fail_rate else plan.reply
        return reply._replace(delay_s=delay_s)

    def _note_id(self, key: bytes) -> None:
        if key in self._ids or key in self._older_ids:
            self.duplicates += 1
        else:
            self.distinct += 1
        self._ids.add(key)
        if len(self._ids) >= self._max_ids:
            self._older_ids, self._ids = self._ids, set()

    def _tell(
        self, path: bytes, webhook_id: bytes | None, headers: dict[bytes, bytes], body: bytes, status: int | None
    ) -> None:
        now = time.time()
        key = self._keys.get(path, self._one_key)
        timestamp = headers.get(b"webhook-timestamp", b"")
        signature_ok = None
        if key is not None:
            signatures = headers.get(b"webhook-signature", b"")
            signature_ok = verify(key, webhook_id or b"", timestamp, signatures, body, now)
            self.bad_signature += not signature_ok
        if self._on_event is None and not self.kept.maxlen:
            return
        event = Received(
            path=path.decode("latin-1"),
            webhook_id=None if webhook_id is None else webhook_id.decode("latin-1"),
            timestamp=_number(timestamp),
            attempt=_number(headers.get(b"x-attempt", b"")),
            received_at=now,
            body=body,
            signature_ok=signature_ok,
            status=status,
        )
        self.kept.append(event)
        if self._on_event is not None:
            self._on_event(event)


def decode_secret(secret: str) -> bytes:
    """Give the key behind `whsec_<base64>`; the prefix and the padding may be missing, as in the official libraries."""
    try:
        text = secret.removeprefix("whsec_").rstrip("=")
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)  # Python 3.13 refuses more than it needs
    except (binascii.Error, ValueError) as exc:
        raise InputError("the signing secret is not base64; copy it whole, as in whsec_MfKQ9r8GKYqr…") from exc
    if not key:
        raise InputError("the signing secret is empty; copy it whole, as in whsec_MfKQ9r8GKYqr…")
    return key


def read_key(secret: str) -> Key:
    """Give the secret behind `whsec_…`, or the public key behind `whpk_…`."""
    if not secret.startswith("whpk_"):
        return decode_secret(secret)
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(secret.removeprefix("whpk_"), validate=True))
    except (binascii.Error, ValueError) as exc:
        raise InputError("the public key is not base64 of 32 bytes; copy it whole, as in whpk_1SiA4o9hyqTC…") from exc


def verify(key: Key, webhook_id: bytes, timestamp: bytes, signatures: bytes, body: bytes, now: float) -> bool:
    """Check one request by Standard Webhooks: v1 with a secret, v1a with a public key.

    One of the space-delimited signatures must match, and the timestamp be within TOLERANCE_S of `now`.
    """
    sent_at = _number(timestamp)
    if not webhook_id or sent_at is None or abs(now - sent_at) > TOLERANCE_S:
        return False
    signed = b"%b.%b.%b" % (webhook_id, timestamp, body)
    if isinstance(key, Ed25519PublicKey):
        return any(_verify_v1a(key, signature, signed) for signature in signatures.split(b" "))
    digest = hmac.digest(key, signed, "sha256")
    expected = b"v1," + binascii.b2a_base64(digest, newline=False)
    return any(hmac.compare_digest(expected, signature) for signature in signatures.split(b" "))


def _verify_v1a(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(binascii.a2b_base64(signature.removeprefix(b"v1a,"), strict_mode=True), signed)
    except (InvalidSignature, binascii.Error):
        return False
    return signature.startswith(b"v1a,")


def _number(digits: bytes) -> int | None:
    # The length is bounded because int() is quadratic, and raises beyond 4,300 digits.
    return int(digits) if digits.isdigit() and len(digits) <= 12 else None


class _Reply(NamedTuple):
    """One answer, ready to go: wait `delay_s`, send `data`, `then` do something. A tuple, as hot loops make them."""

    status: int  # counted once `data` is out; 0 where no whole answer is given
    data: bytes
    then: Then = "next"
    delay_s: float = 0.0
    gap_s: float = 0.0
    last: bool = False  # close when it is out


class _Plan(NamedTuple):
    """A behaviour, rendered. `dice` is false when each request gets the same `reply`."""

    behaviour: Behaviour
    reply: _Reply
    failure: _Reply
    dice: bool


def _plan(behaviour: Behaviour) -> _Plan:
    extra = "" if behaviour.retry_after is None else f"retry-after: {behaviour.retry_after}\r\n"
    if behaviour.command is not None:
        extra += f"webhook-delivery: {behaviour.command}\r\n"
    status = behaviour.status
    whole = _render(status, extra, behaviour.body)
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    replies: dict[Mode, _Reply] = {
        "answer": _Reply(status, whole),
        "hang": _Reply(0, b"", "hang"),
        "reset": _Reply(0, b"", "reset"),
        "reset_midway": _Reply(0, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf", "reset"),
        "close": _Reply(0, b"", "close"),
        # To ourselves: a client that follows is seen at /redirected.
        "redirect": _Reply(302, _render(302, "location: /redirected\r\n" + extra, b"")),
        "endless": _Reply(0, chunked, "pump"),
        "huge_headers": _Reply(status, _render(status, HUGE_HEADERS + extra, behaviour.body)),
        "slow_headers": _Reply(status, whole, "drip", gap_s=behaviour.drip_s),
        "garbage": _Reply(0, GARBAGE, "close"),
        "junk_after": _Reply(status, whole + GARBAGE),
        "informational": _Reply(status, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + whole),
        "trailers": _Reply(200, chunked + b"2\r\nok\r\n0\r\nx-trailer: one\r\nx-trailer: two\r\n\r\n"),
    }
    return _Plan(
        behaviour,
        reply=replies[behaviour.mode],
        failure=_Reply(behaviour.fail_status, _render(behaviour.fail_status, extra, b"")),
        dice=bool(behaviour.delay_s or behaviour.delay_jitter_s or behaviour.fail_rate),
    )


def _render(status: int, extra: str, body: bytes) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unnamed"
    # RFC 9110 §8.6: no Content-Length with 204; a 304 would announce the body that it doesn't have.
    length = "" if status in (204, 304) else f"content-length: {len(body)}\r\n"
    return f"HTTP/1.1 {status} {phrase}\r\n{extra}{length}\r\n".encode() + body


class _RefusedError(Exception):
    """Stops the parser inside its callback; the request is answered with `status` and the connection ends."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Connection(asyncio.Protocol):
    """Parse one peer's requests and answer them in order.

    `_owed` holds the replies that could not be written at once; its first is the one under way. A half-closed peer is
    treated as gone: TLS can't tell the two apart, and a hanging answer has to end when its peer leaves.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._in_head = False
        self._bytes = 0  # on the wire since the read in which the request began
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._owed: deque[_Reply] = deque()
        self._timer: asyncio.Handle | None = None  # the only one; every use replaces one that has fired
        self._deaf = False  # refused: what still comes is read and dropped
        self._pumping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._sink._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._owed.clear()
        self._pumping = False
        self._sink._lost(self)

    def abort(self) -> None:
        self._transport.abort()

    # A peer that doesn't read its answers isn't read either, which bounds the write buffer.

    def pause_writing(self) -> None:
        self._transport.pause_reading()
        if self._pumping and self._timer is not None:
            self._timer.cancel()

    def resume_writing(self) -> None:
        self._transport.resume_reading()
        if self._pumping:
            self._timer = self._loop.call_soon(self._pump)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as exc:
            if not isinstance(exc.__context__, _RefusedError):
                raise  # our own bug, or that of on_event; the loop reports it and ends the connection
            self._refuse(exc.__context__.status)
        except httptools.HttpParserError:
            self._refuse(400)
        else:
            # The parser gathers a header, or a trailer, for as long as it comes.
            if self._in_head and self._bytes > MAX_HEAD_BYTES:
                self._refuse(431)
            elif self._bytes > MAX_HEAD_BYTES + MAX_BODY_BYTES:
                self._refuse(413)

    # Callbacks of httptools. URL and body may come in pieces; trailers come as headers after the body, and are dropped.

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = {}
        self._in_head = True
        self._bytes = 0
        self._body = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._parser.should_upgrade():  # the parser would end the request here, without its body
            raise _RefusedError(400)
        headers = self._headers
        if (_number(headers.get(b"content-length", b"0")) or 0) > MAX_BODY_BYTES:
            raise _RefusedError(413)
        if b"expect" in headers and not self._owed and headers[b"expect"].lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            raise _RefusedError(413)
        if self._sink._wants_body:
            self._body.append(body)

    def on_message_complete(self) -> None:
        path = self._url
        if b"?" in path:
            path = path.partition(b"?")[0]
        reply = self._sink._receive(path, self._headers, b"".join(self._body))
        last = not self._parser.should_keep_alive()
        if not self._owed and not last and reply.then == "next" and not reply.delay_s:
            self._sink.by_status[reply.status] += 1
            self._transport.write(reply.data)
        else:
            self._owe(reply._replace(last=True) if last else reply)

    # Answers that take their time.

    def _owe(self, reply: _Reply) -> None:
        if len(self._owed) >= MAX_OWED:
            self.abort()
            return
        self._owed.append(reply)
        if len(self._owed) == 1:
            self._timer = self._loop.call_later(reply.delay_s, self._give)

    def _give(self) -> None:
        reply = self._owed[0]
        if reply.then == "drip":
            self._drip(0)
            return
        self._transport.write(reply.data)
        if reply.then == "next":
            self._given()
        elif reply.then == "close":
            self._transport.close()
        elif reply.then == "reset":
            self._reset()
        elif reply.then == "pump":
            self._pumping = True
            self._pump()
        # "hang" waits for the peer to leave.

    def _given(self) -> None:
        reply = self._owed.popleft()
        self._sink.by_status[reply.status] += 1
        if self._deaf and not self._owed:
            self._timer = self._loop.call_later(LINGER_S, self._transport.close)
        elif reply.last:
            self._transport.close()
        elif self._owed:
            self._timer = self._loop.call_later(self._owed[0].delay_s, self._give)

    def _drip(self, at: int) -> None:
        reply = self._owed[0]
        self._transport.write(reply.data[at : at + 1])
        if at + 1 < len(reply.data):
            self._timer = self._loop.call_later(reply.gap_s, self._drip, at + 1)
        else:
            self._given()

    def _pump(self) -> None:
        # One chunk per turn of the loop: where the peer reads as fast as we write, a plain loop would never end.
        self._timer = self._loop.call_soon(self._pump)
        self._transport.write(ENDLESS_CHUNK)

    def _reset(self) -> None:
        # A linger of zero seconds turns the close into a reset.
        no_linger = struct.pack("ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self.abort()

    def _refuse(self, status: int) -> None:
        self._deaf = True
        self._owe(_Reply(status, _render(status, "connection: close\r\n", b""), last=True))


def _ask_for_client(tls: ssl.SSLContext, ca_file: str) -> None:
    try:
        tls.load_verify_locations(ca_file)
    except ssl.SSLError as exc:
        raise InputError(f"{ca_file} holds no certificate in PEM form") from exc
    tls.verify_mode = ssl.CERT_REQUIRED


@click.command("sink")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--path", help="Answer on this path only; others get 404. Without it, any path does.")
@click.option("--secret", envvar="WEBHOOK_SECRET", show_envvar=True, help="whsec_… or whpk_…; checks each signature.")
@click.option("--status", default=204, show_default=True, help="What to answer.")
@click.option("--delay", default=0.0, show_default=True, help="Seconds before the answer.")
@click.option("--fail-rate", default=0.0, show_default=True, help="Share of the requests answered 500 instead, 0 to 1.")
@click.option("--retry-after", help="Retry-After of each answer: seconds, or an HTTP date.")
@click.option("--command", help="webhook-delivery of each answer: disable, or abort-message.")
@click.option("--mode", default="answer", show_default=True, type=click.Choice(get_args(Mode)), help="Misbehave.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="PEM chain; serves HTTPS.")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="PEM key, unless it is in --tls-cert.")
@click.option(
    "--tls-client-ca", type=click.Path(exists=True, dir_okay=False), help="PEM; asks for a client certificate of it."
)
@click.option("--seconds", type=click.FloatRange(min=0), help="Stop after so long. Without it, on Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--quiet", is_flag=True, help="Print no line per event.")
def sink_command(
    host: str,
    port: int,
    path: str | None,
    secret: str | None,
    status: int,
    delay: float,
    fail_rate: float,
    retry_after: str | None,
    command: str | None,
    mode: Mode,
    tls_cert: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    seconds: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Receive webhooks, print them, check their signatures, and misbehave on request.

    Each line tells time, path, webhook id, type, attempt, and the signature: ok, BAD, or – where no secret was given.

    \b
    Look at what an endpoint gets:
      dispatcher sink --port 8080 --secret whsec_…
    See how a dispatcher treats a receiver that is slow, fails now and then and asks for patience:
      dispatcher sink --delay 2 --fail-rate 0.1 --status 429 --retry-after 30
    """
    tls = None
    if tls_cert is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(tls_cert, tls_key)
        except ssl.SSLError as exc:
            raise InputError(f"{tls_cert} holds no usable certificate and key; give PEM files that match") from exc
        if tls_client_ca is not None:
            _ask_for_client(tls, tls_client_ca)
    elif tls_key is not None or tls_client_ca is not None:
        raise InputError("--tls-key and --tls-client-ca need --tls-cert")
    behaviour = Behaviour(
        delay_s=delay, fail_rate=fail_rate, status=status, retry_after=retry_after, command=command, mode=mode
    )
    stop = asyncio.Event()

    def show(event: Received) -> None:
        try:
            click.echo(_json_line(event) if as_json else _line(event))
        except BrokenPipeError:  # `dispatcher sink | head`: nobody looks any more
            stop.set()

    on_event = None if quiet else show
    if path is None:
        sink = Sink(secrets=secret, behaviour=behaviour, on_event=on_event)
    else:
        sink = Sink(secrets=secret and {path: secret}, behaviour=Behaviour(status=404), on_event=on_event)
        sink.set_behaviour(path, behaviour)

    async def run() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await sink.start(host, port, ssl=tls)
        except OSError as exc:
            raise InputError(f"can't listen on {host} port {port} ({exc.strerror}); give another --port") from exc
        url = sink.url + (path or "/")
        click.echo(orjson.dumps({"listening": url}) if as_json else f"listening on {url}")
        try:
            async with asyncio.timeout(seconds):
                await stop.wait()
        except TimeoutError:
            pass  # --seconds are over
        finally:
            await sink.stop()

    uvloop.run(run())
    click.echo(_summary(sink, as_json))


def _line(event: Received) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event.received_at))
    signature = {True: "ok", False: "BAD", None: "–"}[event.signature_ok]
    words = [at, event.path, event.webhook_id or "–", _type(event) or "–", str(event.attempt or "–"), signature]
    # From a stranger, for a terminal: no control characters.
    return "".join(char if char.isprintable() else "?" for char in "  ".join(words))


def _json_line(event: Received) -> bytes:
    return orjson.dumps(
        {
            "received_at": event.received_at,
            "path": event.path,
            "id": event.webhook_id,
            "type": _type(event),
            "attempt": event.attempt,
            "signature_ok": event.signature_ok,
            "status": event.status,
        }
    )


def _type(event: Received) -> str | None:
    try:
        envelope = orjson.loads(event.body)
    except orjson.JSONDecodeError:
        return None
    found = envelope.get("type") if isinstance(envelope, dict) else None
    return found if isinstance(found, str) else None


def _summary(sink: Sink, as_json: bool) -> bytes | str:
    by_status = {str(status): count for status, count in sorted(sink.by_status.items())}
    counts = {
        "received": sink.received,
        "distinct": sink.distinct,
        "duplicates": sink.duplicates,
        "bad_signature": sink.bad_signature,
    }
    if as_json:
        return orjson.dumps({**counts, "by_status": by_status})
    answered = ", ".join(f"{status} × {count}" for status, count in by_status.items()) or "nothing"
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()) + f"; answered {answered}"
