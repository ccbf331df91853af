import pytest
import torch

from lightning_rkd.losses import ICKD
from lightning_rkd.losses.ickd import inter_channel_correlation


def test_a_map_with_the_teachers_correlations_gives_zero():
    t = torch.randn(2, 3, 5, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert float(inter_channel_correlation(7 * t @ turn, t)) == pytest.approx(0, abs=1e-12)


def test_evaluation_takes_the_statistics_of_the_batch_as_training_does():
    loss, inputs = ICKD([2], [3]), ([torch.randn(4, 2, 3, 3)], [torch.randn(4, 3, 3, 3)])
    assert torch.equal(loss.eval()(*inputs), loss.train()(*inputs))
