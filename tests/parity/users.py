"""Modules as users write them: each step a way of its own, with a place where a loss may be written in by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_rkd.distillation.micro_batches import MicroBatches
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys
from tests.harness.faces import Net


class ByHand:
    """A loss as a user writes it: ``loss(embedding, teacher(x))``, the teacher in eval mode and without gradient."""

    def __init__(self, loss: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.loss, self.teacher = loss or RKD(), toys.teacher(dropout=0.5, norm=True).to(dtype).eval()

    def targets(self, *x: Tensor) -> Tensor:
        # view by view, as the student: some processors round a product of twice the rows differently
        with torch.no_grad():
            return torch.cat([self.teacher(view) for view in x])

    def __call__(self, embedding: Tensor, *x: Tensor, **context: Any) -> Tensor:
        value: Tensor = self.loss(embedding, self.targets(*x), **context)
        return value


def rkd(loss: Any, dtype: torch.dtype) -> ByHand:
    """RKD by hand, however ours is composed."""
    return ByHand(RKD(), dtype)


def two_relations(loss: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Two relations by hand, as two callbacks add them."""
    distances, angles = ByHand(RKDDistance()), ByHand(RKDAngle())
    return lambda embedding, x: distances(embedding, x) + angles(embedding, x)


class Everywhere(ByHand):
    """A global relation by hand on each rank: the rows of others as constants, so the gradient is a W-th of it."""

    def __call__(self, embedding: Tensor, *x: Tensor, **context: Any) -> Tensor:
        mine, ranks = (embedding.float(), self.targets(*x).float()), dist.get_world_size()
        every = [[torch.empty_like(rows) for _ in range(ranks)] for rows in mine]
        for rows, parts in zip(mine, every, strict=True):
            dist.all_gather(parts, rows.detach().contiguous())
        every[0][dist.get_rank()] = mine[0]
        value: Tensor = ranks * self.loss(*(torch.cat(parts) for parts in every))
        return value


def having(base: type[Any] = toys.Student, **members: Any) -> type[Any]:
    """The same class with other methods and attributes, and a name that configurations of other tests do not use."""
    return type(f"Changed{base.__name__}", (base,), members)


def step(training_step: Callable[..., Any], base: type[Any] = toys.Student) -> type[Any]:
    return having(base, training_step=training_step)


# Automatic optimisation


def double(batch: Batch) -> Batch:
    """The same as a batch transform."""
    return Batch(2 * batch.inputs, batch.labels)


class WritesOver(toys.Student):
    """The layer's output is overwritten in place."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        kept = embedding.clone()
        return self.plus(F.cross_entropy(self.head(F.relu_(embedding)), y), kept, x)


class TwoViews(toys.Student):
    """Augments inside the step; both views are one joint relation."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        views = [x + 0.1, x.flip(1)]
        a, b = (self.backbone(v) for v in views)
        return self.plus(F.cross_entropy(self.head(a), y) + F.mse_loss(a, b), torch.cat([a, b]), *views)


class TwoPasses(toys.Student):
    """Both passes through the backbone are one joint relation."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.backbone(x), self.backbone(x.flip(1))
        return self.plus(self.task(a + b, y), torch.cat([a, b]), x, x.flip(1))


class Penalty(toys.Student):
    """Takes a gradient inside the step, which shall be that of its own loss."""

    def task(self, embedding: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.head(embedding), y)
        (gradient,) = torch.autograd.grad(loss, self.head.weight, create_graph=True)
        return loss + gradient.square().sum()


class Weighted(toys.Student):
    """Task and relations weighted by the epoch."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        task = self.task(embedding, y)
        if by_hand is None:
            return task
        targets, epoch = by_hand.targets(x), self.current_epoch  # type: ignore[attr-defined]
        relations = 25 * RKDDistance()(embedding, targets) + 50 * RKDAngle()(embedding, targets)
        return (0.5 - 0.25 * epoch) * task + (1.0 + epoch) * relations


