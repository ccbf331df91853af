"""The documentation's examples run as they stand, its commands exist, and its site is built without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from tests.harness.processes import run_script

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
NOT_RUN = "<!-- not run: "
BLOCK = re.compile(r"(<!-- not run: [^\n]* -->\n)?```(\w*)\n(.*?)```", flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page that are to be run, in their order."""
    return [text for skipped, kind, text in BLOCK.findall(page.read_text()) if kind == language and not skipped]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def name(page: Path) -> str:
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_examples_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    code, output = run_script(script)
    assert code == 0, output[-3000:]


def commands() -> list[tuple[str, str]]:
    """Every line of the documentation that calls the command."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        for _, kind, text in BLOCK.findall(page.read_text()):
            lines = text.replace("\\\n", " ").splitlines() if kind in ("", "bash", "sh") else []
            found += [(page.stem, line.strip()) for line in lines if re.match(r"\s*(\.venv/bin/)?lightning-rkd ", line)]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_documentation_names_what_there_is(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    known = {*cli.COMMANDS, *cli.TRAINER}
    assert words[0] in known
    config = next((words[i + 1] for i, word in enumerate(words) if word in ("--config", "-c")), None)
    if config is not None and "/" not in config and config not in ("mine.yaml", "RECIPE"):
        assert config in recipes.names("comparison" if words[0] == "compare" else "recipe"), page


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not loaded, f"{page.name} loads {loaded}"
        assert "arithmatex" not in text, f"{page.name} holds an equation that was not written"
        unknown = [math for math in re.findall(r"<math.*?</math>", text, flags=re.DOTALL) if "\\" in math]
        assert not unknown, f"{page.name} holds an equation with a command that was not understood: {unknown[0]}"
