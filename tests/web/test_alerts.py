"""Recipients and alerts by panel and API."""

import html
import re

import pytest

from dispatcher.domain.principal import OPERATOR, Principal
from dispatcher.errors import StateError
from dispatcher.store import alerts
from dispatcher.web.panel import alerts as panel_alerts
from tests.conftest import connected
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_panel import Browser

TELL = "SELECT webhook.tell_of_endpoint($1, 'endpoint.failing', 'consecutive_failures', now())"


@pytest.fixture
async def customer(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key("acct")))


@pytest.fixture
async def operator(web: Site) -> Browser:
    return Browser(web, *await web.login(await web.key()))


async def test_a_customer_adds_and_removes_who_is_told(customer: Browser):
    assert "Nobody is told by mail yet" in (await customer.get("/alerts")).text
    await customer.ok("/alerts/recipients", [("address", "ops+hooks@example.com")])
    async with connected(customer.web.dsn) as db:
        endpoint = await people.endpoint(db)
        await db.execute(TELL, endpoint)
    page = (await customer.get("/alerts")).text
    assert "ops+hooks@example.com" in page
    assert f'href="/endpoints/{endpoint}"' in page
    assert "the operator has not set up a mail server" in page
    shown = (await customer.web.ask("GET", "/alerts?format=json", cookie=customer.cookie)).json
    assert [one["type"] for one in shown["told"]] == ["endpoint.failing"]
    [row] = shown["recipients"]
    await customer.ok(f"/alerts/recipients/{row['id']}/remove")
    assert (await customer.web.ask("GET", "/api/v1/alert-recipients", cookie=customer.cookie)).json["data"] == []
    actions = [row["action"] for row in await customer.web.query("SELECT action FROM webhook.audit ORDER BY id")]
    assert actions == ["alert_recipient.add", "alert_recipient.remove"]


@pytest.mark.parametrize(
    "address",
    [
        "nobody", "a@b\r\nBcc: c@d", "a b@c.example", "a@b@c.example", '"a"@b.example', "<a@b.example>", "a@b.example,c@d.example",
        ".a@b.example",
        "é@example.com", "a@" + "b" * 300, '"><script>alert(1)</script>@example.com',
    ],
)  # fmt: skip
async def test_what_is_no_plain_address_is_refused(customer: Browser, address: str):
    answer = await customer.post("/alerts/recipients", [("address", address)])
    assert answer.status == 400
    assert "<script>alert" not in answer.text
    key = await customer.web.key("acct")
    assert (
        await customer.web.ask("POST", "/api/v1/alert-recipients", key=key, json={"address": address})
    ).status == 400
    assert await customer.web.query("SELECT FROM webhook.alert_recipient") == []


async def test_an_address_is_added_once_and_twenty_are_enough(web: Site):
    async with connected(web.dsn) as db:
        who = Principal("test", "acct")
        for n in range(alerts.RECIPIENTS_MAX):
            await alerts.add_recipient(db, who, account_id=None, address=f"a{n}@example.com")
        with pytest.raises(StateError, match="among the recipients already"):
            await alerts.add_recipient(db, who, account_id=None, address="a3@example.com")
        with pytest.raises(StateError, match="which is the most"):
            await alerts.add_recipient(db, who, account_id=None, address="b@example.com")
        await alerts.add_recipient(db, OPERATOR, account_id=None, address="b@example.com")


async def test_operators_are_told_of_every_account_by_mail_and_by_event(operator: Browser, customer: Browser):
    assert (await customer.post("/alerts/operator-account", [("account_id", "acct")])).status == 403
    await operator.ok("/alerts/recipients", [("address", "noc@example.com")])
    await operator.ok("/alerts/operator-account", [("account_id", "platform")])
    assert 'value="platform"' in (await operator.get("/alerts")).text
    async with connected(operator.web.dsn) as db:
        theirs = await people.endpoint(db, "acct", name="Shop")
        ours = await people.endpoint(db, "platform")
        await db.execute(TELL, theirs)
        await db.execute(TELL, ours)
        rows = await db.fetch(
            "SELECT account_id, payload::json ->> 'account_id' AS whose FROM webhook.outbox ORDER BY id"
        )
        assert [tuple(row) for row in rows] == [("acct", None), ("platform", "acct"), ("platform", None)]
        told = await db.fetch("SELECT audience, account_id FROM webhook.alert ORDER BY id")
        assert [tuple(row) for row in told] == [("", "acct"), ("", "platform")]
    assert (await customer.web.ask("GET", "/api/v1/alerts", cookie=customer.cookie)).json["data"] == []
    key = await operator.web.key()
    assert (await operator.web.ask("PUT", "/api/v1/operator-account", key=key, json={"account_id": None})).status == 200
    async with connected(operator.web.dsn) as db:
        await db.execute(TELL, theirs)
        assert await db.fetchval("SELECT count(*) FROM webhook.outbox WHERE account_id = 'platform'") == 2


async def test_names_are_shown_as_text(operator: Browser):
    async with connected(operator.web.dsn) as db:
        endpoint = await people.endpoint(db, "<i>acct</i>", name="<script>x</script>")
        await alerts.add_recipient(db, OPERATOR, account_id=None, address="noc@example.com")
        await db.execute(TELL, endpoint)
    page = (await operator.get("/alerts")).text
    assert "&lt;i&gt;acct&lt;/i&gt;" in page
    assert "<i>acct" not in page


async def test_recipients_are_listed_to_the_last(operator: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panel_alerts, "RECIPIENTS", 2)
    async with connected(operator.web.dsn) as db:
        for n in range(3):
            await alerts.add_recipient(db, OPERATOR, account_id="acct", address=f"a{n}@example.com")
    page = (await operator.get("/alerts?account_id=acct")).text
    assert "a2@example.com" not in page
    [onward] = re.findall(r'href="([^"]*cursor=[0-9]+)">Further recipients', page)
    page = (await operator.get(html.unescape(onward))).text
    assert re.findall(r"a[0-9]@example.com", page)[0] == "a2@example.com"
    assert "a0@example.com" not in page


async def test_an_address_that_is_there_already_is_a_conflict(operator: Browser):
    await operator.ok("/alerts/recipients", [("address", "a@example.com"), ("account_id", "acct")])
    answer = await operator.post("/alerts/recipients", [("address", "a@example.com"), ("account_id", "acct")])
    assert (answer.status, "among the recipients already" in answer.text) == (409, True)


async def test_an_address_that_is_corrected_is_still_of_its_account(operator: Browser):
    """The form came back without the account: the customer would have been told of all."""
    answer = await operator.post("/alerts/recipients", [("address", "nobody"), ("account_id", "acct_42")])
    assert answer.status == 400
    assert re.search(r'id="account_id" name="account_id" value="acct_42"', answer.text)
