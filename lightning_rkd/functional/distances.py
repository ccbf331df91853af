r"""Pairwise distances of a batch, exact where the textbook forms are not.

:math:`|a|^2 + |b|^2 - 2ab` in float32 is useless far from the origin and for rows that lie close together: with two
rows at a thousandth of the spread it makes the gradient of RKD's angle loss 50 % wrong. Here the rows are centred and
the Gram matrix is taken in float64, which costs no more than the float32 difference form and is exact in practice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels import give_up, native
from lightning_rkd.functional.derivatives import refuse_second_derivative

DUPLICATE = 1e-13
"""Two rows with squared distance up to this part of the sum of their squared norms (centred) count as duplicates."""

_BLOCK = 2**22  # elements of a block of differences, where there is no float64


def squared_distances(x: Tensor) -> Tensor:
    r"""Squared Euclidean distances between the rows of a batch, with an exact gradient.

    .. math:: S_{ij} = \lVert x_i - x_j \rVert_2^2

    Rows are centred and multiplied in float64, and so is the backward pass: for an incoming gradient :math:`W` it is
    :math:`2\,(\mathrm{diag}(V \mathbf 1) - V)\,x` with :math:`V = W + W^\top`. The diagonal and the entries of
    duplicates are exactly 0. Duplicates are rows whose squared distance is at most
    ``1e-13 * (|x_i|^2 + |x_j|^2)`` after centring: a relative distance of about 3e-7, close to what float32 can tell
    apart at all. Devices without float64 (MPS) take differences in blocks instead, in the dtype of ``x`` but at least
    float32. The host never waits for the device.

    Shapes: (N, D) -> (N, N). The result stays float64 (float32 on MPS), whatever the dtype of ``x``.

    Args:
        x: Embeddings, any floating dtype.

    Returns:
        Symmetric (N, N) tensor.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])).tolist()
        [[0.0, 25.0, 25.0], [25.0, 0.0, 0.0], [25.0, 0.0, 0.0]]
    """
    return _SquaredDistances.apply(x)  # type: ignore[no-any-return]


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient is 0, not infinite, where the argument is 0.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> safe_sqrt(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    zero = squared <= 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def distances(x: Tensor) -> Tensor:
    r"""Euclidean distances between the rows of a batch; duplicates have distance 0 and pass no gradient.

    .. math:: d_{ij} = \lVert x_i - x_j \rVert_2

    Shapes: (N, D) -> (N, N), float64 as in :func:`squared_distances`.

    Args:
        x: Embeddings, any floating dtype.

    Returns:
        Symmetric (N, N) tensor.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    return safe_sqrt(squared_distances(x))


def divide_by_mean(d: Tensor) -> Tensor:
    r"""Distances in units of their mean: what RKD calls the distance potential.

    .. math:: \psi_{ij} = d_{ij} / \mu, \qquad \mu = \frac{1}{|\{d > 0\}|} \sum_{d_{ij} > 0} d_{ij}

    The mean :math:`\mu` runs over the strictly positive entries and is part of the graph. Where all distances are 0
    they stay 0.

    Shapes: (N, N) -> (N, N).

    Args:
        d: Distances.

    Returns:
        Tensor of the same shape and dtype.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> divide_by_mean(torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]))[0]
        tensor([0.0000, 0.5000, 1.5000])
    """
    mean = d.sum() / (d > 0).sum().clamp(min=1)
    return d / torch.where(mean > 0, mean, 1)


def normalised_distances(x: Tensor) -> Tensor:
    r"""Distances between the rows of a batch, divided by their mean over strictly positive entries.

    .. math:: \psi_{ij} = \lVert x_i - x_j \rVert_2 / \mu

    Invariant under translation, rotation and scaling of ``x``; see :func:`divide_by_mean` for :math:`\mu`.

    Shapes: (N, D) -> (N, N), float64 as in :func:`squared_distances`.

    Args:
        x: Embeddings, any floating dtype.

    Returns:
        Symmetric (N, N) tensor.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> normalised_distances(torch.tensor([[0.0], [1.0], [3.0]])).tolist()
        [[0.0, 0.5, 1.5], [0.5, 0.0, 1.0], [1.5, 1.0, 0.0]]
    """
    return divide_by_mean(distances(x))


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        if x.device.type == "mps":
            ctx.save_for_backward(x)
            return _by_differences(x)
        kernel = _kernel(x)
        rows = kernel.centred(x) if kernel else _centred(x, torch.float64)
        ctx.save_for_backward(rows if ctx.needs_input_grad[0] else None)
        if kernel:
            try:
                return kernel.squared(rows, DUPLICATE)  # type: ignore[no-any-return]
            except Exception as error:
                if x.device.type == "cpu":
                    raise
                give_up(_KERNELS[x.device.type], error)
        return _from_gram(rows @ rows.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        refuse_second_derivative("squared_distances")
        (x,) = ctx.saved_tensors
        if x.dtype == torch.float64 and (kernel := _kernel(x)):
            return kernel.pulled(grads[0], x).to(ctx.dtype)  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, enabled=False):
            pull = grads[0] + grads[0].T
            rows = _centred(x, pull.dtype)
            return (pull.sum(1, keepdim=True) * rows).sub_(pull @ rows).mul_(2).to(ctx.dtype)


_KERNELS = {"cpu": "distance_cpu", "cuda": "distance_cuda"}


def _kernel(x: Tensor) -> Any:
    name = _KERNELS.get(x.device.type)
    return native(name) if name and not torch.compiler.is_compiling() else None


def _centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x - x.mean(0)


def _from_gram(gram: Tensor) -> Tensor:
    norms = gram.diagonal()
    sums = norms[:, None] + norms
    squared = torch.sub(sums, gram, alpha=2)
    squared.masked_fill_(squared <= sums.mul_(DUPLICATE), 0)
    return squared.fill_diagonal_(0)


def _by_differences(x: Tensor) -> Tensor:
    rows = _centred(x, torch.promote_types(x.dtype, torch.float32))
    step = max(1, _BLOCK // max(1, rows.numel()))
    return torch.cat([(block[:, None] - rows).square_().sum(2) for block in torch.split(rows, step)])
