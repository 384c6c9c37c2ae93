"""How an endpoint stands at this moment, in words: its breaker, its pace, what waits, and when it is tried again.

Breaker and pace are in the memory of the process that delivers, and nowhere else. Where that process serves the page it is asked; any other
(`dispatcher web`, a standby) says that it doesn't know.
"""

from collections.abc import Callable
from typing import Any

from dispatcher.store.endpoint import RETRIES_SHOWN_MAX, Stands

LaneHealth = Callable[[int | None], list[dict[str, Any]]]

SHOWN = ("breaker", "pace_per_s", "in_flight", "in_flight_limit", "queued", "connecting")
UNKNOWN = "Only the process that delivers knows its breaker and its pace, and another one serves this page."


def standing(lane_health: LaneHealth | None, stands: Stands, expired_24h: int) -> dict[str, Any]:
    """Return what page and stream show. `lane`: as the engine tells it, None where it isn't known or nothing is sent anyway."""
    health = [] if lane_health is None else lane_health(stands.endpoint_id)
    lane = health[0] if health else None
    failing = stands.state == "live" and stands.failing_since is not None
    return {
        "state": stands.state, "failing": failing, "backlog": max(stands.backlog, 0 if lane is None else lane["queued"]),
        "retries": min(stands.retries, RETRIES_SHOWN_MAX), "more_retries": stands.retries > RETRIES_SHOWN_MAX,
        "expired_24h": expired_24h, "next_retry_at": stands.next_retry_at,
        "lane": None if lane is None else {name: lane[name] for name in SHOWN},
        "words": said(lane) if stands.state == "live" else "", "wait_s": None if lane is None else _wait_s(lane),
    }  # fmt: skip


def said(lane: dict[str, Any] | None) -> str:
    """Say how a live endpoint is treated, without figures that change all the time: a screen reader reads each change."""
    if lane is None:
        return UNKNOWN
    if lane["breaker"] == "open":
        return "Breaker open: it failed too often, so nothing is sent until the wait is over; then one POST tries it."
    if lane["breaker"] == "half-open":
        return "Breaker half-open: one POST at a time tries whether it is well again."
    if lane["waits_s"] > 0:
        return "Breaker closed; it asked to wait (Retry-After), so nothing is sent until then."
    if lane["pace_per_s"] is not None:
        return "Breaker closed; it asked for less (429, 502, 503 or 504), so it is sent to at a lower pace that grows again."
    if lane["connecting"] and lane["origin_full"]:
        return "Breaker closed; all connections that its host may have are in use, and the endpoints there take turns for them."
    return "Breaker closed: it is sent to as its own limits allow."


def _wait_s(lane: dict[str, Any]) -> int | None:
    """Return for how many seconds nothing is sent to it; None if something may be now."""
    wait_s = max(lane["waits_s"], lane["probe_in_s"] or 0.0)
    return int(wait_s) + 1 if wait_s > 0 else None
