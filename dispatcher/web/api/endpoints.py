"""Endpoints: create, test, go live, and look after them."""

from typing import Any

from dispatcher.errors import ForbiddenError
from dispatcher.store import search, stats
from dispatcher.store.admin import Admin
from dispatcher.store.endpoint import EndpointView
from dispatcher.web.api.models import base
from dispatcher.web.api.models import endpoints as models
from dispatcher.web.api.operation import Call, Operation
from dispatcher.web.api.paging import after_id, before_id, page
from dispatcher.web.problems import ProblemError
from dispatcher.web.trial import check_tests_lately, shown_test, shown_trial, try_of, try_types
from dispatcher.web.visit import Who

_OPTIONS = (*models.EndpointOptions.model_fields, "url")


async def list_endpoints(call: Call) -> Any:
    """List endpoints

    In the order in which they were made, without deleted ones. With `stats`, each has its figures of 24 hours."""
    query: models.EndpointFilter = call.query
    async with call.visit.db() as db:
        rows = await call.visit.admin(db).endpoints(
            query.account_id, query.state, after=after_id(query.cursor), limit=query.limit
        )
        if query.stats:
            found = await stats.summaries(db, [row["id"] for row in rows])
            for row in rows:
                made = found.get(row["id"])
                row["stats_24h"] = None if made is None else made.as_dict()
    return page(rows, query.limit, "id")


async def create_endpoint(call: Call) -> Any:
    """Create an endpoint

    As a draft, which gets nothing until it has passed a test and goes live. The answer has the secret that its signatures are
    verified with."""
    body: models.NewEndpoint = call.body
    _only_operators(call, live=body.live)
    account_id = body.account_id or call.principal.account_id
    if account_id is None:
        raise ProblemError(400, "say whose endpoint it is", field="account_id")
    async with call.visit.db() as db:
        view = await call.visit.admin(db).create(account_id, _options(body), secret=body.secret, live=body.live)
    call.visit.subject = f"endpoint_id={view.id} account_id={account_id}"
    secret = next((known.secret for known in view.signing if known.scheme == "v1"), None)
    return _shown(view) | {"secret": secret}


async def show_endpoint(call: Call) -> Any:
    """Show an endpoint

    What it is, how it stands, what waits for it and what it will never get."""
    async with call.visit.db() as db:
        admin = call.visit.admin(db)
        view = await admin.get(call.endpoint_id)
        details = await admin.details(view)
    return _shown(view) | details.as_dict()


async def change_endpoint(call: Call) -> Any:
    """Change an endpoint

    A draft is changed at once. An edit of any other is kept beside the configuration in force until its own test has passed and
    it goes live; an
    edit that leads back to what is in force is withdrawn."""
    body: models.EndpointChange = call.body
    _only_operators(call, live=body.live)
    changes = _options(body)
    if "url" in changes and changes["url"] is None:
        raise ProblemError(400, "an endpoint needs a URL", field="url")
    async with call.visit.db() as db:
        return _shown(await call.visit.admin(db).update(call.endpoint_id, changes, live=body.live))


async def delete_endpoint(call: Call) -> Any:
    """Delete an endpoint

    What waits for it is never sent, and is counted."""
    async with call.visit.db(long=True) as db:
        discarded = await call.visit.admin(db).delete(call.endpoint_id)
    return {"id": call.endpoint_id, "discarded": discarded}


async def test_endpoint(call: Call) -> Any:
    """Test an endpoint

    One real, signed POST of a sample, marked as a test, sent once: at most ten a minute. It is about what would go live: the
    draft, or the edit that
    waits. A passed test belongs to that exact configuration."""
    body: models.Testing = call.body
    async with call.visit.db() as db:
        admin = call.visit.admin(db)
        await admin.get(call.endpoint_id)
        await check_tests_lately(db, call.endpoint_id)
    return shown_trial(body.type, await try_of(call.visit, call.endpoint_id, body.type))


async def test_chosen_types(call: Call) -> Any:
    """Test all chosen types

    The sample of each type that the endpoint is to get, one after another, within the same ten tests a minute: first those that have
    not passed for exactly this configuration. It ends at the first failure, at the minute's bound, or after half a minute; asked again
    it goes on with what is `left`."""
    made = await try_types(call.visit, call.endpoint_id)
    return {
        "passed": made.passed,
        "left": made.left,
        "tests": [shown_trial(name, trial) for name, trial in made.tried],
    }


async def list_tests(call: Call) -> Any:
    """List an endpoint's tests

    The newest first."""
    query: base.Paged = call.query
    async with call.visit.db() as db:
        await call.visit.admin(db).get(call.endpoint_id)
        rows = await search.past_tests(db, call.endpoint_id, before=before_id(query.cursor), limit=query.limit)
    return page([shown_test(row) for row in rows], query.limit, "id")


async def go_live(call: Call) -> Any:
    """Put a tested draft, or a tested edit, in force"""
    body: models.GoingLive = call.body
    _only_operators(call, force=body.force)
    async with call.visit.db() as db:
        return _shown(await call.visit.admin(db).go_live(call.endpoint_id, force=body.force))


async def pause_endpoint(call: Call) -> Any:
    """Pause an endpoint

    No POST starts later than a second after it. Its events are held, and sent when it is resumed; with `skip` they never are."""
    body: models.Pausing = call.body
    async with call.visit.db() as db:
        return _shown(await call.visit.admin(db).pause(call.endpoint_id, skip=body.skip))


