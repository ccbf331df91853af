"""Gradients of terms in units of the task's: balanced weights, the comparison soon after the start, and its warning."""

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, DistillationModule, RelationalDistillation, RKDAngle, RKDDistance, Tap
from lightning_rkd.distillation.distiller import BoundLoss
from lightning_rkd.distillation.gradient_balance import GradientBalance, WeightWarning, measure_norms
from lightning_rkd.distillation.lightning import has_local_backward, refuse_balance
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.losses import AttentionTransfer
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import terms_of
from lightning_rkd.utils.types import Batch, Outputs
from tests.callbacks.test_ddp import batches
from tests.harness import toys
from tests.harness.faces import FACES, gradients, largest, taught
from tests.harness.ranks import Ranks

both_faces = pytest.mark.parametrize("face", FACES)


def measure(x: Tensor, task: Tensor, loss: RelationalLoss, **settings: Any) -> tuple[Tensor, Any]:
    """A term about embeddings, and the norms of its gradient and the task's."""
    ((_, single),) = terms_of(loss).items()
    bound, term = BoundLoss.bind("term", single, [""], [""]), 3 * loss(x, torch.randn(len(x), 3))
    return term, measure_norms(term, task, bound, StepFeatures(Batch(x), {"": Outputs(embedding=x)}), **settings)


def test_what_was_pooled_for_the_loss_is_compared_at_the_layer_before() -> None:
    torch.manual_seed(0)
    maps = torch.randn(6, 4, 2, 2, requires_grad=True) + 0
    task = F.cross_entropy(maps.amax((2, 3)), torch.arange(6) % 4)
    term, norms = measure(maps.mean((2, 3)), task, RKD())
    for found, loss in zip(norms, (term, task), strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(loss, maps, retain_graph=True)[0].norm())


def test_maps_that_the_term_does_not_read_do_not_count() -> None:
    torch.manual_seed(0)
    read, other = (torch.randn(6, 4, 2, 2, requires_grad=True) + 0 for _ in range(2))
    task = read.square().mean() + 100 * other.square().mean()
    loss = AttentionTransfer(feature_maps=[0])
    bound = BoundLoss.bind("term", terms_of(loss)["attention_transfer"], [""], [""])
    term = loss([read, other], [torch.randn(6, 3, 2, 2)] * 2)
    features = StepFeatures(Batch(read), {"": Outputs(feature_maps=[read, other])})
    _, of_task = measure_norms(term, task, bound, features)
    torch.testing.assert_close(of_task, (read / 48).norm().detach(), msg="100 times that with the other map")


def test_a_term_whose_gradient_overflows_makes_the_scaler_step_back() -> None:
    x = torch.randn(4, 3, dtype=torch.float16, requires_grad=True)
    (of_term, _) = measure(x, x.float().sum(), RKDDistance(), scale=lambda loss: 1e8 * loss)[1]
    assert not of_term.isfinite()


# Balance


@both_faces
def test_balance_weighs_the_terms_of_a_run_and_logs_what_it_found(face: str) -> None:
    def fit(loss: Any, **settings: Any) -> tuple[pl.LightningModule, Any]:
        module, callbacks = taught(face, toys.teacher(), {"rkd": loss}, **settings)
        return module, toys.fit(module, *callbacks, max_steps=1, log_every_n_steps=1).callback_metrics

    ours, logged = fit(RKD(), balance=2.0, weight=0.5)
    assert {"balance/rkd", "distill/rkd"} <= set(logged)
    fixed, _ = fit(RKD(), weight=float(logged["balance/rkd"]))
    plain, _ = fit(RKD(), weight=0.5)
    assert toys.gap(ours, fixed) <= 1e-6, "the logged weight, written down, trains alike"
    assert toys.gap(ours, plain) > 1e-4


@both_faces
@pytest.mark.parametrize("loss", [RKD(), 3 * RKDDistance() + RKDAngle()], ids=["one term", "two terms"])
def test_both_faces_balance_alike(face: str, loss: Any) -> None:
    def by_hand() -> list[list[Tensor]]:
        """Two backward passes to the embedding, and their norms."""
        teacher, terms = toys.teacher(), terms_of(loss)

        class ByHand(toys.Student):
            relu = False

            def loss(self, x: Tensor, y: Tensor) -> Tensor:
                s = self.backbone(x)
                total = task = self.task(s, y)
                with torch.no_grad():
                    t = teacher.eval()(x)
                for term in terms.values():
                    value = term.loss(s, t)
                    norms = [torch.autograd.grad(one, s, retain_graph=True)[0].norm() for one in (task, value)]
                    total = total + 0.5 * term.weight * norms[0] / norms[1] * value
                return total

        return gradients(ByHand())

    module, callbacks = taught(face, toys.teacher(), loss, balance=0.5)
    assert largest(gradients(module, *callbacks), by_hand()) <= 1e-6


