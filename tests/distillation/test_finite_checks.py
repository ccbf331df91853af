"""NaN and infinity in losses and weights end training before they reach a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.distillation.finite_checks import FiniteChecks, _report_losses
from lightning_rkd.losses.base import NonFiniteError
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules import MHGDModule
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys


class Poisoned(nn.Module):
    """A task loss that is NaN, or has a NaN gradient, in the step after ``sound`` ones."""

    def __init__(self, sound: int, gradient: bool = False) -> None:
        super().__init__()
        self.left, self.gradient = sound, gradient

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.left -= 1
        fine = outputs.square().mean()
        if self.left != -1:
            return fine
        # d sqrt(x) at 0 is infinite, times 0 is NaN
        return fine + (outputs * 0).sum().sqrt() if self.gradient else fine * torch.nan


def module(kind: type[DistillationModule] = DistillationModule, teach: bool = True, **task: Any) -> DistillationModule:
    torch.manual_seed(0)
    more: dict[str, Any] = {"teacher": toys.teacher(), "loss": RKD()} if teach else {}
    return kind(toys.Backbone(), optimizer=toys.sgd, task_loss=Poisoned(**task), **more)


def keep(folder: Path) -> dict[str, Any]:
    """A checkpoint at the end of every epoch of five steps."""
    checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    return {"max_epochs": 4, "enable_checkpointing": True, "callbacks": [checkpoint]}


def fit(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> None:
    options = keep(folder)
    train = toys.trainer(**{**options, "callbacks": [*callbacks, *options["callbacks"]]})
    train.fit(module, toys.loader(), **kwargs)


def kept(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return state


@pytest.mark.parametrize(
    ("kind", "teach"), [(DistillationModule, True), (DistillationModule, False), (MHGDModule, True)]
)
def test_a_nan_task_loss_ends_training_and_it_resumes_from_the_last_epoch(
    kind: type[DistillationModule], teach: bool, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match="step 7: train/task is NaN or infinite: check the batch"):
        fit(module(kind, teach, sound=7), tmp_path)
    assert kept(tmp_path)["global_step"] == 5
    fit(module(kind, teach, sound=99), tmp_path / "whole")
    fit(module(kind, teach, sound=99), tmp_path, ckpt_path=tmp_path / "last.ckpt")
    whole, resumed = kept(tmp_path / "whole"), kept(tmp_path)
    assert whole["global_step"] == resumed["global_step"] == 20
    assert all(torch.equal(x, resumed["state_dict"][k]) for k, x in whole["state_dict"].items())


@pytest.mark.parametrize("face", ["module", "callback"])
def test_weights_spoilt_by_a_nan_gradient_in_the_last_step_are_not_saved(face: str, tmp_path: Path) -> None:
    """Every loss is finite, and the next step, which would notice, comes after the checkpoint."""
    message = "step 10: the weights '.*' hold NaN or infinity, so no checkpoint is written and the last one stays"
    student: pl.LightningModule = module(sound=9, gradient=True)
    callbacks: list[pl.Callback] = []
    if face == "callback":
        poison = Poisoned(9, gradient=True)
        student = toys.Student(by_hand=lambda embedding, x: poison(embedding, x))
        callbacks = [RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")]
    with pytest.raises(NonFiniteError, match=message):
        fit(student, tmp_path, *callbacks)
    assert kept(tmp_path)["global_step"] == 5
    assert all(x.isfinite().all() for x in kept(tmp_path)["state_dict"].values())


class UnderWay:
    """Stands in for a CUDA event that has not happened until it is waited for."""

    waited = False

    def query(self) -> bool:
        return self.waited

    def synchronize(self) -> None:
        self.waited = True


@pytest.mark.parametrize("kind", ["losses", "features"])
def test_flags_under_way_are_reported_when_the_fit_ends(kind: str) -> None:
    checks = FiniteChecks()
    flags, report, message = {
        "losses": ([False, True], partial(_report_losses, ["a", "b"], 3), "step 3: b is NaN or infinite"),
        "features": ([2, -1, 0, 0], partial(checks._report_features, "rkd", 7), r"step 7: rkd: the student's .* row 2"),
    }[kind]
    checks.waiting.append((torch.tensor(flags), UnderWay(), report))
    checks.report()  # still under way: nothing to report, nothing lost
    with pytest.raises(NonFiniteError, match=message):
        checks.report(wait=True)
