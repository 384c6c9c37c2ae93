"""The catalogue's pages: what an event type says, and its sample on its way to an endpoint."""

from dispatcher.sink import Behaviour
from dispatcher.store import event_types
from dispatcher.store.event_types import EventType
from dispatcher.web.panel.fields import DEPTH_MAX, FIELDS_MAX, fields
from tests.conftest import connected
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_panel import HTML, Browser, Sink, customer, sink

__all__ = ["customer", "sink"]  # fixtures


async def test_every_type_has_its_page(web: Site):
    key = await web.key("acct")
    page = await web.ask("GET", "/catalogue", key=key, headers=HTML)
    for one in event_types.default_catalogue():
        assert f'href="/catalogue/{one.name}"' in page.text
        shown = await web.ask("GET", f"/catalogue/{one.name}", key=key, headers=HTML)
        assert shown.status == 200
        for said in (one.title, "Send this to my endpoint", "JSON Schema", *one.filter_fields):
            assert said in shown.text, f"{one.name}: {said}"
    assert "event-type import" not in page.text, "a customer can't"
    assert "event-type import" in (await web.ask("GET", "/catalogue", key=await web.key(), headers=HTML)).text
    as_json = (await web.ask("GET", "/catalogue/message.sent?format=json", key=key)).json
    assert as_json["type"]["sample"]["message"]["to"].startswith("+")
    assert (await web.ask("GET", "/catalogue/no.such", key=key, headers=HTML)).status == 404


async def test_a_type_without_anything_says_so(web: Site):
    async with connected(web.dsn) as db:
        await db.execute("DELETE FROM webhook.event_type")
        assert (
            "No event types are described yet"
            in (await web.ask("GET", "/catalogue", key=await web.key("a"), headers=HTML)).text
        )
        await event_types.put(db, EventType("a.b", "<A>", "", True, None, None, {}))
    page = (await web.ask("GET", "/catalogue/a.b", key=await web.key("a"), headers=HTML)).text
    for said in ("&lt;A&gt;", "Nobody has said yet", "no sample to send", "No JSON Schema is given"):
        assert said in page, said


async def test_the_list_goes_by_pages(web: Site):
    async with connected(web.dsn) as db:
        await db.execute(
            "INSERT INTO webhook.event_type (name, title, description, default_on, filter_fields) "
            "SELECT 'z.t' || n, 't', '', true, '{}' FROM generate_series(100, 220) AS n"
        )
    key = await web.key("a")
    names, cursor = [], ""
    while cursor is not None:
        answer = (await web.ask("GET", f"/catalogue?format=json&cursor={cursor}", key=key)).json
        names += [one["name"] for one in answer["data"]]
        cursor = answer["next"]
    assert len(names) == len(set(names)) == 141


async def test_a_sample_is_sent_to_a_chosen_endpoint(customer: Browser, sink: Sink):
    assert "There is no endpoint yet" in (await customer.get("/catalogue/message.sent")).text
    setup = await customer.ok("/endpoints/new", [("url", f"{sink.url}/hook"), ("name", "Shop"), ("all_types", "1")])
    endpoint = setup.split("/")[2]
    assert f'<option value="{endpoint}">Shop (draft)' in (await customer.get("/catalogue/link.clicked")).text
    sink.set_behaviour("/hook", Behaviour(status=500))
    answer = await customer.post("/catalogue/link.clicked/send", [("endpoint_id", endpoint)])
    assert (answer.status, answer.headers["Location"]) == (303, f"/endpoints/{endpoint}/setup?type=link.clicked#test")
    page = (await customer.get(f"{setup}?type=link.clicked")).text
    assert "Last test" in page
    assert "<code>link.clicked</code></h3>" in page
    for bad in ("", "one", "²"):
        assert (await customer.post("/catalogue/link.clicked/send", [("endpoint_id", bad)])).status == 400
    assert (await customer.post("/catalogue/link.clicked/send", [("endpoint_id", "999")])).status == 404
    assert (await customer.post("/catalogue/no.such/send", [("endpoint_id", endpoint)])).status == 400


async def test_who_has_many_endpoints_gives_the_number(customer: Browser):
    async with connected(customer.web.dsn) as db:
        for _ in range(51):
            await people.endpoint(db)
    assert 'placeholder="its number"' in (await customer.get("/catalogue/message.sent")).text


def test_a_schema_becomes_fields():
    schema = {
        "type": "object", "required": ["links"],
        "properties": {
            "links": {"type": "array", "items": {"$ref": "#/$defs/link"}},
            "status": {"type": ["string", "null"], "enum": ["a", None], "description": "How it is", "maxLength": 3},
        },
        "$defs": {"link": {"type": "object", "properties": {"url": {"type": "string", "format": "uri"}}}},
    }  # fmt: skip
    assert [(one.path, one.kind, one.words, one.required) for one in fields(schema)] == [
        ("links", "array", "", True), ("links[].url", "string", "uri", False),
        ("status", "string or null", "How it is; one of a, None; at most 3 characters", False),
    ]  # fmt: skip


def test_a_schema_in_circles_ends():
    itself = {
        "properties": {"child": {"$ref": "#"}, "x": {"$ref": "#/$defs/loop"}},
        "$defs": {"loop": {"$ref": "#/$defs/loop"}},
    }
    assert len(fields(itself)) == 2 * DEPTH_MAX
    assert len(fields({"properties": {f"f{n}": {} for n in range(FIELDS_MAX + 9)}})) == FIELDS_MAX
    for odd in (True, None, {"properties": []}, {"properties": {"a": 1}, "required": 3}, {"$ref": "elsewhere"}):
        assert len(fields(odd)) <= 1
