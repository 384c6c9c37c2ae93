"""Replays, runs and dead letters: what failed, sent again."""

from dataclasses import asdict
from typing import Any

import orjson

from dispatcher.errors import InputError
from dispatcher.store import dead_letters, runs
from dispatcher.store.dead_letters import Filter
from dispatcher.store.runs import RunView, Selection
from dispatcher.store.session import Connection
from dispatcher.web.api.models import base
from dispatcher.web.api.models import recovery as models
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import after_id, page


async def count_replay(call: Call) -> Any:
    """Count what a replay would send

    Start it with the `after_id` and `upto_id` of the answer, and it is exactly this."""
    async with call.visit.db() as db:
        return _counted(await _select(call, db, call.query))


async def start_replay(call: Call) -> Any:
    """Send a range of an endpoint's events again

    What failed for good, or all of them. It runs behind fresh events, at its rate, and can be followed, paused and canceled."""
    body: models.NewReplay = call.body
    async with call.visit.db(long=True) as db:
        selection = await _select(call, db, body)
        run = await runs.create(db, selection, _rate(body, call), body.note)
    call.visit.subject += f" run_id={run.id}"
    return run.as_dict()


async def list_runs(call: Call) -> Any:
    """List resends and replays

    In the order in which they were made."""
    query: models.RunFilter = call.query
    async with call.visit.db() as db:
        found = await runs.find(
            db, endpoint_id=query.endpoint_id, account_id=query.account_id, state=query.state, after=after_id(query.cursor),
            limit=query.limit, by=call.principal,
        )  # fmt: skip
    return page([run.as_dict() for run in found], query.limit, "id")


async def show_run(call: Call) -> Any:
    """Show how far a resend or replay is"""
    async with call.visit.db() as db:
        run = await runs.get(db, call.path["run_id"], by=call.principal)
        due = await runs.next_due(db, run.id) if run.retrying else None
    return run.as_dict() | {"next_retry_at": due}


async def pause_run(call: Call) -> Any:
    """Hold a resend or replay, its retries too"""
    async with call.visit.db() as db:
        return _run(await runs.pause(db, call.path["run_id"], by=call.principal))


async def resume_run(call: Call) -> Any:
    """Go on with a paused resend or replay"""
    async with call.visit.db() as db:
        return _run(await runs.resume(db, call.path["run_id"], by=call.principal))


async def cancel_run(call: Call) -> Any:
    """End a resend or replay for good

    What it hasn't delivered is not sent; dead letters that it took are open again."""
    async with call.visit.db(long=True) as db:
        return _run(await runs.cancel(db, call.path["run_id"], by=call.principal))


async def change_run_rate(call: Call) -> Any:
    """Give a resend or replay another rate"""
    runs.check_rate(call.body.rate_per_s, by=call.principal, most=call.visit.web.settings.replay_rate_per_s)
    async with call.visit.db() as db:
        return _run(await runs.set_rate(db, call.path["run_id"], call.body.rate_per_s, by=call.principal))


async def list_dead_letters(call: Call) -> Any:
    """List dead letters

    In the order in which they were given up, without their data."""
    query: models.LetterFilter = call.query
    chosen = _filter(query, state=None if query.state == "all" else query.state)
    async with call.visit.db() as db:
        rows = await dead_letters.find(db, chosen, after=after_id(query.cursor), limit=query.limit, by=call.principal)
    return page(rows, query.limit, "id")


async def show_dead_letter(call: Call) -> Any:
    """Show a dead letter with its data and attempts"""
    async with call.visit.db() as db:
        shown = await dead_letters.show(db, call.path["letter_id"], by=call.principal)
    return shown | {"data": None if shown["payload"] is None else orjson.loads(shown["payload"])}


async def resend_dead_letters(call: Call) -> Any:
    """Send dead letters again

    Those named, or with `all` those that the filters choose; from their own copies. Each endpoint gets one run; to whom nothing can be sent
    is told as `skipped`."""
    body: models.ResendLetters = call.body
    rate = _rate(body, call)
    async with call.visit.db(long=True) as db:
        chosen, totals = await dead_letters.total(db, _selected(body), by=call.principal)
        made, skipped = await dead_letters.resend_each(db, chosen, totals, rate, body.note)
    call.visit.subject = "runs=" + ",".join(str(run.id) for run in made)
    return {"data": [run.as_dict() for run in made], "skipped": skipped}


