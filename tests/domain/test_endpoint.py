"""What a subscription matches: patterns, and the ids for which it is valid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.endpoint import (
    FOREVER,
    Endpoint,
    EndpointId,
    EndpointState,
    Subscription,
    check_patterns,
    config_hash,
    pattern_matches,
)
from dispatcher.domain.event import check_event_type
from dispatcher.errors import InputError

no_deadline = settings(deadline=None)  # a busy machine is no defect

words = st.from_regex(r"[a-z0-9_]{1,3}", fullmatch=True)
types = st.lists(words, min_size=2, max_size=4).map(".".join)
prefixes = st.lists(words, min_size=1, max_size=3).map(".".join)


def endpoint(*patterns: str) -> Endpoint:
    subscriptions = tuple(Subscription(n, pattern, 0) for n, pattern in enumerate(patterns))
    return Endpoint(EndpointId(1), "acc", None, EndpointState.LIVE, ("whsec_hunter2",), subscriptions)


# Patterns


@pytest.mark.parametrize(
    ("pattern", "event_type", "matches"),
    [
        ("*", "message.sent", True),
        ("message.sent", "message.sent", True),
        ("message.sent", "message.sent.late", False),
        ("message.sent", "message.sen", False),
        ("message.*", "message.sent", True),
        ("message.*", "message.sent.late", True),
        ("message.*", "message", False),
        ("message.*", "messages.sent", False),
        ("message.*", "a.message.sent", False),
        ("message.sent.*", "message.sent", False),
        ("message.sent.*", "message.sent.late", True),
        ("message.sent.*", "message.sent_late.x", False),
    ],
)
def test_a_pattern(pattern, event_type, matches):
    assert pattern_matches(pattern, event_type) is matches


@no_deadline
@given(prefixes, types)
def test_a_prefix_matches_whole_words(prefix, event_type):
    theirs, ours = event_type.split("."), prefix.split(".")
    assert pattern_matches(prefix + ".*", event_type) == (theirs[: len(ours)] == ours and len(theirs) > len(ours))


@no_deadline
@given(types, types)
def test_an_exact_type_is_a_pattern_that_matches_itself_alone(pattern, event_type):
    assert check_patterns([check_event_type(pattern)]) == (pattern,)
    assert pattern_matches(pattern, event_type) == (pattern == event_type)


@pytest.mark.parametrize(
    ("patterns", "unique"),
    [
        (["*"], ("*",)),
        (["b.*", "a.b", "b.*"], ("b.*", "a.b")),  # in the order given
        (["a.b.c.*"], ("a.b.c.*",)),
        (["a" * 126 + ".*"], ("a" * 126 + ".*",)),
        ([f"a.x{n}" for n in range(100)], tuple(f"a.x{n}" for n in range(100))),
        (["a.b"] * 1_000, ("a.b",)),
    ],
)
def test_good_patterns(patterns, unique):
    assert check_patterns(patterns) == unique


@pytest.mark.parametrize(
    "pattern",
    ["", "message", "message*", "*.sent", "message.*.sent", "**", ".*", "message.", "Message.*", "a.b\n", "*\n", "a b.*",
     "ä.*", "a" * 127 + ".*", "a." + "b" * 127],
)  # fmt: skip
def test_a_bad_pattern_is_named(pattern):
    with pytest.raises(InputError) as caught:
        check_patterns(["a.b", pattern])
    assert str(caught.value).startswith(f"{pattern!r} is not an event-type pattern")


@pytest.mark.parametrize(
    ("patterns", "words"), [([], "at least one"), ([f"a.x{n}" for n in range(101)], "101 patterns are more than 100")]
)
def test_how_many_patterns(patterns, words):
    with pytest.raises(InputError, match=words):
        check_patterns(patterns)


# Subscriptions


@pytest.mark.parametrize(("event_id", "valid"), [(9, False), (10, False), (11, True), (20, True), (21, False)])
def test_a_subscription_is_valid_after_since_and_up_to_until(event_id, valid):
    assert Subscription(1, "a.*", since_id=10, until_id=20).matches("a.b", event_id) is valid


def test_a_subscription_matches_by_its_pattern_too():
    assert not Subscription(1, "a.*", since_id=10).matches("b.a", 11)


def test_a_subscription_without_an_end_outlives_the_log():
    assert Subscription(1, "*", since_id=0).matches("a.b", FOREVER)
    assert FOREVER > 10**18  # 20,000 events a second for a million years


# Endpoints


@pytest.mark.parametrize(
    ("patterns", "exact"),
    [
        (["a.b"], ("a.b",)),
        (["c.d", "a.b", "c.d"], ("a.b", "c.d")),
        (["a.b", "c.*"], None),
        (["*"], None),
        ([], ()),
    ],
)
def test_the_types_a_page_of_the_log_can_be_filtered_by(patterns, exact):
    assert endpoint(*patterns).exact_types() == exact


def test_an_endpoint_shows_no_secret():
    assert repr(endpoint()) == "Endpoint(1 live unusable)"
    assert "hunter2" not in f"{endpoint()} {[endpoint()]}"


# What a passed test belongs to


def test_the_same_configuration_has_the_same_hash_however_it_is_ordered():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    "other", [{}, {"url": "https://b.example/"}, {"url": None}, {"url": "https://a.example/", "x": None}]
)
def test_another_configuration_has_another_hash(other):
    assert config_hash(other) != config_hash({"url": "https://a.example/"})
