"""Promises of AnchoredRKD beyond its loops."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_rkd.losses.anchored_rkd as module
from lightning_rkd.losses import AnchoredRKD
from tests.oracles.anchored_rkd import anchored_rkd


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_blocks_of_any_size_give_value_and_gradient_of_the_loops(block, monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", block)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(7, 3)), rng.normal(size=(7, 3))
    teacher[1] = teacher[0]  # a pair without a direction
    loss, pair = AnchoredRKD(1.0, 2.0), (torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher))
    assert loss(*pair).item() == pytest.approx(anchored_rkd(student, teacher, 1.0, 2.0), rel=1e-9)
    assert torch.autograd.gradcheck(loss, pair)


def test_a_second_derivative_is_refused():
    student = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="AnchoredRKD has a first derivative only"):
        torch.autograd.grad(AnchoredRKD(0.0, 1.0)(student, torch.randn(5, 3)), student, create_graph=True)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return made


def test_no_tensor_is_larger_than_a_block_or_all_pairs():
    n = 300
    with Largest() as seen:
        AnchoredRKD(1.0, 2.0)(torch.randn(n, 64, requires_grad=True), torch.randn(n, 64)).backward()
    assert n**2 <= seen.numel <= 2 * n**2  # N x N x D has 64 n^2, N x N x N 300 n^2
