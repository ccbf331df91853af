"""Keeping squares in range: division by powers of two, which rounds nothing and so changes nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 2.0**40  # its square is far from overflow, and far above every epsilon that a method adds to a variance


def exact(x: Tensor) -> Tensor:
    """The same numbers in float64, where no square of a float32 overflows or vanishes; MPS has float32 at most.

    Example:
        >>> exact(torch.ones(2)).dtype
        torch.float64
    """
    return x.to(torch.promote_types(x.dtype, torch.float32) if x.device.type == "mps" else torch.float64)


def smallest_length(dtype: torch.dtype) -> float:
    """Below this length a row counts as zero: its direction would pass a gradient that comes close to overflow.

    Example:
        >>> f"{smallest_length(torch.float32):.1e}"
        '1.2e-35'
    """
    return 1024 * torch.finfo(dtype).tiny


def ordinary(lengths: Tensor, rows: Tensor) -> bool:
    """Whether these lengths of rows, or squares of them, are far from where their own squares leave the range.

    Then a formula needs no scaling, and saves two passes over its input. Zero rows do no harm; a row that is not zero,
    but whose length is, has underflowed. Only a CPU is asked: on other devices the host would have to wait for the
    answer, so that there it is no.

    Shapes: (...), (..., D) -> a truth value.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]])
        >>> ordinary(rows[:2].square().sum(1), rows[:2]), ordinary(rows.square().sum(1), rows)
        (True, False)
    """
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    zero, found = lengths.detach() == 0, lengths.detach()
    low, high = torch.where(zero, 1, found).aminmax()
    return bool(low > 1 / _LARGE) and bool(high < _LARGE) and not (zero.any() and rows.detach()[zero].any())


def far_above_rounding(differences: Tensor) -> bool:
    """Whether all these differences of numbers of about 1 have digits left; asked of a CPU alone, as :func:`ordinary`.

    Example:
        >>> far_above_rounding(torch.tensor([0.5, 0.1])), far_above_rounding(torch.tensor([0.5, 1e-6]))
        (True, False)
    """
    if differences.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(differences.detach().min() > torch.finfo(differences.dtype).eps ** 0.5)


def power_of_two(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest power of two that no entry's magnitude stays below of all those along ``dim``; a constant.

    Divided by it, the largest magnitude along ``dim`` lies between 1 and 2. It is at least :func:`smallest_length`, so
    that zeros may be divided as well. No bit of a mantissa changes, and the host never waits for the device.

    Shapes: any -> the same with 1 along ``dim``.

    Args:
        x: Numbers.
        dim: Dimensions to look along.

    Returns:
        Tensor of the same dtype that passes no gradient.

    Example:
        >>> power_of_two(torch.tensor([[3.0, -5.0], [0.3, 0.1]]), dim=1).tolist()
        [[4.0], [0.25]]
    """
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim, keepdim=True)
    largest = largest.clamp(min=smallest_length(x.dtype))
    power: Tensor = largest / (2 * torch.frexp(largest).mantissa)
    return power


def not_too_large(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    r"""Numbers along ``dim`` brought below :math:`2^{41}` by a power of two, where they are not.

    For formulas such as batch normalisation, which no scale changes except through an epsilon beside the variance. At
    magnitudes of :math:`2^{40}` that epsilon is lost in rounding already, while squares in float32 are in range.

    Shapes: any -> the same.

    Example:
        >>> not_too_large(torch.tensor([[3.0, 1.0], [2.0**100, 2.0**90]]), dim=1).tolist()
        [[3.0, 1.0], [1099511627776.0, 1073741824.0]]
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(x.detach().abs().amax() < _LARGE):
        return x
    return x / (power_of_two(x, dim) / _LARGE).clamp(min=1)
