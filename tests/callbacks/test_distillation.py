"""The callback leaves no trace, refuses what cannot work, and gives losses what they ask for."""

import copy
import pickle
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indexing import IndexedBatch, with_indices
from lightning_rkd.distillation.finite_checks import CollapseWarning
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError, Tap
from lightning_rkd.distillation.pooling import global_pool
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import NonFiniteError, RelationalLoss
from lightning_rkd.losses.rkd import RKD, RKDAngle
from tests.harness import toys


def attached(loss: Any = None, teacher: Any = None, **kwargs: Any) -> RelationalDistillation:
    return RelationalDistillation(teacher or toys.teacher(), loss or RKD(), **{"student_layer": "backbone", **kwargs})


# What is left behind


class Fails(toys.Student):
    error: type[BaseException] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.error and batch_idx == 2:
            raise self.error("stop")
        return super().training_step(batch, batch_idx)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Lightning ignores further interrupts once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(("error", "seen"), [(None, None), (KeyError, KeyError), (KeyboardInterrupt, SystemExit)])
@pytest.mark.parametrize("callbacks", [1, 2])
def test_nothing_is_left_behind(error: Any, seen: Any, callbacks: int) -> None:
    module, teacher = Fails(), toys.teacher(dropout=0.5, norm=True).train()
    module.error = error
    before = toys.snapshot(teacher)
    layers = ("backbone", "backbone.last")[:callbacks]
    both = [attached({f"at_{n}": RKD()}, teacher=teacher, student_layer=layer) for n, layer in enumerate(layers)]
    with pytest.raises(seen) if seen else nullcontext():
        toys.fit(module, *both, precision="bf16-true")
    assert toys.attachments(module, teacher) == []
    assert toys.same(before, teacher)


def test_a_step_that_the_module_itself_carries_is_given_back() -> None:
    module = toys.Student()
    own = module.training_step
    module.training_step = own
    toys.fit(module, attached())
    assert vars(module)["training_step"] == own


class Logged(pl.Callback):
    """Collects the steps in which the module logs distillation terms."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log = pl_module.log_dict
        pl_module.log_dict = lambda *args, **kwargs: (self.steps.append(trainer.global_step), log(*args, **kwargs))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, [2, 3, 5, 7]), ({"max_steps": 5}, [2, 3, 4]), ({"accumulate_grad_batches": 2}, [1, 2, 2, 3])],
)
def test_terms_are_logged_where_loggers_write_and_an_epoch_ends(settings: Any, steps: list[int]) -> None:
    logged = Logged()
    toys.fit(toys.Student(), attached(), logged, batches=toys.loader(32), max_epochs=2, log_every_n_steps=3, **settings)
    assert logged.steps == steps


class Copies(pl.Callback):
    """Copies and pickles the module in the middle of a fit."""

    def __init__(self) -> None:
        self.copies: list[toys.Student] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not self.copies:
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


class Counts:
    """A hook that pickles."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *call: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("kind", [toys.Student, toys.Manual])
def test_copies_made_while_attached_are_plain_modules(kind: Any) -> None:
    module, copies = kind(), Copies()
    toys.fit(module, attached(), copies)
    for each in copies.copies:
        assert vars(each)["training_step"].__self__ is each
        each.backbone.register_forward_hook(count := Counts())
        toys.fit(each)
        assert count.calls == toys.STEPS
        assert b"lightning_rkd.callbacks" not in pickle.dumps(each)


@pytest.mark.parametrize("kind", [attached, lambda: RetrievalEvaluation("backbone")])
def test_copies_of_a_callback_made_while_attached_are_attached_to_nothing(kind: Any) -> None:
    module, callback, trainer = toys.Student(), kind(), toys.trainer()
    callback.setup(trainer, module, "fit")
    before = toys.attachments(module)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        twin.teardown(trainer, module, "fit")
        assert toys.attachments(module) == before != []
    callback.teardown(trainer, module, "fit")
    assert toys.attachments(module) == []


# What it does not touch


def test_weight_zero_leaves_the_users_training_bit_identical() -> None:
    plain, module = toys.Student(dropout=0.5, norm=True), toys.Student(dropout=0.5, norm=True)
    for each, callbacks in ((plain, ()), (module, (attached(weight=0.0),))):
        torch.manual_seed(1)
        toys.fit(each, *callbacks)
    assert toys.gap(module, plain) == 0.0


