"""/api/v1: one table of operations, which serves, validates and documents it.

`OPERATIONS` is the table; to add one, write its handler and its row (operation.py) in the module it belongs to, and its
models in models.py. The OpenAPI document, the page that shows it, and the tests that try every operation with the wrong
account follow from the table.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp.web import Response, StreamResponse
from markupsafe import Markup

from dispatcher.web.api import alerts, catalogue, endpoints, events, openapi, people, receivers, recovery
from dispatcher.web.api.operation import PREFIX, Operation
from dispatcher.web.pages import Templates
from dispatcher.web.visit import Route, Visit, Who

OPERATIONS: tuple[Operation, ...] = (
    *endpoints.OPERATIONS,
    *events.OPERATIONS,
    *recovery.OPERATIONS,
    *catalogue.OPERATIONS,
    *people.OPERATIONS,
    *alerts.OPERATIONS,
    *receivers.OPERATIONS,
)
assert max(Counter(operation.id for operation in OPERATIONS).values()) == 1, "an operation's id is its own"


async def document(visit: Visit) -> StreamResponse:
    return Response(body=visit.web.published.document, content_type="application/json")


async def docs(visit: Visit) -> StreamResponse:
    """Show the document to people: nothing but our own HTML."""
    return visit.html("api.html", body=visit.web.published.page)


@dataclass(frozen=True, slots=True)
class Published:
    """The document, and its page's body. Made once, before anybody waits: rendering them takes 20 ms and more."""

    document: bytes
    page: Markup


def publish(templates: Templates, *, title: str, server: str) -> Published:
    made = openapi.document(OPERATIONS, title=title, server=server)
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            shown = operation | {"method": method.upper(), "path": PREFIX + path}
            groups.setdefault(operation["tags"][0], []).append(shown)
    context = {"groups": groups, "schemas": made["components"]["schemas"], "description": made["info"]["description"]}
    return Published(orjson.dumps(made), Markup(templates.render("api_body.html", context)))  # noqa: S704 - escaped when rendered  # nosec B704


ROUTES: tuple[Route, ...] = (
    *(operation.route for operation in OPERATIONS),
    Route("GET", f"{PREFIX}/openapi.json", document, Who.ANYONE, is_api=True),
    Route("GET", f"{PREFIX}/docs", docs, Who.ANYONE),
)
