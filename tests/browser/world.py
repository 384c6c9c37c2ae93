"""An installation with something on every page: two accounts, endpoints in every state, a day of figures, failures, dead letters, tests, mail.

For the tests that look at all pages, and for the pictures in docs/. Which pages there are is read from the panel's own table, so that a new one
can't be forgotten.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from random import Random
from typing import Any, NamedTuple

from dispatcher.demo.events import SmsPlatform
from dispatcher.demo.run import free_port
from dispatcher.domain.principal import OPERATOR
from dispatcher.main import make_web
from dispatcher.sink import Behaviour
from dispatcher.store import alerts, receivers, runs
from dispatcher.store.admin import Admin
from dispatcher.web import panel
from dispatcher.web.trial import try_and_record
from tests.conftest import connected
from tests.rig import Rig, rig, until
from tests.store import people
from tests.web.conftest import Site, site

ACCOUNT, OTHER, BUSY, EMPTY = "acct_parcels", "acct_bakery", "acct_busy", "acct_new"

ENDPOINTS = (  # account, name, host, types, how it answers, state
    (ACCOUNT, "Shop", "shop.example", ["message.*", "link.clicked"], Behaviour(), "live"),
    (
        ACCOUNT,
        "CRM",
        "crm.example",
        ["message.*", "contact.*"],
        Behaviour(status=503, body=b"upstream is away"),
        "live",
    ),
    (ACCOUNT, "Warehouse", "warehouse.example", ["message.failed"], Behaviour(), "paused"),
    (ACCOUNT, "Analytics", "analytics.example", ["*"], Behaviour(status=302), "draft"),
    (OTHER, "Till", "till.example", ["*"], Behaviour(), "live"),
    (BUSY, "Busy", "busy", ["*"], Behaviour(), "live"),  # stays where it is, for who wants traffic
)
FIGURES = """
INSERT INTO webhook.endpoint_stat (endpoint_id, minute, epoch, delivered, failed, dead, duration_ms, durations)
SELECT $1, date_trunc('minute', now()) - m * interval '5 minutes', 1, d, f, 0, (d + f) * 20,
       array_fill(0, ARRAY[3]) || ARRAY[d, f] || array_fill(0, ARRAY[15])
