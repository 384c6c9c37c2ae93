"""`key` and `event-type` as people and scripts use them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.conftest import dsn_of
from tests.test_cli import Cli, sql

_numbers = itertools.count(1)


@pytest.fixture
def run(server) -> Iterator[Cli]:
    name = f"cli_access_{next(_numbers)}"
    sql(server.dsn, f"CREATE DATABASE {name}")
    made = Cli(dsn_of(server.dsn, name))
    assert "default catalogue, 20 event types" in made.ok("migrate")
    yield made
    sql(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


def test_keys(run: Cli) -> None:
    assert "There are no keys" in run.ok("key", "list")
    made = run.json("key", "create", "--name", "deploy", "--ttl", "2d")
    assert made["key"].startswith(made["prefix"])
    run.ok("key", "create", "--account", "acct")
    assert [(one["id"], one["account_id"]) for one in run.json("key", "list")] == [(1, None), (2, "acct")]
    assert made["key"] not in run.ok("key", "list")
    assert "is revoked" in run.ok("key", "revoke", "1")
    assert [one["id"] for one in run.json("key", "list")] == [2]
    assert [one["id"] for one in run.json("key", "list", "--all")] == [1, 2]
    assert "there is no key 9" in run.refused("key", "revoke", "9")


def test_a_login_link(run: Cli) -> None:
    assert "/enter/" in run.ok("key", "link")
    assert run.json("key", "link", "--account", "acct")["account_id"] == "acct"


def test_the_catalogue_goes_out_and_in(run: Cli, tmp_path: Path) -> None:
    catalogue = run.json("event-type", "list")
    assert len(catalogue) == 20
    catalogue = [one | {"title": one["title"] + "!"} for one in catalogue[:2]]
    catalogue.append({"name": "order.sold", "title": "Sold"})
    path = tmp_path / "catalogue.json"
    path.write_bytes(orjson.dumps(catalogue))
    assert "3 event types" in run.ok("event-type", "import", str(path))
    assert len(run.json("event-type", "list")) == 21
    run.ok("event-type", "import", str(path), "--only")
    assert [one["title"] for one in run.json("event-type", "list")] == [one["title"] for one in catalogue]


@pytest.mark.parametrize(
    ("catalogue", "words"),
    [
        ("{", "not JSON"),
        ("{}", "array"),
        ("[5]", "number 0"),
        ('[{"name": "A", "title": "a"}]', "not an event type"),
        ('[{"name": "a.b"}]', "a name and a title"),
        ('[{"name": "a.b", "title": "a", "color": 1}]', "'color'"),
        ('[{"name": "a.b", "title": "a"}, {"name": "a.b", "title": "b"}]', "twice"),
        ('[{"name": "a.b", "title": "a", "filter_fields": {"from": "/a"}}]', "JSON pointers"),
        ('[{"name": "a.b", "title": "a", "json_schema": 5}]', "JSON Schema"),
    ],
)
def test_a_bad_catalogue_changes_nothing(run: Cli, tmp_path: Path, catalogue: str, words: str) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(catalogue)
    assert words in run.refused("event-type", "import", str(path))
    assert len(run.json("event-type", "list")) == 20
