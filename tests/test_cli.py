"""The command line as a person and a script use it, and bad input: a clear sentence, an exit status, and nothing changed."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
import uvloop
from click.testing import CliRunner, Result

from dispatcher.cli import cli
from dispatcher.errors import DispatcherError
from dispatcher.store.migrate import SCHEMA_VERSION
from tests.conftest import dsn_of

_made = 0


def sql(dsn: str, statement: str, *values: Any) -> Any:
    async def go() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetch(statement, *values)
        finally:
            await connection.close()

    return uvloop.run(go())


@pytest.fixture
def empty(server) -> Iterator[str]:
    """A database without the schema."""
    global _made
    _made += 1
    name = f"cli_{_made}"
    sql(server.dsn, f"CREATE DATABASE {name}")
    yield dsn_of(server.dsn, name)
    sql(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


class Cli:
    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.env = {"DISPATCHER_DATABASE_URL": dsn, "DISPATCHER_ALLOWED_NETWORKS": "127.0.0.0/8"}

    def __call__(self, *args: str, env: dict[str, str] | None = None, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, args, env=self.env | (env or {}), input=input)

    def ok(self, *args: str, **kwargs: Any) -> str:
        result = self(*args, **kwargs)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    def json(self, *args: str, **kwargs: Any) -> Any:
        return json.loads(self.ok(*args, "--json", **kwargs))

    def refused(self, *args: str, **kwargs: Any) -> str:
        """Run a verb that must be refused with a sentence; return it."""
        result = self(*args, **kwargs)
        assert isinstance(result.exception, DispatcherError), (result.output, result.exception)
        return str(result.exception)


@pytest.fixture
def run(empty: str) -> Cli:
    made = Cli(empty)
    made.ok("migrate")
    return made


@contextmanager
def sink_process(*options: str) -> Iterator[str]:
    """A sink in a process of its own; yields its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "sink", "--port", "0", *options], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield line.split()[-1].strip()
        finally:
            process.terminate()
            process.stdout.read()


def test_create_test_go_live_and_look_after(run: Cli) -> None:
    with sink_process("--quiet") as url:
        made = run.json(
            "endpoint", "create", "acct_1", f"{url}/hooks", "--type", "message.*", "--rate", "5", "--name", "Ann's"
        )
        assert made["state"] == "draft"
        assert made["secret"].startswith("whsec_")
        endpoint = str(made["id"])
        assert "has not passed a test" in run.refused("endpoint", "go-live", endpoint)
        assert sql(run.dsn, "SELECT state FROM webhook.endpoint")[0]["state"] == "draft"
        tested = run.json("endpoint", "test", endpoint)
        assert tested["passed"]
        assert tested["verdict"] == "204: passed"
        assert '"test":true' in tested["request"]
        assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.test_attempt")[0]["n"] == 1
        assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.outbox")[0]["n"] == 0
        assert run.json("endpoint", "go-live", endpoint)["state"] == "live"
        assert sql(run.dsn, "SELECT pattern FROM webhook.subscription")[0]["pattern"] == "message.*"

        # An edit of a live endpoint waits for its own test; the old configuration stays in force.
        edited = run.json("endpoint", "update", endpoint, "--type", "link.*")
        assert edited["event_types"] == ["message.*"]
        assert edited["proposed"]["event_types"] == ["link.*"]
        assert not edited["tested"]
        assert "has not passed a test" in run.refused("endpoint", "go-live", endpoint)
        run.ok("endpoint", "test", endpoint)
        live = run.json("endpoint", "go-live", endpoint)
        assert live["event_types"] == ["link.*"]
        assert live["proposed"] is None
        rows = sql(run.dsn, "SELECT pattern, until_id FROM webhook.subscription ORDER BY id")
        assert [(row["pattern"], row["until_id"]) for row in rows] == [("message.*", 0), ("link.*", None)]

        assert run.json("endpoint", "pause", endpoint)["state"] == "paused"
        assert "is paused" in run.refused("endpoint", "pause", endpoint)
        assert run.json("endpoint", "resume", endpoint)["state"] == "live"
        assert [row["id"] for row in run.json("endpoint", "list", "--account", "acct_1")] == [made["id"]]
        assert "Ann's" in run.ok("endpoint", "show", endpoint)
        assert "whsec_" not in run.ok("endpoint", "show", endpoint)
        assert "whsec_" in run.ok("endpoint", "show", endpoint, "--secret")
        [told] = sql(run.dsn, "SELECT actor, action, subject FROM webhook.audit")
        assert tuple(told) == ("command line", "endpoint.reveal_secrets", f"endpoint_id={endpoint} account_id=acct_1")
        run.ok("endpoint", "delete", endpoint, "--yes")
        assert "no endpoint" in run.refused("endpoint", "show", endpoint)
        assert "There are no endpoints" in run.ok("endpoint", "list")


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (("--status", "302"), "302: redirects are not followed"),
        (("--status", "404"), "404: nothing is at this path"),
        (("--mode", "garbage"), "protocol:"),
        (("--mode", "reset"), "reset:"),
    ],
)
def test_a_failed_test_says_why_and_fails(run: Cli, options: tuple[str, ...], verdict: str) -> None:
    with sink_process("--quiet", *options) as url:
        endpoint = str(run.json("endpoint", "create", "a", f"{url}/")["id"])
        result = run("endpoint", "test", endpoint)
        assert result.exit_code == 1
        assert verdict in result.output
        assert "has not passed a test" in run.refused("endpoint", "go-live", endpoint)


