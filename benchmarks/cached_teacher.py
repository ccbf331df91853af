"""Time of an epoch with a cached teacher, with the live teacher, and without a teacher.

Run ``python benchmarks/cached_teacher.py``. ResNet-18 learns from ResNet-50 on random images; the epochs are timed in
turns, and ratios are those within a turn: their median, least and most. *No teacher* is the student with its task loss
alone, so the relational loss is part of the difference; the time to read the cached rows is given separately.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from _report import Report, spread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, CachedTeacher, DistillationModule, RKDDistance, Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.distillation.teachers.cache_writer import write_cache
from lightning_rkd.utils.types import Batch

LAYER = Tap("fc", at="classifier")


class Timed(pl.Callback):
    """Times the epoch from its second step on: the first one allocates, verifies files and compiles."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.begun


def epoch(loader: DataLoader[Any], teacher: Any, loss: Any) -> float:
    torch.manual_seed(0)
    student = torchvision.models.resnet18(num_classes=10)
    module = DistillationModule(
        student,
        teacher,
        loss,
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        student_layer=LAYER,
        teacher_layer=None if teacher is None else LAYER,
        optimizer=lambda p: torch.optim.SGD(p, 0.01),
    )
    timed = Timed()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=1, accelerator="auto", devices=1, callbacks=[timed], **quiet).fit(module, loader)
    return timed.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    rows = args.batches * args.batch
    data = TensorDataset(torch.randn(rows, 3, args.size, args.size), torch.randint(10, (rows,)))
    loader = DataLoader(data, batch_size=args.batch, shuffle=True)
    big = torchvision.models.resnet50(num_classes=10)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        write_cache(Path(folder), Teacher(big), LAYER, loader, device=device)
        writing = time.perf_counter() - begun
        ways = {
            "no teacher": (None, None),
            "cached, RKDDistance": (CachedTeacher(folder), RKDDistance()),
            "cached, RKD": (CachedTeacher(folder), RKD()),
            "live, RKD": (Teacher(big), RKD()),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.repeats + 1):
            for name, (taught, loss) in ways.items():
                value = epoch(loader, taught, loss)
                if turn:  # the first turn warms up
                    seconds[name].append(value)
        cached, drawn = CachedTeacher(folder), torch.randperm(rows)[: args.batch]
        cached.attach(LAYER)
        reads = []
        for _ in range(50):
            begun = time.perf_counter()
            cached.outputs(Batch(None, indices=drawn))
            reads.append(time.perf_counter() - begun)
    median = {name: statistics.median(values) / (args.batches - 1) for name, values in seconds.items()}
    report = Report("An epoch with a cached teacher", __doc__, device.type, seed=0)
    report.say(
        f"{args.size} x {args.size} pixels, batches of {args.batch}, {args.batches - 1} timed steps an epoch, "
        f"{args.repeats} epochs each."
    )
    rows_of = []
    for name, values in seconds.items():
        low, high = (1000 * v / (args.batches - 1) for v in (min(values), max(values)))
        ratios = [own / other for own, other in zip(values, seconds["no teacher"], strict=True)]
        rows_of.append([name, f"{1000 * median[name]:.1f}", f"{low:.1f} to {high:.1f}", spread(ratios, 3)])
    report.table(["epoch", "ms a step", "from to", "of no teacher's (least to most)"], rows_of)
    report.say(
        f"Reading the {args.batch} rows of a batch takes {1000 * statistics.median(reads):.3f} ms of that; writing the "
        f"cache took {1000 * writing / args.batches:.0f} ms a batch, once."
    )
    report.write(args.out)


if __name__ == "__main__":
    main()
