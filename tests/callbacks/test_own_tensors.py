"""Losses with parameters or memories: the callback trains, saves and synchronises them as the module itself would."""

import operator
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.rkd import RKD
from tests.harness import toys
from tests.harness.faces import FACES, taught

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


def attached(loss: RelationalLoss | dict[str, RelationalLoss], **settings: Any) -> RelationalDistillation:
    return RelationalDistillation(toys.teacher(), loss, **{"student_layer": "backbone", **settings})


def test_parameters_in_no_optimizer_join_the_first_group(caplog: pytest.LogCaptureFixture) -> None:
    class Chosen(toys.Student):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], 0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    module, loss = Chosen(), toys.Projected(5, 7)
    trainer = toys.fit(module, attached(loss), max_epochs=2)
    (group,) = trainer.optimizers[0].param_groups
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in group["params"]}
    assert toys.gap(loss, toys.Projected(5, 7)) > 1e-3
    assert "42 parameters of the distillation losses join the first parameter group of SGD" in caplog.text


class Split(toys.Manual):
    """Backbone and head have an optimizer each; ``own`` says which of them takes the parameters of losses."""

    def __init__(self, own: int | None = None) -> None:
        super().__init__()
        self.own = own

    def configure_optimizers(self) -> Any:
        parts = [list(self.head.parameters()), list(self.backbone.parameters())]
        if self.own is not None:
            parts[self.own] += [p for name, p in self.named_parameters() if name.startswith("_distillation_losses_0")]
        return [toys.sgd(part) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(*batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("layer", ["backbone", "backbone.last", "backbone.act", "backbone.drop"])
def test_the_optimizer_that_trains_the_tapped_layer_takes_the_parameters(layer: str) -> None:
    loss = toys.Projected(5 if layer in ("backbone", "backbone.last") else 8, 7)
    trainer = toys.fit(Split(), attached(loss, student_layer=layer))
    held = {id(p) for p in trainer.optimizers[1].param_groups[0]["params"]}
    assert {id(p) for p in loss.parameters()} <= held


def test_parameters_that_several_optimizers_could_take_are_refused() -> None:
    def loss() -> Any:
        return toys.Projected(5, 7).at("low") + RKD().at("high")

    both = {"low": "backbone", "high": "head"}
    ours: dict[str, Any] = {"student_layer": both, "teacher_layer": {"low": "", "high": ""}}
    cure = r"2 of the module's 2 optimizers .* layers \['backbone', 'head'\].* begin with '_distillation_losses_0' to"
    with pytest.raises(ValueError, match=cure):
        toys.fit(Split(), attached(loss(), **ours))
    toys.fit(Split(own=1), attached(loss(), **ours))


def test_parameters_that_no_optimizer_could_take_are_refused() -> None:
    class Parts(Split):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.nn.Identity()

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.seen(self.backbone(x))), y)

    with pytest.raises(ValueError, match=r"none of the module's 2 optimizers train the tapped layers \['seen'\]"):
        toys.fit(Parts(), attached(toys.Projected(5, 7), student_layer="seen"))


def test_nothing_of_the_loss_stays_in_the_module_or_its_checkpoint(tmp_path: Path) -> None:
    module, callback = toys.Student(), attached(toys.Projected(5, 7))
    before = set(dict(module.named_modules()))
    trainer = toys.fit(module, callback, enable_checkpointing=True, default_root_dir=tmp_path)
    assert set(dict(module.named_modules())) == before
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == set(toys.Student().state_dict())
    (state,) = [s for key, s in saved["callbacks"].items() if key.startswith("RelationalDistillation")]
    assert sorted(state["losses"]) == [f"projected.{key}" for key in ("project.bias", "project.weight", "sizes")]


