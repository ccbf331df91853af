"""EmbeddingRetrieval against pytorch-metric-learning with faiss, and against the bare product of the same blocks.

    python benchmarks/retrieval.py [--rows 30000 60000] [--repeats 3] [--threads 2] [--out docs/retrieval_speed.md]

Each run has a process of its own; the contenders take turns, and ratios are medians of those of one turn, so that other
work on the machine strikes all alike. Memory is how far the resident set grew, at its peak, beyond what it was before
the call (data and libraries loaded).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

DIM, BLOCK, SEED = 128, 1024, 0  # blocks of the bare product: those of the default working memory
GROWTH = {"rows": (7_500, 15_000, 30_000), "width": (32, 128, 512)}


def data(n: int, per_class: int, width: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(n) % (n // per_class)
    centres = torch.randn(n // per_class, width, generator=generator)
    return centres[labels] + 2 * torch.randn(n, width, generator=generator), labels


def ours(x: Tensor, y: Tensor) -> dict[str, float]:
    from lightning_rkd.metrics import EmbeddingRetrieval

    metric = EmbeddingRetrieval()
    metric.update(x, y)
    return {name: float(value) for name, value in metric.compute().items()}


def peer(x: Tensor, y: Tensor) -> dict[str, float]:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    values = calculator.get_accuracy(x, y)
    return {
        name: values[theirs] for name, theirs in zip(("recall_at_1", "map_at_r", "r_precision"), names, strict=True)
    }


def bare(x: Tensor, y: Tensor) -> dict[str, float]:
    buffer = torch.empty(BLOCK * BLOCK)
    for gallery in torch.split(x, BLOCK):
        for query in torch.split(x, BLOCK):
            torch.mm(query, gallery.T, out=buffer[: len(query) * len(gallery)].view(len(query), len(gallery)))
    return {}


def million(x: Tensor, y: Tensor) -> dict[str, float]:
    """The first 1,000 rows ask, the others are the gallery."""
    from lightning_rkd.metrics import EmbeddingRetrieval

    metric = EmbeddingRetrieval()
    metric.update(x, y, is_query=torch.arange(len(x)) < 1000)
    return {name: float(value) for name, value in metric.compute().items()}


CONTENDERS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "ours": ours,
    "peer": peer,
    "bare": bare,
    "million": million,
}


def status(line: str) -> float:
    """A line of this process's status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) / 1024


def measure(name: str, n: int, per_class: int, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run = CONTENDERS[name]
    run(*data(2000, 10, width))  # libraries loaded, code paths warm
    x, y = data(n, per_class, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status("VmRSS"), time.perf_counter()
    values = run(x, y)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "MiB": max(status("VmHWM") - before, 1.0), "values": values}))


def in_a_process(name: str, n: int, per_class: int, width: int, threads: int) -> dict:
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))  # faiss's too
    numbers = [str(number) for number in (n, per_class, width, threads)]
    command = [sys.executable, __file__, "--measure", name, *numbers]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    print(f"{name}, {n:,} x {width}, {per_class} a class: {found}", file=sys.stderr, flush=True)
    return found


def middle(turns: list[dict[str, dict]], what: str, over: str, under: str = "") -> float:
    return median(turn[over][what] / (turn[under][what] if under else 1) for turn in turns)


def table(sizes: list[int], classes: list[int], repeats: int, threads: int) -> list[str]:
    lines = [
        "| rows | rows a class | ours, s | peer, s | bare product, s | peer / ours | ours / bare product "
        "| ours, MiB | peer, MiB | ours / peer, memory | largest difference of a value |"
    ]
    lines += ["|---:" * 11 + "|"]
    for n in sizes:
        for per_class in classes:
            names = ("ours", "peer", "bare")
            turns = [{name: in_a_process(name, n, per_class, DIM, threads) for name in names} for _ in range(repeats)]
            values = turns[0]
            apart = max(abs(v - values["peer"]["values"][key]) for key, v in values["ours"]["values"].items())
            seconds = " | ".join(f"{middle(turns, 'seconds', name):.2f}" for name in names)
            ratios = f"{middle(turns, 'seconds', 'peer', 'ours'):.1f} | {middle(turns, 'seconds', 'ours', 'bare'):.2f}"
            memory = f"{middle(turns, 'MiB', 'ours'):.0f} | {middle(turns, 'MiB', 'peer'):.0f}"
            memory += f" | {middle(turns, 'MiB', 'ours', 'peer'):.2f}"
            lines.append(f"| {n:,} | {per_class} | {seconds} | {ratios} | {memory} | {apart:.0e} |")
    return lines


def growth(axis: str, repeats: int, threads: int) -> list[str]:
    lines = [f"| {axis} | ours, s | bare product, s | ours / bare product | ours, MiB |", "|---:|---:|---:|---:|---:|"]
    for number in GROWTH[axis]:
        n, width = (number, DIM) if axis == "rows" else (15_000, number)
        turns = [{name: in_a_process(name, n, 5, width, threads) for name in ("ours", "bare")} for _ in range(repeats)]
        seconds = " | ".join(f"{middle(turns, 'seconds', name):.2f}" for name in ("ours", "bare"))
        ratio, memory = middle(turns, "seconds", "ours", "bare"), middle(turns, "MiB", "ours")
        lines.append(f"| {number:,} | {seconds} | {ratio:.2f} | {memory:.0f} |")
    return lines


def page(options: argparse.Namespace) -> str:
    import faiss
    import pytorch_metric_learning

    repeats, threads = options.repeats, options.threads
    large = in_a_process("million", 1_001_000, 10, DIM, threads)
    lines = [
        "# How fast retrieval is",
        "",
        f"Written by `python benchmarks/retrieval.py --rows {' '.join(map(str, options.rows))} --repeats {repeats} "
        f"--threads {threads} --out FILE` on {date.today()}; {platform.machine()}, {os.cpu_count()} cores, no "
        f"accelerator, PyTorch {torch.__version__}, seed {SEED}, float32.",
        "",
        f"`EmbeddingRetrieval` (recall at 1, MAP@R, R-precision; exact) against `AccuracyCalculator` of "
        f"pytorch-metric-learning {pytorch_metric_learning.__version__} with faiss {faiss.__version__} and k = the "
        f"largest class, and against nothing but the matrix products of the same blocks. Threads: {threads} each; "
        f"every run in a fresh process. Ratios are medians over turns ({repeats}) in which the contenders ran one "
        "after the other; other work shared the machine, so the seconds are worth less than the ratios. "
        "Memory is the peak of the resident set above what it was with data and libraries loaded.",
        "",
        f"## Rows of width {DIM}",
        "",
        *table(options.rows, options.per_class, repeats, threads),
        "",
        f"## Growth with the number of rows, {DIM} wide, 5 a class",
        "",
        *growth("rows", repeats, threads),
        "",
        "## Growth with the width, 15,000 rows, 5 a class",
        "",
        *growth("width", repeats, threads),
        "",
        f"## 1,000 queries among 1,000,000 rows, {DIM} wide",
        "",
        f"{large['seconds']:.1f} s, {large['MiB']:.0f} MiB above the data (which takes "
        f"{1_001_000 * DIM * 4 / 2**20:.0f} MiB), of which the metric's own copy of the rows is as much as the data.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 60_000])
    parser.add_argument("--per-class", type=int, nargs="+", default=[5, 60])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file to write instead of printing")
    parser.add_argument(
        "--measure", nargs=5, metavar=("NAME", "N", "CLASS", "WIDTH", "THREADS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measure:
        name, *numbers = options.measure
        return measure(name, *map(int, numbers))
    text = page(options)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
