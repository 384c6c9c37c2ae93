"""A bound on connections, for every listener of ours. By itself, because who only tells of health needs nothing else of this room."""

import asyncio
from collections.abc import Callable
from typing import cast

from aiohttp import web


def bounded(server: web.Server, most: int) -> Callable[[], asyncio.BaseProtocol]:
    """Return what makes a protocol for a new connection; beyond the bound one that hangs up. Those that come in one turn of the loop aren't
    counted among themselves: it may go beyond by the backlog."""

    def accept() -> asyncio.BaseProtocol:
        return server() if len(server.connections) < most else _HangUp()

    return accept


class _HangUp(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()  # uvloop's isn't one by its class