class Scheduled(Weighted):
    """With a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [halves(optimizer)]


def halves(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class TwoTaps(toys.Student):
    """Two layers are read, one of which the next layer overwrites."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), net = self.by_hand, self.backbone
        if by_hand is None:
            return super().loss(x, y)
        low = net.first(x)
        embedding = net.last(net.act(low.clone()))
        with torch.no_grad():
            low_t = by_hand.teacher.first(x)  # type: ignore[attr-defined]
        return self.task(embedding, y) + 2 * RKD()(low, low_t) + by_hand(embedding, x)


class Metric(toys.Student):
    """Learns a metric instead of classes, with a weight for each part."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        relation = 0 if by_hand is None else 2 * by_hand(embedding, x)  # first, as DistillationModule does
        task: Tensor = 0.5 * losses.TripletMarginLoss()(embedding, y, miners.BatchHardMiner()(embedding, y))
        return task + relation


class WithTensors(toys.Student):
    """A loss with tensors of its own is part of the module; its batches hold indices."""

    def __init__(self, by_hand: ByHand | None = None, **settings: Any) -> None:
        super().__init__(by_hand, **settings)
        self.own = None if by_hand is None else by_hand.loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, *indices = batch
        embedding = self.backbone(x)
        context = {"indices": indices[0]} if isinstance(self.own, toys.Remembers) else {}
        return self.plus(self.task(embedding, y), embedding, x, **context)


class FailsOnce(toys.Student):
    """The third step of its life fails, after the forward pass."""

    calls = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y)
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("the third step")
        return loss


class Tuned(toys.Student):
    """Values that Lightning's finders change."""

    lr, batch_size, indexed = 0.1, 8, False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return toys.loader(batch_size=self.batch_size, indexed=self.indexed)


class TunedWithTensors(WithTensors, Tuned):
    indexed = True


class OnlyDistilled(toys.Student):
    """Its backbone gets a gradient from the relations alone, and one layer gets none."""

    def __init__(self, by_hand: Any = None) -> None:
        super().__init__(by_hand)
        self.unused = nn.Linear(2, 2)

    def task(self, embedding: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(embedding.detach()), y)


class CountsRows(toys.Student):
    """Weighs its own loss by the rows of all ranks, which a callback leaves to the user."""

    def task(self, embedding: Tensor, y: Tensor) -> Tensor:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return F.cross_entropy(self.head(embedding), y, reduction="sum") * ranks / 16


def shard(module: Any) -> None:
    """A ``configure_model`` after which the parts of the student lie on both devices."""
    net = getattr(module, "student", module)
    for part in (net.backbone, net.head) if dist.is_initialized() else ():
        fully_shard(part, mesh=module.device_mesh["data_parallel"])


# Manual optimisation


