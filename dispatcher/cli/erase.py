"""`dispatcher erase …`: make an account or an event unreadable for good, and keep a record that it was done."""

from dataclasses import asdict
from typing import Any

import click

from dispatcher.cli.common import (
    ID,
    Context,
    as_json,
    connected,
    print_json,
    print_rows,
    run_async,
    say,
    with_connection,
)
from dispatcher.cli.terminal import about, ask, ask_to_type, bars, busy, yes_option
from dispatcher.domain.text import amount
from dispatcher.store import erasure
from dispatcher.store.erasure import AccountData, Erased, EventData
from dispatcher.store.session import Connection


@click.group()
def erase() -> None:
    """Erase an account or one event: payloads, answers, secrets and addresses. This can't be undone, and is logged.

    Attempts, times and counts stay. A POST that is in flight can't be recalled, and receivers keep what they have got. What is erased leaves the
    server's files with the next VACUUM; backups keep it for as long as they live.

    \b
    dispatcher erase account acct_1
    dispatcher erase list
    """


@erase.command()
@click.argument("account_id")
@yes_option
@as_json
@click.pass_obj
def account(context: Context, account_id: str, yes: bool, json_out: bool) -> None:
    """Delete an account's endpoints and erase its events, answers, dead letters and tests. Asks for the account's id to be typed.

    Stop the account's producer first: events that are inserted after it began are not erased. An interrupted erasure is completed by repeating
    it.

    \b
    dispatcher erase account acct_1
    """
    settings = context.settings()

    async def look(connection: Connection) -> tuple[AccountData, float]:
        return await erasure.look_at_account(connection, account_id), await erasure.in_flight_s(connection, account_id)

    with busy("counting"):
        found, wait_s = with_connection(settings, look)
    if not json_out or not yes:
        lines = [
            f"account        {account_id}{'  (an erasure was interrupted; this completes it)' if found.began else ''}",
            f"endpoints      {found.endpoints:,} (deleted, with secrets, URLs and names; what waits is not sent)",
            f"events         {_many(found.events)}",
            f"answers        {_many(found.response_heads)} (the kept beginnings of failed attempts' answers)",
            f"dead letters   {_many(found.dead_letters)} (their payloads)",
            f"tests          {_many(found.tests)}",
            *_waits(wait_s),
        ]
        say("\n".join(lines), err=json_out)
    ask_to_type("This can't be undone. Type the account's id to erase it", account_id, yes=yes)
    totals = {
        "endpoints": float(found.endpoints), "events": _float(found.events), "answers": _float(found.response_heads),
        "dead letters": _float(found.dead_letters), "waiting": wait_s,
    }  # fmt: skip
    try:
        with bars(totals, quiet=json_out) as step:
            done = with_connection(settings, lambda c: erasure.erase_account(c, settings, account_id, step=step))
    except KeyboardInterrupt:
        say(f"Interrupted: part of account {account_id} is erased. Repeat the command to erase the rest.", err=True)
        raise SystemExit(130) from None
    _print(done, json_out)


@erase.command()
@click.argument("event")
@yes_option
@as_json
@click.pass_obj
def event(context: Context, event: str, yes: bool, json_out: bool) -> None:
    """Erase one event: its payload, the answers to it, its dead letters. EVENT is an outbox id or an evt_… id.

    Deliveries of it that are still owed are not made, and are counted as discarded.

    \b
    dispatcher erase event evt_0ee4da927ccba008cff736c89e3074c0
    """
    settings = context.settings()

    async def look(connection: Connection) -> tuple[EventData, float]:
        found = await erasure.look_at_event(connection, event)
        return found, await erasure.in_flight_s(connection, found.account_id) if found.owed or found.began else 0.0

    found, wait_s = with_connection(settings, look)
    if not json_out or not yes:
        lines = [
            f"event          {found.id} of account {found.account_id}{'' if found.in_log else ', no longer in the outbox'}",
            f"answers        {found.response_heads:,} (the kept beginnings of failed attempts' answers)",
            f"dead letters   {found.dead_letters:,} (their payloads)",
            f"still owed     {amount(found.owed, 'delivery', 'deliveries')} will not be made",
            *_waits(wait_s),
        ]
        say("\n".join(lines), err=json_out)
    ask("Erase it? This can't be undone.", yes=yes)

    async def work(step: Any) -> Erased:
        async with connected(settings) as connection:
            return await erasure.erase_event(connection, await erasure.look_at_event(connection, event), step=step)

    try:
        with bars({"waiting": wait_s}, quiet=json_out) as step:
            done = run_async(work(step))
    except KeyboardInterrupt:
        say("Interrupted. Repeat the command with the outbox id to be sure that nothing came in meanwhile.", err=True)
        raise SystemExit(130) from None
    _print(done, json_out)


def _waits(wait_s: float) -> list[str]:
    if not wait_s:
        return []
    return [
        f"in flight      POSTs on their way can't be recalled; it waits {about(wait_s)} for their answers, and erases those too"
    ]


def _many(count: int | None) -> str:
    return "too many to count in time" if count is None else f"{count:,}"


def _float(count: int | None) -> float | None:
    return None if count is None else float(count)


@erase.command("list")
@click.option("--account", "account_id", help="Of this account only.")
@click.option("--after", type=ID, default=0, help="Begin after this erasure (to page).")
@as_json
@click.pass_obj
def list_erasures(context: Context, account_id: str | None, after: int, json_out: bool) -> None:
    """List what was erased, by whom and when: the record that remains.

    \b
    dispatcher erase list --account acct_1
    """
    found = with_connection(context.settings(), lambda c: erasure.find(c, account_id=account_id, after=after))
    if json_out:
        print_json([asdict(one) for one in found])
        return
    rows = [
        asdict(one)
        | {
            "what": f"event {one.event_id}" if one.event_id is not None else "account",
            "ended": f"{one.ended_at:%Y-%m-%d %H:%M:%S}" if one.ended_at else "interrupted: repeat it",
            "answers": one.response_heads,
        }
        for one in found
    ]
    columns = (
        "id",
        "account_id",
        "what",
        "events",
        "answers",
        "dead_letters",
        "tests",
        "endpoints",
        "erased_by",
        "ended",
    )
    print_rows(rows, columns, "Nothing was erased.")
    if len(found) == 1_000:
        say(f"… more: --after {found[-1].id}")


def _print(done: Erased, json_out: bool) -> None:
    if json_out:
        print_json(asdict(done))
        return
    what = f"event {done.event_id}" if done.event_id is not None else f"account {done.account_id}"
    counts = (
        (done.endpoints, "endpoint", None),
        (done.events, "event", None),
        (done.response_heads, "answer", None),
        (done.dead_letters, "dead letter's payload", "dead letters' payloads"),
        (done.tests, "test", None),
    )
    parts = [amount(count, one, several) for count, one, several in counts if count]
    say(f"{what} erased: {', '.join(parts) or 'nothing was left of it'}  (erasure {done.id})")
