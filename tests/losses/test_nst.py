import numpy as np
import pytest
import torch

from lightning_rkd.losses.nst import neuron_selectivity
from tests.oracles import nst as oracle
from tests.oracles.differences import central_differences


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_channels_that_are_never_active_pass_no_gradient(kernel):
    s = torch.randn(2, 3, 2, 2)
    s[:, 1] = 0
    s.requires_grad_()
    neuron_selectivity(s, torch.randn(2, 4, 2, 2), kernel=kernel).backward()
    assert s.grad is not None
    assert s.grad[:, 1].abs().max() == 0
    assert s.grad.abs().max() < 10


def test_the_gradient_takes_the_bandwidth_for_a_constant():
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 2))
    x = torch.from_numpy(student).requires_grad_()
    neuron_selectivity(x, torch.from_numpy(teacher), kernel="gaussian").backward()
    fixed = oracle.variances(student, teacher)
    expected = central_differences(lambda s: oracle.nst(s, teacher, "gaussian", fixed), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)
