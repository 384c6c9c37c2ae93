"""`dispatcher settings`: what holds, and where it comes from."""

import os
import tomllib
from pathlib import Path
from typing import Any

import click

from dispatcher.cli.common import Context, as_json, print_json, print_rows
from dispatcher.domain.redact import HIDDEN
from dispatcher.settings import ENV_PREFIX, FROM_FILES, SECRETS, Settings

DEFAULT, ENVIRONMENT = "default", "environment"


@click.command("settings")
@click.option("--changed", is_flag=True, help="Only what isn't the default.")
@as_json
@click.pass_obj
def settings_command(context: Context, changed: bool, json_out: bool) -> None:
    """Show every setting's effective value and where it comes from: environment, a file, or the default. Secrets are hidden.

    A bad one is refused with a sentence that names it, as a start would; so this is also how to check a file before a reload.

    \b
      dispatcher settings --changed
      dispatcher --config /etc/dispatcher.toml settings --json
    """
    rows = [row for row in listed(context.settings()) if not changed or row["source"] != DEFAULT]
    if json_out:
        print_json(rows)
    else:
        print_rows(
            [row | {"value": _shown(row["value"])} for row in rows],
            ("setting", "value", "source"),
            "all are at their defaults",
        )


def listed(settings: Settings) -> list[dict[str, Any]]:
    where = sources()
    return [
        {
            "setting": f"{ENV_PREFIX}{name.upper()}",
            "value": _value(name, getattr(settings, name)),
            "source": where[name],
        }
        for name in Settings.model_fields
    ]


def sources() -> dict[str, str]:
    """Say of each setting where its value comes from, in the order in which `load` looks."""
    path = os.environ.get(f"{ENV_PREFIX}CONFIG")
    in_file = tomllib.loads(Path(path).read_text()) if path else {}
    found = {}
    for name in Settings.model_fields:
        variable = f"{ENV_PREFIX}{name.upper()}"
        found[name] = ENVIRONMENT if variable in os.environ else f"file {path}" if name in in_file else DEFAULT
    for name in FROM_FILES:
        if found[name] == DEFAULT and found[f"{name}_file"] != DEFAULT:
            found[name] = f"the file of {ENV_PREFIX}{name.upper()}_FILE"
    return found


def _value(name: str, value: Any) -> Any:
    if value is not None and name in SECRETS:
        return HIDDEN
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
