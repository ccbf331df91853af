"""Modules as users write them: each step a way of its own, with a place where a loss may be written in by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from tests.harness import toys


class ByHand:
    """What a user would write: ``loss(embedding, teacher(x))``, the teacher in eval mode and without gradient."""

    def __init__(self, loss: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.loss, self.teacher = loss or RKD(), toys.teacher(dropout=0.5, norm=True).to(dtype).eval()

    def __call__(self, embedding: Tensor, *x: Tensor, **context: Any) -> Tensor:
        with torch.no_grad():
            shown = torch.cat([self.teacher(view) for view in x])
        value: Tensor = self.loss(embedding, shown, **context)
        return value


def asked(loss: Any, indices: list[Tensor]) -> dict[str, Any]:
    """The indices of the rows, for a loss that asks for them."""
    return {"indices": indices[0]} if "indices" in loss.needs else {}


# Automatic optimisation


class ReturnsDict(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "other": 1}


class BatchOnly(toys.Student):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(*batch)


class Skips(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class Draws(toys.Student):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self.loss(*batch)


class Mapped(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["x"], batch["y"])


class WritesOver(toys.Student):
    """What the layer returned is overwritten in place."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        kept = embedding.clone()
        loss = F.cross_entropy(self.head(F.relu_(embedding)), y)
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(kept, x)


class TwoViews(toys.Student):
    """Augments inside the step; both views are one joint relation."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        views = [x + 0.1, x.flip(1)]
        a, b = (self.backbone(v) for v in views)
        loss = F.cross_entropy(self.head(a), y) + F.mse_loss(a, b)
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(torch.cat([a, b]), *views)


class Penalty(toys.Student):
    """Takes a gradient inside the step, which shall be that of its own loss."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y)
        (gradient,) = torch.autograd.grad(loss, self.head.weight, create_graph=True)
        loss = loss + gradient.square().sum()
        (by_hand,) = self.by_hand
        return loss if by_hand is None else loss + by_hand(embedding, x)


class Weighted(toys.Student):
    """Task and relations weighted by the epoch."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), embedding = self.by_hand, self.backbone(x)
        task = F.cross_entropy(self.head(embedding), y)
        if by_hand is None:
            return task
        with torch.no_grad():
            shown = by_hand.teacher(x)
        epoch = self.current_epoch
        relations = 25 * RKDDistance()(embedding, shown), 50 * RKDAngle()(embedding, shown)
        return (0.5 - 0.25 * epoch) * task + (1.0 + epoch) * (relations[0] + relations[1])


class TwoTaps(toys.Student):
    """Two layers are read, one of which the next layer overwrites."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        (by_hand,), net = self.by_hand, self.backbone
        if by_hand is None:
            return super().loss(x, y)
        low = net.first(x)
        embedding = net.last(net.act(low.clone()))
        with torch.no_grad():
            low_t = by_hand.teacher.first(x)
        task = F.cross_entropy(self.head(F.relu(embedding)), y)
        return task + 2 * RKD()(low, low_t) + by_hand(embedding, x)


class WithTensors(toys.Student):
    """A loss with tensors of its own is part of the module; its batches hold indices."""

    def __init__(self, by_hand: ByHand | None = None, **settings: Any) -> None:
        super().__init__(by_hand, **settings)
        self.own = None if by_hand is None else by_hand.loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x, y, *indices), (by_hand,) = batch, self.by_hand
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y)
        if by_hand is None:
            return loss
        return loss + by_hand(embedding, x, **asked(by_hand.loss, indices))


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
    """What Lightning's finders change."""

    lr, batch_size = 0.1, 8

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return toys.loader(batch_size=self.batch_size)


class TunedWithTensors(WithTensors, Tuned):
    """Both."""

    def train_dataloader(self) -> Any:
        rows = toys.Rows(8 * toys.STEPS)
        return DataLoader(TensorDataset(rows.x, rows.y, torch.arange(len(rows))), self.batch_size)


# Manual optimisation


class ManualDraws(toys.Manual):
    def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        super().training_step(batch, 0)


class ManualSteps(toys.Manual):
    """Accumulates two batches and clips, both by its own hand."""

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


class ManualViews(toys.Manual):
    loss = TwoViews.loss


class TwoBackwards(toys.Manual):
    """A step of two losses; ``receives`` is the number of the one the term is written into."""

    receives = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (by_hand,), optimizer = batch, self.by_hand, self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        embedding = self.backbone(x)
        losses = [F.cross_entropy(self.head(embedding), y), self.head.weight.square().sum()]
        if by_hand is not None:
            losses[self.receives] = losses[self.receives] + by_hand(embedding, x)
        for number, loss in enumerate(losses):
            self.manual_backward(loss, retain_graph=number == 0)
        optimizer.step()  # type: ignore[union-attr]


class Later(TwoBackwards):
    receives = 1


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.critic = nn.Linear(5, 1)

    def configure_optimizers(self) -> Any:
        own = [p for name, p in self.named_parameters() if not name.startswith("critic")]
        return toys.sgd(own), toys.sgd(self.critic.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for player in (self.network_step, self.critic_step):
            player(*batch)

    def network_step(self, x: Tensor, y: Tensor) -> None:
        (by_hand,), optimizer = self.by_hand, self.optimizers()[0]  # type: ignore[index]
        self.toggle_optimizer(optimizer)
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y) + F.softplus(-self.critic(embedding)).mean()
        self.update(optimizer, loss if by_hand is None else loss + by_hand(embedding, x))

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


class CriticFirst(Adversarial):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for player in (self.critic_step, self.network_step):
            player(*batch)


class ThreeOptimizers(Adversarial):
    """One more, for the head."""

    def configure_optimizers(self) -> Any:
        return [toys.sgd(part.parameters()) for part in (self.backbone, self.critic, self.head)]

    def network_step(self, x: Tensor, y: Tensor) -> None:
        (by_hand,), both = self.by_hand, self.optimizers()[::2]  # type: ignore[index]
        embedding = self.backbone(x)
        loss = F.cross_entropy(self.head(embedding), y) + F.softplus(-self.critic(embedding)).mean()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss if by_hand is None else loss + by_hand(embedding, x))
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


# Changes to a module that has been made


class Recomputes(toys.Backbone):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        with set_checkpoint_early_stop(False):  # else the last layer would not run again to its end
            shown: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return shown


class RecomputesReentrantly(Recomputes):
    reentrant = True


def recomputes(module: Any) -> Any:
    """Activation checkpointing inside the backbone."""
    module.backbone.__class__ = Recomputes
    return module


def recomputes_reentrantly(module: Any) -> Any:
    module.backbone.__class__ = RecomputesReentrantly
    return module
