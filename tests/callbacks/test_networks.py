"""Networks of many kinds: the callback trains them as the loss written by hand does."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_rkd import Tap, Teacher, cls_token, global_pool, mean_pool
from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.losses.rkd import RKD
from tests.harness import toys

N = 6


class Net(nn.Module):
    """Features and what stands behind them."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x))


class LastState(nn.Module):
    """The last state of a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.rnn = kind(3, width, batch_first=True)

    def forward(self, x: Any) -> Tensor:
        _, state = self.rnn(x)
        return (state[0] if isinstance(state, tuple) else state)[-1]


class Packed(LastState):
    """The same for sequences of several lengths."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % 4 + 2
        return super().forward(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))


class Graph(nn.Module):
    """Convolutions on graphs with dense adjacency, which the first columns hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        edges, nodes = x[..., :4].softmax(2), x[..., 4:]
        return (edges @ self.second((edges @ self.first(nodes)).relu())).mean(1)


class Checkpointed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Tokens(nn.Module):
    """A transformer over a class token and the rows of a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(3, width), nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], 1))


def mean_over_time(output: Tensor, arguments: Any) -> Tensor:
    return output.mean(2)


def conv(kind: Callable[..., nn.Module], channels: int) -> Callable[[int], nn.Module]:
    return lambda width: nn.Sequential(kind(channels, width, 3, padding=1), nn.ReLU(), kind(width, width, 3, padding=1))


@dataclass(frozen=True)
class Kind:
    """A network of a width, the shape of an input, what is read of its features, and the head behind them."""

    features: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    read: Callable[[Any, Any], Tensor] | None = None
    head: Callable[[int], nn.Module] = lambda width: nn.Linear(width, 3)
    integers: bool = False


def pooled(dims: tuple[int, ...]) -> Callable[[int], nn.Module]:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dims)

    return lambda width: nn.Sequential(Mean(), nn.Linear(width, 3))


