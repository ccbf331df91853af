"""Every way to train, once with distillation attached and once with the same loss written by hand.

A cell is one such way. :func:`measure` trains it and tells how far the gradients of all steps, and the weights at the
end, lie apart. ``test_parity.py`` holds every cell to its limit; ``python -m tests.parity`` prints them all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_rkd.callbacks.method_patch import MethodPatch
from tests.callbacks.test_ddp import devices
from tests.harness import toys
from tests.harness.ranks import Ranks

How = Literal["ours", "hand", "without"]
"""Distillation attached, written by hand, or not at all."""


@dataclass
class Run:
    """A module and what it is trained with.

    Attributes:
        module: What is trained.
        callbacks: Of the trainer.
        batches: A loader; ``None`` where the module has its own.
        settings: Of the trainer; those that are functions are called for each fit.
    """

    module: Any
    callbacks: list[pl.Callback]
    batches: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def fit(self, *more: pl.Callback) -> Any:
        """Train, with more callbacks behind the run's own; returns the module."""
        settings = {name: value() if callable(value) else value for name, value in self.settings.items()}
        trainer = toys.trainer(callbacks=[*self.callbacks, *more], **settings)
        trainer.fit(self.module, self.batches)
        return self.module


class Recorder(pl.Callback):
    """Keeps the gradients of every step, before and after clipping, and the last weights; in a file if asked."""

    def __init__(self, path: Path | None = None) -> None:
        self.gradients: list[Tensor] = []
        self.weights = torch.empty(0)
        self.path, self._steps = path, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._keep(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step > self._steps:  # else gradients still accumulate, on each rank its own
            self._keep(pl_module)
        self._steps = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = flat([*pl_module.parameters(), *pl_module.buffers()])
        if self.path is not None and trainer.is_global_zero:
            torch.save((self.gradients, self.weights), self.path)

    def _keep(self, module: torch.nn.Module) -> None:
        self.gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]))


def once(run: Run, recorder: Recorder) -> Any:
    """Train; returns the module of which the weights are compared."""
    return run.fit(recorder)


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        name: What is special about it.
        face: ``"callback"`` or ``"module"``.
        build: From how to distil, and the rank or ``None``, to what is trained.
        limit: How far gradients and weights may lie apart.
        train: How it is trained; :func:`once` unless told otherwise.
        slow: Whether it takes seconds.
        ranks: For two processes: what ours is compared with, the loss by hand on ``"one device"`` with the whole
            batch, or on the ``"same ranks"``.
        strategy: Settings of DDP.
    """

    name: str
    face: str
    build: Callable[[How, int | None], Run]
    limit: float = 0.0
    train: Callable[[Run, Recorder], Any] = once
    slow: bool = False
    ranks: Literal["one device", "same ranks"] | None = None
    strategy: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.face}: {self.name}"


@dataclass(frozen=True)
class Record:
    """The gradients of a training, a row for each step, and the weights at its end. Parameters lie side by side."""

    gradients: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Figures:
    """Largest differences between ours and by hand; how large gradients are; what distillation changes in them."""

    gradients: float
    weights: float
    size: float
    effect: float


def record(cell: Cell, how: How, rank: int | None = None) -> Record:
    """Train a cell in this process, or on one rank of a group."""
    torch.manual_seed(0)
    with devices(rank, **cell.strategy) as where, tempfile.TemporaryDirectory() as folder:
        run, path = cell.build(how, rank), Path(folder, "gradients.pt")
        run.settings = {"default_root_dir": folder, **where, **run.settings}
        recorder = Recorder(path if run.settings.get("strategy") == "ddp_spawn" else None)
        torch.manual_seed(1)
        module = cell.train(run, recorder)
        rows, weights = torch.load(path) if path.exists() else (recorder.gradients, recorder.weights)
        left_nothing(module, *run.callbacks)
        return Record(torch.stack(rows), weights)


def left_nothing(*faces: Any) -> None:
    """Check that neither modules nor teachers carry a live hook or a patch; copies may carry inert hooks."""
    teachers = [face.distiller.teacher for face in faces if hasattr(face, "distiller")]
    for network in [f for f in faces if isinstance(f, nn.Module)] + [t.network for t in teachers if t is not None]:
        assert not [value for value in vars(network).values() if isinstance(value, MethodPatch)]
        for part in network.modules():
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            assert not [hook for hook in hooks if getattr(hook, "function", None)]


def record_on_rank(rank: int, name: str, how: How) -> Record:
    """The same by name, for a process that cannot be handed a function."""
    from tests.parity.two_devices import CELLS

    return record(next(cell for cell in CELLS if str(cell) == name), how, rank)


def measure(cell: Cell, ranks: Ranks | None = None) -> Figures:
    """Train a cell in all three ways and compare."""
    if cell.ranks is None:
        ours, hand, without = ([record(cell, how)] for how in ("ours", "hand", "without"))
    else:
        assert ranks is not None
        ours = list(ranks.run(record_on_rank, str(cell), "ours"))
        one = cell.ranks == "one device"
        hand, without = (
            [record(cell, how)] if one else list(ranks.run(record_on_rank, str(cell), how))
            for how in ("hand", "without")
        )
    expected, plain = hand[0].gradients, without[0].gradients
    both = tuple(slice(min(sizes)) for sizes in zip(expected.shape, plain.shape, strict=True))  # of losses come last
    return Figures(
        gradients=max(apart(mine.gradients, expected) for mine in ours),
        weights=max(apart(mine.weights, hand[0].weights) for mine in ours),
        size=float(expected.abs().max()),
        effect=float((expected[both] - plain[both]).abs().max()),
    )


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where there are not equally many, or where one is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max())


def flat(tensors: list[Tensor]) -> Tensor:
    """All of them, whole where they are sharded, in one row of float64."""
    whole = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
    return torch.cat([t.detach().double().flatten() for t in whole])
