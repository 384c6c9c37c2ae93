"""The documents are a site whose links all lead somewhere: `mkdocs build --strict`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(root: Path, at: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(root / "mkdocs.yml"),
        "--site-dir",
        str(at),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / name).is_file(), page.name


def test_a_link_or_an_anchor_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    for text, is_good in (("[a](#here)\n\n## Here\n", True), ("[a](#there)\n", False), ("[a](nowhere.md)\n", False)):
        (tmp_path / "docs" / "index.md").write_text(text)
        assert (build(tmp_path, tmp_path / "site").returncode == 0) == is_good, text
