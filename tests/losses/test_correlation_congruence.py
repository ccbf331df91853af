import math

import pytest
import torch

from lightning_rkd.losses import CorrelationCongruence
from lightning_rkd.losses.correlation_congruence import gaussian_taylor


def test_the_expansion_comes_down_to_the_gaussian_kernel_of_unit_vectors():
    a, b = torch.nn.functional.normalize(torch.randn(2, 10, 4, dtype=torch.float64), dim=2)
    exact = torch.exp(-0.4 * (a - b).square().sum(1))
    inner = (a * b).sum(1)
    torch.testing.assert_close(gaussian_taylor(inner, 0.4, 20), exact, rtol=1e-14, atol=0)
    assert (gaussian_taylor(inner, 0.4, 2) - exact).abs().max() < 0.8**3 / math.factorial(3)


@pytest.mark.parametrize("form", ["kernel", "norm", "rows"])
@pytest.mark.parametrize("n", [1, 5])
def test_a_copy_of_the_teacher_has_no_loss_and_a_finite_gradient(form, n):
    teacher = torch.randn(n, 3)
    student = teacher.clone().requires_grad_()
    value = CorrelationCongruence(form)(student, teacher)
    value.backward()
    assert value == 0
    assert torch.isfinite(student.grad).all()
