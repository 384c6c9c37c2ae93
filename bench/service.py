"""`dispatcher run`, watched: it counts the statements it sends and the attempts it records, and asks a name server of the bench's, if told to.

    BENCH_COUNTERS=FILE [BENCH_DNS_PORT=PORT] python -m bench.service

Everything else is the product's own start. PostgreSQL counts statements only with an extension that must be loaded at
its start; here it costs a microsecond a statement, of which there are about two per hundred deliveries.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import aiodns
import asyncpg

from bench.rig import Counters
from dispatcher.cli import main


def watch_statements(counters: Counters) -> None:
    """Count what every connection from now on sends."""

    class Counting(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
        async def copy_to_table(self, table_name: str, **options: Any) -> Any:
            done = await super().copy_to_table(table_name, **options)
            # A query logger isn't told of COPY. Its answer says how many rows it wrote: "COPY 500".
            counters.add(statements=1, settled=int(done.split()[1]) if table_name == "attempt" else 0)
            return done

    connect = asyncpg.connect

    @functools.wraps(connect)
    async def watched(*args: Any, **options: Any) -> Any:
        connection = await connect(*args, connection_class=Counting, **options)
        connection.add_query_logger(counters.count)
        return connection

    asyncpg.connect = watched


def ask(port: int) -> None:
    """Have names looked up at 127.0.0.1:`port` only."""
    aiodns.DNSResolver = functools.partial(  # type: ignore[misc,assignment]
        aiodns.DNSResolver, nameservers=["127.0.0.1"], udp_port=port, tcp_port=port
    )


if __name__ == "__main__":
    watch_statements(Counters(Path(os.environ.pop("BENCH_COUNTERS"))))
    if dns_port := os.environ.pop("BENCH_DNS_PORT", None):
        ask(int(dns_port))
    sys.argv = ["dispatcher", "run"]
    main()
