"""The documents say what the code does."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from annotated_types import Ge, Le
from pydantic_core import PydanticUndefined

from dispatcher.observe.catalogue import METRICS
from dispatcher.observe.reload import AT_ONCE
from dispatcher.settings import Settings
from tests.verbs import every_verb

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


SETTINGS_PAGE = """\
# Settings

Every setting, from the one table (`dispatcher/settings.py`). Each is read from the environment, `DISPATCHER_<NAME>`, or from a TOML file
(`dispatcher --config FILE`, or `DISPATCHER_CONFIG`), where it is written in lower case without the prefix; the environment goes first. A bad or
unknown one stops the start with a sentence that names it. `dispatcher settings` shows what holds and where it comes from.

Secrets may be in files, as service managers and containers hand them over: `DISPATCHER_DATABASE_URL_FILE` and its like.

**at once**: SIGHUP reads the file again and these hold from then on; the others are named in one line of the log and need a restart.

"""

METRICS_PAGE = """\
# Metrics

What `/metrics` shows where `DISPATCHER_HEALTH_LISTEN` says, from the one table (`dispatcher/observe/catalogue.py`), beside the process's own
(`process_cpu_seconds_total`, `process_open_fds`, …). Labels are bounded: no endpoint, account or event type is one. What only an owner knows a
standby leaves out; what only the database knows is left out while it is away. Times are in seconds, in buckets of powers of two from 256 µs on.
`dispatcher web`, panel and API alone, shows `build_info`, `loop_lag_seconds`, `database_up` and what begins with `web_`; the latter `run` shows
too where it serves them.

The alerts on them: [runbooks](runbooks.md). A dashboard: `deploy/grafana/dispatcher.json`.

"""


def settings_page() -> str:
    lines = ["| setting | default | values | at once | what it is |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        at_once = "yes" if name in AT_ONCE else ""
        lines.append(
            f"| `DISPATCHER_{name.upper()}` | {_shown(field.default)} | {_values(field)} | {at_once} | {field.description} |"
        )
    return SETTINGS_PAGE + "\n".join(lines) + "\n"


def _values(field: Any) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(field.annotation))
    bounds = {type(m): m for m in field.metadata}
    if Ge in bounds and Le in bounds:
        return f"{bounds[Ge].ge:,} – {bounds[Le].le:,}"
    return ""


def metrics_page() -> str:
    kinds = {"seconds": "histogram", "size": "histogram"}
    lines = ["| metric | kind | label | what it is |", "|---|---|---|---|"]
    for spec in METRICS:
        label = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.full_name}` | {kinds.get(spec.kind, spec.kind)} | {label} | {spec.help} |")
    return METRICS_PAGE + "\n".join(lines) + "\n"


PAGES = {"settings.md": settings_page, "metrics.md": metrics_page}

MARKED = re.compile(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", re.DOTALL)


def test_readme_lists_every_setting_as_it_is() -> None:
    found = MARKED.search(README)
    assert found is not None
    assert found[1] == settings_table(), "run python -m tests.test_docs"


@pytest.mark.parametrize("name", PAGES)
def test_pages_that_are_made_of_tables_are_as_these_are(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run python -m tests.test_docs"


def test_every_verb_teaches_and_is_in_the_readme() -> None:
    for words, command in every_verb():
        path = " ".join(words)
        assert command.help, path
        assert len(command.help.split()) >= 5, f"{path}: --help teaches nothing"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.name} has no help"
        assert re.search(rf"\b{re.escape(words[-1])}\b", README), f"{path} is not in the README"


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
    for page, make in PAGES.items():
        (ROOT / "docs" / page).write_text(make())
    (ROOT / "README.md").write_text(MARKED.sub(lambda _: block, README))
