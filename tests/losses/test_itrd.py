import numpy as np
import pytest
import torch

from lightning_rkd.losses import ITRD
from lightning_rkd.losses.itrd import correlation_loss, mutual_information_loss
from tests.oracles import itrd as oracle


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("alpha", [1.01, 1.5, 3.0])
def test_the_correlation_term_is_that_of_the_loops(n, alpha):
    s, t = np.random.default_rng(n).normal(size=(2, n, 4))
    s[:, 1] = 2.0  # constant: correlates with nothing
    ours = correlation_loss(torch.from_numpy(s), torch.from_numpy(t), alpha=alpha)
    assert float(ours) == pytest.approx(oracle.correlation_loss(s, t, alpha), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_mutual_information_term_is_that_of_the_loops(n):
    rng = np.random.default_rng(n)
    s, t = rng.normal(size=(n, 3)), rng.normal(size=(n, 5))
    ours = mutual_information_loss(torch.from_numpy(s), torch.from_numpy(t))
    assert float(ours) == pytest.approx(oracle.mutual_information_loss(s, t), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("width", [3, 4])
def test_the_second_term_takes_the_mapped_student_if_the_widths_differ(width):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(5, 3)), rng.normal(size=(5, width))
    loss = ITRD(3, width, correlation_weight=0.7, mutual_weight=0.3).double()
    mapped = loss.embed(torch.from_numpy(s)).detach().numpy()
    expected = 0.7 * oracle.correlation_loss(mapped, t, 1.5)
    expected += 0.3 * oracle.mutual_information_loss(s if width == 3 else mapped, t)
    assert loss(torch.from_numpy(s), torch.from_numpy(t)).item() == pytest.approx(expected, rel=1e-9)


def test_a_match_is_finite_because_the_deviations_are_unbiased():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert float(correlation_loss(x, x, alpha=1.5)) == pytest.approx(np.log2(3 * 0.25**3), rel=1e-9)


def test_constant_columns_pass_no_gradient():
    x = torch.randn(5, 3)
    x[:, 1] = 0.1  # whose mean is not exact
    x.requires_grad_()
    correlation_loss(x, torch.randn(5, 3)).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[:, 1].abs().max() == 0
