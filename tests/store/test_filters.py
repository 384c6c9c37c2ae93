"""Filters in the database: names become places by the catalogue, a rule says the same in SQL as in Python, and an edit holds from one id on."""

import asyncio

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dispatcher.demo.events import CATALOGUE, sample
from dispatcher.domain.filters import Rule
from dispatcher.store.embedded import EmbeddedServer
from tests.conftest import connected, dsn_of
from tests.rig import until
from tests.store.people import emit, endpoint

PLACES = {"colour": ["/a/colour", "/a~1b/c~0d/1"], "size": ["/size"]}


@pytest.fixture
async def catalogue(db: asyncpg.Connection) -> asyncpg.Connection:
    await db.execute(
        "INSERT INTO webhook.event_type (name, title, filter_fields) VALUES ('a.b', 'A', $1), ('c.d', 'C', '{}')",
        orjson.dumps(PLACES).decode(),
    )
    return db


async def rule_of(db: asyncpg.Connection, filters: dict[str, list[str]]) -> str | None:
    return await db.fetchval("SELECT webhook.filter_rule($1::text::jsonb)::text", orjson.dumps(filters).decode())


async def test_names_become_places(catalogue: asyncpg.Connection) -> None:
    rule = orjson.loads(await rule_of(catalogue, {"colour": ["red"]}))
    places = {"colour": [["a", "colour"], ["a/b", "c~d", "1"]]}
    assert rule == {"values": {"colour": ["red"]}, "fields": {"a.b": places}}
    assert await rule_of(catalogue, {}) is None


texts = st.sampled_from(["red", "blue", "", "7", "true", "é", "null", "7.0"])
leaves = (
    texts | st.integers(-(2**63), 2**63) | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
)
inner = (
    leaves
    | st.lists(leaves, max_size=3)
    | st.dictionaries(st.sampled_from(["colour", "c~d", "1"]), leaves | st.lists(leaves))
)
payloads = st.dictionaries(st.sampled_from(["a", "a/b", "size"]), inner) | inner


@given(
    data=payloads,
    colours=st.lists(texts, min_size=1),
    sizes=st.lists(texts),
    event_type=st.sampled_from(["a.b", "a.b", "c.d"]),
)
@example(data={"a": {"colour": 10**17}}, colours=["100000000000000000"], sizes=[], event_type="a.b")
@example(data={"a": {"colour": 7}}, colours=["7"], sizes=[], event_type="a.b")
@example(data={"a": {"colour": True}}, colours=["true"], sizes=[], event_type="a.b")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_sql_says_what_python_says(catalogue, data, colours, sizes, event_type) -> None:
    rule = await rule_of(catalogue, {"colour": colours} | ({"size": sizes} if sizes else {}))
    payload = orjson.dumps(data)
    said = await catalogue.fetchval(
        "SELECT webhook.passes($1::text::jsonb, $2, $3::text::json)", rule, event_type, payload.decode()
    )
    assert said is Rule.from_json(rule).passes(event_type, payload)


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        ('{"a": {"colour": "red"}, "x": "\\u0000"}', True),  # JSON, and no text for PostgreSQL
        ('{"a": {"colour": "red"}, "x": "\\\\u0000"}', True),
        ('{"a": {"colour": "red\\u0000"}}', False),
        ('{"a": {"colour": "red"}, "x": "\\ud800"}', False),  # what orjson doesn't read
        ('{"a": {"colour": "\\u0072ed"}}', True),
        ('{"a": {"colour": "blue", "colour": "red"}}', True),  # the last one counts
        ('{"a": {"colour": "red", "colour": "blue"}}', False),
        ('{"a/b": {"c~d": ["blue", "red"]}}', True),
        ('{"a/b": {"c~d": ["red", "blue"]}}', False),
    ],
)  # fmt: skip
async def test_both_on_payloads_that_are_hard_to_read(catalogue, payload: str, wanted: bool) -> None:
    rule = await rule_of(catalogue, {"colour": ["red"]})
    assert Rule.from_json(rule).passes("a.b", payload.encode()) is wanted
    assert (
        await catalogue.fetchval("SELECT webhook.passes($1::text::jsonb, 'a.b', $2::text::json)", rule, payload)
        is wanted
    )


async def test_no_rule_passes_everything_and_own_events_pass_every_rule(catalogue: asyncpg.Connection) -> None:
    assert await catalogue.fetchval("SELECT webhook.passes(NULL, 'a.b', '{}')")
    rule = await rule_of(catalogue, {"colour": ["red"]})
    assert await catalogue.fetchval("SELECT webhook.passes($1::text::jsonb, 'endpoint.disabled', '{}')", rule)


# ── subscriptions ──


async def subscriptions(db: asyncpg.Connection, endpoint_id: int) -> list[tuple[int, int | None, object]]:
    rows = await db.fetch(
        "SELECT since_id, until_id, rule FROM webhook.subscription WHERE endpoint_id = $1 ORDER BY id", endpoint_id
    )
    return [
        (r["since_id"], r["until_id"], None if r["rule"] is None else orjson.loads(r["rule"])["fields"]) for r in rows
    ]


