"""Recover and dead letters: what failed, counted, sent again and followed; or given up for good."""

import asyncio
import json
import re
from typing import Any

import pytest

from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.store import dead_letters, runs
from tests.conftest import connected
from tests.rig import rig, until
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_deliveries import data
from tests.web.test_panel import Browser


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


@pytest.fixture
async def operator(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key()))


def hidden(page: str, name: str) -> str:
    found = re.search(rf'<input type="hidden" name="{name}" value="([^"]*)"', page)
    assert found is not None, name
    return found[1]


# ── a range once more ──


async def test_a_range_is_counted_first_and_then_it_is_exactly_that(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db, name="Shop")
        ids = await people.emit(db, 5)
        await people.attempted(db, endpoint, ids[:3])
        await people.died(db, endpoint, ids[3:])
    at = f"/recover/endpoints/{endpoint}"
    page = (await customer.get(at)).text
    assert "After the count" in page
    page = (await customer.get(f"{at}?what=failed&since=&until=&type=")).text
    assert "2 deliveries</strong> that failed for good" in page
    async with connected(customer.web.dsn) as db:
        await people.died(db, endpoint, await people.emit(db, 1))  # after the count: not among them
    form = [(name, hidden(page, name)) for name in ("after_id", "upto_id", "type", "what")]
    run = await customer.ok(at, [*form, ("rate_per_s", "5"), ("note", "after the outage")])
    page = (await customer.get(run)).text
    for said in ("Replay", "running", "of <span", "at most 5 a second", "after the outage", "No dispatcher is at work"):
        assert said in page, said
    shown = (await data(customer, run))["run"]
    assert (shown["total"], shown["done"], shown["only_failed"], shown["upto_id"]) == (2, 0, True, ids[-1])
    everything = await data(customer, f"{at}?what=all")
    assert everything["count"]["total"] == 6
    assert [one["id"] for one in everything["runs"]] == [shown["id"]]


