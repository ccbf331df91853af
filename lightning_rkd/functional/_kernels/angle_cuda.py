r"""RKD's angle loss on a GPU: loss and gradient of all triplets in registers, written in Triton.

Two kernels compute the triplets. One holds a tile of corners (i, k), k < i, and loops over the vertices j: it sums the
loss and the gradient to the distance opposite the vertex. The other holds a tile of (vertex j, corner i) and loops over
the other corners k: it sums the gradient to the distances at the vertex. Each program writes its own entries, so that
the result does not depend on the order of programs, and nothing of size N^3 exists. Cosines are computed as on the CPU
(``angle_cpu``). Where there are pairs too close for float32, which only the device knows, both kernels run a second
time in float64 for the triplets of these pairs. There are few launches, because they dominate at usual batch sizes: the
kernel that prepares the matrices computes RKD's distance loss as well.
"""

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional._kernels.distance_cuda import FUSED, largest, tile_of, total
from lightning_rkd.functional.angle_tiles import NEAR

_ACROSS = {"TILE_I": 32, "TILE_K": 32, "UNROLL": 4, "num_warps": 2} | FUSED
_AT = {"TILE_J": 32, "TILE_I": 32, "UNROLL": 4, "num_warps": 2} | FUSED
PADDED = 64
"""Matrices are padded to multiples of it, so that programs need no bounds."""


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
    """Same arguments and results as :func:`lightning_rkd.functional.angle_tiles.loss_and_gradient`, in float64.

    The host does not wait for the device.
    """
    n, more = len(student), -len(student) % PADDED
    both = torch.stack([student.detach(), teacher.detach()]).to(torch.float64)
    least = both.where(both > 0, torch.inf).amin((1, 2)).neg()
    sums = torch.stack([both.sum((1, 2)), both.amax((1, 2)), least, least, least], 1)[..., None]
    settings: dict[str, Any] = {"angles": factor, "official": official, "with_gradient": with_gradient}
    work = Relations(F.pad(both, (0, more, 0, more)), sums, vertices, dtype, **settings)
    return work.losses.sum(), work.pull[:n, :n] if with_gradient else None


