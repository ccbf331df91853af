"""Both faces on two devices, against the loss by hand: on one device with the whole batch, or on the same two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.losses.rkd import RKD, RKDDistance
from lightning_rkd.modules.distillation import DistillationModule
from tests.callbacks.test_ddp import Sharded
from tests.harness import toys
from tests.parity import Cell, How, Run, users
from tests.parity import module as modules
from tests.parity.callback import ALMOST, Both, second

ROWS = 16
EVEN, UNEVEN = (8, 8), (11, 5)
Reference = Literal["one device", "same ranks"]


class Shares(Sampler[list[int]]):
    """Batches of sixteen rows, or this rank's share of each, whoever is asked."""

    def __init__(self, counts: tuple[int, int]) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[list[int]]:
        start, stop = 0, ROWS
        if dist.is_initialized():
            start, stop = ((0, self.counts[0]), (self.counts[0], ROWS))[dist.get_rank()]
        for batch in range(toys.STEPS):
            yield list(range(ROWS * batch + start, ROWS * batch + stop))

    def __len__(self) -> int:
        return toys.STEPS


def loader(counts: tuple[int, int], alone: bool) -> DataLoader[Any]:
    rows = toys.Rows(ROWS * toys.STEPS)
    data = TensorDataset(rows.x, rows.y, torch.arange(len(rows)))
    return DataLoader(data, batch_sampler=Shares((ROWS, 0) if alone else counts))


# Modules that users write


class Student(toys.Student):
    """Its batches hold indices."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch[:2])


class OnlyDistilled(Student):
    """Its backbone gets a gradient from the relations alone, and one layer from nobody."""

    def __init__(self, by_hand: Any = None) -> None:
        super().__init__(by_hand)
        self.unused = nn.Linear(2, 2)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        loss = F.cross_entropy(self.head(embedding.detach()), y)
        return loss if by_hand is None else loss + by_hand(embedding, x)


class CountsRows(Student):
    """Weighs its own loss by the rows of all ranks, which a callback leaves to the user."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        loss = F.cross_entropy(self.head(embedding), y, reduction="sum") * ranks / ROWS
        return loss if by_hand is None else loss + by_hand(embedding, x)


class Views(Student):
    loss = users.TwoViews.loss


class Manual(toys.Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch[:2], batch_idx)


class ManualOnlyDistilled(OnlyDistilled):
    def __init__(self, by_hand: Any = None) -> None:
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        toys.Manual.training_step(self, batch[:2], batch_idx)  # type: ignore[arg-type]


class Shards(Student, Sharded):
    """Its parts lie on both devices."""


class ShardsStudent(DistillationModule):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.student.backbone, self.student.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])  # type: ignore[arg-type]


def on_a_mesh() -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, process_group_backend="gloo")


class Everywhere(users.ByHand):
    """A global relation by hand on each rank: the rows of others as constants, so the gradient is a W-th of it."""

    def __call__(self, embedding: Tensor, *x: Tensor, **context: Any) -> Tensor:
        with torch.no_grad():
            shown = self.teacher(*x).float()
        mine, ranks = embedding.float(), dist.get_world_size()
        sides = [[torch.empty_like(rows) for _ in range(ranks)] for rows in (mine, shown)]
        for rows, every in zip((mine, shown), sides, strict=True):
            dist.all_gather(every, rows.detach().contiguous())
        sides[0][dist.get_rank()] = mine
        value: Tensor = ranks * self.loss(*(torch.cat(every) for every in sides))
        return value


def relation_and_hint() -> Any:
    """One term about pairs, which is gathered, and one about samples, which is not."""
    return RKD() + toys.Hint()


def callback(
    name: str,
    user: Callable[..., Any] = Student,
    loss: Callable[[], Any] = relation_and_hint,
    *,
    alone: Callable[..., Any] | None = None,
    by_hand: Callable[..., Any] = users.ByHand,
    ours_too: tuple[Callable[[], Any], ...] = (),
    reference: Reference = "one device",
    counts: tuple[int, int] = EVEN,
    strategy: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    mesh: bool = False,
    limit: float = ALMOST,
    **ours: Any,
) -> Cell:
    """A cell of the callback; ``alone`` makes the module on one device, where that is another."""

    def build(how: How, rank: int | None) -> Run:
        make = user if rank is not None or alone is None else alone
        dtype = modules.DTYPES.get((settings or {}).get("precision", ""), torch.float32)
        callbacks = [
            RelationalDistillation(toys.teacher(norm=True, dropout=0.5), loss(), student_layer="backbone", **ours)
        ]
        run = Run(
            make(by_hand(loss(), dtype)) if how == "hand" else make(),
            [*callbacks, *(more() for more in ours_too)] if how == "ours" else [],
            loader(counts, alone=rank is None),
            dict(settings or {}),
        )
        if mesh and rank is not None:
            run.settings["strategy"] = on_a_mesh
        return run

    return Cell(name, "callback", build, limit, slow=True, ranks=reference, strategy=strategy or {})


