"""`dispatcher partitions` and `dispatcher maintain`."""

from contextlib import closing

import asyncpg
import uvloop

from tests.test_cli import Cli, empty, run, sql

__all__ = ["empty", "run"]  # fixtures

INSERT = "INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct', 'a.b', '{}')"


def skip_to(run: Cli, last_id: int) -> None:
    sql(run.dsn, "SELECT setval('webhook.outbox_id_seq', $1)", last_id)


def test_a_new_log(run: Cli) -> None:
    found = run.json("partitions")
    assert [(leaf["low"], leaf["high"], leaf["state"]) for leaf in found] == [
        (0, 100_000, "in use"),
        (100_000, 1_000_000, "ahead"),
        (1_000_000, 10_000_000, "ahead"),
        (10_000_000, 40_000_000, "ahead"),
        (None, None, "default"),
    ]
    assert all(leaf["outbox_bytes"] > 0 and leaf["attempt_bytes"] > 0 for leaf in found)
    assert run.json("maintain") == {"made": 0, "complete": True}
    assert run.ok("maintain") == "nothing to do\n"


def test_what_became_of_a_log(run: Cli) -> None:
    for last_id in (5, 100_005, 1_000_005):
        skip_to(run, last_id)
        sql(run.dsn, INSERT)
    sql(run.dsn, "TRUNCATE webhook.outbox_p0")
    sql(run.dsn, "UPDATE webhook.checkpoint SET position = 1000006")
    states = [leaf["state"] for leaf in run.json("partitions")]
    assert states == ["empty", "settled", "in use", "ahead", "default"]
    sql(run.dsn, "UPDATE webhook.checkpoint SET gaps = '{[100100,100101)}'")
    assert run.json("partitions")[1]["state"] == "in use"
    text = run.ok("partitions")
    lines = text.splitlines()
    assert lines[0].split() == ["FROM", "TO", "STATE", "EVENTS", "NEWEST", "EVENTS_SIZE", "ATTEMPTS_SIZE"]
    assert lines[1].split()[:3] == ["0", "99999", "empty"]
    assert "kB" in lines[2]
    assert lines[-1].split()[2] == "default"


def test_a_log_that_outran_its_partitions_is_put_in_order(run: Cli) -> None:
    skip_to(run, 39_999_990)
    for _ in range(20):
        sql(run.dsn, INSERT)
    before = run.json("partitions")
    assert before[-1]["newest_event_at"] is None  # not asked for: it has no bounds
    made = run.json("maintain")
    assert made["complete"]
    assert made["made"] >= 2
    after = run.json("partitions")
    assert [leaf["low"] for leaf in after[:5]] == [0, 100_000, 1_000_000, 10_000_000, 40_000_000]
    assert after[-2]["high"] > 41_000_000
    assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.outbox_default")[0]["n"] == 0
    assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.outbox")[0]["n"] == 20
    assert run.ok("maintain") == "nothing to do\n"


def test_an_open_transaction_in_the_way_is_told(run: Cli) -> None:
    skip_to(run, 40_000_000)
    sql(run.dsn, INSERT)

    async def hold() -> asyncpg.Connection:
        connection = await asyncpg.connect(run.dsn)
        await connection.execute("BEGIN")
        await connection.execute(INSERT)
        return connection

    with closing(uvloop.new_event_loop()) as loop:
        holder = loop.run_until_complete(hold())
        result = run("maintain")
        assert result.exit_code == 1
        assert "an open transaction holds a lock" in result.output
        loop.run_until_complete(holder.execute("COMMIT"))
        loop.run_until_complete(holder.close())
    assert "made" in run.ok("maintain")


def test_retention_shorter_than_retrying_is_refused(run: Cli) -> None:
    text = run.refused("partitions", env={"DISPATCHER_RETENTION_DAYS": "1"})
    assert "DISPATCHER_RETRY_AGE_MAX_S" in text
