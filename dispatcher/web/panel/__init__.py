"""The pages. How to add one: dispatcher/web/app.py."""

from dispatcher.web.panel import (
    alerts,
    catalogue,
    dead_letters,
    deliveries,
    endpoint,
    endpoints,
    events,
    overview,
    receivers,
    recover,
    setup,
)
from dispatcher.web.visit import Route

ROUTES: tuple[Route, ...] = (
    *overview.ROUTES, *endpoints.ROUTES, *setup.ROUTES, *endpoint.ROUTES, *deliveries.ROUTES, *events.ROUTES, *recover.ROUTES,
    *dead_letters.ROUTES, *catalogue.ROUTES, *alerts.ROUTES, *receivers.ROUTES,
)  # fmt: skip
