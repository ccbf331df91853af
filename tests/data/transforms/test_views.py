import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.data.transforms.views import STRONG, AugmentedViews, Rotations
from lightning_rkd.utils.types import Batch


def batch(n: int = 3, size: int = 8) -> Batch:
    return Batch(torch.rand(n, 2, size, size), torch.arange(n) + 10, indices=torch.arange(n) + 100)


both_transforms = pytest.mark.parametrize("transform", [Rotations(), AugmentedViews()], ids=["rotations", "augmented"])


def second(views: AugmentedViews, given: Batch) -> Tensor:
    return views(given).inputs[len(given.inputs) :]


@both_transforms
def test_labels_and_indices_are_repeated_and_the_batch_is_not_modified(transform):
    given = batch()
    given.is_query = torch.tensor([True, False, True])
    before, views = copy.deepcopy(given), 4 if isinstance(transform, Rotations) else 2
    out = transform(given)
    assert out.labels.tolist() == [10, 11, 12] * views
    assert out.indices.tolist() == [100, 101, 102] * views
    assert out.is_query.tolist() == [True, False, True] * views
    assert out.view.tolist() == [view for view in range(views) for _ in range(3)]
    assert out.view.dtype == torch.int64
    assert torch.equal(out.inputs[out.task_rows], before.inputs)
    assert given.view is None
    assert torch.equal(given.inputs, before.inputs)
    bare = transform(Batch(given.inputs))
    assert bare.labels is bare.indices is bare.teacher_inputs is None


@both_transforms
def test_other_misuse_is_refused_with_the_cure(transform):
    kind = type(transform).__name__
    with pytest.raises(ValueError, match=f"{kind}: .* use one transform that makes views"):
        transform(transform(batch()))
    with pytest.raises(ValueError, match=f"{kind}: .* mixed already; make views before you mix"):
        transform(MixUp()(batch()))
    with pytest.raises(TypeError, match=f"{kind}: the inputs hold no images"):
        transform(Batch("path"))


def test_images_are_rotated_as_numpy_rotates_them():
    given = batch()
    out = Rotations()(given)
    for row in range(12):
        turned = np.rot90(given.inputs[row % 3].numpy(), row // 3, axes=(1, 2))
        assert np.array_equal(out.inputs[row].numpy(), turned)
    assert out.view.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_nested_inputs_and_the_teachers_images_are_rotated():
    a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 3, 6, 6)
    out = Rotations()(Batch({"a": a, "b": [b, None]}, teacher_inputs=b))
    assert torch.equal(out.inputs["a"][2:4], a.rot90(1, (2, 3)))
    assert torch.equal(out.inputs["b"][0][6:], b.rot90(3, (2, 3)))
    assert out.inputs["b"][1] is None
    assert torch.equal(out.teacher_inputs[2:4], b.rot90(1, (2, 3)))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4), (2, 3)], ids=str)
def test_what_is_no_square_image_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"Rotations: inputs must be square images \(N, C, H, H\), got .*; crop or resize"
    ):
        Rotations()(Batch(torch.zeros(shape)))


def test_the_second_view_is_keyed_by_seed_rank_step_and_row():
    given, views = batch(), AugmentedViews(seed=5)
    for step in range(3):
        expected = STRONG(given.inputs, 5, 0, step, np.arange(3))
        assert torch.equal(second(views, given), expected)
        assert not torch.allclose(expected, given.inputs, atol=0.05)


def test_inputs_in_a_mapping_and_the_teachers_undergo_the_same_changes():
    given = batch()
    nested = Batch({"left": given.inputs, "right": given.inputs}, teacher_inputs=(given.inputs,))
    out = AugmentedViews()(nested)
    expected = AugmentedViews()(given).inputs
    assert torch.equal(out.inputs["left"], expected)
    assert torch.equal(out.inputs["right"], expected)
    assert torch.equal(out.teacher_inputs[0], expected)
    assert out.view.tolist() == [0, 0, 0, 1, 1, 1]
    assert out.task_rows.tolist() == [0, 1, 2]
    assert AugmentedViews(task_on_both=True)(given).task_rows is None


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


def test_what_does_not_fit_is_refused_with_the_cure():
    given = batch()
    with pytest.raises(ValueError, match=r"goes from .* to .* instead of 0 to 1; pass the mean and std"):
        AugmentedViews()(Batch(4 * given.inputs - 2))
    with pytest.raises(TypeError, match=r"floating-point images \(N, C, H, W\), got torch.uint8 of \(2, 1, 4, 4\)"):
        AugmentedViews()(Batch(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="std must be positive"):
        AugmentedViews(std=(0.0,))
