"""Add or edit an endpoint: three numbered steps on one page. Save what it is; test exactly that; go live.

What step 1 saves is a draft, or beside a live endpoint an edit that waits; nothing of it is in force. Which test counts, and
that going live needs one, the store decides (store/admin.py): this page only shows it, and an operator may go around it.
"""

import hashlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import orjson
from aiohttp.web import StreamResponse
from pydantic import ValidationError

from dispatcher.domain.shape import CREDENTIALS, SHAPE, shown
from dispatcher.engine.trial import TEST_TYPE
from dispatcher.errors import ForbiddenError, InputError, StateError
from dispatcher.store import event_types, search
from dispatcher.store.endpoint import DEFAULTS, EndpointView
from dispatcher.store.event_types import EventType
from dispatcher.store.session import Connection
from dispatcher.web import trial
from dispatcher.web.api.models import endpoints as models
from dispatcher.web.problems import ProblemError, problem_of_validation
from dispatcher.web.visit import Route, Visit

TYPES_MAX = 1_000
FORM_BYTES_MAX = 131_072
TIMING_WORDS = {
    "dns": "Name look-up",
    "connect": "Connect",
    "tls": "TLS",
    "first_byte": "First byte",
    "total": "In all",
}
FAULT_WORDS = {
    "redirect": "Look at: the address. Nothing was sent on.",
    "certificate": "Look at: the receiver's certificate.",
    "address": "Look at: the URL's host.",
    "timeout": "Look at: how long the receiver works before it answers.",
    "receiver": "Look at: the receiver's server, port and firewall.",
    "answer": "Look at: the receiver's code and its logs.",
}
_ID = "{endpoint_id:[0-9]{1,18}}"
_OPTIONS = (*models.EndpointOptions.model_fields, "url")
_EMPTY = DEFAULTS | SHAPE | CREDENTIALS | {"url": ""}


async def new(visit: Visit) -> StreamResponse:
    """Show an empty form: the types that the catalogue ticks are ticked."""
    async with visit.db() as db:
        types = await event_types.find(db, limit=TYPES_MAX)
    config = _EMPTY | {"event_types": [one.name for one in types if one.default_on] or ["*"]}
    return _page(visit, types, config, account_id=visit.query.get("account_id", ""))


async def create(visit: Visit) -> StreamResponse:
    account_id = visit.form.get("account_id", "").strip() or visit.principal.account_id
    async with visit.db() as db:
        types = await event_types.find(db, limit=TYPES_MAX)
        config = _read(visit, types)
        try:
            if account_id is None:
                raise InputError("say whose endpoint it is", field="account_id")
            view = await visit.admin(db).create(account_id, _checked(config))
        except (InputError, ProblemError) as exc:
            return _page(visit, types, _typed(_EMPTY, config), account_id=account_id or "", problem=exc)
    visit.subject = f"endpoint_id={view.id} account_id={account_id}"
    return visit.redirect(f"/endpoints/{view.id}/setup#test")


