"""The verbs of an endpoint's life as a person and a script use them. What they do to deliveries is in test_endpoint_life.py."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import click
import pytest

from dispatcher.cli import terminal as terminal_module
from dispatcher.cli.common import DURATION
from dispatcher.store import admin, endpoint
from tests.conftest import dsn_of
from tests.test_cli import Cli, sink_process, sql

_numbers = itertools.count(1)


@pytest.fixture
def run(server) -> Iterator[Cli]:
    name = f"cli_endpoints_{next(_numbers)}"
    sql(server.dsn, f"CREATE DATABASE {name}")
    made = Cli(dsn_of(server.dsn, name))
    made.ok("migrate")
    yield made
    sql(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def live(run: Cli) -> str:
    """The id of a live endpoint of account a."""
    return str(run.json("endpoint", "create", "a", "https://example.com/hook", "--live", "--name", "Ann's")["id"])


def emit(run: Cli, count: int = 1, type: str = "message.sent") -> None:
    sql(
        run.dsn,
        "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'a', $1, '{}' FROM generate_series(1, $2::integer)",
        type,
        count,
    )


def told(run: Cli) -> list[tuple[str, str]]:
    rows = sql(
        run.dsn,
        "SELECT type, payload ->> 'reason' AS reason FROM webhook.outbox WHERE type LIKE 'endpoint.%' ORDER BY id",
    )
    return [(row["type"], row["reason"]) for row in rows]


def discards(run: Cli) -> list[tuple[str, int]]:
    return [tuple(row) for row in sql(run.dsn, "SELECT reason, deliveries FROM webhook.discard ORDER BY id")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_module, "can_ask", lambda: True)


# ── pause, resume ──


def test_pause_and_resume(run: Cli, live: str) -> None:
    assert "held" in run.ok("endpoint", "pause", live)
    assert "only live endpoints" in run.refused("endpoint", "pause", live)
    emit(run, 3)
    assert run.json("endpoint", "show", live)["held"] == 3
    resumed = run.json("endpoint", "resume", live)
    assert (resumed["state"], resumed["skipped"]) == ("live", 0)
    assert "only paused endpoints" in run.refused("endpoint", "resume", live)
    assert told(run) == [], "a pause is the owner's own doing"


def test_resume_skips(run: Cli, live: str) -> None:
    run.ok("endpoint", "pause", live)
    emit(run, 3)
    assert "deliveries skipped: 3" in run.ok("endpoint", "resume", live, "--skip")
    assert discards(run) == [("skipped", 3)]
    assert run.json("endpoint", "show", live)["discards"] == {"skipped": 3}
    assert re.search(r"never sent +3 skipped", run.ok("endpoint", "show", live))
    rows = run.json("endpoint", "show", live)["subscriptions"]
    assert [(row["pattern"], row["since_id"], row["until_id"]) for row in rows] == [("*", 0, 0), ("*", 3, None)]
    assert "*  ids above 0 up to 0" in run.ok("endpoint", "show", live, "--subscriptions")
    assert "ids above" not in run.ok("endpoint", "show", live)


def test_pause_that_skips(run: Cli, live: str) -> None:
    assert "SKIPPED" in run.ok("endpoint", "pause", live, "--skip")
    emit(run, 2)
    shown = run.json("endpoint", "show", live)
    assert (shown["held"], shown["skipping"]) == (0, True)
    assert "events since then are skipped" in run.ok("endpoint", "show", live)
    assert "leave out --send" in run.refused("endpoint", "resume", live, "--send")
    assert run.json("endpoint", "resume", live)["skipped"] == 2
    assert discards(run) == [("skipped", 2)]


def test_pause_that_skips_and_ends_in_a_delete_counts_both(run: Cli, live: str) -> None:
    emit(run, 4)
    run.ok("endpoint", "pause", live, "--skip")
    emit(run, 2)
    assert run.json("endpoint", "delete", live, "--yes")["discarded"] == 4
    assert sorted(discards(run)) == [("deleted", 4), ("skipped", 2)]


# ── disable, enable ──


def test_disable_and_enable_in_a_script(run: Cli, live: str) -> None:
    assert "is disabled" in run.ok("endpoint", "disable", live, "--reason", "ticket 4711")
    assert "ticket 4711" in run.ok("endpoint", "show", live)
    assert "only live and paused" in run.refused("endpoint", "disable", live)
    assert f"dispatcher endpoint enable {live}" in run.refused("endpoint", "resume", live)
    emit(run, 2)
    message = run.refused("endpoint", "enable", live)
    assert "choose whether to send or to skip them; say --send to send them, oldest first, or --skip never" in message
    enabled = run.json("endpoint", "enable", live, "--skip")
    assert (enabled["state"], enabled["skipped"]) == ("live", 2)
    assert told(run) == [("endpoint.disabled", "by_operator"), ("endpoint.recovered", "enabled")]
    assert "only disabled endpoints" in run.refused("endpoint", "enable", live)


def test_enable_without_a_choice_where_nothing_was_held(run: Cli, live: str) -> None:
    run.ok("endpoint", "disable", live)
    emit(run, 2, type="other.account")
    sql(run.dsn, "UPDATE webhook.outbox SET account_id = 'b' WHERE type = 'other.account'")
    assert run.json("endpoint", "enable", live)["state"] == "live"


@pytest.mark.parametrize(("answer", "skipped"), [("send", 0), ("skip", 2)])
@pytest.mark.usefixtures("terminal")
def test_enable_asks_on_a_terminal(run: Cli, live: str, answer: str, skipped: int) -> None:
    emit(run, 3)
    run.ok("endpoint", "disable", live)
    emit(run, 2)
    result = run("endpoint", "enable", live, input=f"{answer}\n")
    assert result.exit_code == 0, result.output
    assert "held since then: 2" in result.stderr
    assert "3 not tried yet, 0 that wait for a retry" in result.stderr
    assert f"endpoint {live} is live" in result.stdout
    assert discards(run) == ([("skipped", skipped)] if skipped else [])


@pytest.mark.usefixtures("terminal")
def test_enable_that_is_asked_and_not_answered_changes_nothing(run: Cli, live: str) -> None:
    run.ok("endpoint", "disable", live)
    emit(run, 1)
    assert run("endpoint", "enable", live, input="").exit_code == 1
    assert run.json("endpoint", "show", live)["state"] == "disabled"
    assert told(run) == [("endpoint.disabled", "by_operator")]


@pytest.mark.usefixtures("terminal")
def test_enable_asks_nothing_where_there_is_nothing_to_ask(run: Cli, live: str) -> None:
    assert "only disabled endpoints" in run.refused("endpoint", "enable", live)
    run.ok("endpoint", "disable", live)
    assert run.json("endpoint", "enable", live)["skipped"] == 0


def test_a_bad_reason_is_refused(run: Cli, live: str) -> None:
    for reason in ("", "x" * 201, "a\nb"):
        assert "printable" in run.refused("endpoint", "disable", live, "--reason", reason)
    assert run.json("endpoint", "show", live)["state"] == "live"


@pytest.mark.parametrize("verb", ["pause", "resume", "disable", "enable", "rotate-secret", "go-live", "test"])
def test_an_endpoint_that_is_not_there(run: Cli, verb: str) -> None:
    assert "there is no endpoint 4711; `dispatcher endpoint list`" in run.refused("endpoint", verb, "4711")


@pytest.mark.parametrize(("verb", "remedy"), [("enable", "go-live"), ("disable", ""), ("pause", ""), ("resume", "")])
def test_a_draft_has_no_life_yet(run: Cli, verb: str, remedy: str) -> None:
    draft = str(run.json("endpoint", "create", "a", "https://example.com/")["id"])
    message = run.refused("endpoint", verb, draft)
    assert f"endpoint {draft} is draft" in message
    assert remedy in message


def test_more_than_a_million_is_said_so(run: Cli, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admin, endpoint):
        monkeypatch.setattr(module, "COUNTED_MAX", 10)
    run.ok("endpoint", "disable", live)
    emit(run, 10)
    assert "(10)" in run.refused("endpoint", "enable", live)
    emit(run, 20)
    assert "(more than 10)" in run.refused("endpoint", "enable", live)
    assert run.json("endpoint", "enable", live, "--skip")["skipped"] == 30, "what is discarded is counted to its end"


# ── secrets ──


def test_rotate_secret(run: Cli, live: str) -> None:
    [first] = run.json("endpoint", "show", live, "--secret")["secrets"]
    rotated = run.json("endpoint", "rotate-secret", live, "--overlap", "90m")
    secrets = run.json("endpoint", "show", live, "--secret")["secrets"]
    assert [s["secret"] for s in secrets] == [rotated["secret"], first["secret"]]
    assert [s["expires_at"] for s in secrets] == [None, rotated["old_sign_until"]]
    left = sql(
        run.dsn,
        "SELECT extract(epoch FROM expires_at - now()) AS s FROM webhook.endpoint_secret WHERE expires_at IS NOT NULL",
    )
    assert 5_300 < left[0]["s"] <= 5_400
    assert "secret" not in run.json("endpoint", "show", live)["secrets"][0]
    text = run.ok("endpoint", "show", live, "--secret")
    assert re.search(rf"secret +{re.escape(first['secret'])}  until ", text)

    mine = "whsec_" + "A" * 32
    assert f"secret   {mine}\nThe old ones sign too until" in run.ok(
        "endpoint", "rotate-secret", live, "--secret", mine
    )
    assert "already" in run.refused("endpoint", "rotate-secret", live, "--secret", mine)
    assert "whsec_" in run.refused("endpoint", "rotate-secret", live, "--secret", "hush")
    assert "The old one signs no more." in run.ok("endpoint", "rotate-secret", live, "--overlap", "0")
    assert len(run.json("endpoint", "show", live)["secrets"]) == 1


def test_the_default_overlap_is_a_day(run: Cli, live: str) -> None:
    run.ok("endpoint", "rotate-secret", live)
    left = sql(
        run.dsn,
        "SELECT extract(epoch FROM expires_at - now()) AS s FROM webhook.endpoint_secret WHERE expires_at IS NOT NULL",
    )
    assert 86_300 < left[0]["s"] <= 86_400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("90m", 5_400), ("24h", 86_400), ("2d", 172_800), ("0", 0), ("0s", 0), ("1.5h", 5_400), (" 5s ", 5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "h", "24 h", "-5s", "1h30m", "5w", "1e3s", "٣s", "9" * 10 + "s", "inf", "nand"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(
        click.BadParameter, match="is not a duration: give a number and a unit, such as 30s, 90m, 24h or 2d"
    ):
        DURATION.convert(text, None, None)


def test_a_bad_overlap(run: Cli, live: str) -> None:
    result = run("endpoint", "rotate-secret", live, "--overlap", "soon")
    assert result.exit_code == 2
    assert "'soon' is not a duration" in result.output
    assert "30 days" in run.refused("endpoint", "rotate-secret", live, "--overlap", "31d")
    assert len(run.json("endpoint", "show", live)["secrets"]) == 1


# ── delete ──


def test_delete_asks_only_a_person(run: Cli, live: str) -> None:
    assert "repeat with --yes" in run.refused("endpoint", "delete", live)
    assert run.json("endpoint", "show", live)["state"] == "live"


def test_delete_shows_what_waits_and_counts_it(run: Cli, live: str, terminal: None) -> None:
    emit(run, 3)
    sql(
        run.dsn,
        "INSERT INTO webhook.retry VALUES ($1, 1, 0, 2, now(), now(), 'x'), ($1, 9, 5, 2, now(), now(), 'x')",
        int(live),
    )
    sql(run.dsn, "INSERT INTO webhook.attempt VALUES (1, $1, now(), 0, 1, 1, 500, 'status', NULL)", int(live))
    result = run("endpoint", "delete", live, input="n\n")
    assert "Deliveries that wait for it and would never be sent: 4" in result.output
    assert result.exit_code == 1
    assert run.json("endpoint", "show", live)["state"] == "live"
    assert "never sent: 4" in run.ok("endpoint", "delete", live, input="y\n")
    assert discards(run) == [("deleted", 4)]
    assert "no endpoint" in run.refused("endpoint", "delete", live, "--yes")
    assert discards(run) == [("deleted", 4)]


# ── the gate, and what is shown ──


def test_force_is_loud(run: Cli, live: str) -> None:
    run.ok("endpoint", "update", live, "--url", "https://example.com/new")
    result = run("endpoint", "go-live", live, "--force", "--json")
    assert f"warning: endpoint {live} went live WITHOUT a passed test" in result.stderr
    assert "WITHOUT" not in result.stdout
    assert run.json("endpoint", "show", live)["state_reason"] == "edit forced without a test"
    assert "edit forced without a test" in run.ok("endpoint", "show", live)


def test_the_record_of_a_pause_keeps_its_reason_when_an_edit_is_forced(run: Cli, live: str) -> None:
    run.ok("endpoint", "disable", live, "--reason", "gone")
    run.ok("endpoint", "update", live, "--url", "https://example.com/new")
    run.ok("endpoint", "go-live", live, "--force")
    assert run.json("endpoint", "show", live)["state_reason"] == "gone; edit forced without a test"


def test_a_rotation_whose_overlap_ends_takes_no_passed_test_back(run: Cli) -> None:
    with sink_process("--quiet") as url:
        draft = str(run.json("endpoint", "create", "a", url)["id"])
        run.ok("endpoint", "rotate-secret", draft)
        run.ok("endpoint", "test", draft)
        assert run.json("endpoint", "show", draft)["tested"]
        sql(run.dsn, "UPDATE webhook.endpoint_secret SET expires_at = now() WHERE expires_at IS NOT NULL")
        shown = run.json("endpoint", "show", draft)
        assert (shown["tested"], len(shown["secrets"])) == (True, 1)
        run.ok("endpoint", "rotate-secret", draft)
        assert "has not passed a test" in run.refused("endpoint", "go-live", draft)


def test_a_proposed_edit_is_shown_as_a_difference(run: Cli, live: str) -> None:
    text = run.ok("endpoint", "update", live, "--url", "https://example.com/new", "--type", "message.*", "--rate", "5")
    assert "url: https://example.com/hook → https://example.com/new" in text
    assert f"dispatcher endpoint test {live}" in text
    text = run.ok("endpoint", "show", live)
    assert "url: https://example.com/hook → https://example.com/new" in text
    assert "event_types: * → message.*" in text
    assert "rate_per_s: – → 5.0" in text
    assert "timeout_ms:" not in text
    assert "the edit has NOT passed a test" in text
    assert "edit waits" in run.ok("endpoint", "list")
    assert run.json("endpoint", "show", live)["changes"]["event_types"] == [["*"], ["message.*"]]
    back = ("--url", "https://example.com/hook", "--type", "*")
    assert "no edit waits" not in run.ok("endpoint", "update", live, *back), "the rate is left"


def test_show_tells_all(run: Cli, live: str) -> None:
    since = "2025-03-14T09:26:53Z"
    sql(run.dsn, "UPDATE webhook.endpoint SET failing_since = $1::text::timestamptz", since)
    emit(run, 3)
    letter = (
        "INSERT INTO webhook.dead_letter (endpoint_id, event_id, run, account_id, type, payload, created_at, attempts, first_attempt_at, "
        "reason, fault, state) VALUES ($1, $2, 0, 'a', 'message.sent', '{}', now(), 3, now(), 'last', 'status', $3)"
    )
    sql(run.dsn, letter, int(live), 1, "open")
    sql(run.dsn, letter, int(live), 2, "discarded")
    sql(run.dsn, "INSERT INTO webhook.lane (endpoint_id, settled, backlog) VALUES ($1, 0, 1234)", int(live))
    replay = (
        "INSERT INTO webhook.run (endpoint_id, after_id, upto_id, total, state) VALUES ($1, 0, 3, 3, $2) RETURNING id"
    )
    for state in ("running", "canceled", "running"):
        sql(
            run.dsn,
            "INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, 0)",
            sql(run.dsn, replay, int(live), state)[0]["id"],
        )
    sql(run.dsn, "UPDATE webhook.run_progress SET finished_at = now() WHERE run_id = 3")
    shown = run.json("endpoint", "show", live)
    assert (shown["state"], shown["state_reason"], shown["dead_letters"], shown["backlog"]) == (
        "live",
        "created live",
        1,
        1234,
    )
    assert (shown["held"], shown["skipping"], shown["proposed"], shown["tested"]) == (None, False, None, False)
    assert [(r["id"], r["state"], r["total"], r["attempted"]) for r in shown["runs"]] == [(1, "running", 3, 0)]
    text = run.ok("endpoint", "show", live)
    for line in (
        r"state +live since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(created live\)", r"FAILING +no success since 2025-03-14 09:26:53 UTC",
        r"dead letters +1\n", r"backlog +1,234\n", r"run +1 \(log\) running: 0 of 3, 0 delivered", r"endpoint +\d+  Ann's\n",
    ):  # fmt: skip
        assert re.search(line, text), line
    listed = run.json("endpoint", "list")
    assert [(row["failing"], row["backlog"]) for row in listed] == [(True, 1234)]
    assert "live, FAILING" in run.ok("endpoint", "list")
    sql(run.dsn, "UPDATE webhook.endpoint SET failing_since = NULL")
    assert "FAILING" not in run.ok("endpoint", "list")


VERBS: list[Any] = [
    "list",
    "show",
    "update",
    "pause",
    "resume",
    "disable",
    "enable",
    "rotate-secret",
    "delete",
    "go-live",
    "create",
    "test",
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_and_help(run: Cli, verb: str) -> None:
    text = run.ok("endpoint", verb, "--help")
    assert "--json" in text
    assert f"dispatcher endpoint {verb}" in text, "an example"


# ── filters ──


def test_filters(run: Cli) -> None:
    made = run.json("endpoint", "create", "a", "https://example.com/hook", "--filter", "from=+27821234567", "--filter", "status=delivered",
                    "--filter", "status=failed")  # fmt: skip
    assert made["filters"] == {"from": ["+27821234567"], "status": ["delivered", "failed"]}
    endpoint = str(made["id"])
    assert re.search(
        r"^filters +from=\+27821234567  status=delivered,failed$", run.ok("endpoint", "show", endpoint), re.M
    )
    assert run.json("endpoint", "update", endpoint, "--filter", "to=1=2")["filters"] == {"to": ["1=2"]}, (
        "all of them are replaced"
    )
    assert run.json("endpoint", "update", endpoint, "--no-filters")["filters"] == {}
    assert "not FIELD=VALUE" in run.refused("endpoint", "update", endpoint, "--filter", "status")
    assert "campaign_id, from, keyword, reference, status, to" in run.refused(
        "endpoint", "update", endpoint, "--filter", "colour=red"
    )
    assert "not both" in run.refused("endpoint", "update", endpoint, "--filter", "to=1", "--no-filters")
