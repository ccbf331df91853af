"""EmbeddingRetrieval against pytorch-metric-learning with faiss, and against the bare product of the same blocks.

    python benchmarks/retrieval.py [--large] [--repeats 3] [--threads 2] [--per-class 10]

Each run has a process of its own, in turn; times and memory are the least of the repeats. Memory is how far the
resident set grew beyond what it was before the call (data and libraries loaded). On a machine that does other work as
well, trust the processor seconds with ``--threads 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

DIM, BLOCK = 128, 1024
MEASURES = ("seconds", "processor", "MiB")


def data(n: int, per_class: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % (n // per_class)
    centres = torch.randn(n // per_class, DIM, generator=generator)
    return centres[labels] + 2 * torch.randn(n, DIM, generator=generator), labels


def ours(x: Tensor, y: Tensor) -> dict[str, float]:
    from lightning_rkd.metrics import EmbeddingRetrieval

    metric = EmbeddingRetrieval(block_size=BLOCK)
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


CONTENDERS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {"ours": ours, "peer": peer, "bare": bare}


def resident() -> float:
    """MiB now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(name: str, n: int, per_class: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run = CONTENDERS[name]
    run(*data(600, 10))  # libraries loaded, code paths warm
    x, y = data(n, per_class)
    before, start, busy = resident(), time.perf_counter(), time.process_time()
    values = run(x, y)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "processor": busy, "MiB": max(peak - before, 0.0), "values": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also 60,000 rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], int(options.measure[1]), options.per_class, options.threads)
    print("| rows x width, rows per class | what | seconds | processor seconds | extra MiB | recall_at_1, MAP@R, RP |")
    print("|---|---|---|---|---|---|")
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # faiss has threads of its own
    for n in (30_000, 60_000) if options.large else (30_000,):
        best: dict[str, dict] = {}
        for _ in range(options.repeats):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--measure", name, str(n), "--threads", threads]
                command += ["--per-class", str(options.per_class)]
                child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found = json.loads(child.stdout)
                last = best.setdefault(name, found)
                last.update({key: min(last[key], found[key]) for key in MEASURES})
        for name, found in best.items():
            values = ", ".join(f"{value:.6f}" for value in found["values"].values())
            cells = f"{found['seconds']:.2f} | {found['processor']:.2f} | {found['MiB']:.0f} | {values}"
            print(f"| {n:,} x {DIM}, {options.per_class} | {name} | {cells} |")
        for measure_name in MEASURES:
            mine = max(best["ours"][measure_name], 0.01)
            peers, product = best["peer"][measure_name] / mine, mine / max(best["bare"][measure_name], 0.01)
            print(f"{n:,} rows, {measure_name}: peer / ours = {peers:.1f}, ours / bare product = {product:.2f}")


if __name__ == "__main__":
    main()
