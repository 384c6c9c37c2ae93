"""Recover: a range of an endpoint's events sent once more. Choose and count first, start, and follow it to its end."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError, InputError
from dispatcher.store import runs
from dispatcher.store.endpoint import EndpointView
from dispatcher.store.runs import RunView, Selection
from dispatcher.store.session import Connection
from dispatcher.web.api.paging import before_id
from dispatcher.web.panel import filters
from dispatcher.web.problems import ProblemError
from dispatcher.web.streams import Message
from dispatcher.web.visit import Route, Visit

ROWS = 30
FIELDS = ("since", "until", "type", "what")
WHAT = {"failed": "only what failed for good", "all": "everything, what was delivered too"}
USUAL_SPAN = timedelta(days=1)
_ENDPOINT = "/recover/endpoints/{endpoint_id:[0-9]{1,18}}"
_RUN = "/recover/runs/{run_id:[0-9]{1,9}}"


async def overview(visit: Visit) -> StreamResponse:
    chosen = filters.number(visit.query, "go_to")  # an endpoint from the list
    if chosen is not None:
        return visit.redirect(f"/recover/endpoints/{chosen}")
    cursor, endpoint_id = visit.query.get("cursor"), filters.number(visit.query, "endpoint_id")
    async with visit.db() as db:
        if endpoint_id is not None:
            await visit.admin(db).get(endpoint_id)  # whose it is
        rows = await runs.newest(db, endpoint_id=endpoint_id, before=before_id(cursor), limit=ROWS, by=visit.principal)
        position = str(rows[-1].id) if len(rows) == ROWS else None
        data: dict[str, Any] = {"data": [shown(run) for run in rows], "next": position}
        if visit.wants_json:
            return visit.json(data)
        endpoints = await filters.endpoints_to_choose(visit, db)
    return visit.html(
        "recover.html", **data, endpoints=endpoints, endpoint_id=endpoint_id, is_onward=cursor is not None,
        onward=filters.onward("/recover", visit.query, position),
    )  # fmt: skip


async def endpoint(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        view = await visit.admin(db).get(int(visit.path["endpoint_id"]))
        return await _page(visit, db, view, visit.query)


async def start(visit: Visit) -> StreamResponse:
    """Start what was counted: its ids are in the form, so that it is exactly that."""
    form = visit.form
    endpoint_id = int(visit.path["endpoint_id"])
    async with visit.db(long=True) as db:
        view = await visit.admin(db).get(endpoint_id)
        after_id, upto_id = filters.number(form, "after_id"), filters.number(form, "upto_id")
        if after_id is None or upto_id is None:
            raise InputError("count first what is to be sent", field="upto_id")
        try:
            rate_per_s = rate(visit)
            chosen = await runs.select(
                db, endpoint_id, after_id=after_id, upto_id=upto_id, patterns=filters.types(form), only_failed=_only_failed(form),
                by=visit.principal, timeout_s=visit.web.settings.web_statement_timeout_s,
            )  # fmt: skip
            run = await runs.create(db, chosen, rate_per_s, form.get("note", "").strip())
        except (DispatcherError, ProblemError) as exc:
            problem = visit.web.problem(exc)
            if visit.wants_json or problem.status not in (400, 409):
                raise
            return await _page(visit, db, view, form, problem=problem)
    visit.subject += f" run_id={run.id}"
    return visit.redirect(f"/recover/runs/{run.id}")


async def run(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        found = await runs.get(db, int(visit.path["run_id"]), by=visit.principal)
        due = await runs.next_due(db, found.id) if found.retrying else None
        dispatching = await runs.is_dispatching(db)
    data = {"run": shown(found) | {"next_retry_at": due}, "is_dispatching": dispatching}
    return visit.answer("run.html", data)


async def live(visit: Visit) -> StreamResponse:
    """Stream how far a run is."""
    async with visit.db() as db:
        found = await runs.get(db, int(visit.path["run_id"]), by=visit.principal)

    async def look(db: Connection, seen: dict[str, Any] | None) -> tuple[dict[str, Any], list[Message]]:
        now = shown(await runs.get(db, found.id, by=visit.principal))
        return now, [] if now == seen else [("run", now)]

    return await visit.web.streams.follow(visit, ("run", found.account_id, found.id), look, kept=("run",))


async def pause(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await runs.pause(db, int(visit.path["run_id"]), by=visit.principal)
    return _back(visit)


async def resume(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        await runs.resume(db, int(visit.path["run_id"]), by=visit.principal)
    return _back(visit)


async def cancel(visit: Visit) -> StreamResponse:
    async with visit.db(long=True) as db:  # dead letters that it took are opened again, page by page
        await runs.cancel(db, int(visit.path["run_id"]), by=visit.principal)
    return _back(visit)


async def change_rate(visit: Visit) -> StreamResponse:
    run_id = int(visit.path["run_id"])
    async with visit.db() as db:
        await runs.get(db, run_id, by=visit.principal)
        await runs.set_rate(db, run_id, rate(visit), by=visit.principal)
    return _back(visit)


def shown(run: RunView) -> dict[str, Any]:
    """Return a run as pages show it. `done` of its total have been attempted."""
    return run.as_dict() | {"is_open": run.is_open, "done": min(run.attempted, run.total)}


def rate(visit: Visit) -> float | None:
    """Read a form's rate; `unlimited` is ticked for none, and an empty field is the usual one, which is the most that an account may have."""
    usual, text = visit.web.settings.replay_rate_per_s, filters.word(visit.form, "rate_per_s")
    try:
        wanted = None if "unlimited" in visit.form else usual if text is None else float(text)
    except ValueError as exc:
        raise InputError(f"{text!r} is no rate: a number of deliveries a second", field="rate_per_s") from exc
    runs.check_rate(wanted, by=visit.principal, most=usual)
    return wanted


