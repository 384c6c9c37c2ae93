"""Resend, replay, dead letters and erasure as a person and a script use them. What they do to deliveries is in test_recovery.py too."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
import uvloop
from click.testing import CliRunner, Result

from dispatcher.cli import cli, terminal
from dispatcher.cli.common import WHEN
from dispatcher.cli.terminal import RATE, about, bars
from dispatcher.errors import InputError, StateError
from tests.conftest import connected, dsn_of
from tests.store import people
from tests.test_cli import Cli, sink_process, sql
from tests.verbs import every_verb

_numbers = itertools.count(1)


@pytest.fixture
def run(server) -> Iterator[Cli]:
    name = f"cli_recovery_{next(_numbers)}"
    sql(server.dsn, f"CREATE DATABASE {name}")
    made = Cli(dsn_of(server.dsn, name))
    made.ok("migrate")
    yield made
    sql(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


def made(run: Cli, work: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
    """Have rows made by tests/store/people.py."""

    async def go() -> Any:
        async with connected(run.dsn) as db:
            return await work(db)

    return uvloop.run(go())


@pytest.fixture
def endpoint(run: Cli) -> int:
    return made(run, lambda db: people.endpoint(db, name="Ann's"))


@pytest.fixture
def ids(run: Cli, endpoint: int) -> list[int]:
    """Ten events; the first five were given up, the rest delivered."""

    async def work(db: asyncpg.Connection) -> list[int]:
        found = await people.emit(db, 10)
        await people.died(db, endpoint, found[:5])
        await people.attempted(db, endpoint, found[5:])
        return found

    return made(run, work)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sits at the terminal."""
    monkeypatch.setattr(terminal, "can_ask", lambda: True)


def states(run: Cli) -> list[str]:
    return [row["state"] for row in sql(run.dsn, "SELECT state FROM webhook.dead_letter ORDER BY id")]


def runs_made(run: Cli) -> int:
    return sql(run.dsn, "SELECT count(*) AS n FROM webhook.run")[0]["n"]


# ── resend ──


def test_resend_makes_a_run_and_says_what_it_waits_for(run: Cli, endpoint: int, ids: list[int]) -> None:
    text = run.ok("resend", str(ids[7]), str(endpoint), "--note", "ticket 7")
    assert f"run 1: resend of 1 to endpoint {endpoint}" in text
    assert "No dispatcher is at work" in text
    public = run.json("event", "show", str(ids[7]))["event_id"]
    again = run.json("resend", public, str(endpoint))
    assert (again["id"], again["kind"], again["total"], again["state"], again["note"]) == (
        2,
        "resend",
        1,
        "running",
        "",
    )
    made(run, lambda db: db.execute("UPDATE webhook.endpoint SET state = 'disabled', paused_at_id = 0"))
    assert f"`dispatcher endpoint enable {endpoint}`" in run.ok("resend", public, str(endpoint))
    assert "there is no event 999" in run.refused("resend", "999", str(endpoint))
    assert "no endpoint 99" in run.refused("resend", public, "99")
    assert "not an event id" in run.refused("resend", "nonsense", str(endpoint))


# ── replay ──


def test_a_replay_is_counted_and_asked_for_first(run: Cli, person: None, endpoint: int, ids: list[int]) -> None:
    for answer in ("n\n", ""):
        result = run("replay", "start", str(endpoint), input=answer)
        assert result.exit_code == 1
        assert "count      5\n" in result.output
        assert "rate       200 a second: 1 s at the least" in result.output
        assert "deliveries that failed for good" in result.output
        assert "Send them?" in result.output
    assert runs_made(run) == 0
    text = run.ok("replay", "start", str(endpoint), "--all", "--rate", "0.5", input="y\n")
    assert "ALL events, delivered or not" in text
    assert "count      10\n" in text
    assert "0.5 a second: 20 s at the least" in text
    assert "run 1: replay of 10" in text
    assert "Follow it" not in text, "nobody is at work, and it says so instead"
    assert states(run) == ["resent"] * 5


