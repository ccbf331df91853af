"""Batch transforms in DistillationModule: what a training with them computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.data.transforms.views import AugmentedViews, Rotations
from lightning_rkd.distillation.features import CaptureError
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.stkd import STKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


class Seen(nn.Linear):
    """Keeps the inputs of training."""

    def __init__(self, classes: int) -> None:
        super().__init__(toys.WIDTH, classes)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept += [x] if self.training else []
        return super().forward(x)


def module(**kwargs: Any) -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(
        Seen(toys.CLASSES),
        nn.Linear(toys.WIDTH, toys.CLASSES),
        STKD(),
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        student_layer="",
        optimizer=toys.sgd,
        **{"batch_transform": MixUp(num_classes=toys.CLASSES), **kwargs},
    )


class Save(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_resumed_training_mixes_as_the_uninterrupted_one(tmp_path: Path):
    whole, resumed = module(), module()
    toys.fit(whole, Save(tmp_path / "half.ckpt"), max_epochs=2)
    train = toys.trainer(max_epochs=2)
    train.fit(resumed, toys.loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert int(whole.batch_transform.steps) == 2 * toys.STEPS
    assert len(resumed.student.kept) == toys.STEPS
    assert all(map(torch.equal, resumed.student.kept, whole.student.kept[toys.STEPS :]))
    assert not torch.equal(whole.student.kept[0], whole.student.kept[toys.STEPS])
    assert toys.gap(whole, resumed) == 0


def test_a_loss_on_mixed_batches_names_the_transform_that_is_missing():
    with pytest.raises(
        CaptureError, match=r"STKD needs mix, but the batch was not mixed: pass batch_transform=MixUp\(\)"
    ):
        toys.fit(module(batch_transform=None))


@pytest.mark.parametrize("transform", [Rotations, AugmentedViews])
def test_training_relates_all_views_and_the_task_gets_the_first(transform: Any):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 6))
    images, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 3])
    views = transform()(Batch(images)).inputs
    loss = F.cross_entropy(net(images), labels) + RKD()(net(views), teacher(views).detach())
    loss.backward()
    expected = net[1].weight.detach() - 0.1 * net[1].weight.grad
    net.zero_grad()
    task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits"}
    module = DistillationModule(net, teacher, RKD(), **task, optimizer=toys.sgd, batch_transform=transform())
    toys.fit(module, batches=[(images, labels)])
    torch.testing.assert_close(net[1].weight.detach(), expected)
