"""RKD-A forward and backward against the authors' formula: time, memory, and how both grow.

Run ``python benchmarks/rkd_angle.py``; ``--sizes 64`` for a shorter run, ``--device cuda`` on a GPU. The contenders run
by turns in one process, so that other load on the machine affects all; a row gives medians, and the median, least and
most of the ratios. "kernel" is the default; "tiles" is the same in PyTorch's operations, used where there is no kernel.
Memory is what a step adds to the peak resident size of a fresh process (on a GPU: to the allocator's peak). On a busy
machine wall-clock time is unreliable, above all for many short parallel operations: ``--cpu-time`` measures the
processor time of one thread instead.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import Report, resident_peak, spread
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional import _kernels as kernels
from lightning_rkd.functional import angles, distances, rkd
from lightning_rkd.losses.rkd import rkd_angle

SEED, STUDENT_DIM, TEACHER_DIM = 0, 128, 512
FLOPS = 21  # of the GPU kernels for a triplet, multiplications and additions that are fused counted as two
LANES = 128  # float32 units of a multiprocessor, of compute capability 8.6 and later but 8.7 (and of 9.0)


def formula(student: Tensor, teacher: Tensor) -> Tensor:
    """Park et al. 2019 (arXiv:1904.05068) as published: unit differences, N x N x D, and their products, N x N x N."""

    def cosines(x: Tensor) -> Tensor:
        unit = F.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    with torch.no_grad():
        expected = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), expected)


def both_by_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-DA as published."""

    def distances(x: Tensor) -> Tensor:
        norms = x.pow(2).sum(1)
        d = (norms[:, None] + norms - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x), device=x.device))
        return d / d[d > 0].mean()

    with torch.no_grad():
        expected = distances(teacher)
    return F.smooth_l1_loss(distances(student), expected) + 2 * formula(student, teacher)


def tiles(student: Tensor, teacher: Tensor) -> Tensor:
    """Without kernels."""
    for module in (angles, distances, rkd):
        module.native = lambda name: None  # type: ignore[attr-defined]
    try:
        return rkd_angle(student, teacher)
    finally:
        for module in (angles, distances, rkd):
            module.native = kernels.native  # type: ignore[attr-defined]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kernel": rkd_angle,
    "tiles": tiles,
    "formula": formula,
    "RKD-DA": rkd.rkd_loss,
    "RKD-DA, formula": both_by_formula,
}
clock = time.perf_counter
device = "cpu"


def step(name: str, n: int, student_dim: int = STUDENT_DIM, teacher_dim: int = TEACHER_DIM) -> tuple[float, Tensor]:
    """Seconds of one forward and backward pass, and the gradient."""
    generator = torch.Generator().manual_seed(SEED + n)
    student = torch.randn(n, student_dim, generator=generator).to(device).requires_grad_()
    teacher = torch.randn(n, teacher_dim, generator=generator).to(device)
    wait()
    start = clock()
    torch.autograd.backward(LOSSES[name](student, teacher))
    wait()
    assert student.grad is not None
    return clock() - start, student.grad


