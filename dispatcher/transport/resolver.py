"""Names to addresses: c-ares by aiodns, cached for the record's time to live, one look-up a name at a time.

Not `loop.getaddrinfo`: it runs in threads, two at a time on uvloop, so that two hung look-ups delayed a healthy one by
2.9 s; and it accepts spellings such as full-width digits. What a name resolves to is judged by the address policy at
each connect, not here.
"""

import asyncio
import socket
from collections.abc import Callable, Iterable
from ipaddress import ip_address

import aiodns

NEGATIVE_TTL_S = 1.0
NAMES_MAX = 100_000  # cached; the oldest go first
ADDRESSES_MAX = 16  # of each family: all are judged at each connect, and a zone may answer with thousands


class UnresolvedError(Exception):
    """A name that does not resolve, or not in time."""


class Resolver:
    """`lookup` is replaced in tests."""

    def __init__(self, ttl_max_s: float) -> None:
        self._ttl_max_s = ttl_max_s
        self._cache: dict[str, tuple[float, tuple[str, ...] | str]] = {}  # until; addresses, or why there are none
        self._lookups: dict[str, asyncio.Task[tuple[str, ...]]] = {}  # one a name; owned here
        self._resolver: aiodns.DNSResolver | None = None
        self.lookups = 0

    async def resolve(self, host: str) -> tuple[str, ...]:
        """Return the addresses of `host`, IPv6 and IPv4. Raises UnresolvedError.

        Cancelling the caller doesn't end a look-up that others share."""
        try:
            return (str(ip_address(host)),)
        except ValueError:
            pass
        cached = self._cache.get(host)
        if cached is not None and cached[0] > asyncio.get_running_loop().time():
            if isinstance(cached[1], str):
                # A new one each time: an exception that is raised again keeps every traceback it has had.
                raise UnresolvedError(cached[1])
            return cached[1]
        # The task in no variable: its error's traceback would hold it, and it its error.
        return await asyncio.shield(self._lookup_of(host))

    async def lookup(self, host: str) -> tuple[tuple[str, ...], float]:
        """Ask the system's name servers (and its hosts file): addresses and seconds to live."""
        if self._resolver is None:
            self._resolver = aiodns.DNSResolver(timeout=2.0, tries=3)
        try:
            result = await self._resolver.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except (aiodns.error.DNSError, UnicodeError) as exc:  # the latter: of idna, for what can't be a name
            raise UnresolvedError(f"{host} does not resolve ({exc.args[-1]})") from exc
        addresses = _some(_text(node.addr[0]) for node in result.nodes)
        if not addresses:
            raise UnresolvedError(f"{host} has no address")
        return addresses, min(float(node.ttl) for node in result.nodes)

    async def close(self) -> None:
        tasks = list(self._lookups.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None

    def _lookup_of(self, host: str) -> asyncio.Task[tuple[str, ...]]:
        task = self._lookups.get(host)
        if task is None:
            task = self._lookups[host] = asyncio.get_running_loop().create_task(self._lookup_and_cache(host))
            task.add_done_callback(self._forget(host))
        return task

    async def _lookup_and_cache(self, host: str) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        self.lookups += 1
        try:
            addresses, ttl_s = await self.lookup(host)
        except UnresolvedError as exc:
            self._remember(host, loop.time() + NEGATIVE_TTL_S, str(exc))
            raise
        self._remember(host, loop.time() + min(max(ttl_s, 1.0), self._ttl_max_s), addresses)
        return addresses

    def _remember(self, host: str, until: float, result: tuple[str, ...] | str) -> None:
        self._cache.pop(host, None)
        self._cache[host] = (until, result)
        now = asyncio.get_running_loop().time()
        while self._cache and (len(self._cache) > NAMES_MAX or self._cache[next(iter(self._cache))][0] <= now):
            del self._cache[next(iter(self._cache))]

    def _forget(self, host: str) -> "Callable[[asyncio.Task[tuple[str, ...]]], None]":
        def done(task: asyncio.Task[tuple[str, ...]]) -> None:
            self._lookups.pop(host, None)
            if not task.cancelled():
                task.exception()  # seen, even if every waiter was cancelled meanwhile

        return done


def _some(addresses: Iterable[str]) -> tuple[str, ...]:
    """Return the first of each family, each once, in their order."""
    left = {False: ADDRESSES_MAX, True: ADDRESSES_MAX}
    some = []
    for address in dict.fromkeys(addresses):
        is_6 = ":" in address
        if left[is_6]:
            left[is_6] -= 1
            some.append(address)
    return tuple(some)


def _text(address: bytes | str) -> str:
    return address.decode() if isinstance(address, bytes) else address