def test_without_a_terminal_it_needs_yes(run: Cli, endpoint: int, ids: list[int]) -> None:
    assert "repeat with --yes" in run.refused("replay", "start", str(endpoint))
    assert "repeat with --yes" in run.refused("replay", "start", str(endpoint), "--json")
    assert runs_made(run) == 0
    run_ = run.json("replay", "start", str(endpoint), "--yes", "--rate", "unlimited")
    assert (run_["total"], run_["rate_per_s"], run_["only_failed"], run_["patterns"]) == (5, None, True, ["*"])


def test_the_default_rate_is_a_setting(run: Cli, endpoint: int, ids: list[int]) -> None:
    environment = {"DISPATCHER_REPLAY_RATE_PER_S": "7.5"}
    assert run.json("replay", "start", str(endpoint), "--yes", env=environment)["rate_per_s"] == 7.5
    assert "DISPATCHER_REPLAY_RATE_PER_S" in run.refused(
        "replay", "start", str(endpoint), env={"DISPATCHER_REPLAY_RATE_PER_S": "0"}
    )


def test_a_range_by_id_time_and_type(run: Cli, endpoint: int, ids: list[int]) -> None:
    def total(*options: str) -> int:
        return run.json("replay", "start", str(endpoint), "--all", "--yes", *options)["total"]

    assert total("--after", str(ids[2]), "--upto", str(ids[5])) == 3
    assert total("--since", "1h") == 10
    assert total("--until", "1h") == 0
    assert total("--since", "2020-01-01", "--until", "2100-01-01T00:00:00+02:00") == 10
    assert total("--type", "link.*") == 0
    assert total("--type", "link.*", "--type", "message.sent") == 10
    nothing = run.ok("replay", "start", str(endpoint), "--yes", "--type", "link.*")
    assert "There is nothing to send" in nothing
    assert "link.*" in nothing
    assert run.json("replay", "start", str(endpoint), "--yes", "--type", "link.*") == {"total": 0, "run": None}
    assert "as a time or as an id" in run.refused("replay", "start", str(endpoint), "--since", "1h", "--after", "3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--since", "yesterday"), "neither a time"),
        (("--since", "5 minutes"), "not a duration"),
        (("--rate", "fast"), "is not a rate"),
        (("--rate", "-1"), "is not a rate"),
        (("--rate", "nan"), "is not a rate"),
        (("--after", "x"), "not a valid integer"),
    ],
)
def test_bad_options_are_usage_errors(run: Cli, endpoint: int, options: tuple[str, ...], says: str) -> None:
    result = run("replay", "start", str(endpoint), *options)
    assert result.exit_code == 2
    assert says in result.output
    assert runs_made(run) == 0


def test_an_endpoint_that_is_behind_is_told_of(run: Cli, person: None, endpoint: int, ids: list[int]) -> None:
    sql(run.dsn, "INSERT INTO webhook.lane (endpoint_id, settled, backlog) VALUES ($1, 3, 1234)", endpoint)
    assert (
        "1,234 events wait for their first attempt"
        in run("replay", "start", str(endpoint), "--all", input="n\n").output
    )
    assert "wait for their first" not in run("replay", "start", str(endpoint), input="n\n").output


def test_the_life_of_a_run(run: Cli, endpoint: int, ids: list[int]) -> None:
    assert "no unfinished" in run.ok("replay", "list")
    run.ok("replay", "start", str(endpoint), "--yes", "--note", "after the outage")
    [listed] = run.json("replay", "list", "--endpoint", str(endpoint))
    assert (listed["id"], listed["state"], listed["kind"]) == (1, "running", "replay")
    assert "after the outage" in run.ok("replay", "list")
    assert run.json("replay", "pause", "1")["state"] == "paused"
    assert "only one that is running" in run.refused("replay", "pause", "1")
    assert run.json("replay", "rate", "1", "50")["rate_per_s"] == 50
    assert run.json("replay", "rate", "1", "unlimited")["rate_per_s"] is None
    assert run.json("replay", "resume", "1")["state"] == "running"
    sql(run.dsn, "UPDATE webhook.run_progress SET attempted = 4, delivered = 2, dead = 1")
    sql(run.dsn, "INSERT INTO webhook.retry VALUES ($1, $2, 1, 2, now(), '2030-01-01Z', 'x')", endpoint, ids[0])
    shown = run.json("replay", "show", "1")
    assert (shown["attempted"], shown["retrying"], shown["next_retry_at"]) == (4, 1, "2030-01-01T00:00:00+00:00")
    text = run.ok("replay", "show", "1")
    assert "attempted  4 of 5" in text
    assert "retrying   1   the next at 2030-01-01 00:00:00 UTC" in text
    assert "No dispatcher is at work" in text
    assert states(run) == ["resent"] * 5
    assert run.json("replay", "cancel", "1")["state"] == "canceled"
    assert states(run) == ["open"] * 5
    assert "is canceled" in run.refused("replay", "resume", "1")
    assert run.json("replay", "list") == []
    assert [r["id"] for r in run.json("replay", "list", "--state", "all")] == [1]
    assert "there is no run 9" in run.refused("replay", "show", "9")
    run.ok("resend", str(ids[0]), str(endpoint))
    assert "… more: --after 1" in run.ok("replay", "list", "--state", "all", "--limit", "1")


