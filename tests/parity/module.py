"""DistillationModule, against a LightningModule written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys
from tests.parity import Cell, How, Recorder, Run, once, users
from tests.parity.callback import (
    ALMOST,
    DTYPES,
    LAYERS,
    RATES,
    THREE_EPOCHS,
    TRIALS,
    after_an_exception,
    by_pickle,
    compiled,
    copied,
    indexed,
    mappings,
    scaler,
    second,
    strong_wolfe,
    twice,
)


class Net(nn.Module):
    """A classifier; ``shows`` is what a relation is about, and the logits."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = toys.Backbone(dropout, norm), nn.Linear(5, toys.CLASSES)

    def shows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.backbone(x)
        return embedding, self.head(embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.shows(x)[1]


class WritesOver(Net):
    """Its embedding is overwritten in place."""

    def shows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.backbone(x)
        return embedding.clone(), self.head(F.relu_(embedding))


class TwoPasses(Net):
    """Both passes are one joint relation."""

    def shows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.backbone(x), self.backbone(x.flip(1))
        return torch.cat([a, b]), self.head(a + b)


class FailsOnce(Net):
    """The third pass of its life fails."""

    calls = 0

    def shows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("the third step")
        return super().shows(x)


class Written(pl.LightningModule):
    """What a user would write."""

    def __init__(self, student: Net, loss: Any, distil: bool, optimizer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.student, self.loss, self.distil, self.optimizer = student, loss, distil, optimizer
        self.teacher = [toys.teacher(dropout=0.5, norm=True).to(dtype).eval()]  # in a list: not registered

    def task(self, embedding: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        # as the task loss of DistillationModule: in float32 at least
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)

    def relation(self, embedding: Tensor, x: Tensor, **context: Any) -> Tensor:
        with torch.no_grad():
            shown = self.taught(x)
        value: Tensor = self.loss(embedding, shown, **context)
        return value

    def taught(self, x: Tensor) -> Tensor:
        shown: Tensor = self.teacher[0](x)
        return shown

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, *indices = batch
        embedding, logits = self.student.shows(x)
        if not self.distil:
            return self.task(embedding, logits, y)
        relation = self.relation(embedding, x, **users.asked(self.loss, indices))
        return self.task(embedding, logits, y) + relation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """DistillationModule has one, which the batch size finder notices."""

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Views(Written):
    def taught(self, x: Tensor) -> Tensor:
        # view by view, as the student: some processors round a product of twice the rows differently
        return torch.cat([super(Views, self).taught(view) for view in (x, x.flip(1))])


class Metric(Written):
    """Learns a metric instead of classes, with a weight for each part."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.miner, self.triplets = miners.BatchHardMiner(), losses.TripletMarginLoss()

    def task(self, embedding: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        value: Tensor = 0.5 * self.triplets(embedding, y, self.miner(embedding, y))
        return value

    def relation(self, embedding: Tensor, x: Tensor, **context: Any) -> Tensor:
        return 2 * super().relation(embedding, x)


class Doubled(Written):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((2 * batch[0], batch[1]), batch_idx)


class Epochs(Written):
    """Two relations, weighted by the epoch; and a scheduler."""

    def relation(self, embedding: Tensor, x: Tensor, **context: Any) -> Tensor:
        shown = self.teacher[0](x).detach()
        both = 25 * RKDDistance()(embedding, shown) + 50 * RKDAngle()(embedding, shown)
        return (1.0 + self.current_epoch) * both

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [halves(optimizer)]


class Layers(Written):
    """Two layers are read, one of which the next layer overwrites."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.distil:
            return super().training_step(batch, batch_idx)
        (x, y), net, teacher = batch, self.student, self.teacher[0]
        low = net.backbone.first(x)
        embedding = net.backbone.last(net.backbone.act(low.clone()))
        with torch.no_grad():
            low_t, embedding_t = teacher.first(x), teacher(x)
        relations = 2 * RKD()(low, low_t) + RKD()(embedding, embedding_t)
        return self.task(embedding, net.head(embedding), y) + relations


class Mapped(Written):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def manual(kind: type[Any]) -> type[Any]:
    """A subclass that optimises by hand."""

    class Manual(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    return Manual


def tuned(kind: type[Any]) -> type[Any]:
    """A subclass with what Lightning's finders change."""

    class Tuned(kind):  # type: ignore[misc]
        lr, batch_size = 0.1, 8

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

        def train_dataloader(self) -> Any:
            return toys.loader(batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return indexed()  # the batch size finder asks any module with a validation_step for it

    return Tuned


def same(kind: type[Any]) -> type[Any]:
    return kind


def halves(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def doubled(batch: Batch) -> Batch:
    return Batch(2 * batch.inputs, batch.labels)


def cell(
    name: str,
    student: Callable[[], Any] = Net,
    loss: Callable[[], Any] = RKD,
    *,
    written: type[Written] = Written,
    kind: Callable[[type[Any]], type[Any]] = same,
    by_hand: Callable[[], Any] | None = None,
    others: tuple[Callable[[], pl.Callback], ...] = (),
    ours_too: tuple[Callable[[], pl.Callback], ...] = (),
    compiles: Callable[[Any], Any] = lambda module: module,
    teacher: Callable[[Any], Any] = lambda network: network,
    batches: Callable[[], Any] | None = toys.loader,
    settings: dict[str, Any] | None = None,
    optimizer: Any = toys.sgd,
    limit: float = 0.0,
    train: Callable[[Run, Recorder], Any] = once,
    slow: bool = False,
    **ours: Any,
) -> Cell:
    """A cell of this face.

    Args:
        name: Its name.
        student: Makes the network.
        loss: Makes the loss.
        written: The module by hand.
        kind: What is done to the classes of both.
        by_hand: Makes the loss of the module by hand, where it is another.
        others: More callbacks of the trainer.
        ours_too: More callbacks that distil.
        compiles: What happens to ours alone: the loss by hand is not compiled.
        teacher: The same for the teacher of ours.
        batches: Makes the loader; ``None`` where the module has its own.
        settings: Of the trainer.
        optimizer: From parameters to optimizer.
        limit: How far the two may lie apart.
        train: How it is trained.
        slow: Whether it takes seconds.
        **ours: Arguments of DistillationModule.
    """
    task: dict[str, Any] = {"task_loss": nn.CrossEntropyLoss, "task_reads": "logits", "student_layer": "backbone"}

    def build(how: How, rank: int | None) -> Run:
        dtype = DTYPES.get((settings or {}).get("precision", ""), torch.float32)
        callbacks = [other() for other in others]
        if how == "ours":
            network = teacher(toys.teacher(dropout=0.5, norm=True).train())
            made = {k: v() if k in ("task_loss", "miner") else v for k, v in {**task, **ours}.items()}
            module = kind(DistillationModule)(student(), network, loss(), optimizer=optimizer, **made)
            callbacks = [*(more() for more in ours_too), *callbacks]
        else:
            module = kind(written)(student(), (by_hand or loss)(), how == "hand", optimizer, dtype)
        return Run(
            compiles(module) if how == "ours" else module, callbacks, batches and batches(), dict(settings or {})
        )

    return Cell(name, "module", build, limit, train, slow)


CELLS = [
    # steps
    cell("a classifier"),
    cell("dropout and batch norm", partial(Net, 0.5, True)),
    cell(
        "metric learning with a miner",
        written=Metric,
        task_loss=losses.TripletMarginLoss,
        miner=miners.BatchHardMiner,
        task_reads="embedding",
        weight=2,
        task_weight=0.5,
    ),
    cell("batches are mappings", written=Mapped, batches=mappings, inputs="x", labels="y"),
    cell("a batch transform", written=Doubled, batch_transform=doubled),
    cell("an in-place operation after the layer", WritesOver),
    cell("two passes in a step", TwoPasses, written=Views, input_layer="backbone"),
    cell("activation checkpointing, not reentrant", lambda: users.recomputes(Net())),
    cell("activation checkpointing, reentrant, the layer around it", lambda: users.recomputes_reentrantly(Net())),
    # losses
    cell(
        "losses at two layers",
        loss=lambda: 2 * RKD().at("low") + RKD().at("high"),
        by_hand=RKD,
        written=Layers,
        **LAYERS,
    ),
    cell(
        "several losses, weights of the epoch, a scheduler",
        loss=lambda: 25 * RKDDistance() + 50 * RKDAngle(),
        by_hand=RKD,
        written=Epochs,
        weight=lambda epoch: 1.0 + epoch,
        lr_scheduler=halves,
        settings={"max_epochs": 2},
    ),
    cell("a loss with parameters", loss=toys.Projected, by_hand=partial(toys.Projected, 5, 7)),
    cell(
        "a loss with a memory",
        loss=toys.Remembers,
        by_hand=partial(toys.Remembers, 7, 40),
        batches=indexed,
        indices=2,
    ),
    # the trainer
    cell("accumulation", settings={"accumulate_grad_batches": 2}),
    cell("clipping by norm", settings={"gradient_clip_val": 0.05}),
    cell("clipping by value", settings={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    cell("bf16-mixed", settings={"precision": "bf16-mixed"}),
    cell("bf16-true", settings={"precision": "bf16-true"}),
    cell("64-true", settings={"precision": "64-true"}),
    cell("fp16 with a scaler, clipping", settings={"plugins": scaler, "gradient_clip_val": 0.05}),
    cell("fp16 with a scaler, accumulation", settings={"plugins": scaler, "accumulate_grad_batches": 2}),
    cell("LBFGS with strong_wolfe", optimizer=strong_wolfe, limit=ALMOST),
    cell(
        "stochastic weight averaging",
        partial(Net, norm=True),
        others=(partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),),
        settings=THREE_EPOCHS,
    ),
    cell(
        "stochastic weight averaging, a loss with parameters",
        loss=partial(toys.Projected, 5, 7),
        others=(partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),),
        settings=THREE_EPOCHS,
    ),
    cell("averaged weights", others=(WeightAveraging,)),
    cell("exponentially averaged weights", others=(partial(EMAWeightAveraging, decay=0.5),)),
    cell(
        "averaged weights, a loss with parameters",
        loss=partial(toys.Projected, 5, 7),
        others=(WeightAveraging,),
    ),
    cell("learning rate finder", kind=tuned, others=(RATES,), settings={"max_epochs": 5}),
    cell(
        "learning rate finder, a loss with a memory",
        loss=partial(toys.Remembers, 7, 40),
        kind=tuned,
        others=(RATES,),
        batches=indexed,
        settings={"max_epochs": 5},
        indices=2,
    ),
    cell("batch size finder", kind=tuned, others=(TRIALS,), batches=None),
    cell("manual optimisation in a subclass", kind=manual, limit=ALMOST),
    cell(
        "RelationalDistillation on top",
        loss=RKDDistance,
        by_hand=partial(RKD, 1, 1),
        ours_too=(partial(second, "student.backbone"),),
        limit=ALMOST,
    ),
    cell("fit twice", train=twice),
    cell("a second fit after an exception in a step", FailsOnce, train=after_an_exception),
    cell("a deep copy made while attached", train=partial(copied, copy.deepcopy)),
    cell("a pickle made while attached", train=partial(copied, by_pickle)),
    # compilers
    cell("a compiled student", compiles=compiled("eager", "student"), limit=ALMOST, slow=True),
    cell("a compiled teacher", teacher=compiled("eager"), limit=ALMOST, slow=True),
    cell("a compiled module", compiles=compiled("eager"), limit=ALMOST, slow=True),
    cell("a student compiled by inductor", compiles=compiled("inductor", "student"), limit=ALMOST, slow=True),
    cell("a module compiled by inductor", compiles=compiled("inductor"), limit=ALMOST, slow=True),
]