async def test_a_run_is_paused_slowed_resumed_and_canceled(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        letters = await people.died(db, endpoint, await people.emit(db, 3))
        chosen = await runs.select(db, endpoint)
        run = await runs.create(db, chosen, 5.0)
    at = f"/recover/runs/{run.id}"
    assert await customer.ok(f"{at}/pause") == at
    assert "Go on" in (await customer.get(at)).text
    assert (await customer.post(f"{at}/pause")).status == 409
    await customer.ok(f"{at}/resume")
    await customer.ok(f"{at}/rate", [("rate_per_s", "0.5")])
    assert "at most 0.5 a second" in (await customer.get(at)).text
    for bad in ("fast", "-1", "nan"):
        assert (await customer.post(f"{at}/rate", [("rate_per_s", bad)])).status == 400, bad
    await customer.ok(f"{at}/rate", [("rate_per_s", "")])
    assert f"at most {customer.web.settings.replay_rate_per_s:g} a second" in (await customer.get(at)).text
    await customer.ok(f"{at}/cancel")
    page = (await customer.get(at)).text
    assert "canceled" in page
    assert "Cancel for good" not in page
    async with connected(customer.web.dsn) as db:
        assert set((await people.states(db)).values()) == {"open"}, "what it took is open again"
        assert len(letters) == 3
    actions = {row["action"] for row in await customer.web.query("SELECT action FROM webhook.audit")}
    assert {"run.pause", "run.resume", "run.rate", "run.cancel"} <= actions


async def test_what_can_not_be_started_says_why(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint, draft = await people.endpoint(db), await people.endpoint(db, state="draft")
        await people.emit(db, 1)
    at = f"/recover/endpoints/{endpoint}"
    assert "no delivery there has failed for good" in (await customer.get(f"{at}?what=failed")).text
    assert "the endpoint&#39;s types did not occur" in (await customer.get(f"{at}?what=all&type=link.*")).text
    assert (await customer.post(at)).status == 400
    form = [("after_id", "0"), ("upto_id", "1"), ("what", "all")]
    answer = await customer.post(at, [*form, ("rate_per_s", "much")])
    assert (answer.status, 'role="alert"' in answer.text) == (400, True)
    assert (await customer.post(at, [*form, ("what", "failed")])).status == 400, "there is nothing"
    for bad in ("what=odd", "what=all&since=then", "what=all&type=No"):
        assert (await customer.get(f"{at}?{bad}")).status == 400, bad
    assert "It is a draft" in (await customer.get(f"/recover/endpoints/{draft}")).text
    assert (await customer.get("/recover/endpoints/999")).status == 404
    assert await customer.web.query("SELECT FROM webhook.run") == []


async def test_the_list_leads_to_an_endpoint_and_to_earlier_runs(customer: Browser, operator: Browser):
    assert "There is no endpoint yet" in (await customer.get("/recover")).text
    async with connected(customer.web.dsn) as db:
        mine, other = await people.endpoint(db, name="<Mine>"), await people.endpoint(db, "other")
        ids, theirs = await people.emit(db, 1), await people.emit(db, 1, "other")
        made = []
        for _ in range(19):
            made.append((await runs.resend(db, str(ids[0]), mine)).id)
            await runs.cancel(db, made[-1])
        hers = (await runs.resend(db, str(theirs[0]), other)).id
        newest = await runs.newest(db, limit=5, before=made[-1], by=Principal("test", "acct"))
        assert [run.id for run in newest] == made[-6:-1][::-1]
    answer = await customer.get(f"/recover?go_to={mine}")
    assert (answer.status, answer.headers["Location"]) == (303, f"/recover/endpoints/{mine}")
    page = (await customer.get("/recover")).text
    assert "&lt;Mine&gt;" in page
    assert f"/recover/runs/{hers}" not in page
    assert [run["id"] for run in (await data(customer, "/recover"))["data"]] == made[::-1]
    assert [run["id"] for run in (await data(customer, f"/recover?cursor={made[3]}"))["data"]] == made[:3][::-1]
    assert [run["id"] for run in (await data(operator, "/recover"))["data"]] == [hers, *made[::-1]]
    assert [run["id"] for run in (await data(operator, f"/recover?endpoint_id={other}"))["data"]] == [hers]
    assert (await customer.get(f"/recover?endpoint_id={other}")).status == 404


async def test_a_run_is_followed_live_to_its_end(customer: Browser):
    async with rig(customer.web.dsn) as r:
        endpoint = await r.endpoint()
        await r.emit(3)
        await r.settled()
        chosen = await runs.select(r.db, endpoint, only_failed=False)
        run = await runs.create(r.db, chosen, 20.0)
        response = await customer.web.http.get(
            f"{customer.web.url}/recover/runs/{run.id}/live", headers={"Cookie": customer.cookie}
        )
        told: list[Any] = []
        async with asyncio.timeout(30):
            while not told or told[-1]["is_open"]:
                line = await response.content.readline()
                if line.startswith(b"data:"):
                    told.append(json.loads(line.removeprefix(b"data:")))
        response.close()
        await until(lambda: len(r.received) == 6)
    assert (told[-1]["state"], told[-1]["done"], told[-1]["delivered"]) == ("finished", 3, 3)


# ── dead letters ──


async def test_dead_letters_are_listed_and_sent_again(customer: Browser):
    assert "No dead letters" in (await customer.get("/dead-letters")).text
    async with connected(customer.web.dsn) as db:
        first, second = await people.endpoint(db), await people.endpoint(db)
        letters = await people.died(db, first, await people.emit(db, 3), reason="it is <down>")
        letters += await people.died(db, second, await people.emit(db, 1, type="link.clicked"))
    page = (await customer.get("/dead-letters")).text
    assert "it is &lt;down&gt;" in page
    assert [row["id"] for row in (await data(customer, "/dead-letters"))["data"]] == letters[::-1]
    assert [row["id"] for row in (await data(customer, f"/dead-letters?endpoint_id={second}"))["data"]] == letters[3:]
    assert [row["id"] for row in (await data(customer, "/dead-letters?type=link.*"))["data"]] == letters[3:]
    run = await customer.ok("/dead-letters/resend", [("id", str(letters[0])), ("id", str(letters[1]))])
    assert (await data(customer, run))["run"]["total"] == 2
    assert [row["id"] for row in (await data(customer, "/dead-letters?state=resent"))["data"]] == letters[:2][::-1]
    assert len((await data(customer, "/dead-letters?state=all"))["data"]) == 4
    assert (await customer.post("/dead-letters/resend", [("id", str(letters[0]))])).status == 409, "not open any more"
    assert (await customer.post("/dead-letters/resend")).status == 400, "none is ticked"
    assert await customer.ok(f"/dead-letters/{letters[2]}/resend") == f"/recover/runs/{int(run.rpartition('/')[2]) + 1}"


async def test_to_whom_nothing_could_be_sent_is_said(customer: Browser):
    async with connected(customer.web.dsn) as db:
        first, gone = await people.endpoint(db, url="https://first.test/"), await people.endpoint(db)
        letters = [(await people.died(db, one, await people.emit(db)))[0] for one in (first, gone)]
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
    chosen = [("id", str(one)) for one in letters]
    page = await customer.post("/dead-letters/resend", chosen)
    assert page.status == 200
    for said in ("1 event to https://first.test/", f"1 dead letter: endpoint {gone} was deleted."):
        assert said in page.text, said
    refused = await customer.post("/dead-letters/resend", chosen[1:])
    assert (refused.status, "can be sent" in refused.text) == (409, True)


async def test_dead_letters_are_discarded_for_good_by_who_is_sure(customer: Browser):
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        letters = await people.died(db, endpoint, await people.emit(db, 2))
    at = f"/dead-letters/{letters[0]}"
    assert "&#34;secret&#34;" in (await customer.get(at)).text
    assert (await customer.post(f"{at}/discard")).status == 400
    assert await customer.ok(f"{at}/discard", [("sure", "1")]) == "/dead-letters"
    page = (await customer.get(at)).text
    assert "given up with the letter" in page
    assert "&#34;secret&#34;" not in page
    async with connected(customer.web.dsn) as db:
        assert await people.states(db) == {letters[0]: "discarded", letters[1]: "open"}


async def test_all_that_fit_are_what_was_counted(customer: Browser):
    async with connected(customer.web.dsn) as db:
        first, gone = await people.endpoint(db), await people.endpoint(db)
        await people.died(db, first, await people.emit(db, 3))
        await people.died(db, gone, await people.emit(db, 2))
        await db.execute("UPDATE webhook.endpoint SET state = 'deleted' WHERE id = $1", gone)
    page = (await customer.get("/dead-letters/all?type=message.*")).text
    for said in ("<strong>5 dead letters</strong>", "of which 3 can be sent", "no, it was deleted", "Send 3 again"):
        assert said in page, said
    async with connected(customer.web.dsn) as db:
        [late] = await people.died(db, first, await people.emit(db, 1))
    form = [("all", "1"), ("type", "message.*"), ("upto_id", hidden(page, "upto_id")), ("endpoint_id", "")]
    sent = await customer.post("/dead-letters/resend", [*form, ("rate_per_s", "7")])
    assert f"2 dead letters: endpoint {gone} was deleted." in sent.text
    [run] = re.findall(r'href="(/recover/runs/[0-9]+)"', sent.text)
    shown = (await data(customer, run))["run"]
    assert (shown["total"], shown["rate_per_s"]) == (3, 7)
    await customer.ok("/dead-letters/discard", [*form, ("sure", "1")])
    async with connected(customer.web.dsn) as db:
        states = await people.states(db)
    assert sorted(states.values()) == ["discarded", "discarded", "open", "resent", "resent", "resent"]
    assert states[late] == "open", "it was given up after the count"
    refused = await customer.post("/dead-letters/resend", [("all", "1"), ("endpoint_id", str(gone))])
    assert (refused.status, "no open dead letter fits" in refused.text.lower()) == (400, True)
    assert "There are none" in (await customer.get("/dead-letters/all?type=link.*")).text


async def test_a_walk_over_dead_letters_ends_at_its_bound(web: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dead_letters, "LOOKED_AT", 4)
    async with connected(web.dsn) as db:
        endpoint = await people.endpoint(db)
        wanted = await people.died(db, endpoint, await people.emit(db, 1, type="link.clicked"))
        await people.died(db, endpoint, await people.emit(db, 10))
        for which in ({}, {"endpoint_id": endpoint}, {"endpoint_id": endpoint, "state": None}):
            found: list[int] = []
            before, pages = (1 << 63) - 1, 0
            while True:
                page = await dead_letters.newest(db, patterns=("link.*",), before=before, by=OPERATOR, **which)
                assert page.searched.events <= 4
                found += [row["id"] for row in page.rows]
                pages += 1
                if page.next is None:
                    break
                before = int(page.next)
            assert (found, pages) == (wanted, 3), which
        one_by_one = await dead_letters.newest(db, limit=1)
        assert (len(one_by_one.rows), one_by_one.searched.events, one_by_one.searched.complete) == (1, 1, False)
