from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.data.transforms.views import Rotations
from lightning_rkd.utils.types import Batch


def batch(n: int = 3, size: int = 5) -> Batch:
    return Batch(torch.randn(n, 2, size, size), torch.arange(n) + 10, indices=torch.arange(n) + 100)


def test_images_are_turned_as_numpy_turns_them_view_after_view():
    given = batch()
    out = Rotations()(given)
    for row in range(12):
        turned = np.rot90(given.inputs[row % 3].numpy(), row // 3, axes=(1, 2))
        assert np.array_equal(out.inputs[row].numpy(), turned)
    assert out.view.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_the_first_rows_are_the_upright_images_and_the_task():
    given = batch()
    out = Rotations()(given)
    assert torch.equal(out.inputs[out.task_rows], given.inputs)
    assert torch.equal(out.labels[out.task_rows], given.labels)
    assert out.task_rows.tolist() == [0, 1, 2]


def test_labels_indices_and_the_teachers_images_are_repeated_alike():
    given = batch()
    given.teacher_inputs = torch.randn(3, 1, 4, 4)
    out = Rotations()(given)
    assert out.labels.tolist() == [10, 11, 12] * 4
    assert out.indices.tolist() == [100, 101, 102] * 4
    assert torch.equal(out.teacher_inputs[3:6], given.teacher_inputs.rot90(1, (2, 3)))
    bare = Rotations()(Batch(given.inputs))
    assert bare.labels is None
    assert bare.indices is None
    assert bare.teacher_inputs is None


def test_the_given_batch_is_left_alone():
    given = batch()
    before = copy.deepcopy(given)
    Rotations()(given)
    assert torch.equal(given.inputs, before.inputs)
    assert given.view is None


def test_images_in_mappings_and_sequences_are_turned():
    a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 3, 6, 6)
    out = Rotations()(Batch({"a": a, "b": [b, None]})).inputs
    assert torch.equal(out["a"][2:4], a.rot90(1, (2, 3)))
    assert torch.equal(out["b"][0][6:], b.rot90(3, (2, 3)))
    assert out["b"][1] is None


def test_rotated_images_can_be_mixed_afterwards():
    out = MixUp()(Rotations()(batch()))
    assert len(out.inputs) == len(out.mix.ratio) == len(out.view) == 12


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4), (2, 3)], ids=str)
def test_what_is_no_square_image_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"Rotations: inputs must be square images \(N, C, H, H\), got .*; crop or resize"
    ):
        Rotations()(Batch(torch.zeros(shape)))


def test_other_misuse_is_refused_with_the_cure():
    with pytest.raises(TypeError, match="Rotations: the inputs hold no images"):
        Rotations()(Batch("text"))
    with pytest.raises(ValueError, match="make views before you mix"):
        Rotations()(MixUp()(batch()))
    with pytest.raises(ValueError, match="several views already"):
        Rotations()(Rotations()(batch()))


def test_in_evaluation_nothing_is_turned():
    given = batch()
    assert Rotations().eval()(given) is given
