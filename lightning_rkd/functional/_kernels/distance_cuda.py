"""Element-wise work around the matrix products of squared distances and their backward pass, in one Triton launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32


def centred(x: Tensor) -> Tensor:
    """Rows minus their mean, in float64."""
    rows = x.detach().to(torch.float64)
    return rows - rows.mean(0)


def squared(rows: Tensor, duplicate: float) -> Tensor:
    """Squared distances of centred rows; 0 where they are at most ``duplicate`` times the squared norms."""
    gram, n = rows @ rows.T, len(rows)
    result = torch.empty_like(gram)
    if n:
        _from_gram[(triton.cdiv(n, _TILE), triton.cdiv(n, _TILE))](gram, result, n, DUPLICATE=duplicate, TILE=_TILE)
    return result


def pulled(pull: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows from the gradient of their squared distances."""
    pull, n = pull.detach().to(torch.float64).contiguous(), len(pull)
    laplacian = torch.empty_like(pull)
    if n:
        _laplacian[(triton.cdiv(n, _TILE),)](pull, laplacian, n, TILE=_TILE)
    return laplacian @ rows


@triton.jit
def _from_gram(gram, squared, n, DUPLICATE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (i < n)[:, None] & (k < n)[None, :]
    here = i[:, None] * n + k[None, :]
    norm_i = tl.load(gram + i * (n + 1), mask=i < n)
    norm_k = tl.load(gram + k * (n + 1), mask=k < n)
    both = norm_i[:, None] + norm_k[None, :]
    value = both - 2.0 * tl.load(gram + here, mask=inside)
    value = tl.where((value <= DUPLICATE * both) | (i[:, None] == k[None, :]), 0.0, value)
    tl.store(squared + here, value, mask=inside)


@triton.jit
def _laplacian(pull, result, n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float64)
    for first in range(0, n, TILE):
        k = first + tl.arange(0, TILE)
        inside = (i < n)[:, None] & (k < n)[None, :]
        here, mirrored = i[:, None] * n + k[None, :], k[None, :] * n + i[:, None]
        both = 2.0 * (tl.load(pull + here, mask=inside, other=0.0) + tl.load(pull + mirrored, mask=inside, other=0.0))
        total += tl.sum(both, axis=1)
        tl.store(result + here, -both, mask=inside & (i[:, None] != k[None, :]))
    # the contribution of the diagonal cancels
    own = 4.0 * tl.load(pull + i * (n + 1), mask=i < n, other=0.0)
    tl.store(result + i * (n + 1), total - own, mask=i < n)
