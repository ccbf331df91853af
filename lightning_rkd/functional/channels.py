"""Feature maps as channels over positions, whatever network they come from."""

from __future__ import annotations

from torch import Tensor

from lightning_rkd.functional.similarities import unit_rows


def channel_vectors(x: Tensor, *, who: str = "channel_vectors") -> Tensor:
    """A map with its positions in one row: one vector of P numbers a channel.

    Shapes: (N, C, H, W) -> (N, C, H W); tokens (N, T, C) -> (N, C, T); (N, C) -> (N, C, 1).

    Args:
        x: A map.
        who: Begins the error message: the loss that asks.

    Returns:
        (N, C, P).

    Raises:
        ValueError: A tensor of another rank.

    Example:
        >>> import torch
        >>> channel_vectors(torch.ones(2, 3, 4, 5)).shape, channel_vectors(torch.ones(2, 7, 3)).shape
        (torch.Size([2, 3, 20]), torch.Size([2, 3, 7]))
    """
    if x.ndim == 4:
        return x.flatten(2)
    if x.ndim == 3:
        return x.transpose(1, 2)
    if x.ndim == 2:
        return x[:, :, None]
    raise ValueError(f"{who}: a map is (N, C, H, W), tokens are (N, T, C), got {tuple(x.shape)}")


def unit_channels(x: Tensor) -> Tensor:
    r"""Channels divided by their Euclidean norm over the positions; zero channels stay zero and pass no gradient.

    .. math:: \hat x_{nc} = x_{nc} / \lVert x_{nc} \rVert_2

    Shapes: (N, C, P) -> (N, C, P).

    Example:
        >>> import torch
        >>> unit_channels(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist()
        [[[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]]
    """
    return unit_rows(x.flatten(0, 1)).view_as(x)
