import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import SimilarityPreserving
from lightning_rkd.losses.similarity_preserving import similarity_preserving
from lightning_rkd.utils.types import Outputs
from tests.oracles import similarity_preserving as oracle


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def maps(n: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(n, *shape, dtype=torch.float64) for shape in shapes]


def test_the_value_is_that_of_the_published_code():
    value = SimilarityPreserving()(det(6, 4, 0.7, 1.1), det(6, 8, 1.3, 0.5))
    assert float(value) == pytest.approx(0.20920699241366073, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (3, 4), (7, 5)])
def test_the_loss_is_that_of_the_loops(n, d):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, d))
    teacher = teacher[:, :3]
    value = SimilarityPreserving()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(oracle.similarity_preserving([student], [teacher]), rel=1e-12, abs=1e-15)


def test_layers_of_any_sizes_add_up_to_the_loss_of_the_loops():
    student, teacher = maps(5, (3, 4, 4), (6, 2, 2)), maps(5, (8, 2, 2), (9, 7))
    value = SimilarityPreserving(reads="feature_maps")(student, teacher)
    expected = oracle.similarity_preserving([s.numpy() for s in student], [t.numpy() for t in teacher])
    assert float(value) == pytest.approx(expected, rel=1e-12)
    parts = [SimilarityPreserving(reads="feature_maps")([s], [t]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(value, sum(parts))


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


def test_a_sample_without_activation_is_similar_to_none():
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    student[2] = 0
    student.requires_grad_()
    value = similarity_preserving(student, teacher)
    value.backward()
    expected = oracle.similarity_preserving([student.detach().numpy()], [teacher.numpy()])
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    assert student.grad.abs().max() < 10


def test_a_student_that_turns_and_scales_the_teacher_has_no_loss():
    teacher = torch.randn(6, 4, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert float(SimilarityPreserving()(5 * teacher @ turn, teacher)) < 1e-25


def test_maps_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="SimilarityPreserving: 1 feature maps of the student and 2 of the teacher"):
        SimilarityPreserving(reads="feature_maps")(maps(3, (2, 2, 2)), maps(3, (2, 2, 2), (2, 2, 2)))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_scales_keep_the_directions_of_the_gram_matrix(scale):
    student, teacher = torch.randn(5, 3), torch.randn(5, 4)
    torch.testing.assert_close(
        SimilarityPreserving()(scale * student, teacher), SimilarityPreserving()(student, teacher)
    )
