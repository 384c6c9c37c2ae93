"""The pages. How to add one: dispatcher/web/app.py."""

from dispatcher.web.panel import alerts, catalogue, endpoint, endpoints, overview, receivers, setup
from dispatcher.web.visit import Route

ROUTES: tuple[Route, ...] = (
    *overview.ROUTES,
    *endpoints.ROUTES,
    *setup.ROUTES,
    *endpoint.ROUTES,
    *catalogue.ROUTES,
    *alerts.ROUTES,
    *receivers.ROUTES,
)
