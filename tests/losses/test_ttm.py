import numpy as np
import pytest
import torch

from lightning_rkd.losses.soft_target import SoftTarget
from lightning_rkd.losses.ttm import TTM, WTTM
from tests.oracles import ttm as oracle
from tests.oracles.differences import central_differences

BOTH = pytest.mark.parametrize(("cls", "weighted"), [(TTM, False), (WTTM, True)])


@BOTH
@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (7, 3), (5, 20)])
def test_the_loss_is_that_of_the_loops(cls, weighted, n, k, exponent):
    student, teacher = 3 * np.random.default_rng(n).normal(size=(2, n, k))
    ours = cls(exponent)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.ttm(student, teacher, exponent, weighted), rel=1e-10, abs=1e-13)


@BOTH
def test_the_gradient_is_that_of_central_differences_of_the_loops(cls, weighted):
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    cls()(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.ttm(s, teacher, 0.1, weighted), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


@BOTH
def test_dense_logits_are_a_mean_over_pixels(cls, weighted):
    student, teacher = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 4).numpy() for x in (student, teacher)]
    assert float(cls()(student, teacher)) == pytest.approx(oracle.ttm(*rows, 0.1, weighted), rel=1e-10)


@BOTH
def test_exponent_one_is_hintons_loss_at_temperature_one(cls, weighted):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(cls(1.0)(student, teacher), SoftTarget(1.0)(student, teacher))


def test_a_one_hot_teacher_weighs_one_and_a_uniform_one_a_power():
    student = torch.randn(1, 5, dtype=torch.float64)
    for teacher, weight in ((torch.tensor([[1e3, 0, 0, 0, 0]]), 1), (torch.zeros(1, 5), 5**0.75)):
        ratio = WTTM(0.25)(student, teacher) / TTM(0.25)(student, teacher)
        assert float(ratio) == pytest.approx(weight, rel=1e-10)


@BOTH
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(cls, weighted):
    student, teacher = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True), torch.tensor([[1e4, -1e4, 0.0]])
    loss = cls()(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