async def discard_dead_letters(call: Call) -> Any:
    """Give up dead letters for good

    With their data. What happened to them stays on record."""
    body: models.LetterSelection = call.body
    async with call.visit.db(long=True) as db:
        chosen, _ = await dead_letters.total(db, _selected(body), by=call.principal)
        return {"discarded": await dead_letters.discard(db, chosen)}


async def _select(call: Call, db: Connection, wanted: models.ReplayRange) -> Selection:
    return await runs.select(
        db, call.endpoint_id, since=wanted.since, until=wanted.until, after_id=wanted.after_id, upto_id=wanted.upto_id,
        patterns=wanted.types, only_failed=wanted.only_failed, by=call.principal, timeout_s=call.visit.web.settings.web_statement_timeout_s,
    )  # fmt: skip


def _counted(selection: Selection) -> dict[str, Any]:
    return asdict(selection) | {"endpoint_id": selection.target.id}


def _rate(body: models.NewReplay | models.ResendLetters, call: Call) -> float | None:
    if body.unlimited and body.rate_per_s is not None:
        raise InputError("give a rate, or say that it is unlimited", field="unlimited")
    usual = call.visit.web.settings.replay_rate_per_s
    rate_per_s = None if body.unlimited else usual if body.rate_per_s is None else body.rate_per_s
    runs.check_rate(rate_per_s, by=call.principal, most=usual)
    return rate_per_s


def _filter(chosen: models.LetterChoice, *, state: str | None) -> Filter:
    return Filter(
        endpoint_id=chosen.endpoint_id, account_id=chosen.account_id, patterns=tuple(chosen.types), since=chosen.since, until=chosen.until,
        fault=chosen.fault, status=chosen.status, reason=chosen.reason, state=state,
    )  # fmt: skip


def _selected(body: models.LetterSelection) -> Filter:
    """Ids, or all that the filters leave; never both."""
    filters = body.model_fields_set - {"ids", "all", "note", "rate_per_s", "unlimited"}
    if bool(body.ids) == body.all or (body.ids and filters):
        raise InputError("name dead letters by their ids, or choose them with filters and all: true", field="ids")
    if body.ids:
        return Filter(ids=tuple(dict.fromkeys(body.ids)))
    return _filter(body, state="open")


def _run(run: RunView) -> dict[str, Any]:
    return run.as_dict()


_RUN = "/runs/{run_id}"
_REPLAYS = "/endpoints/{endpoint_id}/replays"

OPERATIONS = (
    Operation("GET", f"{_REPLAYS}/count", count_replay, "Recovery", models.ReplayCount, models.ReplayRange),
    Operation("POST", _REPLAYS, start_replay, "Recovery", models.RunAnswer, body=models.NewReplay, status=201, change="replay.start"),
    Operation("GET", "/runs", list_runs, "Recovery", base.Page[models.RunAnswer], models.RunFilter),
    Operation("GET", _RUN, show_run, "Recovery", models.RunAnswer),
    Operation("POST", f"{_RUN}/pause", pause_run, "Recovery", models.RunAnswer, change="run.pause"),
    Operation("POST", f"{_RUN}/resume", resume_run, "Recovery", models.RunAnswer, change="run.resume"),
    Operation("POST", f"{_RUN}/cancel", cancel_run, "Recovery", models.RunAnswer, change="run.cancel"),
    Operation("PATCH", _RUN, change_run_rate, "Recovery", models.RunAnswer, body=models.RateChange, change="run.rate"),
    Operation("GET", "/dead-letters", list_dead_letters, "Recovery", base.Page[models.LetterRow], models.LetterFilter),
    Operation("GET", "/dead-letters/{letter_id}", show_dead_letter, "Recovery", models.LetterAnswer),
    Operation(
        "POST", "/dead-letters/resend", resend_dead_letters, "Recovery", models.Runs, body=models.ResendLetters, status=201,
        change="dead_letter.resend",
    ),
    Operation(
        "POST", "/dead-letters/discard", discard_dead_letters, "Recovery", models.Discarded, body=models.LetterSelection,
        change="dead_letter.discard",
    ),
)  # fmt: skip
