"""What became of an event, delivery by delivery and run by run, in words. Pure: from the rows of `event_deliveries` and `event_attempts`."""

from collections.abc import Iterable, Sequence
from typing import Any

from dispatcher.domain.run import ORIGINAL
from dispatcher.store.runs import kind


def deliveries(endpoints: Iterable[Any], attempts: Iterable[Any]) -> list[dict[str, Any]]:
    """Return one dict for each endpoint that was subscribed to the event or has had it: where it is, its `fate` in a few words, that of each
    of its runs, and the attempts."""
    made: dict[int, list[dict[str, Any]]] = {}
    for attempt in attempts:
        head = attempt["response_head"]
        shown = {key: value for key, value in dict(attempt).items() if key not in ("endpoint_id", "response_head")}
        made.setdefault(attempt["endpoint_id"], []).append(
            shown | {"response": None if head is None else head.decode("utf-8", "replace")}
        )
    return [_delivery(endpoint, made.get(endpoint["endpoint_id"], [])) for endpoint in endpoints]


def _delivery(endpoint: Any, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    runs = {ORIGINAL: ("original", "running")} if _has_original(endpoint, attempts) else {}
    runs |= {
        run_id: (kind(source, after_id, upto_id), state)
        for run_id, source, after_id, upto_id, state in endpoint["runs"]
    }
    fates = [
        {"run": run, "kind": name, "fate": _fate(endpoint, run, state, [a for a in attempts if a["run"] == run])}
        for run, (name, state) in sorted(runs.items())
    ]
    shown = {key: endpoint[key] for key in ("endpoint_id", "name", "url", "state")}
    return shown | {"fate": _overall(fates), "runs": fates, "attempts": attempts}


def _has_original(endpoint: Any, attempts: Sequence[dict[str, Any]]) -> bool:
    return bool(
        endpoint["subscribed"] or endpoint["discarded"] or any(attempt["run"] == ORIGINAL for attempt in attempts)
        or any(run == ORIGINAL for _, run, _, _ in endpoint["dead_letters"])
    )  # fmt: skip


def _overall(fates: Sequence[dict[str, Any]]) -> str:
    """A delivery has succeeded if any of its runs has; else it stands where the newest does."""
    for one in fates:
        if one["fate"] == "delivered":
            return "delivered" if one["run"] == ORIGINAL else f"delivered by {_name(one)}"
    newest = fates[-1]
    return str(newest["fate"]) if newest["run"] == ORIGINAL else f"{_name(newest)}: {newest['fate']}"


def _name(one: dict[str, Any]) -> str:
    return f"{one['kind']} (run {one['run']})"


def _fate(endpoint: Any, run: int, run_state: str, attempts: Sequence[dict[str, Any]]) -> str:
    """Say how one delivery stands in one run."""
    if any(attempt["fault"] is None for attempt in attempts):
        return "delivered"
    for letter_id, letter_run, state, resent_run in endpoint["dead_letters"]:
        if letter_run == run:
            after = {"open": "", "resent": f", taken up by run {resent_run}"}.get(state, f", {state}")
            return f"dead letter {letter_id}{after}"
    expired = next((attempt for attempt in attempts if attempt["number"] == 0), None)
    if expired is not None:
        return "expired, unsent" if len(attempts) == 1 else f"expired after {len(attempts) - 1} failed"
    if run_state == "canceled":
        return "canceled" if not attempts else "failed, then canceled"
    for retry_run, number, due_at in endpoint["retries"]:
        if retry_run == run and endpoint["state"] != "deleted":
            held = _held(endpoint, run_state)
            return f"waiting for attempt {number}, due {due_at:%Y-%m-%d %H:%M:%S} UTC{f' ({held})' if held else ''}"
    if endpoint["discarded"]:
        return f"{'failed, then' if attempts else 'not sent:'} {endpoint['discarded']}"
    if endpoint["filtered"] and run == ORIGINAL and not attempts:
        return "not sent: its filters leave this event out"
    if attempts and endpoint["state"] == "live":
        return "in progress"
    return _held(endpoint, run_state) or "waiting"


def _held(endpoint: Any, run_state: str) -> str | None:
    if endpoint["state"] == "deleted":
        return "not sent: the endpoint was deleted"
    if endpoint["state"] != "live":
        return f"held: the endpoint is {endpoint['state']}"
    return "held: the run is paused" if run_state == "paused" else None
