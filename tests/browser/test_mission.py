"""The mission, by hand in a browser: create an endpoint, test it, save it, go live; see it fail, mend it, and send again. What is sent
again is sent from the pages, as a person would."""

import re

from playwright.async_api import Page, expect

from dispatcher.sink import Behaviour
from tests.browser.chromium import WAIT_MS
from tests.browser.conftest import Product, Windows, enter, enter_as_operator
from tests.rig import Rig, until
from tests.web.conftest import Site

expect.set_options(timeout=WAIT_MS)


async def test_create_test_go_live_fail_and_recover(windows: Windows, window: Page, product: Product):
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
    await rig.emit(type="message.delivered")
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


async def test_a_live_list_shows_each_delivery_once(window: Page, product: Product):
    """The stream begins with what happened while the page was on its way: what the page has already isn't shown again."""
    endpoint = await product.rig.endpoint("/shop")
    await product.rig.emit(3)
    await product.rig.settled()
    await enter(window, product.web)
    await window.goto(f"{product.web.url}/endpoints/{endpoint}")
    await expect(window.locator("#attempts tr")).to_have_count(3)
    await expect(window.locator("#live")).to_contain_text("Live")
    await product.rig.emit(1)
    await expect(window.locator("#attempts tr")).to_have_count(4)  # after the stream's beginning
    await expect(window.locator("#attempts tr").first).to_contain_text("delivered")


async def test_what_was_given_up_is_sent_again(window: Page, product: Product):
    page, rig = window, product.rig
    endpoint = await rig.endpoint("/shop", name="Shop", retry_schedule_s=[1], behaviour=Behaviour(status=500))
    await until(lambda: rig.has_taken_up(endpoint), within_s=60)
    await rig.emit(4, type="message.delivered")
    await until(lambda: given_up(rig, 4), within_s=60, what="each was tried twice")
    rig.sink.set_behaviour("/shop", Behaviour())
    failed = {event.webhook_id for event in rig.received}
    await enter(page, product.web)

    # One of them: found among the deliveries, sent again, and its page tells by itself how that went.
    await page.get_by_role("link", name="Deliveries").click()
    await page.get_by_label("Endpoint").select_option(label=f"Shop ({endpoint})")
    await page.get_by_label("State").select_option(label="given up")
    await page.get_by_role("button", name="Show").click()
    found = page.get_by_role("region", name="Deliveries").get_by_role("link", name="message.delivered to Shop")
    await expect(found).to_have_count(4)
    await found.last.click()
    await expect(page.locator("#fate")).to_contain_text("dead letter")
    await expect(page.locator("#rows tr")).to_have_count(2)
    await expect(page.get_by_text("Sent as")).to_be_hidden()
    await page.get_by_role("button", name="Send it again").click()
    await expect(page.locator("#fate")).to_contain_text("delivered by resend")
    await expect(page.locator("#rows tr").first).to_contain_text("1 of the resend")
    await expect(page.locator("#rows tr").first).to_contain_text("delivered, answered 204")
    await expect(page.locator("#sent-as li").last).to_contain_text(re.compile(r"resend \(run \d+\): delivered"))

    # The others: a range is chosen and counted, started, and followed to its end.
    await page.get_by_role("link", name="Recover", exact=True).click()
    await page.get_by_label("Endpoint").select_option(label=f"Shop ({endpoint})")
    await page.get_by_role("button", name="Choose a range").click()
    await expect(page.get_by_label("Only what failed for good")).to_be_checked()
    await page.get_by_role("button", name="Count").click()
    await expect(page.get_by_text("3 deliveries that failed for good")).to_be_visible()
    await page.get_by_label("Note (may stay empty)").fill("the shop was down")
    await page.get_by_role("button", name="Send them again").click()
    await expect(page.get_by_text("the shop was down")).to_be_visible()
    await expect(page.locator("#state")).to_have_text("finished")
    await expect(page.locator("#done")).to_have_text("3")
    await expect(page.locator("#delivered")).to_have_text("3")
    await expect(page.get_by_role("button", name="Pause")).to_have_count(0)

    # All are done, under the ids that they had.
    await page.get_by_role("link", name="Deliveries of this endpoint").click()
    states = page.get_by_role("region", name="Deliveries").locator('td[data-label="State"]')
    await expect(states).to_have_text(["delivered"] * 4)
    await page.get_by_role("link", name="Dead letters").click()
    await expect(page.get_by_role("heading", name="No dead letters")).to_be_visible()
    again = [event.webhook_id for event in rig.received if event.status == 204]
    assert len(again) == 4
    assert set(again) == failed


async def test_the_scripts_count_as_the_pages_do(window: Page, web: Site):
    await enter(window, web)
    said = await window.evaluate(
        "() => [amount(1, 'event'), amount(2, 'event'), amount(1, 'delivery waits', 'deliveries wait'), amount(1200, 'delivery', 'deliveries')]"
    )
    assert said == ["1 event", "2 events", "1 delivery waits", "1,200 deliveries"]


def row(page: Page, event_type: str, outcome: str):
    """The newest row of the live list that says so."""
    said = page.locator("#attempts tr").filter(has_text=event_type).filter(has_text=re.compile(outcome))
    return said.first


async def stands_well(web, endpoint: int) -> bool:
    answer = await web.ask("GET", f"/api/v1/endpoints/{endpoint}", key=await web.key("acct"))
    return answer.json["failing_since"] is None


async def given_up(rig: Rig, count: int) -> bool:
    return await rig.db.fetchval("SELECT count(*) FROM webhook.dead_letter") == count
