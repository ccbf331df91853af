"""The cost of distillation in a training step that runs the teacher in any case.

Run ``python benchmarks/step.py``. A ResNet-18 student and a ResNet-50 teacher process batches of 64 x 64 images in two
Trainers. In one the user's ``training_step`` calls the teacher after the student and discards its output; in the other
the same module runs under ``RelationalDistillation`` with RKD-DA. They take a step each by turns in one process, and
ratios are those of a turn: their median with its 95 % interval (from order statistics), least and most. In the second
row neither distils, so that its ratios are noise, in waves if other work shares the machine. On a CPU, times are those
of the processor with one thread, which other load changes less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import step_calls
import torch
from _report import Report, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50

from lightning_rkd import RelationalDistillation, Tap
from lightning_rkd.losses import RKD

SEED, SIZE, CLASSES, WARM_UP = 0, 64, 100, 3
LOSSES = ("RKD", "RKDDistance")


class Student(pl.LightningModule):
    def __init__(self, teacher: nn.Module | None) -> None:
        super().__init__()
        self.network = resnet18(num_classes=CLASSES)
        object.__setattr__(self, "teacher", teacher)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.network(x)
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(x)
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # all steps do the same work


class Turns(pl.Callback):
    """Lets two Trainers in two threads take a step each by turns, and times the steps."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore, device: str) -> None:
        self.mine, self.other, self.device, self.seconds = mine, other, device, [0.0]

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_start(self, *args: Any) -> None:
        self.mine.acquire()
        self.start = self._now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(self._now() - self.start)
        self.other.release()


def fit(module: Student, callbacks: list[pl.Callback], batch: int, steps: int, device: str) -> None:
    data = TensorDataset(torch.randn(batch, 3, SIZE, SIZE), torch.randint(CLASSES, (batch,)))
    trainer = pl.Trainer(
        max_epochs=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=batch))


def measure(batch: int, pairs: int, device: str, *, distils: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of the steps without and with distillation; ``distils=False`` leaves it out of both."""
    torch.manual_seed(SEED)
    teacher = resnet50(num_classes=CLASSES).eval().requires_grad_(False).to(device)
    turns = threading.Semaphore(1), threading.Semaphore(0)
    clocks = Turns(turns[0], turns[1], device), Turns(turns[1], turns[0], device)
    distil = RelationalDistillation(
        teacher, RKD(), student_layer=Tap("network.fc", at="input"), teacher_layer=Tap("fc", at="input")
    )
    second: tuple[Student, list[pl.Callback]] = (Student(teacher), [clocks[1]])
    if distils:
        second = (Student(None), [clocks[1], distil])
    runs: list[tuple[Student, list[pl.Callback]]] = [(Student(teacher), [clocks[0]]), second]
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    threads = [
        threading.Thread(target=fit, args=(module, callbacks, batch, WARM_UP + pairs, device))
        for module, callbacks in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clocks[0].seconds[1 + WARM_UP :], clocks[1].seconds[1 + WARM_UP :]


def compare(report: Report, batch: int, pairs: int, device: str) -> None:
    """Table of steps with distillation, and of steps of which none distils."""
    rows = []
    for name, distils in (("with RKD-DA", True), ("without, as a control", False)):
        plain, other = measure(batch, pairs, device, distils=distils)
        ratios = sorted(b / a for a, b in zip(plain, other, strict=True))
        off = max(0, math.floor(pairs / 2 - 0.98 * math.sqrt(pairs)))  # normal approximation of the binomial
        medians = (f"{1e3 * statistics.median(seconds):.1f}" for seconds in (plain, other))
        rows.append([name, batch, *medians, spread(ratios, 3), f"{ratios[off]:.3f} to {ratios[-1 - off]:.3f}"])
    head = ["second Trainer", "batch", "student step + teacher forward, ms", "second Trainer, ms"]
    report.table([*head, "ratio (least to most)", "95 % interval of the median"], rows)


def alone(report: Report, batch: int) -> None:
    """What RKD-DA takes by itself, which is below the noise of a step."""
    student, teacher = torch.randn(batch, 512, requires_grad=True), torch.randn(batch, 2048)
    seconds = []
    for _ in range(101):
        start = time.process_time()
        torch.autograd.grad(RKD()(student, teacher), student)
        seconds.append(time.process_time() - start)
    report.say(
        f"RKD-DA alone, forward and backward on embeddings as wide as these networks' (512 and 2,048), takes "
        f"{1e3 * statistics.median(seconds[1:]):.2f} ms."
    )


def host_time(report: Report, turns: int) -> None:
    """Table of what is left of a step where the networks are linear."""
    report.say("## Host time")
    report.say(
        f"Milliseconds beyond a plain step where the networks are linear, {step_calls.ROWS} rows (see "
        "`benchmarks/step_calls.py`), median (least to most) of turns in processes of their own. Of a step with the "
        "callback a part is the teacher's call, a part what any further loss costs in the graph, a part the loss and "
        "its gradient, with the checks of its inputs; the last column less the one before it is the engine: hooks, "
        "copies of features, the call of the teacher, what Lightning is asked. Nothing of it is done for each row, and "
        "values are logged in every `log_every_n_steps`-th step only."
    )
    found = {loss: [step_calls.in_process(step_calls.ROOT, loss) for _ in range(turns)] for loss in LOSSES}
    rows = [[loss, *(step_calls.tell(results, way) for way in step_calls.WAYS[1:])] for loss, results in found.items()]
    report.table(["loss", *step_calls.WAYS[1:]], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3, help="of the host time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = Report("One training step", __doc__, args.device, seed=SEED)
    compare(report, args.batch, args.pairs, args.device)
    if args.device == "cpu":
        alone(report, args.batch)
        host_time(report, args.turns)
    report.write(args.out)


if __name__ == "__main__":
    main()