class ManualSteps(toys.Manual):
    """Accumulates two batches and clips in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(*batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.05)
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        # the terms are added to what manual_backward is given, so the loss by hand is not divided
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y)
        return loss if by_hand is None else loss + 2 * by_hand(embedding, x)


class ManualOnlyDistilled(OnlyDistilled, toys.Manual):
    """Both."""


class TwoBackwards(toys.Manual):
    """A step of two losses; ``receives`` is the number of the one the term is written into."""

    receives = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), optimizer = batch, self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        embedding = self.backbone(x)
        losses = [F.cross_entropy(self.head(embedding), y), self.head.weight.square().sum()]
        losses[self.receives] = self.plus(losses[self.receives], embedding, x)
        for number, loss in enumerate(losses):
            self.manual_backward(loss, retain_graph=number == 0)
        optimizer.step()  # type: ignore[union-attr]


class Closure(toys.Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(*batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Adversarial(toys.Manual):
    """Two players with an optimizer each: the network fools a critic of its embeddings, which learns to tell them."""

    players = ("network_step", "critic_step")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.critic = nn.Linear(5, 1)

    def configure_optimizers(self) -> Any:
        own = [p for name, p in self.named_parameters() if not name.startswith("critic")]
        return toys.sgd(own), toys.sgd(self.critic.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for player in self.players:
            getattr(self, player)(*batch)

    def network_loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y) + F.softplus(-self.critic(embedding)).mean()
        return self.plus(loss, embedding, x)

    def network_step(self, x: Tensor, y: Tensor) -> None:
        optimizer = self.optimizers()[0]  # type: ignore[index]
        self.toggle_optimizer(optimizer)
        self.update(optimizer, self.network_loss(x, y))

    def critic_step(self, x: Tensor, y: Tensor) -> None:
        optimizer = self.optimizers()[1]  # type: ignore[index]
        self.toggle_optimizer(optimizer)
        made, real = self.backbone(x).detach(), torch.ones(len(x), 5, dtype=x.dtype)
        self.update(optimizer, (F.softplus(self.critic(made)) + F.softplus(-self.critic(real))).mean())

    def update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


class ThreeOptimizers(Adversarial):
    """One more, for the head."""

    def configure_optimizers(self) -> Any:
        return [toys.sgd(part.parameters()) for part in (self.backbone, self.critic, self.head)]

    def network_step(self, x: Tensor, y: Tensor) -> None:
        loss, both = self.network_loss(x, y), self.optimizers()[::2]  # type: ignore[index]
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in both:
            optimizer.step()


class CriticsOptimizerFirst(Adversarial):
    """The critic's optimizer comes before that of the network, which has two groups; the loss may have parameters."""

    def __init__(self, by_hand: ByHand | None = None) -> None:
        super().__init__(by_hand)
        self.own = None if by_hand is None else by_hand.loss

    def configure_optimizers(self) -> Any:
        embedding = [*self.backbone.parameters(), *([] if self.own is None else self.own.parameters())]
        groups = [{"params": self.head.parameters(), "lr": 0.02}, {"params": embedding}]
        return toys.sgd(self.critic.parameters()), toys.sgd(groups)

    def optimizers(self, *args: Any, **kwargs: Any) -> Any:
        return super().optimizers(*args, **kwargs)[::-1]  # type: ignore[index]


# Activation checkpointing and compilation


class Recomputes(toys.Backbone):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        with set_checkpoint_early_stop(False):  # else the last layer would not run again to its end
            out: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return out


class InParts(toys.Student):
    """Runs the backbone on three parts of the batch, whose activations it keeps."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = torch.cat([self.backbone(part) for part in x.tensor_split(3)])
        return self.plus(self.task(embedding, y), embedding, x)


def in_micro_batches(make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the same module, with a backbone that runs in micro-batches unless the loss is written by hand."""

    def changed(*by_hand: Any) -> Any:
        module = make(*by_hand)
        if not by_hand:
            module.backbone = MicroBatches(module.backbone, 3)
        return module

    return changed


def with_backbone(kind: type[nn.Module], make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the same module with another kind of backbone."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        module = make(*args, **kwargs)
        module.backbone.__class__ = kind
        return module

    return changed


def compiled(backend: str, student: bool = False) -> Callable[[Any], Any]:
    """Compiles a module, or only the student in it."""

    def change(module: Any) -> Any:
        torch.compiler.reset()
        if not student:
            return torch.compile(module, backend=backend)
        part = "student" if hasattr(module, "student") else "backbone"
        setattr(module, part, torch.compile(getattr(module, part), backend=backend))
        return module

    return change


# Networks for DistillationModule that do what the modules of these names do, and subclasses of it


WritesOverNet = having(Net, forward=lambda self, x: self.head(F.relu_(self.backbone(x))))
TwoPassesNet = having(Net, forward=lambda self, x: self.head(self.backbone(x) + self.backbone(x.flip(1))))


class FailsOnceNet(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("the third step")
        return super().forward(x)


class ManualModule(DistillationModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]


class TunedModule(DistillationModule):
    lr, batch_size, indexed = 0.1, 8, False
    configure_optimizers, train_dataloader = Tuned.configure_optimizers, Tuned.train_dataloader  # type: ignore[assignment]

    def val_dataloader(self) -> Any:
        return toys.loader(indexed=True)  # the batch size finder wants one of any module with a validation_step
