import pytest
import torch

from lightning_rkd.losses.nst import neuron_selectivity
from tests.oracles import nst as oracle


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_channels_that_are_never_active_pass_no_gradient(kernel):
    s = torch.randn(2, 3, 2, 2)
    s[:, 1] = 0
    s.requires_grad_()
    neuron_selectivity(s, torch.randn(2, 4, 2, 2), kernel=kernel).backward()
    assert s.grad is not None
    assert s.grad[:, 1].abs().max() == 0
    assert s.grad.abs().max() < 10


def test_many_channels_and_many_positions_are_computed_alike():
    s, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    wide = [torch.cat((x, torch.zeros(2, 9, 5, dtype=torch.float64)), 1) for x in (s, t)]
    for a, b in ((s, t), wide):
        value = neuron_selectivity(a[..., None], b[..., None])
        assert float(value) == pytest.approx(oracle.nst(a.numpy(), b.numpy()), rel=1e-9)