def wait() -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def by_turns(names: list[str], n: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every turn; the quick ones take three steps in a turn, of which the median counts."""
    for name in names:
        step(name, n)
    turns: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    while len(turns[names[0]]) < 5 or (time.perf_counter() < deadline and len(turns[names[0]]) < 200):
        for name in names:
            repeats = 1 if "formula" in name else 3
            turns[name].append(statistics.median(step(name, n)[0] for _ in range(repeats)))
    return turns


def peak(name: str, n: int) -> float:
    """MiB that one step adds."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(name, n)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--peak", name, str(n), "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(name: str, n: int) -> float:
    step(name, 16)
    step(name, 30)  # both forms of the kernel are loaded
    before = resident_peak()
    step(name, n)
    return resident_peak() - before


def against_formula(report: Report, sizes: list[int], seconds: float) -> None:
    report.say("## Against the formula")
    rows = []
    for n in sizes:
        turns = by_turns(["kernel", "tiles", "formula"], n, seconds)
        ours, theirs = step("kernel", n)[1], step("formula", n)[1]
        ratios = {
            name: spread([f / o for f, o in zip(turns["formula"], turns[name], strict=True)], 1, "x")
            for name in ("kernel", "tiles")
        }
        memory = {name: peak(name, n) for name in ("kernel", "tiles", "formula")}
        rows.append(
            [
                n,
                *(f"{1e3 * statistics.median(turns[name]):.2f}" for name in ("kernel", "tiles", "formula")),
                *(ratios[name] for name in ("kernel", "tiles")),
                f"{float((ours - theirs).norm() / theirs.norm()):.0e}",
                *(f"{memory[name]:.0f}" for name in ("kernel", "tiles", "formula")),
                f"{100 * memory['kernel'] / max(memory['formula'], 1):.1f} %",
            ]
        )
    head = ["N", "kernel ms", "tiles ms", "formula ms", "kernel faster", "tiles faster", "gradient differs by"]
    report.table([*head, "kernel MiB", "tiles MiB", "formula MiB", "of the formula's"], rows)


def growth(report: Report, sizes: list[int]) -> list[tuple[int, float, float]]:
    """Over the batch; returns (N, ms, MiB)."""
    report.say("## Growth with the batch")
    report.say("5 turns of all sizes; the memory of the smallest is lost in what the allocator holds anyway.")
    for n in sizes:
        step("kernel", n)
    turns = [[1e3 * step("kernel", n)[0] for n in sizes] for _ in range(5)]
    measured, rows = [(n, statistics.median(ms), peak("kernel", n)) for n, *ms in zip(sizes, *turns, strict=True)], []
    for number, (n, ms, mib) in enumerate(measured):
        before = measured[number - 1] if number else None
        ratio = spread([turn[number] / turn[number - 1] for turn in turns], 1, "x") if before else ""
        row = [n, f"{ms:.2f}", ratio, f"{mib:.1f}"]
        row += [f"{mib / max(before[2], 0.1):.1f}x" if before else "", f"{n**3 / ms / 1e6:.1f}"]
        if device == "cuda":
            row.append(f"{FLOPS * n**3 / ms / 1e9:.1f}")
        rows.append(row)
    head = ["N", "ms", "of half the batch's", "adds MiB", "of half the batch's", "10^9 triplets / s"]
    report.table([*head, "TFLOP / s"] if device == "cuda" else head, rows)
    return measured


def large(report: Report, sizes: list[int]) -> None:
    """RKD-DA on a GPU: the whole of it, the kernels alone, and their share of what the chip can do."""
    from lightning_rkd.functional._kernels import angle_cuda

    clock_mhz = float(_query_driver("clocks.max.sm"))
    peak_flops = 2 * LANES * torch.cuda.get_device_properties(0).multi_processor_count * clock_mhz * 1e6
    report.say("## RKD-DA, forward and backward")
    report.say(
        f"Kernels: RKD-A's two for the triplets alone, {FLOPS} operations a triplet; the peak of float32 is "
        f"{peak_flops / 1e12:.1f} TFLOP/s at {clock_mhz:.0f} MHz, if every instruction were a fused one. Median of 11."
    )
    rows = []
    for n in sizes:
        step("RKD-DA", n)
        ms = 1e3 * statistics.median(step("RKD-DA", n)[0] for _ in range(11))
        s, t = (distances.squared_distances(torch.randn(n, d, device=device)) for d in (STUDENT_DIM, TEACHER_DIM))
        settings = {"official": True, "factor": 1.0, "with_gradient": True}
        alone = []
        for _ in range(12):
            wait()
            start = clock()
            angle_cuda.loss_and_gradient(s, t, (0, n), torch.float32, **settings)
            wait()
            alone.append(1e3 * (clock() - start))
        kernel_ms = statistics.median(alone[1:])
        flops = FLOPS * n**3 / kernel_ms * 1e3
        cells = [f"{ms:.2f}", f"{peak('RKD-DA', n):.0f}", f"{kernel_ms:.2f}", f"{flops / 1e12:.1f}"]
        rows.append([f"{n:,}", *cells, f"{100 * flops / peak_flops:.0f} %"])
    report.table(["N", "ms", "adds MiB", "kernels ms", "kernels TFLOP / s", "of the peak"], rows)


def _query_driver(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def width(report: Report, widths: list[int], n: int = 256) -> None:
    report.say(f"## Growth with the width, N = {n}, the teacher as wide as the student")
    rows = []
    for d in widths:
        step("kernel", n, d, d)
        ms = {name: 1e3 * statistics.median(step(name, n, d, d)[0] for _ in range(5)) for name in ("kernel", "tiles")}
        formula_ms = 1e3 * statistics.median(step("formula", n, d, d)[0] for _ in range(3))
        rows.append([d, *(f"{ms[name]:.2f}" for name in ("kernel", "tiles")), f"{formula_ms:.0f}"])
    report.table(["D", "kernel ms", "tiles ms", "formula ms"], rows)


def where(report: Report, sizes: list[int]) -> None:
    """Time of the parts of a step on a CPU, and of the whole step without the formula in between."""
    kernel = kernels.native("angle_cpu")
    if kernel is None:
        return
    report.say("## Where the time goes")
    report.say("Each part alone, median of 30. The whole is the step alone, not by turns with the formula.")
    rows = []
    for n in sizes:
        student, teacher = torch.randn(n, STUDENT_DIM).requires_grad_(), torch.randn(n, TEACHER_DIM)
        s, t = distances.squared_distances(student).detach(), distances.squared_distances(teacher)
        settings = {"official": True, "factor": 1.0, "with_gradient": True}
        triplets = _median_ms(kernel.loss_and_gradient, s, t, (0, n), torch.float32, **settings)
        given = _median_ms(distances.squared_distances, teacher)
        own = _median_ms(_there_and_back, student, torch.randn(n, n, dtype=torch.float64))
        rows.append([n, *(f"{ms:.2f}" for ms in (triplets, given, own, _median_ms(step, "kernel", n)))])
    head = ["N", "triplets, ms", "the teacher's distances, ms", "the student's, with gradient, ms", "the whole, ms"]
    report.table(head, rows)


def _there_and_back(x: Tensor, pull: Tensor) -> None:
    torch.autograd.grad(distances.squared_distances(x), x, pull)


def _median_ms(work: Callable[..., object], *args: Any, **settings: Any) -> float:
    seconds = []
    for _ in range(31):
        start = clock()
        work(*args, **settings)
        seconds.append(clock() - start)
    return 1e3 * statistics.median(seconds[1:])


def plot(measured: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = [n for n, _, _ in measured]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, column, title, power in ((axes[0], 1, "Time (ms)", 3), (axes[1], 2, "Memory added (MiB)", 2)):
        values = [row[column] or math.nan for row in measured]  # what the allocator held anyway has no logarithm
        axis.loglog(sizes, values, "o-", color="#0072B2", label="RKD-A forward + backward")
        guide = [values[-1] * (n / sizes[-1]) ** power for n in sizes]
        axis.loglog(sizes, guide, "--", color="#777777", label=f"$N^{power}$")
        axis.set(xlabel="Batch N", title=title)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--growth", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 128, 512, 2048])
    parser.add_argument("--large", type=int, nargs="*", default=[1024, 2048, 4096], help="RKD-DA, on a GPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the timing of one size, at least 5 turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for busy machines")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="Markdown; a plot of the growth goes beside it")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    global clock, device
    if args.cpu_time:
        clock, args.threads = time.process_time, 1
    device = args.device
    torch.set_num_threads(args.threads)
    if args.peak:
        print(measure_peak(args.peak[0], int(args.peak[1])))
        return
    settings = {"student width": STUDENT_DIM, "teacher width": TEACHER_DIM, "seed": SEED}
    report = Report("RKD-A", __doc__, device, **settings, clock="processor" if args.cpu_time else "wall")
    if args.sizes:
        against_formula(report, args.sizes, args.seconds)
    if args.growth:
        measured = growth(report, args.growth)
        if args.out is not None:
            picture = args.out.with_suffix(".png")
            plot(measured, picture)
            report.say(f"![time and memory over the size of the batch]({picture.name})")
    if args.widths:
        width(report, args.widths)
    if device == "cpu" and args.sizes:
        where(report, args.sizes)
    if device == "cuda" and args.large:
        large(report, args.large)
    report.write(args.out)


if __name__ == "__main__":
    main()
