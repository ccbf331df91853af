"""The cells: callback and module on one device, then both on two."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_metric_learning import losses, miners
from torch.utils.data import DataLoader

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.harness.faces import Net
from tests.parity import Cell, after_an_exception, copied, twice, users
from tests.parity.users import compiled, having, step, with_backbone

ALMOST = 1e-6
callback = Cell
module = partial(Cell, face="module")


def both(name: str, **fields: Any) -> list[Cell]:
    """The same cell for callback and module."""
    return [callback(name=name, **fields), module(name=name, **fields)]


def pair(change: Callable[[Any], Any]) -> dict[str, Any]:
    """The user's module and the network of a ``DistillationModule``, changed alike."""
    return {"user": change(toys.Student), "student": change(Net)}


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


def strong_wolfe(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=2, line_search_fn="strong_wolfe")


def second(layer: str = "backbone") -> RelationalDistillation:
    return RelationalDistillation(toys.teacher(dropout=0.5, norm=True), RKDAngle(), student_layer=layer)


def mappings() -> DataLoader[Any]:
    return DataLoader([{"x": x, "y": y} for x, y in toys.loader()], batch_size=None)  # type: ignore[arg-type]


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def two_layers() -> Any:
    return 2 * RKD().at("low") + RKD().at("high")


def distances_and_angles() -> Any:
    return 25 * RKDDistance() + 50 * RKDAngle()


def relation_and_hint() -> Any:
    """One term about pairs, which is gathered, and one about samples, which is not."""
    return RKD() + toys.Hint()


indexed = partial(toys.loader, indexed=True)
AT_BACKBONE = {"input_layer": "backbone"}
INSIDE = {"student_layer": "backbone.last"}
LAYERS: dict[str, Any] = {
    "student_layer": {"low": "backbone.first", "high": "backbone"},
    "teacher_layer": {"low": "first", "high": ""},
}
EPOCHS: dict[str, Any] = {"weight": lambda epoch: 1.0 + epoch, "task_weight": lambda epoch: 0.5 - 0.25 * epoch}
SEVERAL: dict[str, Any] = {"loss": distances_and_angles, "by_hand": users.rkd, "settings": {"max_epochs": 2}}
PARAMETERS: dict[str, Any] = {"user": users.WithTensors, "loss": partial(toys.Projected, 5, 7)}
MEMORY: dict[str, Any] = {
    "user": users.WithTensors,
    "loss": partial(toys.Remembers, 7, 40),
    "batches": indexed,
    "arguments": {"indices": 2},
}
METRIC: dict[str, Any] = {
    "user": users.Metric,
    "arguments": {
        "task_loss": losses.TripletMarginLoss,
        "miner": miners.BatchHardMiner,
        "task_reads": "embedding",
        "weight": 2,
        "task_weight": 0.5,
    },
}
TUNED: dict[str, Any] = {"user": users.Tuned, "kind": users.TunedModule}
TUNED_MEMORY = MEMORY | TUNED | {"user": users.TunedWithTensors}
SWA: dict[str, Any] = {
    "callbacks": (partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),),
    "settings": {"max_epochs": 3},
}
RATES: dict[str, Any] = {
    "callbacks": (partial(LearningRateFinder, num_training_steps=20, early_stop_threshold=None),),
    "settings": {"max_epochs": 5},
}
TRIALS: dict[str, Any] = {
    "callbacks": (partial(BatchSizeFinder, steps_per_trial=2, init_val=4, max_trials=2),),
    "batches": None,
}
recomputes = partial(with_backbone, users.Recomputes)
recomputes_reentrantly = partial(with_backbone, having(users.Recomputes, reentrant=True))
MAPPED = step(lambda self, batch, _: self.loss(batch["x"], batch["y"]))
DOUBLED = step(lambda self, batch, _: self.loss(2 * batch[0], batch[1]))
DRAWS = step(lambda self, dataloader_iter: self.loss(*next(dataloader_iter)[0]))
MANUAL_DRAWS = step(lambda self, dataloader_iter: self.step(*next(dataloader_iter)[0]), toys.Manual)

