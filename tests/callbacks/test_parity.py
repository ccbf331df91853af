"""The gradient of the callback is that of the same loss written by hand into ``training_step``."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.module import DistillationModule
from lightning_rkd.taps import Tap
from tests import toys

pytestmark = pytest.mark.usefixtures("one_thread")


class ByHand:
    """What a user would write: ``loss(embedding, teacher(x))``, the teacher in eval mode and without gradient."""

    def __init__(self, loss: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.loss, self.teacher = loss or RKD(), toys.teacher(dropout=0.5, norm=True).to(dtype).eval()

    def __call__(self, embedding: Tensor, *x: Tensor) -> Tensor:
        with torch.no_grad():
            shown = torch.cat([self.teacher(view) for view in x])
        value: Tensor = self.loss(embedding, shown)
        return value


def attached(loss: Any = None, **kwargs: Any) -> RelationalDistillation:
    # the teacher comes in train() mode, with dropout and batch norm
    return RelationalDistillation(
        toys.teacher(dropout=0.5, norm=True).train(), loss or RKD(), **{"student_layer": "backbone", **kwargs}
    )


class ReturnsDict(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "other": 1}


class BatchOnly(toys.Student):
    def training_step(self, batch: Any) -> Any:
        return self.loss(*batch)


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


class Skips(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def cpu_scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


CASES: dict[str, tuple[type[toys.Student], dict[str, Any]]] = {
    "tensor": (toys.Student, {}),
    "dict": (ReturnsDict, {}),
    "batch only": (BatchOnly, {}),
    "skipped step": (Skips, {}),
    "written over": (WritesOver, {}),
    "accumulate": (toys.Student, {"accumulate_grad_batches": 2}),
    "clip": (toys.Student, {"gradient_clip_val": 0.05}),
    "bf16-mixed": (toys.Student, {"precision": "bf16-mixed"}),
    "bf16-true": (toys.Student, {"precision": "bf16-true"}),
    "64-true": (toys.Student, {"precision": "64-true"}),
    "fp16 scaler": (toys.Student, {"plugins": cpu_scaler, "accumulate_grad_batches": 2}),
}
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_callback_trains_as_the_loss_written_by_hand_bit_for_bit(case: str) -> None:
    kind, settings = CASES[case]

    def train(module: toys.Student, *callbacks: pl.Callback) -> toys.Student:
        toys.fit(module, *callbacks, **{k: v() if callable(v) else v for k, v in settings.items()})
        return module

    expected = train(kind(ByHand(dtype=DTYPES.get(case, torch.float32))))
    assert toys.gap(train(kind(), attached()), expected) == 0.0
    assert toys.gap(train(kind()), expected) > 1e-3, "the loss does nothing here, so the test would prove nothing"


def test_two_views_through_input_layer_equal_the_joint_relation_written_by_hand() -> None:
    expected, module = TwoViews(ByHand()), TwoViews()
    toys.fit(expected)
    toys.fit(module, attached(input_layer="backbone"))
    assert toys.gap(module, expected) == 0.0


def test_lbfgs_with_line_search_sees_the_true_objective() -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=2, line_search_fn="strong_wolfe")

    expected, module, without = toys.Student(ByHand(), lbfgs), toys.Student(None, lbfgs), toys.Student(None, lbfgs)
    toys.fit(expected)
    toys.fit(module, attached())
    toys.fit(without)
    assert toys.gap(module, expected) <= 1e-6
    assert toys.gap(without, expected) > 1e-3


def test_a_sum_of_weighted_losses_and_weights_of_the_epoch_follow_the_formula() -> None:
    class Written(toys.Student):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            embedding = self.backbone(x)
            task = F.cross_entropy(self.head(F.relu(embedding)), y)
            with torch.no_grad():
                shown = hand.teacher(x)
            w, w_task = 1.0 + self.current_epoch, 0.5 - 0.25 * self.current_epoch
            return w_task * task + w * (25 * RKDDistance()(embedding, shown)) + w * (50 * RKDAngle()(embedding, shown))

    hand = ByHand()
    expected, module = Written(), toys.Student()
    toys.fit(expected, max_epochs=2)
    callback = attached(
        25 * RKDDistance() + 50 * RKDAngle(), weight=lambda e: 1.0 + e, task_weight=lambda e: 0.5 - 0.25 * e
    )
    toys.fit(module, callback, max_epochs=2)
    assert toys.gap(module, expected) <= 1e-6


def test_two_stacked_callbacks_add_up() -> None:
    def both(embedding: Tensor, x: Tensor) -> Tensor:
        return ByHand(RKDDistance())(embedding, x) + ByHand(RKDAngle())(embedding, x)

    expected, module = toys.Student(both), toys.Student()
    toys.fit(expected)
    toys.fit(module, attached(RKDDistance()), attached(RKDAngle()))
    assert toys.gap(module, expected) <= 1e-6
    assert toys.attachments(module) == []


def test_weight_zero_leaves_the_users_training_bit_identical() -> None:
    plain, module = toys.Student(dropout=0.5, norm=True), toys.Student(dropout=0.5, norm=True)
    for each, callbacks in ((plain, ()), (module, (attached(weight=0.0),))):
        torch.manual_seed(1)
        toys.fit(each, *callbacks)
    assert toys.gap(module, plain) == 0.0


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


@pytest.mark.parametrize(
    ("kind", "index", "precision"),
    [
        (toys.Manual, None, "32-true"),
        (toys.Manual, None, "bf16-mixed"),
        (TwoBackwards, 0, "32-true"),
        (Later, 1, "32-true"),
        (Closure, None, "32-true"),
    ],
)
def test_manual_optimisation_equals_the_loss_written_by_hand(kind: Any, index: int | None, precision: Any) -> None:
    expected, module = kind(ByHand()), kind()
    toys.fit(expected, precision=precision)
    toys.fit(module, attached(manual_backward_index=index), precision=precision)
    assert toys.gap(module, expected) <= 1e-6
    assert toys.attachments(module) == []


class Recomputes(toys.Backbone):
    def forward(self, x: Tensor) -> Tensor:
        shown: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return shown


@pytest.mark.parametrize(("kind", "index"), [(toys.Student, None), (toys.Manual, None), (Later, 1)])
def test_what_checkpointing_runs_again_in_backward_is_not_a_second_call(kind: Any, index: int | None) -> None:
    modules = [kind(ByHand()), kind()]
    for module in modules:
        module.backbone.__class__ = Recomputes
    layer = Tap("backbone.last", at="output")
    toys.fit(modules[0])
    toys.fit(modules[1], attached(student_layer=layer, manual_backward_index=index))
    assert toys.gap(*modules) <= 1e-6


@pytest.mark.slow
def test_a_compiled_module_trains_as_the_loss_written_by_hand() -> None:
    torch._dynamo.reset()
    expected, module = toys.Student(ByHand()), toys.Student()
    toys.fit(expected)
    compiled: Any = torch.compile(module, backend="eager")
    toys.fit(compiled, attached())
    assert toys.gap(module, expected) <= 1e-6
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning")
def test_the_module_and_the_callback_train_alike() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            user = toys.Student()
            self.backbone, self.head = user.backbone, user.head

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.backbone(x))
            return logits

    class User(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.student(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    user, teacher = User(), toys.teacher()
    module = DistillationModule(
        Net(),
        copy.deepcopy(teacher),
        RKD(),
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        student_layer="backbone",
        optimizer=sgd,
    )
    toys.fit(user, RelationalDistillation(teacher, RKD(), student_layer="student.backbone"))
    toys.fit(module)
    assert toys.gap(module.student, user.student) == 0.0
