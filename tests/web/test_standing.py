"""How an endpoint stands at this moment, and its charts."""

import asyncio
from typing import Any

import pytest

from dispatcher import settings as settings_module
from dispatcher.main import make_engine, make_transport, make_web
from dispatcher.sink import Behaviour
from dispatcher.store.endpoint import RETRIES_SHOWN_MAX
from dispatcher.web.panel.charts import lines
from dispatcher.web.panel.standing import UNKNOWN, said
from tests.conftest import connected
from tests.rig import rig, until
from tests.store import people
from tests.web.conftest import Site, site
from tests.web.test_deliveries import data
from tests.web.test_panel import Browser

LANE: dict[str, Any] = {
    "endpoint_id": 1, "breaker": "closed", "pace_per_s": None, "waits_s": 0.0, "probe_in_s": None, "in_flight": 3, "in_flight_limit": 10,
    "queued": 0, "connecting": 0, "origin_full": False,
}  # fmt: skip


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


@pytest.mark.parametrize(
    ("lane", "words"),
    [
        (None, UNKNOWN),
        (LANE, "Breaker closed: it is sent to"),
        (LANE | {"breaker": "open", "probe_in_s": 4.0}, "Breaker open"),
        (LANE | {"breaker": "half-open"}, "one POST at a time"),
        (LANE | {"waits_s": 12.0}, "asked to wait"),
        (LANE | {"pace_per_s": 2.5}, "lower pace"),
        (LANE | {"connecting": 2}, "Breaker closed: it is sent to"),
        (LANE | {"connecting": 2, "origin_full": True}, "take turns"),
    ],
)
def test_words_say_how_it_is_treated(lane: dict[str, Any] | None, words: str):
    assert words in said(lane)
    assert not any(character.isdigit() for character in said(lane).replace("429, 502, 503 or 504", "")), "announced"


async def test_a_process_that_does_not_deliver_says_so(customer: Browser):
    async with connected(customer.web.dsn) as db:
        live, draft = await people.endpoint(db), await people.endpoint(db, state="draft")
        await people.retrying(db, live, await people.emit(db, 1))
    assert UNKNOWN in (await customer.get(f"/endpoints/{live}")).text
    assert UNKNOWN not in (await customer.get(f"/endpoints/{draft}")).text
    standing = (await data(customer, f"/endpoints/{live}"))["standing"]
    assert (standing["lane"], standing["retries"]) == (None, 1)
    assert standing["next_retry_at"] is not None


async def test_of_very_many_retries_no_more_are_counted(customer: Browser):
    """A page that is looked at asks every two seconds."""
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        for most, said in (
            (RETRIES_SHOWN_MAX, "; 10,000 deliveries wait"),
            (RETRIES_SHOWN_MAX + 5, "; over 10,000 deliveries wait"),
        ):
            await db.execute(
                "INSERT INTO webhook.retry SELECT $1, n, 0, 2, now(), now(), 'x' FROM generate_series(1, $2::integer) AS n "
                "ON CONFLICT DO NOTHING",
                endpoint, most,
            )  # fmt: skip
            assert said in (await customer.get(f"/endpoints/{endpoint}")).text
        standing = (await data(customer, f"/endpoints/{endpoint}"))["standing"]
        assert (standing["retries"], standing["more_retries"]) == (RETRIES_SHOWN_MAX, True)


async def test_the_process_that_delivers_shows_breaker_and_when_it_tries_again(customer: Browser):
    async with rig(customer.web.dsn, retry_schedule_s=(1,) * 12) as r:
        customer.web.web.lane_health = lambda endpoint_id: r.engine.lane_health(endpoint_id)
        endpoint = await r.endpoint(behaviour=Behaviour(status=500))
        at = f"/endpoints/{endpoint}"
        assert "Breaker closed" in (await customer.get(at)).text
        await r.emit(10)
        await until(lambda: r.engine.lane_health(endpoint)[0]["breaker"] == "open")
        standing = (await data(customer, at))["standing"]
        page = (await customer.get(at)).text
        assert standing["lane"]["breaker"] in ("open", "half-open")
        assert "Breaker open" in page or "Breaker half-open" in page
        await until(lambda: r.engine.lane_health(endpoint)[0]["probe_in_s"])
        r.sink.set_behaviour("/hook", Behaviour())
        await until(lambda: r.engine.lane_health(endpoint)[0]["breaker"] == "closed", within_s=60)
        assert r.engine.lane_health(endpoint)[0]["probe_in_s"] is None


