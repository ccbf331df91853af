import pytest
import torch

from lightning_rkd.losses.fitnet import FitNetHint


def test_channels_are_taken_from_the_first_batch():
    loss = FitNetHint()
    loss([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])
    assert [tuple(r.weight.shape) for r in loss.regressors] == [(4, 3), (6, 5)]
    with pytest.raises(ValueError, match=r"FitNetHint was made for student_dim=\(3, 5\), but received"):
        loss([torch.randn(2, 7, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])
