"""A person's test of an endpoint, for the command line, the API and the panel: the POST, and the record that it was made.

`try_types` tests all chosen types, within the same bound of ten a minute: one after another, those first that have not passed for exactly
this configuration; it ends at the first that fails, because the next would most likely fail alike and the minute's tests are better kept for
the repaired receiver, at the minute's bound, or when it has taken half a minute. Asked again it goes on with what is left.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from dispatcher.domain.endpoint import pattern_matches
from dispatcher.domain.shape import make_shape, redacted
from dispatcher.domain.url import parse_url
from dispatcher.engine.trial import TEST_TYPE, Trial, headers_of, render_test, try_endpoint
from dispatcher.errors import BusyError, InputError, NotFoundError
from dispatcher.ports import Transport
from dispatcher.settings import Settings
from dispatcher.store import event_types, search
from dispatcher.store.admin import Admin
from dispatcher.store.endpoint import EndpointView
from dispatcher.store.session import Connection
from dispatcher.web.problems import ProblemError
from dispatcher.web.visit import Visit

TESTS_A_MINUTE = 10
ALL_TYPES_S = 30.0  # no further test begins after that
TYPES_MAX = 1_000  # of the catalogue, that are looked through


async def check_tests_lately(db: Connection, endpoint_id: int) -> int:
    """Return how many tests are left of this minute's, or refuse what would be one too many. Whose the endpoint is, was asked before."""
    left = TESTS_A_MINUTE - await search.tests_lately(db, endpoint_id)
    if left <= 0:
        raise ProblemError(
            429, f"an endpoint is tested at most {TESTS_A_MINUTE} times a minute", headers={"Retry-After": "60"}
        )
    return left


Lend = Callable[[], AbstractAsyncContextManager[tuple[Connection, Admin]]]


async def try_and_record(
    lend: Lend, transport: Transport, settings: Settings, endpoint_id: int, event_type: str, sent_by: str
) -> tuple[EndpointView, Trial]:
    """Send the sample of an event type to what the endpoint is to be, and keep what came of it. No connection is held meanwhile: a receiver may
    take its endpoint's whole timeout."""
    async with lend() as (db, admin):
        view = await admin.get(endpoint_id)
        data = await sample_of(db, event_type, view, sent_by)
    trial = await try_endpoint(
        transport,
        parse_url(view.to_test["url"], settings.address_policy),
        view.secrets,
        view.account_id,
        timeout_s=view.to_test["timeout_ms"] / 1000,
        user_agent=settings.user_agent,
        event_type=event_type,
        data=data,
        shape=make_shape(view.to_test),
    )
    outcome = trial.outcome
    async with lend() as (_, admin):
        await admin.record_test(
            view,
            passed=trial.passed,
            duration_us=trial.duration_us,
            status=outcome.status,
            fault=outcome.fault.value if outcome.fault else None,
            verdict=trial.verdict,
            request=trial.request,
            response_head=trial.trace.head or None,
            event_type=event_type,
            at_fault=trial.at_fault,
            timing=trial.trace.timing_ms(),
            response_body=trial.trace.body or None,
        )
    return view, trial


async def try_of(visit: Visit, endpoint_id: int, event_type: str) -> Trial:
    """Make a test for a visitor, if not too many are under way. Whose the endpoint is, was asked before."""

    @asynccontextmanager
    async def lend() -> AsyncIterator[tuple[Connection, Admin]]:
        async with visit.db() as db:
            yield db, visit.admin(db)

    web = visit.web
    with web.trials.under_way(visit.principal.account_id):
        _, trial = await try_and_record(
            lend, web.transport, web.settings, endpoint_id, event_type, visit.principal.actor
        )
    return trial


@dataclass(frozen=True, slots=True)
class TypesTried:
    """What `try_types` did. `left`: chosen types that have not passed for this configuration yet."""

    tried: list[tuple[str, Trial]]
    left: list[str]

    @property
    def passed(self) -> bool:
        return not self.left


