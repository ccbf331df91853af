"""Runs each ``notebooks/src/*.py`` from top to bottom and writes it as ``notebooks/*.ipynb``.

    python notebooks/build.py                   those whose source has changed; new text and comments keep the outputs
    python notebooks/build.py 03_relations      these, in any case

The sources are plain Python in the percent format of jupytext: a cell begins with ``# %%``, a text cell with
``# %% [markdown]``, and a line such as ``# %matplotlib inline`` is a magic command.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lightning_rkd.utils.files import write_whole

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIMIT = 400_000  # bytes of a notebook
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def read(source: str) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs.

    Raises:
        ValueError: There is text before the first cell.

    Example:
        >>> [(cell.cell_type, cell.source) for cell in read("# %% [markdown]\\n# # Hello\\n\\n# %%\\n# %time 1\\n").cells]
        [('markdown', '# Hello'), ('code', '%time 1')]
    """
    head, *parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    if head.strip():
        raise ValueError(f"a source must begin with a cell, # %%, got {head.strip().splitlines()[0]!r}")
    cells = []
    for number, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        text = body.strip("\n")
        if kind.strip() == "[markdown]":
            cell = nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", text, flags=re.MULTILINE))
        else:
            cell = nbformat.v4.new_code_cell(re.sub(r"^# (?=%\w|!)", "", text, flags=re.MULTILINE))
        cell["id"] = f"cell-{number}"
        cells.append(cell)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook["nbformat_minor"] = 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def in_step(source: Path, notebook: Path) -> bool:
    """True if the cells of the notebook are those of the source."""
    if not notebook.exists():
        return False
    wanted = read(source.read_text(encoding="utf-8")).cells
    found = nbformat.read(notebook, as_version=4).cells
    return [(c.cell_type, c.source, c.id) for c in wanted] == [(c.cell_type, c.source, c.id) for c in found]


def same_code(name: str) -> nbformat.NotebookNode | None:
    """The notebook of a source if they differ in text and comments only, so that its outputs stay valid."""
    if not (path := HERE / f"{name}.ipynb").exists():
        return None
    found = nbformat.read(path, as_version=4)
    wanted = read((SOURCES / f"{name}.py").read_text(encoding="utf-8"))
    codes = [[(c.cell_type, c.cell_type == "code" and code(c.source)) for c in x.cells] for x in (wanted, found)]
    return found if codes[0] == codes[1] else None


def code(source: str) -> str:
    """The code of a cell without comments and layout.

    Example:
        >>> code("x = 1  # one") == code("# two\\nx = 1"), code("%time 1") == code("%time 2")
        (True, False)
    """
    return ast.dump(ast.parse(re.sub(r"^[%!].*", lambda magic: repr(magic[0]), source, flags=re.MULTILINE)))


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute a notebook in a folder, on one thread because several may run at the same time."""
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=place)
    # tqdm, which tokenizers and others import, misses widgets that no notebook uses
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"})


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """Errors of a notebook: text on stderr such as warnings, paths of this machine, cells that did not run."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.metadata or cell.execution_count is None:
            found.append(f"{cell.id}: did not run, or carries metadata: {dict(cell.metadata)}")
        for output in cell.outputs:
            text = "".join(_texts(output))
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.output_type} on stderr: {text[:2000]}")
            if place := re.search(r"/(home|root|tmp|work|usr|Users|mnt|opt|var)/\S*|[A-Z]:\\Users\\\S*", text):
                found.append(f"{cell.id}: a path of this machine: {place[0]}")
            if "\x1b" in text:
                found.append(f"{cell.id}: colour codes of a terminal: {text[:200]!r}")
    return found


def _texts(output: nbformat.NotebookNode) -> list[str]:
    data = output.get("data", {})
    return [
        output.get("text", ""),
        *output.get("traceback", []),
        *(v for k, v in data.items() if k.startswith("text/")),
    ]


def local_links(text: str) -> list[str]:
    """Local files that a text links to, relative to the folder of the notebooks.

    Example:
        >>> local_links("see [the gallery](../docs/losses.md#rkd), or [the paper](https://arxiv.org/abs/1904.05068)")
        ['../docs/losses.md']
    """
    return [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Join the parts of streams, and remove metadata, which differs from run to run."""
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        joined: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            if output.output_type == "stream":
                output["text"] = COLOURS.sub("", output["text"])
            if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
                joined[-1]["text"] += output.text
            else:
                joined.append(output)
        if cell.cell_type == "code":
            cell["outputs"] = joined


def build(name: str, keep: nbformat.NotebookNode | None = None) -> list[str]:
    """Run a source and write its notebook, or return what is wrong with it and write nothing."""
    notebook = read((SOURCES / f"{name}.py").read_text(encoding="utf-8"))
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        tidy(notebook)
    else:
        for new, old in zip(notebook.cells, keep.cells, strict=True):
            new.update({key: old[key] for key in ("outputs", "execution_count") if key in old})
    nbformat.validate(notebook)
    content = (nbformat.writes(notebook) + "\n").encode()
    wrong = complaints(notebook)
    if len(content) > LIMIT:
        wrong.append(f"{len(content):,} bytes, and the limit is {LIMIT:,}: print less, or draw smaller pictures")
    if not wrong:
        write_whole(HERE / f"{name}.ipynb", content)
    return [f"{name}, {what}" for what in wrong]


def main(args: Sequence[str] | None = None) -> int:
    """Build the notebooks that are named, or those that are out of step."""
    parser = argparse.ArgumentParser(description="Run notebooks/src/*.py and write notebooks/*.ipynb.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 03_relations; default: those out of step")
    chosen = names = parser.parse_args(args).names
    sources = sorted(SOURCES.glob("*.py"))
    if unknown := sorted(set(names) - {path.stem for path in sources}):
        parser.error(f"no such source: {', '.join(unknown)}")
    names = names or [path.stem for path in sources if not in_step(path, HERE / f"{path.stem}.ipynb")]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # notebooks are executed on a CPU
    wrong = []
    for name in names:
        print(f"{name} ...", flush=True)
        wrong += build(name, keep=None if chosen else same_code(name))
    print("\n".join(wrong) if wrong else f"{len(names)} of {len(sources)} notebooks were run and written.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
