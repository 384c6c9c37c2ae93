"""The operator's first page: how much is delivered, what waits and where, who delivers, and how the database is. Live.

Rates are of the ids that the log grew by and was settled by, which the database tells whoever delivers; POSTs in flight, breakers and
unwritten results are in the delivering process's memory, so they are known only where panel and engine are one process (`web.vitals`).
Figures go to the page and to its stream as the same words, by name.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.domain.text import amount
from dispatcher.store.session import Connection
from dispatcher.web.streams import Message
from dispatcher.web.visit import Route, Visit, Who

LIVE_EVERY_S = 2.0
WINDOW = 6  # looks that a rate is of
UNKNOWN = "not known here"


async def overview(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        known = await visit.web.overview.get(db)
        minutes = await visit.web.minutes.get(db)
    data = known | {"minutes": minutes, "vitals": known["vitals"] or None}
    if visit.wants_json:
        return visit.json(data)
    return visit.html("overview.html", **data, groups=GROUPS, figures=figures(known, minutes, {}))


class _Seen:
    """What the stream remembers from look to look."""

    def __init__(self) -> None:
        self.points: deque[tuple[float, dict[str, float]]] = deque(maxlen=WINDOW)


async def live(visit: Visit) -> StreamResponse:
    """Stream the figures. What all operators see is the same, so they share one look."""

    async def look(db: Connection, seen: _Seen | None) -> tuple[_Seen, list[Message]]:
        seen = seen or _Seen()
        minutes = await visit.web.minutes.get(db)
        known = await visit.web.overview.get(db)
        service = known["service"]
        counts = {"events": service["log"]["last_id"], "settled": service["log"]["position"], **known["vitals"]}
        seen.points.append((service["now"].timestamp(), counts))
        rates = _rates(seen.points)
        told = {
            "figures": figures(known, minutes, rates),
            "rate": rates.get("delivered", rates.get("settled")),
            "accounts": known["backlog_by_account"],
            "failing": known["failing"],
        }
        return seen, [("look", told)]

    return await visit.web.streams.follow(visit, ("overview",), look, every_s=LIVE_EVERY_S, kept=("look",))


def _rates(points: deque[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Return how much a second the counts have grown by over the window; a count that fell began anew, elsewhere."""
    (began, first), (ended, last) = points[0], points[-1]
    if ended <= began:
        return {}
    return {name: max(0.0, last[name] - first[name]) / (ended - began) for name in first.keys() & last.keys()}


GROUPS = (
    ("Deliveries", (
        ("events_per_s", "Events inserted, now"), ("settled_per_s", "Events settled, now"), ("delivered_per_s", "Delivered"),
        ("failed_per_s", "Failed attempts"), ("in_flight", "POSTs in flight"), ("first_post_p50", "Insert to first POST, p50"),
        ("first_post_p99", "Insert to first POST, p99"),
        ("post_p95", "A POST takes, p95"), ("success", "Success"),
    )),
    ("Waiting", (
        ("behind", "Log not settled yet"), ("oldest", "Oldest undelivered event"), ("backlog", "Behind endpoints that lag"),
        ("retries", "Waiting for a retry"), ("dead_letters", "Given up, open"), ("failing", "Endpoints failing"),
        ("breakers", "Breakers open"), ("paused", "Paused, disabled"),
    )),
    ("The process that delivers", (
        ("owner", "Delivers"), ("owned_since", "Since"), ("standbys", "Standing by"), ("recorder", "Recorder last wrote"),
        ("unrecorded", "Results not written yet"), ("memory", "Events in memory"),
    )),
    ("Database", (
        ("version", "PostgreSQL"), ("round_trip", "A question takes"), ("connections", "Connections"),
        ("transaction", "Longest transaction"), ("size", "Size"), ("gaps", "Ids not visible yet"),
    )),
)  # fmt: skip


def figures(known: Mapping[str, Any], minutes: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, str]:
    """Return every figure of GROUPS in words. `rates`: of the stream's window; a page just loaded has none yet."""
    vitals = known["vitals"]
    service, database, endpoints, posts = known["service"], known["database"], known["endpoints"], known["first_posts"]
    owner, log, lanes = service["owner"], service["log"], service["lanes"]

    def of_memory(name: str) -> str:
        return f"{vitals[name]:,.0f}" if name in vitals else UNKNOWN

    def per_s(name: str) -> str:
        if name in rates:
            return f"{rates[name]:,.1f}/s"
        return f"{minutes[f'{name}_per_s']:,.1f}/s in {minutes['minutes']} min" if f"{name}_per_s" in minutes else "–"

    return {
        "events_per_s": per_s("events"), "settled_per_s": per_s("settled"), "delivered_per_s": per_s("delivered"),
        "failed_per_s": per_s("failed"), "in_flight": of_memory("in_flight"),
        "first_post_p50": _ms(posts["p50_ms"]), "first_post_p99": _ms(posts["p99_ms"]),
        "post_p95": f"≤ {minutes['p95_ms']:,} ms" if minutes["p95_ms"] else "–",
        "success": "–" if minutes["success_rate"] is None else f"{int(minutes['success_rate'] * 1000) / 10:g} %",
        "behind": amount(log["behind_ids"], "id"), "oldest": _age(log["oldest_undelivered_s"]), "backlog": f"{lanes['backlog']:,}",
        "retries": _bounded(service["retries"]), "dead_letters": _bounded(service["dead_letters"]),
        "failing": f"{endpoints['failing']:,} of {endpoints['live']:,} live", "breakers": of_memory("breakers_open"),
        "paused": f"{endpoints['paused']:,}, {endpoints['disabled']:,}",
        "owner": owner["name"] if owner["state"] == "alive" else f"nobody ({owner['state']})" if owner["name"] else "nobody",
        "owned_since": _age(owner["since_s"], ago=True), "standbys": f"{len(service['standbys'])}",
        "recorder": _age(owner["heartbeat_age_s"], ago=True), "unrecorded": of_memory("unrecorded"),
        "memory": f"{vitals['events_in_memory']:,.0f}, {vitals['bytes_in_memory'] / 1e6:,.1f} MB" if vitals else UNKNOWN,
        "version": database["version"], "round_trip": _ms(database["round_trip_ms"]),
        "connections": f"{database['connections']:,} of {database['connections_max']:,}",
        "transaction": _age(database["longest_transaction_s"]), "size": f"{database['bytes'] / 1e6:,.0f} MB",
        "gaps": f"{log['gap_ids']:,}",
    }  # fmt: skip


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} ms"


def _bounded(count: int) -> str:
    return "more than 100,000" if count > 100_000 else f"{count:,}"


def _age(seconds: float | None, *, ago: bool = False) -> str:
    if seconds is None:
        return "–"
    for unit, of in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * of:
            return f"{seconds / of:.0f} {unit}{' ago' if ago else ''}"
    return f"{seconds:.1f} s{' ago' if ago else ''}"


ROUTES = (
    Route("GET", "/overview", overview, Who.OPERATOR),
    Route("GET", "/overview/live", live, Who.OPERATOR),
)
