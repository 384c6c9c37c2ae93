"""What somebody configures never becomes another line of a request, and what a receiver answers never becomes a command to a terminal."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import log
from dispatcher.domain.address import AddressPolicy
from dispatcher.domain.event import Event
from dispatcher.domain.filters import check_filters
from dispatcher.domain.shape import PLAIN
from dispatcher.domain.signing import Signer
from dispatcher.domain.text import clean
from dispatcher.domain.url import URL_CHARS_MAX, parse_url
from dispatcher.engine.request import make_requests, render_head
from dispatcher.errors import InputError
from dispatcher.settings import Settings, load
from tests.test_cli import Cli, empty, run, sql

__all__ = ["empty", "run"]  # fixtures

BREAKS = ["\r\n", "\n", "\r", "\x00", "\x0b", "\x0c", "\x85", "\u2028", "\x1b[31m", "\x7f", "\u202e"]


# ── into a request ──


@pytest.mark.parametrize("text", BREAKS)
def test_no_configured_value_holds_a_line_break_or_a_control(text: str) -> None:
    for url in (
        f"https://a.example/{text}x-evil:1",
        f"https://a.example{text}/",
        f"https://a{text}.example/",
        f"https://a.example/?{text}",
    ):
        with pytest.raises(InputError):
            parse_url(url, AddressPolicy())
    for setting in ("user_agent", "proxy_url", "allowed_networks", "allowed_ports", "transport"):
        with pytest.raises(InputError):
            load(**{setting: f"{getattr(Settings(), setting) or 'http://proxy.example:3128'}{text}x-evil: 1"})
    with pytest.raises(InputError):
        check_filters({"from": [f"A{text}"]}, ["from"])
    with pytest.raises(InputError):
        Signer((f"whsec_{text}MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",))


@pytest.mark.parametrize("text", [*BREAKS[:3], "\x1b[2J"])
def test_the_command_line_takes_none_either(run: Cli, text: str) -> None:
    for args in (
        ("endpoint", "create", "a", "https://a.example/", "--name", f"n{text}"), ("endpoint", "create", "a", f"https://a.example/{text}"),
        ("endpoint", "create", "a", "https://a.example/", "--type", f"a.b{text}"), ("event", "send", "a", f"a.b{text}", "{}"),
        ("endpoint", "create", "a", "https://a.example/", "--filter", f"from=A{text}"),
    ):  # fmt: skip
        assert run.refused(*args)
    assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.endpoint")[0]["n"] == 0


@given(
    account_id=st.text(min_size=1).filter(lambda t: "\x00" not in t and t.isprintable() is not None),
    path=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\#"), max_size=40),
    body=st.binary(max_size=60),
)
def test_a_request_has_the_lines_that_we_wrote_and_no_other(account_id: str, path: str, body: bytes) -> None:
    """Of all that goes into it only the body may hold a line break; its length is told."""
    target = parse_url(f"https://a.example/{path}", AddressPolicy())
    event = Event(1, account_id, "a.b", orjson.dumps(body.hex()), 0, None, b"evt_1")
    try:
        data = event.envelope()
    except orjson.JSONEncodeError:  # half a surrogate pair: no text that PostgreSQL holds
        return
    secrets = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",)
    request = make_requests(target, Settings().user_agent, secrets, PLAIN).render(event, b"1", 1)
    written, _, rest = request.partition(b"\r\n\r\n")
    assert rest == data
    lines = written.split(b"\r\n")
    assert lines[0] == f"POST {target.request_target} HTTP/1.1".encode()
    names = [line.partition(b":")[0] for line in lines[1:]]
    assert len(names) == len(set(names))
    assert set(names) <= {
        b"host", b"content-type", b"content-length", b"user-agent", b"accept", b"webhook-id", b"webhook-timestamp", b"webhook-signature",
        b"x-attempt", b"connection",
    }  # fmt: skip
    assert all(0x20 <= byte < 0x7F for line in lines for byte in line)
    assert b"\n" not in data, "an account id with a line break is escaped"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://bücher.example/", "xn--bcher-kva.example"),
        ("https://例え.テスト:8443/", "xn--r8jz45g.xn--zckzah:8443"),
        ("https://ＥＸＡＭＰＬＥ.com/", "example.com"),
    ],
)
def test_a_name_outside_ascii_is_sent_as_its_a_label(url: str, host: str) -> None:
    assert f"\r\nhost: {host}\r\n".encode() in render_head(parse_url(url, AddressPolicy()), "tests") + b"\r\n"


@pytest.mark.parametrize(
    "url",
    ["https://a.example/" + "x" * 10**6, "https://" + "ü" * 10**6 + ".example/", "https://" + "a." * 10**6 + "example"],
)
def test_absurd_lengths_cost_nothing(url: str) -> None:
    with pytest.raises(InputError, match=rf"the most is {URL_CHARS_MAX}"):
        parse_url(url, AddressPolicy())


# ── onto a terminal ──

EVIL = b"\x1b]0;owned\x07\x1b[2J\x9b31m\xc2\x9b31m\xe2\x80\xaereversed"


@contextmanager
def receiver(answer: bytes) -> Iterator[str]:
    """Answer each request with these bytes; yields the URL."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def is_tame(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oh\r\nx-evil: " + EVIL + b"\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 500 " + EVIL + b"\r\n\r\n",
        b"HTTP/1.1 500 Oh\r\nconnection: close\r\n\r\n" + EVIL, EVIL + b"\r\n\r\n", b"HTTP/1.1 302 Oh\r\nlocation: " + EVIL + b"\r\n\r\n",
    ],
)  # fmt: skip
def test_an_answer_is_shown_with_nothing_that_a_terminal_obeys(run: Cli, answer: bytes) -> None:
    with receiver(answer) as url:
        endpoint = str(run.json("endpoint", "create", "a", url)["id"])
        shown = run("endpoint", "test", endpoint)
        assert shown.exit_code == 1
        assert is_tame(shown.output)
        assert r"\x1b]0;owned" in shown.output
        told = run("endpoint", "test", endpoint, "--json").output
        assert is_tame(told)
        assert "\x1b]0;owned" in orjson.loads(told)["response"], "for a script it is all there"


