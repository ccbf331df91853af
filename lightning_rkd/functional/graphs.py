"""Graphs over the samples of a batch: nearest neighbours, shared classes, and normalised adjacency."""

import torch
from torch import Tensor


def knn_graph(
    distance: Tensor, k: int, *, include_self: bool = True, who: str = "knn_graph", argument: str = "k"
) -> Tensor:
    """Directed k-nearest-neighbour graph of a batch: entry (i, j) is true where j is among the k nearest of i.

    With ``include_self`` a sample is always the first of its own k neighbours, however many duplicates it has;
    otherwise it is none of them. Ties go to the first sample in the batch. No gradient passes.

    Shapes: (N, N) -> (N, N), boolean.

    Args:
        distance: Distances, or negated similarities; the diagonal is ignored.
        k: Neighbours of each sample; with ``include_self`` the sample itself is one of them.
        include_self: Count a sample as its own neighbour.
        who: The name that error messages begin with.
        argument: The name of k in error messages.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 3.0])
        >>> knn_graph((x[:, None] - x).abs(), k=2).int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 1, 1]]
        >>> knn_graph((x[:, None] - x).abs(), k=1, include_self=False).int().tolist()
        [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    """
    n = len(distance)
    if distance.shape != (n, n):
        raise ValueError(f"{who}: a graph is built from an (N, N) matrix, got {tuple(distance.shape)}")
    if k < 1:
        raise ValueError(f"{who}: {argument} is the number of neighbours of each sample, at least 1, got {k}")
    needed = k if include_self else k + 1
    if n < needed:
        raise ValueError(
            f"{who}: a graph with {argument}={k}, the sample itself {'' if include_self else 'not '}counted, needs at "
            f"least {needed} samples, got a batch of {n}; lower {argument}, or use larger batches "
            "(DataLoader(drop_last=True) leaves the last short one out)"
        )
    first_or_last = float("-inf") if include_self else float("inf")
    nearest = distance.detach().clone().fill_diagonal_(first_or_last).argsort(dim=1, stable=True)[:, :k]
    return torch.zeros_like(distance, dtype=torch.bool).scatter_(1, nearest, True)


def same_class(labels: Tensor) -> Tensor:
    """Matrix of pairs that share a class: booleans for class numbers, inner products for soft labels.

    Shapes: (N,) -> (N, N), boolean; (N, K) -> (N, N) in the dtype of the labels.

    Example:
        >>> same_class(torch.tensor([5, 2, 5])).int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    return labels[:, None] == labels if labels.ndim == 1 else labels @ labels.T


def normalised_adjacency(adjacency: Tensor) -> Tensor:
    r"""Symmetrically normalised adjacency of a weighted graph.

    .. math:: \tilde A = D^{-1/2} A D^{-1/2}, \qquad D = \mathrm{diag}(A \mathbf 1)

    A sample whose degree is no more than rounding (N times the machine epsilon) is isolated: its row and column are 0
    and pass no gradient.

    Shapes: (N, N) -> (N, N).

    Args:
        adjacency: Symmetric matrix without negative weights.

    Example:
        >>> normalised_adjacency(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 3.0], [0.0, 3.0, 0.0]]))[1]
        tensor([0.5000, 0.0000, 0.8660])
    """
    degree = adjacency.sum(1)
    isolated = degree <= len(adjacency) * torch.finfo(adjacency.dtype).eps
    scale = torch.where(isolated, 0, torch.where(isolated, 1, degree).rsqrt())
    return scale[:, None] * adjacency * scale
