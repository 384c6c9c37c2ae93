"""Every verb of the command line, with its words: `("endpoint", "create")`."""

from collections.abc import Iterator

import click

from dispatcher.cli import cli


def every_verb(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from every_verb(command, (*path, name))
        else:
            yield (*path, name), command
