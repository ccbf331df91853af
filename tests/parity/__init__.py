"""Every way to train, once with distillation attached and once with the same loss written by hand.

A :class:`Cell` is one such way. :func:`measure` trains it and tells how far the gradients of all steps, and the weights
at the end, lie apart. ``cells.py`` lists the cells, ``test_parity.py`` holds each to its limit, and
``python -m tests.parity`` writes the page ``docs/parity.md``.
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.method_patch import MethodPatch
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.harness.faces import Net
from tests.harness.ranks import Ranks
from tests.harness.toys import devices
from tests.parity.users import ByHand

How = Literal["ours", "hand", "without"]
"""Distillation attached, written by hand, or not at all."""
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


def itself(value: Any) -> Any:
    return value


@dataclass
class Run:
    """A module and what it is trained with; settings that are functions are called for each fit."""

    module: Any
    callbacks: list[pl.Callback]
    batches: Any
    settings: dict[str, Any]

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

    def _keep(self, module: nn.Module) -> None:
        self.gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]))


# How a cell is trained


def twice(run: Run, recorder: Recorder) -> Any:
    run.fit(recorder)
    return run.fit(recorder)


def after_an_exception(run: Run, recorder: Recorder) -> Any:
    with contextlib.suppress(ArithmeticError):
        run.fit(recorder)
    return run.fit(recorder)


class Copies(pl.Callback):
    """Copies module and callbacks in the middle of a fit."""

    def __init__(self, duplicate: Callable[[Any], Any], run: Run) -> None:
        self.duplicate, self.run = duplicate, run
        self.copies: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.copies is None:
            self.copies = self.duplicate((pl_module, self.run.callbacks))


def copied(duplicate: Callable[[Any], Any], run: Run, recorder: Recorder) -> Any:
    """Train, copy in the middle, and then train the copies."""
    copies = Copies(duplicate, run)
    run.fit(copies, recorder)
    run.module, run.callbacks = copies.copies
    return run.fit(recorder)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train."""

    name: str  # what is special about it
    face: str = "callback"  # "callback" or "module"
    # makes the user's module, from the loss by hand or None; a callback is attached to it
    user: Callable[..., Any] = toys.Student
    student: Callable[[], nn.Module] = Net  # makes the network of a DistillationModule
    kind: type[DistillationModule] = DistillationModule  # the class of that module
    loss: Callable[[], Any] = RKD
    by_hand: Callable[..., Any] = ByHand  # from loss and dtype to what the user's step adds
    arguments: dict[str, Any] = field(default_factory=dict)  # of callback or module
    optimizer: Callable[[Any], torch.optim.Optimizer] = toys.sgd
    also: tuple[Callable[[], pl.Callback], ...] = ()  # further callbacks that distil
    callbacks: tuple[Callable[[], pl.Callback], ...] = ()  # further callbacks of the trainer
    compiles: Callable[[Any], Any] = itself  # acts on our module; the one by hand is not compiled
    compiles_teacher: Callable[[Any], Any] = itself  # acts on our teacher
    batches: Callable[..., Any] | None = toys.loader  # None where the module has its own
    settings: dict[str, Any] = field(default_factory=dict)  # of the trainer
    limit: float = 0.0  # how far gradients and weights may lie apart
    train: Callable[[Run, Recorder], Any] = Run.fit
    slow: bool = False  # it takes seconds
    # what ours on two processes is compared with; "spawned" by the trainer: with one device
    ranks: Literal["one device", "same ranks", "spawned"] | None = None
    counts: tuple[int, int] = (8, 8)  # how each batch is split over two processes
    on_ranks: dict[str, Any] = field(default_factory=dict)  # settings of the trainer in these

    def __str__(self) -> str:
        return f"{self.face}: {self.name}"

    def build(self, how: How, rank: int | None = None) -> Run:
        """Train in this process or on one rank of a group, and return the results."""
        module, callbacks = self.ours() if how == "ours" else (self.written(how), [])
        callbacks += [make() for make in self.callbacks]
        settings, batches = dict(self.settings), self.batches and self.batches()
        if self.ranks is not None:
            split = rank is not None or (self.ranks == "spawned" and how == "ours")
            settings |= self.on_ranks if split else {}
            batches = toys.shares(self.counts if split else (sum(self.counts), 0))
        return Run(module, callbacks, batches, settings)

    def ours(self) -> tuple[Any, list[pl.Callback]]:
        """The module that distils, or that a callback is attached to, and the callbacks that distil."""
        # the teacher comes in train() mode, with dropout and batch norm
        teacher = self.compiles_teacher(toys.teacher(dropout=0.5, norm=True).train())
        also = [make() for make in self.also]
        if self.face == "callback":
            arguments = {"student_layer": "backbone", **self.arguments}
            user = self.compiles(self.made())
            return user, [RelationalDistillation(teacher, self.loss(), **arguments), *also]
        task = {"task_loss": nn.CrossEntropyLoss, "task_reads": "logits", "student_layer": "backbone"}
        arguments = {"optimizer": self.optimizer, **task, **self.arguments}
        arguments |= {name: arguments[name]() for name in ("task_loss", "miner") if name in arguments}
        return self.compiles(self.kind(self.student(), teacher, self.loss(), **arguments)), also

    def made(self, *by_hand: Any) -> Any:
        module = self.user(*by_hand)
        module.optimizer = self.optimizer
        return module

    def written(self, how: How) -> Any:
        """The user's module with the loss by hand, or without any."""
        dtype = DTYPES.get(self.settings.get("precision", ""), torch.float32)
        module = self.made(self.by_hand(self.loss(), dtype)) if how == "hand" else self.made()
        module.relu = self.face == "callback"  # the networks of the modules have none before the head
        return module


@dataclass(frozen=True)
class Record:
    """The gradients of a training, a row for each step, and the weights at its end. All parameters stand in one row."""

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
    with devices(rank) as where, tempfile.TemporaryDirectory() as folder:
        run, path = cell.build(how, rank), Path(folder, "gradients.pt")
        run.settings = {"default_root_dir": folder, **where, **run.settings}
        recorder = Recorder(path if cell.ranks == "spawned" and how == "ours" else None)
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
    from tests.parity.cells import ON_TWO_DEVICES

    return record(next(cell for cell in ON_TWO_DEVICES if str(cell) == name), how, rank)


def measure(cell: Cell, ranks: Ranks | None = None) -> Figures:
    """Train a cell in all three ways and compare."""
    records: dict[How, list[Record]] = {}
    for how in ("ours", "hand", "without"):
        if cell.ranks == "same ranks" or (cell.ranks == "one device" and how == "ours"):
            assert ranks is not None
            records[how] = list(ranks.run(record_on_rank, str(cell), how))
        else:
            records[how] = [record(cell, how)]
    ours, hand = records["ours"], records["hand"][0]
    expected, plain = hand.gradients, records["without"][0].gradients
    both = tuple(slice(min(sizes)) for sizes in zip(expected.shape, plain.shape, strict=True))  # of losses come last
    return Figures(
        gradients=max(apart(mine.gradients, expected) for mine in ours),
        weights=max(apart(mine.weights, hand.weights) for mine in ours),
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
