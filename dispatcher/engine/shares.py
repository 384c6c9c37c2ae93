"""Shares: how much of what all endpoints send through those may hold who keep it for long.

Turns bound how often slots are granted, not how long they are held. So of all slots a quarter is for the POSTs of
lanes that are failing, another quarter for lanes that have not been tried yet (in one share with the failing, a new and
healthy endpoint would wait for the timeouts of the dead), a half for slow ones, and all of these together have three
quarters: a quarter is always for who is well and quick. The same of the sockets that one origin may have, because
endpoints that share an origin share these: without it, beside 30 % of its endpoints that hang or are slow, the healthy
ones of one origin had a tenth of their rate.

Who finds a share full waits in its line, and is called when there is room. Everything here is atomic.
"""

from collections.abc import Iterator, Sequence

from dispatcher.domain.url import Origin
from dispatcher.engine.lane import SLOW_S, Lane
from dispatcher.engine.line import Line

TOGETHER = 3  # the kind that is of all kinds


class Share:
    """A bounded part of the slots, or of an origin's sockets. Lanes that found it full wait in its line."""

    __slots__ = ("held", "limit", "line", "origin")

    def __init__(self, limit: int, origin: Origin | None = None) -> None:
        self.limit = limit
        self.origin = origin
        self.held = 0
        self.line = Line()

    @property
    def has_room(self) -> bool:
        return self.held < self.limit


class Shares:
    """Those of all slots, and of each origin with POSTs of such lanes in flight, or with such lanes waiting."""

    def __init__(self, slots: int, sockets_per_origin: int) -> None:
        self.untried, self.failing, self.slow, self.together = self._all = tuple(
            Share(limit) for limit in _limits(slots)
        )
        self._origin_limits = _limits(sockets_per_origin)
        self._origins: dict[Origin, tuple[Share, ...]] = {}
        self._called: dict[Share, None] = {}  # have room, and somebody in their line

    def set_slots(self, slots: int) -> None:
        for share, limit in zip(self._all, _limits(slots), strict=True):
            share.limit = limit
            self._note(share)

    def full(self, lane: Lane, now: float) -> Share | None:
        """Return a share that the lane's next POST would count into, and that has no room for it."""
        if lane.is_ordinary:
            return None
        return next((share for share in self._of(lane, now) if not share.has_room), None)

    def _of(self, lane: Lane, now: float) -> Iterator[Share]:
        target = lane.endpoint.target
        here = self._origins.get(target.origin) if target is not None else None
        for kind in _kinds(lane, now):
            yield self._all[kind]
            if here is not None:
                yield here[kind]

    def take(self, lane: Lane, now: float) -> Sequence[Share]:
        """Count a POST of the lane; return what to give back when it ends."""
        kinds = () if lane.is_ordinary else _kinds(lane, now)
        if not kinds:
            return ()
        taken = [self._all[kind] for kind in kinds]
        if lane.endpoint.target is not None:
            origin = lane.endpoint.target.origin
            here = self._origins.get(origin)
            if here is None:
                here = self._origins[origin] = tuple(Share(limit, origin) for limit in self._origin_limits)
            taken += [here[kind] for kind in kinds]
        for share in taken:
            share.held += 1
        return taken

    def give_back(self, shares: Sequence[Share]) -> None:
        for share in shares:
            share.held -= 1
            self._note(share)

    def wait(self, lane: Lane, share: Share) -> None:
        """Let the lane wait for a share that was full a moment ago."""
        lane.waits_for = share
        share.line.append(lane)

    def waits_in_vain(self, lane: Lane, now: float) -> bool:
        """Tell whether its next POST would not count into the share that the lane waits for, any more."""
        return lane.waits_for is not None and all(share is not lane.waits_for for share in self._of(lane, now))

    def call(self) -> list[Lane]:
        """Return the first of each line whose share has room. To be asked after every turn, because who was called may have no use for the room
        (nothing to send, no longer untried), and then nobody ends who would call the next."""
        called = []
        for share in list(self._called):
            while share.has_room and share.line:  # who was called before may have it already
                lane = share.line.popleft()
                if lane.waits_for is share and not lane.gone:  # else it left the line for another
                    lane.waits_for = None
                    called.append(lane)
                    break
            self._note(share)
        return called

    def _note(self, share: Share) -> None:
        if share.line and share.has_room:
            self._called[share] = None
            return
        self._called.pop(share, None)
        if share.origin is not None and not any(other.held or other.line for other in self._origins[share.origin]):
            del self._origins[share.origin]


def _limits(of: int) -> tuple[int, int, int, int]:
    """Return the bounds for lanes that are untried, failing, and slow, and for all of them."""
    return max(1, of // 4), max(1, of // 4), max(1, of // 2), max(1, of * 3 // 4)


def _kinds(lane: Lane, now: float) -> list[int]:
    """Return of which kinds a lane is, in the order of `_limits`."""
    is_any = lane.untried, lane.failing(now), lane.latency_s > SLOW_S
    kinds = [kind for kind, applies in enumerate(is_any) if applies]
    return [*kinds, TOGETHER] if kinds else kinds
