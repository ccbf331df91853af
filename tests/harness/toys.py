"""Tiny modules and trainers, small enough that a fit costs milliseconds; and all of ``nets``."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lightning_rkd.utils.distributed import rank_and_size
from tests.harness.nets import *  # noqa: F403
from tests.harness.nets import CLASSES, Backbone, Rows

STEPS = 5
PLAIN_CLI: dict[str, Any] = {
    "save_config_callback": None,
    "auto_configure_optimizers": False,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "parser_kwargs": {"exit_on_error": False},
}
"""Options of a LightningCLI whose model and data are classes of the configuration, and which writes nothing."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With a rate at which five steps change every weight."""
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


class Student(pl.LightningModule):
    """An ordinary classifier. ``by_hand`` is a function of (embedding, inputs) whose value its step adds."""

    relu = True
    """Whether a ReLU stands before the head."""

    def __init__(
        self,
        by_hand: Callable[..., Tensor] | None = None,
        optimizer: Callable[..., Any] | None = None,
        dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = Backbone(dropout, norm), nn.Linear(5, CLASSES)
        self.by_hand = [by_hand]  # in a list: a network among it shall not be registered
        self.optimizer = optimizer or sgd

    def task(self, embedding: Tensor, y: Tensor) -> Tensor:
        logits = self.head(F.relu_(embedding.clone()) if self.relu else embedding)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)

    def plus(self, loss: Tensor, embedding: Tensor, *x: Tensor, **context: Any) -> Tensor:
        """The loss, with the one by hand added to it."""
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(embedding, *x, **context)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        return self.plus(self.task(embedding, y), embedding, x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, *_ = batch
        return self.loss(x, y)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Evaluated(Student):
    """The same with validation and test."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, *_ = batch.values() if isinstance(batch, dict) else batch
        self.head(self.backbone(x))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


class Manual(Student):
    """The same with manual optimisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.step(*batch)

    def step(self, x: Tensor, y: Tensor, *_: Any) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(x, y))
        optimizer.step()


def loader(rows: int = 8 * STEPS, batch_size: int = 8, indexed: bool = False, **kwargs: Any) -> DataLoader[Any]:
    """Five batches of eight rows, in order; with their indices where asked."""
    data = Rows(rows)
    indices = [torch.arange(rows)] * indexed
    return DataLoader(TensorDataset(data.x, data.y, *indices), batch_size=batch_size, **kwargs)


class Stream(IterableDataset[Any]):
    """The rows of the five batches, without a length."""

    def __iter__(self) -> Any:
        return iter(loader().dataset)


class Shares(Sampler[list[int]]):
    """Batches, each split over the ranks by ``counts``."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[list[int]]:
        rank, rows = rank_and_size()[0], sum(self.counts)
        start, stop = sum(self.counts[:rank]), sum(self.counts[: rank + 1])
        for batch in range(STEPS):
            yield list(range(rows * batch + start, rows * batch + stop))

    def __len__(self) -> int:
        return STEPS


def shares(counts: tuple[int, ...]) -> DataLoader[Any]:
    """Five batches of rows with their indices, of which every rank gets its part."""
    rows = Rows(sum(counts) * STEPS)
    data = TensorDataset(rows.x, rows.y, torch.arange(len(rows)))
    return DataLoader(data, batch_sampler=Shares(counts))


@contextmanager
def devices(rank: int | None, **settings: Any) -> Iterator[dict[str, Any]]:
    """Trainer settings for a process of a group that exists already; for ``None`` those of one process."""
    if rank is None:
        yield {}
        return
    with mock.patch.dict(os.environ, LOCAL_RANK=str(rank), NODE_RANK="0"):
        strategy = DDPStrategy(process_group_backend="gloo", **settings)
        yield {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}


def split(data: Dataset[Any], rank: int | None, counts: tuple[int, int]) -> DataLoader[Any]:
    """Batches of ``sum(counts)`` rows in order, or a rank's part of each."""
    rows = sum(counts)
    start, stop = (0, rows) if rank is None else ((0, counts[0]), (counts[0], rows))[rank]
    return DataLoader(data, batch_sampler=[list(range(n + start, n + stop)) for n in range(0, len(data), rows)])  # type: ignore[arg-type]


def keeps(folder: Any) -> ModelCheckpoint:
    """Writes ``last.ckpt``."""
    return ModelCheckpoint(folder, save_last=True, save_top_k=0)


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
