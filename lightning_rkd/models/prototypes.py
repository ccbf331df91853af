"""The task of few-shot learning: every row is classified by the mean of a few others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def prototypical_loss(embeddings: Tensor, labels: Tensor, shots: int = 1) -> Tensor:
    """The prototypical loss as a function; :class:`PrototypicalLoss` says what it computes.

    Shapes: (N, D), (N,) -> scalar.

    Args:
        embeddings: The rows of the batch.
        labels: Their classes.
        shots: Rows of a class that make its prototype.

    Returns:
        The loss.

    Raises:
        ValueError: No class has more than ``shots`` rows.

    Reference:
        Snell, Swersky and Zemel 2017, Prototypical Networks for Few-shot Learning, arXiv:1703.05175.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
        >>> prototypical_loss(rows, torch.tensor([0, 1, 0, 1]))
        tensor(0.0181)
    """
    classes, member = torch.unique(labels, return_inverse=True)
    membership = F.one_hot(member, len(classes))
    place = membership.cumsum(0).gather(1, member[:, None]).squeeze(1) - 1  # number of a row within its class
    support = place < shots
    if bool(support.all()):
        raise ValueError(
            f"PrototypicalLoss: no class has more than shots={shots} rows in this batch, so none is left to classify: "
            "draw more samples per class"
        )
    chosen = (membership * support[:, None]).to(embeddings.dtype)
    prototypes = chosen.T @ embeddings / chosen.sum(0)[:, None]
    queries = embeddings[~support]
    squared = (queries[:, None] - prototypes).square().sum(2)
    return F.cross_entropy(-squared, member[~support])


class PrototypicalLoss(nn.Module):
    r"""Classifies the rows of a P-by-K batch by the prototypes that the first few rows of each class make.

    .. math:: L = -\frac{1}{|Q|} \sum_{q \in Q} \log \frac{\exp(-\lVert s_q - c_{y_q} \rVert^2)}
        {\sum_k \exp(-\lVert s_q - c_k \rVert^2)}, \qquad c_k = \frac{1}{|S_k|} \sum_{i \in S_k} s_i

    with :math:`S_k` the first ``shots`` rows of class k and Q all other rows: each batch is an episode of P ways and
    ``shots`` shots. A task loss for ``DistillationModule(task_loss=PrototypicalLoss(5))``.

    Shapes: (N, D), (N,) -> scalar.

    Args:
        shots: Rows of a class that make its prototype.

    Raises:
        ValueError: ``shots`` below 1; in a call, a batch in which no class has more rows than that.

    Reference:
        Snell, Swersky and Zemel 2017, Prototypical Networks for Few-shot Learning, arXiv:1703.05175.

    Example:
        >>> import torch
        >>> loss = PrototypicalLoss(shots=1)
        >>> loss(torch.tensor([[0.0], [2.0], [0.0], [2.0]]), torch.tensor([0, 1, 0, 1]))
        tensor(0.0181)
    """

    def __init__(self, shots: int = 1) -> None:
        super().__init__()
        if shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        self.shots = shots

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss as a scalar."""
        return prototypical_loss(embeddings, labels, self.shots)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"shots={self.shots}"
