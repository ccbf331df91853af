from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.data.transforms.views import STRONG, AugmentedViews
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys


def batch(n: int = 3, size: int = 8) -> Batch:
    return Batch(torch.rand(n, 2, size, size), torch.arange(n) + 10, indices=torch.arange(n) + 100)


def second(views: AugmentedViews, given: Batch) -> Tensor:
    return views(given).inputs[len(given.inputs) :]


def test_the_second_view_is_keyed_by_seed_rank_step_and_row():
    given, views = batch(), AugmentedViews(seed=5)
    for step in range(3):
        expected = STRONG(given.inputs, 5, 0, step, np.arange(3))
        assert torch.equal(second(views, given), expected)
        assert not torch.allclose(expected, given.inputs, atol=0.05)


def test_the_first_view_is_the_batch_itself_and_the_task():
    given = batch()
    out = AugmentedViews()(given)
    assert torch.equal(out.inputs[:3], given.inputs)
    assert out.task_rows.tolist() == [0, 1, 2]
    assert out.view.tolist() == [0, 0, 0, 1, 1, 1]
    assert out.view.dtype == torch.int64
    assert AugmentedViews(task_on_both=True)(given).task_rows is None


def test_labels_and_indices_are_repeated_and_the_given_batch_is_left_alone():
    given = batch()
    given.is_query = torch.tensor([True, False, True])
    before = copy.deepcopy(given)
    out = AugmentedViews()(given)
    assert out.labels.tolist() == [10, 11, 12] * 2
    assert out.indices.tolist() == [100, 101, 102] * 2
    assert out.is_query.tolist() == [True, False, True] * 2
    assert given.view is None
    assert torch.equal(given.inputs, before.inputs)


def test_inputs_in_a_mapping_and_the_teachers_undergo_the_same_changes():
    given = batch()
    nested = Batch({"left": given.inputs, "right": given.inputs}, teacher_inputs=(given.inputs,))
    out = AugmentedViews()(nested)
    expected = AugmentedViews()(given).inputs
    assert torch.equal(out.inputs["left"], expected)
    assert torch.equal(out.inputs["right"], expected)
    assert torch.equal(out.teacher_inputs[0], expected)
    assert out.view.tolist() == [0, 0, 0, 1, 1, 1]


def test_normalised_images_are_changed_as_the_pixels_behind_them():
    given = batch()
    mean, std = (0.4, 0.6), (0.2, 0.3)
    m, s = (torch.tensor(v).view(2, 1, 1) for v in (mean, std))
    normalised = Batch((given.inputs - m) / s)
    out = second(AugmentedViews(mean=mean, std=std), normalised)
    torch.testing.assert_close(out * s + m, second(AugmentedViews(), given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_of_the_inputs_stays(dtype):
    given = Batch(torch.rand(2, 1, 6, 6).to(dtype))
    out = AugmentedViews()(given)
    assert out.inputs.dtype == dtype
    torch.testing.assert_close(
        out.inputs[2:].float(), second(AugmentedViews(), Batch(given.inputs.float())), atol=1e-2, rtol=0
    )


def test_a_loaded_copied_or_pickled_transform_continues():
    given, views = batch(), AugmentedViews()
    second(views, given)
    loaded = AugmentedViews()
    loaded.load_state_dict(views.state_dict())
    twins = [loaded, copy.deepcopy(views), pickle.loads(pickle.dumps(views))]
    third = [second(views, given) for _ in range(2)]
    for twin in twins:
        assert all(torch.equal(second(twin, given), expected) for expected in third)
    assert int(views.steps) == 3


def test_in_evaluation_mode_nothing_happens():
    given, views = batch(), AugmentedViews().eval()
    assert views(given) is given
    assert int(views.steps) == 0


def test_the_global_random_state_is_neither_read_nor_moved():
    given, before = batch(), torch.get_rng_state()
    first = second(AugmentedViews(), given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(second(AugmentedViews(), given), first)


def test_ranks_change_their_images_differently(monkeypatch: pytest.MonkeyPatch):
    given = batch()
    alone = second(AugmentedViews(), given)
    monkeypatch.setattr("lightning_rkd.data.transforms.views.rank_and_size", lambda: (1, 2))
    assert torch.equal(second(AugmentedViews(), given), STRONG(given.inputs, 0, 1, 0, np.arange(3)))
    assert not torch.equal(second(AugmentedViews(), given), alone)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning")
def test_training_relates_both_views_and_the_task_gets_the_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 6))
    images, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 3])
    both = AugmentedViews()(Batch(images)).inputs
    loss = F.cross_entropy(net(images), labels) + RKD()(net(both), teacher(both).detach())
    loss.backward()
    expected = net[1].weight.detach() - 0.1 * net[1].weight.grad
    net.zero_grad()
    module = DistillationModule(
        net,
        teacher,
        RKD(),
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        optimizer=toys.sgd,
        batch_transform=AugmentedViews(),
    )
    toys.fit(module, batches=[(images, labels)])
    torch.testing.assert_close(net[1].weight.detach(), expected)


def test_what_does_not_fit_is_refused_with_the_cure():
    given = batch()
    with pytest.raises(ValueError, match=r"goes from .* to .* instead of 0 to 1; pass the mean and std"):
        AugmentedViews()(Batch(4 * given.inputs - 2))
    with pytest.raises(ValueError, match="use one transform that makes views"):
        AugmentedViews()(AugmentedViews()(given))
    with pytest.raises(ValueError, match="mixed already; make views before you mix"):
        AugmentedViews()(MixUp()(given))
    with pytest.raises(TypeError, match=r"floating-point images \(N, C, H, W\), got torch.uint8 of \(2, 1, 4, 4\)"):
        AugmentedViews()(Batch(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)))
    with pytest.raises(TypeError, match="hold no images"):
        AugmentedViews()(Batch("path"))
    with pytest.raises(ValueError, match="std must be positive"):
        AugmentedViews(std=(0.0,))


def test_another_augmentation_can_be_passed():
    given = batch()
    assert torch.equal(second(AugmentedViews(Augment()), given), given.inputs)
