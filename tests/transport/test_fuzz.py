"""Answers that nobody would write, from Hypothesis: whatever arrives, in whatever pieces, ends in one outcome within the bounds.

`python -m tests.fuzz` does the same guided by coverage, for as long as it is let.
"""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.domain.outcome import Outcome
from tests.transport.test_hostile import SMALL, Wire, make_wire

RETRY_AFTER_MAX, DETAIL_MAX = 64, 300

LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 500 X\r\n", b"HTTP/1.1 429 X\r\n", b"HTTP/1.1 103 Early\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n", b"HTTP/2 200\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 999 X\r\n", b"HTTP/1.1 20\r\n", b"GET / HTTP/1.1\r\n",
        b"content-length: 5\r\n", b"content-length: 0\r\n", b"content-length: 99999999999999999999\r\n", b"Content-Length: 5, 5\r\n",
        b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n", b"transfer-encoding: identity\r\n",
        b"connection: close\r\n", b"connection: keep-alive\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"retry-after: 120\r\n",
        b"retry-after: " + b"9" * 200 + b"\r\n", b"x: " + b"y" * 700 + b"\r\n", b": \r\n", b"x\r\n", b" folded\r\n", b"\r\n", b"\n", b"\r",
        b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"ffffffffffffffff\r\n",
        b"5;" + b"e" * 600 + b"\r\n", b"hello", b"x" * 1_500, b"\x00", b"\xff\xfe",
    ]
)  # fmt: skip
PIECES = st.lists(st.one_of(LINES, LINES, st.binary(max_size=20)), max_size=14)


def check_bounds(wire: Wire) -> None:
    assert len(wire.outcomes) <= 1
    assert wire.connection.closed is wire.socket.aborted
    for outcome in wire.outcomes:
        assert len(outcome.response_head or b"") <= SMALL.head_kept_bytes
        assert len(outcome.retry_after or "") <= RETRY_AFTER_MAX
        assert len(outcome.detail) <= DETAIL_MAX
        assert outcome.fault is not None or 200 <= (outcome.status or 0) <= 299
    if not wire.outcomes:
        assert not wire.connection.closed


async def outcome_of(pieces: list[bytes], *, settle: bool = True) -> tuple[Outcome, bool]:
    """Feed an answer and its end; return what was made of it, and whether the connection was kept until then."""
    async with make_wire() as wire:
        await wire.post()
        for piece in pieces:
            await wire.feed(piece, settle=settle)
            check_bounds(wire)
        kept = not wire.connection.closed
        if kept:
            await wire.eof()
            check_bounds(wire)
        assert len(wire.outcomes) == 1
        return wire.outcomes[0], kept


@pytest.mark.usefixtures("each_transport")
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PIECES, st.booleans())
async def test_any_answer_ends_in_one_outcome_within_the_bounds(pieces: list[bytes], settle: bool) -> None:
    await outcome_of(pieces, settle=settle)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PIECES, st.integers(1, 50))
async def test_any_answer_is_the_same_however_it_is_cut(pieces: list[bytes], size: int) -> None:
    """The thin transport's promise: aiohttp's parser differs by what a read brings together."""
    answer = b"".join(pieces)
    whole, kept_whole = await outcome_of([answer])
    cut, kept_cut = await outcome_of([answer[at : at + size] for at in range(0, len(answer), size)])
    assert (cut.fault, cut.status, cut.retry_after, kept_cut) == (
        whole.fault,
        whole.status,
        whole.retry_after,
        kept_whole,
    )


def test_the_judge_sees_what_is_too_long() -> None:
    async def go() -> None:
        async with make_wire() as wire:
            await wire.post()
            wire.outcomes.append(Outcome(None, 200, response_head=b"x" * (SMALL.head_kept_bytes + 1)))
            with pytest.raises(AssertionError):
                check_bounds(wire)

    asyncio.run(go())
