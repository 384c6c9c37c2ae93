"""The documents say what the code does."""

import re
from pathlib import Path
from typing import Any

import click
from pydantic_core import PydanticUndefined

from dispatcher.cli import cli
from dispatcher.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def settings_table() -> str:
    """The README's table, from the one table that there is. `python -m tests.test_docs` writes it."""
    lines = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(f"| `DISPATCHER_{name.upper()}` | {_shown(field.default)} | {field.description} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "`/var/lib/dispatcher` for root, else `~/.local/share/dispatcher`"
    if default is None or default == "":
        return "–"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return "`" + ",".join(map(str, default)) + "`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


MARKED = re.compile(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", re.DOTALL)


def test_readme_lists_every_setting_as_it_is() -> None:
    found = MARKED.search(README)
    assert found is not None
    assert found[1] == settings_table(), "run python -m tests.test_docs"


def test_every_verb_teaches_and_is_in_the_readme() -> None:
    def verbs(group: click.Group, path: str = "") -> list[tuple[str, click.Command]]:
        found = []
        for name, command in group.commands.items():
            found += (
                verbs(command, f"{path}{name} ") if isinstance(command, click.Group) else [(f"{path}{name}", command)]
            )
        return found

    for path, command in verbs(cli):
        assert command.help, path
        assert len(command.help.split()) >= 5, f"{path}: --help teaches nothing"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.name} has no help"
        assert re.search(rf"\b{re.escape(path.split()[-1])}\b", README), f"{path} is not in the README"


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(r"`(tests/\S+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


if __name__ == "__main__":
    block = f"<!-- settings -->\n{settings_table()}\n<!-- /settings -->"
    (ROOT / "README.md").write_text(MARKED.sub(lambda _: block, README))
