"""`dispatcher listen`: deliveries, sent on to a server on this machine (dispatcher/laptop), and what it answers."""

import asyncio
import os
import signal
import sys
from dataclasses import asdict
from datetime import datetime
from urllib.parse import urlsplit

import click

from dispatcher.cli.common import ID, as_json, print_json, run_async, say
from dispatcher.errors import InputError, NotFoundError
from dispatcher.laptop.api import connected_api
from dispatcher.laptop.listener import Forwarded, Listener, temporary_endpoint


@click.command()
@click.option("--forward-to", required=True, help="The local server: http://localhost:3000/hooks.")
@click.option(
    "--api-url",
    envvar="DISPATCHER_API_URL",
    required=True,
    help="Where panel and API are: https://hooks.example.com. [env: DISPATCHER_API_URL]",
)
@click.option(
    "--api-key",
    envvar="DISPATCHER_API_KEY",
    required=True,
    help="An API key (`dispatcher key create`). [env: DISPATCHER_API_KEY]",
)
@click.option("--account", "account_id", help="Whose events; needed with an operator's key.")
@click.option(
    "--type",
    "types",
    multiple=True,
    default=("*",),
    show_default=True,
    help="Event types: exact, prefix (message.*) or *. Repeat it.",
)
@click.option("--receiver", "receiver_id", type=ID, help="Follow this receiver, which is there, and make nothing.")
@click.option("--replay", "replay_id", type=ID, help="With --receiver: send this request on once more, and end.")
@as_json
def listen(
    forward_to: str, api_url: str, api_key: str, account_id: str | None, types: tuple[str, ...], receiver_id: int | None,
    replay_id: int | None, json_out: bool,
) -> None:  # fmt: skip
    """Send deliveries on to a server on this machine, signed as they came, and show what it answers.

    Through the API: it makes a built-in receiver and an endpoint on it, prints the endpoint's secret, tests it, follows what comes, and deletes
    both at the end (Ctrl-C). On a terminal, Enter sends the last request on once more; a number, the one with that number.

    A receiver takes ten requests a second, and bodies up to 16 kB are sent on. The dispatcher is answered by the receiver, not by your server:
    what your server refuses is not tried again.

    \b
    export DISPATCHER_API_URL=https://hooks.example.com DISPATCHER_API_KEY=…
    dispatcher listen --forward-to http://localhost:3000/hooks --type 'message.*'
    """
    if urlsplit(forward_to).scheme not in ("http", "https") or not urlsplit(forward_to).hostname:
        raise InputError(
            f"--forward-to is a URL such as http://localhost:3000/hooks, not {forward_to!r}", field="forward_to"
        )
    if replay_id is not None and receiver_id is None:
        raise InputError("--replay needs --receiver: whose request it is", field="replay")

    async def work() -> bool:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with connected_api(api_url, api_key) as api:
            show = _print_json if json_out else _print
            if receiver_id is not None:
                listener = Listener(api, receiver_id, forward_to, show=show, warn=_warn)
                after = await listener.newest()
                if replay_id is not None:
                    return await listener.again(replay_id)
                await _until(stop, listener, after)
                return True
            async with temporary_endpoint(api, account_id, types, _warn) as made:
                await _until(stop, Listener(api, made, forward_to, show=show, warn=_warn), 0)
            return True

    if not run_async(work()):
        raise SystemExit(1)


def _print_json(one: Forwarded) -> None:
    print_json(asdict(one), indent=False)


def _print(one: Forwarded) -> None:
    at = datetime.fromisoformat(one.at).astimezone().strftime("%H:%M:%S")
    outcome = "" if one.status is None else f"{one.status} in {one.duration_ms:.0f} ms "
    say(
        f"{at}  {one.id}{' again' if one.again else ''}  {one.type}  {one.webhook_id}  {one.body_bytes} bytes, "
        f"signature {one.signature} → {outcome}{' '.join(one.answer.split())}"
    )


def _warn(text: str) -> None:
    say(text, err=True)


async def _until(stop: asyncio.Event, listener: Listener, after: int) -> None:
    """Follow until asked to stop, or until the receiver is no more."""
    say("listening; Ctrl-C ends it" + (", Enter sends the last one on again" if sys.stdin.isatty() else ""), err=True)
    following = asyncio.create_task(listener.follow(after))
    stopping = asyncio.create_task(stop.wait())
    typing = asyncio.create_task(_typed(listener)) if sys.stdin.isatty() else None
    try:
        await asyncio.wait([following, stopping], return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
    finally:
        tasks = [task for task in (following, stopping, typing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _typed(listener: Listener) -> None:
    """Send one on again for each line that is typed."""
    lines: asyncio.Queue[str] = asyncio.Queue(maxsize=16)
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        text = os.read(stdin, 4_096).decode("utf-8", "replace")
        if not text:
            loop.remove_reader(stdin)  # a terminal that hung up is readable for ever
        elif not lines.full():
            lines.put_nowait(text.strip())

    loop.add_reader(stdin, read)
    try:
        while True:
            line = await lines.get()
            try:
                await listener.again(int(line) if line.isdecimal() and len(line) <= 18 else None)
            except NotFoundError as exc:
                say(str(exc), err=True)
    finally:
        loop.remove_reader(stdin)
