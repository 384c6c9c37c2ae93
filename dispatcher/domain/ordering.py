"""Ordering by key, as an endpoint asks for it: events that bear the same key are delivered one by one, in the log's order.

A delivery that fails holds back its own key only: `block` until the retry schedule has settled it, `give_up_after N`
until N attempts have failed. Either way a dead letter ends it, and the key goes on.
"""

import re
from dataclasses import dataclass

from dispatcher.errors import InputError

OFF, BLOCK = "off", "block"
GIVE_UP = re.compile(r"give_up_after ([1-9][0-9]?)")


@dataclass(frozen=True, slots=True)
class Ordering:
    """`give_up_after`: attempts of a delivery that holds back its key; None: all that the retry schedule allows."""

    give_up_after: int | None = None


def parse_ordering(text: str) -> Ordering | None:
    """Return what `text` asks for; None if it is off. Raises InputError."""
    if text == OFF:
        return None
    if text == BLOCK:
        return Ordering()
    match = GIVE_UP.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not an ordering: say off, block, or 'give_up_after N' with 1 to 99 attempts")
    return Ordering(int(match[1]))