STEPS = [
    callback(name="a tensor is returned"),
    callback(name="a dict is returned", user=step(lambda self, batch, _: {"loss": self.loss(*batch), "other": 1})),
    callback(name="None is returned", user=step(lambda self, batch, i: None if i == 2 else self.loss(*batch))),
    callback(name="training_step(self, batch)", user=step(lambda self, batch: self.loss(*batch))),
    callback(name="dataloader_iter", user=DRAWS, arguments=AT_BACKBONE),
    callback(name="batches are mappings", user=MAPPED, batches=mappings, arguments={"inputs": "x"}),
    callback(name="two passes in a step", user=users.TwoViews, arguments=AT_BACKBONE),
    callback(name="the step takes a gradient itself", user=users.Penalty),
    callback(name="activation checkpointing, the layer inside", user=recomputes(toys.Student), arguments=INSIDE),
    module(name="a classifier"),
    module(name="metric learning with a miner", **METRIC),
    module(name="batches are mappings", user=MAPPED, batches=mappings, arguments={"inputs": "x", "labels": "y"}),
    module(name="a batch transform", user=DOUBLED, arguments={"batch_transform": users.double}),
    module(name="two passes in a step", user=users.TwoPasses, student=users.TwoPassesNet, arguments=AT_BACKBONE),
    *both("dropout and batch norm", **pair(lambda make: partial(make, dropout=0.5, norm=True))),
    *both("an in-place operation after the layer", user=users.WritesOver, student=users.WritesOverNet),
    *both("activation checkpointing, not reentrant", **pair(recomputes)),
    *both("activation checkpointing, reentrant, the layer around it", **pair(recomputes_reentrantly)),
]
LOSSES = [
    *both("losses at two layers", user=users.TwoTaps, loss=two_layers, by_hand=users.rkd, arguments=LAYERS),
    callback(name="several losses, weights of the epoch", user=users.Weighted, arguments=EPOCHS, **SEVERAL),
    module(
        name="several losses, weights of the epoch, a scheduler",
        user=users.Scheduled,
        arguments=EPOCHS | {"lr_scheduler": users.halves},
        **SEVERAL,
    ),
    callback(name="two callbacks", loss=RKDDistance, by_hand=users.two_relations, also=(second,), limit=ALMOST),
    module(
        name="RelationalDistillation on top",
        loss=RKDDistance,
        by_hand=lambda loss, dtype: users.ByHand(RKD(1, 1), dtype),
        also=(partial(second, "student.backbone"),),
        limit=ALMOST,
    ),
    *both("a loss with parameters", **PARAMETERS),
    callback(name="a loss with parameters, bf16-mixed", settings={"precision": "bf16-mixed"}, **PARAMETERS),
    *both("a loss with a memory", **MEMORY),
]
TRAINER = [
    *both("accumulation", settings={"accumulate_grad_batches": 2}),
    *both("clipping by norm", settings={"gradient_clip_val": 0.05}),
    *both("clipping by value", settings={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    *both("bf16-mixed", settings={"precision": "bf16-mixed"}),
    *both("bf16-true", settings={"precision": "bf16-true"}),
    *both("64-true", settings={"precision": "64-true"}),
    *both("fp16 with a scaler, clipping", settings={"plugins": scaler, "gradient_clip_val": 0.05}),
    *both("fp16 with a scaler, accumulation", settings={"plugins": scaler, "accumulate_grad_batches": 2}),
    *both("LBFGS with strong_wolfe", optimizer=strong_wolfe, limit=ALMOST),
    *both("stochastic weight averaging", **SWA, **pair(lambda make: partial(make, norm=True))),
    *both("stochastic weight averaging, a loss with parameters", **SWA, **PARAMETERS),
    *both("averaged weights", callbacks=(WeightAveraging,)),
    *both("exponentially averaged weights", callbacks=(partial(EMAWeightAveraging, decay=0.5),)),
    *both("averaged weights, a loss with parameters", callbacks=(WeightAveraging,), **PARAMETERS),
    *both("learning rate finder", **TUNED, **RATES),
    *both("learning rate finder, a loss with a memory", **TUNED_MEMORY, **RATES),
    *both("batch size finder", **TUNED, **TRIALS),
    callback(name="batch size finder, a loss with a memory", slow=True, **TUNED_MEMORY | TRIALS),
    *both("fit twice", train=twice),
    *both(
        "a second fit after an exception in a step",
        user=users.FailsOnce,
        student=users.FailsOnceNet,
        train=after_an_exception,
    ),
    *both("a deep copy made while attached", train=partial(copied, copy.deepcopy)),
    callback(name="a deep copy, a loss with parameters", train=partial(copied, copy.deepcopy), **PARAMETERS),
    *both("a pickle made while attached", train=partial(copied, by_pickle)),
]


SLOWLY: dict[str, Any] = {"limit": ALMOST, "slow": True}
COMPILERS = [
    *both("a compiled student", compiles=compiled("eager", student=True), **SLOWLY),
    callback(name="a compiled student, the layer inside", compiles=compiled("eager", True), arguments=INSIDE, **SLOWLY),
    *both("a compiled teacher", compiles_teacher=compiled("eager"), **SLOWLY),
    *both("a compiled module", compiles=compiled("eager"), **SLOWLY),
    *both("a student compiled by inductor", compiles=compiled("inductor", student=True), **SLOWLY),
    callback(name="a teacher compiled by inductor", compiles_teacher=compiled("inductor"), **SLOWLY),
    *both("a module compiled by inductor", compiles=compiled("inductor"), **SLOWLY),
]


def manual(name: str, user: Callable[..., Any] = toys.Manual, **fields: Any) -> Cell:
    return Cell(name=f"manual{name}", user=user, limit=ALMOST, **fields)


def at(index: int) -> dict[str, Any]:
    return {"manual_backward_index": index}


LATER = having(users.TwoBackwards, receives=1)
CRITIC_FIRST = having(users.Adversarial, players=("critic_step", "network_step"))
MANUAL = [
    manual(""),
    manual(", bf16-mixed", settings={"precision": "bf16-mixed"}),
    manual(", bf16-true", settings={"precision": "bf16-true"}),
    manual(", fp16 with a scaler", settings={"plugins": scaler}),
    manual(", accumulation and clipping", users.ManualSteps),
    manual(", dataloader_iter", MANUAL_DRAWS, arguments=AT_BACKBONE),
    manual(", two passes in a step", having(toys.Manual, loss=users.TwoViews.loss), arguments=AT_BACKBONE),
    manual(", a closure", users.Closure),
    manual(", the first of two backwards", users.TwoBackwards, arguments=at(0)),
    manual(", the second of two backwards", LATER, arguments=at(1)),
    manual(", activation checkpointing, the layer inside", recomputes(LATER), arguments=INSIDE | at(1)),
    manual(", two optimizers", users.Adversarial, arguments=at(0)),
    manual(
        ", two optimizers, critic first",
        CRITIC_FIRST,
        arguments=at(1),
    ),
    manual(", three optimizers", users.ThreeOptimizers, arguments=at(0)),
    manual(
        ", the critic's optimizer first, a loss with parameters",
        users.CriticsOptimizerFirst,
        loss=partial(toys.Projected, 5, 7),
        arguments=at(0),
    ),
    manual(", fit twice", train=twice),
    manual(", a compiled module", compiles=compiled("eager"), slow=True),
    module(name="manual optimisation in a subclass", user=toys.Manual, kind=users.ManualModule, limit=ALMOST),
]
PARTS: dict[str, Any] = {"micro_batch": 3}
HALF = 1e-2  # the same products are rounded in other sums


def parts(name: str, limit: float = ALMOST, arguments: Any = (), **fields: Any) -> Cell:
    """A module in micro-batches of at most 3 of 8 rows, against the loss by hand on the whole batch."""
    return module(name=f"micro-batches{name}", limit=limit, arguments=PARTS | dict(arguments), **fields)


def wrapped(name: str, user: Callable[..., Any] = toys.Student, **fields: Any) -> Cell:
    """A callback on a backbone in micro-batches."""
    return callback(name=f"micro-batches{name}", user=users.in_micro_batches(user), limit=ALMOST, **fields)


RANDOM, NORMED = partial(users.InParts, dropout=0.5, norm=True), partial(Net, dropout=0.5, norm=True)
DOUBLE: dict[str, Any] = {"settings": {"precision": "64-true"}, "limit": 1e-12}
MICRO_BATCHES = [
    parts(""),
    parts(", dropout and batch norm, 64-true, against kept activations", user=RANDOM, **DOUBLE | {"student": NORMED}),
    parts(", metric learning with a miner", **METRIC),
    parts(", batches are mappings", user=MAPPED, batches=mappings, arguments={"inputs": ["x"], "labels": "y"}),
    parts(", two passes in a step", user=users.TwoPasses, student=users.TwoPassesNet, arguments=AT_BACKBONE),
    parts(", an in-place operation after the layer", user=users.WritesOver, student=users.WritesOverNet),
    parts(", activation checkpointing inside", **pair(recomputes)),
    parts(", losses at two layers", user=users.TwoTaps, loss=two_layers, by_hand=users.rkd, arguments=LAYERS),
    parts(", a loss with parameters", **PARAMETERS),
    parts(", a loss with a memory", **MEMORY),
    parts(", accumulation", settings={"accumulate_grad_batches": 2}),
    parts(", bf16-mixed", HALF, settings={"precision": "bf16-mixed"}),
    parts(", bf16-true", HALF, settings={"precision": "bf16-true"}),
    parts(", 64-true", **DOUBLE),
    parts(", fp16 with a scaler, accumulation", HALF, settings={"plugins": scaler, "accumulate_grad_batches": 2}),
    parts(", LBFGS with strong_wolfe, 64-true", optimizer=strong_wolfe, **DOUBLE),  # a search amplifies rounding
    parts(", a compiled student", compiles=compiled("aot_eager", student=True), slow=True),
    parts(", a compiled module", compiles=compiled("aot_eager"), slow=True),
    wrapped(""),
    wrapped(", accumulation and clipping", settings={"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    wrapped(", two passes in a step", users.TwoViews, arguments=AT_BACKBONE),
    wrapped(", manual", users.TwoBackwards, arguments=at(0)),
]
ON_ONE_DEVICE = [*STEPS, *LOSSES, *TRAINER, *COMPILERS, *MANUAL, *MICRO_BATCHES]


# Two devices


def ddp(**settings: Any) -> dict[str, Any]:
    return {"on_ranks": {"strategy": partial(DDPStrategy, process_group_backend="gloo", **settings)}}


def on_two(face: str, name: str, **fields: Any) -> Cell:
    """A cell on two devices; for a module, the third part of a batch is its indices."""
    arguments = ({"indices": 2} if face == "module" else {}) | fields.pop("arguments", {})
    defaults: dict[str, Any] = {"ranks": "one device", "loss": relation_and_hint}
    return Cell(name=name, face=face, limit=ALMOST, arguments=arguments, **defaults | fields)


def on_a_mesh() -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, process_group_backend="gloo")


UNUSED = ddp(find_unused_parameters=True)
FSDP: dict[str, Any] = {
    "user": having(configure_model=users.shard),
    "kind": having(DistillationModule, configure_model=users.shard),
    "on_ranks": {"strategy": on_a_mesh},
}
IN_PARTS: dict[str, dict[str, Any]] = {
    "callback": {"user": users.in_micro_batches(toys.Student)},
    "module": {"arguments": PARTS},
}
FSDP_IN_PARTS = IN_PARTS | {"callback": {"user": users.in_micro_batches(FSDP["user"])}}
STARTED = {"callback": "ddp_spawn", "module": "ddp_fork"}
BY_RANKS: dict[str, Any] = {"ranks": "same ranks", "loss": RKD, "by_hand": users.Everywhere}

ON_TWO_DEVICES = [
    cell
    for face in ("callback", "module")
    for two in [partial(on_two, face)]
    for cell in [
        two("DDP"),
        two("DDP, micro-batches", **IN_PARTS[face]),
        two("DDP, static_graph", **ddp(static_graph=True)),
        two("DDP, gradient_as_bucket_view", **ddp(gradient_as_bucket_view=True)),
        two("DDP, accumulation", settings={"accumulate_grad_batches": 2}),
        two("DDP, clipping by norm", settings={"gradient_clip_val": 0.05}),
        two("DDP, uneven batches", counts=(11, 5), **{"user": users.CountsRows} if face == "callback" else {}),
        two("DDP, a loss with parameters", **PARAMETERS),
        two("DDP, a loss with a memory", **MEMORY | {"loss": partial(toys.Remembers, 7, 80)}),
        two("DDP, gather=False", ranks="same ranks", arguments={"gather": False}),
        two("DDP, bf16-mixed", settings={"precision": "bf16-mixed"}, **BY_RANKS),
        two("DDP, bf16-true", settings={"precision": "bf16-true"}, **BY_RANKS),
        two("FSDP2", **FSDP),
        two("FSDP2, micro-batches", **FSDP | FSDP_IN_PARTS[face]),
        two(
            STARTED[face],
            ranks="spawned",
            **PARAMETERS,
            on_ranks={"strategy": STARTED[face], "devices": 2, "use_distributed_sampler": False},
            slow=True,
        ),
    ]
]
ON_TWO_DEVICES += [
    on_two("callback", "DDP, find_unused_parameters, only distilled", user=users.OnlyDistilled, **UNUSED),
    on_two("callback", "DDP, two passes in a step", user=users.TwoViews, loss=RKD, arguments=AT_BACKBONE),
    on_two("callback", "DDP, two callbacks", loss=RKDDistance, by_hand=users.two_relations, also=(second,)),
    on_two("callback", "DDP, manual", user=toys.Manual),
    on_two("callback", "DDP, manual, find_unused_parameters, only distilled", user=users.ManualOnlyDistilled, **UNUSED),
    on_two("callback", "DDP, manual, static_graph", user=toys.Manual, **ddp(static_graph=True)),
    on_two("callback", "DDP, fp16 with a scaler", settings={"plugins": scaler}, **BY_RANKS),
    on_two("callback", "FSDP2, accumulation", settings={"accumulate_grad_batches": 2}, **FSDP),
    on_two("module", "DDP, micro-batches, static_graph", **IN_PARTS["module"], **ddp(static_graph=True)),
    on_two("module", "DDP, micro-batches, uneven batches", counts=(11, 5), **IN_PARTS["module"]),
    on_two("module", "FSDP2, micro-batches, uneven batches", counts=(11, 5), **IN_PARTS["module"] | FSDP),
    on_two("module", "DDP, micro-batches, accumulation", settings={"accumulate_grad_batches": 2}, **IN_PARTS["module"]),
    on_two("module", "DDP, find_unused_parameters", **UNUSED),
    on_two("module", "DDP, metric learning with a miner", loss=RKD, **METRIC, **UNUSED),  # the head
    on_two("module", "DDP, metric learning with a miner, uneven batches", loss=RKD, counts=(11, 5), **METRIC, **UNUSED),
]
