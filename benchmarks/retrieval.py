"""EmbeddingRetrieval against pytorch-metric-learning, against the bare product of its blocks, and approximate.

    python benchmarks/retrieval.py [--rows 30000 60000] [--repeats 3] [--threads 2] [--out docs/speed/retrieval.md]
                                   [--parts exact growth million approximate]

Each run has a process of its own; the contenders take turns, and ratios are medians of those of one turn, so that other
work on the machine strikes all alike. Memory is how far the resident set grew, at its peak, beyond what it was before
the call (data and libraries loaded).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from _report import Report

DIM, BLOCK, SEED = 128, 1024, 0  # blocks of the bare product: those of the default working memory
NOISE = 2.0  # standard deviation of rows around their class, of which the centres have 1
GROWTH = {"rows": (7_500, 15_000, 30_000), "width": (32, 128, 512)}
CLUSTERED = {"rows": 200_000, "width": 64, "per_class": 10, "noises": (0.5, 0.8), "probes": (16, 64, 256)}
ABOUT = """`EmbeddingRetrieval`: recall at 1, MAP@R, R-precision of float32 rows.
Every run has a process of its own. Ratios are medians over turns in which the contenders ran one after the other; other
work shared the machine, so the seconds are worth less than the ratios. Memory is the peak of the resident set above
what it was with data and libraries loaded."""


def data(n: int, per_class: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(n) % (n // per_class)
    centres = torch.randn(n // per_class, width, generator=generator)
    return centres[labels] + noise * torch.randn(n, width, generator=generator), labels


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
    """The first 1,000 rows are queries, the others the gallery."""
    from lightning_rkd.metrics import EmbeddingRetrieval

    metric = EmbeddingRetrieval()
    metric.update(x, y, is_query=torch.arange(len(x)) < 1000)
    return {name: float(value) for name, value in metric.compute().items()}


def approximate(x: Tensor, y: Tensor, probes: int) -> dict[str, float]:
    from lightning_rkd.metrics import EmbeddingRetrieval, Faiss

    metric = EmbeddingRetrieval(engine=Faiss(probes=probes))
    metric.update(x, y)
    return {name: float(value) for name, value in metric.compute().items()}


CONTENDERS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "ours": ours,
    "peer": peer,
    "bare": bare,
    "million": million,
    **{f"faiss {probes}": partial(approximate, probes=probes) for probes in CLUSTERED["probes"]},
}


def status(line: str) -> float:
    """A line of this process's status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) / 1024


def measure(name: str, n: int, per_class: int, width: int, noise: float) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = CONTENDERS[name]
    run(*data(2000, 10, width, noise))  # libraries loaded, code paths warm
    x, y = data(n, per_class, width, noise)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status("VmRSS"), time.perf_counter()
    values = run(x, y)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "MiB": max(status("VmHWM") - before, 1.0), "values": values}))


def in_a_process(name: str, n: int, per_class: int, width: int, noise: float = NOISE) -> dict:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))  # faiss's too
    command = [sys.executable, __file__, "--measure", name, *map(str, (n, per_class, width, noise))]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    found = json.loads(run.stdout)
    print(f"{name}, {n:,} x {width}, {per_class} a class: {found}", file=sys.stderr, flush=True)
    return found


def middle(turns: list[dict[str, dict]], what: str, over: str, under: str = "") -> float:
    return median(turn[over][what] / (turn[under][what] if under else 1) for turn in turns)


def exact_part(report: Report, options: argparse.Namespace) -> None:
    import faiss
    import pytorch_metric_learning

    report.say(f"## Against others, rows of width {DIM}")
    report.say(
        "The peer is `AccuracyCalculator` of "
        f"pytorch-metric-learning {pytorch_metric_learning.__version__} with faiss {faiss.__version__} and k = the "
        "largest class; the bare product is that of the same blocks and nothing else."
    )
    head = ("rows", "rows a class", "ours, s", "peer, s", "bare product, s", "peer / ours", "ours / bare product")
    head += ("ours, MiB", "peer, MiB", "ours / peer, memory", "largest difference of a value")
    rows = []
    for n in options.rows:
        for per_class in options.per_class:
            names = ("ours", "peer", "bare")
            turns = [{name: in_a_process(name, n, per_class, DIM) for name in names} for _ in range(options.repeats)]
            values = turns[0]
            apart = max(abs(v - values["peer"]["values"][key]) for key, v in values["ours"]["values"].items())
            row = [f"{n:,}", per_class, *(f"{middle(turns, 'seconds', name):.2f}" for name in names)]
            row += [f"{middle(turns, 'seconds', *pair):.2f}" for pair in (("peer", "ours"), ("ours", "bare"))]
            row += [f"{middle(turns, 'MiB', name):.0f}" for name in ("ours", "peer")]
            rows.append([*row, f"{middle(turns, 'MiB', 'ours', 'peer'):.2f}", f"{apart:.0e}"])
    report.table(head, rows)


