"""Projection of embeddings of different widths onto one unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_rkd.functional.similarities import unit_rows


class Projector(nn.Module):
    r"""A linear layer followed by l2 normalisation.

    .. math:: x \mapsto \frac{W x + b}{\lVert W x + b \rVert_2}

    Shapes: (N, D) -> (N, dim), unit rows.

    Args:
        width: D.
        dim: Width of the result.

    Example:
        >>> bool(Projector(3, 2)(torch.randn(4, 3)).norm(dim=1).allclose(torch.ones(4)))
        True
    """

    def __init__(self, width: int, dim: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """The projected rows."""
        return unit_rows(self.linear(x))
