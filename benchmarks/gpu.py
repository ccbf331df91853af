"""All that needs a GPU, in less than eight minutes: RKD-DA against the authors' formula, a training step, the tests.

Run ``python benchmarks/gpu.py --out docs/speed/gpu.md`` on a machine with a GPU; ``--dry`` runs the same on a CPU with
tiny sizes, to see that it runs. RKD-DA and the formula take a forward and a backward pass by turns, and ratios are
medians over turns; launches are what the profiler sees on the device; the replay is that of a captured CUDA graph,
without the host. A step is that of ``benchmarks/step.py``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import rkd_angle as angle
import step
import torch
from _report import Report, spread

from lightning_rkd.functional.rkd import rkd_loss

OURS, FORMULA = "RKD-DA", "RKD-DA, formula"


def against_formula(report: Report, sizes: list[int], seconds: float, dry: bool) -> None:
    report.say("## RKD-DA against the formula")
    rows = []
    for n in sizes:
        try:
            turns = angle.by_turns([OURS, FORMULA], n, seconds)
            ours, theirs = angle.step(OURS, n)[1], angle.step(FORMULA, n)[1]
            error = f"{float((ours - theirs).norm() / theirs.norm()):.0e}"
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            turns, error = angle.by_turns([OURS], n, seconds), "does not fit"
        ratios = [f / o for f, o in zip(turns.get(FORMULA, []), turns[OURS], strict=False)]
        row = [f"{n:,}", f"{1e3 * statistics.median(turns[OURS]):.3f}"]
        row.append(f"{1e3 * statistics.median(turns[FORMULA]):.3f}" if ratios else "")
        row.append(spread(ratios, 1, "x") if ratios else "")
        rows.append([*row, error, *(["", "", ""] if dry else on_the_device(n))])
    head = ["N", "RKD-DA ms", "formula ms", "faster", "gradient differs by", "launches", "replay ms", "adds MiB"]
    report.table(head, rows)


def on_the_device(n: int) -> list[str]:
    """Launches of a forward and a backward pass, milliseconds of their replay, MiB that they add."""
    student = torch.randn(n, angle.STUDENT_DIM, device="cuda", requires_grad=True)
    teacher, ones = torch.randn(n, angle.TEACHER_DIM, device="cuda"), torch.ones((), device="cuda")

    def both_passes() -> None:
        torch.autograd.grad(rkd_loss(student, teacher), student, ones)

    both_passes()
    angle.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both_passes()
        angle.wait()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        both_passes()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both_passes()
    times = []
    for _ in range(11):
        angle.wait()
        start = time.perf_counter()
        for _ in range(5):
            graph.replay()
        angle.wait()
        times.append((time.perf_counter() - start) / 5)
    return [str(launches), f"{1e3 * statistics.median(times):.3f}", f"{angle.peak(OURS, n):.0f}"]


def training_step(report: Report, batch: int, pairs: int, device: str) -> None:
    report.say("## A training step")
    step.compare(report, batch, pairs, device)


def tests(report: Report, limit: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    report.say("## tests/test_gpu.py")
    try:
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        report.say("\n".join([*failed, (done.stdout.strip().splitlines() or [done.stderr[-500:]])[-1]]))
    except subprocess.TimeoutExpired:
        report.say(f"Stopped after {limit:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=6.0, help="for the timing of one size, at least 5 turns")
    parser.add_argument("--tests", type=float, default=240.0, help="limit of the tests in seconds")
    parser.add_argument("--dry", action="store_true", help="run on a CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, help="Markdown")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry runs on a CPU")
    warnings.filterwarnings("ignore")
    angle.device = "cpu" if args.dry else "cuda"
    settings = {"student width": angle.STUDENT_DIM, "teacher width": angle.TEACHER_DIM, "seed": angle.SEED}
    report = Report("On a GPU", __doc__, angle.device, **settings)
    against_formula(report, [8, 16] if args.dry else args.sizes, 0.1 if args.dry else args.seconds, args.dry)
    report.write(args.out)  # what there is, should the rest fail
    training_step(report, *((2, 1) if args.dry else (128, 15)), angle.device)
    report.write(args.out)
    tests(report, args.tests)
    report.write(args.out)


if __name__ == "__main__":
    main()
