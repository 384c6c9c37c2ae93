"""Dead letters: what was given up, with its own copy of the event. Sent again, or given up for good; one by one, ticked, or all that fit."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aiohttp.web import StreamResponse

from dispatcher.errors import DispatcherError, InputError
from dispatcher.store import dead_letters, search
from dispatcher.store.dead_letters import STATES, Filter
from dispatcher.store.search import Found
from dispatcher.store.session import Connection
from dispatcher.web.api.paging import before_id
from dispatcher.web.panel import filters
from dispatcher.web.panel.recover import rate, shown
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Route, Visit

ROWS = 30  # to render 50 holds the loop for over 5 ms
SHOWN_MAX = 50  # attempts of a letter's delivery: the newest
DATA_CHARS_MAX = 16_384
FIELDS = ("endpoint_id", "type", "state", "account_id")
SHOWN_STATES = (*STATES, "all")


async def letters(visit: Visit) -> StreamResponse:
    given = visit.query
    found, problem = Found([], search.Searched(0, None, True), None), None
    async with visit.db() as db:
        try:
            found = await _find(visit, db, given)
        except (DispatcherError, ProblemError) as exc:
            problem = visit.web.problem(exc)
            if visit.wants_json or problem.status not in (400, 404):
                raise
        if visit.wants_json:
            return visit.json({"data": found.rows, "next": found.next, "searched": asdict(found.searched)})
        endpoints = await filters.endpoints_to_choose(visit, db)
    chosen = {name: given.get(name, "") for name in FIELDS} | {"state": given.get("state") or "open"}
    return visit.html(
        "dead_letters.html", status=200 if problem is None else problem.status, data=found.rows, searched=found.searched, problem=problem,
        onward=filters.onward("/dead-letters", given, found.next), filters=chosen, endpoints=endpoints, states=SHOWN_STATES,
        names=None if endpoints is None else {one["id"]: one["name"] for one in endpoints},
        is_filtered=any(given.get(name) for name in FIELDS), is_onward="cursor" in given,
    )  # fmt: skip


async def all_that_fit(visit: Visit) -> StreamResponse:
    """Count what a choice comes to, endpoint by endpoint, before anything is done with it."""
    given = visit.query
    async with visit.db() as db:
        chosen, totals = await dead_letters.total(
            db, _filter(given), by=visit.principal, timeout_s=visit.web.settings.web_statement_timeout_s
        )
    data: dict[str, Any] = {
        "upto_id": chosen.upto_id,
        "letters": sum(one.letters for one in totals),
        "endpoints": [
            {"endpoint_id": one.endpoint_id, "state": one.endpoint_state, "url": one.url, "letters": one.letters, "why_not": one.why_not}
            for one in totals[:ROWS]
        ],
        "more": max(0, len(totals) - ROWS),
        "can_send": sum(one.letters for one in totals if one.why_not is None),
    }  # fmt: skip
    if visit.wants_json:
        return visit.json(data)
    return visit.html(
        "dead_letters_all.html", **data, filters={name: given.get(name, "") for name in FIELDS},
        usual_rate=visit.web.settings.replay_rate_per_s,
    )  # fmt: skip


async def letter(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        found = await dead_letters.show(db, int(visit.path["letter_id"]), by=visit.principal)
    text = found.pop("payload")
    data = {
        "letter": found | {"made": found["made"][-SHOWN_MAX:]},
        "data": None if text is None else text[:DATA_CHARS_MAX],
        "data_is_cut": text is not None and len(text) > DATA_CHARS_MAX,
    }
    return visit.answer("dead_letter.html", data)


async def resend(visit: Visit) -> StreamResponse:
    """Send the chosen ones again: a run for each endpoint."""
    rate_per_s = rate(visit)
    async with visit.db(long=True) as db:
        chosen, totals = await dead_letters.total(db, _selected(visit), by=visit.principal)
        if not totals:
            raise InputError("no open dead letter fits any more")
        note = visit.form.get("note", "").strip()
        made, skipped = await dead_letters.resend_each(db, chosen, totals, rate_per_s, note)
    visit.subject = "runs=" + ",".join(str(run.id) for run in made)
    if skipped:
        return visit.answer("dead_letters_sent.html", {"runs": [shown(run) for run in made], "skipped": skipped})
    return visit.redirect(f"/recover/runs/{made[0].id}" if len(made) == 1 else "/recover")


async def discard(visit: Visit) -> StreamResponse:
    """Give the chosen ones up for good."""
    if "sure" not in visit.form:
        raise InputError("say that you are sure: what is discarded can't be sent any more", field="sure")
    async with visit.db(long=True) as db:
        chosen, _ = await dead_letters.total(db, _selected(visit), by=visit.principal)
        count = await dead_letters.discard(db, chosen)
    visit.subject = f"discarded={count}"
    return visit.redirect("/dead-letters")


async def _find(visit: Visit, db: Connection, given: Mapping[str, str]) -> Found:
    state = filters.one_of(given, "state", SHOWN_STATES) or "open"
    return await dead_letters.newest(
        db, endpoint_id=filters.number(given, "endpoint_id"), account_id=filters.word(given, "account_id"),
        patterns=filters.types(given), state=None if state == "all" else state, before=before_id(given.get("cursor")), limit=ROWS,
        by=visit.principal,
    )  # fmt: skip


def _filter(given: Mapping[str, str], *, upto_id: int | None = None) -> Filter:
    return Filter(
        endpoint_id=filters.number(given, "endpoint_id"), account_id=filters.word(given, "account_id"),
        patterns=tuple(filters.types(given)), upto_id=upto_id,
    )  # fmt: skip


def _selected(visit: Visit) -> Filter:
    """Read which: the one in the address, those ticked, or all that fit up to where they were counted."""
    if "letter_id" in visit.path:
        return Filter(ids=(int(visit.path["letter_id"]),))
    visit.principal.within(filters.word(visit.form, "account_id"))
    if "all" in visit.form:
        return _filter(visit.form, upto_id=filters.number(visit.form, "upto_id"))
    ids = [filters.number({"id": one}, "id") for one in visit.form_list("id")]
    if not ids:
        raise InputError("tick at least one dead letter", field="id")
    return Filter(ids=tuple(dict.fromkeys(one for one in ids if one is not None)))


_PATH = "/dead-letters/{letter_id:[0-9]{1,18}}"

ROUTES = (
    Route("GET", "/dead-letters", letters),
    Route("GET", "/dead-letters/all", all_that_fit),
    Route("POST", "/dead-letters/resend", resend, change="dead_letter.resend"),
    Route("POST", "/dead-letters/discard", discard, change="dead_letter.discard"),
    Route("GET", _PATH, letter),
    Route("POST", f"{_PATH}/resend", resend, change="dead_letter.resend"),
    Route("POST", f"{_PATH}/discard", discard, change="dead_letter.discard"),
)
