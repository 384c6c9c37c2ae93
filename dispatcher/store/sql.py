"""Load queries.sql: one attribute a statement, so that a misspelt name fails at import."""

import re
from pathlib import Path
from types import SimpleNamespace

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(path: Path) -> SimpleNamespace:
    """Return the statements of the file by name. Comments are left out."""
    parts = _NAME.split(path.read_text())
    names = parts[1::2]
    assert len(set(names)) == len(names), "a name twice"
    return SimpleNamespace(**{name: _strip(body) for name, body in zip(names, parts[2::2], strict=True)})


def _strip(body: str) -> str:
    lines = [line for line in body.strip().splitlines() if not line.startswith("--")]
    return "\n".join(lines).strip().removesuffix(";")


SQL = load(Path(__file__).with_name("queries.sql"))
