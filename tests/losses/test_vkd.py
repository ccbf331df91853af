import pytest
import torch

from lightning_rkd.losses import VkD
from lightning_rkd.losses.vkd import orthonormal


@pytest.mark.parametrize(("ds", "dt"), [(2, 5), (3, 3), (5, 2)])
def test_the_projection_is_orthogonal_at_the_start_and_after_steps(ds, dt):
    torch.manual_seed(0)
    loss = VkD(ds, dt)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(3):
        p = orthonormal(loss.matrix.detach())
        square = p.T @ p if ds <= dt else p @ p.T
        torch.testing.assert_close(square, torch.eye(min(ds, dt)), atol=1e-5, rtol=0)
        optimizer.zero_grad()
        loss(torch.randn(6, ds), torch.randn(6, dt)).backward()
        assert loss.matrix.grad is not None
        assert loss.matrix.grad.abs().max() > 0
        optimizer.step()