def test_a_run_resumed_without_the_callback_is_a_run_without_distillation(tmp_path: Any) -> None:
    path = tmp_path / "half.ckpt"
    toys.fit(toys.Student(), attached()).save_checkpoint(path)
    half = torch.load(path, weights_only=True)
    by_hand, resumed, distilled = (toys.Student() for _ in range(3))
    by_hand.load_state_dict(half["state_dict"])
    optimizer = toys.sgd(by_hand.parameters())
    optimizer.load_state_dict(half["optimizer_states"][0])
    for x, y in toys.loader():
        optimizer.zero_grad()
        by_hand.loss(x, y).backward()
        optimizer.step()
    toys.trainer(max_epochs=2).fit(resumed, toys.loader(), ckpt_path=path)
    toys.trainer(max_epochs=2, callbacks=[attached()]).fit(distilled, toys.loader(), ckpt_path=path)
    assert toys.gap(resumed, by_hand) == 0.0
    assert toys.gap(distilled, by_hand) > 1e-3


def test_the_teacher_is_in_no_checkpoint_optimizer_or_parameter_list(tmp_path: Any) -> None:
    module, plain = toys.Student(), toys.Student()
    trainers = [toys.fit(module, attached()), toys.fit(plain)]
    for number, trainer in enumerate(trainers):
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
    ours, theirs = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in range(2))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert ours["callbacks"] == theirs["callbacks"]
    counts = [sum(len(g["params"]) for g in t.optimizers[0].param_groups) for t in trainers]
    assert counts[0] == counts[1] == len(list(module.parameters()))


def test_validation_is_never_captured() -> None:
    class Validates(toys.Student):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.backbone(batch[0])
            self.backbone(batch[0])
            seen.append(callback.distiller.student._calls)

    seen: list[Any] = []
    module, plain, callback = Validates(), toys.Student(), attached(RKD())
    trainer = toys.trainer(callbacks=[callback], num_sanity_val_steps=2, val_check_interval=2)
    trainer.fit(module, toys.loader(), toys.loader())
    toys.fit(plain, attached(RKD()))
    assert seen
    assert all(captured == [] for captured in seen)
    assert toys.gap(module, plain) == 0.0


