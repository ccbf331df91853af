import pytest
import torch

from lightning_rkd.functional.channels import flatten_channels


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