def test_watching_one_that_has_ended_tells_how_by_its_exit_status(run: Cli, endpoint: int, ids: list[int]) -> None:
    run.ok("replay", "start", str(endpoint), "--yes")
    sql(run.dsn, "UPDATE webhook.run_progress SET attempted = 5, delivered = 5, finished_at = now()")
    assert run.json("replay", "show", "1", "--watch")["state"] == "finished"
    assert "run 1 finished: 5 delivered, 0 dead letters, 5 attempted of 5" in run.ok("replay", "show", "1", "--watch")
    sql(run.dsn, "UPDATE webhook.run_progress SET delivered = 4, dead = 1")
    assert run("replay", "show", "1", "--watch").exit_code == 1
    sql(run.dsn, "UPDATE webhook.run SET state = 'canceled'")
    assert run("replay", "show", "1", "--watch", "--json").exit_code == 1


# ── what became of an event ──


def test_event_show_tells_each_run(run: Cli, endpoint: int, ids: list[int]) -> None:
    def fates(event: int) -> tuple[str, list[tuple[str, str]]]:
        [delivery] = run.json("event", "show", str(event))["deliveries"]
        return delivery["fate"], [(r["kind"], r["fate"]) for r in delivery["runs"]]

    assert fates(ids[5]) == ("delivered", [("original", "delivered")])
    assert fates(ids[0]) == ("dead letter 1", [("original", "dead letter 1")])
    run.ok("resend", str(ids[0]), str(endpoint))
    taken = ("original", "dead letter 1, taken up by run 1")
    assert fates(ids[0]) == ("resend (run 1): waiting", [taken, ("resend", "waiting")])
    run.ok("replay", "pause", "1")
    assert fates(ids[0])[0] == "resend (run 1): held: the run is paused"
    made(run, lambda db: people.retrying(db, endpoint, ids[:1], run=1))
    assert fates(ids[0])[0].startswith("resend (run 1): waiting for attempt 2, due ")
    sql(run.dsn, "DELETE FROM webhook.retry")
    made(run, lambda db: people.attempted(db, endpoint, ids[:1], run=1, number=2))
    assert fates(ids[0]) == ("delivered by resend (run 1)", [taken, ("resend", "delivered")])
    text = run.ok("event", "show", str(ids[0]))
    assert "delivered by resend (run 1)" in text
    assert "run 0 (original): dead letter 1, taken up by run 1" in text
    assert "run 1 attempt 2" in text
    run.ok("replay", "start", str(endpoint), "--all", "--after", str(ids[6]), "--yes")
    assert fates(ids[8]) == ("delivered", [("original", "delivered"), ("replay", "waiting")])
    run.ok("dead-letter", "discard", "2", "--yes")
    assert fates(ids[1])[0] == "dead letter 2, discarded"
    sql(run.dsn, "DELETE FROM webhook.outbox")
    shown = run.json("event", "show", str(ids[2]))
    assert (shown["in_log"], shown["payload"], shown["deliveries"][0]["fate"]) == (
        False,
        {"secret": 3},
        "dead letter 3",
    )
    assert "It is gone from the outbox" in run.ok("event", "show", shown["event_id"])
    assert run.json("event", "show", str(ids[1]))["payload"] is None
    assert "there is no event" in run.refused("event", "show", str(ids[7]))