class Decoder(nn.Module):
    """Rows of logits for the first class token of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(x[:, 0])


KINDS = {
    "perceptron on tables": Kind(lambda w: nn.Sequential(nn.Linear(8, w), nn.Tanh()), (8,)),
    "LSTM": Kind(lambda w: LastState(nn.LSTM, w), (5, 3)),
    "GRU on packed sequences": Kind(lambda w: Packed(nn.GRU, w), (5, 3)),
    "1-D convolutions on audio": Kind(conv(nn.Conv1d, 2), (2, 20), mean_over_time, pooled((2,))),
    "3-D convolutions on video": Kind(conv(nn.Conv3d, 1), (1, 3, 4, 4), global_pool, pooled((2, 3, 4))),
    "feature maps, pooled for the relation": Kind(conv(nn.Conv2d, 3), (3, 6, 6), global_pool, pooled((2, 3))),
    "transformer, class token": Kind(Tokens, (4, 3), cls_token, Decoder),
    "transformer, mean of tokens": Kind(Tokens, (4, 3), mean_pool, Decoder),
    "bag of words": Kind(lambda w: nn.EmbeddingBag(20, w), (7,), integers=True),
    "network on graphs": Kind(Graph, (4, 7)),
    "depthwise and grouped convolutions": Kind(
        lambda w: nn.Sequential(nn.Conv2d(4, 4 * w, 3, groups=4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (4, 6, 6),
        head=lambda w: nn.Linear(4 * w, 3),
    ),
    "group normalisation": Kind(
        lambda w: nn.Sequential(nn.Conv2d(3, w, 3), nn.GroupNorm(2, w), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (3, 6, 6),
    ),
    "batch normalisation": Kind(
        lambda w: nn.Sequential(nn.Conv2d(3, w, 3), nn.BatchNorm2d(w), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (3, 6, 6),
    ),
    "weight and spectral normalisation": Kind(
        lambda w: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(8, w)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(w, w)),
        ),
        (8,),
    ),
    "activation checkpointing inside the layer": Kind(Checkpointed, (8,)),
    "linear bottleneck": Kind(lambda w: nn.Linear(8, w), (8,), head=lambda w: nn.Linear(w, 3)),
}


def build(kind: Kind, width: int) -> Net:
    torch.manual_seed(width)
    return Net(kind.features(width), kind.head(width))


def batches(kind: Kind) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    x = torch.randint(20, (4, N, *kind.shape)) if kind.integers else torch.randn(4, N, *kind.shape)
    return [*zip(x, torch.randint(3, (4, N)), strict=True)]


class User(pl.LightningModule):
    """Somebody's classifier, with the loss by hand where there is a teacher."""

    def __init__(self, kind: Kind, teacher: Net | None = None) -> None:
        super().__init__()
        self.kind, self.net, self.by_hand = kind, build(kind, 4), [teacher]

    def relation(self, features: Tensor, x: Tensor) -> Any:
        (teacher,) = self.by_hand
        if teacher is None:
            return 0
        read = self.kind.read or (lambda output, arguments: output)
        with torch.no_grad():
            target = read(teacher.features(x), {})
        return RKD()(read(features, {}), target)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        features = self.net.features(x)
        return F.cross_entropy(self.net.head(features), y) + self.relation(features, x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def train(module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, **settings: Any) -> pl.LightningModule:
    torch.manual_seed(5)
    toys.fit(module, *callbacks, batches=data, **settings)
    return module


def attach(teacher: Net, kind: Kind, **settings: Any) -> RelationalDistillation:
    read = {} if kind.read is None else {"read": kind.read}
    layers = {"student_layer": Tap("net.features", **read), "teacher_layer": Tap("features", **read)}
    return RelationalDistillation(Teacher(teacher), RKD(), **layers | settings)


@pytest.mark.scenario("networks", "")
@pytest.mark.parametrize("name", KINDS)
def test_a_network_trains_as_with_the_loss_by_hand(name: str, difference: Callable[..., None]) -> None:
    kind = KINDS[name]
    teacher, data = build(kind, 8).eval(), batches(kind)
    ours = train(User(kind), attach(copy.deepcopy(teacher), kind), data=data)
    hand, alone = train(User(kind, teacher), data=data), train(User(kind), data=data)
    difference(toys.gap(ours, hand), limit=0.0)
    assert toys.gap(alone, hand) > 1e-5, "the loss changes the training"


# modules and loops of many kinds


class Towers(User):
    """Images and texts in two towers with a contrastive task; the tower of images is distilled."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.text = nn.EmbeddingBag(20, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        features, texts = self.net.features(x), self.text(torch.arange(N)[:, None])
        return F.cross_entropy(features @ texts.T, torch.arange(N)) + self.relation(features, x)


class Crops(User):
    """Large and small crops in a call for each size; the large ones pass through a module of their own name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.large = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        large, small = torch.cat([x, x.flip(2)]), torch.cat([x, x.roll(1, 2)])[..., :4]
        features = self.large(self.net.features(large))
        task = F.cross_entropy(self.net.head(features), y.repeat(2))
        return task + self.net.head(self.net.features(small)).square().mean() + self.relation(features, large)


class LargeCrops(RelationalDistillation):
    """The teacher is given the crops that the student's layer is."""

    def unpack(self, batch: Any) -> Any:
        x, y = batch
        return super().unpack((torch.cat([x, x.flip(2)]), y.repeat(2)))


class Adversarial(User):
    """A generator and a discriminator with an optimizer each; the discriminator's features are distilled."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.generator = nn.Linear(2, 8)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()  # type: ignore[misc]
        made = self.generator(x[:, :2])
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward(self.net.head(self.generator(x[:, :2]).tanh()[:, :4])[:, 0].mean())
        second.step()
        self.untoggle_optimizer(second)
        first.zero_grad()
        features = self.net.features(x)
        wrong = F.cross_entropy(self.net.head(made.detach()[:, :4]), y)
        self.manual_backward(F.cross_entropy(self.net.head(features), y) + wrong + self.relation(features, x))
        first.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.02) for part in (self.net, self.generator)]


class Triplets(User):
    """Anchor, positive and negative in one batch, a triplet loss as task."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        features = self.net.features(x)
        return F.triplet_margin_loss(*features.chunk(3)) + self.relation(features, x)


class ParameterGroups(User):
    """Rates of their own for features and head, and a schedule of every step."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.features.parameters(), "lr": 0.01}, {"params": self.net.head.parameters()}]
        optimizer = torch.optim.AdamW(groups, 0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=4)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Frozen(User):
    """A pretrained trunk of which only the last layer and the head learn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net.features[0].requires_grad_(False)  # type: ignore[index]


class Selects(User):
    """A pass under ``no_grad``, on other rows, says which samples are hard."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        with torch.no_grad():
            hard = self.net.features(x.flip(0)).norm(dim=1).flip(0)
        features = self.net.features(x)
        task = F.cross_entropy(self.net.head(features), y, reduction="none")
        return (hard * task).mean() + self.relation(features, x)


class Attacked(User):
    """An attack by the gradient of a first pass, which is not to be compared."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        ours = [one.distiller for one in callbacks if isinstance(one, RelationalDistillation)]
        with ours[0].paused() if ours else nullcontext():
            own = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.net.head(self.net.features(own)), y), own)
        x = x + 0.1 * gradient.sign()
        features = self.net.features(x)
        return F.cross_entropy(self.net.head(features), y) + self.relation(features, x)


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimisation: each step takes the gradient at weights moved by a first one."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        closure()
        moved = [(p, 0.05 * p.grad.sign()) for group in self.param_groups for p in group["params"]]
        for p, change in moved:
            p.data.add_(change)
        loss = closure()
        for p, change in moved:
            p.data.sub_(change)
        super().step()
        return loss


