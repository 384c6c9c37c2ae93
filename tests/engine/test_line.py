"""Who waits is served by turns of accounts, and within an account in the order in which they came."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.engine.line import Line


def lane(account_id: str, number: int) -> Any:
    return SimpleNamespace(id=number, endpoint=SimpleNamespace(account_id=account_id))


def test_an_account_with_many_endpoints_gets_one_turn_in_two():
    line = Line()
    for number in range(5):
        line.append(lane("big", number))
    line.append(lane("small", 9))
    assert len(line) == 6
    assert [line.popleft().id for _ in range(6)] == [0, 9, 1, 2, 3, 4]
    assert not line


def test_an_endpoint_that_changes_its_account_while_it_waits_keeps_its_place():
    line = Line()
    first, second = lane("a", 1), lane("a", 2)
    line.append(first)
    line.append(second)
    first.endpoint = second.endpoint = SimpleNamespace(account_id="b")
    assert [line.popleft().id, line.popleft().id] == [1, 2]
    assert not line
    assert not line._behind


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc"))))
def test_nobody_is_lost_and_no_account_waits_for_two_turns_of_another(steps: list[str | None]):
    """`None` takes the next; a letter is one more lane of that account."""
    line, waiting, number = Line(), [], 0
    served_since: dict[str, dict[str, int]] = {}
    for account in [*steps, *[None] * len(steps)]:
        if account is not None:
            number += 1
            waiting.append((account, number))
            served_since.setdefault(account, dict.fromkeys("abc", 0))
            line.append(lane(account, number))
        elif line:
            taken = line.popleft()
            mine = taken.endpoint.account_id
            assert taken.id == next(n for a, n in waiting if a == mine)  # the first of its own
            waiting.remove((mine, taken.id))
            del served_since[mine]
            for others in served_since.values():
                others[mine] += 1
                assert others[mine] <= 1
            if any(a == mine for a, _ in waiting):
                served_since[mine] = dict.fromkeys("abc", 0)
        assert len(line) == len(waiting)
        assert bool(line) == bool(waiting)
    assert not line
    assert not line._behind
