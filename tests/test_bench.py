"""The bench: each scenario in its smallest size, the comparator, the histogram, the pictures and the report."""

import asyncio
import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import aiodns
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import load, receivers, report, rig, service, usual
from bench.histogram import Histogram
from bench.plot import svg
from bench.scenario import Plot, Result, Scenario, Table
from bench.scenarios import SCENARIOS
from dispatcher import settings
from dispatcher.domain.outcome import Fault
from dispatcher.domain.url import Origin
from dispatcher.main import make_transport
from dispatcher.sink import Received, Sink
from dispatcher.store.embedded import EmbeddedServer

STORED = Path(__file__).parent / "data" / "bench.json"

LATENCY = {"p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"}
COSTS = {"rate_per_s", "cpu_us", "postgres_cpu_us", "sink_cpu_us", "wal_bytes", "statements", "dead_per_1000", "rss_mb"}
FIELDS = {  # scenario: row → what it must tell
    "throughput": {"bare client": {"rate_per_s", "cpu_us"}, "dispatcher": COSTS, "engine on aiohttp": COSTS,
                   "the usual way, row by row": COSTS, "the usual way, batched": COSTS, "every column given": COSTS,
                   "dispatcher, in turns": {"rate_per_s", "cpu_us"}, "without keys, expiry and priority": {"rate_per_s", "cpu_us"}},
    "latency": {"dispatcher, 200/s": LATENCY, "the usual way, batched, 200/s": LATENCY, "dispatcher": {"first_ms", "last_ms", "rate_per_s"}},
    "neighbours": {"all healthy": LATENCY | {"rate_per_s"}, "30 % bad": LATENCY | {"rate_per_s"}},
    "backlog": {"before": LATENCY | {"growth_mb"}, "parked": LATENCY | {"growth_mb"}, "catching up": LATENCY,
                "paused, 500 events": {"first_post_ms", "catch_up_per_s", "in_first_second"}},
    "held": {"dispatcher, none held": {"first_per_s", "last_per_s"}, "dispatcher, a transaction held": {"rate_kept", "cpu_grown"},
             "before": LATENCY, "while it loads": LATENCY, "after its commit": LATENCY},
    "producers": {"NOTIFY always": {"commits_per_s", "postgres_cpu_us"}},
    "restart": {"kill -9": {"first_post_ms", "duplicates", "rss_after_mb"}},
    "configuration": {"1": {"start_ms", "rss_mb"}, "100": {"start_ms", "per_endpoint_kb", "change_p50_ms", "cpu_per_change_us"}},
    "soak": {"first fifth": {"rss_mb", "descriptors", "p99_ms", "rate_per_s"}, "last fifth": {"rss_mb", "descriptors"}},
    "transport": {"thin": {"cpu_us"}, "aiohttp behind the port": {"cpu_us"}, "plain ClientSession": {"cpu_us"}},
    "replay": {"without a replay": LATENCY, "beside 1 replay": LATENCY | {"replayed_per_s"}},
    "maintenance": {"no transaction open, with maintenance": LATENCY, "a transaction open, with maintenance": LATENCY,
                    "a transaction open": {"emptied"}},
    "panel": {"without visitors": LATENCY | {"cpu_share"}, "with visitors": LATENCY | {"failed_pages"}, "/overview": {"loads", "p50_ms"}},
}  # fmt: skip


@pytest.fixture
async def bench(server: EmbeddedServer) -> rig.Bench:
    return rig.Bench(server.dsn, await rig.local_postmaster(server.dsn), "own", lambda _: None)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_a_scenario_in_its_smallest_size_tells_its_figures(scenario, bench, tmp_path):
    size = scenario.sizes["tiny"]
    result = await scenario.run(bench, size)
    for row, fields in FIELDS[scenario.name].items():
        told = {figure for table in result.tables for figure in table.rows.get(row, {})}
        assert fields <= told, f"{row} lacks {fields - told}"
    done = report.Done(scenario.name, scenario.shows, scenario.misleads, {}, 1.0, result)
    run = report.Run("now", "tiny", {}, [done])
    report.save(run, tmp_path / "results.json")
    assert report.load(tmp_path) == run, "what is kept is what was measured"
    for plot in result.plots:
        ElementTree.fromstring(svg(plot))