class SharpnessAware(User):
    def configure_optimizers(self) -> Any:
        return Sharpness(self.parameters(), 0.02)


class ChangedOnTheDevice(User):
    """Augmentation in Lightning's hook after the transfer."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


class Thawed(User):
    """Features that are frozen in the first epoch."""

    def on_train_epoch_start(self) -> None:
        self.net.features.requires_grad_(self.current_epoch > 0)


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


TABLE = Kind(lambda w: nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, w)), (8,))
IMAGES = Kind(lambda w: nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 6, 6))
MODULES: dict[str, tuple[type[User], Kind, dict[str, Any]]] = {
    "towers of images and texts": (Towers, IMAGES, {}),
    "adversarial training with two optimizers": (Adversarial, TABLE, {}),
    "triplets in one batch": (Triplets, TABLE, {}),
    "parameter groups and a schedule of steps": (ParameterGroups, TABLE, {}),
    "a trunk that is partly frozen": (Frozen, TABLE, {}),
    "accumulated batches": (User, TABLE, {"accumulate_grad_batches": 2}),
    "clipped gradients": (User, TABLE, {"gradient_clip_val": 0.1}),
    "iterable data without a length": (User, TABLE, {"data": lambda rows: DataLoader(Stream(rows), batch_size=None)}),
    "three epochs": (User, TABLE, {"max_epochs": 3}),
    "float64": (User, TABLE, {"precision": "64-true"}),
    "overfitted batches": (User, TABLE, {"overfit_batches": 2, "max_epochs": 2}),
    "anomaly detection": (User, TABLE, {"detect_anomaly": True}),
    "samples selected by a pass under no_grad": (Selects, TABLE, {}),
    "adversarial samples made in the step": (Attacked, TABLE, {"given": {"input_layer": "net.features"}}),
    "sharpness-aware steps": (SharpnessAware, TABLE, {}),
    "augmentation after the transfer": (ChangedOnTheDevice, TABLE, {}),
    "features frozen in the first epoch": (Thawed, TABLE, {"max_epochs": 2, "given": {"weight": float}}),
}


@pytest.mark.scenario("loops", "")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_trains_as_with_the_loss_by_hand(name: str, difference: Callable[..., None]) -> None:
    user, kind, settings = MODULES[name]
    settings = {**settings}
    teacher, data = build(kind, 8).eval(), settings.pop("data", list)(batches(kind))
    if settings.get("precision") == "64-true":
        teacher.double()
    given = {"manual_backward_index": 1} if user is Adversarial else settings.pop("given", {})
    ours = train(user(kind), attach(copy.deepcopy(teacher), kind, **given), data=data, **settings)
    hand, alone = train(user(kind, teacher), data=data, **settings), train(user(kind), data=data, **settings)
    difference(toys.gap(ours, hand), limit=1e-6 if user is Adversarial else 0.0)
    assert toys.gap(alone, hand) > 1e-6, "the loss changes the training"


@pytest.mark.scenario("loops", "crops of two sizes, of which the large ones are distilled")
def test_crops_of_two_sizes_are_told_apart_by_the_layer(difference: Callable[..., None]) -> None:
    teacher, data = build(IMAGES, 8).eval(), batches(IMAGES)
    layers = {"student_layer": "large", "teacher_layer": "features"}
    ours = train(Crops(IMAGES), LargeCrops(Teacher(copy.deepcopy(teacher)), RKD(), **layers), data=data)
    hand, alone = train(Crops(IMAGES, teacher), data=data), train(Crops(IMAGES), data=data)
    difference(toys.gap(ours, hand), limit=0.0)
    assert toys.gap(alone, hand) > 1e-5
