"""Tokens of two networks on one grid."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import GramAnchoring, TokenSimilarity

each = pytest.mark.parametrize("cls", [GramAnchoring, TokenSimilarity])


def bilinear(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, C, H, W) sampled at the centres of another grid's cells, constant beyond the outermost centres."""
    out = np.zeros((*maps.shape[:2], height, width))
    for place in np.ndindex(height, width):
        corners = []
        for i, new, old in zip(place, (height, width), maps.shape[2:], strict=True):
            x = max(0.0, (i + 0.5) * old / new - 0.5)
            low = int(x)
            corners.append([(low, 1 - (x - low)), (min(low + 1, old - 1), x - low)])
        for (y, a), (x, b) in ((v, h) for v in corners[0] for h in corners[1]):
            out[:, :, place[0], place[1]] += a * b * maps[:, :, y, x]
    return out


def tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


@each
@pytest.mark.parametrize("shapes", [((2, 2), (4, 4)), ((4, 4), (3, 3)), ((3, 2), (2, 3))], ids=str)
def test_the_students_grid_is_interpolated_to_the_teachers(cls, shapes):
    student, teacher = (torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip((3, 5), shapes, strict=True))
    there = torch.from_numpy(bilinear(student.numpy(), *shapes[1]))
    expected = cls()([tokens(there)], [tokens(teacher)])
    torch.testing.assert_close(cls()([student], [teacher]), expected)
    if shapes[0][0] == shapes[0][1]:
        torch.testing.assert_close(cls()([tokens(student)], [tokens(teacher)]), expected)
        torch.testing.assert_close(cls()([tokens(student)], [teacher]), expected)


@each
def test_class_and_register_tokens_are_left_out(cls):
    student, teacher = torch.randn(2, 9, 4), torch.randn(2, 9, 6)
    front = [torch.cat([torch.randn(2, n, x.shape[2]), x], 1) for n, x in ((1, student), (5, teacher))]
    loss = cls(student_prefix=1, teacher_prefix=5)
    expected = cls()([student], [teacher])
    torch.testing.assert_close(loss([front[0]], [front[1]]), expected)
    torch.testing.assert_close(loss([student.mT.unflatten(2, (3, 3))], [front[1]]), expected)  # a map has none
    assert not torch.allclose(cls()([front[0]], [front[1][:, 4:]]), expected)


@each
def test_tokens_that_cannot_be_compared_are_refused_with_the_cure(cls):
    with pytest.raises(ValueError, match=r"the student's 5 are no square grid .* student_prefix, or tap"):
        cls()([torch.randn(2, 5, 3)], [torch.randn(2, 9, 3)])
    with pytest.raises(ValueError, match=r"the teacher's layer must give tokens .*, more than teacher_prefix=4"):
        cls(teacher_prefix=4)([torch.randn(2, 4, 3)], [torch.randn(2, 4, 3)])
