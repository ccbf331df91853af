"""Scaling and centring without loss of digits: division by powers of two never rounds and keeps squares in range."""

import torch
from torch import Tensor

_LARGE = 2.0**40  # its square is far from overflow and far above the epsilons that methods add to a variance


def to_float64(x: Tensor) -> Tensor:
    """Numbers in float64, where no square of a float32 overflows or vanishes; in float32 on MPS, which has no float64.

    Example:
        >>> to_float64(torch.ones(2)).dtype
        torch.float64
    """
    return x.to(torch.promote_types(x.dtype, torch.float32) if x.device.type == "mps" else torch.float64)


def smallest_norm(dtype: torch.dtype) -> float:
    """Norm below which a row counts as zero, since the gradient of its direction would come close to overflow."""
    return 1024 * torch.finfo(dtype).tiny


def squares_in_range(lengths: Tensor, rows: Tensor) -> bool:
    """Check that norms of rows (or their squares) may be squared again without overflow or underflow.

    Where it is true a formula needs no scaling, which saves two passes over its input. Zero rows are fine; a row that
    is not zero but has norm 0 has underflowed. It is always false on other devices than the CPU, where the host would
    have to wait for the answer, and in compiled code.

    Shapes: (...), (..., D) -> bool.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]])
        >>> squares_in_range(rows[:2].square().sum(1), rows[:2]), squares_in_range(rows.square().sum(1), rows)
        (True, False)
    """
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    zero, found = lengths.detach() == 0, lengths.detach()
    low, high = torch.where(zero, 1, found).aminmax()
    return bool(low > 1 / _LARGE) and bool(high < _LARGE) and not (zero.any() and rows.detach()[zero].any())


def far_above_rounding(differences: Tensor) -> bool:
    """Check that differences of numbers of about 1 have digits left; only on the CPU, as :func:`squares_in_range`."""
    if differences.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(differences.detach().min() > torch.finfo(differences.dtype).eps ** 0.5)


def power_of_two(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Largest power of two below or at the largest magnitude along ``dim``; passes no gradient.

    Divided by it, the largest magnitude along ``dim`` lies between 1 and 2. It is at least :func:`smallest_norm`, so
    that zeros may be divided as well. Division changes no mantissa, and the host never waits for the device.

    Shapes: any -> the same with 1 along ``dim``.

    Example:
        >>> power_of_two(torch.tensor([[3.0, -5.0], [0.3, 0.1]]), dim=1).tolist()
        [[4.0], [0.25]]
    """
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim, keepdim=True)
    largest = largest.clamp(min=smallest_norm(x.dtype))
    power: Tensor = largest / (2 * torch.frexp(largest).mantissa)
    return power


def limit_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    r"""Scale numbers along ``dim`` below :math:`2^{41}` by a power of two, where they exceed it.

    For formulas such as batch normalisation, whose only dependence on scale is an epsilon beside the variance: at
    magnitudes of :math:`2^{40}` the epsilon is lost in rounding already, while squares in float32 are in range.

    Shapes: any -> the same.

    Example:
        >>> limit_magnitude(torch.tensor([[3.0, 1.0], [2.0**100, 2.0**90]]), dim=1).tolist()
        [[3.0, 1.0], [1099511627776.0, 1073741824.0]]
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(x.detach().abs().amax() < _LARGE):
        return x
    return x / (power_of_two(x, dim) / _LARGE).clamp(min=1)


def centre_columns(x: Tensor) -> Tensor:
    r"""Columns minus their means; constant columns become exact zeros, however far from 0 they are.

    .. math:: x_{nd} - \frac{1}{N} \sum_m x_{md}

    The first row is subtracted first, because the rounded mean of equal numbers need not be that number.

    Shapes: (N, D) -> (N, D), float64 (float32 on MPS).

    Example:
        >>> centre_columns(torch.tensor([[1.0, 0.1], [2.0, 0.1], [6.0, 0.1]])).tolist()
        [[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
    """
    rows = to_float64(x)
    rows = rows - rows[:1].detach()
    return rows - rows.mean(0)
