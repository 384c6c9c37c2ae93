"""Repeats in the log: the first lines of a kind in a minute are shown, the rest are counted in one line.

A kind is what happened, and to which endpoint. So a receiver that fails a thousand times a second, or a database that is away for an hour, takes
a bounded number of lines, and none of another's. The count comes with the first line after the minute, or, if there is none, from
`tell`, which whoever has a timer calls now and then.
"""

import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

WINDOW_S = 60.0
KINDS_MAX = 10_000  # of those counted at once; beyond that everything is shown until a minute is over

TOLD_MAX = 20  # kinds at a time that have a line of their own
TELLING = "log.repeats"

Kind = tuple[str, Any]  # event, endpoint_id


class Repeats:
    """A processor of structlog. `per_minute`: lines of a kind that are shown; 0: all."""

    def __init__(self, per_minute: int = 0, *, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._now = now
        self._since = now()
        self._shown: dict[Kind, int] = {}
        self._left_out: dict[Kind, int] = {}
        self._untold: dict[Kind, int] = {}  # of minutes that are over

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if not self.per_minute or event.get("event") == TELLING:
            return event
        self._turn()
        kind = (str(event.get("event")), event.get("endpoint_id"))
        shown = self._shown.get(kind, 0)
        if shown >= self.per_minute:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            raise structlog.DropEvent
        if shown or len(self._shown) < KINDS_MAX:
            self._shown[kind] = shown + 1
        untold = self._untold.pop(kind, 0)
        if untold:
            event["left_out"] = untold
        return event

    def tell(self, log: Any) -> None:
        """Log how many lines of minutes that are over were left out, of those kinds that have not been seen since."""
        self._turn()
        untold = sorted(self._untold.items(), key=lambda item: -item[1])
        self._untold = {}
        for (name, endpoint_id), count in untold[:TOLD_MAX]:
            log.warning(TELLING, of=name, of_endpoint_id=endpoint_id, left_out=count)
        if untold[TOLD_MAX:]:
            log.warning(TELLING, kinds=len(untold) - TOLD_MAX, left_out=sum(count for _, count in untold[TOLD_MAX:]))

    def _turn(self) -> None:
        now = self._now()
        if now - self._since >= WINDOW_S:
            self._since = now
            self._untold |= {kind: count + self._untold.get(kind, 0) for kind, count in self._left_out.items()}
            self._shown.clear()
            self._left_out.clear()
