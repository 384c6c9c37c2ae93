"""A line in which lanes wait: each account in its turn, and within an account each endpoint.

One line of all lanes would give a slot to an account as often as it has endpoints: with ten thousand that had much to send, an event of
another account waited 5.9 s for its turn (bench/bounds.py, "endpoints of one account").
"""

from collections import deque

from dispatcher.engine.lane import Lane


class Line:
    """The first of each account stands in `_turns`, the others behind it in `_behind`. Append, take and truth are O(1)."""

    __slots__ = ("_behind", "_turns")

    def __init__(self) -> None:
        self._turns: deque[tuple[str, Lane]] = deque()
        self._behind: dict[str, deque[Lane] | None] = {}  # None: nobody; mostly, an account has one endpoint

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __len__(self) -> int:
        return len(self._turns) + sum(len(behind) for behind in self._behind.values() if behind is not None)

    def append(self, lane: Lane) -> None:
        account_id = lane.endpoint.account_id
        if account_id not in self._behind:
            self._behind[account_id] = None
            self._turns.append((account_id, lane))
            return
        behind = self._behind[account_id]
        if behind is None:
            behind = self._behind[account_id] = deque()
        behind.append(lane)

    def popleft(self) -> Lane:
        account_id, lane = self._turns.popleft()
        behind = self._behind[account_id]
        if behind:
            self._turns.append((account_id, behind.popleft()))
        else:
            del self._behind[account_id]
        return lane