class Relations:
    """Losses of relations and their gradient to the squared distances, from what ``distance_cuda.measure`` gives.

    Attributes:
        losses: What adds up to the loss, with the factors.
        pull: The gradient, (n, n) padded, but for what the mean of distances contributes: the sum of ``products``, with
            a factor in ``units``.
    """

    def __init__(
        self,
        squared: Tensor,
        sums: Tensor,
        vertices: tuple[int, int],
        dtype: torch.dtype,
        *,
        angles: float,
        distances: float = 0.0,
        official: bool,
        with_gradient: bool,
    ) -> None:
        n, (start, stop), wide = squared.shape[1], vertices, dtype == torch.float64
        tile = tile_of(n)
        tiles, blocks = (n // tile) ** 2, (n // _ACROSS["TILE_I"]) * (n // _ACROSS["TILE_K"]) if angles else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=squared.device)

        self.units, self.products, self.losses = empty(6), empty(tiles), empty(tiles + blocks * (1 if wide else 2))
        self.pull = empty(n, n) if with_gradient else squared
        narrow = angles and not wide
        fast = empty(6, n, n, dtype=torch.float32) if narrow else squared
        near = empty(n, n, dtype=torch.int8) if narrow else squared
        _prepare[(n // tile, n // tile)](
            squared, sums, self.units, self.products, self.losses, self.pull, fast, near,
            *_halves(distances), *_halves(angles), n, start, stop, sums.shape[2],
            TILE=tile, LIMIT=NEAR, OFFICIAL=official, WIDE=wide,
            DISTANCES=bool(distances), ANGLES=bool(angles), GRADIENT=with_gradient, num_warps=tile // 8, **FUSED,
        )  # fmt: skip
        if not angles:
            return
        for again in (False,) if wide else (False, True):
            matrices, limits = (fast, squared, near, self.units, self.pull), (n, start, stop)
            common: dict[str, Any] = {"NEAR": again, "WIDE": wide or again}
            grid, place = (n // _ACROSS["TILE_I"], n // _ACROSS["TILE_K"]), tiles + blocks * again
            _across[grid](*matrices, self.losses, place, *limits, GRADIENT=with_gradient, **_ACROSS, **common)
            if with_gradient and stop > start:
                first = start // _AT["TILE_J"]
                grid = (triton.cdiv(stop, _AT["TILE_J"]) - first, n // _AT["TILE_I"])
                _at_vertices[grid](*matrices, first, *limits, **_AT, **common)


def _halves(value: float) -> tuple[float, float]:
    """A number as the sum of two of float32, which is what kernels take."""
    high = ctypes.c_float(value).value
    return high, value - high


@triton.jit
def _inverse_root(squared):  # type: ignore[no-untyped-def]
    """0 for 0; NaN stays NaN."""
    zero = squared == 0.0
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, squared)))


@triton.jit
def _at_least(value):  # type: ignore[no-untyped-def]
    """Not 0; NaN stays NaN."""
    return tl.maximum(value, 2.3e-308, tl.PropagateNan.ALL)


@triton.jit
def _huber(e, bound):  # type: ignore[no-untyped-def]
    """Derivative of the Huber function; NaN stays NaN."""
    return tl.maximum(tl.minimum(e, bound, tl.PropagateNan.ALL), -bound, tl.PropagateNan.ALL)


@triton.jit
def _prepare(  # type: ignore[no-untyped-def]
    squared,
    sums,
    units,
    products,
    losses,
    pull,
    fast,
    near,
    distance_high,
    distance_low,
    angle_high,
    angle_low,
    n,
    start,
    stop,
    slots,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFICIAL: tl.constexpr,
    WIDE: tl.constexpr,
    DISTANCES: tl.constexpr,
    ANGLES: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """The distance loss; and for the angles, in float32, squared distances, inverse roots and roots of both networks.

    These are 0 at near pairs, and there is a mask of them. In ``units`` stand the factor that brings squared distances
    of the student into units of their mean, which keeps float32 in range, the same for the teacher, 1 if there are near
    pairs, the factors of what the mean of distances contributes, and the factor of the angles.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = i[:, None] * n + k[None, :]
    plane = n.to(tl.int64) * n
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    a, b = tl.load(squared + here), tl.load(squared + plane + here)
    given = sums + 5 * slots
    loss = 0.0
    gradient = tl.zeros((TILE, TILE), dtype=tl.float64)
    if DISTANCES:
        factor = tl.sum(tl.zeros((1,), dtype=tl.float64) + distance_high + distance_low, axis=0)
        sum_s, sum_t = _at_least(total(sums + 3 * slots, slots)), _at_least(total(given + 3 * slots, slots))
        per_s, per_t = total(sums + 4 * slots, slots) / sum_s, total(given + 4 * slots, slots) / sum_t
        d = tl.sqrt(a)
        e = d * per_s - tl.sqrt(b) * per_t
        g = _huber(e, 1.0)
        loss += factor * tl.sum(tl.sum(g * (e - 0.5 * g), axis=1), axis=0)
        if GRADIENT:
            gradient += tl.where(a > 0, 0.5 * factor * per_s * g / tl.where(a > 0, d, 1.0), 0.0)
            tl.store(products + program, tl.sum(tl.sum(g * d, axis=1), axis=0))
            if program == 0:
                tl.store(units + 3, factor * per_s)
                tl.store(units + 4, sum_s)
    if ANGLES:
        scale = tl.sum(tl.zeros((1,), dtype=tl.float64) + angle_high + angle_low, axis=0)
        entries = n.to(tl.float64) * n
        unit_s, unit_t = 1.0 / _at_least(total(sums, slots) / entries), 1.0 / _at_least(total(given, slots) / entries)
        limit_s, limit_t = LIMIT * largest(sums + slots, slots), LIMIT * largest(given + slots, slots)
        if program == 0:
            tl.store(units, unit_s)
            tl.store(units + 1, unit_t)
            wanted = (-largest(sums + 2 * slots, slots) < limit_s) | (-largest(given + 2 * slots, slots) < limit_t)
            tl.store(units + 2, wanted.to(tl.float64))
            tl.store(units + 5, scale)
        if OFFICIAL:  # i = k counts where the rows are duplicates in one network only
            alone = ((a > 0) != (b > 0)) & ((i >= start) & (i < stop))[:, None]
            loss += 0.5 * scale * tl.sum(tl.sum(alone.to(tl.float64), axis=1), axis=0)
        if not WIDE:
            close = ((a > 0) & (a < limit_s)) | ((b > 0) & (b < limit_t))
            tl.store(near + here, close.to(tl.int8))
            a = a * unit_s
            b = b * unit_t
            r = tl.where(close, 0.0, _inverse_root(a))
            q = tl.where(close, 0.0, _inverse_root(b))
            tl.store(fast + here, a.to(tl.float32))
            tl.store(fast + plane + here, r.to(tl.float32))
            tl.store(fast + 2 * plane + here, (a * r).to(tl.float32))
            tl.store(fast + 3 * plane + here, b.to(tl.float32))
            tl.store(fast + 4 * plane + here, q.to(tl.float32))
            tl.store(fast + 5 * plane + here, (b * q).to(tl.float32))
    tl.store(losses + program, loss)
    if GRADIENT:
        tl.store(pull + here, gradient)


@triton.jit
def _distances(fast, exact, unit, here, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Squared distances, inverse roots and roots at some entries: from the prepared planes, or in float64."""
    if WIDE:
        squared = tl.load(exact + here) * unit
        inverse = _inverse_root(squared)
        root = squared * inverse
    else:
        squared = tl.load(fast[0] + here)
        inverse = tl.load(fast[1] + here)
        root = tl.load(fast[2] + here)
    return squared, inverse, root


@triton.jit
def _planes(fast, n):  # type: ignore[no-untyped-def]
    plane = n.to(tl.int64) * n
    return (fast, fast + plane, fast + 2 * plane), (fast + 3 * plane, fast + 4 * plane, fast + 5 * plane)


@triton.jit
def _across(  # type: ignore[no-untyped-def]
    fast,
    s,
    near,
    units,
    gradient,
    losses,
    place,
    n,
    start,
    stop,
    TILE_I: tl.constexpr,
    TILE_K: tl.constexpr,
    UNROLL: tl.constexpr,
    NEAR: tl.constexpr,
    WIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    first_i, first_k = tl.program_id(0) * TILE_I, tl.program_id(1) * TILE_K
    losses += place + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses, 0.0)
    if NEAR:  # noqa: SIM102 # a constant of compilation, the next condition is not
        if tl.load(units + 2) == 0.0:
            return
    if first_k >= first_i + TILE_I:  # the mirror image of a tile below the diagonal
        return
    i, k = first_i + tl.arange(0, TILE_I), first_k + tl.arange(0, TILE_K)
    here = i[:, None] * n + k[None, :]
    unit_s, unit_t = tl.load(units), tl.load(units + 1)
    t = s + n.to(tl.int64) * n
    own, given = _planes(fast, n)
    across_s = _distances(own, s, unit_s, here, WIDE)[0]
    across_t = _distances(given, t, unit_t, here, WIDE)[0]
    pull = tl.zeros((TILE_I, TILE_K), dtype=tl.float64 if WIDE else tl.float32)
    loss = tl.zeros((TILE_I, TILE_K), dtype=tl.float64 if WIDE else tl.float32)
    for j in tl.range(start, stop, loop_unroll_factor=UNROLL):
        # rows of symmetric matrices stand for their columns
        a, h, _da = _distances(own, s, unit_s, (j * n + i)[:, None], WIDE)
        b, q, _db = _distances(given, t, unit_t, (j * n + i)[:, None], WIDE)
        _sk, r, d = _distances(own, s, unit_s, (j * n + k)[None, :], WIDE)
        _tk, rr, dd = _distances(given, t, unit_t, (j * n + k)[None, :], WIDE)
        h *= 0.5
        q *= 0.5
        e = h * ((a - across_s) * r + d) - q * ((b - across_t) * rr + dd)
        if NEAR:
            near_i = tl.load(near + j * n + i)[:, None]
            near_k = tl.load(near + j * n + k)[None, :]
            e = tl.where((near_i != 0) | (near_k != 0), e, 0.0)
        g = _huber(e, 1.0)
        loss += g * (e - 0.5 * g)
        if GRADIENT:
            pull -= h * (g * r)
    # entries above the diagonal are left to their mirror images
    below = k[None, :] < i[:, None]
    factor = tl.load(units + 5)
    if GRADIENT:
        pull = tl.where(below, 2.0 * factor * unit_s * pull, 0.0)
        tl.store(gradient + here, tl.load(gradient + here) + pull)
    loss = tl.where(below, 2.0 * loss.to(tl.float64), 0.0)
    tl.store(losses, factor * tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit
def _at_vertices(  # type: ignore[no-untyped-def]
    fast,
    s,
    near,
    units,
    gradient,
    first,
    n,
    start,
    stop,
    TILE_J: tl.constexpr,
    TILE_I: tl.constexpr,
    UNROLL: tl.constexpr,
    NEAR: tl.constexpr,
    WIDE: tl.constexpr,
):
    if NEAR:  # noqa: SIM102
        if tl.load(units + 2) == 0.0:
            return
    j = (first + tl.program_id(0)) * TILE_J + tl.arange(0, TILE_J)
    i = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    here = j[:, None] * n + i[None, :]
    unit_s, unit_t = tl.load(units), tl.load(units + 1)
    t = s + n.to(tl.int64) * n
    own, given = _planes(fast, n)
    a, ra, da = _distances(own, s, unit_s, here, WIDE)
    b, rb, db = _distances(given, t, unit_t, here, WIDE)
    # divided by half the inverse root: cosines are x h, their difference e h, Huber's bound is 1 / h
    h = 0.5 * ra
    none = h == 0.0  # distances of 0 get no gradient
    ratio = tl.where(none, 0.0, rb / tl.where(none, 1.0, ra))
    bound = tl.where(none, 1.0, 1.0 / tl.where(none, 1.0, h))
    if NEAR:
        near_i = tl.load(near + here)
    weight = tl.zeros((TILE_J, TILE_I), dtype=tl.float64 if WIDE else tl.float32)
    cosine = tl.zeros((TILE_J, TILE_I), dtype=tl.float64 if WIDE else tl.float32)
    for k in tl.range(0, n, loop_unroll_factor=UNROLL):
        si = _distances(own, s, unit_s, (k * n + i)[None, :], WIDE)[0]
        ti = _distances(given, t, unit_t, (k * n + i)[None, :], WIDE)[0]
        _sk, r, d = _distances(own, s, unit_s, (k * n + j)[:, None], WIDE)
        _tk, rr, dd = _distances(given, t, unit_t, (k * n + j)[:, None], WIDE)
        x = (a - si) * r + d
        e = x - ratio * ((b - ti) * rr + dd)
        if NEAR:
            near_k = tl.load(near + k * n + j)[:, None]
            e = tl.where((near_i != 0) | (near_k != 0), e, 0.0)
        g = _huber(e, bound)
        weight += g * r
        cosine += x * g
    # k = i is no triplet
    x = a * ra + da
    e = x - ratio * (b * rb + db)
    if NEAR:
        e = tl.where(near_i != 0, e, 0.0)
    g = _huber(e, bound)
    weight -= g * ra
    cosine -= x * g
    mine = ((j >= start) & (j < stop))[:, None] & (i >= 0)[None, :]
    pull = 2.0 * h * h * (weight - 2.0 * h * h * cosine)
    pull = tl.load(units + 5) * unit_s * pull
    tl.store(gradient + here, tl.load(gradient + here, mask=mine) + pull, mask=mine)
