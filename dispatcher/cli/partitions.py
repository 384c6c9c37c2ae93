"""`dispatcher partitions` and `maintain`: what the log is stored in, and leaves ahead of it without a service that runs."""

import logging
import sys
from typing import Any

import click
import structlog
from structlog import make_filtering_bound_logger

from dispatcher.cli.common import (
    Context,
    as_json,
    connected,
    database,
    print_json,
    print_rows,
    run_async,
    say,
    with_connection,
)
from dispatcher.domain.text import amount
from dispatcher.engine.clock import Clock
from dispatcher.engine.counters import Counters
from dispatcher.engine.provision import Provisioner
from dispatcher.ports import RefusedError
from dispatcher.settings import Settings
from dispatcher.store.partitions import PgPartitions, list_partitions

TURNS_MAX = 100
UNITS = ("B", "kB", "MB", "GB", "TB")


@click.command()
@as_json
@click.pass_obj
def partitions(context: Context, json_out: bool) -> None:
    """List the partitions of events and attempts: ids, state, rows, size, and the newest event of each.

    States: `ahead` (no id of it was handed out), `in use`, `settled` (every delivery was tried; it goes when its newest event is older than
    DISPATCHER_RETENTION_DAYS), `empty` (gone, the shell is dropped when its lock can be had), `default` (should be empty).

    \b
      dispatcher partitions
      dispatcher partitions --json | jq '.[] | select(.state == "default")'
    """
    found = with_connection(context.settings(), list_partitions)
    if json_out:
        print_json(found)
        return
    print_rows(
        [_shown(row) for row in found],
        ("from", "to", "state", "events", "newest", "events_size", "attempts_size"),
        "none",
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    newest = row["newest_event_at"]
    return {
        "from": row["low"],
        "to": None if row["high"] is None else row["high"] - 1,
        "state": row["state"],
        "events": row["events_estimate"],
        "newest": None if newest is None else f"{newest:%Y-%m-%d %H:%M}",
        "events_size": _size(row["outbox_bytes"]),
        "attempts_size": _size(row["attempt_bytes"]),
    }


def _size(count: int) -> str:
    size, unit = float(count), 0
    while size >= 1_000 and unit < len(UNITS) - 1:
        size, unit = size / 1_000, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit < 2 else f"{size:.1f} {UNITS[unit]}"


@click.command()
@as_json
@click.pass_obj
def maintain(context: Context, json_out: bool) -> None:
    """Make the partitions that the log will need next, now. The service does this by itself; where it is off for long, a daily cron job can.

    Safe beside a running service. Takes nothing away: retention is the service's, which knows what every endpoint has had. Exit status 1 if
    somebody's open transaction was in the way; what could not be done is done by the next run.

    \b
      dispatcher maintain && dispatcher partitions
    """
    made, complete = run_async(_maintain(context.settings()))
    if json_out:
        print_json({"made": made, "complete": complete})
    else:
        say(f"{amount(made, 'partition')} made" if made else "nothing to do")
    if not complete:
        say("an open transaction holds a lock that is needed; run it again", err=True)
        raise SystemExit(1)


async def _maintain(settings: Settings) -> tuple[int, bool]:
    counters = Counters()
    async with database(settings) as dsn:
        async with connected(settings):
            pass  # it is checked
        opened = PgPartitions(dsn, timeout_s=settings.statement_timeout_s)
        warnings = structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr), wrapper_class=make_filtering_bound_logger(logging.WARNING)
        )
        provisioner = Provisioner(opened, Clock(), counters, retention_days=settings.retention_days, log=warnings)
        try:
            for _ in range(TURNS_MAX):
                try:
                    if not await provisioner.turn(await opened.shape()):
                        break
                except RefusedError:
                    continue  # the service has just made it
        finally:
            await opened.close()
    return counters.partitions_made, provisioner.is_complete
