"""`dispatcher resend` and `dispatcher replay …`: send again what the log still has, and follow it."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from math import inf
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dispatcher.cli.common import (
    ID,
    RUN_ID,
    WHEN,
    Context,
    as_json,
    connected,
    print_json,
    print_rows,
    run_async,
    say,
    with_connection,
)
from dispatcher.cli.terminal import RATE, about, ask, bar, busy, yes_option
from dispatcher.domain.text import amount
from dispatcher.settings import Settings
from dispatcher.store import runs
from dispatcher.store.runs import RunView, Selection
from dispatcher.store.session import Connection

WATCH_S = 0.5

rate_option = click.option(
    "--rate", type=RATE, help="Deliveries a second, or unlimited. [default: DISPATCHER_REPLAY_RATE_PER_S]"
)
note_option = click.option("--note", default="", help="Why, for whoever looks at it later.")
wait_option = click.option(
    "--wait", is_flag=True, help="Follow it to its end; exit status 1 if not everything was delivered."
)


@click.command()
@click.argument("event")
@click.argument("endpoint_id", type=ID)
@note_option
@wait_option
@as_json
@click.pass_obj
def resend(context: Context, event: str, endpoint_id: int, note: str, wait: bool, json_out: bool) -> None:
    """Send one event to one endpoint once more. EVENT is an outbox id or an evt_… id.

    It is a delivery of its own, with attempts and retries of its own, under the same webhook-id; what the original still has to come goes on.
    If retention has taken the event from the outbox, it is sent from its dead letter's copy.

    \b
    dispatcher resend evt_0ee4da927ccba008cff736c89e3074c0 7 --wait
    """
    settings = context.settings()
    made = with_connection(settings, lambda c: _with_notes(c, runs.resend(c, event, endpoint_id, note)))
    _made(settings, made, wait, json_out)


@click.group()
def replay() -> None:
    """Send a range of an endpoint's events again: count first, then in the background, with a rate, progress, pause and cancel.

    \b
    dispatcher replay start 7 --since 6h          what failed in the last six hours
    dispatcher replay show 12 --watch
    """


@replay.command()
@click.argument("endpoint_id", type=ID)
@click.option("--since", type=WHEN, help="Events made then or later: 2026-11-23T18:00:00Z, or so long ago: 6h.")
@click.option("--until", type=WHEN, help="Events made then or earlier. [default: now]")
@click.option("--after", "after_id", type=ID, help="Events after this outbox id.")
@click.option("--upto", "upto_id", type=ID, help="Events up to this outbox id. [default: the last one]")
@click.option(
    "--type",
    "patterns",
    multiple=True,
    help="Event type: exact, prefix (message.*) or *. Repeat it. [default: the endpoint's]",
)
@click.option(
    "--failed/--all",
    "only_failed",
    default=True,
    show_default=True,
    help="Deliveries that failed for good, or every event again.",
)
@rate_option
@note_option
@yes_option
@wait_option
@as_json
@click.pass_obj
def start(
    context: Context, /, endpoint_id: int, rate: float | None, note: str, yes: bool, wait: bool, json_out: bool, **chosen: Any
) -> None:  # fmt: skip
    """Send events in a range to an endpoint again. Shows how many and how long it takes, and asks.

    --failed sends deliveries that had a failed attempt, no success in any run, and no retry to come. --all sends every event of the account in
    the range whose type matches, delivered or not, also from before the endpoint was made or subscribed. The range's end is fixed when it is
    counted. --since and --until become ids: no event within them is missed, and one made a moment outside may be among them.

    The run is of a lower class than fresh events, and obeys the endpoint's own rate limit and breaker. Open dead letters that it covers count
    as resent; if it gives a delivery up, that is a new one.

    \b
    dispatcher replay start 7 --since 2026-11-23T14:00:00Z --until 2026-11-23T15:30:00Z
    dispatcher replay start 7 --after 120000 --all --type 'message.*' --rate 50 --yes --wait
    """
    settings = context.settings()
    with busy("counting"):
        selection = with_connection(settings, lambda c: runs.select(c, endpoint_id, **chosen))
    if selection.total == 0:
        if json_out:
            print_json({"total": 0, "run": None})
        else:
            say(
                f"There is nothing to send: {_what(selection.only_failed)} of type {', '.join(selection.patterns)} in this range: none."
            )
        return
    rate_per_s = rate_of(rate, settings)
    if not json_out or not yes:
        _describe(selection, rate_per_s, err=json_out)
    ask("Send them?", yes=yes)
    with bar(quiet=json_out, what="taking up dead letters") as step:
        made = with_connection(
            settings, lambda c: _with_notes(c, runs.create(c, selection, rate_per_s, note, step=step))
        )
    _made(settings, made, wait, json_out)


def rate_of(given: float | None, settings: Settings) -> float | None:
    """Return the rate that was asked for; None: unlimited."""
    if given is None:
        return settings.replay_rate_per_s
    return None if given == inf else given


def _describe(selection: Selection, rate_per_s: float | None, *, err: bool) -> None:
    to = selection.target
    lines = [
        f"endpoint   {to.id}  {to.url}",
        f"events     {selection.after_id + 1} … {selection.upto_id}  of type {', '.join(selection.patterns)}",
        f"what       {_what(selection.only_failed)}",
        f"count      {selection.total:,}",
        f"rate       {speed(rate_per_s, to.rate_per_s, selection.total)}",
    ]
    if not selection.only_failed and to.backlog:
        lines.append(
            f"note       the endpoint is behind: about {amount(to.backlog, 'event waits for its', 'events wait for their')} first attempt; "
            "those in the range are sent twice"
        )
    say("\n".join(lines), err=err)


def _what(only_failed: bool) -> str:
    return "deliveries that failed for good" if only_failed else "ALL events, delivered or not"


def speed(rate_per_s: float | None, endpoint_rate: float | None, total: int) -> str:
    """Say how fast, and how long that takes."""
    rates = [(rate_per_s, "a second"), (endpoint_rate, "a second (the endpoint's own limit)")]
    limits = [(rate, text) for rate, text in rates if rate is not None]
    if not limits:
        return "unlimited: as fast as the endpoint takes it"
    rate, text = min(limits)
    return f"{rate:g} {text}: {about(total / rate)} at the least"


async def _with_notes(connection: Connection, making: Any) -> tuple[RunView, list[str]]:
    """Await the run, and say what may keep it waiting."""
    run: RunView = await making
    return run, await _waits(connection, run)


async def _waits(connection: Connection, run: RunView) -> list[str]:
    notes = []
    if run.endpoint_state != "live":
        verb = "enable" if run.endpoint_state == "disabled" else "resume"
        notes.append(
            f"Endpoint {run.endpoint_id} is {run.endpoint_state}: it waits until `dispatcher endpoint {verb} {run.endpoint_id}`."
        )
    if not await runs.is_dispatching(connection):
        notes.append("No dispatcher is at work on this database: it waits until `dispatcher run`.")
    return notes


def _made(settings: Settings, made: tuple[RunView, list[str]], wait: bool, json_out: bool) -> None:
    run, notes = made
    if not json_out:
        say(f"run {run.id}: {run.kind} of {run.total:,} to endpoint {run.endpoint_id}")
        say("\n".join(notes) or f"Follow it with `dispatcher replay show {run.id} --watch`.")
    if wait:
        _follow(settings, run.id, json_out)
    elif json_out:
        print_json(run.as_dict())


# ── looking ──


@replay.command("list")
@click.option("--endpoint", "endpoint_id", type=ID, help="Of this endpoint only.")
@click.option("--account", "account_id", help="Of this account only.")
@click.option(
    "--state", type=click.Choice(["open", "running", "paused", "finished", "canceled", "all"]), default="open", show_default=True,
    help="In this state only; open is running or paused.",
)  # fmt: skip
@click.option("--after", type=RUN_ID, default=0, help="Begin after this run (to page).")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="At most so many.")
@as_json
@click.pass_obj
def list_runs(
    context: Context, endpoint_id: int | None, account_id: str | None, state: str, after: int, limit: int, json_out: bool
) -> None:  # fmt: skip
    """List resends and replays in the order in which they were made.

    \b
    dispatcher replay list --endpoint 7 --state all
    """
    found = with_connection(
        context.settings(),
        lambda c: runs.find(
            c, endpoint_id=endpoint_id, account_id=account_id, state=None if state == "all" else state, after=after, limit=limit
        ),
    )  # fmt: skip
    if json_out:
        print_json([run.as_dict() for run in found])
        return
    rows = [run.as_dict() | {"created": f"{run.created_at:%Y-%m-%d %H:%M:%S}"} for run in found]
    columns = (
        "id",
        "kind",
        "endpoint_id",
        "state",
        "total",
        "attempted",
        "delivered",
        "retrying",
        "dead",
        "created",
        "note",
    )
    nothing = (
        "There are no unfinished resends or replays; --state all shows the others."
        if state == "open"
        else "There are none."
    )
    print_rows(rows, columns, nothing)
    if len(found) == limit:
        say(f"… more: --after {found[-1].id}")


@replay.command()
@click.argument("run", type=RUN_ID)
@click.option(
    "--watch",
    is_flag=True,
    help="Follow it to its end; exit status 1 if not everything was delivered. Ctrl-C leaves it running.",
)
@as_json
@click.pass_obj
def show(context: Context, run: int, watch: bool, json_out: bool) -> None:
    """Show how far a resend or replay is. Counts are of deliveries.

    \b
    dispatcher replay show 12 --watch
    """
    settings = context.settings()
    if watch:
        _follow(settings, run, json_out)
        return

    async def look(connection: Connection) -> tuple[RunView, datetime | None, list[str]]:
        found = await runs.get(connection, run)
        due = await runs.next_due(connection, run) if found.retrying else None
        return found, due, await _waits(connection, found) if found.is_open else []

    found, due, notes = with_connection(settings, look)
    if json_out:
        print_json(found.as_dict() | {"next_retry_at": due})
        return
    _print(found, due)
    for note in notes:
        say(note)


def _print(run: RunView, due: datetime | None = None) -> None:
    ended = f", {run.finished_at:%Y-%m-%d %H:%M:%S} UTC" if run.finished_at else ""
    failed = "that failed for good" if run.only_failed else "all"
    next_retry = f"   the next at {due:%Y-%m-%d %H:%M:%S} UTC" if due else ""
    lines = [
        f"run        {run.id}  ({run.kind}{' from dead letters' if run.source == 'dead_letter' else ''})",
        f"state      {run.state}{ended}",
        f"endpoint   {run.endpoint_id}  {run.url}  ({run.endpoint_state})",
        f"events     {run.after_id + 1} … {run.upto_id}  of type {', '.join(run.patterns)}, {failed}",
        f"rate       {'unlimited' if run.rate_per_s is None else f'{run.rate_per_s:g} a second'}",
        f"attempted  {run.attempted:,} of {run.total:,}",
        f"delivered  {run.delivered:,}",
        f"retrying   {run.retrying:,}{next_retry}",
        f"dead       {run.dead:,}",
        f"made       {run.created_at:%Y-%m-%d %H:%M:%S} UTC",
    ]
    say("\n".join(lines + ([f"note       {run.note}"] if run.note else [])))


def _follow(settings: Settings, run_id: int, json_out: bool) -> None:
    """Show progress until the run has ended, then how it ended; exit status 1 if not everything was delivered."""
    try:
        ended = run_async(_watch(settings, run_id, json_out))
    except KeyboardInterrupt:
        say(f"Run {run_id} goes on; `dispatcher replay show {run_id} --watch` follows it again.", err=True)
        raise SystemExit(130) from None
    if json_out:
        print_json(ended.as_dict())
    else:
        say(
            f"run {ended.id} {ended.state}: {ended.delivered:,} delivered, {amount(ended.dead, 'dead letter')}, {ended.attempted:,} attempted "
            f"of {ended.total:,}"
        )
    if ended.state != "finished" or ended.dead:
        raise SystemExit(1)


async def _watch(settings: Settings, run_id: int, json_out: bool) -> RunView:
    async with connected(settings) as connection:
        run = await runs.get(connection, run_id)
        console = Console(stderr=True)
        if not run.is_open:
            return run
        if json_out or not console.is_terminal:
            return await _poll(connection, run, (lambda run: None) if json_out else _line)
        columns = (
            TextColumn("run {task.fields[run].id} {task.fields[run].state}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "delivered {task.fields[run].delivered:,}  retrying {task.fields[run].retrying:,}  dead {task.fields[run].dead:,}"
            ),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=run.total, run=run, completed=run.attempted)
            return await _poll(
                connection, run, lambda run: progress.update(task, run=run, completed=min(run.attempted, run.total))
            )


async def _poll(connection: Connection, run: RunView, show: Callable[[RunView], object]) -> RunView:
    """Look until the run has ended, and show it whenever it has changed."""
    show(run)
    while run.is_open:
        await asyncio.sleep(WATCH_S)
        before, run = run, await runs.get(connection, run.id)
        if run != before:
            show(run)
    return run


def _line(run: RunView) -> None:
    say(
        f"run {run.id} {run.state}: attempted {run.attempted:,} of {run.total:,}, delivered {run.delivered:,}, retrying {run.retrying:,}, "
        f"dead {run.dead:,}",
        err=True,
    )


# ── changing ──


@replay.command()
@click.argument("run", type=RUN_ID)
@as_json
@click.pass_obj
def pause(context: Context, run: int, json_out: bool) -> None:
    """Hold a resend or replay, its retries too, within a second.

    \b
    dispatcher replay pause 12
    """
    _changed(with_connection(context.settings(), lambda c: runs.pause(c, run)), json_out)


@replay.command()
@click.argument("run", type=RUN_ID)
@as_json
@click.pass_obj
def resume(context: Context, run: int, json_out: bool) -> None:
    """Go on with a paused resend or replay where it stopped.

    \b
    dispatcher replay resume 12
    """
    _changed(with_connection(context.settings(), lambda c: runs.resume(c, run)), json_out)


@replay.command()
@click.argument("run", type=RUN_ID)
@as_json
@click.pass_obj
def cancel(context: Context, run: int, json_out: bool) -> None:
    """End a resend or replay for good. What it hasn't delivered is not sent, its retries end; dead letters that it took are open again.

    \b
    dispatcher replay cancel 12
    """
    with bar(quiet=json_out, what="opening dead letters again") as step:
        canceled = with_connection(context.settings(), lambda c: runs.cancel(c, run, step=step))
    _changed(canceled, json_out)


@replay.command()
@click.argument("run", type=RUN_ID)
@click.argument("rate", type=RATE)
@as_json
@click.pass_obj
def rate(context: Context, run: int, rate: float, json_out: bool) -> None:
    """Give a resend or replay another rate: deliveries a second, or unlimited.

    \b
    dispatcher replay rate 12 50
    """
    per_s = None if rate == inf else rate
    _changed(with_connection(context.settings(), lambda c: runs.set_rate(c, run, per_s)), json_out)


def _changed(run: RunView, json_out: bool) -> None:
    if json_out:
        print_json(run.as_dict())
    else:
        _print(run)


__all__ = ["replay", "resend"]
