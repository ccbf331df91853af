"""Small images of three classes, networks that tell them apart in a few steps, and every scheme ready to train them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_rkd.experimental import CORSD, OnlineBranches, ResidualKD
from lightning_rkd.models.small import ConvNet
from lightning_rkd.modules import MultiHeadDistillation
from tests.harness import toys
from tests.harness.toys import keeps as keeps

CLASSES, SIZE, STEPS = 3, 8, 10
MIDDLE = ["backbone.stage1", "backbone.stage2"]


def adam(parameters: Any) -> torch.optim.Optimizer:
    """With a rate at which ten steps teach something."""
    return torch.optim.Adam(parameters, 0.01)


def images(rows: int = 12 * STEPS, batch_size: int = 12, **kwargs: Any) -> DataLoader[Any]:
    """Batches of twelve images in order; a class is a pattern under noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(rows) % CLASSES
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=generator)
    data = TensorDataset(patterns[labels] + 0.3 * torch.randn(rows, 1, SIZE, SIZE, generator=generator), labels)
    return DataLoader(data, batch_size=batch_size, **kwargs)


def net(seed: int = 0, width: int = 4, out: int = CLASSES) -> ConvNet:
    """Two stages and a Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvNet(widths=(width, width + 2), embedding_dim=out, depth=1)


def teacher(out: int = CLASSES) -> ConvNet:
    """A wider one."""
    return net(7, 8, out)


@dataclass
class Case:
    """Arguments of a scheme: networks, made by functions so that every scheme gets its own, and the others."""

    scheme: type[pl.LightningModule]
    networks: dict[str, Callable[[], Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: Callable[[], nn.Module] | None = None
    classifies: bool = True

    def made(self, **kwargs: Any) -> Any:
        """The scheme, with the same weights on every call and every rank."""
        networks = {name: make() for name, make in self.networks.items()}
        metrics = {"accuracy": MulticlassAccuracy(CLASSES)} if self.classifies else {}
        if self.teacher is not None and "teacher" not in kwargs:
            networks["teacher"] = self.teacher()
        torch.manual_seed(0)
        return self.scheme(**{**networks, **self.settings, "metrics": metrics, "optimizer": adam, **kwargs})


CASES = {
    "MultiHeadDistillation": Case(
        MultiHeadDistillation,
        {"student": net},
        {"student_layers": MIDDLE[:1], "teacher_layers": MIDDLE[:1], "student_logits": "head.linear", "head_width": 8},
        teacher,
    ),
    "OnlineBranches": Case(
        OnlineBranches, {"branches": lambda: [nn.Sequential(nn.ReLU(), net(seed)) for seed in (1, 2, 3)]}
    ),
    "ResidualKD": Case(
        ResidualKD,
        {"student": lambda: net(1, out=5), "assistant": lambda: net(2, out=5)},
        {"weight": 10.0},
        lambda: teacher(out=5),
        classifies=False,
    ),
    "CORSD": Case(CORSD, {"student": net}, {"stages": MIDDLE, "channels": [4, 6], "num_classes": CLASSES}),
}


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, batches: Any = None, **kwargs: Any) -> pl.Trainer:
    """Train on the ten batches."""
    return toys.fit(module, *callbacks, batches=images() if batches is None else batches, **kwargs)
