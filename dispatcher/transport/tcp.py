"""A TCP connection to one of several addresses, whichever answers first (RFC 8305, happy eyeballs)."""

import asyncio
import socket
from typing import Any

import aiohappyeyeballs

# Tried per family. Each try is a socket that the bounds don't see, and a name may have any number of addresses that drop our SYNs.
ADDRESSES_MAX = 3
HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305, 8


async def connect_tcp(addresses: list[str], port: int) -> socket.socket:
    """Return a connected, non-blocking socket. Raises OSError; the caller bounds the time."""
    return await aiohappyeyeballs.start_connection(
        addr_infos(addresses, port),
        happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
        interleave=1,
        loop=asyncio.get_running_loop(),
    )


def addr_infos(addresses: list[str], port: int) -> list[Any]:
    v6 = [address for address in addresses if ":" in address]
    v4 = [address for address in addresses if ":" not in address]
    infos: list[Any] = [
        (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
        for address in v6[:ADDRESSES_MAX]
    ]
    infos += [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)) for address in v4[:ADDRESSES_MAX]
    ]
    return infos
