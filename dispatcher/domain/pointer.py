"""Leave members out of a JSON text by JSON pointer (RFC 6901), and everything else as it is, to the byte.

The text is cut, not parsed and written again: numbers keep their digits, strings their escapes, members their order. Only
objects and arrays on a pointer's way are looked into; what lies beside it is passed over by a regular expression, without
recursion, however deep it is. A name is compared as it is meant (`"te\\u0078t"` is `text`), and one that occurs twice is left
out twice: a field that was to stay here must not slip through in disguise.
"""

import json
import re
from collections.abc import Iterable

from dispatcher.errors import InputError

POINTERS_MAX, POINTER_CHARS_MAX, DEPTH_MAX = 32, 256, 16

Tree = dict[str, "Tree | None"]  # None: leave it out

_POINTER = re.compile(r"(?:/(?:[^~/]|~[01])*)+")
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'  # possessive: half the time, and nothing to go back for
_SPACE = rb"[ \t\n\r]*"
_SPACES = re.compile(_SPACE)
_NAME = re.compile(rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE)
_SCALAR = re.compile(_STRING + rb"|[^ \t\n\r,\]}]+")
_BRACKET = re.compile(_STRING + rb"|[\[{]|[\]}]")
_NEXT = re.compile(_SPACE + rb",?" + _SPACE)


def check_pointers(pointers: Iterable[str]) -> tuple[str, ...]:
    """Return the pointers in their one order, without repeats. Raises InputError that names the bad one."""
    unique = sorted(set(pointers))
    if len(unique) > POINTERS_MAX:
        raise InputError(f"{len(unique)} fields to leave out are more than {POINTERS_MAX}: name what they are part of")
    for pointer in unique:
        if not _POINTER.fullmatch(pointer) or not pointer.isprintable():
            raise InputError(
                f"{pointer!r} is not a JSON pointer to a field of `data`: write the names on the way to it, such as /message/text"
            )
        if len(pointer) > POINTER_CHARS_MAX or pointer.count("/") > DEPTH_MAX:
            raise InputError(f"a JSON pointer has at most {POINTER_CHARS_MAX} characters and {DEPTH_MAX} names")
    return tuple(unique)


def tree_of(pointers: Iterable[str]) -> Tree:
    """Join pointers into the tree that `without` goes by."""
    tree: Tree = {}
    for pointer in sorted(
        pointers, key=len
    ):  # one to a whole is shorter than those to its parts, which then mean nothing
        *path, last = (name.replace("~1", "/").replace("~0", "~") for name in pointer[1:].split("/"))
        level: Tree | None = tree
        for name in path:
            level = None if level is None else level.setdefault(name, {})
        if level is not None:
            level[last] = None
    return tree


def without(text: bytes, tree: Tree) -> bytes:
    """Return the JSON text without what the tree names. What isn't there is no error; a bad text is one of ours."""
    kept: list[bytes] = []
    _copy(text, _past(_SPACES, text, 0), tree, kept)
    return b"".join(kept)


def _copy(text: bytes, at: int, tree: Tree, kept: list[bytes]) -> int:
    """Copy the value at `at`, and return its end. Goes as deep as the tree does."""
    opening = text[at : at + 1]
    if opening not in (b"{", b"["):
        end = _past(_SCALAR, text, at)
        kept.append(text[at:end])
        return end
    closing = b"}" if opening == b"{" else b"]"
    kept.append(opening)
    at = _past(_SPACES, text, at + 1)
    index, separator = 0, b""
    while text[at : at + 1] != closing:
        begin = at
        if opening == b"{":
            found = _NAME.match(text, at)
            assert found is not None, "the database holds valid JSON"
            name, at = _meant(found[1]), found.end()
        else:
            name, index = str(index), index + 1
        if name not in tree:
            end = _end(text, at)
            kept += (separator, text[begin:end])
            at, separator = end, b","
        elif (below := tree[name]) is None:
            at = _end(text, at)
        else:
            kept += (separator, text[begin:at])
            at, separator = _copy(text, at, below, kept), b","
        at = _past(_NEXT, text, at)
    kept.append(closing)
    return at + 1


def _end(text: bytes, at: int) -> int:
    """Return where the value at `at` ends."""
    if text[at : at + 1] not in (b"{", b"["):
        return _past(_SCALAR, text, at)
    depth = 0
    for found in _BRACKET.finditer(text, at):
        first = text[found.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if not depth:
                return found.end()
    raise AssertionError("the database holds valid JSON")


def _past(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None, "the database holds valid JSON"
    return found.end()


def _meant(quoted: bytes) -> str:
    """Read a member's name. Not by orjson, which refuses half a surrogate pair where PostgreSQL doesn't."""
    return str(json.loads(quoted)) if b"\\" in quoted else quoted[1:-1].decode()
