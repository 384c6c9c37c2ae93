"""The rooms of the house (DESIGN §12) and the doors between them, read from the imports; and the linters, so that `make test` holds them.

    errors → domain → settings, ports → {store, transport, engine} → demo, laptop, mail, web → observe → cli → main

A room imports what stands before it. The three in braces don't know each other: the engine sees the store and the transport through ports.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dispatcher"
MODULES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "domain", "ports", "settings", "log"}
EVERYTHING = BASE | {"store", "transport", "engine", "mail", "web", "observe", "sink", "laptop", "demo", "cli", "main"}
MAY_IMPORT = {  # room: what of ours it may import besides itself
    "errors": set(),
    "domain": {"errors"},
    "ports": {"domain"},
    "settings": {"domain", "errors"},
    "repeats": set(),
    "log": {"settings", "domain", "repeats"},  # for its type; to clean what is shown
    "store": BASE - {"log"},
    "transport": BASE - {"log"},
    "engine": BASE - {"log"},
    "sink": {"domain", "errors"},  # a receiver: it must not share code with what it judges
    "laptop": {"errors"},  # speaks to the API from another machine
    "mail": BASE | {"store"},
    "web": BASE | {"store", "engine"},
    "observe": BASE | {"store", "transport", "engine", "web"},  # it tells of all of them; none of them knows
    "demo": EVERYTHING,
    "cli": EVERYTHING,
    "main": EVERYTHING,
    "__main__": {"cli"},
    "__init__": set(),
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, room) for each import of ours, also those within functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "dispatcher":
                yield node.lineno, rest.split(".")[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{name_of(path)} stands in no room: say in MAY_IMPORT where it belongs"
    for line, imported in imported_rooms(path):
        if imported.startswith("_"):
            continue  # dispatcher.__version__ and its like
        assert imported == room or imported in MAY_IMPORT[room], (
            f"{name_of(path)}:{line}: {room} must not import {imported}"
        )


def test_the_judge_sees_imports():
    assert {room for _, room in imported_rooms(PACKAGE / "main.py")} >= {"engine", "store", "transport"}
    assert {room for _, room in imported_rooms(PACKAGE / "log.py")} == {"settings", "domain", "repeats"}
    assert len(MODULES) > 20


# What I/O and time there is, is at the edges

IMPURE = {
    "asyncio",
    "time",
    "socket",
    "logging",
    "structlog",
    "asyncpg",
    "aiohttp",
    "threading",
    "subprocess",
    "os",
    "pathlib",
}


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "domain"], ids=name_of)
def test_the_domain_is_pure(path):
    """No I/O, no clock, no logging: `now` and `rng` are arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in IMPURE, f"{name_of(path)}:{node.lineno}: {name}"
        if isinstance(node, ast.Attribute):
            call = ast.unparse(node)
            assert call not in ("datetime.now", "datetime.utcnow", "random.random", "random.uniform"), (
                f"{name_of(path)}:{node.lineno}: {call}"
            )


LIBRARIES = {
    "asyncpg": {"store"},
    "aiohttp": {"transport", "sink", "web", "observe", "laptop"},
    "prometheus_client": {"observe"},
    "httptools": {"transport", "sink"},
    "aiodns": {"transport"},
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stop_at_their_adapter(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            rooms = LIBRARIES.get(name.split(".")[0])
            at = f"{name_of(path)}:{node.lineno}"
            assert rooms is None or room_of(path) in rooms or room_of(path) == "demo", (
                f"{at}: {name} belongs to {rooms}"
            )


# SQL lives in .sql files

SQL = re.compile(
    r"\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s+\S+\s+SET\s|DELETE\s+FROM\s|WITH\s+\w+\s+AS\s|TRUNCATE\s|COPY\s"
    r"|(CREATE|ALTER|DROP)\s+(TABLE|INDEX|SCHEMA|ROLE|FUNCTION|TRIGGER|TYPE|SEQUENCE|DATABASE|USER)\s"
    r"|(LISTEN|NOTIFY|LOCK)\s+\w+\s*;?\s*$|SET\s+(LOCAL\s+)?\w+\s*(=|TO)\s)"
)  # BEGIN, COMMIT and ROLLBACK need no name


def sql_strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string that is a statement; docstrings and help texts may speak of SQL, but don't begin with it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.match(node.value):
            yield node.lineno, node.value


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_python_holds_no_sql(path):
    assert [f"{name_of(path)}:{line}: {text[:60]}" for line, text in sql_strings(path.read_text())] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('x("SELECT 1")', 1),
        ('x(f"DELETE FROM {table} WHERE id = 1")', 1),
        ('x("""\n    INSERT INTO webhook.outbox (a) VALUES ($1)""")', 1),
        ('x("UPDATE a SET b = 1")', 1),
        ('x("CREATE TABLE a ()", "SET search_path = b", "LISTEN bell")', 3),
        ('x("Select an endpoint", "SET", "INSERT", "UPDATE of a", "COMMIT")', 0),
    ],
)
def test_the_judge_sees_sql(source, found):
    assert len(list(sql_strings(source))) == found


# The linters


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", "mypy", "bandit -q -c pyproject.toml -r dispatcher"]
)
def test_the_linters_have_nothing_to_say(command):
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
