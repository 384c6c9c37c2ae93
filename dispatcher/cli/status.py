"""`dispatcher status`: who owns the database, who waits, and how far behind deliveries are."""

from typing import Any

import click

from dispatcher.cli.common import Context, as_json, print_json, print_rows, say, with_connection
from dispatcher.cli.terminal import about
from dispatcher.domain.text import amount
from dispatcher.store.status import ALIVE, COUNT_MAX, NONE, SILENT, read_status


@click.command()
@as_json
@click.pass_obj
def status(context: Context, json_out: bool) -> None:
    """Show who owns the database, since when, who stands by, and how far behind deliveries are.

    Exit status 0 if a dispatcher is alive, 1 if none is: nobody holds the owner lock, or its holder has given no sign for 3 s.

    \b
      dispatcher status
      dispatcher status --json | jq .owner.state
    """
    found = with_connection(context.settings(), read_status)
    if json_out:
        print_json(found)
    else:
        for line in describe(found):
            say(line)
        if found["lanes"]["top"]:
            say()
            _print_lanes(found["lanes"]["top"])
    if found["owner"]["state"] != ALIVE:
        raise SystemExit(1)


def describe(found: dict[str, Any]) -> list[str]:
    """Say it in aligned sentences."""
    log, lanes = found["log"], found["lanes"]
    position = f"settled up to id {log['position']:,} of {log['last_id']:,}"
    behind = f": {log['behind_ids']:,} behind" if log["behind_ids"] else "" if log["gap_ids"] else ": nothing behind"
    gaps = (
        f"; {amount(log['gap_ids'], 'id below is', 'ids below are')} not visible or not settled yet"
        if log["gap_ids"]
        else ""
    )
    oldest = log["oldest_undelivered_s"]
    waiting = f"{amount(lanes['behind'], 'endpoint')} behind, {amount(lanes['backlog'], 'event')} waiting"
    lines = [
        ("Owner", *_owner(found["owner"])),
        ("Standby", *(_standbys(found["standbys"]))),
        ("Log", f"{position}{behind}{gaps}"),
        ("Oldest", "nothing waits" if oldest is None else f"the oldest event that may not be delivered yet is {_ago(oldest)} old"),
        ("Lanes", waiting if lanes["behind"] else "no endpoint is behind"),
        ("Retries", f"{_count(found['retries'], 'delivery', 'deliveries')} failed and will be tried again"),
        ("Dead", f"{_count(found['dead_letters'], 'open dead letter', 'open dead letters')}"),
    ]  # fmt: skip
    return [f"{head if n == 0 else '':<9}{text}" for head, *texts in lines for n, text in enumerate(texts)]


def _owner(owner: dict[str, Any]) -> list[str]:
    name, age = owner["name"], owner["heartbeat_age_s"]
    where = f" ({owner['client_addr']})" if owner["client_addr"] else ""
    heartbeat = "no heartbeat yet" if age is None else f"heartbeat {_ago(age)} ago"
    since = "" if owner["since"] is None else f"since {_moment(owner['since'])}, {about(owner['since_s'])}; "
    if owner["state"] == NONE:
        last = "" if name is None else f"; the last one was {name}, {heartbeat}, epoch {owner['epoch']}"
        return [f"none: nothing is sent until a `dispatcher run` starts{last}"]
    held = f"{name or 'unknown'}{where}"
    if owner["state"] == SILENT:
        return [f"{held} is NOT ANSWERING: it holds the lock, {heartbeat}", f"{since}epoch {owner['epoch']}"]
    return [f"{held} is alive, {heartbeat}", f"{since}epoch {owner['epoch']}"]


def _standbys(standbys: list[dict[str, Any]]) -> list[str]:
    if not standbys:
        return ["none: another `dispatcher run` would be one"]
    return [
        one["name"]
        + (f" ({one['client_addr']})" if one["client_addr"] else "")
        + (f" waits since {_moment(one['since'])}" if one["since"] else " waits")
        for one in standbys
    ]


def _print_lanes(top: list[dict[str, Any]]) -> None:
    named = {"endpoint": "endpoint_id", "account": "account_id", "name": "name", "state": "state", "backlog": "backlog"}
    rows = [{head: lane[key] for head, key in named.items()} | {"oldest": _ago(lane["oldest_s"])} for lane in top]
    print_rows(rows, tuple(rows[0]), "")


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else about(seconds)


def _moment(at: Any) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _count(number: int, one: str, many: str) -> str:
    return f"more than {COUNT_MAX:,} {many}" if number > COUNT_MAX else amount(number, one, many)
