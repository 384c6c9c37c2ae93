"""Leaving fields out of a JSON text: what goes, what stays to the byte, and what tries to slip through."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.pointer import DEPTH_MAX, POINTER_CHARS_MAX, POINTERS_MAX, check_pointers, tree_of, without
from dispatcher.errors import InputError

no_deadline = settings(deadline=None)

NAMES = ["", "a", "b", "text", "0", "1", "a/b", "m~n", 'q"\\', "ü"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(["]", "}", '"', "\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
POINTERS = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), max_size=4)


def pointer(names: list[str]) -> str:
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def cut(value: Any, paths: list[list[str]]) -> Any:
    """The same on what was parsed."""
    gone = {path[0] for path in paths if len(path) == 1}
    below = lambda name: [path[1:] for path in paths if path[0] == name and len(path) > 1]  # noqa: E731
    if isinstance(value, dict):
        return {name: cut(part, below(name)) for name, part in value.items() if name not in gone}
    if isinstance(value, list):
        return [cut(part, below(str(n))) for n, part in enumerate(value) if str(n) not in gone]
    return value


@no_deadline
@given(VALUES, POINTERS, st.sampled_from([None, 1]), st.booleans())
def test_what_is_left_is_what_parsing_would_leave(value, paths, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    assert json.loads(without(text, tree_of(map(pointer, paths)))) == cut(value, paths)


def test_the_rest_stays_to_the_byte():
    text = b' { "n" : 1.10, "big": 123456789012345678901234567890, "s": "\\u00fc\\/", "text": "x", "e": 1E5 } '
    assert without(text, tree_of(["/text"])) == (
        b'{"n" : 1.10,"big": 123456789012345678901234567890,"s": "\\u00fc\\/","e": 1E5}'
    )


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b'{"te\\u0078t":"secret","a":1}', b'{"a":1}'),
        (b'{"text":"secret","text":"secret"}', b"{}"),
        (b'{"text":{"deep":["secret"]},"other":{"text":"kept"}}', b'{"other":{"text":"kept"}}'),
        (b'{"a":"}","text":"sec\\"ret]}","b":"{"}', b'{"a":"}","b":"{"}'),
        (b'["text"]', b'["text"]'),
        (b'"text"', b'"text"'),
        (b"null", b"null"),
        (b'{"\\ud800":1,"text":"secret"}', b'{"\\ud800":1}'),
    ],
)
def test_a_field_in_disguise(text, left):
    assert without(text, tree_of(["/text"])) == left


def test_both_occurrences_of_a_name_are_looked_into():
    assert without(b'{"m":{"text":1,"a":2},"m":{"text":3}}', tree_of(["/m/text"])) == b'{"m":{"a":2},"m":{}}'


def test_a_whole_and_its_part():
    for pointers in (["/a", "/a/b"], ["/a/b", "/a"]):
        assert without(b'{"a":{"b":1},"c":2}', tree_of(pointers)) == b'{"c":2}'


def test_depth_and_size_have_no_bound_of_their_own():
    deep = b"[" * 100_000 + b"]" * 100_000
    assert without(b'{"a":%b,"b":1}' % deep, tree_of(["/b"])) == b'{"a":%b}' % deep
    assert without(b'{"b":%b,"a":1}' % deep, tree_of(["/b"])) == b'{"a":1}'


@pytest.mark.parametrize("bad", ["", "text", "message/text", "/a~", "/a~2", "/a\nb", "#/a"])
def test_a_bad_pointer(bad):
    with pytest.raises(InputError, match="not a JSON pointer"):
        check_pointers(["/fine", bad])


def test_pointers_have_bounds_and_one_order():
    assert check_pointers(["/b", "/a", "/b"]) == ("/a", "/b")
    assert check_pointers([f"/{n}" for n in range(POINTERS_MAX)])
    with pytest.raises(InputError, match="more than"):
        check_pointers([f"/{n}" for n in range(POINTERS_MAX + 1)])
    assert check_pointers(["/" + "x" * (POINTER_CHARS_MAX - 1), "/x" * DEPTH_MAX])
    for bad in ("/" + "x" * POINTER_CHARS_MAX, "/x" * (DEPTH_MAX + 1)):
        with pytest.raises(InputError, match="at most"):
            check_pointers([bad])