def test_what_ddp_was_told_about_a_memory_is_taken_back() -> None:
    module, told = toys.Student(), []

    class Looks(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            told.extend(pl_module._ddp_params_and_buffers_to_ignore)

    toys.fit(module, attached(toys.Remembers(7, 40)), Looks(), batches=with_indices(toys.loader()))
    assert told == ["_distillation_losses_0.remembers.mean.value"]
    assert not hasattr(module, "_ddp_params_and_buffers_to_ignore")


SIZES = {"callback": (5, 7), "module": ()}  # a module finds them
on_both_faces = pytest.mark.parametrize("face", FACES)


@on_both_faces
def test_a_resumed_run_with_a_memory_is_the_uninterrupted_run(face: str, tmp_path: Path) -> None:
    def made() -> Any:
        memory = toys.Remembers(7, 40) if face == "callback" else toys.Remembers()
        losses = nn.ModuleDict({"projected": toys.Projected(*SIZES[face]), "remembers": memory})
        return *taught(face, toys.teacher(), dict(losses)), losses

    loader, path = with_indices(toys.loader()), tmp_path / "half.ckpt"
    (whole, with_whole, expected), (half, with_half, _), (rest, with_rest, losses) = made(), made(), made()
    toys.fit(whole, *with_whole, batches=loader, max_epochs=2)
    toys.fit(half, *with_half, batches=loader).save_checkpoint(path)
    toys.trainer(callbacks=with_rest, max_epochs=2).fit(rest, loader, ckpt_path=path, weights_only=True)
    assert toys.gap(whole, rest) == 0.0
    assert toys.gap(expected, losses) == 0.0


def test_resuming_without_the_callback_names_what_is_missing(tmp_path: Path) -> None:
    loader, path = with_indices(toys.loader()), tmp_path / "half.ckpt"
    toys.fit(toys.Student(), attached(toys.Remembers(7, 40)), batches=loader).save_checkpoint(path)
    with pytest.raises(UserWarning, match=r"add the following callbacks: \['RelationalDistillation\(remembers at back"):
        toys.trainer(max_epochs=2).fit(toys.Student(), toys.loader(), ckpt_path=path)


@pytest.mark.parametrize(
    ("loss", "batches", "message"),
    [
        (toys.Projected(), None, r"pass Projected\(student_dim=5, teacher_dim=7\)"),
        (toys.Projected(), DataLoader(toys.Stream(), 8), r"pass Projected\(student_dim=5, teacher_dim=7\)"),
        (toys.Remembers(), with_indices(toys.loader()), r"pass Remembers\(num_samples=40, teacher_dim=7\)"),
        (toys.Projected(6, 7), None, "Projected was made for student_dim=6, but received student_dim=5"),
    ],
)
def test_the_error_names_the_sizes_that_a_loss_lacks_or_has_wrong(loss: Any, batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toys.fit(toys.Student(), attached(loss), batches=batches)


def test_without_a_loader_size_the_error_leaves_num_samples_open() -> None:
    batches = [(x, y, torch.arange(8)) for x, y in toys.loader()]
    with pytest.raises(ValueError, match=r"pass Remembers\(num_samples=\.\.\., teacher_dim=7\)"):
        toys.fit(toys.Student(), attached(toys.Remembers(), indices=2), batches=batches)


def test_two_callbacks_with_tensors_of_their_own_live_side_by_side() -> None:
    first, second = toys.Projected(5, 7), toys.Projected(8, 10)
    inside = attached({"inside": second}, student_layer="backbone.drop", teacher_layer="drop")
    toys.fit(toys.Student(), attached(first), inside)
    assert toys.gap(first, toys.Projected(5, 7)) > 1e-3
    assert toys.gap(second, toys.Projected(8, 10)) > 1e-4


def averaged_in_two_halves(face: str, path: Path) -> tuple[float, float]:
    """Distance of module and loss from an uninterrupted run."""

    def made(*more: pl.Callback) -> Any:
        loss = toys.Projected(5, 7)
        module, callbacks = taught(face, toys.teacher(), loss)
        return module, loss, [*callbacks, EMAWeightAveraging(decay=0.9), *more]

    whole, whole_loss, callbacks = made()
    toys.fit(whole, *callbacks, max_epochs=2)
    half, _, callbacks = made(ModelCheckpoint(path, save_last=True))
    toys.fit(half, *callbacks, enable_checkpointing=True)  # during the fit: after it, the averages are the weights
    module, loss, callbacks = made(ModelCheckpoint(path))
    trainer = toys.trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, toys.loader(), ckpt_path=path / "last.ckpt", weights_only=True)
    return toys.gap(whole, module), toys.gap(whole_loss, loss)


def test_weight_averages_resume_but_those_of_the_loss_restart_loudly(tmp_path: Path) -> None:
    with pytest.raises(UserWarning, match="losses' own parameters are in no checkpoint: they begin anew"):
        averaged_in_two_halves("callback", tmp_path / "a warning is an error here")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "averages of the distillation losses")
        module, loss = averaged_in_two_halves("callback", tmp_path)
    assert module == 0.0
    assert loss > 0, "should this be 0, the warning can go"


def test_in_a_distillation_module_averages_of_the_loss_resume_too(tmp_path: Path) -> None:
    assert averaged_in_two_halves("module", tmp_path) == (0.0, 0.0)


def test_a_layer_may_be_any_function_also_where_a_loss_is_saved() -> None:
    callback = attached(toys.Projected(5, 7), student_layer=operator.attrgetter("backbone"))
    assert callback.state_key == "RelationalDistillation(projected at attrgetter)"


@on_both_faces
def test_losses_are_trained_in_half_precision_after_a_rate_finder(face: str, tmp_path: Path) -> None:
    loss, finder = toys.Projected(*SIZES[face]), LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    module, callbacks = taught(face, toys.teacher(), loss)
    module.lr = 0.1  # type: ignore[assignment]
    toys.fit(module, finder, *callbacks, precision="bf16-true", default_root_dir=tmp_path)
    assert finder.optimal_lr is not None
    assert toys.gap(loss, toys.Projected(5, 7)) > 1e-3
