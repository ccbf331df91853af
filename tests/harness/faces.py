"""One student, taught through either face or by hand, and the gradients of every step."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys

FACES = ("callback", "module")


class Net(nn.Module):
    """The backbone and a classifier behind it."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = toys.Backbone(dropout, norm), nn.Linear(5, toys.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x))
        return logits


class User(toys.Student):
    """Somebody's module, which computes what ``DistillationModule`` does with a :class:`Net`."""

    relu = False


class Gradients(pl.Callback):
    """Keeps the student's gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        net = getattr(pl_module, "student", pl_module)
        self.steps.append([p.grad.clone() for part in (net.backbone, net.head) for p in part.parameters()])


def taught(face: str, teacher: Any, loss: Any, **settings: Any) -> tuple[pl.LightningModule, list[pl.Callback]]:
    """The module to train, and its callbacks."""
    settings = {"student_layer": "backbone", **settings}
    if face == "callback":
        return User(), [RelationalDistillation(teacher, loss, **settings)]
    task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits"}
    return DistillationModule(Net(), teacher, loss, **{"optimizer": toys.sgd, **task, **settings}), []


def gradients(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> list[list[Tensor]]:
    """Fit, and return the student's gradient of every step."""
    kept = Gradients()
    toys.fit(module, *callbacks, kept, **settings)
    return kept.steps


def largest(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest difference between gradients of two runs."""
    pairs = [pair for steps in zip(a, b, strict=True) for pair in zip(*steps, strict=True)]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