async def test_a_change_of_the_catalogue_holds_from_the_next_id_on(catalogue: asyncpg.Connection) -> None:
    db = catalogue
    plain = await endpoint(db)
    filtered = await endpoint(db)
    await db.execute("""UPDATE webhook.endpoint SET filters = '{"size": ["9"]}' WHERE id = $1""", filtered)
    await db.execute("DELETE FROM webhook.subscription WHERE endpoint_id = $1", filtered)
    await db.execute("INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, '*', 0)", filtered)
    await emit(db, 3)
    before, plain_before = {"a.b": {"size": [["size"]]}}, await subscriptions(db, plain)
    await db.execute(
        """UPDATE webhook.event_type SET filter_fields = filter_fields || '{"colour": ["/b"]}' WHERE name = 'a.b'"""
    )
    assert await subscriptions(db, filtered) == [(0, None, before)], "another name's place is nothing to it"
    await db.execute("""UPDATE webhook.event_type SET filter_fields = '{"size": ["/b/size"]}' WHERE name = 'c.d'""")
    after = before | {"c.d": {"size": [["b", "size"]]}}
    assert await subscriptions(db, filtered) == [(0, 3, before), (3, None, after)]
    await db.execute("DELETE FROM webhook.event_type WHERE name = 'a.b'")
    assert (await subscriptions(db, filtered))[-1] == (3, None, {"c.d": {"size": [["b", "size"]]}})
    assert await subscriptions(db, plain) == plain_before


async def test_a_subscription_and_a_change_of_the_catalogue_at_once_agree(
    catalogue: asyncpg.Connection, dsn: str
) -> None:
    """Whichever is first: an endpoint that subscribes while the catalogue changes has the rule of the new one."""
    db = catalogue
    wanted = orjson.dumps({"size": ["9"]}).decode()
    for name, is_subscription_first in (("/one", True), ("/two", False)):
        made = await endpoint(db, filters=wanted)
        await db.execute("DELETE FROM webhook.subscription WHERE endpoint_id = $1", made)
        subscribe = ("INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) VALUES ($1, '*', 0)", made)
        change = (
            "UPDATE webhook.event_type SET filter_fields = $1 WHERE name = 'a.b'",
            orjson.dumps({"size": [name]}).decode(),
        )
        first, second = (subscribe, change) if is_subscription_first else (change, subscribe)
        async with connected(dsn) as other:
            async with db.transaction():
                await db.execute(*first)
                waiting = asyncio.create_task(other.execute(*second))
                await until(lambda: db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))
            await waiting
        rule = await db.fetchval(
            "SELECT rule FROM webhook.subscription WHERE endpoint_id = $1 AND until_id IS NULL", made
        )
        assert orjson.loads(rule)["fields"] == {"a.b": {"size": [[name[1:]]]}}, name


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE webhook.event_type SET filter_fields = '[]'", """UPDATE webhook.event_type SET filter_fields = '{"a": "/x"}'""",
        """UPDATE webhook.event_type SET filter_fields = '{"a": [1]}'""", """UPDATE webhook.event_type SET filter_fields = '{"a": ["x"]}'""",
        """INSERT INTO webhook.endpoint (account_id, url, filters) VALUES ('a', 'https://a.example', '{"a": []}')""",
        """INSERT INTO webhook.endpoint (account_id, url, filters) VALUES ('a', 'https://a.example', '{"a": [1]}')""",
        """INSERT INTO webhook.endpoint (account_id, url, filters) VALUES ('a', 'https://a.example', '{"a": "b"}')""",
    ],
)  # fmt: skip
async def test_what_has_not_the_form_is_refused(catalogue: asyncpg.Connection, statement: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await catalogue.execute(statement)


# ── the default catalogue ──


async def test_the_default_catalogue_is_installed_and_finds_its_fields_in_the_samples(
    template: str, server: EmbeddedServer
) -> None:
    async with connected(server.dsn) as root:
        await root.execute(f"CREATE DATABASE catalogue_is_installed TEMPLATE {template}")
    async with connected(dsn_of(server.dsn, "catalogue_is_installed")) as db:
        rows = {row["name"]: row for row in await db.fetch("SELECT * FROM webhook.event_type")}
        assert {(t.name, t.title, t.description, t.default_on) for t in CATALOGUE} == {
            (row["name"], row["title"], row["description"], row["default_on"]) for row in rows.values()
        }
        names = set()
        for name, row in rows.items():
            for field, pointers in orjson.loads(row["filter_fields"]).items():
                names.add(field)
                for pointer in pointers:
                    found = sample(name)
                    for step in pointer[1:].split("/"):
                        assert step in found, f"{name}: {pointer}"
                        found = found[step]
        assert names == {"from", "to", "status", "reference", "campaign_id", "keyword"}
