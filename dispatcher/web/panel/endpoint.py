"""One endpoint: how it stands and why, what can be done about it, its secrets, and what it has got lately, live."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp.web import StreamResponse

from dispatcher.domain.principal import OPERATOR
from dispatcher.domain.shape import HIDDEN
from dispatcher.domain.text import amount
from dispatcher.errors import InputError, NotFoundError
from dispatcher.store import search, stats
from dispatcher.store.admin import OVERLAP_S, Admin
from dispatcher.store.endpoint import EndpointView
from dispatcher.store.session import Connection
from dispatcher.store.stats import Point
from dispatcher.web.api.endpoints import shown_secrets
from dispatcher.web.panel.charts import Chart, Lines, bars, lines
from dispatcher.web.panel.standing import standing
from dispatcher.web.problems import ProblemError
from dispatcher.web.streams import Looked
from dispatcher.web.visit import Route, Visit, Who

if TYPE_CHECKING:
    from dispatcher.web.app import Web

SPANS = {
    "hour": ("hour", 60, 1),
    "day": ("24 hours", 1_440, 5),
    "week": ("7 days", 10_080, 60),
}  # name, minutes, minutes a bar
RECENT = 20
LIVE_EVERY_S = 2.0
TAIL_IDS = 2_000  # of the log's newest, where a live list looks for new attempts
TAIL_ROWS = 500  # the newest of them, of all endpoints that are looked at together: to read twice as many holds the loop for 4 ms
TAIL_BACK = timedelta(seconds=15)  # an attempt is known when it has ended, not when it began
EXPIRED_EVERY = 30  # looks: what is summed over a day doesn't change by the second
OVERLAPS = ((0.0, "none: the old one ends now"), (3_600.0, "an hour"), (OVERLAP_S, "a day"), (7 * 86_400.0, "a week"))
SNIPPETS = {
    title: Path(__file__).with_name("snippets").joinpath(f"{title.lower()}.txt").read_text()
    for title in ("Python", "JavaScript", "PHP", "Go", "Ruby", "curl", "Python, v1a", "JavaScript, v1a")
}
_PATH = "/endpoints/{endpoint_id:[0-9]{1,18}}"


def _snippets(view: EndpointView) -> dict[str, str]:
    """Return the code that checks what the endpoint is signed in."""
    schemes = view.config["signing"].split(",")
    return {title: text for title, text in SNIPPETS.items() if ("v1a" if title.endswith("v1a") else "v1") in schemes}


async def endpoint(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        try:
            view = await visit.admin(db).get(_id(visit))
        except NotFoundError:
            gone = None if visit.wants_json else await visit.admin(db).deleted(_id(visit))
            if gone is None:
                raise
            return visit.html("endpoint_deleted.html", status=410, endpoint=gone)
        return await _page(visit, db, view)


async def pause(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await visit.admin(db).pause(_id(visit), skip="skip" in visit.form)
    return _back(visit)


async def resume(visit: Visit) -> StreamResponse:
    return await _go_on(visit, Admin.resume)


async def enable(visit: Visit) -> StreamResponse:
    return await _go_on(visit, Admin.enable)


async def disable(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await visit.admin(db).disable(_id(visit), visit.form.get("reason", "").strip() or None)
    return _back(visit)


async def delete(visit: Visit) -> StreamResponse:
    if "sure" not in visit.form:
        raise InputError("say that you are sure: what waits for this endpoint is never sent", field="sure")
    async with visit.db(long=True) as db:
        await visit.admin(db).delete(_id(visit))
    return visit.redirect("/endpoints")


async def reveal(visit: Visit) -> StreamResponse:
    """Answer with the page and the secrets in it: a POST, so that the audit has it and no address leads there again."""
    async with visit.db() as db:
        view = await visit.admin(db).get(_id(visit))
        return await _page(visit, db, view, revealed=shown_secrets(view))


async def rotate(visit: Visit) -> StreamResponse:
    try:
        overlap_s = float(visit.form.get("overlap_s", OVERLAP_S))
    except ValueError as exc:
        raise InputError("an overlap is a number of seconds", field="overlap_s") from exc
    async with visit.db() as db:
        await visit.admin(db).rotate_secret(_id(visit), overlap_s=overlap_s)
    return visit.redirect(f"/endpoints/{_id(visit)}#secrets")


_NOT_REVEALED = dict.fromkeys(("secrets", "extra_signature_key", "proposed_extra_signature_key"))


class _Seen(NamedTuple):
    attempts: Collection[Any]
    stands: dict[str, Any]
    expired_24h: int
    looks: int


_NOTHING_SEEN = _Seen((), {}, 0, 0)


async def live(visit: Visit) -> StreamResponse:
    """Stream the endpoint's attempts as they are recorded, and how it stands when that changes."""
    async with visit.db() as db:
        view = await visit.admin(db).get(_id(visit))
    topic = (view.account_id, view.id)
    return await visit.web.streams.follow_one_of(
        visit, "endpoints", topic, partial(_look, visit.web), every_s=LIVE_EVERY_S, kept=("standing",), repeated=("attempt",)
    )  # fmt: skip


