"""Rankings of samples by distance, and the probability of a ranking."""

import torch
from torch import Tensor


def nearest_samples(distance: Tensor, length: int) -> Tensor:
    """Row numbers of each sample's nearest other samples, nearest first; ties go to the first in the batch.

    Shapes: (N, N) -> (N, min(length, N - 1)).

    Args:
        distance: Distances, or anything that is small for near samples; the diagonal is ignored.
        length: Number of samples in each list.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 3.0])
        >>> nearest_samples((x[:, None] - x).abs(), 2).tolist()
        [[1, 2], [0, 2], [1, 0]]
    """
    others = distance.detach().clone().fill_diagonal_(float("inf"))
    return others.argsort(dim=1, stable=True)[:, : min(length, len(distance) - 1)]


def log_probability_of_order(scores: Tensor) -> Tensor:
    r"""Log-probability of drawing a list in its order, where high scores are drawn first (Plackett and Luce).

    .. math:: \log P = \sum_{i=1}^{L} \Big( s_i - \log \sum_{j \ge i} e^{s_j} \Big)

    Shapes: (..., L) -> (...); 0 for lists of up to one entry.

    Args:
        scores: Scores of the list's entries, in its order.

    Example:
        >>> log_probability_of_order(torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])).exp()
        tensor([0.4863, 0.0242])
    """
    rest = [scores[..., i:].logsumexp(-1) for i in range(scores.shape[-1])]
    return scores.sum(-1) - (torch.stack(rest).sum(0) if rest else 0)


def permutations(length: int, device: torch.device | str = "cpu") -> Tensor:
    """All permutations of the numbers from 0 to ``length`` - 1, one per row, created on the device.

    Shapes: (length!, length).

    Example:
        >>> permutations(3).tolist()
        [[2, 1, 0], [2, 0, 1], [1, 2, 0], [0, 2, 1], [1, 0, 2], [0, 1, 2]]
    """
    orders = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for new in range(length):
        column = torch.full((len(orders), 1), new, dtype=torch.int64, device=device)
        orders = torch.cat([torch.cat([orders[:, :at], column, orders[:, at:]], 1) for at in range(new + 1)])
    return orders
