"""docs/standard-webhooks.md lists every test of the standard's rules, and no other; what it points to elsewhere exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "standard-webhooks.md").read_text()


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_the_page_and_the_tests_agree() -> None:
    listed = re.findall(r"`(test_\w+)`", PAGE)
    assert len(listed) == len(set(listed)), "one row a rule"
    assert set(listed) == names_in(Path(__file__).with_name("test_conformance.py"))


def test_what_is_tested_elsewhere_is_there() -> None:
    elsewhere = re.findall(r"`tests/(\S+\.py)::(test_\w+)`", PAGE)
    for path, name in elsewhere:
        assert name in names_in(TESTS / path), f"{path}::{name}"
    for path in re.findall(r"`tests/(\S+\.py)`", PAGE):
        assert (TESTS / path).exists(), path
