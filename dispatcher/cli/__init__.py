"""The command line: `dispatcher VERB`. Every verb teaches with --help, prints JSON with --json where it prints
anything, and ends with a sentence and an exit status when something is wrong (dispatcher/errors.py)."""

import sys
from importlib import import_module
from pathlib import Path

import click

from dispatcher import errors, log
from dispatcher.cli.common import Context, say

# verb → where it is; imported when it is asked for: a start that imports what other verbs need takes twice as long
VERBS = {
    "run": "service:run",
    "web": "service:web",
    "status": "status:status",
    "doctor": "doctor:doctor",
    "settings": "settings:settings_command",
    "demo": "service:demo",
    "migrate": "service:migrate",
    "endpoint": "endpoint:endpoint",
    "event": "event:event",
    "tail": "event:tail",
    "resend": "replay:resend",
    "replay": "replay:replay",
    "dead-letter": "dead_letter:dead_letter",
    "erase": "erase:erase",
    "key": "key:key",
    "event-type": "event_type:event_type",
    "partitions": "partitions:partitions",
    "maintain": "partitions:maintain",
    "rotate-key": "rotate_key:rotate_key_command",
    "completion": "completion:completion",
    "listen": "listen:listen",
    "verify": "verify:verify",
    "sink": "sink:sink_command",
}


class Verbs(click.Group):
    """The verbs, each imported when it is asked for. A word that isn't UTF-8 is nothing that a database holds: it is refused before a verb
    sees it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = VERBS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        found = import_module("dispatcher.sink" if module == "sink" else f"dispatcher.cli.{module}")
        command: click.Command = getattr(found, name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError as exc:
                raise errors.InputError(f"{word!a} is not UTF-8; set your terminal to it") from exc
        return super().parse_args(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dispatcher")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="DISPATCHER_CONFIG",
    help="TOML file with settings.",
)
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Deliver webhooks from a PostgreSQL outbox.

    Settings come from DISPATCHER_* variables or a TOML file. Without DISPATCHER_DATABASE_URL an embedded PostgreSQL is used, so that
    everything here works at once:

    \b
      dispatcher demo                                   see it work
      dispatcher sink --port 9000                       a receiver to try things out
      dispatcher endpoint create acct_1 URL             make an endpoint, test it, go live
      dispatcher event send acct_1 message.sent '{}'    send it an event
      dispatcher run                                    the service
      dispatcher status                                 who owns it, who stands by, how far behind
      dispatcher doctor                                 what is wrong, and what to do about it

    \b
    When something went wrong:

    \b
      dispatcher event show EVENT                       why did this not arrive?
      dispatcher resend EVENT ENDPOINT                  send one event again
      dispatcher replay start ENDPOINT --since 6h       send what failed in a range again
      dispatcher dead-letter list                       what was given up
      dispatcher erase account ACCOUNT                  forget an account for good

    Every verb has --help with an example, and --json where it prints results. `dispatcher completion SHELL` completes them.
    """
    context.obj = Context(config)


def main() -> None:
    """Run the command line; `DispatcherError` becomes a sentence on stderr and its exit status."""
    try:
        cli(standalone_mode=True)
    except errors.DispatcherError as exc:
        say(f"{log.priority('error', sys.stderr)}error: {exc}", err=True)
        sys.exit(exc.exit_code)


__all__ = ["cli", "main"]
