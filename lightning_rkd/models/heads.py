"""What turns features into embeddings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class L2Normalize(nn.Module):
    r"""Rows at length one: :math:`x / \max(\lVert x \rVert_2, \varepsilon)`, computed in float32 at least.

    Shapes: (N, D) -> (N, D).

    Example:
        >>> import torch
        >>> L2Normalize()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows."""
        wide = x if x.element_size() >= 4 else x.float()  # squares of half precision overflow
        return F.normalize(wide, dim=-1, eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"eps={self.eps}"


class EmbeddingHead(nn.Sequential):
    """A linear layer named ``linear``, and ``normalize`` behind it if rows of length one are wanted.

    Relational losses compare the student's distances as they are, so a student is best left un-normalised.

    Shapes: (N, in_features) -> (N, embedding_dim).

    Args:
        in_features: Width of the features.
        embedding_dim: Width of the embedding.
        normalize: Whether rows are brought to length one.

    Example:
        >>> import torch
        >>> rows = EmbeddingHead(8, 4, normalize=True)(torch.randn(2, 8))
        >>> rows.shape, bool(rows.norm(dim=1).allclose(torch.ones(2)))
        (torch.Size([2, 4]), True)
    """

    def __init__(self, in_features: int, embedding_dim: int, normalize: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embedding_dim)
        if normalize:
            self.normalize = L2Normalize()


def count_parameters(module: nn.Module) -> int:
    """Number of numbers an optimizer could train; shared parameters count once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in module.parameters())
