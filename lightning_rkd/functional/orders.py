"""Hinges over all pairs of a long list, without the pairs: by counting, in O(M log M) time and O(M) memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def order_hinge(student: Tensor, teacher: Tensor, *, margin: float) -> Tensor:
    r"""Mean hinge over all pairs of entries that the student does not order as the teacher does, by a margin.

    .. math::
        L = \frac{2}{M (M - 1)} \sum_{i \prec j} \max(0,\; s_i - s_j + m)

    :math:`i \prec j` holds where :math:`t_i < t_j`, and between equal entries of the teacher where i comes first. The
    sum is linear wherever no hinge is at its kink: its slope at an entry is a difference of two counts, of later
    entries that are too small and of earlier ones that are too large, which give the value as well.

    Shapes: (M,), (M,) -> scalar; 0 for fewer than two entries.

    Args:
        student: Numbers to be ordered.
        teacher: Numbers whose order is wanted; they receive no gradient.
        margin: m.

    Example:
        >>> order_hinge(torch.tensor([0.1, 0.5, 0.4]), torch.tensor([1.0, 2.0, 3.0]), margin=0.2)
        tensor(0.1000)
    """
    m = len(student)
    order = teacher.detach().argsort(stable=True)
    ascending, places = student.detach()[order].sort()
    index = torch.arange(m, dtype=torch.int32, device=student.device)
    ranks = torch.empty_like(index).scatter_(0, places, index)
    raised = ascending + margin
    # of each entry: how many are smaller than it and the margin, and how many are not larger with the margin
    below = torch.searchsorted(ascending, raised, out_int32=True)[ranks]
    outside = torch.searchsorted(raised, ascending, right=True, out_int32=True)[ranks]
    smaller, larger = _count_before(ranks, [(index + 1, below), (index, outside)])
    later, earlier = below - smaller, index - larger
    slopes = torch.empty_like(ascending).scatter_(0, order, (later - earlier).to(ascending.dtype))
    return ((slopes * student).sum() + margin * later.sum().to(slopes.dtype)) / max(1, m * (m - 1) // 2)


def _count_before(ranks: Tensor, queries: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For pairs of ends and limits, count the entries of ``ranks[:end]`` below each limit.

    A wavelet tree over a permutation of 0 to M - 1, level by level: the ranks stand in blocks that agree in their
    higher bits, which begin at their smallest rank, and keep their order within a block. Ends and limits reach M.
    """
    counts = [torch.zeros_like(ends) for ends, _ in queries]
    here = torch.arange(len(ranks), dtype=ranks.dtype, device=ranks.device)
    places = [ends for ends, _ in queries]
    for bit in reversed(range(len(ranks).bit_length())):
        half = 1 << bit
        small = F.pad((ranks & half == 0).cumsum(0, dtype=ranks.dtype), (1, 0))
        for k, (_, limits) in enumerate(queries):
            places[k], found = _descend(small, half, limits, places[k])
            counts[k] += found
        ranks = torch.empty_like(ranks).scatter_(0, _descend(small, half, ranks, here)[0].long(), ranks)
    return counts


def _descend(small: Tensor, half: int, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Places within the blocks of the next level, and how many before them are in the half below that of the value."""
    start, upper = values & -2 * half, values & half != 0
    found = small.index_select(0, places) - (start >> 1)  # the blocks before are full
    return torch.where(upper, places + half - found, start + found), found * upper
