"""Training with Lightning and this library, against an equivalent hand-written loop.

Run ``python benchmarks/throughput.py``. resnet20 learns from resnet56 on random images with the size and number of
classes of CIFAR-100, in batches of 64, with cross-entropy, RKD-DA with weights 25 and 50, and SGD. Both programs draw
the same augmented batches from the same data module and compute the same loss with the same function: one is
``DistillationModule`` in a Trainer, the other a ``for`` loop of twenty lines. They run some steps by turns, in two
threads of one process, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _report import Report, spread
from torch import nn
from torch.nn import functional as F

from lightning_rkd import DistillationModule
from lightning_rkd.data import ImageDataModule
from lightning_rkd.data.datamodules.base import LabelledImages
from lightning_rkd.losses import RKD
from lightning_rkd.models import CIFARResNet, Classified

SEED, CLASSES, BATCH = 0, 100, 64


class Images(ImageDataModule):
    """CIFAR-100 in shape."""

    def load(self) -> LabelledImages:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randint(256, (20_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return LabelledImages(images, torch.arange(20_000) % CLASSES, [str(c) for c in range(CLASSES)])


class Turns:
    """Lets two loops take some steps each by turns, and times them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.allowed = {"loop": threading.Semaphore(1), "library": threading.Semaphore(0)}
        self.seconds: dict[str, list[float]] = {"loop": [], "library": []}
        self.done = {"loop": 0, "library": 0}
        self.start = {"loop": 0.0, "library": 0.0}

    def begin(self, name: str) -> None:
        if self.done[name] % self.steps == 0:
            self.allowed[name].acquire()
            self.start[name] = time.perf_counter()

    def end(self, name: str) -> None:
        self.done[name] += 1
        if self.done[name] % self.steps == 0:
            self.seconds[name].append((time.perf_counter() - self.start[name]) / self.steps)
            self.allowed["library" if name == "loop" else "loop"].release()


class Clock(pl.Callback):
    """A turn ends with a step and begins with the fetching of the next one's batch."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_epoch_start(self, *args: Any) -> None:
        self.turns.begin("library")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turns.end("library")
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.turns.begin("library")


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(SEED)
    student, teacher = (Classified(CIFARResNet(depth), CLASSES) for depth in (20, 56))
    return student, teacher.eval().requires_grad_(False)


def data(steps: int) -> Images:
    return Images(classes_per_batch=BATCH, samples_per_class=1, batches_per_epoch=steps, split_by="samples")


def by_hand(turns: Turns, steps: int) -> None:
    student, teacher = networks()
    relational = RKD(25.0, 50.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    module = data(steps)
    module.setup()
    batches = iter(module.train_dataloader())
    student.train()
    for _ in range(steps):
        turns.begin("loop")
        x, y = next(batches)
        embedding = student.backbone(x)
        loss = F.cross_entropy(student.classifier(embedding), y)
        with torch.no_grad():
            features = teacher.backbone(x)
            teacher.classifier(features)
        loss = loss + relational(embedding, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turns.end("loop")


def by_library(turns: Turns, steps: int) -> None:
    student, teacher = networks()
    module = DistillationModule(
        student,
        teacher,
        RKD(25.0, 50.0),
        student_layer="backbone",
        teacher_layer="backbone",
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[Clock(turns)], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9, help="after one to warm up")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    turns = Turns(args.steps)
    runs: list[Callable[[Turns, int], None]] = [by_hand, by_library]
    threads = [threading.Thread(target=run, args=(turns, (1 + args.turns) * args.steps)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop, library = (turns.seconds[name][1:] for name in ("loop", "library"))
    ratios = [a / b for a, b in zip(loop, library, strict=True)]
    report = Report("Training throughput", __doc__, seed=SEED)
    report.table(
        ["loop by hand, ms a step", "this library, ms a step", "throughput of the loop's (least to most)"],
        [
            [
                f"{1e3 * statistics.median(loop):.1f}",
                f"{1e3 * statistics.median(library):.1f}",
                spread(ratios, 3),
            ]
        ],
    )
    report.write(args.out)


if __name__ == "__main__":
    main()