async def test_endpoints_that_take_turns_for_the_connections_of_their_host_are_shown_as_such(customer: Browser):
    async with rig(customer.web.dsn, sockets_per_origin_max=1, slots=8) as r:
        customer.web.web.lane_health = lambda endpoint_id: r.engine.lane_health(endpoint_id)
        endpoint = await r.endpoint()
        await r.emit()
        await until(lambda: r.by_path()["/hook"] == 1)
        r.sink.set_behaviour("/hook", Behaviour(mode="hang"))
        await r.emit(3)
        await until(lambda: r.engine.lane_health(endpoint)[0]["connecting"])
        page = (await customer.get(f"/endpoints/{endpoint}")).text
        assert "take turns" in page
        assert "wait for a connection" in page


async def test_the_service_joins_panel_and_engine(dsn: str):
    """`run` passes the question through; nothing else of the engine is known to the panel."""
    settings = settings_module.load(web_listen="127.0.0.1:0", allowed_networks="127.0.0.0/8")
    transport = make_transport(settings)
    engine = make_engine(settings, dsn, transport)
    server = make_web(settings, dsn, transport, engine)
    task = asyncio.create_task(server.run())
    await server.ready.wait()
    assert server.web is not None
    assert server.web.lane_health is not None
    assert server.web.lane_health(None) == [], "it owns no database"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await transport.close()
    async with site(dsn) as alone:
        assert alone.web.lane_health is None


async def test_a_minute_keeps_the_backlog_of_its_lane(dsn: str):
    async with rig(dsn, retry_schedule_s=(1,) * 12, breaker_wait_s=1.5, breaker_wait_max_s=1.5) as r:
        endpoint = await r.endpoint(behaviour=Behaviour(status=500))
        await r.emit(200)
        await until(lambda: r.db.fetchval("SELECT backlog > 50 FROM webhook.lane WHERE endpoint_id = $1", endpoint))
        before = (
            r.engine.counters.failed
        )  # the minute may have ended before there was a backlog: of the next one there is an attempt too
        await until(lambda: r.engine.counters.failed > before)
        await r.stop()
        assert (
            await r.db.fetchval("SELECT max(backlog) FROM webhook.endpoint_stat WHERE endpoint_id = $1", endpoint) > 50
        )


async def test_charts_of_latency_and_backlog(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        await db.execute(
            "INSERT INTO webhook.endpoint_stat (endpoint_id, minute, epoch, delivered, failed, dead, duration_ms, durations, backlog) "
            "SELECT $1, date_trunc('minute', now()) - m * interval '1 minute', 1, 10, 0, 0, 9, "
            "array_fill(0, ARRAY[5]) || ARRAY[8, 0, 2] || array_fill(0, ARRAY[12]), 40 * m FROM unnest('{2,3,9}'::integer[]) AS m",
            endpoint,
        )
    page = (await customer.get(f"/endpoints/{endpoint}?span=hour")).text
    assert "p95 of latency between 128 and 128 ms in the last hour" in page
    assert "At most 360 events waited for their first attempt in the last hour" in page
    assert page.count("<polyline") == 6, "two parts each of p95, p50 and what waited"
    points = (await data(customer, f"/endpoints/{endpoint}?span=hour"))["points"]
    assert [point["backlog"] for point in points] == [360, 120, 80]
    series = await customer.web.ask("GET", f"/api/v1/endpoints/{endpoint}/stats", cookie=customer.cookie)
    assert max(point["backlog"] for point in series.json["data"]) == 360


def test_a_line_has_gaps_where_nothing_is_known():
    chart = lines({"a": [None, 1, 2, None, 4], "b": [None] * 5}, width=50, height=21, words="")
    assert [line.parts for line in chart.lines] == [
        ("10.00,15.5 20.00,15.5 20.00,11.0 30.00,11.0", "40.00,2.0 50.00,2.0"), (),
    ]  # fmt: skip
    assert chart.most == 4
    [log] = lines({"a": [1, 16, 256]}, width=3, height=21, words="", log=True).lines
    assert [point.split(",")[1] for point in log.parts[0].split()] == ["20.0", "20.0", "11.0", "11.0", "2.0", "2.0"]
    assert lines({"a": []}, width=1, height=1, words="").most == 0
