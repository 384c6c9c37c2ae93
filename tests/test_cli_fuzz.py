"""Input that nobody meant, from Hypothesis, into every verb: an exit status and a sentence, never a traceback."""

from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.errors import DispatcherError
from tests.test_cli import Cli, empty, run
from tests.verbs import every_verb

__all__ = ["empty", "run"]  # fixtures

ENDLESS = {"run", "demo", "sink", "tail", "web"}  # they serve until they are told to stop


# What a terminal can pass: no NUL, and bytes that aren't UTF-8 as surrogates.
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12).map(
    lambda text: text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
)
ODD = st.sampled_from(
    [
        "", " ", "-", "--", "0", "-1", "1", "7", "2147483648", "999999999999", "9223372036854775807", "9223372036854775808", "1e9", "nan",
        "inf", "-inf", "٣",
        "{}", "[1", '{"a": 1}', '"\\u0000"', "*", "message.*", "a.b", "acct", "http://127.0.0.1:1/", "http://[::1", "https://\udcff.test/",
        "evt_0ee4da927ccba008cff736c89e3074c0", "whsec_AAAA", "3h", "999999999d", "2026-11-23T18:00:00Z", "9999-12-31T23:59:59+00:00",
        "0001-01-01T00:00:00+23:59", "\udcff", "x" * 3_000, "é" * 200, "\u202e", "\n", "'; --",
    ]
)  # fmt: skip
WORD = st.one_of(ODD, ODD, TEXT)
VERBS = {path: command for path, command in every_verb() if path[-1] not in ENDLESS}


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """Draw a verb and its arguments, each with a word; options come or don't."""
    path = draw(st.sampled_from(sorted(VERBS)))
    words: list[str] = []
    for parameter in VERBS[path].params:
        if isinstance(parameter, click.Argument):
            words += draw(st.lists(WORD, min_size=1, max_size=1 if parameter.nargs == 1 else 3))
        elif (
            isinstance(parameter, click.Option)
            and parameter.name not in ("watch", "follow")
            and draw(st.integers(0, 3)) == 0
        ):
            words.append(parameter.opts[0])
            if not parameter.is_flag:
                words.append(draw(WORD))
    return [*path, *words]


def check(result: Any) -> None:
    error = result.exception
    if isinstance(error, DispatcherError):
        assert str(error).strip(), "refused without a sentence"
    else:
        assert error is None or isinstance(error, SystemExit), error
        assert result.exit_code in (0, 1, 2), result.output


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(commands(), st.sampled_from(["", "y\n", "n\n", "\udcff\n"]))
def test_any_words_end_in_a_sentence(run: Cli, words: list[str], answer: str) -> None:
    check(run(*words, input=answer.encode("utf-8", "surrogateescape")))


@pytest.mark.parametrize("number", ["2147483648", "9223372036854775808", "-1"])
def test_ids_that_no_column_holds(run: Cli, number: str) -> None:
    """Each verb, each of its whole numbers: found by the test above, as an error of the driver's."""
    for path, command in VERBS.items():
        wholes = [p for p in command.params if isinstance(p.type, click.types.IntParamType)]
        for odd in wholes:
            words = list(path)
            for parameter in command.params:
                if isinstance(parameter, click.Argument):
                    words.append(number if parameter is odd else "1")
            check(run(*words, *([odd.opts[0], number] if isinstance(odd, click.Option) else [])))


def test_a_word_that_is_not_utf8_is_refused(run: Cli) -> None:
    assert "not UTF-8" in run.refused("erase", "account", "\udcff", "--yes")


def test_the_judge_sees_a_traceback() -> None:
    @click.command()
    def broken() -> None:
        raise KeyError("id")

    with pytest.raises(AssertionError):
        check(CliRunner().invoke(broken))
