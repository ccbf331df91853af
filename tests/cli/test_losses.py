"""Every loss trains the student for glyphs through the real command line, by its bare name."""

import json

import pytest
import torch
from torch import Tensor, nn

import lightning_rkd.losses
from lightning_rkd.cli import main as cli
from lightning_rkd.losses.base import RelationalLoss
from tests.cli.test_recipes import tiny

pytestmark = pytest.mark.slow

DENSE = {"class_path": f"{__name__}.Dense"}
EXTRA = {  # options for losses that need other features or batches than the recipe's
    "Matryoshka": ["--model.loss.loss=RKD", "--model.loss.dims=[8,32]"],
    "IRG": ["--model.loss.transform_layers=[]"],  # stages of different widths
    "STKD": ["--model.batch_transform=lightning_rkd.data.MixUp", "--model.batch_transform.num_classes=315"],
    "PCKD": ["--model.batch_transform=Rotations"],
    "MHGD": ["--model.loss.estimator=runs/glyphs_mhgd_estimator/last.ckpt"],
    "AICSD": [
        f"--model.student={json.dumps(DENSE)}",
        f"--model.teacher.network={json.dumps(DENSE)}",
        "--model.student_layer=null",
        "--model.teacher_layer=null",
        "--model.task_loss=null",
        "--model.metrics=null",
    ],
}


class Dense(nn.Sequential):
    """Predicts a class for each position."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return logits


def names() -> list[str]:
    found = {name: getattr(lightning_rkd.losses, name) for name in lightning_rkd.losses.__all__}
    classes = {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, RelationalLoss)}
    return sorted(n for n, c in classes.items() if c is not RelationalLoss)


def fit(loss: str, *extra: str) -> None:
    options = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", f"--model.loss={loss}", *extra]
    assert cli.main(["fit", "--config", "glyphs_distill", *tiny("glyphs_distill"), *options]) == 0
    state = torch.load("runs/glyphs_distill/last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(torch.isfinite(x).all() for x in state["state_dict"].values() if x.is_floating_point())


@pytest.mark.parametrize("name", ["RKD", *EXTRA])
def test_a_loss_trains_the_student_for_glyphs_by_its_bare_name(name: str) -> None:
    if name == "MHGD":
        assert cli.main(["fit", "--config", "glyphs_mhgd_estimator", *tiny("glyphs_mhgd_estimator")]) == 0
    fit(name, *EXTRA.get(name, []))


def test_all_other_losses_train_it_together_by_their_bare_names() -> None:
    fit(json.dumps({name: name for name in names() if name not in EXTRA}))