def test_train_and_unfreeze_do_not_reach_the_teacher() -> None:
    class Wakes(toys.Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.unfreeze()
            self.train()
            return super().training_step(batch, batch_idx)

    teacher = toys.teacher(dropout=0.5, norm=True).requires_grad_(False)
    before = toys.snapshot(teacher)
    toys.fit(Wakes(), attached(teacher=teacher))
    assert toys.same(before, teacher)


class Product(RelationalLoss):
    """Saves the teacher's tensor for its backward, which an inference tensor would not allow."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.sum(1) * teacher.sum(1)).mean()


def test_validation_in_inference_mode_does_not_spoil_training() -> None:
    class Validated(toys.Student):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.backbone(batch[0])

    module, teacher = Validated(), toys.teacher(norm=True)
    callback = attached(Product(), teacher)
    toys.trainer(callbacks=[callback]).validate(module, toys.loader(), verbose=False)
    trainer = toys.trainer(callbacks=[callback], num_sanity_val_steps=2)
    trainer.fit(module, toys.loader(), toys.loader())
    sum(p.sum() for p in teacher.parameters()).backward()


# What a loss is given


def test_losses_receive_labels_indices_view_and_epoch() -> None:
    loss, loader = toys.Requesting(), toys.loader()
    seen: list[Any] = []

    class Sees(toys.Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(type(batch))
            return super().training_step(batch, batch_idx)

    with pytest.raises(CaptureError, match=r"Requesting needs indices, the row of every sample.*with_indices"):
        toys.fit(Sees(), attached(loss))
    toys.fit(Sees(), attached(loss), batches=with_indices(loader), max_epochs=2)
    assert IndexedBatch not in seen
    assert loss.given["indices"].tolist() == list(range(32, 40))
    assert loss.given["labels"].tolist() == loader.dataset[32:40][1].tolist()
    assert (loss.given["view"].tolist(), loss.given["epoch"]) == ([0] * 8, 1)


def test_views_are_numbered_and_labels_and_indices_repeated() -> None:
    class Twice(toys.Student):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.backbone(x) + self.backbone(-x)).sum()

    loss = toys.Requesting()
    toys.fit(Twice(), attached(loss, input_layer="backbone"), batches=with_indices(toys.loader()))
    assert loss.given["view"].tolist() == [0] * 8 + [1] * 8
    assert loss.given["indices"].tolist() == [*range(32, 40)] * 2
    assert loss.given["labels"].shape == (16,)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 4)])
def test_calls_that_are_no_views_are_refused_where_rows_have_indices(sizes: tuple[int, int]) -> None:
    class Parts(toys.Student):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return sum(self.head(self.backbone(x[-size:])).sum() for size in sizes)

    toys.fit(Parts(), attached(input_layer="backbone"))
    with pytest.raises(CaptureError, match=rf"ran on {sizes[0]}, {sizes[1]} rows in one step, which are no 2 views"):
        toys.fit(Parts(), attached(toys.Requesting(), input_layer="backbone"), batches=with_indices(toys.loader()))


def test_with_an_input_layer_the_batch_need_not_be_understood() -> None:
    class Named(toys.Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(*batch["pair"])

    batches = [{"pair": batch, "more": 1} for batch in toys.loader()]
    toys.fit(Named(), attached(input_layer="backbone"), batches=batches)
    with pytest.raises(
        TypeError, match=r"a dict, has the entries \['pair', 'more'\]: say which are the inputs, inputs="
    ):
        toys.fit(Named(), attached(), batches=batches)


@pytest.mark.parametrize("grad", [False, True])
def test_a_training_step_called_in_validation_is_only_that(grad: bool) -> None:
    class Validated(toys.Student):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.set_grad_enabled(grad):
                self.log("val/loss", self.training_step(batch, batch_idx))

    losses = []
    for callbacks in ([], [attached()]):
        trainer = toys.trainer(callbacks=callbacks, inference_mode=False, num_sanity_val_steps=1)
        module = Validated()
        trainer.validate(module, toys.loader(), verbose=False)
        losses.append(float(trainer.callback_metrics["val/loss"]))
        trainer.fit(module, toys.loader(), toys.loader())
    assert losses[0] == losses[1]
    assert "distill/rkd" in trainer.callback_metrics
    before = float(trainer.callback_metrics["val/loss"])
    trainer.validate(module, toys.loader(), verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) == before


def test_two_callbacks_that_would_log_the_same_name_are_refused() -> None:
    pair = [attached(), attached(student_layer="backbone.last")]
    with pytest.raises(ValueError, match=r"two RelationalDistillation callbacks would log distill/rkd: .*'rkd_2'"):
        toys.fit(toys.Student(), *pair)


def test_torchscript_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(toys.teacher().eval(), torch.randn(2, toys.WIDTH))
    with pytest.raises(CaptureError, match=r"the teacher is TorchScript, .* wrap it in an nn.Module"):
        toys.fit(toys.Student(), attached(teacher=scripted))


def test_terms_are_logged_under_their_names() -> None:
    trainer = toys.fit(toys.Student(), attached({"gram": 2 * toys.Gram(), "hint": toys.Hint()}))
    assert sorted(k for k in trainer.callback_metrics) == ["distill/gram", "distill/hint"]


# Loud failures


class Direct(toys.Student):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.backbone.forward(x)), y)


class Frozen(toys.Student):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)


class Half(toys.Student):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(x[:4])), y[:4])


class Returns(toys.Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return [super().training_step(batch, batch_idx)]


FAILURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown layer": ({"student_layer": "bakbone"}, LayerNotFoundError, "no layer 'bakbone'; near it: 'backbone'"),
    "unknown input layer": ({"input_layer": "haed"}, LayerNotFoundError, "near it: 'head'"),
    "unknown teacher layer": (
        {"teacher_layer": "frist"},
        LayerNotFoundError,
        "Backbone has no layer 'frist'; near it: 'first'",
    ),
    "the module itself": ({"student_layer": ""}, ValueError, "not the module itself"),
    "the module itself, found": ({"student_layer": lambda m: m}, ValueError, "not the module itself"),
    "no submodule": ({"student_layer": lambda m: 3}, TypeError, "must return a submodule, got int"),
    "forward called": ({"kind": Direct}, CaptureError, r"'backbone' was never called in this step.*not \.forward"),
    "input layer not called": (
        {"kind": Direct, "student_layer": "backbone.last", "input_layer": "backbone"},
        CaptureError,
        "input_layer 'backbone' was never called",
    ),
    "one of two frozen": (
        {
            "kind": Frozen,
            "student_layer": {"one": "head", "two": "backbone"},
            "teacher_layer": {"one": "", "two": ""},
            "loss": {"free": RKD().at("one"), "bound": RKD().at("two")},
        },
        CaptureError,
        "bound: the student layer gives a tensor without gradient",
    ),
    "input of a first layer": (
        {"student_layer": Tap("backbone.first", at="input")},
        CaptureError,
        "whose input is read",
    ),
    "rows": ({"kind": Half}, CaptureError, r"gives 4 rows in 1 call\(s\), the teacher 8.*input_layer="),
    "odd return": ({"kind": Returns}, TypeError, "training_step must return a tensor, a dict.*got list"),
    "tuple": (
        {"student_layer": Tap("backbone", read=lambda o, a: (o, o))},
        CaptureError,
        "gives a tuple, not a tensor; say how to read it",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_work_fails_with_the_cure(case: str) -> None:
    settings, error, message = FAILURES[case]
    settings = {"kind": toys.Student, "teacher": toys.teacher(), **settings}
    module = settings.pop("kind")()
    with pytest.raises(error, match=message):
        toys.fit(module, attached(**settings))
    assert toys.attachments(module, settings["teacher"]) == []


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_nan_is_reported_with_network_row_and_step(network: str) -> None:
    x, y = (torch.cat(parts) for parts in zip(*toys.loader(), strict=True))
    poisoned = x.clone()
    poisoned[8 * 3 + 5] = torch.nan

    class Reads(toys.Student):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch[1 if network == "teacher" else 0], batch[2])

    batches = DataLoader(TensorDataset(poisoned, x, y), batch_size=8)
    callback = attached(inputs=0 if network == "teacher" else 1)
    found = rf"step 3: .*the {network}'s output holds NaN or infinity, first in row 5"
    with pytest.raises(NonFiniteError, match=found):
        toys.fit(Reads(), callback, batches=batches)


def test_a_collapsed_student_is_reported_once() -> None:
    class Collapsed(toys.Student):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.backbone.last.weight)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), 0.1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.fit(Collapsed(), attached())
    (warning,) = [w for w in caught if w.category is CollapseWarning]
    message = "step 0: the student has collapsed: all rows of the embedding that rkd reads are equal"
    assert str(warning.message).startswith(message)


def test_manual_backward_outside_the_step_is_left_alone() -> None:
    class OneMore(toys.Manual):
        def on_train_batch_end(self, *args: Any) -> None:
            self.manual_backward(self.head.weight.sum())

    toys.fit(OneMore(), attached())


def test_global_pool_is_the_cure_for_maps() -> None:
    class Conv(toys.Student):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(1, 5, (1, 2))

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.backbone(x[:, None, None]).mean((2, 3))), y)

    with pytest.raises(ValueError, match=r"student's embedding must be \(N, D\), got \(8, 5, 1, 5\).*global_pool"):
        toys.fit(Conv(), attached())
    toys.fit(Conv(), attached(student_layer=Tap("backbone", read=global_pool)))


def test_one_teacher_object_serves_two_callbacks_at_two_layers() -> None:
    shared, modules = Teacher(toys.teacher()), [toys.Student(), toys.Student()]
    first, last = "first", "last"
    toys.fit(modules[0], attached(RKD(), shared, teacher_layer=first), attached(RKDAngle(), shared, teacher_layer=last))
    toys.fit(modules[1], attached(RKD(), teacher_layer=first), attached(RKDAngle(), teacher_layer=last))
    assert toys.gap(*modules) == 0.0
    assert toys.attachments(shared.network) == []


def test_steps_may_take_the_batch_alone_of_an_indexed_loader() -> None:
    class Alone(toys.Student):
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            return self.loss(x, y)

        def validation_step(self, batch: Any) -> Any:
            return self.training_step(batch)

    module, loader = Alone(), with_indices(toys.loader())
    toys.trainer(callbacks=[attached()]).fit(module, loader, loader)
    assert toys.attachments(module) == []
