import numpy as np
import pytest
import torch

from lightning_rkd.losses import NST
from lightning_rkd.losses.nst import neuron_selectivity
from tests.oracles import nst as oracle

KERNELS = pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])


@KERNELS
@pytest.mark.parametrize(("cs", "ct", "height", "width"), [(3, 5, 2, 3), (2, 2, 4, 3), (6, 2, 1, 1), (1, 4, 3, 3)])
def test_the_loss_is_that_of_the_loops(kernel, cs, ct, height, width):
    rng = np.random.default_rng(0)
    s, t = (rng.normal(size=(3, c, height, width)) for c in (cs, ct))
    s[0, 0] = 0  # a channel that is never active
    ours = neuron_selectivity(torch.from_numpy(s), torch.from_numpy(t), kernel=kernel)
    assert float(ours) == pytest.approx(oracle.nst(s.reshape(3, cs, -1), t.reshape(3, ct, -1), kernel), rel=1e-9)


@KERNELS
def test_a_larger_map_is_averaged_to_the_smaller_whichever_side_it_is_on(kernel):
    rng = np.random.default_rng(1)
    big, small = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(2, 2, 2, 3))
    pooled = oracle.average_pool(big, 2, 3).reshape(2, 3, -1)
    expected = oracle.nst(pooled, small.reshape(2, 2, -1), kernel)
    for s, t in ((big, small), (small, big)):
        value = neuron_selectivity(torch.from_numpy(s), torch.from_numpy(t), kernel=kernel)
        assert float(value) == pytest.approx(expected, rel=1e-9)


@KERNELS
def test_tokens_with_the_same_numbers_give_the_same_loss(kernel):
    s, t = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    tokens = [x.flatten(2).transpose(1, 2) for x in (s, t)]
    torch.testing.assert_close(neuron_selectivity(*tokens, kernel=kernel), neuron_selectivity(s, t, kernel=kernel))


@KERNELS
def test_equal_maps_give_zero_and_several_maps_add_up(kernel):
    loss = NST(kernel)
    a, b, c = (torch.randn(2, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    assert float(loss([a], [a])) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(loss([a, b], [b, c]), loss([a], [b]) + loss([b], [c]))


@KERNELS
def test_the_gradient_is_that_of_differences(kernel):
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    if kernel == "gaussian":  # whose bandwidth is held
        (grad,) = torch.autograd.grad(neuron_selectivity(s.requires_grad_(), t, kernel=kernel), s)
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0
    else:
        assert torch.autograd.gradcheck(lambda x: neuron_selectivity(x, t, kernel=kernel), s.requires_grad_())


@KERNELS
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


def test_what_does_not_fit_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="NST: kernel must be 'polynomial', 'linear' or 'gaussian', got 'rbf'"):
        NST("rbf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"equally many tokens .* drop class tokens"):
        NST()([torch.ones(2, 5, 3)], [torch.ones(2, 4, 3)])
    with pytest.raises(ValueError, match=r"must give maps .* got \(2, 4, 3\) and \(2, 3, 2, 2\)"):
        NST()([torch.ones(2, 4, 3)], [torch.ones(2, 3, 2, 2)])
    with pytest.raises(ValueError, match=r"must give maps .* tap layers before pooling"):
        NST()([torch.ones(2, 4)], [torch.ones(2, 4)])
