"""TLS contexts: whom we believe, and as whom we come.

One context serves every endpoint but those that ask for a client certificate; each of those identities gets its own, made when it first
connects and kept while it is among the most recent.
"""

import asyncio
import os
import ssl
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dispatcher.domain.client import ClientIdentity

CONTEXTS_MAX = 200  # of identities; with the system's 140 authorities one takes 0.9 MB, and 30 ms to make

MakeContext = Callable[[ClientIdentity], ssl.SSLContext]


def make_tls_context(ca_file: str | None, identity: ClientIdentity | None = None) -> ssl.SSLContext:
    """Verify peers against the system's authorities, or those of `ca_file` alone; show `identity` to those that ask."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if identity is not None:
        with _readable(f"{identity.certificate.strip()}\n{identity.key.strip()}\n") as path:
            context.load_cert_chain(path)
    return context


class Contexts:
    """The contexts of client identities, the most recently used of them."""

    def __init__(self, make: MakeContext) -> None:
        self._make = make
        self._made: OrderedDict[ClientIdentity, ssl.SSLContext] = OrderedDict()
        self._making = asyncio.Lock()  # a hundred connections of one identity begin at once, and need one context

    async def of(self, identity: ClientIdentity) -> ssl.SSLContext:
        """Raises ssl.SSLError if OpenSSL doesn't take certificate or key."""
        if identity not in self._made:
            async with self._making:
                if identity not in self._made:
                    self._made[identity] = await asyncio.to_thread(self._make, identity)
                    while len(self._made) > CONTEXTS_MAX:
                        self._made.popitem(last=False)
        self._made.move_to_end(identity)
        return self._made[identity]


@contextmanager
def _readable(text: str) -> Iterator[str]:
    """Yield a path to read `text` from: `ssl` takes keys from files only. It stays in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("client-identity")
        try:
            with open(descriptor, "w", closefd=False) as file:
                file.write(text)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:  # readable by its owner only, and gone at once
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            yield file.name
