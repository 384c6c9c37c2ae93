"""`dispatcher dead-letter …`: what was given up, with its own copy of the event."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import orjson

from dispatcher.cli.common import (
    ID,
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
from dispatcher.cli.event import attempt_line
from dispatcher.cli.replay import note_option, rate_of, rate_option, speed
from dispatcher.cli.terminal import ask, bar, busy, yes_option
from dispatcher.domain.outcome import Fault
from dispatcher.domain.text import amount
from dispatcher.errors import InputError, StateError
from dispatcher.settings import Settings
from dispatcher.store import dead_letters
from dispatcher.store.dead_letters import STATES, Filter, Skipped, Total
from dispatcher.store.runs import RunView

FAULTS = [
    fault.value for fault in Fault if fault not in (Fault.STALE, Fault.EXPIRED)
]  # those are never a dead letter's


@click.group("dead-letter")
def dead_letter() -> None:
    """List what was given up, send it again, or discard it.

    A dead letter keeps its own copy of the event, also when retention has taken the event from the outbox. It is open until a resend or replay
    takes it up, or it is discarded. One that fails again is a new dead letter.

    \b
    dispatcher dead-letter list --endpoint 7
    dispatcher dead-letter resend --endpoint 7 --all
    """


def _filters(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--endpoint", "endpoint_id", type=ID, help="Of this endpoint only."),
            click.option("--account", "account_id", help="Of this account only."),
            click.option("--type", "patterns", multiple=True, help="Event type: exact, prefix (message.*) or *. Repeat it."),
            click.option("--since", type=WHEN, help="Given up then or later: 2026-11-23T18:00:00Z, or so long ago: 6h."),
            click.option("--until", type=WHEN, help="Given up then or earlier."),
            click.option("--fault", type=click.Choice(FAULTS), help="Of the last attempt."),
            click.option("--status", type=click.IntRange(100, 999), help="Of the last attempt's answer."),
            click.option("--reason", help="With these words in the reason."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@dead_letter.command("list")
@_filters
@click.option(
    "--state", type=click.Choice([*STATES, "all"]), default="open", show_default=True, help="In this state only."
)
@click.option("--after", type=ID, default=0, help="Begin after this dead letter (to page).")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="At most so many.")
@as_json
@click.pass_obj
def list_letters(context: Context, /, state: str, after: int, limit: int, json_out: bool, **chosen: Any) -> None:
    """List dead letters in the order in which they were given up.

    \b
    dispatcher dead-letter list --account acct_1 --type 'message.*' --since 2d --status 500
    """
    wanted = Filter(**chosen, state=None if state == "all" else state)
    found = with_connection(context.settings(), lambda c: dead_letters.find(c, wanted, after=after, limit=limit))
    if json_out:
        print_json(found)
        return
    rows = [
        letter
        | {
            "died": f"{letter['died_at']:%Y-%m-%d %H:%M:%S}",
            "answer": letter["status"] if letter["fault"] == "status" else letter["fault"],
            "state": _state(letter),
        }
        for letter in found
    ]
    columns = ("id", "endpoint_id", "event_id", "type", "died", "attempts", "answer", "state", "reason")
    print_rows(rows, columns, "There are no such dead letters.")
    if len(found) == limit:
        say(f"… more: --after {found[-1]['id']}")


def _state(letter: dict[str, Any]) -> str:
    if letter["state"] == "resent":
        return f"resent by run {letter['resent_run']}"
    return f"{letter['state']}, delivered since" if letter["delivered_since"] else str(letter["state"])


@dead_letter.command()
@click.argument("letter_id", type=ID, metavar="ID")
@as_json
@click.pass_obj
def show(context: Context, letter_id: int, json_out: bool) -> None:
    """Show one dead letter: its payload, and the delivery's attempts as far as retention has left them.

    \b
    dispatcher dead-letter show 31
    """
    shown = with_connection(context.settings(), lambda c: dead_letters.show(c, letter_id))
    payload = shown["payload"]
    if json_out:
        print_json(shown | {"payload": None if payload is None else orjson.Fragment(payload.encode())})
        return
    answer = shown["status"] if shown["fault"] == "status" else shown["fault"]
    run = f"  in run {shown['run']}" if shown["run"] else ""
    lines = [
        f"dead letter  {shown['id']}  {_state(shown)}",
        f"event        {shown['event_id']}  {shown['public_id']}  {shown['type']}  {shown['created_at']:%Y-%m-%d %H:%M:%S} UTC",
        f"account      {shown['account_id']}",
        f"endpoint     {shown['endpoint_id']}{run}",
        f"given up     {shown['died_at']:%Y-%m-%d %H:%M:%S} UTC: {shown['reason']}",
        f"attempts     {shown['attempts']}, the last: {answer}",
        f"payload      {payload if payload is not None else '– (given up)'}",
    ]
    say("\n".join(lines))
    for attempt in shown["made"]:
        say(attempt_line(attempt))


@dead_letter.command()
@click.argument("ids", type=ID, nargs=-1, metavar="[ID]…")
@_filters
@click.option("--all", "all_", is_flag=True, help="All open ones that the filters choose.")
@rate_option
@note_option
@yes_option
@as_json
@click.pass_obj
def resend(
    context: Context, /, ids: tuple[int, ...], all_: bool, rate: float | None, note: str, yes: bool, json_out: bool, **chosen: Any
) -> None:  # fmt: skip
    """Send open dead letters again, from their own copies: those named, or with --all those that the filters choose.

    Shows how many first, and asks. Each endpoint gets one run, which `dispatcher replay` follows, pauses and cancels.

    \b
    dispatcher dead-letter resend 31 32
    dispatcher dead-letter resend --endpoint 7 --since 2d --all --rate 50 --yes
    """
    settings = context.settings()
    rate_per_s = rate_of(rate, settings)
    fixed, totals = _choose(settings, ids, all_, chosen)
    sendable = [one for one in totals if one.why_not is None]
    for one in totals:
        if one.why_not:
            say(
                f"Endpoint {one.endpoint_id} {one.why_not}: its {amount(one.letters, 'dead letter')} can't be sent.",
                err=True,
            )
        elif not json_out or not yes:
            held = "" if one.endpoint_state == "live" else f"  ({one.endpoint_state}: waits until it is live again)"
            say(
                f"endpoint {one.endpoint_id}  {one.url}  {amount(one.letters, 'dead letter')}  "
                f"{speed(rate_per_s, one.rate_per_s, one.events)}{held}",
                err=json_out,
            )
    if totals and not sendable:
        raise StateError("none of these dead letters can be sent")
    if not sendable:
        _nothing(json_out, [])
        return
    ask(f"Send {amount(sum(one.letters for one in sendable), 'dead letter')} again?", yes=yes)
    with bar(total=sum(one.letters for one in sendable), quiet=json_out, what="taking up") as step:
        made, skipped = run_async(_resend(settings, fixed, sendable, rate_per_s, note, step))
    for left in skipped:
        say(f"Not sent, {amount(left.letters, 'dead letter')}: {left.why}.", err=True)
    if json_out:
        print_json([run.as_dict() for run in made])
        return
    for run in made:
        say(
            f"run {run.id}: {run.total:,} to endpoint {run.endpoint_id}. `dispatcher replay show {run.id} --watch` follows it."
        )


async def _resend(
    settings: Settings, chosen: Filter, totals: list[Total], rate_per_s: float | None, note: str, step: Callable[[int], None]
) -> tuple[list[RunView], list[Skipped]]:  # fmt: skip
    async with connected(settings) as connection:
        return await dead_letters.resend_each(connection, chosen, totals, rate_per_s, note, step=step)


@dead_letter.command()
@click.argument("ids", type=ID, nargs=-1, metavar="[ID]…")
@_filters
@click.option("--all", "all_", is_flag=True, help="All open ones that the filters choose.")
@yes_option
@as_json
@click.pass_obj
def discard(context: Context, /, ids: tuple[int, ...], all_: bool, yes: bool, json_out: bool, **chosen: Any) -> None:
    """Give up open dead letters with their payloads. This can't be undone. What happened to them stays on record.

    \b
    dispatcher dead-letter discard 31
    dispatcher dead-letter discard --endpoint 7 --until 30d --all --yes
    """
    settings = context.settings()
    fixed, totals = _choose(settings, ids, all_, chosen)
    letters = sum(one.letters for one in totals)
    if not letters:
        _nothing(json_out, {"discarded": 0})
        return
    if not json_out or not yes:
        for one in totals:
            say(f"endpoint {one.endpoint_id}  {one.url}  {amount(one.letters, 'dead letter')}", err=json_out)
    ask(f"Discard {amount(letters, 'dead letter')} for good?", yes=yes)
    with bar(total=letters, quiet=json_out, what="discarding") as step:
        done = with_connection(settings, lambda c: dead_letters.discard(c, fixed, step=step))
    if json_out:
        print_json({"discarded": done})
    else:
        say(f"{amount(done, 'dead letter')} discarded")


def _choose(settings: Settings, ids: tuple[int, ...], all_: bool, chosen: dict[str, Any]) -> tuple[Filter, list[Total]]:
    """Count what was chosen: ids, or all that the filters leave, never both."""
    filtered = any(value not in (None, ()) for value in chosen.values())
    if bool(ids) == all_ or (ids and filtered):
        raise InputError("name dead letters by id, or choose them with filters and --all")
    wanted = Filter(**chosen)
    if ids:
        wanted = replace(wanted, ids=tuple(dict.fromkeys(ids)))
    with busy("counting"):
        return with_connection(settings, lambda c: dead_letters.total(c, wanted))


def _nothing(json_out: bool, empty: Any) -> None:
    if json_out:
        print_json(empty)
    else:
        say("There are no such open dead letters.")