def test_force_is_loud(run: Cli) -> None:
    endpoint = str(run.json("endpoint", "create", "a", "https://example.com/")["id"])
    result = run("endpoint", "go-live", endpoint, "--force")
    assert "WITHOUT a passed test" in result.output
    assert sql(run.dsn, "SELECT state_reason FROM webhook.endpoint")[0]["state_reason"] == "forced without a test"


def test_what_a_producer_wrote_is_no_command_to_a_terminal(run: Cli) -> None:
    sent = run.json("event", "send", "acct", "message.sent", "{}", "--ordering-key", "k\x1b[2J")
    shown = run.ok("event", "show", str(sent["id"]))
    assert "[2J" in shown
    assert "\x1b" not in shown


def test_event_send_and_show(run: Cli) -> None:
    endpoint = run.json("endpoint", "create", "a", "https://example.com/", "--live")["id"]
    sent = run.json("event", "send", "a", "message.sent", '{"n":  1}')
    assert sent["event_id"].startswith("evt_")
    by_id, by_public = run.json("event", "show", str(sent["id"])), run.json("event", "show", sent["event_id"])
    assert by_id == by_public
    assert by_id["payload"] == {"n": 1}
    assert [(d["endpoint_id"], d["fate"]) for d in by_id["deliveries"]] == [(endpoint, "waiting")]
    assert "waiting" in run.ok("event", "show", sent["event_id"])
    assert "there is no event" in run.refused("event", "show", "999999")
    assert "there is no event" in run.refused("event", "show", "evt_" + "0" * 32)
    assert "is not an event id" in run.refused("event", "show", "nonsense")


def test_an_event_with_a_key_an_expiry_and_a_priority(run: Cli) -> None:
    endpoint = str(run.json("endpoint", "create", "a", "https://example.com/", "--live", "--ordering", "block")["id"])
    options = ("--ordering-key", "m_1", "--expires-at", "2020-01-02T03:04:05+00:00", "--priority", "5")
    sent = run.json("event", "send", "a", "message.sent", "{}", *options)
    shown = run.json("event", "show", str(sent["id"]))
    assert (shown["ordering_key"], shown["expires_at"], shown["priority"]) == ("m_1", "2020-01-02T03:04:05+00:00", 5)
    assert "ordering key m_1, expires at 2020-01-02 03:04:05 UTC, priority 5" in run.ok(
        "event", "show", str(sent["id"])
    )
    assert "1 to 255 bytes" in run.refused("event", "send", "a", "message.sent", "{}", "--ordering-key", "x" * 256)

    view = run.json("endpoint", "show", endpoint)
    assert (view["ordering"], view["expired_24h"]) == ("block", 0)
    run.ok("endpoint", "update", endpoint, "--ordering", "give_up_after 3", "--live")
    shown_lines = run.ok("endpoint", "show", endpoint).splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown_lines if line.startswith("ordering")] == ["give_up_after 3"]
    assert "give_up_after N" in run.refused("endpoint", "update", endpoint, "--ordering", "sometimes")


BAD_URLS = [
    ("notaurl", "URL"),
    ("ftp://example.com/", "ftp"),
    ("https://user:secret@example.com/", "user name"),
    ("https://10.0.0.1/", "10.0.0.1"),
    ("https://169.254.169.254/latest", "169.254.169.254"),
    ("https://0x7f.1/", "127.0.0.1"),
    ("https://[::ffff:127.0.0.1]/", ""),
    ("https://example.com:99999/", "port"),
    ("https://exa mple.com/", ""),
]