def test_every_scenario_is_held_to_its_figures_and_comes_in_three_sizes():
    assert {scenario.name for scenario in SCENARIOS} == FIELDS.keys()
    for scenario in SCENARIOS:
        assert scenario.sizes.keys() == {"full", "quick", "tiny"}
        assert scenario.shows.endswith(".")
        assert scenario.misleads.endswith(".")


async def test_nothing_is_left_on_the_server(bench):
    async with bench.database() as dsn:
        connection = await rig.install(dsn, endpoints=3, port=1, in_flight=1, accounts=2)
        accounts = await connection.fetch("SELECT account_id FROM webhook.endpoint ORDER BY id")
        assert [row["account_id"] for row in accounts] == ["acct_0", "acct_1", "acct_0"]
        assert await connection.fetchval("SELECT count(*) FROM webhook.config_change") == 0
        await connection.execute(
            "UPDATE webhook.endpoint SET state = 'paused', paused_at_id = 0 WHERE id = (SELECT min(id) FROM webhook.endpoint)"
        )
        assert await connection.fetchval("SELECT count(*) FROM webhook.config_change") == 1, "the triggers are back"
        admin = await load.asyncpg.connect(bench.dsn)
        named = "SELECT count(*) FROM pg_database WHERE datname LIKE 'dispatcher_bench_%'"
        assert await admin.fetchval(named) == 1
    assert await admin.fetchval(named) == 0
    await admin.close()


@pytest.mark.parametrize(("stolen", "times"), [((0, 0), 1), ((0, 9, 9, 9), 2), ((0, 9, 9, 18, 18, 27), rig.TRIES)])
async def test_what_others_took_the_cores_from_is_measured_again_a_few_times(stolen, times, monkeypatch):
    told = iter(stolen)
    monkeypatch.setattr(rig, "stolen_s", lambda: next(told))
    measured = []

    async def measure() -> int:
        measured.append(None)
        return len(measured)

    assert await rig.undisturbed(measure) == times, "the last counts"
    assert next(told, None) is None


def test_those_who_run_first_do_so_for_as_long_as_it_is_asked(monkeypatch):
    """Whether or not this machine lets us; one that has ended is passed over."""
    policies = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, policy, priority: policies.append((thread, policy)))
    own, nobody = os.getpid(), 1 << 22
    with rig.first([nobody, own]):
        assert (own, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK) in policies
        policies.clear()
    assert (own, os.SCHED_OTHER) in policies
    assert nobody not in dict(policies)


# The comparator


@pytest.mark.parametrize("form", usual.FORMS)
async def test_the_usual_way_delivers_everything_exactly_once(form, dsn):
    got: Counter[str] = Counter()

    def note(event: Received) -> None:
        assert event.signature_ok
        got[event.webhook_id or ""] += 1

    sink = Sink(secrets=rig.SECRET, on_event=note)
    await sink.start()
    connection = await usual.install(dsn, [f"{sink.url}/hook/{n}" for n in range(3)])
    workers = [usual.Worker(dsn, form, slots=20) for _ in range(2)]  # two of them, which must not take the same row
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    last = await load.bulk(connection, 1_000, 3, target=usual.QUEUE)
    async with asyncio.timeout(30):
        while await connection.fetchval("SELECT count(*) FROM usual.queue WHERE status <> 'done'"):
            await asyncio.sleep(0.01)
    for worker in workers:
        worker.stop()
    await asyncio.gather(*tasks)
    assert got == {f"msg_{n}": 1 for n in range(1, last + 1)}
    assert last == 1_000
    await connection.close()
    await sink.stop()


async def test_the_usual_way_marks_what_failed_for_later(dsn):
    sink = Sink()
    await sink.start()
    dead = rig.free_port()
    connection = await usual.install(dsn, [sink.url, f"http://127.0.0.1:{dead}/"])
    worker = usual.Worker(dsn, "batched", slots=4)
    task = asyncio.create_task(worker.run())
    await load.bulk(connection, 2, 2, target=usual.QUEUE)
    async with asyncio.timeout(30):
        while not await connection.fetchval(
            "SELECT bool_and(status IN ('done', 'pending') AND attempts = 1) FROM usual.queue"
        ):
            await asyncio.sleep(0.01)
    worker.stop()
    await task
    rows = await connection.fetch(
        "SELECT endpoint_id, status, answered, due_at > now() AS later FROM usual.queue ORDER BY 1"
    )
    assert [tuple(row) for row in rows] == [(0, "done", 204, False), (1, "pending", None, True)]
    await connection.close()
    await sink.stop()


