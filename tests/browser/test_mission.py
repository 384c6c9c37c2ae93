"""The mission, by hand in a browser: create an endpoint, test it, save it, go live; see it fail, mend it, and send again."""

import re

from playwright.async_api import Page, expect

from dispatcher.sink import Behaviour
from tests.browser.chromium import WAIT_MS
from tests.browser.conftest import Product, Windows, enter, enter_as_operator
from tests.rig import until

expect.set_options(timeout=WAIT_MS)


async def test_create_test_go_live_fail_recover_and_send_again(windows: Windows, window: Page, product: Product):
    page, rig, web = window, product.rig, product.web
    await enter(page, web)
    await page.get_by_role("link", name="Add your first endpoint").click()
    await page.get_by_label("URL that gets the POSTs").fill(f"{rig.sink.url}/shop")
    await page.get_by_label("Name, for you").fill("Shop")
    await page.get_by_role("button", name="Save as a draft, then test").click()

    # A test that fails says why, and going live stays shut.
    rig.sink.set_behaviour("/shop", Behaviour(status=302))
    go_live = page.get_by_role("button", name="Save and go live")
    await expect(go_live).to_be_disabled()
    await page.get_by_role("button", name="Send the test").click()
    await expect(page.get_by_text("redirects are not followed; give the final address")).to_be_visible()
    await expect(go_live).to_be_disabled()

    # Mended it passes, and opens.
    rig.sink.set_behaviour("/shop", Behaviour(status=200, body=b"thanks"))
    await page.get_by_role("button", name="Send the test").click()
    await expect(page.get_by_text("Passed.", exact=True)).to_be_visible()
    await expect(page.get_by_text("thanks", exact=True)).to_be_visible()
    await go_live.click()
    await expect(page.locator("h1 .state")).to_have_text("live")
    endpoint = int(page.url.rpartition("/")[2])
    await until(lambda: rig.has_taken_up(endpoint), within_s=60)

    # What is committed by SQL shows up by itself.
    await expect(page.locator("#live")).to_contain_text("Live")
    [delivered] = await rig.emit(type="message.delivered")
    await expect(row(page, "message.delivered", "delivered")).to_be_visible()

    # The receiver breaks: each attempt is told of, the endpoint is marked, its breaker opens.
    operator = await windows.open()
    await enter_as_operator(operator, web)
    breakers = operator.locator('[data-figure="breakers"]')
    await expect(breakers).to_have_text("0")
    rig.sink.set_behaviour("/shop", Behaviour(status=500))
    await rig.emit(5, type="message.failed")
    await expect(row(page, "message.failed", "failed 500")).to_be_visible()
    await expect(breakers).to_have_text("1")
    await expect(operator.get_by_role("region", name="Failing longest").get_by_text("Shop")).to_be_visible()
    await page.reload()
    await expect(page.locator("h1 .state")).to_have_text("failing")
    await expect(page.get_by_text("No POST has succeeded since")).to_be_visible()

    # It recovers: what waited is delivered, and nothing is marked any more.
    await expect(page.locator("#live")).to_contain_text("Live")
    rig.sink.set_behaviour("/shop", Behaviour())
    await expect(row(page, "message.failed", "delivered")).to_be_visible()
    await expect(breakers).to_have_text("0")
    await rig.settled(within_s=60)
    await until(lambda: stands_well(web, endpoint), within_s=60)
    await page.reload()
    await expect(page.locator("h1 .state")).to_have_text("live")

    # Sent again, one and then all, under the ids that they had.
    key = await web.key("acct")
    before = [event.webhook_id for event in rig.received if event.path == "/shop" and event.status in (200, 204)]
    resent = await web.ask("POST", f"/api/v1/events/{delivered}/deliveries/{endpoint}/resend", key=key)
    assert resent.status == 201, resent.text
    counted = (await web.ask("GET", f"/api/v1/endpoints/{endpoint}/replays/count?only_failed=false", key=key)).json
    assert counted["total"] == 6
    bounds = {name: counted[name] for name in ("after_id", "upto_id")}
    replayed = await web.ask(
        "POST", f"/api/v1/endpoints/{endpoint}/replays", key=key, json=bounds | {"only_failed": False}
    )
    assert replayed.status == 201, replayed.text
    await until(lambda: len(again(rig, before)) == 7, within_s=60, what="one resent, six replayed")
    assert set(again(rig, before)) <= set(before)


def row(page: Page, event_type: str, outcome: str):
    """The newest row of the live list that says so."""
    said = page.locator("#attempts tr").filter(has_text=event_type).filter(has_text=re.compile(outcome))
    return said.first


async def stands_well(web, endpoint: int) -> bool:
    answer = await web.ask("GET", f"/api/v1/endpoints/{endpoint}", key=await web.key("acct"))
    return answer.json["failing_since"] is None


def again(rig, before: list[str | None]) -> list[str | None]:
    got = [event.webhook_id for event in rig.received if event.path == "/shop" and event.status in (200, 204)]
    return got[len(before) :]
