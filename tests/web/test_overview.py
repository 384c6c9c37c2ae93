"""The operator's first page: what it tells beside an engine and without one, live, and to whom."""

import asyncio
import json

from dispatcher.main import make_web, vitals
from dispatcher.web.panel import overview as overview_page
from dispatcher.web.panel.overview import GROUPS, UNKNOWN, _rates
from tests.conftest import connected
from tests.rig import Rig, rig, until
from tests.store import people
from tests.web.conftest import Site, site
from tests.web.test_panel import HTML


async def test_an_operator_starts_there_and_nobody_else_sees_it(web: Site):
    key = await web.key()
    answer = await web.ask("GET", "/", key=key, headers=HTML)
    assert (answer.status, answer.headers["Location"]) == (303, "/overview")
    page = await web.ask("GET", "/overview", key=key, headers=HTML)
    assert page.status == 200
    assert 'href="/overview" aria-current="page"' in page.text
    for path in ("/overview", "/overview/live"):
        assert (await web.ask("GET", path, key=await web.key("acct"), headers=HTML)).status == 403
    assert "Overview" not in (await web.ask("GET", "/endpoints", key=await web.key("acct"), headers=HTML)).text


async def test_alone_it_tells_what_the_database_tells_and_what_it_can_not_know(web: Site):
    async with connected(web.dsn) as db:
        for account, backlog in (("small", 1), ("large", 1_000_000)):
            endpoint = await people.endpoint(db, account, name=f"<{account}>")
            await db.execute(
                "INSERT INTO webhook.lane (endpoint_id, settled, backlog) VALUES ($1, 0, $2)", endpoint, backlog
            )
        await db.execute(
            "UPDATE webhook.endpoint SET failing_since = now() - interval '3 hours' WHERE account_id = 'large'"
        )
        await people.retrying(db, endpoint, await people.emit(db, 7, "large"))
        await db.execute(
            "INSERT INTO webhook.endpoint_stat (endpoint_id, minute, epoch, delivered, failed, dead, duration_ms, durations) "
            "SELECT $1, date_trunc('minute', now()) - m * interval '1 minute', 1, 297, 3, 0, 9, array_fill(15, ARRAY[20]) "
            "FROM generate_series(0, 9) AS m",
            endpoint,
        )
    key = await web.key()
    told = (await web.ask("GET", "/overview?format=json", key=key)).json
    assert [row["account_id"] for row in told["backlog_by_account"]] == ["large", "small"]
    assert (told["endpoints"]["live"], told["endpoints"]["failing"], told["vitals"]) == (2, 1, None)
    assert told["first_posts"]["posts"] == 7
    assert told["minutes"]["success_rate"] == 0.99
    page = (await web.ask("GET", "/overview", key=key, headers=HTML)).text
    assert page.count(f">{UNKNOWN}<") == 4
    for said in (
        "Nothing is being delivered",
        "This process does not deliver",
        "&lt;large&gt;",
        "1,000,001",
        "1 of 2 live",
        "99 %",
    ):
        assert said in page, said


async def test_beside_the_engine_it_tells_what_memory_knows(dsn: str):
    async with rig(dsn) as made:
        await made.endpoint(account="acct")
        assert vitals(made.engine)["breakers_open"] == 0
        async with beside(made) as web:
            await made.emit(5)
            await made.settled()
            told = (await web.ask("GET", "/overview?format=json", key=await web.key())).json
            assert told["vitals"]["delivered"] == 5
            assert told["service"]["owner"]["state"] == "alive"
            page = (await web.ask("GET", "/overview", key=await web.key(), headers=HTML)).text
            assert UNKNOWN not in page
            assert "Nothing is being delivered" not in page
        await made.stop()
        assert vitals(made.engine) == {}, "it delivers no more"


def beside(made: Rig):
    """A site that is asked about an engine, as `run` makes it."""
    return site(made.dsn, make=lambda settings, dsn, transport: make_web(settings, dsn, transport, made.engine))


async def test_figures_come_live(web: Site, monkeypatch):
    monkeypatch.setattr(overview_page, "LIVE_EVERY_S", 0.05)
    web.web.overview.for_s = 0.0
    key = await web.key()
    response = await web.http.get(web.url + "/overview/live", headers={"Authorization": f"Bearer {key}"})
    looks = []
    async with asyncio.timeout(30):
        while len(looks) < 3:
            line = await response.content.readline()
            if line.startswith(b"data:"):
                looks.append(json.loads(line.removeprefix(b"data:")))
    response.close()
    names = {name for _, rows in GROUPS for name, _ in rows}
    assert looks[-1]["figures"].keys() == names
    assert looks[-1]["figures"]["events_per_s"] == "0.0/s"
    await until(lambda: web.web.streams.topics == 0, what="the last who watched has left")


def test_a_count_that_begins_anew_is_no_negative_rate():
    points = [(1.0, {"delivered": 100.0, "events": 5.0}), (3.0, {"delivered": 2.0, "events": 9.0})]
    assert _rates(points) == {"delivered": 0.0, "events": 2.0}
    assert _rates(points[:1]) == {}