def growth_part(report: Report, options: argparse.Namespace) -> None:
    for axis, numbers in GROWTH.items():
        report.say(f"## Growth with {'the number of ' * (axis == 'rows')}{axis}, 5 a class")
        report.say(f"{DIM} wide." if axis == "rows" else "15,000 rows.")
        rows = []
        for number in numbers:
            n, width = (number, DIM) if axis == "rows" else (15_000, number)
            names = ("ours", "bare")
            turns = [{name: in_a_process(name, n, 5, width) for name in names} for _ in range(options.repeats)]
            row = [f"{number:,}", *(f"{middle(turns, 'seconds', name):.2f}" for name in names)]
            rows.append(
                [*row, f"{middle(turns, 'seconds', 'ours', 'bare'):.2f}", f"{middle(turns, 'MiB', 'ours'):.0f}"]
            )
        report.table((axis, "ours, s", "bare product, s", "ours / bare product", "ours, MiB"), rows)


def million_part(report: Report, options: argparse.Namespace) -> None:
    large = in_a_process("million", 1_001_000, 10, DIM)
    report.say(f"## 1,000 queries among 1,000,000 rows, {DIM} wide")
    report.say(
        f"{large['seconds']:.1f} s, {large['MiB']:.0f} MiB above the data (which takes "
        f"{1_001_000 * DIM * 4 / 2**20:.0f} MiB), of which the metric's own copy of the rows is as much as the data."
    )


def approximate_part(report: Report, options: argparse.Namespace) -> None:
    n, width, per_class = CLUSTERED["rows"], CLUSTERED["width"], CLUSTERED["per_class"]
    report.say(f"## Approximate: {n:,} rows in clusters, {width} wide, {per_class} a class")
    report.say(
        "`EmbeddingRetrieval(engine=Faiss())`, 64 probes by default, and exact; every row is a query. Spread is "
        "the standard deviation of a class's rows around its centre, over that of the centres. Seconds are of the "
        "whole evaluation, the index included."
    )
    rows = []
    for noise in CLUSTERED["noises"]:
        names = {"ours": "exact"} | {f"faiss {probes}": f"{probes} probes" for probes in CLUSTERED["probes"]}
        turns = [
            {name: in_a_process(name, n, per_class, width, noise) for name in names} for _ in range(options.repeats)
        ]
        exact = turns[0]["ours"]["values"]
        for name, said in names.items():
            row = [noise, said]
            for key in ("recall_at_1", "map_at_r"):
                value = turns[0][name]["values"][key]
                row += [f"{value:.4f}", f"{value - exact[key]:+.4f}"]
            row += [f"{middle(turns, 'seconds', name):.1f}", f"{middle(turns, 'seconds', 'ours', name):.1f}"]
            rows.append([*row, f"{middle(turns, 'MiB', name):.0f}"])
    head = ("spread", "search", "recall_at_1", "off by", "map_at_r", "off by", "s", "times as fast", "MiB")
    report.table(head, rows)


PARTS = {"exact": exact_part, "growth": growth_part, "million": million_part, "approximate": approximate_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 60_000])
    parser.add_argument("--per-class", type=int, nargs="+", default=[5, 60])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--out", type=Path, help="file to write as well")
    parser.add_argument("--measure", nargs=5, metavar=("NAME", "N", "CLASS", "WIDTH", "NOISE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, *numbers, noise = options.measure
        return measure(name, *map(int, numbers), float(noise))
    torch.set_num_threads(options.threads)
    report = Report("How fast retrieval is", ABOUT, seed=SEED, repeats=options.repeats)
    for part in options.parts:
        PARTS[part](report, options)
    report.write(options.out)


if __name__ == "__main__":
    main()
