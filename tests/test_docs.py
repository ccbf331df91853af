"""Examples and commands of the documentation run, promises have tests, and the gallery says what the classes say."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_rkd.losses
from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.losses.references import bibliography
from tests.harness.processes import import_file, run_script

ROOT = Path(__file__).parents[1]
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
GALLERY = import_file(ROOT / "docs" / "gallery.py")
METHODS = GALLERY.losses() | GALLERY.schemes()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
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
    script, text = tmp_path / "page.py", "\n".join(blocks(page, "python"))
    if "import transformers" in text:
        pytest.importorskip("transformers", reason=f"{name(page)} needs transformers: make test-networks")
    script.write_text(text)
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


# Guarantees


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test_that_exists() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25
    for row in rows:
        assert re.search(r"`tests/\S+::test_\w+`", row), row
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", GUARANTEES):
        assert test in functions_in(ROOT / file), f"{file} has no {test}"


def test_every_link_leads_to_a_page() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", GUARANTEES):
        assert (ROOT / "docs" / target).is_file(), target


# The gallery


def test_the_gallery_is_up_to_date() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert page == GALLERY.page(), "run python docs/gallery.py"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_equation_paper_and_bibtex_entry(method: str) -> None:
    cls, entry = METHODS[method], GALLERY.entry(method, METHODS[method])
    assert GALLERY.equation(cls)
    assert "```bibtex\n@" in entry
    assert cls.reference.citation
    assert not any(mark in entry for mark in (":math:", ":class:", ":func:"))


def test_every_entry_of_the_bibliography_belongs_to_a_method() -> None:
    assert {cls.reference.key for cls in METHODS.values()} == set(bibliography())


def test_a_reconstruction_is_called_one() -> None:
    assert "**reconstruction**" in GALLERY.entry("STKD", lightning_rkd.losses.STKD)


def test_what_is_not_shipped_is_listed_with_what_is_missing() -> None:
    for method, why in GALLERY.NOT_SHIPPED.items():
        assert len(why) > 40, method
        assert not hasattr(lightning_rkd.losses, method)
