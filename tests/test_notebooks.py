"""The notebooks are what their sources say, show what they should, and run from top to bottom."""

import doctest
import re
from pathlib import Path

import nbformat
import pytest

from tests.harness.forks import run_code
from tests.harness.processes import import_file

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = {"11_text": "wordllama"}
"""Packages that a notebook needs and the library does not."""
build = import_file(FOLDER / "build.py")


def test_every_source_has_its_notebook_and_every_notebook_its_source() -> None:
    assert {path.stem for path in (FOLDER / "src").glob("*.py")} == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_source_and_clean(path: Path) -> None:
    assert build.in_step(FOLDER / "src" / f"{path.stem}.py", path), f"run python notebooks/build.py {path.stem}"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert build.complaints(notebook) == []
    assert path.stat().st_size <= build.LIMIT
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    links = [name for text in texts for name in build.local_links(text)]
    assert [name for name in links if not (FOLDER / name).exists()] == []


LENGTHS = re.compile(
    r"""\b(steps|max_steps|batches_per_epoch|epochs|max_epochs|EPOCHS|max_classes)("?(?:=|: | = ))(\d+)"""
)


def shortened(source: str) -> str:
    """A cell that trains a tenth as long, for at least one epoch or 24 steps, on at most 100 classes, with one seed."""

    def fewer(found: re.Match[str]) -> str:
        name, between, number = found[1], found[2], int(found[3])
        least = 100 if name == "max_classes" else 1 if "epochs" in name.lower().split("_per_")[0] else 24
        return f"{name}{between}{min(number, max(least, number // 10))}"

    return LENGTHS.sub(fewer, source).replace("seeds: [0, 1]", "seeds: [0]")


def test_a_shortened_notebook_trains_for_a_tenth_of_its_steps_and_epochs() -> None:
    source = "train(steps=300, epochs=6)\nsteps: 60\nEPOCHS = 30\nmax_steps=5, batches_per_epoch=50, max_classes=150"
    expected = "train(steps=30, epochs=1)\nsteps: 24\nEPOCHS = 3\nmax_steps=5, batches_per_epoch=24, max_classes=100"
    assert shortened(source) == expected
    assert any("seeds: [0, 1]" in path.read_text() for path in NOTEBOOKS), "one seed is taken of two"


SHELL = """
import os, sys
from IPython.core.interactiveshell import InteractiveShell

folder, *cells = sys.argv[1:]
os.chdir(folder)
shell = InteractiveShell.instance()
shell.enable_gui = lambda gui: None  # as a kernel has it for pictures within the notebook
for cell in cells:
    shell.run_cell(cell).raise_error()
"""


def read_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    if package := PACKAGES.get(path.stem):
        pytest.importorskip(package, reason=f"the notebook {path.stem} needs {package}")
    for data in ("CIFAR100", "BANKING77"):
        monkeypatch.delenv(data, raising=False)
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shortened_cells_run_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shell without a kernel, and in a folder of their own."""
    notebook = read_notebook(path, monkeypatch)
    cells = [shortened(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    run_code(SHELL, str(tmp_path), *cells)


@pytest.mark.campaign
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reader has it."""
    notebook = read_notebook(path, monkeypatch)
    build.run(notebook, tmp_path)
    build.tidy(notebook)
    # other versions may warn of other things
    assert [complaint for complaint in build.complaints(notebook) if "on stderr" not in complaint] == []


def test_a_source_that_begins_without_a_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="must begin with a cell, # %%, got 'import torch'"):
        build.read("import torch\n# %%\n")


def test_what_must_not_be_committed_is_found() -> None:
    notebook = build.read("# %%\nprint(1)\n\n# %%\nprint(2)\n")
    notebook.cells[0].execution_count = 1
    notebook.cells[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[1mbold\x1b[0m in "),
        nbformat.v4.new_output("stream", name="stdout", text="/home/me/runs"),
    ]
    build.tidy(notebook)
    assert [c.split(":")[1].strip() for c in build.complaints(notebook)] == [
        "stream on stderr",
        "a path of this machine",
        "did not run, or carries metadata",
    ]


def test_magic_commands_and_text_come_through() -> None:
    notebook = build.read(
        "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\n# %matplotlib inline\nx = 1  # %% not a cell\n"
    )
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        ("markdown", "# Title\n\ntext"),
        ("code", "%matplotlib inline\nx = 1  # %% not a cell"),
    ]


def test_the_examples_in_the_builder_are_right() -> None:
    assert doctest.testmod(build).failed == 0
