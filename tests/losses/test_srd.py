import math

import pytest
import torch

from lightning_rkd.losses.srd import SRD, log_sum


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


def test_the_projector_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert SRD(3, 2).project.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
