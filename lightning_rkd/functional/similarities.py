"""Similarities between the samples of a batch: cosines and Tanimoto coefficients, safe for zero rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rkd.functional.distances import safe_sqrt
from lightning_rkd.functional.scales import power_of_two, squares_in_range, to_float64


def unit_rows(x: Tensor, *, eps: float = 0.0) -> Tensor:
    r"""Rows divided by their Euclidean norm; zero rows stay zero and pass no gradient.

    .. math:: \hat x_i = x_i / (\lVert x_i \rVert_2 + \varepsilon)

    ``torch.nn.functional.normalize`` passes a gradient 1e12 times too large to a zero row, and returns zero for rows
    whose squares overflow. Here every norm works whose gradient, about one over the norm, stays in range: a row counts
    as zero below 1.2e-35 in float32 (:func:`~lightning_rkd.functional.scales.smallest_norm`).

    Shapes: (N, D) -> (N, D).

    Args:
        x: Embeddings.
        eps: Added to the norm, as some published codes do.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if squares_in_range(norm[:, 0], x):
        zero, length = norm == 0, norm + eps if eps else norm
    else:
        scale = power_of_two(x, 1)
        x = x / scale
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        zero = norm < 1  # the smallest scale did not bring the row to 1: it is too short; NaN stays NaN
        length = norm + eps / scale if eps else norm
    return torch.where(zero, 0, x / torch.where(zero, 1, length))


def row_norms(x: Tensor) -> Tensor:
    r"""Euclidean norms of the rows, right for every length; zero rows pass no gradient.

    .. math:: \lVert x_i \rVert_2

    Shapes: (N, D) -> (N,).

    Example:
        >>> row_norms(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
        tensor([5.0000e+30, 0.0000e+00])
    """
    squared = x.square().sum(1)
    if squares_in_range(squared, x):
        return safe_sqrt(squared)
    scale = power_of_two(x, 1)
    return scale[:, 0] * safe_sqrt((x / scale).square().sum(1))


def cosine_similarities(x: Tensor, *, eps: float = 0.0) -> Tensor:
    r"""Cosines of the angles between the rows of a batch; 0 for zero rows.

    .. math:: C_{ij} = \langle \hat x_i, \hat x_j \rangle

    Shapes: (N, D) -> (N, N).

    Args:
        x: Embeddings.
        eps: Added to the norms, as some published codes do.

    Example:
        >>> cosine_similarities(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))[0]
        tensor([1.0000, 0.7071, 0.0000])
    """
    unit = unit_rows(x, eps=eps)
    return unit @ unit.T


def tanimoto_coefficients(x: Tensor) -> Tensor:
    r"""Tanimoto coefficients between the rows of a batch.

    .. math:: T_{ij} = \frac{\langle x_i, x_j \rangle}
        {\lVert x_i \rVert^2 + \lVert x_j \rVert^2 - \langle x_i, x_j \rangle}

    Unlike a cosine it depends on norms: it is 1 for equal rows only. The coefficient of two zero rows is 1 and passes
    no gradient. Values lie in [-1/3, 1].

    Shapes: (N, D) -> (N, N).

    Example:
        >>> tanimoto_coefficients(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))[0]
        tensor([1.0000, 0.6667, 0.0000])
    """
    inner = x @ x.T
    if not squares_in_range(inner.diagonal(), x):
        inner = to_float64(x) @ to_float64(x).T
    squared = inner.diagonal()
    return _tanimoto(inner, squared[:, None] + squared).to(x.dtype)


def tanimoto_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Tanimoto coefficients of corresponding rows of two matrices; see :func:`tanimoto_coefficients`.

    Shapes: (N, D), (N, D) -> (N,).

    Example:
        >>> tanimoto_of_pairs(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor([0.6667, 1.0000])
    """
    dtype, a, b = a.dtype, to_float64(a), to_float64(b)
    return _tanimoto((a * b).sum(1), a.square().sum(1) + b.square().sum(1)).to(dtype)


def _tanimoto(inner: Tensor, squares: Tensor) -> Tensor:
    union = squares - inner  # at least half of squares: there is no cancellation
    zero = union <= torch.finfo(union.dtype).tiny
    return torch.where(zero, 1, inner / torch.where(zero, 1, union))


def flatten_layers(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Features as one matrix per layer, a row per sample; a single tensor is one layer.

    Shapes: (N, ...) or a sequence of them -> list of (N, D_l).

    Example:
        >>> [tuple(x.shape) for x in flatten_layers([torch.ones(5, 3, 2, 2), torch.ones(5, 8, 1, 1)])]
        [(5, 12), (5, 8)]
    """
    return [x.flatten(1) for x in ([features] if isinstance(features, Tensor) else features)]
