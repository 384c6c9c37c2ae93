"""What SIGHUP does: the settings are read again, those that can change without a restart do, and the rest say so in one line.

The environment of a process doesn't change, so this is about the settings file and what `*_FILE` settings name.
"""

from collections.abc import Callable

import structlog

from dispatcher.domain.redact import HIDDEN
from dispatcher.errors import InputError
from dispatcher.settings import ENV_PREFIX, SECRETS, Settings

_log = structlog.get_logger(room="main")

# Settings that are looked at where they are used, or are put there by a line.
AT_ONCE = ("log_level", "log_repeats_per_minute", "slots", "memory_events_max", "memory_bytes_max", "grace_s")


def reload(current: Settings, read: Callable[[], Settings]) -> Settings:
    """Return the settings that hold from now on: `current`, and of what is read again what may change. A bad one changes nothing."""
    try:
        fresh = read()
    except InputError as exc:
        _log.error("reload.refused", error=str(exc), remedy="nothing was changed; correct it and send SIGHUP again")
        return current
    changed = [name for name in Settings.model_fields if getattr(fresh, name) != getattr(current, name)]
    if "encryption_keys_file" not in changed and fresh.keyring.ids != current.keyring.ids:
        changed.append("encryption_keys_file")  # the same file, with other keys in it
    at_once = {name: getattr(fresh, name) for name in changed if name in AT_ONCE}
    _log.warning(  # at any level: somebody waits for the answer
        "reloaded",
        changed={
            f"{ENV_PREFIX}{name.upper()}": HIDDEN if name in SECRETS else value for name, value in at_once.items()
        },
        need_restart=[f"{ENV_PREFIX}{name.upper()}" for name in changed if name not in AT_ONCE],
    )
    return current.model_copy(update=at_once)