def test_event_show_tells_what_was_never_sent(run: Cli) -> None:
    first = str(run.json("endpoint", "create", "a", "https://example.com/hook", "--live")["id"])
    run.ok("endpoint", "pause", first)
    event = str(run.json("event", "send", "a", "message.sent", "{}")["id"])
    assert run.json("event", "show", event)["deliveries"][0]["fate"] == "held: the endpoint is paused"
    run.ok("endpoint", "resume", first, "--skip")
    assert run.json("event", "show", event)["deliveries"][0]["fate"] == "not sent: skipped"
    event = str(run.json("event", "send", "a", "message.sent", "{}")["id"])
    run.ok("endpoint", "delete", first, "--yes")
    assert run.json("event", "show", event)["deliveries"][0]["fate"] == "not sent: deleted"


# ── dead letters ──


def test_dead_letters_are_listed_and_shown(run: Cli, endpoint: int, ids: list[int]) -> None:
    assert [letter["event_id"] for letter in run.json("dead-letter", "list")] == ids[:5]
    assert [letter["id"] for letter in run.json("dead-letter", "list", "--after", "2", "--limit", "2")] == [3, 4]
    text = run.ok(
        "dead-letter",
        "list",
        "--endpoint",
        str(endpoint),
        "--status",
        "500",
        "--since",
        "1h",
        "--type",
        "message.*",
        "--limit",
        "2",
    )
    assert "the last of the schedule" in text
    assert "… more: --after 2" in text
    assert "no such dead letters" in run.ok("dead-letter", "list", "--fault", "timeout")
    assert run.json("dead-letter", "list", "--account", "other") == []
    shown = run.json("dead-letter", "show", "1")
    assert (shown["payload"], shown["event_id"], shown["state"]) == ({"secret": 1}, ids[0], "open")
    assert shown["made"][0]["response"] == "HTTP/1.1 500 said"
    text = run.ok("dead-letter", "show", "1")
    assert '{"secret" : 1}' in text
    assert "attempt 1" in text
    assert "no dead letter 99" in run.refused("dead-letter", "show", "99")
    assert run("dead-letter", "list", "--fault", "bad luck").exit_code == 2


def test_dead_letters_are_resent_after_a_look(run: Cli, person: None, endpoint: int, ids: list[int]) -> None:
    result = run("dead-letter", "resend", "--endpoint", str(endpoint), "--all", input="n\n")
    assert result.exit_code == 1
    assert "5 dead letters  200 a second: 1 s at the least" in result.output
    assert states(run) == ["open"] * 5
    assert "run 1: 2 to endpoint" in run.ok("dead-letter", "resend", "1", "3", "1", input="y\n")
    assert states(run) == ["resent", "open", "resent", "open", "open"]
    assert "dead letter 3 was resent by run 1" in run.refused("dead-letter", "resend", "3", "--yes")
    [again] = run.json("dead-letter", "resend", "--all", "--rate", "3", "--yes")
    assert (again["id"], again["total"], again["rate_per_s"], again["source"]) == (2, 3, 3, "dead_letter")
    assert run.json("dead-letter", "resend", "--all", "--yes") == []
    assert "no such open dead letters" in run.ok("dead-letter", "resend", "--all", "--yes")
    assert "resent by run 1" in run.ok("dead-letter", "list", "--state", "all")
    assert "resent by run 1" in run.ok("dead-letter", "show", "1")


def test_each_endpoint_gets_its_run_and_a_deleted_one_none(run: Cli, endpoint: int, ids: list[int]) -> None:
    async def more(db: asyncpg.Connection) -> tuple[int, int]:
        second, gone = await people.endpoint(db), await people.endpoint(db)
        for other in (second, gone):
            await people.died(db, other, ids[:2])
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
        return second, gone

    second, gone = made(run, more)
    result = run("dead-letter", "resend", "--account", "acct", "--all", "--yes")
    assert result.exit_code == 0
    assert f"Endpoint {gone} was deleted: its 2 dead letters can't be sent." in result.output
    assert [(r["endpoint_id"], r["total"]) for r in run.json("replay", "list")] == [(endpoint, 5), (second, 2)]
    assert states(run) == ["resent"] * 7 + ["open"] * 2
    refused = run("dead-letter", "resend", "--account", "acct", "--all", "--yes", "--json")
    assert (type(refused.exception), states(run)) == (StateError, ["resent"] * 7 + ["open"] * 2), (
        "none of those left can be"
    )


