"""Singular vectors of feature maps: the directions in channel space that hold most of a map's energy."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.distances import second_derivative_error
from lightning_rkd.functional.scales import smallest_norm


def right_singular_vectors(x: Tensor, k: int = 1) -> Tensor:
    r"""The first right singular vectors of every matrix of a batch, by the eigenvectors of the smaller Gram matrix.

    .. math:: x_n = U \Sigma V^\top \;\mapsto\; V_{:, 1 \dots k}

    The sign of a singular vector is arbitrary; here it points along the mean of the rows, so that the first vector of
    a map after a ReLU has no negative entry. Vectors whose singular value is zero to rounding are zero, and so are
    those of a matrix without an entry above 1.2e-35 (2.3e-305 in float64).

    The gradient is exact. With :math:`\lambda = \sigma^2`, an incoming gradient :math:`g` of :math:`v_i` becomes

    .. math::
        w = \sum_{j \ne i} \frac{v_j v_j^\top}{\lambda_i - \lambda_j}\, g, \qquad
        \frac{\partial L}{\partial x} = x\,(w v_i^\top + v_i w^\top),

    where j runs over all right singular vectors, including the null space. Pairs whose eigenvalues are equal to
    rounding are left out of the sum, since their directions are not defined. Value and gradient are finite for every
    finite x, and the value does not depend on the scale of x.

    Shapes: (N, P, C) -> (N, C, min(k, P, C)), unit columns.

    Args:
        x: Matrices, float32 or float64.
        k: Number of vectors; columns of the result, largest singular value first.

    Example:
        >>> right_singular_vectors(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]))
        tensor([[[0.6000],
                 [0.8000]]])
    """
    return _RightSingularVectors.apply(x, min(k, *x.shape[1:]))  # type: ignore[no-any-return]


def align_vectors(vectors: Tensor, target: Tensor) -> Tensor:
    r"""Vector of each sample that is nearest to its target, with the sign of the target.

    .. math:: \mathrm{sgn}(c_m)\, v_m, \qquad c = V^\top t, \quad m = \arg\max_i |c_i|

    The choice passes no gradient. Where all cosines are 0, as for a target of zero, the result is zero.

    Shapes: vectors (N, C, k), target (N, C) -> (N, C).

    Args:
        vectors: Unit vectors, as columns.
        target: Unit vectors.

    Reference:
        Lee and Song 2019, Graph-based Knowledge Distillation by Multi-head Attention Network, arXiv:1907.02226.

    Example:
        >>> align_vectors(torch.eye(2)[None], torch.tensor([[0.6, -0.8]])).tolist()
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
            silent = largest < smallest_norm(x.dtype)
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
        if torch.is_grad_enabled():
            raise second_derivative_error("right_singular_vectors")
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