def module(
    name: str,
    loss: Callable[[], Any] = relation_and_hint,
    *,
    kind: type[DistillationModule] = DistillationModule,
    written: type[modules.Written] = modules.Written,
    by_hand: Callable[[], Any] | None = None,
    reference: Reference = "one device",
    counts: tuple[int, int] = EVEN,
    strategy: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    mesh: bool = False,
    limit: float = ALMOST,
    **ours: Any,
) -> Cell:
    """A cell of DistillationModule."""

    def build(how: How, rank: int | None) -> Run:
        cell = modules.cell(
            name,
            loss=loss,
            by_hand=by_hand,
            kind=lambda c: kind if c is DistillationModule else c,
            written=written,
            settings=settings,
            indices=2,
            **ours,
        )
        run = cell.build(how, rank)
        run.batches = loader(counts, alone=rank is None)
        if mesh and rank is not None:
            run.settings["strategy"] = on_a_mesh
        return run

    return Cell(name, "module", build, limit, slow=True, ranks=reference, strategy=strategy or {})


class Gathered(modules.Written):
    """On each rank the global relation by hand."""

    def relation(self, embedding: Tensor, x: Tensor, **context: Any) -> Tensor:
        hand = Everywhere(self.loss)
        hand.teacher = self.teacher[0]  # type: ignore[assignment]
        return hand(embedding, x)


def spawned(on_ranks: Cell) -> Cell:
    """The same in processes that the trainer starts itself, to which everything is sent by pickle."""

    def build(how: How, rank: int | None) -> Run:
        run = on_ranks.build(how, None)
        if how == "ours":
            run.settings = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False}
            run.batches = loader(EVEN, alone=False)
        return run

    return Cell("ddp_spawn", on_ranks.face, build, ALMOST, slow=True)


UNUSED = {"find_unused_parameters": True}
STATIC = {"static_graph": True}
VIEW = {"gradient_as_bucket_view": True}
BY_RANKS: dict[str, Any] = {"reference": "same ranks", "loss": RKD, "by_hand": Everywhere}
METRIC: dict[str, Any] = {
    "written": modules.Metric,
    "task_loss": losses.TripletMarginLoss,
    "miner": miners.BatchHardMiner,
    "task_reads": "embedding",
    "weight": 2,
    "task_weight": 0.5,
    "strategy": UNUSED,  # the head
}

CELLS = [
    callback("DDP"),
    callback("DDP, find_unused_parameters, only distilled", OnlyDistilled, strategy=UNUSED),
    callback("DDP, static_graph", strategy=STATIC),
    callback("DDP, gradient_as_bucket_view", strategy=VIEW),
    callback("DDP, accumulation", settings={"accumulate_grad_batches": 2}),
    callback("DDP, clipping by norm", settings={"gradient_clip_val": 0.05}),
    callback("DDP, uneven batches", CountsRows, counts=UNEVEN),
    callback("DDP, two passes in a step", Views, RKD, input_layer="backbone"),
    callback("DDP, two callbacks", Student, RKDDistance, by_hand=Both, ours_too=(second,)),
    callback("DDP, a loss with parameters", users.WithTensors, partial(toys.Projected, 5, 7)),
    callback("DDP, a loss with a memory", users.WithTensors, partial(toys.Remembers, 7, 80), indices=2),
    callback("DDP, manual", Manual),
    callback("DDP, manual, find_unused_parameters, only distilled", ManualOnlyDistilled, strategy=UNUSED),
    callback("DDP, manual, static_graph", Manual, strategy=STATIC),
    callback("DDP, gather=False", reference="same ranks", gather=False),
    callback("DDP, bf16-mixed", settings={"precision": "bf16-mixed"}, **BY_RANKS),
    callback("DDP, bf16-true", settings={"precision": "bf16-true"}, **BY_RANKS),
    callback("DDP, fp16 with a scaler", settings={"plugins": modules.scaler}, **BY_RANKS),
    callback("FSDP2", Shards, alone=Student, mesh=True),
    callback("FSDP2, accumulation", Shards, alone=Student, mesh=True, settings={"accumulate_grad_batches": 2}),
    module("DDP"),
    module("DDP, find_unused_parameters", strategy=UNUSED),
    module("DDP, static_graph", strategy=STATIC),
    module("DDP, gradient_as_bucket_view", strategy=VIEW),
    module("DDP, accumulation", settings={"accumulate_grad_batches": 2}),
    module("DDP, clipping by norm", settings={"gradient_clip_val": 0.05}),
    module("DDP, uneven batches", counts=UNEVEN),
    module("DDP, metric learning with a miner", RKD, **METRIC),
    module("DDP, metric learning with a miner, uneven batches", RKD, counts=UNEVEN, **METRIC),
    module("DDP, a loss with parameters", toys.Projected, by_hand=partial(toys.Projected, 5, 7)),
    module("DDP, a loss with a memory", toys.Remembers, by_hand=partial(toys.Remembers, 7, 80)),
    module("DDP, gather=False", reference="same ranks", gather=False),
    module("DDP, bf16-mixed", RKD, reference="same ranks", written=Gathered, settings={"precision": "bf16-mixed"}),
    module("DDP, bf16-true", RKD, reference="same ranks", written=Gathered, settings={"precision": "bf16-true"}),
    module("FSDP2", kind=ShardsStudent, mesh=True),
    spawned(callback("DDP")),
    spawned(module("DDP")),
]
