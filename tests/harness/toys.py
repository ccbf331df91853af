"""Tiny modules and trainers, small enough that a fit costs milliseconds; and all of ``nets``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.nets import (
    CLASSES,
    WIDTH,
    Asking,
    Backbone,
    Gram,
    Hint,
    Projected,
    Remembers,
    Rows,
    attachments,
    gap,
    same,
    snapshot,
    teacher,
)

STEPS = 5
__all__ = [
    "CLASSES",
    "STEPS",
    "WIDTH",
    "Asking",
    "Backbone",
    "Gram",
    "Hint",
    "Manual",
    "Projected",
    "Remembers",
    "Rows",
    "Student",
    "attachments",
    "fit",
    "gap",
    "loader",
    "same",
    "sgd",
    "snapshot",
    "teacher",
    "trainer",
]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With a rate at which five steps change every weight."""
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


class Student(pl.LightningModule):
    """An ordinary classifier. ``by_hand`` is a function of (embedding, inputs) whose value its step adds itself."""

    def __init__(
        self,
        by_hand: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: Callable[..., Any] | None = None,
        dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = Backbone(dropout, norm), nn.Linear(5, CLASSES)
        self.by_hand = [by_hand]  # in a list: a network among it shall not be registered
        self.optimizer = optimizer or sgd

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(F.relu_(embedding.clone())), y)
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(embedding, x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(x, y)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Manual(Student):
    """The same with manual optimisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(x, y))
        optimizer.step()


def loader(rows: int = 8 * STEPS, batch_size: int = 8, **kwargs: Any) -> DataLoader[Any]:
    """Five batches of eight rows, in order."""
    data = Rows(rows)
    return DataLoader(TensorDataset(data.x, data.y), batch_size=batch_size, **kwargs)


def trainer(**kwargs: Any) -> pl.Trainer:
    """One CPU, one epoch, and nothing on the screen or on the disk."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **kwargs})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, batches: Any = None, **kwargs: Any) -> pl.Trainer:
    """Train on the five batches, or on a loader or list of others; returns the trainer."""
    train = trainer(callbacks=list(callbacks), **kwargs)
    batches = loader() if batches is None else batches
    train.fit(module, DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches)
    return train
