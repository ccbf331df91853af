"""Promises of every batch transform, and what a training with them computes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.data.transforms.views import AugmentedViews, Rotations
from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.stkd import STKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys
from tests.harness.ranks import Ranks

every_transform = pytest.mark.parametrize("kind", [MixUp, AugmentedViews, Rotations])
every_drawing_transform = pytest.mark.parametrize("kind", [MixUp, AugmentedViews])


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(8, 2, 6, 6, generator=generator), torch.arange(8) % 4, indices=torch.arange(8) + 100)


@every_transform
def test_in_evaluation_mode_nothing_happens_and_no_step_is_counted(kind: Any):
    transform, given = kind().eval(), batch()
    assert transform(given) is given
    assert int(getattr(transform, "steps", 0)) == 0


@every_transform
def test_the_given_batch_is_left_alone(kind: Any):
    given, before = batch(), batch()
    kind()(given)
    assert given.mix is given.view is given.teacher_inputs is None
    assert torch.equal(given.inputs, before.inputs)
    assert torch.equal(given.labels, before.labels)


@every_drawing_transform
def test_the_global_random_states_are_neither_read_nor_moved(kind: Any):
    given, torch_state, numpy_state = batch(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = kind()(given).inputs
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(kind()(given).inputs, first)


@every_drawing_transform
@pytest.mark.parametrize("how", ["state", "pickle", "copy"])
def test_a_saved_transform_goes_on_where_it_was(kind: Any, how: str):
    given, whole, stopped = batch(), kind(seed=3), kind(seed=3)
    expected = [whole(given).inputs for _ in range(5)]
    assert not torch.equal(expected[0], expected[1])
    for _ in range(3):
        stopped(given)
    if how == "state":
        twin = kind(seed=3)
        twin(given)
        twin.load_state_dict(stopped.state_dict())
    else:
        twin = copy.deepcopy(stopped) if how == "copy" else pickle.loads(pickle.dumps(stopped))
    assert {name: (x.dtype, int(x)) for name, x in stopped.state_dict().items()} == {"steps": (torch.int64, 3)}
    assert all(torch.equal(twin(given).inputs, x) for x in expected[3:])
    assert int(twin.steps) == 5


def _transformed(rank: int, kind: Any) -> Tensor:
    return kind()(batch()).inputs


@every_drawing_transform
def test_ranks_and_seeds_draw_differently(kind: Any, ranks: Ranks):
    first, second = ranks.run(_transformed, kind)
    alone, given = kind(), batch()
    assert torch.equal(alone(given).inputs, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, kind(seed=1)(given).inputs)


def test_settings_are_printed():
    assert str(MixUp(0.2, seed=5)) == "MixUp(alpha=0.2, num_classes=None, per_row=False, clean_teacher=False, seed=5)"
    assert "std=(0.5,), task_on_both=False, seed=0)" in str(AugmentedViews(std=(0.5,)))


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