async def _page(
    visit: Visit, db: Connection, view: EndpointView, given: Mapping[str, str], *, problem: ProblemError | None = None
) -> StreamResponse:
    counted: Selection | None = None
    if problem is None and "what" in given:
        try:
            counted = await _count(visit, db, view.id, given)
        except (DispatcherError, ProblemError) as exc:
            problem = visit.web.problem(exc)
            if visit.wants_json or problem.status not in (400, 409):
                raise
    made = await runs.newest(db, endpoint_id=view.id, limit=ROWS, by=visit.principal)
    data: dict[str, Any] = {
        "endpoint": {"id": view.id, "name": view.config["name"], "url": view.config["url"], "state": view.state,
                     "account_id": view.account_id, "dead_letters": view.dead_letters, "failing_since": view.failing_since},
        "count": None if counted is None else {
            "after_id": counted.after_id, "upto_id": counted.upto_id, "patterns": counted.patterns, "only_failed": counted.only_failed,
            "total": counted.total,
        },
        "runs": [shown(run) for run in made],
    }  # fmt: skip
    if visit.wants_json:
        return visit.json(data)
    usual = (view.failing_since or await visit.admin(db).now() - USUAL_SPAN).strftime("%Y-%m-%dT%H:%M")
    chosen = (
        {name: given.get(name, "") for name in FIELDS}
        if "what" in given
        else {"since": usual, "until": "", "type": "", "what": "failed"}
    )
    return visit.html(
        "recover_endpoint.html", status=200 if problem is None else problem.status, problem=problem, chosen=chosen, what=WHAT,
        usual_rate=visit.web.settings.replay_rate_per_s, **data,
    )  # fmt: skip


async def _count(visit: Visit, db: Connection, endpoint_id: int, given: Mapping[str, str]) -> Selection:
    return await runs.select(
        db, endpoint_id, since=filters.moment(given, "since"), until=filters.moment(given, "until"), patterns=filters.types(given),
        only_failed=_only_failed(given), by=visit.principal, timeout_s=visit.web.settings.web_statement_timeout_s,
    )  # fmt: skip


def _back(visit: Visit) -> StreamResponse:
    return visit.redirect(f"/recover/runs/{visit.path['run_id']}")


def _only_failed(given: Mapping[str, str]) -> bool:
    what = filters.one_of(given, "what", tuple(WHAT))
    return what != "all"


ROUTES = (
    Route("GET", "/recover", overview),
    Route("GET", _ENDPOINT, endpoint),
    Route("POST", _ENDPOINT, start, change="replay.start"),
    Route("GET", _RUN, run),
    Route("GET", f"{_RUN}/live", live),
    Route("POST", f"{_RUN}/pause", pause, change="run.pause"),
    Route("POST", f"{_RUN}/resume", resume, change="run.resume"),
    Route("POST", f"{_RUN}/cancel", cancel, change="run.cancel"),
    Route("POST", f"{_RUN}/rate", change_rate, change="run.rate"),
)