async def _look(web: "Web", db: Connection, seen: dict[tuple[str, int], _Seen | None]) -> dict[Any, Looked]:
    """Look at all endpoints that are watched. Each stream was asked whose its endpoint is: of one that belongs to another account now it is
    told no more."""
    admin = Admin(db, web.settings, OPERATOR)
    ids = [endpoint_id for _, endpoint_id in seen]
    attempts: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = defaultdict(dict)
    for row in await admin.events.tail(TAIL_BACK, ids, TAIL_IDS, TAIL_ROWS):
        attempts[row["endpoint_id"]][row["event_id"], row["run"], row["number"]] = row
    last = {topic: before or _NOTHING_SEEN for topic, before in seen.items()}
    stale = [endpoint_id for (_, endpoint_id), before in last.items() if before.looks % EXPIRED_EVERY == 0]
    expired = dict.fromkeys(stale, 0) | (await admin.expired_24h(stale) if stale else {})
    found: dict[Any, Looked] = {}
    for stands in await admin.stands(ids):
        topic = (stands.account_id, stands.endpoint_id)
        if topic not in last:
            continue
        before, rows = last[topic], attempts[stands.endpoint_id]
        expired_24h = expired.get(stands.endpoint_id, before.expired_24h)
        now = standing(web.lane_health, stands, expired_24h)
        messages = [("attempt", row) for key, row in rows.items() if key not in before.attempts]
        if now != before.stands:
            messages.append(("standing", now))
        found[topic] = _Seen(frozenset(rows), now, expired_24h, before.looks + 1), messages
    return found


async def _page(
    visit: Visit, db: Connection, view: EndpointView, *, revealed: dict[str, Any] | None = None
) -> StreamResponse:
    span = visit.query.get("span", "day")
    if span not in SPANS:
        raise ProblemError(400, f"there is no span {span!r}: {', '.join(SPANS)}", field="span")
    words, minutes, step_min = SPANS[span]
    details = await visit.admin(db).details(view)
    until = view.read_at
    since = until - timedelta(minutes=minutes - 1)
    points = await stats.series(db, view.id, since, until, step_min)
    recent = await search.deliveries(db, visit.principal, endpoint_id=view.id, limit=RECENT)
    stands = standing(visit.web.lane_health, view.stands, view.expired)
    settings = visit.web.settings
    data: dict[str, Any] = {
        "endpoint": view.as_dict() | details.as_dict(), "span": span, "standing": stands,
        "recent": recent.rows, "searched": asdict(recent.searched), **(revealed or _NOT_REVEALED),
        "retry_schedule_s": view.config["retry_schedule_s"] or list(settings.retry_schedule_s),
        "source_addresses": [one.strip() for one in settings.source_addresses.split(",") if one.strip()],
    }  # fmt: skip
    if visit.wants_json:
        shown = [point.stats.as_dict() | {"at": point.at, "backlog": point.backlog} for point in points]
        return visit.json(data | {"points": shown})
    signing = [
        {
            "scheme": known.scheme,
            "public_key": known.public_key,
            "created_at": known.created_at,
            "expires_at": known.expires_at,
        }
        for known in view.signing
    ]
    steps = _steps(points, since, minutes, step_min)
    # The template calls for its charts one by one: a millisecond each, between which deliveries go on.
    return visit.html(
        "endpoint.html", **data, has_points=bool(points), attempts_chart=lambda: _chart(steps, since, words),
        latency_chart=lambda: _latency(steps, words), backlog_chart=lambda: _backlog(steps, words), step_min=step_min,
        since=since, until=until, spans=SPANS, signing=signing, overlaps=OVERLAPS, snippets=_snippets(view), hidden=HIDDEN,
    )  # fmt: skip