@pytest.mark.parametrize("verb", ["resend", "discard"])
@pytest.mark.parametrize("options", [(), ("1", "--all"), ("1", "--endpoint", "1"), ("--endpoint", "1")])
def test_ids_or_filters_with_all(run: Cli, endpoint: int, verb: str, options: tuple[str, ...]) -> None:
    assert "by id, or choose them with filters and --all" in run.refused("dead-letter", verb, *options, "--yes")


def test_dead_letters_are_discarded_after_a_look(run: Cli, person: None, endpoint: int, ids: list[int]) -> None:
    assert "Discard 5 dead letters for good?" in run("dead-letter", "discard", "--all", input="n\n").output
    assert states(run) == ["open"] * 5
    assert "1 dead letter discarded" in run.ok("dead-letter", "discard", "4", input="y\n")
    assert run.json("dead-letter", "discard", "--endpoint", str(endpoint), "--all", "--yes") == {"discarded": 4}
    assert run.json("dead-letter", "discard", "--all", "--yes") == {"discarded": 0}
    assert run.json("dead-letter", "show", "4")["payload"] is None
    assert "given up" in run.ok("dead-letter", "show", "4")
    assert "was discarded" in run.refused("dead-letter", "resend", "4", "--yes")


# ── erasure ──


def test_an_account_is_erased_when_its_id_was_typed(run: Cli, person: None, endpoint: int, ids: list[int]) -> None:
    assert "that is not 'acct'" in run.refused("erase", "account", "acct", input="acct_1\n")
    assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.outbox")[0]["n"] == 10
    text = run.ok("erase", "account", "acct", input="acct\n")
    assert "endpoints      1 (deleted, with secrets" in text
    assert "events         10\n" in text
    assert "dead letters   5 (their payloads)" in text
    assert "account acct erased: 1 endpoint, 10 events, 5 answers, 5 dead letters' payloads  (erasure 1)" in text
    assert states(run) == ["erased"] * 5
    assert "nothing of account acct" in run.refused("erase", "account", "acct", "--yes")
    [listed] = run.json("erase", "list")
    assert (listed["account_id"], listed["events"], listed["event_id"]) == ("acct", 10, None)
    assert listed["ended_at"] is not None
    assert run.json("erase", "list", "--account", "other") == []
    assert "account" in run.ok("erase", "list")


def test_an_event_is_erased(run: Cli, endpoint: int, ids: list[int]) -> None:
    public = run.json("event", "show", str(ids[0]))["event_id"]
    assert "repeat with --yes" in run.refused("erase", "event", public)
    done = run.json("erase", "event", public, "--yes")
    assert (done["event_id"], done["events"], done["response_heads"], done["dead_letters"]) == (ids[0], 1, 1, 1)
    assert "was erased on" in run.refused("erase", "event", public, "--yes")
    text = run.ok("erase", "event", str(ids[7]), "--yes")
    assert f"event          {ids[7]} of account acct" in text
    assert f"event {ids[7]} erased: 1 event  (erasure 2)" in text
    assert "there is no event 99" in run.refused("erase", "event", "99", "--yes")
    assert [row["what"] if "what" in row else row["event_id"] for row in run.json("erase", "list")] == [ids[0], ids[7]]


