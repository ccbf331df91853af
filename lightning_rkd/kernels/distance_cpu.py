"""What surrounds the two matrix products of squared distances, compiled with numba: one pass over the data each."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, float64
from torch import Tensor

from lightning_rkd.kernels.jit import compiled

_Array = np.ndarray


def centred(x: Tensor) -> Tensor:
    """Rows less their mean, in float64.

    Example:
        >>> centred(torch.tensor([[1.0], [2.0], [6.0]]))
        tensor([[-2.],
                [-1.],
                [ 3.]], dtype=torch.float64)
    """
    x = x.detach()
    x = (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()
    rows = torch.empty(x.shape, dtype=torch.float64)
    _centre(x.numpy(), rows.numpy())
    return rows


def from_gram(gram: Tensor, duplicate: float) -> Tensor:
    """Squared distances from inner products, in place; 0 where they are at most ``duplicate`` times the squared norms.

    Example:
        >>> from_gram(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64), 1e-13)
        tensor([[0., 5.],
                [5., 0.]], dtype=torch.float64)
    """
    _from_gram(gram.numpy(), duplicate)
    return gram


def laplacian(pull: Tensor) -> Tensor:
    """The matrix that takes rows to the gradient which a gradient to their squared distances gives them.

    Example:
        >>> laplacian(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
        tensor([[ 2., -2.],
                [-2.,  2.]], dtype=torch.float64)
    """
    result = torch.empty(pull.shape, dtype=torch.float64)
    _laplacian(pull.detach().to(torch.float64).contiguous().numpy(), result.numpy())
    return result


@compiled(*((kind[:, ::1], float64[:, ::1]) for kind in (float32, float64)))
def _centre(x: _Array, rows: _Array) -> None:
    n, width = x.shape
    mean = np.zeros(width)
    for i in range(n):
        for d in range(width):
            mean[d] += x[i, d]
    mean /= n
    for i in range(n):
        for d in range(width):
            rows[i, d] = x[i, d] - mean[d]


@compiled((float64[:, ::1], float64))
def _from_gram(gram: _Array, duplicate: float) -> None:
    n = len(gram)
    norms = np.empty(n)
    for i in range(n):
        norms[i] = gram[i, i]
    for i in range(n):
        row, norm = gram[i], norms[i]
        for k in range(n):
            both = norm + norms[k]
            squared = both - 2 * row[k]
            row[k] = 0.0 if squared <= duplicate * both else squared
        row[i] = 0.0


@compiled((float64[:, ::1], float64[:, ::1]))
def _laplacian(pull: _Array, result: _Array) -> None:
    n = len(pull)
    for i in range(n):
        total = 0.0
        for k in range(n):
            both = 2 * (pull[i, k] + pull[k, i])
            total += both
            result[i, k] = -both
        result[i, i] += total
