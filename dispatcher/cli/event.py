"""`dispatcher event …` and `dispatcher tail`: append events, and see what became of them."""

import asyncio
import sys
from datetime import datetime, timedelta
from typing import Any

import click
import orjson

from dispatcher.cli.common import ID, MOMENT, Context, admin, as_json, print_json, run_async, say, with_admin
from dispatcher.errors import InputError
from dispatcher.settings import Settings

TAIL_POLL_S = 0.3
TAIL_WINDOW_IDS = 50_000  # attempts of older events (retries) are not shown by tail; `event show` has them


PAYLOAD_BYTES_ADVISED = 20_000  # Standard Webhooks, "Payload size"


@click.group()
def event() -> None:
    """Append events to the outbox, and see what became of them."""


@event.command()
@click.argument("account_id")
@click.argument("event_type")
@click.argument("payload")
@click.option("--occurred-at", type=MOMENT, help="When it happened, such as 2026-03-01T09:30:00Z.")
@click.option("--ordering-key", help="Endpoints that order by key get the events of one key one by one.")
@click.option(
    "--expires-at", type=MOMENT,
    help="Worth nothing afterwards, such as 2026-03-01T09:30:00Z: what is still to be sent then is settled unsent.",
)  # fmt: skip
@click.option(
    "--priority", type=click.IntRange(-32_768, 32_767), help="Above 0: sent first where an endpoint is behind."
)
@as_json
@click.pass_obj
def send(
    context: Context, /, account_id: str, event_type: str, payload: str, occurred_at: datetime | None, json_out: bool, **options: Any
) -> None:  # fmt: skip
    """Append one event, as a producer's INSERT would. PAYLOAD is JSON; - reads it from standard input.

    \b
    dispatcher event send acct_1 message.delivered '{"message": {"id": "m_1"}}'
    """
    if payload == "-":
        try:
            payload = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as exc:
            raise InputError(f"the payload on standard input is not valid UTF-8: {exc}") from exc
    event_id, public_id = with_admin(
        context.settings(), lambda a: a.events.send(account_id, event_type, payload, occurred_at, **options)
    )
    if len(payload.encode()) > PAYLOAD_BYTES_ADVISED:
        say(
            "note: the payload is larger than 20 kB; every endpoint gets all of it, so rather send an id to look it up by, or a link",
            err=True,
        )
    if json_out:
        print_json({"id": event_id, "event_id": public_id})
    else:
        say(f"{event_id}  {public_id}")


@event.command()
@click.argument("reference")
@as_json
@click.pass_obj
def show(context: Context, reference: str, json_out: bool) -> None:
    """Show what happened to an event, attempt by attempt. REFERENCE is an outbox id or an evt_… id.

    Each endpoint that was subscribed is listed, also one that has had no attempt: that answers "why did this not arrive?". Its resends and
    replays are told apart from the original. Of an event that retention has taken, its dead letters' copies still tell.

    \b
    dispatcher event show evt_0ee4da927ccba008cff736c89e3074c0
    """
    shown = with_admin(context.settings(), lambda a: a.events.show(reference))
    payload = shown["payload"]
    if json_out:
        print_json(shown | {"payload": None if payload is None else orjson.Fragment(payload.encode())})
        return
    say(
        f"{shown['id']}  {shown['event_id']}  {shown['type']}  account {shown['account_id']}  {shown['created_at']:%Y-%m-%d %H:%M:%S.%f} UTC"
    )
    if shown["expires_at"] is not None:
        shown["expires_at"] = f"{shown['expires_at']:%Y-%m-%d %H:%M:%S} UTC"
    options = [f"{label} {shown[name]}" for name, label in _OPTIONS.items() if shown[name] is not None]
    if options:
        say("  " + ", ".join(options))
    if not shown["in_log"]:
        say("It is gone from the outbox, by retention or an erasure; this is what its dead letters and attempts tell.")
    if not shown["deliveries"]:
        say("No endpoint was subscribed to it.")
    for delivery in shown["deliveries"]:
        say(f"endpoint {delivery['endpoint_id']}  {delivery['url']}  {delivery['fate']}")
        if len(delivery["runs"]) > 1:
            for run in delivery["runs"]:
                say(f"  run {run['run']} ({run['kind']}): {run['fate']}")
        for attempt in delivery["attempts"]:
            say(attempt_line(attempt))


_OPTIONS = {
    "ordering_key": "ordering key",
    "expires_at": "expires at",
    "priority": "priority",
    "traceparent": "traceparent",
}


def attempt_line(attempt: dict[str, Any]) -> str:
    if attempt["number"] == 0:
        return f"  no attempt  {attempt['started_at']:%H:%M:%S.%f}  {attempt['fault']}"
    answer = attempt["status"] if attempt["fault"] in (None, "status") else attempt["fault"]
    run = f"run {attempt['run']} " if attempt["run"] else ""
    return f"  {run}attempt {attempt['number']}  {attempt['started_at']:%H:%M:%S.%f}  {attempt['duration_us'] / 1000:8.1f} ms  {answer}"


@click.command()
@click.option("--endpoint", "endpoint_id", type=ID, help="Of this endpoint only.")
@click.option("--failures", is_flag=True, help="Failed attempts only.")
@click.option("--seconds", type=float, help="End after so long. [default: until Ctrl-C]")
@click.option("--json", "json_out", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def tail(context: Context, endpoint_id: int | None, failures: bool, seconds: float | None, json_out: bool) -> None:
    """Follow deliveries as they are recorded.

    \b
    dispatcher tail --endpoint 7 --failures
    """
    try:
        run_async(_tail(context.settings(), endpoint_id, failures, seconds, json_out))
    except KeyboardInterrupt:
        pass  # how one leaves it


async def _tail(
    settings: Settings, endpoint_id: int | None, failures: bool, seconds: float | None, json_out: bool
) -> None:
    loop = asyncio.get_running_loop()
    deadline = float("inf") if seconds is None else loop.time() + seconds
    async with admin(settings) as opened:
        # A batch is recorded some time after its attempts began, so each look goes back a little and skips what was shown.
        since = await opened.now()
        shown: dict[tuple[Any, ...], None] = {}
        endpoint_ids = None if endpoint_id is None else [endpoint_id]
        while loop.time() < deadline:
            for attempt in await opened.events.tail(
                since - timedelta(seconds=15), endpoint_ids, TAIL_WINDOW_IDS, failures=failures
            ):
                key = (attempt["event_id"], attempt["endpoint_id"], attempt["run"], attempt["number"])
                if key in shown or attempt["started_at"] < since - timedelta(seconds=15):
                    continue
                shown[key] = None
                _print_attempt(attempt, json_out)
            while len(shown) > 100_000:
                del shown[next(iter(shown))]
            since = max(since, await opened.now() - timedelta(seconds=1))
            await asyncio.sleep(TAIL_POLL_S)


def _print_attempt(attempt: dict[str, Any], json_out: bool) -> None:
    if json_out:
        print_json(attempt, indent=False)
        return
    answer = attempt["status"] if attempt["fault"] in (None, "status") else attempt["fault"]
    say(
        f"{attempt['started_at']:%H:%M:%S.%f}  endpoint {attempt['endpoint_id']:<6} event {attempt['event_id']:<10} {attempt['type']:22} "
        f"attempt {attempt['number']}  {attempt['duration_us'] / 1000:7.1f} ms  {answer}"
    )
