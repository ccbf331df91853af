"""RKD's angle loss in PyTorch operations on tiles of triplets: for any device, in O(N^2) memory."""

import math

import torch
from torch import Tensor

NEAR = 1e-5
"""Part of the largest squared distance below which the cosines at a pair are wrong in float32."""

_TILE = 2**19  # triplets in a tile: four float32 buffers of it stay in cache
_EDGE = 128


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    vertices: tuple[int, int],
    dtype: torch.dtype,
    *,
    official: bool,
    factor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the Huber terms of all triplets at the vertices from the first to before the last, and its gradient.

    Squared distances are symmetric with a zero diagonal. ``dtype`` is the precision of the cosines on the CPU; other
    devices use that of the distances. ``official`` includes i = k, where the cosine is 1, or 0 if j and i are
    duplicates. ``factor`` multiplies sum and gradient.
    """
    n, exact = len(student), student.dtype
    if student.device.type != "cpu":
        dtype = exact
    student, inverse, scale = _in_units_of_mean(student)
    teacher, inverse_t, _ = _in_units_of_mean(teacher)
    near = None if dtype == exact else _near_pairs(student, inverse, teacher, inverse_t)
    kinds = {dtype} if near is None else {dtype, exact}
    networks = {kind: (_Distances(student, inverse, kind), _Distances(teacher, inverse_t, kind)) for kind in kinds}
    total = torch.zeros((), dtype=exact, device=student.device)
    at_weight = torch.zeros_like(student)  # gradient through S_ji + S_jk - S_ik
    at_cosine = torch.zeros_like(student)  # gradient through the two square roots, times S_ji

    tiles = -(-n // _EDGE) if n > _EDGE else 1 + (n > 96)  # of two halves one off-diagonal tile is a mirror image
    edge = -(-n // tiles)
    depth = min(n, max(1, _TILE // edge**2))
    buffers = {kind: torch.empty(4, depth * edge * edge, dtype=kind, device=student.device) for kind in kinds}
    for j in _slices(*vertices, depth):
        for i in _slices(0, n, edge):
            for k in _slices(i.start, n, edge):
                full = near is not None and bool(near[j, i].any() or near[j, k].any())
                kind = exact if full else dtype
                shape = (j.stop - j.start, i.stop - i.start, k.stop - k.start)
                c, e, w, g = (b[: math.prod(shape)].view(shape) for b in buffers[kind])
                s, t = networks[kind]
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
    if official:
        rows = slice(*vertices)
        total.add_(((student[rows] > 0) ^ (teacher[rows] > 0)).sum(), alpha=0.5)
    total.mul_(factor)
    if not with_gradient:
        return total, None
    return total, at_weight.sub_(at_cosine.mul_(inverse).mul_(inverse)).mul_(factor / scale)


def _in_units_of_mean(squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances divided by their mean, which keeps float32 in range; inverse distances (0 for 0); the mean."""
    mean = squared.mean().clamp_(min=torch.finfo(squared.dtype).tiny)
    squared = squared / mean
    return squared, squared.rsqrt().nan_to_num_(posinf=0), mean


class _Distances:
    """Squared, inverse and halved inverse distances of one network in the precision of a tile."""

    def __init__(self, squared: Tensor, inverse: Tensor, dtype: torch.dtype) -> None:
        self.squared, self.inverse = squared.to(dtype), inverse.to(dtype)
        self.half = self.inverse * 0.5

    def cosines(self, j: slice, i: slice, k: slice, *, out: Tensor, weight: Tensor) -> None:
        """Fill ``out`` with the cosines at j between i and k, and ``weight`` with 1 / (2 d_ji d_jk)."""
        torch.sub(self.squared[j, None, k], self.squared[i, k], out=out)
        out.add_(self.squared[j, i, None])
        torch.mul(self.half[j, i, None], self.inverse[j, None, k], out=weight)
        out.mul_(weight).clamp_(-1, 1)


def _near_pairs(student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor) -> Tensor | None:
    """Pairs that are too close for float32, or ``None`` if two maxima rule them out."""
    if all(
        float(inverse.max()) ** 2 * float(squared.max()) * NEAR < 1
        for squared, inverse in ((student, inverse_s), (teacher, inverse_t))
    ):
        return None
    return ((student > 0) & (student < NEAR * student.max())) | ((teacher > 0) & (teacher < NEAR * teacher.max()))


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
