"""Feature maps as matrices of channels and positions, for convolutional networks, transformers and pooled features."""

from torch import Tensor

from lightning_rkd.functional.similarities import unit_rows


def flatten_channels(x: Tensor, *, who: str = "flatten_channels") -> Tensor:
    """Channels of a feature map as vectors over its P positions.

    Shapes: (N, C, H, W) -> (N, C, H W); tokens (N, T, C) -> (N, C, T); (N, C) -> (N, C, 1).

    Example:
        >>> import torch
        >>> flatten_channels(torch.ones(2, 3, 4, 5)).shape, flatten_channels(torch.ones(2, 7, 3)).shape
        (torch.Size([2, 3, 20]), torch.Size([2, 3, 7]))
    """
    if x.ndim == 4:
        return x.flatten(2)
    if x.ndim == 3:
        return x.transpose(1, 2)
    if x.ndim == 2:
        return x[:, :, None]
    raise ValueError(f"{who}: a map is (N, C, H, W), tokens are (N, T, C), got {tuple(x.shape)}")


def flatten_positions(x: Tensor, *, who: str = "flatten_positions") -> Tensor:
    """Positions of a feature map as vectors of C channels; the transpose of :func:`flatten_channels`.

    Shapes: (N, C, H, W) -> (N, H W, C), likewise with any number of spatial dimensions; tokens (N, T, C) unchanged;
    (N, C) -> (N, 1, C).

    Example:
        >>> import torch
        >>> flatten_positions(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 8])
    """
    return flatten_channels(x.flatten(3) if x.ndim > 4 else x, who=who).transpose(1, 2)


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
