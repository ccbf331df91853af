"""Squared distances on a GPU, of one network or of two at once, and the gradient of the rows, written in Triton.

Rows are centred and multiplied in float64 as they are read. Matrices of distances may be padded with zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMS = 5
"""Partial results of a tile: sums of squared distances, largest one, smallest one above 0 with its sign changed, sum of
distances, number of those above 0."""

FUSED = {"enable_fp_fusion": True}
"""Products and sums are fused, which half of the speed rests on; Triton 3.10 no longer does that by default."""
_MEANS = {"ROWS": 64, "COLUMNS": 32} | FUSED
PULL = {"TILE": 32, "COLUMNS": 32, "STEP": 32} | FUSED


def squared(x: Tensor, duplicate: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Squared distances, 0 where they are at most ``duplicate`` times the squared norms, and what ``pulled`` takes."""
    x = x.detach().contiguous()
    distances, mean, _ = measure([x], len(x), duplicate)
    return distances[0], (x, mean)


def pulled(pull: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Gradient of rows from the gradient of their squared distances."""
    pull, (n, width) = pull.detach().to(torch.float64).contiguous(), x.shape
    gradient = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if n:
        others = (x,) * 5  # not read
        flags = {"GRADIENT": True, "DISTANCES": False, "LOSS": False}
        pull_rows[grid_of(x)](x, mean, pull, gradient, *others, n, n, width, 0, 0, **flags, **PULL)
    return gradient


def measure(networks: list[Tensor], size: int, duplicate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances within one or two networks, padded to (size, size); column means; partial sums of the tiles."""
    x, y = networks[0], networks[-1]
    n, width = x.shape
    other = y.shape[1] if len(networks) > 1 else 0
    tile = tile_of(size)
    tiles, blocks = triton.cdiv(size, tile), (triton.cdiv(d, _MEANS["COLUMNS"]) for d in (width, other))
    mean, distances, sums = (
        torch.empty(shape, dtype=torch.float64, device=x.device)
        for shape in ((width + other,), (len(networks), size, size), (len(networks), SUMS, tiles * (tiles + 1) // 2))
    )
    _means[(sum(blocks),)](x, y, mean, n, width, other, **_MEANS)
    if size:
        _distances[(tiles, tiles, len(networks))](
            x, y, mean, distances, sums, n, size, width, other, DUPLICATE=duplicate, TILE=tile, STEP=16, **FUSED
        )
    return distances, mean, sums


def grid_of(x: Tensor) -> tuple[int, int]:
    """Programs that make a gradient of rows."""
    return triton.cdiv(len(x), PULL["TILE"]), triton.cdiv(x.shape[1], PULL["COLUMNS"])


def tile_of(size: int) -> int:
    """Edge of a tile of distances: small batches need more programs, large ones fewer partial sums."""
    return 32 if size <= 1024 else 64


@triton.jit
def total(values, count, BLOCK: tl.constexpr = 512):  # type: ignore[no-untyped-def]
    """Sum of an array, in an order that does not change."""
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        here = first + tl.arange(0, BLOCK)
        sums += tl.load(values + here, mask=here < count, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def largest(values, count, BLOCK: tl.constexpr = 512):  # type: ignore[no-untyped-def]
    """Largest entry of an array."""
    most = tl.full((BLOCK,), float("-inf"), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        here = first + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(values + here, mask=here < count, other=float("-inf")))
    return tl.max(most, axis=0)


@triton.jit
def _means(  # type: ignore[no-untyped-def]
    x, y, mean, n, width, other, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    block, blocks = tl.program_id(0), tl.cdiv(width, COLUMNS)
    if block < blocks:
        _column_means(x, mean, n, width, block, ROWS, COLUMNS)
    else:
        _column_means(y, mean + width, n, other, block - blocks, ROWS, COLUMNS)


@triton.jit
def _column_means(x, mean, n, width, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        inside = (i < n)[:, None] & (d < width)[None, :]
        sums += tl.load(x + i.to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(mean + d, tl.sum(sums, axis=0) / n, mask=d < width)


@triton.jit
def _distances(  # type: ignore[no-untyped-def]
    x,
    y,
    mean,
    distances,
    sums,
    n,
    size,
    width,
    other,
    DUPLICATE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    row, column = tl.program_id(0), tl.program_id(1)
    if column > row:  # the mirror image of a tile below the diagonal
        return
    i, k = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    network = tl.program_id(2)
    if network == 0:
        gram, norm_i, norm_k = _products(x, mean, i, k, n, width, TILE, STEP)
    else:
        gram, norm_i, norm_k = _products(y, mean + width, i, k, n, other, TILE, STEP)
    both = norm_i[:, None] + norm_k[None, :]
    value = both - 2.0 * gram
    inside = (i < n)[:, None] & (k < n)[None, :] & (i[:, None] != k[None, :])
    value = tl.where((value <= DUPLICATE * both) | (inside == 0), 0.0, value)
    distances += network.to(tl.int64) * size * size
    inside = (i < size)[:, None] & (k < size)[None, :]
    tl.store(distances + i.to(tl.int64)[:, None] * size + k[None, :], value, mask=inside)
    times = tl.where(column < row, 2.0, 1.0)
    if column < row:
        tl.store(distances + k.to(tl.int64)[:, None] * size + i[None, :], tl.trans(value), mask=tl.trans(inside))
    tiles = tl.num_programs(0) * (tl.num_programs(0) + 1) // 2
    sums += network * 5 * tiles + row * (row + 1) // 2 + column
    positive = value > 0.0
    tl.store(sums, times * tl.sum(tl.sum(value, axis=1), axis=0))
    tl.store(sums + tiles, tl.max(tl.max(value, axis=1), axis=0))
    least = tl.where(positive, -value, float("-inf"))
    tl.store(sums + 2 * tiles, tl.max(tl.max(least, axis=1), axis=0))
    tl.store(sums + 3 * tiles, times * tl.sum(tl.sum(tl.sqrt(value), axis=1), axis=0))
    tl.store(sums + 4 * tiles, times * tl.sum(tl.sum(positive.to(tl.float64), axis=1), axis=0))


@triton.jit
def _products(x, mean, i, k, n, width, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inner products of two tiles of centred rows, and their squared norms."""
    gram = tl.zeros((TILE, TILE), dtype=tl.float64)
    norm_i = tl.zeros((TILE,), dtype=tl.float64)
    norm_k = tl.zeros((TILE,), dtype=tl.float64)
    for first in range(0, width, STEP):
        d = first + tl.arange(0, STEP)
        a = _centred(x, mean, i, d, n, width)
        b = _centred(x, mean, k, d, n, width)
        gram = tl.dot(a, tl.trans(b), gram, out_dtype=tl.float64)
        norm_i += tl.sum(a * a, axis=1)
        norm_k += tl.sum(b * b, axis=1)
    return gram, norm_i, norm_k


@triton.jit
def _centred(x, mean, i, d, n, width):  # type: ignore[no-untyped-def]
    """Some columns of some rows minus their mean; rows that do not exist are those of the mean's negative."""
    inside = (i < n)[:, None] & (d < width)[None, :]
    rows = tl.load(x + i.to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float64)
    return rows - tl.load(mean + d, mask=d < width, other=0.0)[None, :]


@triton.jit
def pull_rows(  # type: ignore[no-untyped-def]
    x,
    mean,
    pull,
    gradient,
    distances,
    units,
    losses,
    products,
    loss,
    n,
    size,
    width,
    terms,
    tiles,
    GRADIENT: tl.constexpr,
    DISTANCES: tl.constexpr,
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradient of rows from one of their squared distances, without what ``by_mean`` subtracts; and a loss's sum."""
    if LOSS:  # noqa: SIM102 # a constant of compilation, the next condition is not
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(loss, total(losses, terms))
    if GRADIENT:
        i = tl.program_id(0) * TILE + tl.arange(0, TILE)
        d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        if DISTANCES:
            by_mean = tl.load(units + 3) * (total(products, tiles) / tl.load(units + 4))
        product = tl.zeros((TILE, COLUMNS), dtype=tl.float64)
        sums = tl.zeros((TILE,), dtype=tl.float64)
        for first in range(0, n, STEP):
            k = first + tl.arange(0, STEP)
            inside = (i < n)[:, None] & (k < n)[None, :] & (i[:, None] != k[None, :])  # the diagonal cancels
            here = i.to(tl.int64)[:, None] * size + k[None, :]
            mirrored = k.to(tl.int64)[:, None] * size + i[None, :]
            v = tl.load(pull + here, mask=inside, other=0.0)
            v += tl.trans(tl.load(pull + mirrored, mask=tl.trans(inside), other=0.0))
            if DISTANCES:
                squared = tl.load(distances + here, mask=inside, other=0.0)
                apart = squared > 0.0
                v -= tl.where(apart, by_mean / tl.sqrt(tl.where(apart, squared, 1.0)), 0.0)
            product = tl.dot(v, _centred(x, mean, k, d, n, width), product, out_dtype=tl.float64)
            sums += tl.sum(v, axis=1)
        result = 2.0 * (sums[:, None] * _centred(x, mean, i, d, n, width) - product)
        inside = (i < n)[:, None] & (d < width)[None, :]
        tl.store(gradient + i.to(tl.int64)[:, None] * width + d[None, :], result, mask=inside)
