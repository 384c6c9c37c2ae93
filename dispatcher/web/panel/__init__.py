"""The pages. How to add one: dispatcher/web/app.py."""

from dispatcher.web.panel import alerts, endpoint, endpoints, receivers, setup
from dispatcher.web.visit import Route

ROUTES: tuple[Route, ...] = (*endpoints.ROUTES, *setup.ROUTES, *endpoint.ROUTES, *alerts.ROUTES, *receivers.ROUTES)