def _steps(points: Sequence[Point], since: datetime, minutes: int, step_min: int) -> list[Point | None]:
    """Return a span's steps in order, None where nothing happened."""
    step_s = step_min * 60
    first = int(since.timestamp()) // step_s
    by_step = {int(point.at.timestamp()) // step_s - first: point for point in points}
    return [by_step.get(n) for n in range(minutes // step_min + 1)]


def _chart(steps: Sequence[Point | None], since: datetime, words: str) -> Chart:
    counts = [(0, 0) if point is None else (point.stats.delivered, point.stats.failed) for point in steps]
    span = f"in the last {words}, since {since.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return bars(counts, width=720, height=120, span=span)


def _latency(steps: Sequence[Point | None], words: str) -> Lines:
    p50 = [None if point is None else point.stats.p50_ms for point in steps]
    p95 = [None if point is None else point.stats.p95_ms for point in steps]
    known = [value for value in p95 if value is not None]
    said = f"p95 of latency between {min(known):,} and {max(known):,} ms" if known else "no latency is known"
    return lines({"p95": p95, "p50": p50}, width=720, height=80, log=True, words=f"{said} in the last {words}")


def _backlog(steps: Sequence[Point | None], words: str) -> Lines:
    waited = [None if point is None else point.backlog for point in steps]
    most = max((value for value in waited if value is not None), default=0)
    said = f"at most {amount(most, 'event')} waited for their first attempt in the last {words}"
    return lines({"waiting": waited}, width=720, height=80, words=said)


async def _go_on(visit: Visit, verb: Any) -> StreamResponse:
    choice = visit.form.get("choice") or None
    if choice not in (None, "send", "skip"):
        raise InputError("what was held is to send or to skip", field="choice")
    async with visit.db(long=True) as db:  # what is skipped is counted to its end
        await verb(visit.admin(db), _id(visit), choice)
    return _back(visit)


def _back(visit: Visit) -> StreamResponse:
    return visit.redirect(f"/endpoints/{_id(visit)}")


def _id(visit: Visit) -> int:
    return int(visit.path["endpoint_id"])


ROUTES = (
    Route("GET", _PATH, endpoint),
    Route("GET", f"{_PATH}/live", live),
    Route("POST", f"{_PATH}/pause", pause, change="endpoint.pause"),
    Route("POST", f"{_PATH}/resume", resume, change="endpoint.resume"),
    Route("POST", f"{_PATH}/enable", enable, change="endpoint.enable"),
    Route("POST", f"{_PATH}/disable", disable, Who.OPERATOR, change="endpoint.disable"),
    Route("POST", f"{_PATH}/delete", delete, change="endpoint.delete"),
    Route("POST", f"{_PATH}/secrets", reveal, change="endpoint.reveal_secrets"),
    Route("POST", f"{_PATH}/rotate-secret", rotate, change="endpoint.rotate_secret"),
)
