"""Prototypical loss: a task loss for few-shot learning."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrototypicalLoss(nn.Module):
    r"""Cross entropy of the rows of a P-by-K batch, classified by the prototypes of the first few rows of each class.

    .. math:: L = -\frac{1}{|Q|} \sum_{q \in Q} \log \frac{\exp(-\lVert s_q - c_{y_q} \rVert^2)}
        {\sum_k \exp(-\lVert s_q - c_k \rVert^2)}, \qquad c_k = \frac{1}{|S_k|} \sum_{i \in S_k} s_i

    with :math:`S_k` the first ``shots`` rows of class k and Q all other rows: each batch is an episode of P ways and
    ``shots`` shots. As a task loss: ``DistillationModule(task_loss=PrototypicalLoss(5))``.

    Shapes: embeddings (N, D), labels (N,) -> scalar.

    Args:
        shots: Number of rows of a class that make its prototype, at least 1.

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
        """Compute the loss."""
        classes, member = torch.unique(labels, return_inverse=True)
        membership = F.one_hot(member, len(classes))
        place = membership.cumsum(0).gather(1, member[:, None]).squeeze(1) - 1  # of a row within its class
        support = place < self.shots
        if bool(support.all()):
            raise ValueError(
                f"PrototypicalLoss: no class has more than shots={self.shots} rows in this batch, so none is left to "
                "classify: draw more samples per class"
            )
        chosen = (membership * support[:, None]).to(embeddings.dtype)
        prototypes = chosen.T @ embeddings / chosen.sum(0)[:, None]
        squared = (embeddings[~support][:, None] - prototypes).square().sum(2)
        return F.cross_entropy(-squared, member[~support])

    def extra_repr(self) -> str:
        """Settings for ``print``."""
        return f"shots={self.shots}"
