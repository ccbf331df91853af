import math

import pytest
import torch

from lightning_rkd.losses.itrd import correlation_loss


def test_a_match_is_finite_because_the_deviations_are_unbiased():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert float(correlation_loss(x, x, alpha=1.5)) == pytest.approx(math.log2(3 * 0.25**3), rel=1e-9)


def test_constant_columns_pass_no_gradient():
    x = torch.randn(5, 3)
    x[:, 1] = 0.1  # whose mean is not exact
    x.requires_grad_()
    correlation_loss(x, torch.randn(5, 3)).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[:, 1].abs().max() == 0