@pytest.mark.parametrize(("url", "says"), BAD_URLS)
def test_a_bad_url_is_refused_and_changes_nothing(run: Cli, url: str, says: str) -> None:
    message = run.refused("endpoint", "create", "a", url)
    assert says.lower() in message.lower()
    assert "secret@" not in message
    assert sql(run.dsn, "SELECT FROM webhook.endpoint") == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--type", "Message.*"), "event-type pattern"),
        (("--type", "*.sent"), "event-type pattern"),
        (("--timeout-ms", "5"), "timeout_ms is 5; it must be 100 to 60000 milliseconds"),
        (("--rate", "0"), "rate_per_s"),
        (("--rate", "nan"), "rate_per_s"),
        (("--burst", "5"), "rate_burst means nothing without rate_per_s"),
        (("--in-flight", "100000"), "in_flight_max"),
        (("--retry-schedule", "5,soon"), "list of seconds"),
        (("--retry-schedule", "0"), "retry schedule"),
        (("--secret", "whsec_short"), "signing secret"),
        (("--secret", "hush"), "starts with whsec_"),
        (("--name", "a\x00b"), "printable"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(run: Cli, options: tuple[str, ...], says: str) -> None:
    assert says in run.refused("endpoint", "create", "a", "https://example.com/", *options)
    assert sql(run.dsn, "SELECT FROM webhook.endpoint") == []


def test_bad_accounts_are_refused(run: Cli) -> None:
    assert "account id" in run.refused("endpoint", "create", "", "https://example.com/")
    assert "account id" in run.refused("endpoint", "create", "x" * 256, "https://example.com/")


@pytest.mark.parametrize(
    ("event_type", "payload", "says"),
    [
        ("message.sent", "{not json", "not JSON"),
        ("message.sent", "", "not JSON"),
        ("message.sent", '{"a": "\x00"}', "NUL"),
        ("Message", "{}", "not an event type"),
        ("message.sent", '"' + "x" * 300_000 + '"', "262144 bytes"),
    ],
)
def test_bad_events_are_refused_and_nothing_is_appended(run: Cli, event_type: str, payload: str, says: str) -> None:
    assert says in run.refused("event", "send", "a", event_type, payload)
    assert sql(run.dsn, "SELECT FROM webhook.outbox") == []


def test_a_payload_on_stdin_that_is_not_utf8_is_refused(run: Cli) -> None:
    environment = os.environ | run.env
    done = subprocess.run(
        [sys.executable, "-m", "dispatcher", "event", "send", "a", "m.s", "-"],
        input=b'{"a": "\xff"}',
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"error: the payload on standard input is not valid UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
    assert sql(run.dsn, "SELECT FROM webhook.outbox") == []


def test_migrate_is_safe_to_repeat_and_applies_settings(empty: str) -> None:
    run = Cli(empty)
    assert f"installed schema version {SCHEMA_VERSION}" in run.ok("migrate")
    assert "up to date" in run.ok("migrate")
    assert run.json("migrate", env={"DISPATCHER_PAYLOAD_BYTES_MAX": "1024"})["done"] == [
        "payload bound 262144 → 1024 bytes"
    ]
    small = {"DISPATCHER_PAYLOAD_BYTES_MAX": "1024"}
    assert "1024 bytes" in run.refused("event", "send", "a", "m.s", '"' + "x" * 1100 + '"', env=small)
    assert "dropped" in run.ok("migrate", env=small | {"DISPATCHER_DOORBELL": "off"})
    assert "created" in run.ok("migrate", env=small)


def test_unfit_databases_are_refused(empty: str, server) -> None:
    run = Cli(empty)
    assert "run `dispatcher migrate`" in run.refused("endpoint", "list")
    assert "run `dispatcher migrate`" in run.refused("run")
    run.ok("migrate")
    sql(empty, "ALTER SEQUENCE webhook.outbox_id_seq CACHE 20")
    assert "ALTER SEQUENCE webhook.outbox_id_seq CACHE 1" in run.refused("run")
    sql(empty, "ALTER SEQUENCE webhook.outbox_id_seq CACHE 1")
    sql(empty, "INSERT INTO webhook.schema_version VALUES (99)")
    assert "newer than this program" in run.refused("run")
    assert "newer than this program" in run.refused("migrate")
    sql(empty, "DELETE FROM webhook.schema_version WHERE version = 99")
    sql(empty, "DELETE FROM webhook.schema_version WHERE version > 1")
    assert "run `dispatcher migrate`" in run.refused("run")


def test_a_role_without_privileges_is_told_what_to_grant(run: Cli) -> None:
    sql(run.dsn, "CREATE ROLE nobody_much LOGIN")
    try:
        limited = Cli(run.dsn.replace("postgres@", "nobody_much@"))
        assert "GRANT webhook_dispatcher TO" in limited.refused("run")
        sql(run.dsn, "GRANT USAGE ON SCHEMA webhook TO nobody_much")
        sql(run.dsn, "GRANT SELECT ON ALL TABLES IN SCHEMA webhook TO nobody_much")
        assert "GRANT webhook_dispatcher TO nobody_much" in limited.refused("run")
    finally:
        sql(run.dsn, "DROP OWNED BY nobody_much")
        sql(run.dsn, "DROP ROLE nobody_much")


def test_a_role_that_may_not_create_is_told_so(empty: str) -> None:
    sql(empty, "CREATE ROLE no_creator LOGIN")
    try:
        limited = Cli(empty.replace("postgres@", "no_creator@"))
        assert "can't be installed" in limited.refused("migrate")
        assert sql(empty, "SELECT to_regnamespace('webhook') AS n")[0]["n"] is None
    finally:
        sql(empty, "DROP ROLE no_creator")


def test_a_database_that_is_not_utf8_is_refused(server) -> None:
    sql(server.dsn, "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        assert "must be UTF8" in Cli(dsn_of(server.dsn, "latin")).refused("migrate")
    finally:
        sql(server.dsn, "DROP DATABASE latin")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://127.0.0.1:1/none", "can't be reached"),
        ("mysql://localhost/x", "malformed"),
        ("postgresql://h:port/x", "malformed"),
    ],
)
def test_a_wrong_database_url_is_explained(url: str, says: str) -> None:
    message = Cli(url).refused("run")
    assert says in message
    assert "DISPATCHER_DATABASE_URL" in message


def test_a_database_that_does_not_exist_is_explained(server) -> None:
    assert "does not exist" in Cli(dsn_of(server.dsn, "no_such")).refused("endpoint", "list")


def test_a_bad_setting_names_itself(run: Cli) -> None:
    assert "DISPATCHER_SLOTS" in run.refused("run", env={"DISPATCHER_SLOTS": "0"})
    assert "DISPATCHER_SLOT is not a setting" in run.refused("run", env={"DISPATCHER_SLOT": "1"})


def test_tail_follows_deliveries(run: Cli) -> None:
    with sink_process("--quiet") as url:
        run.ok("endpoint", "create", "a", f"{url}/", "--live")
        service = subprocess.Popen(
            [sys.executable, "-m", "dispatcher", "run"], env=os.environ | run.env, stdout=subprocess.DEVNULL
        )
        tail = subprocess.Popen(
            [sys.executable, "-m", "dispatcher", "tail", "--seconds", "10", "--json"],
            env=os.environ | run.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            event_id = run.json("event", "send", "a", "message.sent", "{}")["id"]
            assert tail.stdout is not None
            line = json.loads(tail.stdout.readline())
            assert (line["event_id"], line["status"], line["type"]) == (event_id, 204, "message.sent")
        finally:
            for process in (tail, service):
                process.terminate()
                process.wait(20)
            assert tail.stdout is not None
            tail.stdout.close()


def test_the_demo_accounts_for_every_event() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
    done = subprocess.run(
        [sys.executable, "-m", "dispatcher", "demo", "--seconds", "4", "--rate", "200", "--json"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["committed"] > 400
    assert report["owed"] == report["delivered"] + report["dead_letters"]
    assert report["open"] == 0
    assert report["counters"]["failed"] > 0, "the flaky endpoint failed"


def test_the_demo_opens_on_its_panel() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
    with subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "demo", "--seconds", "600", "--plain"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as demo:  # fmt: skip
        try:
            assert demo.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/enter/\S+", demo.stdout.readline())
            assert found is not None, "the first thing it prints is the link"
            browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            page = browser.open(found[0], timeout=60)
            assert page.url.endswith("/overview")
            assert "This process does not deliver" not in page.read().decode()
            with pytest.raises(urllib.error.HTTPError, match="403"):
                browser.open(found[0], timeout=60)
            endpoints = json.load(browser.open(page.url.replace("overview", "endpoints?format=json"), timeout=60))
            assert {row["name"] for row in endpoints["data"]} == {"fast", "slow", "flaky", "limited", "outage"}
        finally:
            demo.send_signal(signal.SIGINT)  # no new events; then it accounts for those that there were
            told, _ = demo.communicate(timeout=180)
    assert demo.returncode == 0
    assert "Every committed event is accounted for." in told


def test_a_large_payload_is_sent_with_an_advice(run: Cli) -> None:
    for size, advised in ((19_998, False), (19_999, True)):
        result = run("event", "send", "acct_1", "a.b", '"' + "x" * size + '"')
        assert (result.exit_code, "larger than 20 kB" in result.stderr) == (0, advised)


@pytest.mark.parametrize("ending", ['raise FencedError("epoch 3 rules")', "return 5"])
def test_what_a_verb_ended_with_is_told_though_no_descriptor_is_left(ending: str) -> None:
    """Closing the loop opens a pair of sockets."""
    code = f"""
import resource
from dispatcher.cli.common import run_async
from dispatcher.ports import FencedError

async def work():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    {ending}

try:
    print(run_async(work()))
except FencedError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == ("5" if "return" in ending else "epoch 3 rules"), done.stderr
