"""A scrape of a running engine says what happened, by the conventions; and the table of them is whole."""

import re

from prometheus_client.parser import text_string_to_metric_families

from bench.receivers import tls_hanging
from dispatcher.engine.counters import Counters
from dispatcher.engine.histogram import Histogram
from dispatcher.observe.catalogue import METRICS, OUTCOMES, Spec
from dispatcher.observe.metrics import family
from dispatcher.sink import Behaviour
from tests.observe.build import kept, observed
from tests.rig import rig, until


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for found in text_string_to_metric_families(text)
        for sample in found.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[f"dispatcher_{name}", tuple(sorted(labels.items()))]


async def test_what_was_delivered_and_what_failed_is_counted_and_measured(dsn: str) -> None:
    async with rig(dsn, retry_schedule_s="3600") as r, observed(r) as o:
        await r.endpoint("/good")
        await r.endpoint("/bad", account="other", behaviour=Behaviour(status=500))
        await r.emit(20)
        await r.emit(3, account="other")
        await until(lambda: r.engine.counters.rows_recorded == 23)
        text = await o.scrape()
        assert value(text, "attempts_total", outcome="delivered") == 20
        assert value(text, "attempts_total", outcome="5xx") == 3
        assert value(text, "attempts_total", outcome="timeout") == 0
        assert value(text, "attempt_duration_seconds_count") == 23
        assert value(text, "event_received_seconds_count") == 20
        assert 0 < value(text, "event_received_seconds_sum") < 20 * 30
        assert value(text, "event_received_seconds_bucket", le="+Inf") == 20
        assert value(text, "events_read_total") == 23
        assert value(text, "batch_rows_sum") == 23
        assert value(text, "state", state="owner") == 1
        assert value(text, "state", state="standby") == 0
        assert value(text, "connections_opened_total") >= 2
        assert value(text, "database_round_trips_total", session="reader") > 0
        assert value(text, "breakers", state="closed") == 2

        async def looked() -> bool:
            return value(await o.scrape(), "retries_waiting") == 3

        await until(looked, what="the observer has seen the retries")


async def test_an_event_that_a_clock_dates_in_the_future_is_measured_as_nothing_not_left_out(dsn: str) -> None:
    async with rig(dsn) as r, observed(r) as o:
        await r.endpoint()
        await r.db.execute(
            "INSERT INTO webhook.outbox (account_id, type, payload, created_at) "
            "VALUES ('acct', 'message.sent', '{}', clock_timestamp() + interval '1 minute')"
        )
        await until(lambda: r.engine.counters.rows_recorded == 1)
        text = await o.scrape()
        assert value(text, "event_received_seconds_count") == 1
        assert value(text, "event_received_seconds_sum") == 0


async def test_lanes_that_are_behind_are_told_with_the_age_of_what_waits(dsn: str) -> None:
    async with rig(dsn) as r, observed(r) as o:
        paused = await r.endpoint("/paused")
        await r.db.execute(
            "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = webhook.last_id() WHERE id = $1", paused
        )

        async def held() -> bool:
            return value(await o.scrape(), "lanes", state="held") == 1

        await until(held, what="the pause has come")
        await r.emit(5)

        async def waits() -> bool:
            return value(await o.scrape(), "backlog_events", state="held") == 5

        await until(waits, what="five events wait")
        text = await o.scrape()
        assert value(text, "lanes", state="live") == 0
        assert value(text, "oldest_undelivered_seconds", part="behind") == 0, "somebody paused it"

        async def settled() -> bool:
            return value(await o.scrape(), "oldest_undelivered_seconds", part="log") == 0

        await until(settled, what="nothing of the log waits but for the paused lane")


async def test_a_rate_limit_that_makes_wait_is_counted(dsn: str) -> None:
    async with rig(dsn) as r, observed(r) as o:
        await r.endpoint("/slow", rate_per_s=5.0, rate_burst=1)
        await r.emit(4)
        await until(lambda: r.engine.counters.delivered == 4)
        assert value(await o.scrape(), "rate_waits_total") >= 3


async def test_connections_that_are_awaited_are_told_by_the_doubt_whether_they_come(dsn: str) -> None:
    async with (
        tls_hanging() as port,
        rig(dsn, connect_timeout_s=1, retry_schedule_s="1,3600") as r,
        observed(r) as o,
    ):
        await r.endpoint(url=f"https://127.0.0.1:{port}/")
        await r.emit(1)

        async def untried() -> bool:
            return value(await o.scrape(), "connections_awaited", doubt="untried") == 1

        async def unreached() -> bool:
            return value(await o.scrape(), "connections_awaited", doubt="unreached") == 1

        async def over() -> bool:
            return value(await o.scrape(), "connections_awaited", doubt="unreached") == 0

        await until(untried, what="a first connection is awaited")
        await until(unreached, what="it came to nothing, and another one is")
        await until(over, what="the retry after that is not due for an hour")
        assert value(await o.scrape(), "connections_awaited", doubt="none") == 0