FROM (
    SELECT m, (200 + 150 * sin(m / 40.0) + (m * 7919) % 60)::integer AS d, CASE WHEN m % 50 < $2 THEN 20 + m % 30 ELSE 0 END AS f
    FROM generate_series(1, 288) AS m
) AS s
"""


class World(NamedTuple):
    rig: Rig
    web: Site
    things: dict[str, Any]  # a path's parameter → what to put there


class Shown(NamedTuple):
    """A page, and who looks at it: an account, "operator", or nobody."""

    name: str
    path: str
    who: str | None


@contextlib.asynccontextmanager
async def world(dsn: str) -> AsyncIterator[World]:
    settings = {
        "retry_schedule_s": (2, 600, 3600), "breaker_failures": 3, "breaker_wait_s": 120.0, "source_addresses": "192.0.2.10,192.0.2.11",
        "product_name": "Parcel SMS", "web_listen": f"127.0.0.1:{free_port()}",  # the built-in receiver wants to know where it is
    }  # fmt: skip
    async with (
        rig(dsn, **settings) as made,
        site(dsn, lambda given, dsn, transport: make_web(given, dsn, transport, made.engine), **settings) as web,
    ):
        yield World(made, web, await _furnish(made, web))


async def _furnish(made: Rig, web: Site) -> dict[str, Any]:
    db = made.db
    admin = Admin(db, web.settings)
    ids = {}
    for account, name, host, types, behaviour, state in ENDPOINTS:
        made.sink.set_behaviour(f"/{host}", behaviour)
        config = {"url": f"{made.sink.url}/{host}", "name": name, "event_types": types}
        if name == "Shop":
            config |= {"headers": {"x-shop-token": "s3cret"}, "filters": {"from": ["PARCEL"]}, "rate_per_s": 50}
        view = await admin.create(account, config, live=state != "draft")
        ids[name] = view.id
        for _ in range(2 if state == "draft" else 1):
            await try_and_record(
                lambda: contextlib.nullcontext((db, admin)),
                made.transport,
                web.settings,
                view.id,
                "message.delivered",
                "user:maria@parcels.example",
            )
        if state == "paused":
            await admin.pause(view.id)
    await until(lambda: all(made.has_taken_up(ids[name]) for name in ("Shop", "CRM", "Till", "Busy")), within_s=60)
    platform = SmsPlatform(Random(7), [ACCOUNT, OTHER])
    events = [platform.next(datetime.now(UTC)) for _ in range(120)]
    await admin.events.emit_many([(e.account_id, e.type, e.payload.decode(), e.occurred_at) for e in events])
    await until(lambda: _has_failed(made, ids["CRM"]), within_s=60, what="the breaker of the one that fails")
    await until(lambda: _is_through(made, [ids["Shop"], ids["Till"]]), within_s=60, what="the others have got theirs")
    for name, bad in (("Shop", 1), ("CRM", 30), ("Till", 3)):
        await db.execute(FIGURES, ids[name], bad)
    await db.execute("UPDATE webhook.endpoint SET failing_since = now() - interval '3 hours' WHERE id = $1", ids["CRM"])
    gone = await people.emit(db, 3, ACCOUNT, "message.sent")
    letters = await people.died(db, ids["CRM"], gone, run=9)
    [sent] = await made.db.fetch(
        "SELECT event_id FROM webhook.attempt WHERE endpoint_id = $1 AND fault IS NULL LIMIT 1", ids["Shop"]
    )
    run = await runs.resend(db, str(sent["event_id"]), ids["Shop"])
    await until(lambda: made.attempts(run=run.id), within_s=60, what="what is sent again")
    receiver = await receivers.create(db, OPERATOR, ACCOUNT)
    body = platform.next(datetime.now(UTC)).payload
    headers = [
        ("content-type", "application/json"),
        ("webhook-id", "evt_0ee4da927ccba008cff736c89e3074c0"),
        ("x-attempt", "1"),
    ]
    for signature in ("unknown", "wrong", "valid"):
        await receivers.keep(db, receiver.id, headers, body, signature=signature, endpoint_id=None, status=200)
    await alerts.add_recipient(db, OPERATOR, account_id=ACCOUNT, address="hooks@parcels.example")
    await db.execute(
        "SELECT webhook.tell_of_endpoint($1, 'endpoint.failing', 'consecutive_failures', now())", ids["CRM"]
    )
    for account, _, host, *_ in ENDPOINTS:  # what they are called in the pictures
        if account == BUSY:
            continue
        await db.execute(
            "UPDATE webhook.endpoint SET url = $2 WHERE url = $1", f"{made.sink.url}/{host}", f"https://{host}/webhooks"
        )
    await db.execute("ANALYZE")
    return {
        "endpoint_id": ids["Shop"], "event": sent["event_id"], "run_id": run.id, "letter_id": letters[0], "receiver_id": receiver.id,
        "name": "message.delivered", "failing": ids["CRM"], "draft": ids["Analytics"],
    }  # fmt: skip


async def _has_failed(made: Rig, endpoint_id: int) -> bool:
    return len(await made.attempts(endpoint_id=endpoint_id)) >= 3


async def _is_through(made: Rig, endpoint_ids: list[int]) -> bool:
    """Tell whether nothing waits for them any more."""
    return not await made.db.fetchval(
        "SELECT EXISTS (SELECT FROM webhook.lane WHERE endpoint_id = ANY ($1::bigint[])) "
        "OR (SELECT position FROM webhook.checkpoint) < webhook.last_id()",
        endpoint_ids,
    )


async def traffic(made: Rig) -> None:
    """Let something happen, now more, now less, until it is cancelled."""
    async with connected(made.dsn) as db:
        for n in itertools.count():
            await people.emit(db, 2 + n % 7, BUSY)
            await asyncio.sleep(0.1)


def pages(things: dict[str, Any]) -> list[Shown]:
    """Return every page of the panel's table, and those that have more than one face."""
    shown = [
        Shown("login", "/login", None),
        Shown("endpoints-none", "/endpoints", EMPTY),
        Shown("endpoint-failing", f"/endpoints/{things['failing']}", ACCOUNT),
        Shown("setup-failed", f"/endpoints/{things['draft']}/setup?type=message.delivered", ACCOUNT),
        Shown("api", "/api/v1/docs", "operator"),
        Shown("not-there", "/endpoints/999999", ACCOUNT),
    ]
    for route in panel.ROUTES:
        if route.method != "GET" or route.path.endswith("/live"):
            continue
        path = re.sub(r"\{(\w+)[^/]*\}", lambda found: str(things[found[1]]), route.path)
        name = re.sub(r"/\{\w+[^/]*\}", "-one", route.path).strip("/").replace("/", "-")
        shown.append(Shown(name, path, "operator" if route.path == "/overview" else ACCOUNT))
    return sorted(shown)
