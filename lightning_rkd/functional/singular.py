"""Singular vectors of feature maps: the channel directions in which a map has most of its energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.derivatives import refuse_second_derivative
from lightning_rkd.functional.scales import smallest_length


def positions(feature_map: Tensor) -> Tensor:
    """A feature map as one matrix per sample, positions by channels.

    Shapes: (N, C, H, W) -> (N, HW, C); tokens (N, T, C) as they are; (N, C) -> (N, 1, C).

    Example:
        >>> positions(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 8])
    """
    if feature_map.ndim == 2:
        return feature_map[:, None]
    return feature_map if feature_map.ndim == 3 else feature_map.flatten(2).transpose(1, 2)


def right_singular_vectors(x: Tensor, k: int = 1) -> Tensor:
    r"""The first right singular vectors of every matrix of a batch, by the eigenvectors of the smaller Gram matrix.

    .. math:: x_n = U \Sigma V^\top \;\mapsto\; V_{:, 1 \dots k}

    A singular vector has no sign of its own; here it points along the mean of the rows (the first one of a map behind
    a ReLU then has no negative entry). Vectors whose singular value is zero to rounding are zero themselves, and so are
    those of a matrix without an entry above 1.2e-35 (2.3e-305 in float64).

    The gradient is exact. With :math:`\lambda = \sigma^2`, an incoming gradient :math:`g` of :math:`v_i` becomes

    .. math::
        w = \sum_{j \ne i} \frac{v_j v_j^\top}{\lambda_i - \lambda_j}\, g, \qquad
        \frac{\partial L}{\partial x} = x\,(w v_i^\top + v_i w^\top),

    where j runs over all right singular vectors, those of the null space included. Pairs whose eigenvalues are equal
    to rounding leave the sum: within such a pair no direction is defined. Value and gradient are finite for every
    finite x, and the value does not depend on the scale of x above that.

    Shapes: (N, P, C) -> (N, C, min(k, P, C)), unit columns.

    Args:
        x: Matrices, float32 or float64.
        k: How many vectors.

    Returns:
        The vectors as columns, largest singular value first.

    Example:
        >>> right_singular_vectors(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]))
        tensor([[[0.6000],
                 [0.8000]]])
    """
    return _RightSingularVectors.apply(x, min(k, *x.shape[1:]))  # type: ignore[no-any-return]


def align(vectors: Tensor, target: Tensor) -> Tensor:
    r"""Of several vectors per sample the one nearest to a target, turned the same way.

    .. math:: \mathrm{sgn}(c_m)\, v_m, \qquad c = V^\top t, \quad m = \arg\max_i |c_i|

    The choice passes no gradient. Where all cosines are 0, as with a target of zero, the result is zero.

    Shapes: vectors (N, C, k), target (N, C) -> (N, C).

    Args:
        vectors: Unit vectors, as columns.
        target: Unit vectors.

    Returns:
        One vector per sample.

    Reference:
        Lee and Song 2019, Graph-based Knowledge Distillation by Multi-head Attention Network, arXiv:1907.02226.

    Example:
        >>> align(torch.eye(2)[None], torch.tensor([[0.6, -0.8]])).tolist()
        [[0.0, -1.0]]
    """
    with torch.no_grad():
        cosines = (vectors * target[:, :, None]).sum(1)
        signs = cosines.sign() * F.one_hot(cosines.abs().argmax(1), cosines.shape[1])
    return (vectors * signs[:, None]).sum(2)


class _RightSingularVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows, columns = x.shape[1:]
            largest = x.abs().amax((1, 2), keepdim=True)
            silent = largest < smallest_length(x.dtype)
            scale = torch.where(silent, 1, largest)  # so that no square overflows or vanishes
            unit = torch.where(silent, 0, x) / scale
            wide = rows < columns
            squared, basis = torch.linalg.eigh(unit @ unit.mT if wide else unit.mT @ unit)
            squared = squared.flip(1).clamp(min=0)
            basis = basis.flip(2)
            # columns sigma_j v_j, right also where sigma_j is too small to divide by
            scaled = unit.mT @ basis if wide else basis * squared.sqrt()[:, None]
            vectors: Tensor = F.normalize(scaled[..., :k], dim=1) if wide else basis[..., :k].clone()
            rounding = torch.finfo(x.dtype).eps * squared.shape[1] * squared[:, :1]
            vectors *= (squared[:, :k] > rounding)[:, None]
            along = unit.sum(1, keepdim=True) @ vectors
            vectors *= torch.where(along < 0, -1, 1)
        ctx.save_for_backward(unit, scale, squared, scaled, vectors, rounding)
        return vectors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative("right_singular_vectors")
        unit, scale, squared, scaled, vectors, rounding = ctx.saved_tensors
        k = vectors.shape[2]
        with torch.autocast(unit.device.type, enabled=False):
            mine = squared[:, None, :k]
            gap = mine - squared[:, :, None]  # (N, j, i)
            inverse = torch.where(mine > rounding[:, None], 1 / mine, 0)
            apart = gap.abs() > rounding[:, None]
            # sum_{j != i} v_j v_j' / gap_ij = (1 + sum_j c_ij (sigma_j v_j)(sigma_j v_j)') / lambda_i, which holds the
            # null space and needs no v_j of its own; c_ij = -1 / lambda_i takes i and its equals out of the sum
            factor = torch.where(apart, 1 / torch.where(apart, gap, 1), -inverse)
            pull = inverse * (grads[0] + scaled @ (factor * (scaled.mT @ grads[0])))
            grad: Tensor = ((unit @ pull) @ vectors.mT + (unit @ vectors) @ pull.mT) / scale
            return grad, None
