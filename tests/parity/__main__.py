"""Measures every cell and writes ``docs/parity.md``: ``python -m tests.parity``."""

import argparse
import datetime
import logging
import os
import platform
import sys
import warnings
from pathlib import Path

import lightning
import torch

from tests.harness.ranks import Ranks
from tests.parity import Cell, Figures, measure
from tests.parity.cells import ON_ONE_DEVICE, ON_TWO_DEVICES
from tests.parity.refused import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

HEAD = """# The same computation

Distillation attached from outside, or by `DistillationModule`, is the same computation as the loss written by hand into
`training_step`. Each line below is one way to train (at least five batches), done both ways. It gives the largest
difference between the gradients of all parameters in all steps (before and after clipping), and between all weights at
the end; what it may be (0 is bit for bit); and, as a proof that the line tests something, the largest gradient, and the
largest change that distillation makes to a gradient.

`python -m tests.parity` writes this page; `tests/parity/test_parity.py` holds every line to its limit.

{date}, {hardware}, Python {python}, torch {torch}, lightning {lightning}. {cells} cells, {over} over their limit.
"""
TABLE = """
| | gradients differ by | weights differ by | limit | largest gradient | distillation changes |
|---|---|---|---|---|---|
"""
TITLES = {
    ("callback", 1): "`RelationalDistillation` on one device",
    ("module", 1): "`DistillationModule` on one device",
    ("callback", 2): "`RelationalDistillation` on two devices",
    ("module", 2): "`DistillationModule` on two devices",
}
DEVICES = """
Two devices are two processes (gloo). The loss by hand runs on one device with the whole batch; where that cannot be the
same to the last digits (half precision), or is not meant to be (`gather=False`), it runs on the same two devices.
SyncBatchNorm exists on GPUs only: on CPUs torch refuses it, and the test that compares it needs a GPU. `static_graph`
with `accumulate_grad_batches` fails inside torch, with or without distillation.
"""
REFUSALS = """
## What cannot be the same is refused

| | the message says |
|---|---|
"""


def hardware() -> str:
    """The processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}" if info.exists() else "a CPU"


def row(cell: Cell, figures: Figures) -> str:
    """One line of the table."""
    numbers = (figures.gradients, figures.weights, cell.limit)
    written = [f"{x:.1e}" if x else "0" for x in numbers]
    return f"| {cell.name} | {' | '.join(written)} | {figures.size:.2f} | {figures.effect:.2f} |\n"


def main() -> int:
    """Measure, print, write; 1 if a cell exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    out: Path = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tables: dict[tuple[str, int], list[str]] = {key: [] for key in TITLES}
    over: list[Cell] = []
    cells = [*ON_ONE_DEVICE, *ON_TWO_DEVICES]
    ranks = Ranks(2)
    try:
        for cell in cells:
            figures = measure(cell, ranks)
            line = row(cell, figures)
            print(f"{cell.face} {line}", end="", flush=True)
            tables[cell.face, 1 if cell.ranks is None else 2].append(line)
            over += [cell] if max(figures.gradients, figures.weights) > cell.limit else []
    finally:
        ranks.close()
    page = HEAD.format(
        date=datetime.date.today(),
        hardware=hardware(),
        python=platform.python_version(),
        torch=torch.__version__,
        lightning=lightning.__version__,
        cells=len(cells),
        over=len(over),
    )
    for (face, devices), lines in tables.items():
        page += f"\n## {TITLES[face, devices]}\n" + (DEVICES if devices == 2 and face == "callback" else "")
        page += TABLE + "".join(lines)
    page += REFUSALS + "".join(f"| {cell} | {cell.message} |\n" for cell in REFUSED)
    part = out.with_suffix(".part")
    part.write_text(page)
    part.replace(out)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
