"""One student, taught through either face or by hand, and the gradients of every step."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class User(pl.LightningModule):
    """Somebody's module; ``by_hand`` is a function of (embedding, inputs) whose value its step adds itself."""

    def __init__(self, by_hand: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.student, self.by_hand = Net(), [by_hand]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        embedding = self.student.backbone(x)
        loss = F.cross_entropy(self.student.head(embedding), y)
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(embedding, x)

    def configure_optimizers(self) -> Any:
        return toys.sgd(self.parameters())


class Gradients(pl.Callback):
    """Keeps the student's gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append([p.grad.clone() for p in pl_module.student.parameters()])


def taught(face: str, teacher: Any, loss: Any, **settings: Any) -> tuple[pl.LightningModule, list[pl.Callback]]:
    """The module to train, and its callbacks."""
    if face == "callback":
        return User(), [RelationalDistillation(teacher, loss, student_layer="student.backbone", **settings)]
    module = DistillationModule(
        Net(),
        teacher,
        loss,
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        student_layer="backbone",
        optimizer=toys.sgd,
        **settings,
    )
    return module, []


def gradients(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> list[list[Tensor]]:
    """Fit, and return the student's gradient of every step."""
    kept = Gradients()
    toys.fit(module, *callbacks, kept, **settings)
    return kept.steps


def largest(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest difference between gradients of two runs."""
    pairs = [pair for steps in zip(a, b, strict=True) for pair in zip(*steps, strict=True)]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