async def test_what_only_an_owner_knows_is_left_out_elsewhere(dsn: str) -> None:
    async with rig(dsn) as r, observed(r, looking=False) as o:
        as_owner = await o.scrape()
        await r.stop()
        text = await o.scrape()
        for name in ("lanes", "backlog_events", "in_flight", "position_id", "gaps", "breakers"):
            assert f"dispatcher_{name}" in as_owner
            assert f"dispatcher_{name}{{" not in text
            assert f"dispatcher_{name} " not in text.replace(f"# TYPE dispatcher_{name} ", "")
        assert value(text, "database_up") == 0
        assert "dispatcher_oldest_undelivered_seconds" not in text, "nobody has looked"


async def test_every_metric_of_the_table_is_in_a_scrape_with_its_help(dsn: str) -> None:
    async with kept(dsn) as r, observed(r) as o:
        await until(lambda: o.observer.seen is not None, what="a look at the database")
        text = await o.scrape()
    for spec in METRICS:
        assert f"# HELP {spec.full_name} {spec.help}" in text, spec.name
        assert f"# TYPE {spec.full_name} {'histogram' if spec.kind in ('seconds', 'size') else spec.kind}" in text
    assert "process_open_fds" in text
    assert "process_max_fds" in text


async def test_nothing_of_customers_is_in_a_scrape(dsn: str) -> None:
    async with rig(dsn) as r, observed(r) as o:
        await r.endpoint("/hunter2", account="hunter2", behaviour=Behaviour(status=500))
        await r.emit(1, account="hunter2", type="hunter2.sent", payload='{"hunter2": 1}')
        await until(lambda: r.engine.counters.failed == 1)
        for path in ("/metrics", "/readyz", "/livez"):
            text = (await o.ask(path))[1]
            assert "hunter2" not in text
            assert "whsec_" not in text


async def test_a_scrape_of_many_lanes_lets_others_run(dsn: str, monkeypatch) -> None:
    monkeypatch.setattr("dispatcher.observe.figures.SLICE_LANES", 2)
    async with rig(dsn) as r, observed(r) as o:
        for n in range(7):
            await r.endpoint(f"/{n}")
        assert value(await o.scrape(), "lanes", state="live") == 7


def test_names_and_units_follow_the_conventions() -> None:
    assert len({spec.full_name for spec in METRICS}) == len(METRICS)
    for spec in METRICS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", spec.name), spec.name
        assert not spec.name.endswith("_total"), "added where it belongs"
        assert spec.help.endswith("."), spec.name
        assert "_ms" not in spec.name, "base units"
        if spec.kind == "seconds":
            assert spec.name.endswith("_seconds"), spec.name
        assert set(spec.labels) <= {
            *("version", "state", "part", "age", "kind", "outcome", "session", "area", "status", "doubt"),
        }, "no label without a bound"


def test_every_counter_of_the_engine_is_a_metric_or_has_a_reason() -> None:
    told = {spec.name for spec in METRICS}
    read_by_others = {
        "attempts", "delivered", "failed",  # attempts by outcome
        "caught_up", "crowded_out", "batches", "rows_recorded",  # the histograms of batches; lanes by state
        "deliveries_expired_held",  # deliveries_expired by state
        "partitions_dropped", "dead_letters_expired",  # housekeeping that nobody acts upon
        *(f"{kind}_reads" for kind in ("head", "gap", "lag", "retry", "run", "urgent", "key")),
    }  # fmt: skip
    renamed = {
        "sleeps": "doorbell_sleeps", "wake_ups": "doorbell_wake_ups", "retried": "retries", "dead": "dead_letters",
        "stale": "connections_stale", "store_away": "database_away",
    }  # fmt: skip
    for name in Counters().as_dict():
        assert name in read_by_others or renamed.get(name, name) in told, name


def test_buckets_are_cumulative_and_a_value_is_below_its_bound() -> None:
    histogram = Histogram()
    for us in (0, 255, 256, 1_000, 10**12):
        histogram.add(us)
    shown = {
        s.labels["le"]: s.value
        for s in family(Spec("x_seconds", "seconds", "X.", lambda f: None), histogram).samples
        if "le" in s.labels
    }
    assert shown["0.000256"] == 2
    assert shown["0.000512"] == 3
    assert shown["0.001024"] == 4
    assert shown["536.871"] == 4
    assert shown["+Inf"] == 5
    sizes = Histogram()
    for rows in (0, 1, 2, 3, 4):
        sizes.add(rows)
    shown = {
        s.labels["le"]: s.value
        for s in family(Spec("x", "size", "X.", lambda f: None), sizes).samples
        if "le" in s.labels
    }
    assert (shown["0"], shown["1"], shown["3"], shown["7"]) == (1, 2, 4, 5)


def test_outcomes_are_bounded() -> None:
    assert len(OUTCOMES) < 16