def test_balance_applies_to_the_chosen_manual_backward() -> None:
    automatic, manual = (kind() for kind in (toys.Student, toys.Manual))
    for module in (automatic, manual):
        toys.fit(module, RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone", balance=1.0))
    assert toys.gap(automatic, manual) <= 1e-6


def test_a_term_without_a_gradient_gets_no_weight() -> None:
    class Constant(RelationalLoss):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (0 * student).sum() + 1

    module, callbacks = taught("callback", toys.teacher(), Constant(), balance=1.0)
    assert float(toys.fit(module, *callbacks, log_every_n_steps=1).callback_metrics["balance/constant"]) == 0.0


class Apart(toys.Student):
    """Its task does not depend on the layer ``extra``."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 4)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(x)
        self.extra(embedding)
        return self.task(embedding, y)


def test_balance_refuses_a_layer_that_the_task_does_not_depend_on() -> None:
    callback = RelationalDistillation(toys.teacher(), RKD(), student_layer=Tap("extra", at="output"), balance=1.0)
    with pytest.raises(ValueError, match="the task loss does not depend on the layer that rkd reads"):
        toys.fit(Apart(), callback)


def test_balance_needs_a_task_and_a_ratio() -> None:
    with pytest.raises(ValueError, match=r"pass task_loss=\.\.\."):
        DistillationModule(toys.Backbone(), toys.teacher(), RKD(), balance=1.0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone", balance=-1)
    with pytest.raises(ValueError, match="'once', 'epoch', 'step' or None, got 'always'"):
        RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone", compare_gradients="always")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"an instance such as RKD\(\), .* got <class"):
        RelationalDistillation(toys.teacher(), RKD, student_layer="backbone")  # type: ignore[arg-type]


def test_balance_sees_gradients_that_half_precision_needs_its_scaler_for() -> None:
    def found(**settings: Any) -> float:
        small = {"weight": 1e-9, "task_weight": 1e-9, "task_loss": nn.CrossEntropyLoss(), "balance": 1.0}
        torch.manual_seed(0)
        ours = DistillationModule(toys.Backbone(), toys.teacher(), RKD(), optimizer=toys.sgd, **small)
        return float(toys.fit(ours, max_steps=1, **settings).callback_metrics["balance/rkd"])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    half = found(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert half == pytest.approx(found(), rel=0.05)


# The comparison

STEPS = 24


class Pictures(nn.Module):
    """A small convolutional network with batch norm, dropout and a pooled embedding."""

    def __init__(self, width: int = 8, inplace: bool = True) -> None:
        super().__init__()
        first = (nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.features = nn.Sequential(*first, nn.Conv2d(width, 2 * width, 3, 2), nn.ReLU(inplace))
        self.avgpool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.drop(self.avgpool(self.features(x)).flatten(1)))
        return logits


class Once(Pictures):
    """Operations between the layer and the logits that cannot be differentiated twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def classify(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled.flatten(1)).tanh() * 2  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.avgpool(self.features(x))
        if self.kind == "compiled behind the layer":
            return torch.compile(self.classify, backend="aot_eager")(pooled)  # type: ignore[no-any-return]
        return checkpoint(self.classify, pooled, use_reentrant=self.kind == "reentrant")  # type: ignore[no-any-return]


def pictures() -> DataLoader[Any]:
    """Ten classes of noisy colour images of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (16 * STEPS,), generator=generator)
    prototypes = torch.randn(10, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(prototypes[y] + 3 * torch.randn(len(y), 3, 16, 16, generator=generator), y), 16)


class Classifier(pl.LightningModule):
    def __init__(self, student: nn.Module | None = None, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = Pictures() if student is None else student
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.student(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Kept(DummyLogger):
    """Keeps the sum of ``gradient/<term>`` of every step that logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, float] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        if found := [value for name, value in metrics.items() if name.startswith("gradient/")]:
            self.found[step] = sum(found)


