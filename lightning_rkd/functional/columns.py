"""The columns of a batch's embeddings, taken from their means without losing what is small beside them."""

from __future__ import annotations

from torch import Tensor

from lightning_rkd.functional.scales import exact


def centred(x: Tensor) -> Tensor:
    r"""Columns minus their means; constant columns become exact zeros, however far from 0 they are.

    .. math:: x_{nd} - \frac{1}{N} \sum_m x_{md}

    In float64. The first row is taken off before the mean is, since the mean of equal numbers need not be that number.

    Shapes: (N, D) -> (N, D), float64 (float32 on MPS).

    Args:
        x: Embeddings.

    Returns:
        The centred rows.

    Example:
        >>> import torch
        >>> centred(torch.tensor([[1.0, 0.1], [2.0, 0.1], [6.0, 0.1]])).tolist()
        [[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
    """
    rows = exact(x)
    rows = rows - rows[:1].detach()
    return rows - rows.mean(0)
