r"""RKD's angle loss on a GPU: loss and gradient of all triplets in registers, written in Triton.

Two kernels see the triplets. One holds a tile of (side i, side k), k < i, and walks over the vertices j: it sums the
loss and what pulls at the distance across. The other holds a tile of (vertex j, side i) and walks over all other sides
k: it sums what pulls at the distances from the vertex. Every program writes entries of its own, so that nothing depends
on the order in which programs run, and nothing of size N^3 exists. Cosines are computed as on the CPU
(:mod:`lightning_rkd.kernels.angle_cpu`), close pairs in float64 too: where there are any, which only the device knows,
both kernels run once more for the triplets in which they take part.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.kernels.units import NEAR, in_units_of_mean

_ACROSS = {"TILE_I": 64, "TILE_K": 32, "UNROLL": 1, "num_warps": 4}
_AT = {"TILE_J": 32, "TILE_I": 64, "UNROLL": 1, "num_warps": 4}
_PADDED = 64  # sizes are multiples of it: programs then need not look where a matrix ends


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
    """As :func:`lightning_rkd.relations.angle_tiles.loss_and_gradient`, which says what goes in and what comes out.

    Everything comes back in float64, and the host does not wait for the device.
    """
    start, stop = vertices
    own, given = (in_units_of_mean(side.detach().to(torch.float64)) for side in (student, teacher))
    rows = slice(start, stop)
    total = 0.5 * ((own[0][rows] > 0) ^ (given[0][rows] > 0)).sum() if official else own[0].new_zeros(())
    gradient = torch.zeros_like(own[0]) if with_gradient else None
    if stop > start:
        near = _near(own[0]) | _near(given[0]) if dtype == torch.float32 else None
        total = total + _pass([_side(side, dtype, near) for side in (own, given)], None, start, stop, gradient)
        if near is not None:
            sides = [_side(side, torch.float64, None) for side in (own, given)]
            total = total + _pass(sides, near, start, stop, gradient)
    if gradient is not None:
        gradient = gradient.mul_(factor / own[2]).fill_diagonal_(0)
    return factor * total, gradient


def _near(squared: Tensor) -> Tensor:
    return (squared > 0) & (squared < NEAR * squared.max())


def _side(units: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, left_out: Tensor | None) -> tuple[Tensor, ...]:
    """Squared distances, their inverse roots and their roots; at pairs left out every cosine is 0."""
    squared, inverse, _ = units
    root = squared * inverse
    if left_out is not None:
        inverse, root = inverse.masked_fill(left_out, 0), root.masked_fill(left_out, 0)
    return tuple(_padded(x.to(dtype)) for x in (squared, inverse, root))


def _padded(x: Tensor) -> Tensor:
    more = -len(x) % _PADDED
    return F.pad(x, (0, more, 0, more)).contiguous()


def _pass(
    sides: list[tuple[Tensor, ...]], near: Tensor | None, start: int, stop: int, gradient: Tensor | None
) -> Tensor:
    """One walk over the triplets, or over those with a near pair; adds to the gradient and returns the loss."""
    (s, rs, ds), (t, rt, dt) = sides
    n = len(s)
    wanted = s if near is None else near.any().to(torch.int32)  # read by the programs themselves
    flags = s if near is None else _padded(near.to(torch.int8))
    matrices = (s, rs, ds, t, rt, dt, flags, wanted)
    common: dict[str, Any] = {"NEAR": near is not None, "WIDE": s.dtype == torch.float64}
    grid = (n // _ACROSS["TILE_I"], n // _ACROSS["TILE_K"])
    losses = torch.zeros(grid, dtype=torch.float64, device=s.device)
    across = torch.zeros_like(s) if gradient is not None else s
    _across[grid](*matrices, across, losses, n, start, stop, GRADIENT=gradient is not None, **_ACROSS, **common)
    if gradient is not None:
        at_weight, at_cosine = torch.zeros((2, n, n), dtype=s.dtype, device=s.device)
        first = start // _AT["TILE_J"]
        grid = (triton.cdiv(stop, _AT["TILE_J"]) - first, n // _AT["TILE_I"])
        _at_vertices[grid](*matrices, at_weight, at_cosine, n, start, stop, first, **_AT, **common)
        rows = slice(len(gradient))
        at_cosine *= rs * rs
        gradient.add_(across[rows, rows]).add_(at_weight[rows, rows], alpha=2).sub_(at_cosine[rows, rows])
    return losses.sum()


@triton.jit
def _huber(e):  # type: ignore[no-untyped-def]
    """Derivative of the Huber function; NaN stays NaN."""
    return tl.maximum(tl.minimum(e, 1.0, tl.PropagateNan.ALL), -1.0, tl.PropagateNan.ALL)


@triton.jit
def _across(  # type: ignore[no-untyped-def]
    s,
    rs,
    ds,
    t,
    rt,
    dt,
    near,
    wanted,
    across,
    losses,
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
    if NEAR:  # noqa: SIM102 # known when the kernel is compiled, what follows when it runs
        if tl.load(wanted) == 0:
            return
    first_i, first_k = tl.program_id(0) * TILE_I, tl.program_id(1) * TILE_K
    if first_k >= first_i + TILE_I:  # the mirror image of a tile below the diagonal
        return
    i, k = first_i + tl.arange(0, TILE_I), first_k + tl.arange(0, TILE_K)
    here = i[:, None] * n + k[None, :]
    side_s = tl.load(s + here)
    side_t = tl.load(t + here)
    pull = tl.zeros((TILE_I, TILE_K), dtype=tl.float64 if WIDE else tl.float32)
    loss = tl.zeros((TILE_I, TILE_K), dtype=tl.float64 if WIDE else tl.float32)
    for j in tl.range(start, stop, loop_unroll_factor=UNROLL):
        # rows of symmetric matrices stand for their columns
        a = tl.load(s + j * n + i)[:, None]
        h = 0.5 * tl.load(rs + j * n + i)[:, None]
        b = tl.load(t + j * n + i)[:, None]
        q = 0.5 * tl.load(rt + j * n + i)[:, None]
        r = tl.load(rs + j * n + k)[None, :]
        d = tl.load(ds + j * n + k)[None, :]
        rr = tl.load(rt + j * n + k)[None, :]
        dd = tl.load(dt + j * n + k)[None, :]
        e = h * ((a - side_s) * r + d) - q * ((b - side_t) * rr + dd)
        if NEAR:
            near_i = tl.load(near + j * n + i)[:, None]
            near_k = tl.load(near + j * n + k)[None, :]
            e = tl.where((near_i != 0) | (near_k != 0), e, 0.0)
        g = _huber(e)
        loss += g * (e - 0.5 * g)
        if GRADIENT:
            pull -= h * (g * r)
    # entries above the diagonal are left to their mirror images
    below = k[None, :] < i[:, None]
    if GRADIENT:
        tl.store(across + here, tl.where(below, 2.0 * pull, 0.0))
    loss = tl.where(below, 2.0 * loss.to(tl.float64), 0.0)
    tl.store(losses + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit
def _at_vertices(  # type: ignore[no-untyped-def]
    s,
    rs,
    ds,
    t,
    rt,
    dt,
    near,
    wanted,
    at_weight,
    at_cosine,
    n,
    start,
    stop,
    first,
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
    a = tl.load(s + here)
    h = 0.5 * tl.load(rs + here)
    b = tl.load(t + here)
    q = 0.5 * tl.load(rt + here)
    if NEAR:
        near_i = tl.load(near + here)
    weight = tl.zeros((TILE_J, TILE_I), dtype=tl.float64 if WIDE else tl.float32)
    cosine = tl.zeros((TILE_J, TILE_I), dtype=tl.float64 if WIDE else tl.float32)
    for k in tl.range(0, n, loop_unroll_factor=UNROLL):
        si = tl.load(s + k * n + i)[None, :]
        ti = tl.load(t + k * n + i)[None, :]
        r = tl.load(rs + k * n + j)[:, None]
        d = tl.load(ds + k * n + j)[:, None]
        rr = tl.load(rt + k * n + j)[:, None]
        dd = tl.load(dt + k * n + j)[:, None]
        c = h * ((a - si) * r + d)
        e = c - q * ((b - ti) * rr + dd)
        if NEAR:
            near_k = tl.load(near + k * n + j)[:, None]
            e = tl.where((near_i != 0) | (near_k != 0), e, 0.0)
        g = _huber(e)
        weight += g * r
        cosine += c * g
    # at k = i both cosines are 1, and cancel, but not where j and i are duplicates in one network only
    r, rr = 2.0 * h, 2.0 * q
    c = h * (a * r + tl.load(ds + here))
    e = c - q * (b * rr + tl.load(dt + here))
    if NEAR:
        e = tl.where(near_i != 0, e, 0.0)
    e = tl.where((r == 0.0) != (rr == 0.0), e, 0.0)
    weight -= e * r
    cosine -= c * e
    mine = ((j >= start) & (j < stop))[:, None] & (i >= 0)[None, :]
    tl.store(at_weight + here, weight * h, mask=mine)
    tl.store(at_cosine + here, cosine, mask=mine)
