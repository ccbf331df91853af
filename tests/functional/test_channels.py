import pytest
import torch

from lightning_rkd.functional.channels import flatten_channels, unit_channels


def test_maps_and_tokens_with_the_same_numbers_give_the_same_channels() -> None:
    maps = torch.randn(2, 3, 4, 5)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(flatten_channels(maps), flatten_channels(tokens))
    assert torch.equal(flatten_channels(maps[:, :, 0, 0])[:, :, 0], maps[:, :, 0, 0])


def test_other_ranks_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"NST: a map is \(N, C, H, W\), tokens are \(N, T, C\), got \(2, 1, 1, 1, 1\)"
    ):
        flatten_channels(torch.ones(2, 1, 1, 1, 1), who="NST")


def test_zero_channels_stay_zero_and_pass_no_gradient() -> None:
    x = torch.randn(1, 3, 4)
    x[0, 1] = 0
    x.requires_grad_()
    unit = unit_channels(x)
    unit.sum().backward()
    assert torch.allclose(unit.norm(dim=2), torch.tensor([[1.0, 0.0, 1.0]]))
    assert x.grad is not None
    assert x.grad[0, 1].abs().max() == 0
