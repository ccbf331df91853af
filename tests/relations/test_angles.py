from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.distributed import Anchors
from lightning_rkd.relations import angles as module
from lightning_rkd.relations.angles import angle_loss
from lightning_rkd.relations.distances import squared_distances
from tests.oracles import rkd as oracle
from tests.ranks import Ranks


def ours(student: Tensor, teacher: Tensor, **settings: object) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return angle_loss(squared_distances(student), squared_distances(teacher), dtype=dtype, **settings)  # type: ignore[arg-type]


def loss_and_gradient(loss: object, student: Tensor, teacher: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    x = student.clone().requires_grad_()
    value = loss(x, teacher, **settings)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


@pytest.mark.parametrize("side", [2, 3, 5, 128])
@pytest.mark.parametrize("tile", [1, 60, 2**19])
@pytest.mark.parametrize("n", [3, 4, 7, 10])
def test_every_tiling_gives_the_loss_and_the_gradient_of_the_formula(monkeypatch, n, tile, side):
    monkeypatch.setattr(module, "_SIDE", side)
    monkeypatch.setattr(module, "_TILE", tile)
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 9, dtype=torch.float64)
    value, grad = loss_and_gradient(ours, student, teacher)
    expected, expected_grad = loss_and_gradient(oracle.formula_angle, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("n", [97, 130, 257])
def test_sizes_beyond_one_tile_agree_with_the_formula_in_float32(n):
    student, teacher = torch.randn(n, 8), torch.randn(n, 16)
    value, grad = loss_and_gradient(ours, student, teacher)
    expected, expected_grad = loss_and_gradient(oracle.formula_angle, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (grad - expected_grad).norm() < 3e-6 * expected_grad.norm()


@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_the_gradient_passes_gradcheck(reduction):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    student[4] = -3 * student[3]  # differences beyond 1 too, where the loss is linear
    assert torch.autograd.gradcheck(lambda x: ours(x, teacher, reduction=reduction), student.requires_grad_())


@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_duplicates_in_one_network_or_both_count_as_in_the_loops(reduction):
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 4))
    student[1] = student[0]
    teacher[1] = teacher[0]
    student[2] = student[3]
    teacher[4] = teacher[5]
    value = ours(torch.from_numpy(student), torch.from_numpy(teacher), reduction=reduction)
    assert float(value) == pytest.approx(oracle.rkd_angle(student, teacher, reduction), rel=1e-12)


@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_without_a_triplet_is_an_exact_zero_with_a_graph(n, reduction):
    x = torch.randn(n, 3, requires_grad=True)
    value = ours(x, torch.randn(n, 5), reduction=reduction)
    value.backward()
    assert value == 0
    assert torch.equal(x.grad, torch.zeros(n, 3))


@pytest.mark.parametrize("both", [False, True], ids=["student", "student and teacher"])
@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("n", [8, 64, 130])
def test_near_duplicates_keep_the_float32_gradient_within_a_thousandth_of_float64(n, closeness, both):
    student, teacher = torch.randn(n, 32), torch.randn(n, 64)
    student[1] = student[0] + closeness * torch.randn(32)
    if both:
        teacher[1] = teacher[0] + closeness * torch.randn(64)
    _, grad = loss_and_gradient(ours, student, teacher)
    _, expected = loss_and_gradient(oracle.formula_angle, student.double(), teacher.double())
    for rows in (slice(None), slice(0, 2), slice(2, None)):
        assert (grad[rows] - expected[rows]).norm() < 1e-3 * expected[rows].norm()


def test_an_outlier_does_not_spoil_the_gradient_of_the_others():
    student, teacher = torch.randn(20, 8), torch.randn(20, 8)
    student[7] *= 1e4
    _, grad = loss_and_gradient(ours, student, teacher)
    _, expected = loss_and_gradient(oracle.formula_angle, student.double(), teacher.double())
    others = torch.arange(20) != 7
    assert (grad[others] - expected[others]).norm() < 1e-4 * expected[others].norm()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tiny_and_huge_embeddings_stay_in_range(scale):
    student, teacher = torch.randn(9, 4), torch.randn(9, 4)
    value, grad = loss_and_gradient(ours, student, teacher)
    scaled, scaled_grad = loss_and_gradient(ours, student * scale, teacher / scale)
    torch.testing.assert_close(scaled, value, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled_grad * scale, grad, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_a_constant_and_no_gradient_is_computed_where_none_is_asked():
    teacher = torch.randn(6, 4, requires_grad=True)
    student = torch.randn(6, 4)
    assert not ours(student, teacher.detach()).requires_grad
    ours(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    with torch.inference_mode():
        assert torch.isfinite(ours(student, teacher))


def test_autocast_does_not_change_the_value():
    student, teacher = torch.randn(9, 4), torch.randn(9, 6)
    plain = loss_and_gradient(ours, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_and_gradient(ours, student, teacher)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_matrices_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(N, N\) .*\(3, 3\) and \(4, 4\)"):
        angle_loss(torch.zeros(3, 3), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="'official' or 'distinct', got 'mean'"):
        angle_loss(torch.zeros(3, 3), torch.zeros(3, 3), reduction="mean")  # type: ignore[arg-type]


def _split(rank: int, student: Tensor, teacher: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(ours, student, teacher, anchors=Anchors(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize("n", [1, 2, 3, 11])
def test_anchors_split_over_two_ranks_give_the_whole(ranks: Ranks, n: int, reduction: str):
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    if n > 3:
        student[2] = student[3]
    expected, expected_grad = loss_and_gradient(ours, student, teacher, reduction=reduction)
    for value, grad in ranks.run(_split, student, teacher, reduction):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)
