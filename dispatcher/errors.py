"""What can go wrong that a person must hear about, as sentences.

`DispatcherError` is our side of every boundary: a setting, a database or an input that we refuse. Its text says what is
wrong, which id or setting, and what to do; the CLI prints it after "error:" and exits with `exit_code`. What a receiver
does to us is never an exception but an `Outcome` (domain/outcome.py).
"""


class DispatcherError(Exception):
    """Refuse something, with a sentence for a person. `code` names it for scripts (`--json`). `remedy` is what to do about it at the command
    line, in its own words: the text has it, `message` doesn't."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.message = message


class InputError(DispatcherError):
    """What was asked for is malformed or out of range; nothing was changed. `field` says which part of it, if one is to blame."""

    code = "bad_input"
    exit_code = 2

    def __init__(self, message: str, *, remedy: str | None = None, field: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.field = field


class NotFoundError(DispatcherError):
    """The named thing does not exist."""

    code = "not_found"
    exit_code = 3


class StateError(DispatcherError):
    """The named thing exists, but is in a state in which this can't be done."""

    code = "wrong_state"
    exit_code = 4


class ForbiddenError(DispatcherError):
    """Whoever asks is known and may not do this."""

    code = "forbidden"


class DatabaseRefusedError(DispatcherError):
    """The database is reachable but unfit: schema, privileges, encoding, sequence cache. `run` will not start on it."""

    code = "database_unfit"
    exit_code = 5


class SealedError(DatabaseRefusedError):
    """Something in the database is encrypted and can't be opened with the keys that are set."""

    code = "sealed"


class TakenOverError(DispatcherError):
    """Another dispatcher rules this database: this one has stopped. Started again, it waits as a standby."""

    code = "taken_over"
    exit_code = 7


class ForcedStopError(DispatcherError):
    """A second signal ended the process before it had finished what it had begun."""

    code = "forced_stop"

    def __init__(self, number: int, name: str, left: str) -> None:
        super().__init__(f"stopped at once by a second signal ({name}); {left}")
        self.exit_code = 128 + number


class BusyError(DispatcherError):
    """There is no room for this now, or it would take too long; nothing was changed."""

    code = "busy"


class DatabaseAwayError(DispatcherError):
    """The database can't be reached now; the same call may succeed later."""

    code = "database_away"
    exit_code = 6


class UnreachableError(DispatcherError):
    """The API can't be reached now, or has no room; the same call may succeed later."""

    code = "unreachable"
    exit_code = 6
