import math

import numpy as np
import pytest
import torch

from lightning_rkd.losses.srd import SRD, log_sum
from tests.oracles import srd as oracle
from tests.oracles.differences import central_differences


def weight_of(loss: SRD) -> np.ndarray:
    return loss.project.weight.detach().double().numpy()


@pytest.mark.parametrize("settings", [{}, {"power": 2.0, "eps": 0.1}], ids=str)
@pytest.mark.parametrize(("n", "student_dim", "teacher_dim"), [(2, 3, 5), (7, 4, 4), (20, 6, 2)])
def test_the_loss_is_that_of_the_loops(n, student_dim, teacher_dim, settings):
    rng = np.random.default_rng(n)
    student, teacher = rng.normal(size=(n, student_dim)), 3 + rng.normal(size=(n, teacher_dim))
    loss = SRD(student_dim, teacher_dim, **settings).double()
    ours = loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.srd(student, teacher, weight_of(loss), **settings), rel=1e-9)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    loss = SRD(3, 2).double()
    x = torch.from_numpy(student).requires_grad_()
    loss(x, torch.from_numpy(teacher)).backward()
    weight = weight_of(loss)
    expected = central_differences(lambda s: oracle.srd(s, teacher, weight), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)
    expected = central_differences(lambda w: oracle.srd(student, teacher, w), weight)
    np.testing.assert_allclose(loss.project.weight.grad, expected, rtol=1e-6, atol=1e-9)


def test_a_perfect_match_has_the_logarithm_of_eps_and_a_gradient_of_zero():
    teacher = torch.randn(6, 4)
    student = teacher.clone().requires_grad_()
    loss = log_sum(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1e-5))
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_one_row_gives_exactly_zero_and_reaches_the_projector():
    loss = SRD(3, 2)
    value = loss(torch.randn(1, 3, requires_grad=True), torch.randn(1, 2))
    value.backward()
    assert value.item() == 0
    assert torch.equal(loss.project.weight.grad, torch.zeros(2, 3))


def test_evaluation_takes_the_statistics_of_the_batch_as_training_does():
    student, teacher = torch.randn(5, 3), torch.randn(5, 2)
    loss = SRD(3, 2)
    assert torch.equal(loss.eval()(student, teacher), loss.train()(student, teacher))


def test_the_projector_is_made_for_the_first_batch_and_kept():
    loss = SRD()
    assert loss.missing_sizes == ("student_dim", "teacher_dim")
    loss(torch.randn(5, 3), torch.randn(5, 2))
    assert loss.project.weight.shape == (2, 3)
    with pytest.raises(ValueError, match="SRD was made for student_dim=3, but received student_dim=4"):
        loss(torch.randn(5, 4), torch.randn(5, 2))


def test_the_projector_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert SRD(3, 2).project.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_the_projector_alone_lowers_the_loss():
    torch.manual_seed(0)
    student = torch.randn(64, 8)
    teacher = student @ torch.randn(8, 4)
    loss = SRD(8, 4)
    before = loss(student, teacher).item()
    for _ in range(29):  # later steps jump to and fro across the minimum
        (grad,) = torch.autograd.grad(loss(student, teacher), loss.project.weight)
        loss.project.weight.data -= 0.02 * grad
    assert loss(student, teacher).item() < before - 5