# Receivers that do harm


async def test_each_does_the_harm_it_is_named_for(monkeypatch):
    monkeypatch.setattr(aiodns, "DNSResolver", aiodns.DNSResolver)  # put back what service.ask changes
    with receivers.syn_dropped() as syn, receivers.dns_hanging() as dns:
        async with receivers.tls_hanging() as tls:
            service.ask(dns)
            transport = make_transport(settings.load(connect_timeout_s=0.3, allowed_networks="127.0.0.0/8"))
            answers = {}
            for fault, origin in {
                Fault.CONNECT: Origin("http", "127.0.0.1", syn),
                Fault.TLS: Origin("https", "127.0.0.1", tls),
                Fault.DNS: Origin("http", "a.silent.test", syn),
            }.items():
                answers[fault] = asyncio.get_running_loop().create_future()
                transport.connect(origin, answers[fault].set_result)
            outcomes = {fault: await answer for fault, answer in answers.items()}
            await transport.close()
    assert {fault: outcome.fault for fault, outcome in outcomes.items()} == {fault: fault for fault in outcomes}
    assert all("within 0.3 s" in outcome.detail for outcome in outcomes.values()), "not refused: no answer came"


# Histogram


@given(st.lists(st.integers(0, 10**9), min_size=1), st.floats(0, 1))
def test_a_percentile_is_the_value_of_its_rank_within_one_percent(values, share):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found_ms = histogram.percentile_ms(share)
    assert found_ms <= max(values) / 1e3
    # Not below the exact one, and no value that is more than 1 % larger than it lies between.
    ordered = sorted(values)
    exact_ms = ordered[max(1, -int(-share * len(ordered) // 1)) - 1] / 1e3
    assert exact_ms <= found_ms <= exact_ms * 1.016 + 0.001


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=20), min_size=1, max_size=5))
def test_histograms_add_up(parts):
    one, several = Histogram(), []
    for part in parts:
        several.append(Histogram())
        for value in part:
            one.add(value)
            several[-1].add(value)
    merged = Histogram().merge(several)
    assert (merged.counts, merged.total, merged.max_us) == (one.counts, one.total, one.max_us)


def test_a_curve_ends_where_the_number_of_values_ends():
    histogram = Histogram()
    for value in range(1_000):
        histogram.add(value)
    nines = [x for x, _ in histogram.curve()]
    assert nines[0] == 1
    assert nines[-1] == pytest.approx(1_000, rel=0.01)
    assert nines == sorted(nines)


# Tables, goals, pictures


def test_a_sink_that_was_the_limit_voids_the_row_and_its_goals():
    table = Table("one")
    table.add("fast", rate_per_s=10)
    table.add("slow", rate_per_s=4)
    table.check_sink("slow", 0.5)
    (goal,) = table.goal("ratio", "rate_per_s", "fast", "≥", 2, over="slow", out_for=4)
    assert (goal.values, goal.is_met, report.judged(goal)) == ([2.5], True, "yes")
    table.check_sink("fast", 0.97)
    (goal,) = table.goal("ratio", "rate_per_s", "fast", "≥", 2, over="slow")
    assert not goal.is_met
    assert "0.97" in report.judged(goal)
    assert table.goal("no such row", "rate_per_s", "neither", "≥", 2) == []


def test_pictures_are_well_formed_and_escape_their_text():
    lines = Plot("a", "1 < 2 & 3", "x", "y", {"<b>": [(1, 0.5), (10, 3), (100, 40)]}, log_x=True, log_y=True)
    tree = ElementTree.fromstring(svg(lines))
    texts = [element.text for element in tree.iter() if element.tag.endswith("text")]
    assert "1 < 2 & 3" in texts
    assert "<b>" in texts
    ElementTree.fromstring(svg(Plot("b", "none", "x", "y")))
    bars = ElementTree.fromstring(
        svg(Plot("c", "bars", "µs", "", stacked={"one": {"p": 2.0, "q": 3.0}, "two": {"p": 1.0}}))
    )
    widths = [float(element.get("width", 0)) for element in bars.iter() if element.tag.endswith("rect")][1:4]
    assert widths[0] == pytest.approx(2 * widths[2], rel=0.02)
    assert widths[1] == pytest.approx(3 * widths[2], rel=0.02)


# The report


