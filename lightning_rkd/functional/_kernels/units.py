"""Squared distances in units of their mean, as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 1e-5
"""Part of the largest squared distance below which the cosines at a pair are wrong in float32."""


def in_units_of_mean(squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances divided by their mean, which keeps float32 in range; inverse distances (0 for 0); the mean.

    Example:
        >>> [part.tolist() for part in in_units_of_mean(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))]
        [[[0.0, 2.0], [2.0, 0.0]], [[0.0, 0.7071067690849304], [0.7071067690849304, 0.0]], 1.0]
    """
    mean = squared.mean().clamp_(min=torch.finfo(squared.dtype).tiny)
    squared = squared / mean
    return squared, squared.rsqrt().nan_to_num_(posinf=0), mean
