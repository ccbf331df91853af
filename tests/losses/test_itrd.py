import math

import pytest
import torch

from lightning_rkd.losses.itrd import correlation_loss


def test_a_match_is_finite_because_the_deviations_are_unbiased():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert float(correlation_loss(x, x, alpha=1.5)) == pytest.approx(math.log2(3 * 0.25**3), rel=1e-9)
