"""RelativeSimilarity, forward and backward: time and memory against the sum over all pairs of pairs.

Run ``python benchmarks/relative_similarity.py``. Each case is a process of its own with one thread. The time is the
least of several calls; memory is the peak of the process above its size before the first of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from _report import Report, resident_peak
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses import RelativeSimilarity

ABOUT = """
Forward and backward on a CPU: the loss, which counts, and the published sum over all pairs of the similarities. Memory
is the peak above that of the process before. With 1,024 rows that sum would take a tebibyte for each of its matrices.
"""
SIZES, IN_FULL = (64, 128, 256, 512, 1024), 128


def in_full(student: Tensor, teacher: Tensor) -> Tensor:
    """The equation with its M x M differences."""

    def differences(x: Tensor) -> Tensor:
        unit = F.normalize(x)
        scores = (unit @ unit.T)[tuple(torch.triu_indices(len(x), len(x), 1))]
        return (scores - scores[:, None])[tuple(torch.triu_indices(len(scores), len(scores), 1))]

    signs = torch.where(differences(teacher) < 0, 1, -1)
    return F.relu(differences(student) * signs + 0.015).mean()


def measure(form: str, n: int, repeats: int) -> None:
    """Print seconds and MiB of one case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss = in_full if form == "in full" else RelativeSimilarity()

    def step(rows: int) -> float:
        student, teacher = torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 512)
        start = time.perf_counter()
        loss(student, teacher).backward()
        return time.perf_counter() - start

    step(16)
    before = resident_peak()
    seconds = min(step(n) for _ in range(repeats))
    print(json.dumps([seconds, resident_peak() - before]))


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=2, metavar=("FORM", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return measure(args.case[0], int(args.case[1]), args.repeats)

    def run(form: str, n: int) -> str:
        command = [sys.executable, __file__, "--repeats", str(args.repeats), "--case", form, str(n)]
        seconds, mebibytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return f"{1000 * seconds:.1f} ms, {mebibytes:.0f} MiB"

    report = Report("RelativeSimilarity", ABOUT, repeats=args.repeats)
    rows = [[n, n * (n - 1) // 2, run("counted", n), run("in full", n) if n <= IN_FULL else "-"] for n in SIZES]
    report.table(["N", "similarities", "RelativeSimilarity", "in full"], rows)
    report.write(args.out)


if __name__ == "__main__":
    main()