def test_the_document_is_made_of_a_stored_run(tmp_path):
    to = tmp_path / "benchmarks.md"
    with_profile = CliRunner().invoke(command.main, ["report", str(STORED), "--to", str(to)])
    assert with_profile.exit_code == 0, with_profile.output
    text = to.read_text()
    assert "2026-11-23T12:00:00Z, size full (throughput, soak): cpu Example, cores 2" in text
    assert "|  | cpu, µs | rate/s |" in text
    assert "| dispatcher | 35 (30–40) | 20,000 (19,000–21,000) |" in text
    assert "| bare client | 11 (10–12) | – |" in text
    assert "**Void**, bare client: the sink was the limit" in text
    assert "| WAL to consume | ≤ 200 |  | 150 | yes |" in text
    assert "| CPU ratio | ≥ 0.35 | ≥ 0.5 | 0.31 (0.3–0.34) | **no** |" in text
    assert "**It failed:** TimeoutError: never" in text
    assert "`python -m bench --only throughput`; rounds 3, factors TLS 4 kB; took 12 s." in text
    assert command.PROFILE.read_text().splitlines()[0] in text
    assert (tmp_path / "benchmarks" / "throughput-cpu.svg").exists()
    assert "(benchmarks/throughput-cpu.svg)" in text


def test_a_later_run_counts_for_the_scenario_it_has():
    first, second = report.load(STORED), report.load(STORED)
    del second.done[1]
    second.at = "later"
    second.done[0].took_s = 99
    text = report.document([first, second], "# Profile\n", "pictures")
    assert "took 99 s" in text
    assert "took 12 s" not in text
    assert "size full (soak)" in text


# The command


def test_the_list_says_what_there_is():
    result = CliRunner().invoke(command.main, ["--list", "--quick", "--size", "soak.minutes=7"])
    assert result.exit_code == 0
    for scenario in SCENARIOS:
        assert scenario.name in result.output
    assert "minutes=7.0" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "nothing is no scenario"),
        (["--size", "colour=3"], "no scenario here has such a size"),
        (["--size", "latency.rounds=many"], "latency.rounds=many"),
        (["--only", "soak", "--size", "latency.rounds=3"], "no scenario here has such a size"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_arguments_are_told_of_before_anything_starts(arguments, said):
    result = CliRunner().invoke(command.main, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_list_of_names_is_read_as_the_list_of_sizes_shows_it():
    [throughput] = [scenario for scenario in SCENARIOS if scenario.name == "throughput"]
    size = throughput.sizes["full"]
    assert "4,000 in flight" in size.factors, "a name with a comma"
    shown = command._shown(size.factors)
    tiny = [(throughput, throughput.sizes["tiny"])]
    [(_, sized)] = command._resized(tiny, [f"throughput.factors={shown}"])
    assert sized.factors == size.factors


def test_sizes_are_read_as_what_they_replace():
    known = {scenario.name: scenario for scenario in SCENARIOS}
    chosen = [(known[name], known[name].sizes["full"]) for name in ("backlog", "throughput", "soak")]
    sized = command._resized(chosen, ["backlog.paused=5,6", "events=10", "throughput.factors=TLS", "minutes=1.5"])
    (_, backlog), (_, throughput), (_, soak) = sized
    assert (backlog.paused, throughput.events, throughput.factors, soak.minutes) == ((5, 6), 10, ("TLS",), 1.5)


async def test_a_scenario_that_fails_is_told_of_and_the_others_run(server, tmp_path, capsys):
    async def fail(bench, size):
        raise RuntimeError("on purpose")

    async def work(bench, size):
        table = Table("a table")
        table.add("row", rate_per_s=size.minutes)
        return Result([table])

    size = next(scenario for scenario in SCENARIOS if scenario.name == "soak").sizes["tiny"]
    chosen = [
        (Scenario(name, "It shows.", "it misleads.", {}, run), size) for name, run in (("bad", fail), ("good", work))
    ]
    run = await asyncio.to_thread(command._run, server.dsn, chosen, "tiny", "own", tmp_path)
    assert [(done.scenario, done.error) for done in run.done] == [("bad", "RuntimeError: on purpose"), ("good", None)]
    (folder,) = tmp_path.iterdir()
    assert report.load(folder) == run
    shown = capsys.readouterr()
    assert "FAILED: RuntimeError: on purpose" in shown.out
    assert "a table" in shown.out
