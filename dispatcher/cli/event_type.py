"""`dispatcher event-type …`: the catalogue that panel and API show."""

from pathlib import Path

import click

from dispatcher.cli.common import Context, as_json, print_json, print_rows, with_connection
from dispatcher.domain.text import amount
from dispatcher.errors import InputError
from dispatcher.store import event_types


@click.group("event-type")
def event_type() -> None:
    """The catalogue of event types: names, meanings, JSON Schemas, samples, and what customers may filter by.

    An SMS platform's is there by default. Events of types that aren't in it are delivered all the same.

    \b
    dispatcher event-type list
    """


@event_type.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--only", is_flag=True, help="Take out every type that the file doesn't name.")
@as_json
@click.pass_obj
def import_(context: Context, file: Path, only: bool, json_out: bool) -> None:
    """Add or replace the types that FILE names: a JSON array, as `event-type list --json` prints it. All or none.

    \b
    dispatcher event-type import catalogue.json --only
    """
    try:
        catalogue = file.read_bytes()
    except OSError as exc:
        raise InputError(f"{file} can't be read: {exc.strerror}") from exc
    count = with_connection(context.settings(), lambda db: event_types.install(db, catalogue, only=only))
    if json_out:
        print_json({"installed": count})
    else:
        click.echo(f"{amount(count, 'event type')} installed")


@event_type.command("list")
@as_json
@click.pass_obj
def list_types(context: Context, json_out: bool) -> None:
    """List the catalogue. With --json it is whole, to be edited and imported again.

    \b
    dispatcher event-type list --json > catalogue.json
    """
    found = with_connection(context.settings(), lambda db: event_types.find(db, limit=event_types.TYPES_MAX))
    rows = [{name: value for name, value in one.as_dict().items() if not name.endswith("_at")} for one in found]
    if json_out:
        print_json(rows)
    else:
        print_rows(rows, ("name", "title", "default_on", "description"), "The catalogue is empty.")
