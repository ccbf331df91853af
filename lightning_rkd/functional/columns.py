"""Centring of columns without loss of digits."""

from __future__ import annotations

from torch import Tensor

from lightning_rkd.functional.scales import to_float64


def centre_columns(x: Tensor) -> Tensor:
    r"""Columns minus their means; constant columns become exact zeros, however far from 0 they are.

    .. math:: x_{nd} - \frac{1}{N} \sum_m x_{md}

    The first row is subtracted first, because the rounded mean of equal numbers need not be that number.

    Shapes: (N, D) -> (N, D), float64 (float32 on MPS).

    Example:
        >>> import torch
        >>> centre_columns(torch.tensor([[1.0, 0.1], [2.0, 0.1], [6.0, 0.1]])).tolist()
        [[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
    """
    rows = to_float64(x)
    rows = rows - rows[:1].detach()
    return rows - rows.mean(0)
