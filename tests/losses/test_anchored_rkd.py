"""What AnchoredRKD promises beyond its loops."""

import numpy as np
import pytest
import torch

import lightning_rkd.losses.anchored_rkd as module
from lightning_rkd.losses import AnchoredRKD
from tests.oracles.anchored_rkd import anchored_rkd


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_blocks_of_any_size_give_value_and_gradient_of_the_loops(block, monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", block)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(7, 3)), rng.normal(size=(7, 3))
    teacher[1] = teacher[0]  # a pair without a direction
    ours = AnchoredRKD()(x := torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(anchored_rkd(student, teacher), rel=1e-9)
    assert torch.autograd.gradcheck(AnchoredRKD(), (x, torch.from_numpy(teacher)))


def test_it_is_0_for_the_teachers_rows_alone_and_not_for_their_rotation():
    teacher = torch.randn(8, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert AnchoredRKD()(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert AnchoredRKD()(teacher @ rotation, teacher).item() > 0.05


def test_a_second_derivative_is_refused():
    student = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="AnchoredRKD has a first derivative only"):
        torch.autograd.grad(AnchoredRKD()(student, torch.randn(5, 3)), student, create_graph=True)