async def edit(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        return await _edit_page(visit, db, await visit.admin(db).get(_endpoint_id(visit)))


async def save(visit: Visit) -> StreamResponse:
    async with visit.db() as db:
        admin = visit.admin(db)
        view = await admin.get(_endpoint_id(visit))
        types = await event_types.find(db, limit=TYPES_MAX)
        config = _read(visit, types, shown(view.to_test)["filters"] or ())
        try:
            if visit.form.get("base", _base(view)) != _base(view):
                raise StateError(
                    "somebody has changed it since you opened this page. Below is what you typed: saved again, it replaces theirs"
                )
            await admin.update(view.id, _checked(config))
        except (InputError, ProblemError, StateError) as exc:
            return await _edit_page(visit, db, view, typed=_typed(shown(view.to_test), config), problem=exc)
    return visit.redirect(f"/endpoints/{view.id}/setup#test")


async def test(visit: Visit) -> StreamResponse:
    return await send_test(visit, _endpoint_id(visit), visit.form.get("type") or TEST_TYPE)


async def send_test(visit: Visit, endpoint_id: int, event_type: str) -> StreamResponse:
    """Send one test, and show what came of it."""
    async with visit.db() as db:
        await visit.admin(db).get(endpoint_id)
        await trial.check_tests_lately(db, endpoint_id)
    await trial.try_of(visit, endpoint_id, event_type)
    return visit.redirect(f"/endpoints/{endpoint_id}/setup?type={quote(event_type)}#test")


async def test_types(visit: Visit) -> StreamResponse:
    """Test all chosen types, as far as the minute's bound goes."""
    endpoint_id = _endpoint_id(visit)
    made = await trial.try_types(visit, endpoint_id)
    last = made.tried[-1][0] if made.tried else TEST_TYPE
    return visit.redirect(f"/endpoints/{endpoint_id}/setup?type={quote(last)}#test")


async def go_live(visit: Visit) -> StreamResponse:
    """Put what has been tested in force; with `paused` hold its events from the same moment on."""
    endpoint_id, force = _endpoint_id(visit), "force" in visit.form
    if force and not visit.principal.is_operator:
        raise ForbiddenError("to go live without a test is for operators: test it, then put it live")
    async with visit.db() as db, db.transaction():
        admin = visit.admin(db)
        view = await admin.go_live(endpoint_id, force=force)
        if "paused" in visit.form and view.state == "live":
            await admin.pause(endpoint_id)
    return visit.redirect(f"/endpoints/{endpoint_id}")


async def _edit_page(
    visit: Visit, db: Connection, view: EndpointView, *, typed: dict[str, Any] | None = None, problem: Exception | None = None
) -> StreamResponse:  # fmt: skip
    types = await event_types.find(db, limit=TYPES_MAX)
    event_type = visit.query.get("type", TEST_TYPE)
    tests = await search.past_tests(db, view.id, limit=5)
    try:
        request = await trial.preview(db, visit.web.settings, view, event_type, visit.principal.actor)
        preview, preview_problem = request.decode("utf-8", "replace"), None
    except (
        InputError
    ) as exc:  # a URL that the policy has come to refuse, or no such sample: the form is where that is mended
        preview, preview_problem = None, exc.message
    chosen = trial.chosen_types(types, view.to_test["event_types"])
    known = {} if view.as_dict()["sealed"] else await search.tested_types(db, view.id, view.test_hash)
    config = shown(view.to_test) if typed is None else typed
    return _page(
        visit, types, config, account_id=view.account_id, problem=problem, endpoint=view.as_dict() | {"base": _base(view)},
        tests=[trial.shown_test(row) for row in tests], preview=preview, preview_problem=preview_problem, test_type=event_type,
        chosen={name: known.get(name) for name in chosen},
    )  # fmt: skip


def _base(view: EndpointView) -> str:
    """Return what tells one version of its configuration from another."""
    return hashlib.sha256(orjson.dumps(shown(view.to_test), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _page(
    visit: Visit, types: list[EventType], config: dict[str, Any], *, account_id: str, problem: Exception | None = None,
    endpoint: dict[str, Any] | None = None, tests: list[dict[str, Any]] | None = None, preview: str | None = None,
    preview_problem: str | None = None, test_type: str = TEST_TYPE, chosen: dict[str, Any] | None = None,
) -> StreamResponse:  # fmt: skip
    if problem is not None and visit.wants_json:
        raise problem
    groups: dict[str, list[EventType]] = {}
    for one in types:
        groups.setdefault(one.name.partition(".")[0], []).append(one)
    known = {one.name for one in types}
    data = {
        "account_id": account_id, "config": config, "endpoint": endpoint, "tests": tests or [], "preview": preview,
        "preview_problem": preview_problem, "test_type": test_type, "chosen": chosen or {},
        "groups": {name: [one.as_dict() for one in group] for name, group in groups.items()},
        "filter_names": sorted({name for one in types for name in one.filter_fields} | set(config.get("filters") or ())),
        "other_types": [pattern for pattern in config["event_types"] if pattern not in known],
        "samples": [TEST_TYPE, *(one.name for one in types if one.sample is not None and one.name != TEST_TYPE)],
    }  # fmt: skip
    if visit.wants_json:
        return visit.json(data)
    field = (getattr(problem, "field", None) or "").partition(".")[0]  # event_types.0 is a box of event_types
    said = getattr(problem, "detail", None) or getattr(problem, "message", None)
    return visit.html(
        "setup.html",
        status=200 if problem is None else visit.web.problem(problem).status,
        problem=said,
        field=field,
        timing_words=TIMING_WORDS,
        fault_words=FAULT_WORDS,
        **data,
    )


def _read(visit: Visit, types: list[EventType], filtered: Iterable[str] = ()) -> dict[str, Any]:
    """Return what was typed, as the options that a form has: text where a number was expected stays text, for `_checked` to refuse. `filtered`:
    fields that the endpoint filters by already, which the catalogue may have lost."""
    form = visit.form
    patterns = [*visit.form_list("type"), *_words(form.get("other_types", ""))]
    names = {name for one in types for name in one.filter_fields} | set(filtered)
    filters = {name: _lines(form.get(f"filter.{name}", "")) for name in sorted(names)}
    headers: dict[str, str | None] = dict.fromkeys(visit.form_list("remove_header"))
    for line in _lines(form.get("headers", "")):
        name, colon, value = line.partition(":")
        headers[name.strip()] = value.strip() if colon else ""
    schedule = _words(form.get("retry_schedule_s", ""))
    ordering = form.get("ordering", "off")
    return {
        **_read_credentials(visit),
        "name": form.get("name", "").strip(), "url": form.get("url", "").strip(),
        "event_types": ["*"] if "all_types" in form else list(dict.fromkeys(patterns)),
        "filters": {name: values for name, values in filters.items() if values}, "headers": headers,
        "rate_per_s": _number(form.get("rate_per_s", "")), "rate_burst": _number(form.get("rate_burst", "")),
        "in_flight_max": _number(form.get("in_flight_max", "")),
        "timeout_ms": _number(form.get("timeout_ms", "")) or DEFAULTS["timeout_ms"],
        "retry_schedule_s": [_number(wait) for wait in schedule] or None,
        "signing": form.get("signing", SHAPE["signing"]), "body_format": form.get("body_format", SHAPE["body_format"]),
        "omit": _lines(form.get("omit", "")), "extra_signature": form.get("extra_signature", "").strip() or None,
        "ordering": f"{ordering} {form.get('ordering_attempts', '').strip()}" if ordering == "give_up_after" else ordering,
        "response_control": "response_control" in form,
    }  # fmt: skip


def _read_credentials(visit: Visit) -> dict[str, Any]:
    """Return what was typed of what is never shown, and what is to be taken out; what isn't named stays as it is."""
    form, taken_out = visit.form, visit.form_list("remove")
    given: dict[str, Any] = {name: None for name in ("basic", "bearer", "client_certificate") if name in taken_out}
    for name in ("basic", "bearer", "extra_signature_key"):
        if typed := form.get(name, "").strip():
            given[name] = typed
    for name in ("client_certificate", "client_key"):
        if typed := form.get(name, "").strip():
            given[name] = typed.replace("\r\n", "\n") + "\n"
    return given


def _typed(before: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what the form shows again after an error: what was typed, but for what is never shown."""
    return before | {name: value for name, value in config.items() if name not in CREDENTIALS}


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the API would take them, or refuse them with the field's name."""
    if (
        config["extra_signature"] is None and "extra_signature_key" in config
    ):  # which taking the signature out would take too
        raise InputError(
            "extra_signature_key means nothing without extra_signature; give both", field="extra_signature_key"
        )
    try:
        body = models.EndpointChange.model_validate(config)
    except ValidationError as exc:
        raise problem_of_validation(exc, "form") from exc
    return {name: getattr(body, name) for name in _OPTIONS if name in body.model_fields_set}


def _endpoint_id(visit: Visit) -> int:
    return int(visit.path["endpoint_id"])


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _number(text: str) -> float | int | str | None:
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return int(text) if len(text) <= 18 else text
    try:
        return float(text) if text else None
    except ValueError:
        return text


ROUTES = (
    Route("GET", "/endpoints/new", new),
    Route("POST", "/endpoints/new", create, change="endpoint.create", body_bytes_max=FORM_BYTES_MAX),
    Route("GET", f"/endpoints/{_ID}/setup", edit),
    Route("POST", f"/endpoints/{_ID}/setup", save, change="endpoint.change", body_bytes_max=FORM_BYTES_MAX),
    Route("POST", f"/endpoints/{_ID}/test", test, change="endpoint.test"),
    Route("POST", f"/endpoints/{_ID}/test-types", test_types, change="endpoint.test"),
    Route("POST", f"/endpoints/{_ID}/go-live", go_live, change="endpoint.go_live"),
)