def test_what_was_written_by_sql_is_shown_so_too(run: Cli) -> None:
    """An account id is the platform's, and a name, a reason or an answer may be anybody's."""
    evil = EVIL.decode("latin-1")
    [row] = sql(
        run.dsn,
        "INSERT INTO webhook.endpoint (account_id, url, name, state, state_reason) VALUES ($1, 'https://a.example/', $1, 'disabled', $1)"
        " RETURNING id",
        evil,
    )
    sql(
        run.dsn,
        "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ($1, 'a.b', $2)",
        evil,
        orjson.dumps({"x": evil}).decode(),
    )
    sql(
        run.dsn,
        "INSERT INTO webhook.dead_letter (endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at,"
        " reason, fault) SELECT $1, 1, 0, $2, 'a.b', payload, created_at, 1, now(), $2, 'status' FROM webhook.outbox",
        row["id"],
        evil,
    )
    for args in (
        ("endpoint", "list"), ("endpoint", "show", str(row["id"])), ("event", "show", "1"), ("dead-letter", "list"),
        ("dead-letter", "show", "1"),
    ):  # fmt: skip
        for more in ((), ("--json",)):
            output = run.ok(*args, *more)
            assert is_tame(output), args


def test_the_log_on_a_terminal_too(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    log.configure(Settings(log_format="console"))
    try:
        log.get("tests").warning("said", detail="\x1b[2J\x9bK", more="\x1b[2J a\r\nfake line", count=3)
    finally:
        structlog.configure(**before)  # what it writes to is closed when the test ends
    out = capsys.readouterr().out
    assert is_tame(out)
    assert r"detail=\x1b[2J\x9bK" in out
    assert out.count("\n") == 1


@given(st.text())
def test_clean_leaves_what_can_be_seen(text: str) -> None:
    assert clean(text).isprintable()
    assert clean(text) == text or not text.isprintable()
    assert clean(clean(text)) == clean(text)
    assert is_tame(clean(text, keep="\n"))
