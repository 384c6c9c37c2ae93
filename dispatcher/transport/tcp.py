"""A TCP connection to one of several addresses, whichever answers first (RFC 8305, happy eyeballs); from a local address, if one was given."""

import asyncio
import errno
import socket
import sys
from collections.abc import Sequence
from typing import Any

import aiohappyeyeballs

from dispatcher.errors import InputError

# Tried per family. Each try is a socket that the bounds don't see, and a name may have any number of addresses that drop our SYNs.
ADDRESSES_MAX = 3
HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305, 8
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h


async def connect_tcp(addresses: list[str], port: int, local: Sequence[str] = ()) -> socket.socket:
    """Return a connected, non-blocking socket. Raises OSError; the caller bounds the time. `local`: the addresses to connect from; what is of
    another family isn't tried then."""
    infos, options = addr_infos(addresses, port), dict[str, Any]()
    if local:
        own = addr_infos(list(local), 0)
        families = {info[0] for info in own}
        infos = [info for info in infos if info[0] in families]
        if not infos:
            raise OSError(errno.EADDRNOTAVAIL, "no address of a family that DISPATCHER_LOCAL_ADDRESS has")
        options = {"local_addr_infos": own, "socket_factory": _late_port}
    try:
        return await aiohappyeyeballs.start_connection(
            infos,
            happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
            interleave=1,
            loop=asyncio.get_running_loop(),
            **options,
        )
    except OSError as exc:
        # The library keeps it in a variable, which the traceback would keep: a cycle of forty objects for the collector.
        raise exc.with_traceback(None) from None


def _late_port(info: Any) -> socket.socket:
    """Make a socket whose local port is chosen when it connects: chosen when it is bound, a port would serve one connection in all, not one for
    each receiver, and some 28,000 would be the end."""
    sock = socket.socket(family=info[0], type=info[1], proto=info[2])
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    return sock


def check_local(addresses: Sequence[str]) -> None:
    """Raise InputError unless these are addresses of this machine."""
    for info in addr_infos(list(addresses), 0):
        with socket.socket(info[0], info[1]) as sock:
            try:
                sock.bind(info[4])
            except OSError as exc:
                raise InputError(
                    f"setting DISPATCHER_LOCAL_ADDRESS: {info[4][0]} can't be bound ({exc.strerror}); give addresses of this machine"
                ) from exc


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