async def resume_endpoint(call: Call) -> Any:
    """Resume a paused endpoint

    What was held is sent, oldest first, unless `choice` is skip; then it is counted."""
    return await _go_on(call, Admin.resume)


async def disable_endpoint(call: Call) -> Any:
    """Disable an endpoint

    Its events are held until somebody enables it, and its account's other endpoints are told. Operators only: an owner pauses."""
    body: models.Disabling = call.body
    async with call.visit.db() as db:
        return _shown(await call.visit.admin(db).disable(call.endpoint_id, body.reason))


async def enable_endpoint(call: Call) -> Any:
    """Enable a disabled endpoint

    Where events were held, say whether to send or to skip them."""
    return await _go_on(call, Admin.enable)


async def rotate_secret(call: Call) -> Any:
    """Give an endpoint a new signing secret, or key

    During the overlap both sign, so that its receiver can change over."""
    body: models.Rotating = call.body
    async with call.visit.db() as db:
        view = await call.visit.admin(db).rotate_secret(call.endpoint_id, overlap_s=body.overlap_s)
    return shown_secrets(view)


async def reveal_secrets(call: Call) -> Any:
    """Reveal an endpoint's signing secrets

    Kept in the audit, like a change."""
    async with call.visit.db() as db:
        view = await call.visit.admin(db).get(call.endpoint_id)
    return shown_secrets(view)


async def show_stats(call: Call) -> Any:
    """Show what happened to an endpoint, step by step

    Statistics are written a minute after the fact; tests are not among them."""
    query: models.StatsFilter = call.query
    async with call.visit.db() as db:
        await call.visit.admin(db).get(call.endpoint_id)
        points = await stats.series(db, call.endpoint_id, query.since, query.until, query.step_min)
    return {"data": [point.stats.as_dict() | {"at": point.at, "backlog": point.backlog} for point in points]}


async def _go_on(call: Call, verb: Any) -> Any:
    body: models.Resuming = call.body
    async with call.visit.db(long=True) as db:  # what is skipped is counted to its end
        view, skipped = await verb(call.visit.admin(db), call.endpoint_id, body.choice)
    return _shown(view) | {"skipped": skipped}


def shown_secrets(view: EndpointView) -> dict[str, Any]:
    """Return what receivers check signatures with."""
    extra_key, proposed_extra_key = view.extra_keys
    return {
        "extra_signature_key": extra_key, "proposed_extra_signature_key": proposed_extra_key,
        "secrets": [
            {
                "scheme": known.scheme, "secret": known.secret if known.public_key is None else None, "public_key": known.public_key,
                "created_at": known.created_at, "expires_at": known.expires_at,
            }
            for known in view.signing
        ]
    }  # fmt: skip


def _options(body: models.EndpointOptions) -> dict[str, Any]:
    """Return what was given of an endpoint's configuration."""
    return {name: getattr(body, name) for name in _OPTIONS if name in body.model_fields_set}


def _shown(view: EndpointView) -> dict[str, Any]:
    return view.as_dict()


def _only_operators(call: Call, **flags: bool) -> None:
    for name, is_set in flags.items():
        if is_set and not call.principal.is_operator:
            raise ForbiddenError(f"{name} is for operators: test it, then put it live")


_ONE = "/endpoints/{endpoint_id}"
_TAG = "Endpoints"


def _verb(name: str, handler: Any, answer: Any, body: Any, change: str, **more: Any) -> Operation:
    return Operation(
        "POST", f"{_ONE}/{name}", handler, _TAG, answer, body=body, change=change, body_is_optional=True, **more
    )


OPERATIONS = (
    Operation("GET", "/endpoints", list_endpoints, _TAG, base.Page[models.EndpointRow], models.EndpointFilter),
    Operation(
        "POST", "/endpoints", create_endpoint, _TAG, models.CreatedEndpoint, body=models.NewEndpoint, status=201, change="endpoint.create"
    ),
    Operation("GET", _ONE, show_endpoint, _TAG, models.EndpointDetails),
    Operation("PATCH", _ONE, change_endpoint, _TAG, models.EndpointAnswer, body=models.EndpointChange, change="endpoint.change"),
    Operation("DELETE", _ONE, delete_endpoint, _TAG, models.DeletedEndpoint, change="endpoint.delete"),
    _verb("test", test_endpoint, models.TestAnswer, models.Testing, "endpoint.test"),
    _verb("test-types", test_chosen_types, models.TypesTested, None, "endpoint.test"),
    Operation("GET", f"{_ONE}/tests", list_tests, _TAG, base.Page[models.PastTest], base.Paged),
    _verb("go-live", go_live, models.EndpointAnswer, models.GoingLive, "endpoint.go_live"),
    _verb("pause", pause_endpoint, models.EndpointAnswer, models.Pausing, "endpoint.pause"),
    _verb("resume", resume_endpoint, models.ResumedEndpoint, models.Resuming, "endpoint.resume"),
    _verb("disable", disable_endpoint, models.EndpointAnswer, models.Disabling, "endpoint.disable", who=Who.OPERATOR),
    _verb("enable", enable_endpoint, models.ResumedEndpoint, models.Resuming, "endpoint.enable"),
    _verb("rotate-secret", rotate_secret, models.SecretsAnswer, models.Rotating, "endpoint.rotate_secret"),
    _verb("reveal-secrets", reveal_secrets, models.SecretsAnswer, None, "endpoint.reveal_secrets"),
    Operation("GET", f"{_ONE}/stats", show_stats, _TAG, models.Series, models.StatsFilter),
)  # fmt: skip
