"""When a standby may take the place of an owner that still holds the lock.

A frozen owner's kernel keeps its sessions alive, and so does a cut network for a while: the lock alone doesn't tell. The
heartbeat does, but only if it was *watched*: it must stay as it is, under one holder, for STALE_S of looks, and be that
old by the database's clock too. So an owner that has just begun (its lock is taken a moment before its first heartbeat)
gets as much time as any other, and a database or a standby that stood still itself, after which an old heartbeat is the
first thing to be seen, proves nothing: a look counts for STEP_MAX_S at most.

While the server itself keeps the holder waiting (a lock that somebody holds in the recorder's way, a slow disk), a
missing heartbeat says nothing about the owner, and whoever came after it would wait in the same place.
"""

from dataclasses import dataclass

STALE_S = 3.0  # the owner's heartbeat goes along with the checkpoint, about once a second
POLL_S = 0.25
STEP_MAX_S = 0.5
NAME_BYTES_MAX = 63  # NAMEDATALEN - 1: PostgreSQL cuts a session's name there


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the owner shows. `holder` names the session that has the lock (None: free by now); times by the database."""

    holder: int | None
    owner: str | None
    epoch: int
    heartbeat_us: int | None
    held_up: bool
    now_us: int

    @property
    def heartbeat_age_s(self) -> float | None:
        return None if self.heartbeat_us is None else round((self.now_us - self.heartbeat_us) / 1e6, 1)


class Watch:
    """The looks of one standby, in order."""

    def __init__(self) -> None:
        self._last: Look | None = None
        self._unchanged_us = 0

    def is_dead(self, look: Look) -> bool:
        """Take a look into account; tell whether the holder's place may be taken."""
        last, self._last = self._last, look
        if (
            last is None
            or look.holder is None
            or look.held_up
            or (look.holder, look.heartbeat_us) != (last.holder, last.heartbeat_us)
        ):
            self._unchanged_us = 0
            return False
        self._unchanged_us += min(max(0, look.now_us - last.now_us), int(STEP_MAX_S * 1e6))
        stale_us = int(STALE_S * 1e6)
        is_old = look.heartbeat_us is None or look.now_us - look.heartbeat_us >= stale_us
        return is_old and self._unchanged_us >= stale_us


def session_name(owner: str) -> str:
    """Name a waiting session for pg_stat_activity; of a long host name the end is kept, and the process id with it."""
    prefix = "dispatcher standby "
    return prefix + owner[-(NAME_BYTES_MAX - len(prefix)) :]