def test_an_interrupted_erasure_says_what_to_do(
    run: Cli, endpoint: int, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dispatcher.store import erasure

    async def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(erasure, "_erase_rows", interrupted)
        result = run("erase", "account", "acct", "--yes")
    assert result.exit_code == 130
    assert "Repeat the command" in result.output
    assert "interrupted: repeat it" in run.ok("erase", "list")
    assert "an erasure was interrupted" in run.ok("erase", "account", "acct", "--yes")
    assert run.json("erase", "list")[0]["events"] == 10


# ── shells ──


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    text = CliRunner().invoke(cli, ["completion", shell]).output
    assert f"_DISPATCHER_COMPLETE={shell}_complete" in text
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("dispatcher rep", {"replay"}),
        ("dispatcher dead-letter d", {"discard"}),
        ("dispatcher replay start --a", {"--after", "--all"}),
    ],
)
def test_what_completion_offers(words: str, offers: set[str]) -> None:
    environment = {
        "_DISPATCHER_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "dispatcher")], env=os.environ | environment, capture_output=True, text=True
    )  # fmt: skip
    assert {line.split(",")[1] for line in done.stdout.split()} == offers


def test_every_verb_has_an_example() -> None:
    assert [path for path, command in every_verb() if f"dispatcher {' '.join(path)}" not in (command.help or "")] == []


# ── small parts ──


def test_moments_and_rates() -> None:
    assert str(WHEN.convert("2026-11-23T10:00:00+02:00", None, None)) == "2026-11-23 10:00:00+02:00"
    assert str(WHEN.convert("2026-11-23", None, None)) == "2026-11-23 00:00:00+00:00"
    assert str(WHEN.convert("36h", None, None)) == "1 day, 12:00:00"
    assert RATE.convert("unlimited", None, None) == float("inf")
    assert RATE.convert("0.5", None, None) == 0.5


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.01, "1 s"), (119, "119 s"), (120, "2 min"), (7_199, "120 min"), (7_200, "2.0 h"), (172_800, "2.0 days")],
)
def test_lengths_of_time(seconds: float, says: str) -> None:
    assert about(seconds) == says


def test_bars_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> str:
        with bars({"events": 10, "unknown": None}) as step:
            step("events", 5)
            step("unknown", 1)
        return capsys.readouterr().err

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert draw() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich sees a terminal
    assert "events" in draw()


def test_asking_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "can_ask", lambda: False)
    for question in (lambda yes: terminal.ask("?", yes=yes), lambda yes: terminal.ask_to_type("?", "x", yes=yes)):
        question(True)
        with pytest.raises(InputError, match="--yes"):
            question(False)


# ── with a dispatcher at work ──


@contextmanager
def service(run: Cli, **settings: str) -> Iterator[None]:
    environment = os.environ | run.env | {f"DISPATCHER_{name.upper()}": value for name, value in settings.items()}
    process = subprocess.Popen([sys.executable, "-m", "dispatcher", "run"], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def waited(result: Result) -> dict[str, Any]:
    """What `--wait --json` printed."""
    return json.loads(result.stdout)


def test_from_failure_to_recovery(run: Cli) -> None:
    """A receiver that fails, its repair, and each way to send again."""
    with sink_process("--quiet", "--status", "500") as bad, sink_process("--quiet") as good:
        to = str(run.json("endpoint", "create", "a", f"{bad}/", "--live", "--retry-schedule", "1")["id"])
        with service(run, breaker_failures="1000"):
            events = [run.json("event", "send", "a", "message.sent", f'{{"n": {n}}}') for n in range(4)]
            first = str(events[0]["id"])
            result = run("resend", first, to, "--wait", "--json")
            assert result.exit_code == 1
            assert (waited(result)["state"], waited(result)["dead"]) == ("finished", 1)
            result = run("replay", "start", to, "--all", "--yes", "--wait")
            assert result.exit_code == 1
            assert "0 delivered, 4 dead letters, 4 attempted of 4" in result.output

            run.ok("endpoint", "update", to, "--url", f"{good}/", "--live")
            again = run("resend", events[0]["event_id"], to, "--wait", "--json")
            assert (again.exit_code, waited(again)["delivered"]) == (0, 1)
            assert (
                run.json("event", "show", first)["deliveries"][0]["fate"]
                == f"delivered by resend (run {waited(again)['id']})"
            )
            failed = run("replay", "start", to, "--yes", "--wait", "--json")
            assert (failed.exit_code, waited(failed)["total"], waited(failed)["delivered"]) == (0, 3, 3)
            assert run.json("dead-letter", "list") == [], "the replay took care of them"
