r"""RKD's angle loss from distances alone: exact, in tiles, loss and gradient in one pass.

By the law of cosines :math:`\cos(j; i, k) = (S_{ji} + S_{jk} - S_{ik}) / (2 \sqrt{S_{ji} S_{jk}})` with squared
distances :math:`S`: a network enters through its N x N distances only, the work on the N^3 triplets does not depend on
the width of the embedding and is symmetric in (i, k), and the gradient is an N x N matrix that can be summed while the
loss is. Nothing of size N x N x N or N x N x D is ever held.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from lightning_rkd.distributed import Anchors

Reduction = Literal["official", "distinct"]
"""``"official"``: mean over all N^2 or N^3 entries, as in the authors' code; ``"distinct"``: over distinct tuples."""

_TILE = 2**19  # triplets in a tile: four float32 buffers of it stay in cache
_SIDE = 128
_NEAR = 1e-5  # in squared distance: a pair this close, against the farthest pair, is worked on in full precision


def angle_loss(
    squared_student: Tensor,
    squared_teacher: Tensor,
    *,
    reduction: Reduction = "official",
    anchors: Anchors | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Huber loss between the angles that the triplets of a batch span in student and teacher.

    .. math::
        L = \frac{1}{N^3} \sum_{j,i,k} h\big(\cos_s(j; i, k) - \cos_t(j; i, k)\big), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    Angles at a vertex that coincides with another corner have cosine 0, as in the authors' code; with
    ``reduction="official"`` this includes :math:`i = k` where j and i are duplicates in one network only.
    The gradient flows to the student alone. Memory is O(N^2).

    Cosines are computed in ``dtype``. In float32 the cosines at two rows at 1e-5 of the spread would be wrong in the
    second digit, so tiles that hold a pair closer than 0.3 % of the largest distance are worked on in the precision of
    the distances; on CUDA, where looking for such pairs would stop the device, all tiles are.

    Shapes: (N, N), (N, N) -> scalar.

    Args:
        squared_student: Squared distances as :func:`~lightning_rkd.relations.distances.squared_distances` gives them:
            symmetric, zero diagonal.
        squared_teacher: The same for the teacher; a constant.
        reduction: ``"official"`` divides by N^3; ``"distinct"`` takes the mean over triplets of three different rows,
            as the paper writes it. Without any triplet the loss is 0.
        anchors: Where all ranks hold the same batch: work on this rank's vertices only and sum over ranks.
        dtype: Precision of the work on triplets.

    Returns:
        Scalar of type ``dtype``.

    Raises:
        ValueError: Unknown reduction, or matrices that are not both (N, N).

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068. The form in distances is ours.

    Example:
        A right angle against the three angles of an equilateral triangle.

        >>> right = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
        >>> equilateral = 1 - torch.eye(3)
        >>> angle_loss(right, equilateral, reduction="distinct")
        tensor(0.0560)
    """
    n = len(squared_student)
    if not squared_student.shape == squared_teacher.shape == (n, n):
        raise ValueError(
            "angle_loss takes two (N, N) matrices of squared distances, "
            f"got {tuple(squared_student.shape)} and {tuple(squared_teacher.shape)}"
        )
    check_reduction(reduction)
    call = _call_uncompiled if torch.compiler.is_compiling() else _call
    return call(squared_student, squared_teacher.detach(), reduction, anchors, dtype)


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` for anything but the two reductions.

    Example:
        >>> check_reduction("official")
    """
    if reduction not in ("official", "distinct"):
        raise ValueError(f"reduction must be 'official' or 'distinct', got {reduction!r}")


def _call(*args: Any) -> Tensor:
    return _AngleLoss.apply(*args)  # type: ignore[no-any-return]


# Traced by torch.compile, the loop over tiles would be unrolled. torch.compiler.disable would do the same, but imports
# the whole compiler on the spot.
_call_uncompiled = _disable_dynamo(_call)


class _AngleLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, reduction: Reduction, anchors: Anchors | None, dtype: torch.dtype
    ) -> Tensor:
        n = len(student)
        vertices = (0, n) if anchors is None else anchors.share(n)
        with torch.autocast(student.device.type, enabled=False):
            total, grad = _loss_and_gradient(student, teacher, vertices, dtype, ctx.needs_input_grad[0])
            if reduction == "official":
                # i = k: the cosine is 1, or 0 where j and i are duplicates
                rows = slice(*vertices)
                total.add_(((student[rows] > 0) ^ (teacher[rows] > 0)).sum(), alpha=0.5)
        if anchors is not None:
            total = anchors.sum(total)
            grad = None if grad is None else anchors.sum(grad)
        count = n**3 if reduction == "official" else max(1, n * (n - 1) * (n - 2))
        if grad is not None:
            ctx.save_for_backward(grad.div_(count))
        return total.div_(count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None


def _loss_and_gradient(
    student: Tensor, teacher: Tensor, vertices: tuple[int, int], dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the Huber terms of all triplets with i != k at the given vertices, and its gradient to ``student``."""
    n, exact = len(student), student.dtype
    if student.device.type != "cpu":
        dtype = exact
    student, inverse, scale = _in_units_of_mean(student)
    teacher, inverse_t, _ = _in_units_of_mean(teacher)
    near = None if dtype == exact else _near_pairs(student, inverse, teacher, inverse_t)
    kinds = {dtype} if near is None else {dtype, exact}
    sides = {kind: (_Side(student, inverse, kind), _Side(teacher, inverse_t, kind)) for kind in kinds}
    total = torch.zeros((), dtype=exact, device=student.device)
    at_weight = torch.zeros_like(student)  # gradient through S_ji + S_jk - S_ik
    at_cosine = torch.zeros_like(student)  # gradient through the two square roots, times S_ji

    tiles = -(-n // _SIDE) if n > _SIDE else 1 + (n > 96)  # of two halves one off-diagonal tile is a mirror image
    side = -(-n // tiles)
    depth = min(n, max(1, _TILE // side**2))
    buffers = {kind: torch.empty(4, depth * side * side, dtype=kind, device=student.device) for kind in kinds}
    for j in _slices(*vertices, depth):
        for i in _slices(0, n, side):
            for k in _slices(i.start, n, side):
                full = near is not None and bool(near[j, i].any() or near[j, k].any())
                kind = exact if full else dtype
                shape = (j.stop - j.start, i.stop - i.start, k.stop - k.start)
                c, e, w, g = (b[: math.prod(shape)].view(shape) for b in buffers[kind])
                s, t = sides[kind]
                t.cosines(j, i, k, out=e, weight=w)
                s.cosines(j, i, k, out=c, weight=w)
                torch.sub(c, e, out=e)
                if i == k:
                    e.diagonal(dim1=1, dim2=2).zero_()
                torch.clamp(e, -1, 1, out=g)  # the Huber term is g (e - g / 2), its derivative g
                times = 1 if i == k else 2  # tiles below the diagonal are mirror images
                total.add_(e.sub_(g, alpha=0.5).mul_(g).sum(), alpha=times)
                if not with_gradient:
                    continue
                w.mul_(g)
                c.mul_(g)
                at_weight[i, k].sub_(w.sum(0), alpha=times)
                at_weight[j, i].add_(w.sum(2), alpha=2)
                at_cosine[j, i].add_(c.sum(2))
                if i != k:
                    at_weight[j, k].add_(w.sum(1), alpha=2)
                    at_cosine[j, k].add_(c.sum(1))
    if not with_gradient:
        return total, None
    return total, at_weight.sub_(at_cosine.mul_(inverse).mul_(inverse)).div_(scale)


class _Side:
    """One network's squared distances, inverse distances, and half of those, in the precision of a tile."""

    def __init__(self, squared: Tensor, inverse: Tensor, dtype: torch.dtype) -> None:
        self.squared, self.inverse = squared.to(dtype), inverse.to(dtype)
        self.half = self.inverse * 0.5

    def cosines(self, j: slice, i: slice, k: slice, *, out: Tensor, weight: Tensor) -> None:
        """Fill ``out`` with the cosines at j between i and k, and ``weight`` with 1 / (2 d_ji d_jk)."""
        torch.sub(self.squared[j, None, k], self.squared[i, k], out=out)
        out.add_(self.squared[j, i, None])
        torch.mul(self.half[j, i, None], self.inverse[j, None, k], out=weight)
        out.mul_(weight).clamp_(-1, 1)


def _in_units_of_mean(squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances over their mean, which keeps float32 in range; inverse distances (0 for 0); that mean."""
    mean = squared.mean().clamp_(min=torch.finfo(squared.dtype).tiny)
    squared = squared / mean
    return squared, squared.rsqrt().nan_to_num_(posinf=0), mean


def _near_pairs(student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor) -> Tensor | None:
    """Marks pairs that are too close for float32, or ``None`` if there are none, which two maxima tell."""
    if all(
        float(inverse.max()) ** 2 * float(squared.max()) * _NEAR < 1
        for squared, inverse in ((student, inverse_s), (teacher, inverse_t))
    ):
        return None
    return ((student > 0) & (student < _NEAR * student.max())) | ((teacher > 0) & (teacher < _NEAR * teacher.max()))


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
