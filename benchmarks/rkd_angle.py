"""RKD-A forward and backward against the authors' formula, in time and in memory.

Run ``python benchmarks/rkd_angle.py``; ``--sizes 64 128`` for a shorter run. Both sides run by turns in one process,
so that whatever else the machine does falls on both; a row gives medians and the median of the ratios. Memory is what
a step adds to the peak resident size of a fresh process. Beyond ``--formula-up-to`` the formula is left out. On a busy
machine wall-clock time says little, least of all about many short parallel operations: ``--cpu-time`` counts the
processor time of one thread instead.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.rkd import rkd_angle

SEED, STUDENT_DIM, TEACHER_DIM = 0, 128, 512


def formula(student: Tensor, teacher: Tensor) -> Tensor:
    """Park et al. 2019 (arXiv:1904.05068) as published: unit differences, N x N x D, and their products, N x N x N."""

    def cosines(x: Tensor) -> Tensor:
        unit = F.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    with torch.no_grad():
        expected = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), expected)


LOSSES = {"ours": rkd_angle, "formula": formula}


clock = time.perf_counter


def step(name: str, n: int) -> tuple[float, Tensor]:
    """Seconds of one forward and backward pass, and the gradient."""
    generator = torch.Generator().manual_seed(SEED + n)
    student = torch.randn(n, STUDENT_DIM, generator=generator).requires_grad_()
    teacher = torch.randn(n, TEACHER_DIM, generator=generator)
    start = clock()
    torch.autograd.backward(LOSSES[name](student, teacher))
    assert student.grad is not None
    return clock() - start, student.grad


def time_by_turns(n: int, seconds: float) -> tuple[float, float, float, float]:
    """Median seconds of ours and of the formula, median ratio, and relative difference of the gradients."""
    difference = (step("ours", n)[1] - step("formula", n)[1]).norm() / step("formula", n)[1].norm()
    ours: list[float] = []
    theirs: list[float] = []
    ratios: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(ratios) < 5 or (time.perf_counter() < deadline and len(ratios) < 200):
        theirs.append(step("formula", n)[0])
        ours += (turn := [step("ours", n)[0] for _ in range(3)])
        ratios.append(theirs[-1] / statistics.median(turn))
    return statistics.median(ours), statistics.median(theirs), statistics.median(ratios), float(difference)


def peak(name: str, n: int, threads: int) -> float:
    """MiB that one step adds to the peak resident size of a process that has run a small one before."""
    command = [sys.executable, __file__, "--peak", name, str(n), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(name: str, n: int) -> float:
    step(name, 16)
    before = resident_peak()
    step(name, n)
    return resident_peak() - before


def resident_peak() -> float:
    """MiB. Linux only: ``getrusage`` would report the parent's peak where that was higher."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--formula-up-to", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the timing of one size, at least 5 turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for busy machines")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu_time:
        global clock
        clock, args.threads = time.process_time, 1
    torch.set_num_threads(args.threads)
    if args.peak:
        print(measure_peak(args.peak[0], int(args.peak[1])))
        return
    print(
        f"RKD-A forward + backward, float32, D_s = {STUDENT_DIM}, D_t = {TEACHER_DIM}, seed {SEED}, "
        f"torch {torch.__version__}, {args.threads} threads, "
        f"{'processor' if args.cpu_time else 'wall-clock'} time, {cpu()}, {datetime.date.today()}\n"
    )
    print("| N | ours ms | formula ms | ratio | gradient differs by | ours adds MiB | formula adds MiB |")
    print("|---|---|---|---|---|---|---|")
    for n in args.sizes:
        memory = f"{peak('ours', n, args.threads):.0f}"
        if n > args.formula_up_to:
            ours = statistics.median(step("ours", n)[0] for _ in range(3))
            print(f"| {n} | {1e3 * ours:.1f} | | | | {memory} | |", flush=True)
            continue
        ours, theirs, ratio, difference = time_by_turns(n, args.seconds)
        theirs_memory = f"{peak('formula', n, args.threads):.0f}"
        print(
            f"| {n} | {1e3 * ours:.2f} | {1e3 * theirs:.1f} | {ratio:.1f}x | {difference:.0e} | {memory} "
            f"| {theirs_memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