async def try_types(visit: Visit, endpoint_id: int) -> TypesTried:
    """Test every type that the endpoint is to get and that has a sample."""
    async with visit.db() as db:
        view = await visit.admin(db).get(endpoint_id)
        left_of_minute = await check_tests_lately(db, endpoint_id)
        known = await search.tested_types(db, endpoint_id, view.test_hash)
        chosen = chosen_types(await event_types.find(db, limit=TYPES_MAX), view.to_test["event_types"])
    if not chosen:
        raise InputError(
            f"none of the chosen types has a sample; test with {TEST_TYPE}, which needs none", field="type"
        )
    passed = {name for name in chosen if name in known and known[name]["passed"]}
    until = time.monotonic() + ALL_TYPES_S
    tried: list[tuple[str, Trial]] = []
    for name in sorted(chosen, key=lambda name: name in passed)[:left_of_minute]:
        if time.monotonic() > until:
            break
        try:
            trial = await try_of(visit, endpoint_id, name)
        except BusyError:
            if not tried:
                raise
            break  # what was tried is kept, and asked again it goes on
        tried.append((name, trial))
        if not trial.passed:
            passed.discard(name)
            break
        passed.add(name)
    return TypesTried(tried, [name for name in chosen if name not in passed])


def chosen_types(catalogue: list[event_types.EventType], patterns: list[str]) -> list[str]:
    """Return the types of the catalogue that fit the patterns and can be tested."""
    return [
        one.name
        for one in catalogue
        if one.name != TEST_TYPE and one.sample is not None and any(pattern_matches(p, one.name) for p in patterns)
    ]


def shown_trial(event_type: str, trial: Trial) -> dict[str, Any]:
    """Return a test just made, as API and command line show it."""
    outcome, trace = trial.outcome, trial.trace
    return {
        "type": event_type, "passed": trial.passed, "verdict": trial.verdict, "at_fault": trial.at_fault, "status": outcome.status,
        "fault": outcome.fault.value if outcome.fault else None, "duration_ms": trial.duration_us / 1000, "timing": trace.timing_ms(),
        "request": _text(trial.request), **_answer(trace.head, trace.body),
    }  # fmt: skip


def shown_test(row: dict[str, Any]) -> dict[str, Any]:
    """Return a test that was kept, in the same form."""
    return {
        "id": row["id"], "started_at": row["started_at"], "type": row["event_type"], "passed": row["fault"] is None, "verdict": row["verdict"],
        "at_fault": row["at_fault"], "status": row["status"], "fault": row["fault"], "duration_ms": row["duration_us"] / 1000,
        "timing": dict.fromkeys(("dns", "connect", "tls", "first_byte", "total")) | orjson.loads(row["timing"]),
        "request": _text(row["request"]), **_answer(row["response_head"] or b"", row["response_body"] or b""),
    }  # fmt: skip


def _answer(head: bytes, body: bytes) -> dict[str, Any]:
    whole = head + b"\r\n\r\n" + body if head else body
    return {
        "response": _text(whole) or None,
        "response_headers": [{"name": name, "value": value} for name, value in headers_of(head)],
        "response_body": _text(body) or None,
    }


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


async def preview(db: Connection, settings: Settings, view: EndpointView, event_type: str, sent_by: str) -> bytes:
    """Return the request that a test would send now; its id, time and signature are new in each. Nothing is sent."""
    shape = make_shape(view.to_test)
    request = render_test(
        parse_url(view.to_test["url"], settings.address_policy), view.secrets, view.account_id, user_agent=settings.user_agent,
        event_type=event_type, data=await sample_of(db, event_type, view, sent_by), shape=shape,
    )  # fmt: skip
    return redacted(request, shape)


async def sample_of(db: Connection, event_type: str, view: EndpointView, sent_by: str) -> Any:
    """Return the `data` of a test: of the type's sample in the catalogue, or of endpoint.test, which tells of the endpoint itself."""
    if event_type == TEST_TYPE:
        return {
            "endpoint": {"id": view.id, "name": view.to_test["name"], "url": view.to_test["url"]},
            "sent_by": sent_by,
        }
    try:
        found = await event_types.get(db, event_type)
    except NotFoundError:
        found = None
    if found is None or found.sample is None:
        raise InputError(f"there is no sample of {event_type!r}; test with {TEST_TYPE}, which needs none", field="type")
    return found.sample
