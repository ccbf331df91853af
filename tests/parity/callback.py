"""RelationalDistillation on a user's module, against the loss in the module's own step."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.distillation.features import Tap
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from tests.harness import toys
from tests.parity import Cell, How, Recorder, Run, once, users

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


def cell(
    name: str,
    user: Callable[..., Any] = toys.Student,
    loss: Callable[[], Any] = RKD,
    *,
    by_hand: Callable[..., Any] = users.ByHand,
    others: tuple[Callable[[], pl.Callback], ...] = (),
    ours_too: tuple[Callable[[], pl.Callback], ...] = (),
    change: Callable[[Any], Any] = lambda module: module,
    compiles: Callable[[Any], Any] = lambda module: module,
    teacher: Callable[[Any], Any] = lambda network: network,
    batches: Callable[[], Any] | None = toys.loader,
    settings: dict[str, Any] | None = None,
    limit: float = 0.0,
    train: Callable[[Run, Recorder], Any] = once,
    slow: bool = False,
    **callback: Any,
) -> Cell:
    """A cell of this face.

    Args:
        name: Its name.
        user: Makes the module, from the loss by hand or ``None``.
        loss: Makes the loss.
        by_hand: From loss and dtype to what the module calls.
        others: More callbacks of the trainer.
        ours_too: More callbacks that distil.
        change: What happens to the module after it is made.
        compiles: What happens to ours alone: the loss by hand is not compiled.
        teacher: The same for the teacher of ours.
        batches: Makes the loader; ``None`` where the module has its own.
        settings: Of the trainer.
        limit: How far the two may lie apart.
        train: How it is trained.
        slow: Whether it takes seconds.
        **callback: Arguments of ours.
    """

    def build(how: How, rank: int | None) -> Run:
        dtype = DTYPES.get((settings or {}).get("precision", ""), torch.float32)
        module = change(user(by_hand(loss(), dtype)) if how == "hand" else user())
        callbacks = [other() for other in others]
        if how == "ours":
            # the teacher comes in train() mode, with dropout and batch norm
            network = teacher(toys.teacher(dropout=0.5, norm=True).train())
            ours = RelationalDistillation(network, loss(), **{"student_layer": "backbone", **callback})
            callbacks = [ours, *(more() for more in ours_too), *callbacks]
        return Run(
            compiles(module) if how == "ours" else module, callbacks, batches and batches(), dict(settings or {})
        )

    return Cell(name, "callback", build, limit, train, slow)


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


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


# What cells are made of


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


def strong_wolfe(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=2, line_search_fn="strong_wolfe")


def compiled(backend: str, what: str = "") -> Callable[[Any], Any]:
    """Compile a module, or a part of it."""

    def change(module: Any) -> Any:
        torch._dynamo.reset()
        if not what:
            return torch.compile(module, backend=backend)
        setattr(module, what, torch.compile(getattr(module, what), backend=backend))
        return module

    return change


class Both:
    """Two relations by hand, as two callbacks add them."""

    def __init__(self, loss: Any, dtype: torch.dtype) -> None:
        self.parts = [users.ByHand(RKDDistance()), users.ByHand(RKDAngle())]

    def __call__(self, embedding: Tensor, x: Tensor) -> Tensor:
        first, second = (part(embedding, x) for part in self.parts)
        return first + second


def rkd(loss: Any, dtype: torch.dtype) -> users.ByHand:
    """By hand, however ours is composed."""
    return users.ByHand(RKD(), dtype)


def second(layer: str = "backbone") -> RelationalDistillation:
    return RelationalDistillation(toys.teacher(dropout=0.5, norm=True), RKDAngle(), student_layer=layer)


def mappings() -> DataLoader[Any]:
    return DataLoader([{"x": x, "y": y} for x, y in toys.loader()], batch_size=None)  # type: ignore[arg-type]


def indexed() -> DataLoader[Any]:
    rows = toys.Rows(8 * toys.STEPS)
    return DataLoader(TensorDataset(rows.x, rows.y, torch.arange(len(rows))), batch_size=8)


LAYERS: dict[str, Any] = {
    "student_layer": {"low": Tap("backbone.first", at="output"), "high": "backbone"},
    "teacher_layer": {"low": Tap("first", at="output"), "high": ""},
}
EPOCHS: dict[str, Any] = {"weight": lambda epoch: 1.0 + epoch, "task_weight": lambda epoch: 0.5 - 0.25 * epoch}
ALMOST = 1e-6
WITH_MEMORY: dict[str, Any] = {"loss": partial(toys.Remembers, 7, 40), "batches": indexed, "indices": 2}
THREE_EPOCHS = {"max_epochs": 3}
TRIALS = partial(BatchSizeFinder, steps_per_trial=2, init_val=4, max_trials=2)
RATES = partial(LearningRateFinder, num_training_steps=20, early_stop_threshold=None)

CELLS = [
    # steps
    cell("a tensor is returned"),
    cell("a dict is returned", users.ReturnsDict),
    cell("None is returned", users.Skips),
    cell("training_step(self, batch)", users.BatchOnly),
    cell("dataloader_iter", users.Draws, input_layer="backbone"),
    cell("batches are mappings", users.Mapped, batches=mappings, inputs="x"),
    cell("dropout and batch norm", partial(toys.Student, dropout=0.5, norm=True)),
    cell("an in-place operation after the layer", users.WritesOver),
    cell("two passes in a step", users.TwoViews, input_layer="backbone"),
    cell("the step takes a gradient itself", users.Penalty),
    cell("activation checkpointing, not reentrant", change=users.recomputes),
    cell("activation checkpointing, reentrant, the layer around it", change=users.recomputes_reentrantly),
    cell(
        "activation checkpointing, the layer inside",
        change=users.recomputes,
        student_layer=Tap("backbone.last", at="output"),
    ),
    # losses
    cell(
        "losses at two layers",
        users.TwoTaps,
        lambda: 2 * RKD().at("low") + RKD().at("high"),
        by_hand=rkd,
        **LAYERS,
    ),
    cell(
        "several losses, weights of the epoch",
        users.Weighted,
        lambda: 25 * RKDDistance() + 50 * RKDAngle(),
        by_hand=rkd,
        settings={"max_epochs": 2},
        **EPOCHS,
    ),
    cell("two callbacks", loss=RKDDistance, by_hand=Both, ours_too=(second,), limit=ALMOST),
    cell("a loss with parameters", users.WithTensors, partial(toys.Projected, 5, 7)),
    cell(
        "a loss with parameters, bf16-mixed",
        users.WithTensors,
        partial(toys.Projected, 5, 7),
        settings={"precision": "bf16-mixed"},
    ),
    cell("a loss with a memory", users.WithTensors, **WITH_MEMORY),
    # the trainer
    cell("accumulation", settings={"accumulate_grad_batches": 2}),
    cell("clipping by norm", settings={"gradient_clip_val": 0.05}),
    cell("clipping by value", settings={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    cell("bf16-mixed", settings={"precision": "bf16-mixed"}),
    cell("bf16-true", settings={"precision": "bf16-true"}),
    cell("64-true", settings={"precision": "64-true"}),
    cell("fp16 with a scaler, clipping", settings={"plugins": scaler, "gradient_clip_val": 0.05}),
    cell("fp16 with a scaler, accumulation", settings={"plugins": scaler, "accumulate_grad_batches": 2}),
    cell("LBFGS with strong_wolfe", partial(toys.Student, optimizer=strong_wolfe), limit=ALMOST),
    cell(
        "stochastic weight averaging",
        partial(toys.Student, norm=True),
        others=(partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),),
        settings=THREE_EPOCHS,
    ),
    cell(
        "stochastic weight averaging, a loss with parameters",
        users.WithTensors,
        partial(toys.Projected, 5, 7),
        others=(partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),),
        settings=THREE_EPOCHS,
    ),
    cell("averaged weights", others=(WeightAveraging,)),
    cell("exponentially averaged weights", others=(partial(EMAWeightAveraging, decay=0.5),)),
    cell(
        "averaged weights, a loss with parameters",
        users.WithTensors,
        partial(toys.Projected, 5, 7),
        others=(WeightAveraging,),
    ),
    cell("learning rate finder", users.Tuned, others=(RATES,), settings={"max_epochs": 5}),
    cell(
        "learning rate finder, a loss with a memory",
        users.TunedWithTensors,
        others=(RATES,),
        settings={"max_epochs": 5},
        **WITH_MEMORY,
    ),
    cell("batch size finder", users.Tuned, others=(TRIALS,), batches=None),
    cell(
        "batch size finder, a loss with a memory",
        users.TunedWithTensors,
        others=(TRIALS,),
        slow=True,
        **{**WITH_MEMORY, "batches": None},
    ),
    cell("fit twice", train=twice),
    cell("a second fit after an exception in a step", users.FailsOnce, train=after_an_exception),
    cell("a deep copy made while attached", train=partial(copied, copy.deepcopy)),
    cell(
        "a deep copy, a loss with parameters",
        users.WithTensors,
        partial(toys.Projected, 5, 7),
        train=partial(copied, copy.deepcopy),
    ),
    cell("a pickle made while attached", train=partial(copied, by_pickle)),
    # compilers
    cell("a compiled student", compiles=compiled("eager", "backbone"), limit=ALMOST, slow=True),
    cell(
        "a compiled student, the layer inside",
        compiles=compiled("eager", "backbone"),
        student_layer=Tap("backbone.last", at="output"),
        limit=ALMOST,
        slow=True,
    ),
    cell("a compiled teacher", teacher=compiled("eager"), limit=ALMOST, slow=True),
    cell("a compiled module", compiles=compiled("eager"), limit=ALMOST, slow=True),
    cell("a student compiled by inductor", compiles=compiled("inductor", "backbone"), limit=ALMOST, slow=True),
    cell("a teacher compiled by inductor", teacher=compiled("inductor"), limit=ALMOST, slow=True),
    cell("a module compiled by inductor", compiles=compiled("inductor"), limit=ALMOST, slow=True),
    # manual optimisation
    cell("manual", toys.Manual, limit=ALMOST),
    cell("manual, bf16-mixed", toys.Manual, settings={"precision": "bf16-mixed"}, limit=ALMOST),
    cell("manual, bf16-true", toys.Manual, settings={"precision": "bf16-true"}, limit=ALMOST),
    cell("manual, fp16 with a scaler", toys.Manual, settings={"plugins": scaler}, limit=ALMOST),
    cell("manual, accumulation and clipping", users.ManualSteps, limit=ALMOST),
    cell("manual, dataloader_iter", users.ManualDraws, input_layer="backbone", limit=ALMOST),
    cell("manual, two passes in a step", users.ManualViews, input_layer="backbone", limit=ALMOST),
    cell("manual, a closure", users.Closure, limit=ALMOST),
    cell("manual, the first of two backwards", users.TwoBackwards, manual_backward_index=0, limit=ALMOST),
    cell("manual, the second of two backwards", users.Later, manual_backward_index=1, limit=ALMOST),
    cell(
        "manual, activation checkpointing, the layer inside",
        users.Later,
        change=users.recomputes,
        student_layer=Tap("backbone.last", at="output"),
        manual_backward_index=1,
        limit=ALMOST,
    ),
    cell("manual, two optimizers", users.Adversarial, manual_backward_index=0, limit=ALMOST),
    cell("manual, two optimizers, critic first", users.CriticFirst, manual_backward_index=1, limit=ALMOST),
    cell("manual, three optimizers", users.ThreeOptimizers, manual_backward_index=0, limit=ALMOST),
    cell(
        "manual, the critic's optimizer first, a loss with parameters",
        users.CriticsOptimizerFirst,
        partial(toys.Projected, 5, 7),
        manual_backward_index=0,
        limit=ALMOST,
    ),
    cell("manual, fit twice", toys.Manual, train=twice, limit=ALMOST),
    cell("manual, a compiled module", toys.Manual, compiles=compiled("eager"), limit=ALMOST, slow=True),
]
