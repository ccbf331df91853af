"""Relations over a big batch in micro-batches: gradient, time and memory against the same batch at once.

Run ``python benchmarks/micro_batches.py``. ``DistillationModule`` trains a ResNet-18 on 64 x 64 images by RKD-DA, with
the whole batch at once and with ``micro_batch=64``. The teacher is one linear layer, so that the time is the student's.
Each run is a process of its own; the two kinds alternate, and a time is the median over the steps of all runs, of which
the first step of each is left out; ratios are those of two runs in turn: their median, least and most. Times are those
of the processor, which other load on the machine changes less. Memory is the peak of the process above its size before
training. The last columns are the largest difference of a gradient in the first step, and the largest gradient;
BatchNorm sees other statistics in micro-batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _report import Report, resident_peak, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_rkd import RKD, DistillationModule

SEED, SIZE, WIDTH = 0, 64, 128
NORMS: dict[str, Any] = {"GroupNorm": partial(nn.GroupNorm, 8), "BatchNorm": nn.BatchNorm2d}


class Clock(pl.Callback):
    """Times the steps and keeps the gradient of the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gradient: dict[str, Tensor] = {}

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.process_time()

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self.gradient:
            named = pl_module.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def train(norm: str, rows: int, micro_batch: int, steps: int, out: Path) -> None:
    """One run, whose result is written into a folder; 0 is the batch at once."""
    torch.manual_seed(SEED)
    student = resnet18(num_classes=WIDTH, norm_layer=NORMS[norm])
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, WIDTH))
    module = DistillationModule(
        student, teacher, RKD(), optimizer=partial(torch.optim.SGD, lr=0.01), micro_batch=micro_batch or None
    )
    data = DataLoader(TensorDataset(torch.randn(rows, 3, SIZE, SIZE)), batch_size=rows)
    clock = Clock()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=steps, accelerator="cpu", devices=1, callbacks=[clock], **quiet)
    before = resident_peak()
    trainer.fit(module, data)
    torch.save(clock.gradient, out / "gradient.pt")
    (out / "result.json").write_text(json.dumps({"seconds": clock.seconds[1:], "peak": resident_peak() - before}))


def run(norm: str, rows: int, micro_batch: int, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        given = [norm, str(rows), str(micro_batch), str(steps), folder]
        subprocess.run([sys.executable, __file__, "--run", *given], check=True, stderr=subprocess.DEVNULL)
        return json.loads((Path(folder) / "result.json").read_text()), torch.load(Path(folder) / "gradient.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="steps of a run, of which the first is not timed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.run:
        norm, rows, micro_batch, steps, out = args.run
        train(norm, int(rows), int(micro_batch), int(steps), Path(out))
        return
    report = Report("Micro-batches", __doc__, seed=SEED)
    table = []
    for norm in NORMS:
        pairs = [[run(norm, args.rows, size, args.steps) for size in (0, args.micro_batch)] for _ in range(args.runs)]
        small, _ = run(norm, args.micro_batch, 0, args.steps)
        whole, parts = ([pair[kind][0] for pair in pairs] for kind in (0, 1))
        seconds = [statistics.median(s for r in kind for s in r["seconds"]) for kind in (whole, parts)]
        ratios = [
            statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in zip(whole, parts, strict=True)
        ]
        peaks = [max(r["peak"] for r in kind) for kind in (whole, parts)]
        at_once, in_parts = pairs[0][0][1], pairs[0][1][1]
        difference = max(float((at_once[name] - in_parts[name]).abs().max()) for name in at_once)
        largest = max(float(x.abs().max()) for x in at_once.values())
        table.append(
            [
                norm,
                *(f"{s:.2f}" for s in seconds),
                spread(ratios),
                *(f"{peak:,.0f}" for peak in (*peaks, small["peak"])),
                *((f"{difference:.1e}", f"{largest:.1e}") if norm == "GroupNorm" else ("", "")),
            ]
        )
    parts_name = f"in parts of {args.micro_batch}"
    report.table(
        [
            "student",
            f"{args.rows:,} rows at once, s",
            f"{parts_name}, s",
            "ratio (least to most)",
            f"{args.rows:,} rows at once, MiB",
            f"{parts_name}, MiB",
            f"a batch of {args.micro_batch} alone, MiB",
            "gradients differ by",
            "largest gradient",
        ],
        table,
    )
    report.write(args.out)


if __name__ == "__main__":
    main()
