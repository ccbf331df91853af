import numpy as np
import pytest
import torch

from lightning_rkd.losses.soft_target import SoftTarget, soft_target
from tests.oracles import soft_target as oracle
from tests.oracles.differences import central_differences


@pytest.mark.parametrize("temperature", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (7, 3), (5, 20)])
def test_the_loss_is_that_of_the_loops(n, k, temperature):
    student, teacher = 3 * np.random.default_rng(n).normal(size=(2, n, k))
    ours = SoftTarget(temperature)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.soft_target(student, teacher, temperature), rel=1e-10, abs=1e-13)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    SoftTarget()(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.soft_target(s, teacher), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


def test_dense_logits_are_a_mean_over_pixels():
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 2))
    ours = SoftTarget(2.0)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.dense_soft_target(student, teacher, 2.0), rel=1e-12)


def test_the_same_logits_have_loss_zero():
    logits = torch.randn(4, 5, dtype=torch.float64)
    assert abs(float(SoftTarget()(logits, logits))) < 1e-15


def test_probabilities_that_underflow_leave_loss_and_gradient_finite():
    student, teacher = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True), torch.tensor([[1e4, -1e4, 0.0]])
    loss = SoftTarget(1.0)(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((3, 5, 4), (3, 5, 4), r"must be \(N, K\) or \(N, K, H, W\), got \(3, 5, 4\)"),
        ((3, 5, 4, 4), (3, 5, 2, 2), "same shape.*resize one"),
        ((3, 5), (3, 5, 2, 2), "same shape"),
        ((3, 5), (4, 5), "same shape"),
    ],
)
def test_logits_that_do_not_fit_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        soft_target(torch.randn(student), torch.randn(teacher))