def classify(
    face: str, loss: Any, *, student: Any = None, manual: bool = False, fit: Any = None, **settings: Any
) -> tuple[pl.LightningModule, dict[int, float], list[str]]:
    """Train on pictures; returns the module, ``gradient/<term>`` by step, and the warnings about weights."""
    torch.manual_seed(1)
    teacher, kept = Pictures(16), Kept()
    if face == "callback":
        module: pl.LightningModule = Classifier(student, manual)
        layer = {"student_layer": "student.avgpool", "teacher_layer": "avgpool"}
        callbacks = [RelationalDistillation(teacher, loss, **{**layer, **settings})]
    else:
        torch.manual_seed(0)
        student = Pictures() if student is None else student
        task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits", "student_layer": "avgpool"}
        task |= {"teacher_layer": "avgpool", "optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)}
        module, callbacks = DistillationModule(student, teacher, loss, **{**task, **settings}), []
    torch.manual_seed(2)  # of the dropout
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightWarning)
        settings = {"batches": pictures(), "log_every_n_steps": 6, "logger": kept, **(fit or {})}
        toys.fit(module, *callbacks, **settings)
    return module, kept.found, [str(w.message) for w in caught if w.category is WeightWarning]


@both_faces
def test_published_weights_warn_on_a_short_run_and_small_ones_do_not(face: str) -> None:
    _, found, (message,) = classify(face, RKD(distance_weight=25, angle_weight=50))
    assert list(found) == [23], "once, at the end of the epoch"
    assert found[23] > 5
    assert "rkd: its gradient at the student's embedding is " in message
    assert "(step 11); weight=" in message
    assert " instead of 1 would make them equal" in message
    _, found, silent = classify(face, RKD(distance_weight=1, angle_weight=2))
    assert 1 / 50 < found[23] < 5
    assert silent == []


def test_the_weight_of_the_warning_makes_the_gradients_equal() -> None:
    (message,) = classify("callback", 25 * RKDDistance(), fit={"max_steps": 12})[2]
    weight = float(message.split("a weight of ")[1].split()[0])
    assert "instead of 25 would" in message
    _, found, silent = classify("callback", {"rkd": RKDDistance()}, weight=1e-9, fit={"max_steps": 12})
    assert found[11] < 1 / 50
    assert "weight=" in silent[0], "a term that does nothing is reported too"
    assert 0 < weight < 25


