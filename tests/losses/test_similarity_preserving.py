import copy

import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import SimilarityPreserving
from lightning_rkd.utils.types import Outputs


def maps(n: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(n, *shape, dtype=torch.float64) for shape in shapes]


def test_what_is_read_is_a_matter_of_the_instance():
    student, teacher = maps(4, (3, 2, 2)), maps(4, (5, 2, 2))
    loss = SimilarityPreserving(reads="feature_maps")
    expected = loss(student, teacher)
    inputs = (
        Outputs(embedding=torch.randn(4, 2), feature_maps=student),
        Outputs(embedding=torch.randn(4, 2), feature_maps=teacher),
    )
    for term in (loss, copy.deepcopy(loss), 1.0 * loss):
        torch.testing.assert_close(term(*inputs), expected)
    assert SimilarityPreserving().reads == "embedding"
    torch.testing.assert_close(SimilarityPreserving()(*(x[0].flatten(1) for x in (student, teacher))), expected)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_scales_keep_the_directions_of_the_gram_matrix(scale):
    student, teacher = torch.randn(5, 3), torch.randn(5, 4)
    torch.testing.assert_close(
        SimilarityPreserving()(scale * student, teacher), SimilarityPreserving()(student, teacher)
    )
