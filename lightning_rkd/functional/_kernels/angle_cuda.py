r"""RKD's angle loss on a GPU: loss and gradient of all triplets in registers, written in Triton.

Two kernels compute the triplets. One holds a tile of corners (i, k), k < i, and loops over the vertices j: it sums the
loss and the gradient to the distance opposite the vertex. The other holds a tile of (vertex j, corner i) and loops over
the other corners k: it sums the gradient to the distances at the vertex. Each program writes its own entries, so that
the result does not depend on the order of programs, and nothing of size N^3 exists. Cosines are computed as on the CPU
(``angle_cpu``). Where there are pairs too close for float32, which only the device knows, both kernels run a second
time in float64 for the triplets of these pairs. There are few launches, because they dominate at usual batch sizes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.angle_tiles import NEAR

_ACROSS = {"TILE_I": 32, "TILE_K": 32, "UNROLL": 4, "num_warps": 2}
_AT = {"TILE_J": 32, "TILE_I": 32, "UNROLL": 4, "num_warps": 2}
_TILE = 32  # of the kernel ``_prepare``
_PADDED = 64  # matrices are padded to multiples of it, so that programs need no bounds


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
    start, stop = vertices
    size, device, wide = len(student), student.device, dtype == torch.float64
    squared = [x.detach().to(torch.float64) for x in (student, teacher)]
    s, t = (_padded(x) for x in squared)
    n = len(s)
    units = [reduced for x in squared for reduced in (x.mean(), x.amax())]
    scale = torch.full((), factor, dtype=torch.float64, device=device)
    tiles, blocks = (n // _TILE) ** 2, (n // _ACROSS["TILE_I"]) * (n // _ACROSS["TILE_K"])
    losses = torch.zeros(tiles + 2 * blocks, dtype=torch.float64, device=device)
    gradient = torch.zeros((n, n), dtype=torch.float64, device=device) if with_gradient else s
    fast = s if wide else torch.empty((6, n, n), dtype=torch.float32, device=device)
    near = s if wide else torch.empty((n, n), dtype=torch.int8, device=device)
    found = s if wide else torch.empty(tiles, dtype=torch.int32, device=device)
    limits = (n, start, stop)
    _prepare[(n // _TILE, n // _TILE)](
        s, t, *units, fast, near, found, losses, scale, *limits, TILE=_TILE, LIMIT=NEAR, OFFICIAL=official, WIDE=wide
    )
    for again in (False,) if wide else (False, True):
        wanted = found.amax() if again else s  # read on the device
        matrices = (fast, s, t, *units[::2], near, wanted, scale, gradient)
        common: dict[str, Any] = {"NEAR": again, "WIDE": wide or again}
        grid = (n // _ACROSS["TILE_I"], n // _ACROSS["TILE_K"])
        place = tiles + blocks * again
        _across[grid](*matrices, losses, place, *limits, GRADIENT=with_gradient, **_ACROSS, **common)
        if with_gradient and stop > start:
            first = start // _AT["TILE_J"]
            grid = (triton.cdiv(stop, _AT["TILE_J"]) - first, n // _AT["TILE_I"])
            _at_vertices[grid](*matrices, first, *limits, **_AT, **common)
    return losses.sum(), gradient[:size, :size] if with_gradient else None


def _padded(x: Tensor) -> Tensor:
    more = -len(x) % _PADDED
    return F.pad(x, (0, more, 0, more)) if more else x.contiguous()


@triton.jit
def _inverse_root(squared):  # type: ignore[no-untyped-def]
    """0 for 0; NaN stays NaN."""
    zero = squared == 0.0
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, squared)))


@triton.jit
def _per_unit(mean):  # type: ignore[no-untyped-def]
    """Factor that brings squared distances into units of their mean, which keeps float32 in range."""
    return 1.0 / tl.maximum(tl.load(mean), 2.3e-308, tl.PropagateNan.ALL)


@triton.jit
def _huber(e, bound):  # type: ignore[no-untyped-def]
    """Derivative of the Huber function; NaN stays NaN."""
    return tl.maximum(tl.minimum(e, bound, tl.PropagateNan.ALL), -bound, tl.PropagateNan.ALL)


@triton.jit
def _prepare(  # type: ignore[no-untyped-def]
    s,
    t,
    mean_s,
    largest_s,
    mean_t,
    largest_t,
    fast,
    near,
    found,
    losses,
    scale,
    n,
    start,
    stop,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFICIAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Squared distances, inverse roots and roots of both networks in float32, 0 at near pairs, and a mask of these."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = i[:, None] * n + k[None, :]
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    a, b = tl.load(s + here), tl.load(t + here)
    if OFFICIAL:  # i = k counts where the rows are duplicates in one network only
        alone = ((a > 0) != (b > 0)) & ((i >= start) & (i < stop))[:, None]
        count = tl.sum(tl.sum(alone.to(tl.float64), axis=1), axis=0)
        tl.store(losses + program, 0.5 * count * tl.load(scale))
    if not WIDE:
        close = ((a > 0) & (a < LIMIT * tl.load(largest_s))) | ((b > 0) & (b < LIMIT * tl.load(largest_t)))
        tl.store(near + here, close.to(tl.int8))
        tl.store(found + program, tl.max(tl.max(close.to(tl.int32), axis=1), axis=0))
        plane = n.to(tl.int64) * n
        a = a * _per_unit(mean_s)
        b = b * _per_unit(mean_t)
        r = tl.where(close, 0.0, _inverse_root(a))
        q = tl.where(close, 0.0, _inverse_root(b))
        tl.store(fast + here, a.to(tl.float32))
        tl.store(fast + plane + here, r.to(tl.float32))
        tl.store(fast + 2 * plane + here, (a * r).to(tl.float32))
        tl.store(fast + 3 * plane + here, b.to(tl.float32))
        tl.store(fast + 4 * plane + here, q.to(tl.float32))
        tl.store(fast + 5 * plane + here, (b * q).to(tl.float32))


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
    t,
    mean_s,
    mean_t,
    near,
    wanted,
    scale,
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
    if NEAR:  # noqa: SIM102 # a constant of compilation, the next condition is not
        if tl.load(wanted) == 0:
            return
    first_i, first_k = tl.program_id(0) * TILE_I, tl.program_id(1) * TILE_K
    if first_k >= first_i + TILE_I:  # the mirror image of a tile below the diagonal
        return
    i, k = first_i + tl.arange(0, TILE_I), first_k + tl.arange(0, TILE_K)
    here = i[:, None] * n + k[None, :]
    unit_s, unit_t = _per_unit(mean_s), _per_unit(mean_t)
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
    factor = tl.load(scale)
    if GRADIENT:
        pull = tl.where(below, 2.0 * factor * unit_s * pull, 0.0)
        tl.store(gradient + here, tl.load(gradient + here) + pull)
    loss = tl.where(below, 2.0 * loss.to(tl.float64), 0.0)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + place + program, factor * tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit
def _at_vertices(  # type: ignore[no-untyped-def]
    fast,
    s,
    t,
    mean_s,
    mean_t,
    near,
    wanted,
    scale,
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
        if tl.load(wanted) == 0:
            return
    j = (first + tl.program_id(0)) * TILE_J + tl.arange(0, TILE_J)
    i = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    here = j[:, None] * n + i[None, :]
    unit_s, unit_t = _per_unit(mean_s), _per_unit(mean_t)
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
    pull = tl.load(scale) * unit_s * pull
    tl.store(gradient + here, tl.load(gradient + here, mask=mine) + pull, mask=mine)