@both_faces
@pytest.mark.parametrize("fit", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_comparing_leaves_training_bit_identical(face: str, fit: Any) -> None:
    ours, found, _ = classify(face, RKD(), compare_gradients="step", fit={"log_every_n_steps": 1, **fit})
    state = torch.get_rng_state()
    plain, none, _ = classify(face, RKD(), compare_gradients=None, fit={"log_every_n_steps": 1, **fit})
    assert len(found) >= STEPS / 2
    assert none == {}
    assert toys.gap(ours, plain) == 0.0, "parameters, running means and the random numbers of dropout"
    assert torch.equal(state, torch.get_rng_state())


def test_comparing_with_manual_optimisation_is_the_same() -> None:
    ours, found, _ = classify("callback", RKD(), manual=True, compare_gradients="step", fit={"log_every_n_steps": 1})
    plain, same, _ = classify("callback", RKD(), compare_gradients="step", fit={"log_every_n_steps": 1})
    assert found == pytest.approx(same, rel=1e-3)
    assert toys.gap(ours, plain) <= 1e-6


@both_faces
def test_no_backward_pass_is_added_outside_the_step_that_compares(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    counts = []
    for compare in (None, "once"):
        seen.clear()
        classify(face, RKD(), compare_gradients=compare)
        counts.append(len(seen))
    assert counts[1] - counts[0] == 3, "the task at the flattened embedding and at the pooled maps, and the term"


@both_faces
def test_gradients_are_compared_once_an_epoch_if_asked(face: str) -> None:
    _, found, _ = classify(face, RKD(), compare_gradients="epoch", fit={"max_epochs": 3})
    assert list(found) == [23, 47, 71], "logged at the end of the epoch"


def test_the_ratio_is_the_quotient_of_two_backward_passes() -> None:
    net, expected = Pictures(), []

    class ByHand(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            pooled = self.student.avgpool(self.student.features(batch[0]))
            task = F.cross_entropy(self.student.fc(self.student.drop(pooled.flatten(1))), batch[1])
            with torch.no_grad():
                t = teacher.avgpool(teacher.features(batch[0])).flatten(1)
            norms = [
                torch.autograd.grad(x, pooled, retain_graph=True)[0].norm()
                for x in (3 * RKD()(pooled.flatten(1), t), task)
            ]
            expected.append(float(norms[0] / norms[1]))
            return task

    torch.manual_seed(1)
    teacher = Pictures(16).eval()
    torch.manual_seed(0)
    module = ByHand(Pictures())
    torch.manual_seed(2)
    toys.fit(module, batches=pictures(), max_steps=1)
    torch.manual_seed(0)
    net = Pictures()
    _, found, _ = classify(
        "callback", 3 * RKD(), student=net, compare_gradients="step", fit={"max_steps": 1, "log_every_n_steps": 1}
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_an_activation_in_place_after_the_layer_changes_nothing() -> None:
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        settings = {"student_layer": ["student.features.3"], "teacher_layer": ["features.3"]}
        net = Pictures(inplace=inplace)
        fit = {"max_steps": 1, "log_every_n_steps": 1}
        found.append(
            classify("callback", AttentionTransfer(), student=net, compare_gradients="step", fit=fit, **settings)[1][0]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 0


# torch.compile looks at the gradients of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["compiled", "compiled behind the layer", "checkpointed", "reentrant"])
def test_graphs_that_cannot_be_run_twice_are_left_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.compiler.reset()
    student: Any = torch.compile(Pictures(), backend="aot_eager") if kind == "compiled" else Once(kind)
    with caplog.at_level(logging.DEBUG, logger="lightning_rkd"):
        _, found, _ = classify("callback", RKD(), student=student, compare_gradients="step", fit={"max_steps": 6})
    assert found == {}
    assert "the gradients of rkd and task loss cannot be compared" in caplog.text


@pytest.mark.parametrize("reads", ["embedding", "logits"])
def test_micro_batches_train_as_without_a_comparison(reads: str) -> None:
    runs = []
    for compare in ("step", None):
        kept = Kept()
        settings = {"micro_batch": 4, "compare_gradients": compare, "task_reads": reads}
        module, _ = taught("module", toys.teacher(), RKD(), **settings)
        toys.fit(module, logger=kept, log_every_n_steps=1)
        runs.append((module, kept.found))
    assert toys.gap(runs[0][0], runs[1][0]) == 0.0
    assert len(runs[0][1]) == (toys.STEPS if reads == "embedding" else 0), "logits lie behind a second pass"


def test_a_layer_that_the_task_does_not_use_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = RelationalDistillation(
        toys.teacher(), 100 * RKD(), student_layer=Tap("extra", at="output"), compare_gradients="epoch"
    )
    with caplog.at_level(logging.INFO, logger="lightning_rkd"):
        metrics = toys.fit(Apart(), callback, max_epochs=4, log_every_n_steps=1).callback_metrics
    assert "gradient/rkd" not in metrics
    assert caplog.text.count("rkd: the task loss does not depend on the student's embedding") == 1


@pytest.mark.parametrize("settings", [{"task_weight": 0.0}, {"weight": 0.0}], ids=str)
def test_a_weight_of_zero_is_no_reason_to_warn(settings: Any) -> None:
    assert classify("callback", RKD(), fit={"max_steps": 14}, **settings)[2] == []


def compared(rank: int | None) -> tuple[dict[str, Tensor], float, float]:
    torch.manual_seed(0)
    kept, results = Kept(), []
    for compare in ("step", None):
        module = toys.Student()
        losses = {"rkd": RKD(), "hint": toys.Hint()}
        callback = RelationalDistillation(toys.teacher(), losses, student_layer="backbone", compare_gradients=compare)
        with toys.devices(rank) as where:
            toys.fit(module, callback, logger=kept, batches=batches(rank), log_every_n_steps=1, **where)
        results.append(module)
    return {}, toys.gap(*results), sum(kept.found.values())


def test_ranks_compare_the_whole_batch_and_train_as_before(ranks: Ranks) -> None:
    (_, _, expected), both = compared(None), ranks.run(compared)
    for _, gap, found in both:
        assert gap == 0.0
        assert found == pytest.approx(expected, rel=1e-5)


def test_strategies_that_shard_are_left_alone() -> None:
    assert has_local_backward(DDPStrategy())
    assert not has_local_backward(FSDPStrategy())
    refuse_balance(GradientBalance(1.0), DDPStrategy())
    refuse_balance(GradientBalance(None), FSDPStrategy())
    with pytest.raises(ValueError, match=r"FSDPStrategy does not support: train with strategy='ddp' or Model"):
        refuse_balance(GradientBalance(1.0), FSDPStrategy())
