import math

import numpy as np
import pytest
import torch

from lightning_rkd.losses import CorrelationCongruence
from lightning_rkd.losses.correlation_congruence import gaussian_taylor
from tests.oracles import correlation_congruence as oracle

FORM = pytest.mark.parametrize("form", ["kernel", "norm", "rows"])


@FORM
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 4), (7, 5)])
def test_the_loss_is_that_of_the_loops(form, n, d):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, d))
    value = CorrelationCongruence(form)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(getattr(oracle, form)(student, teacher), rel=1e-11)


@pytest.mark.parametrize("form", ["kernel", "norm"])
@pytest.mark.parametrize(("gamma", "order"), [(0.1, 1), (0.4, 3), (2.0, 5)])
def test_kernel_width_and_order_are_those_of_the_loops(form, gamma, order):
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 6))
    teacher = teacher[:, :2]
    value = CorrelationCongruence(form, gamma, order)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(getattr(oracle, form)(student, teacher, gamma, order), rel=1e-11)


def test_the_expansion_comes_down_to_the_gaussian_kernel_of_unit_vectors():
    a, b = torch.nn.functional.normalize(torch.randn(2, 10, 4, dtype=torch.float64), dim=2)
    exact = torch.exp(-0.4 * (a - b).square().sum(1))
    inner = (a * b).sum(1)
    torch.testing.assert_close(gaussian_taylor(inner, 0.4, 20), exact, rtol=1e-14, atol=0)
    assert (gaussian_taylor(inner, 0.4, 2) - exact).abs().max() < 0.8**3 / math.factorial(3)


@FORM
@pytest.mark.parametrize("case", ["duplicates", "zeros", "equal", "one"])
def test_degenerate_batches_give_finite_gradients(form, case):
    student, teacher = torch.randn(2, 1 if case == "one" else 5, 3)
    student = {"duplicates": student[[0, 0, 1, 1, 2]] if len(student) > 1 else student, "zeros": student * 0}.get(
        case, teacher.clone() if case == "equal" else student
    )
    student.requires_grad_()
    value = CorrelationCongruence(form)(student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    if case in ("equal", "one"):
        assert value == 0


def test_rows_of_different_widths_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"CorrelationCongruence: form='rows' .* got 3 .* and 5 .*form='kernel'"):
        CorrelationCongruence("rows")(torch.randn(4, 3), torch.randn(4, 5))
