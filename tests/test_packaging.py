"""`pip install` gives a working `dispatcher`: the wheel has all that it reads at run time, and runs from anywhere.

The wheel is built here and installed into a virtual environment of its own, which sees this one's libraries by a .pth: no network, a few
seconds. (This one's own `dispatcher` it doesn't see: that is named by another .pth, and those don't chain.)
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_cli import empty  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ran(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("wheel")
    ran(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        at,
        ROOT,
        cwd=at,
    )
    [built] = at.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Install the wheel; return the directory of its programs."""
    home = wheel.parent / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    ran(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=wheel.parent,
    )
    [site] = (home / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dispatcher").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package - inside == set()
    assert len([name for name in package if not name.endswith(".py")]) > 30, "SQL, templates, static files, snippets"
    for name in ("schema.sql", "py.typed", "store/catalogue.json", "store/migrations/2.sql", "web/static/base.css"):
        assert f"dispatcher/{name}" in inside
    assert [name for name in inside if name.startswith(("tests/", "bench/"))] == []
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_source_distribution_has_what_its_tests_read(tmp_path: Path) -> None:
    ran(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    [built] = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    kept = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    left_out = {name for name in kept if name and not name.startswith(".")} - inside
    assert left_out == set()
    assert "deploy/dispatcher.service" in inside


def test_what_was_installed_is_what_runs(installed: Path, tmp_path: Path) -> None:
    where = ran(installed / "python", "-c", "import dispatcher; print(dispatcher.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent)), "not this checkout"


@pytest.mark.parametrize("words", [("--help",), ("migrate", "--help"), ("run", "--help"), ("listen", "--help")])
def test_verbs_teach_from_anywhere(installed: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert ran(installed / "dispatcher", *words, cwd=tmp_path).startswith("Usage: dispatcher")
    assert ran(installed / "python", "-m", "dispatcher", *words, cwd=tmp_path).startswith("Usage: ")


def test_it_knows_its_version(installed: Path, tmp_path: Path) -> None:
    assert PROJECT["version"] in ran(installed / "dispatcher", "--version", cwd=tmp_path)


READS = """
from dispatcher.store import event_types, migrate
from dispatcher.web import pages
from dispatcher.web.panel import setup
assert "CREATE SCHEMA" in migrate.schema_sql()
assert event_types.DEFAULT_CATALOGUE.read_bytes()
print("read")
"""


def test_what_it_reads_is_found(installed: Path, tmp_path: Path) -> None:
    assert ran(installed / "python", "-c", READS, cwd=tmp_path) == "read\n"


def test_it_installs_its_schema(installed: Path, tmp_path: Path, empty: str) -> None:  # noqa: F811 - the fixture
    environment = os.environ | {"DISPATCHER_DATABASE_URL": empty}
    done = subprocess.run(
        [installed / "dispatcher", "migrate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"installed schema version \d+", done.stdout)


def test_classifiers_say_which_pythons() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    listed = [one.rpartition(" :: ")[2] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert listed[0] == oldest
    assert "Typing :: Typed" in PROJECT["classifiers"]
