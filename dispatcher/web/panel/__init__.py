"""The pages. How to add one: dispatcher/web/app.py."""

from dispatcher.web.panel import (
    alerts,
    dead_letters,
    deliveries,
    endpoint,
    endpoints,
    events,
    receivers,
    recover,
    setup,
)
from dispatcher.web.visit import Route

ROUTES: tuple[Route, ...] = (
    *endpoints.ROUTES, *setup.ROUTES, *endpoint.ROUTES, *deliveries.ROUTES, *events.ROUTES, *recover.ROUTES, *dead_letters.ROUTES,
    *alerts.ROUTES, *receivers.ROUTES,
)  # fmt: skip
