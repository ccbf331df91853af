"""Projection of embeddings of different widths onto one unit sphere."""

import torch
from torch import Tensor, nn

from lightning_rkd.functional.similarities import unit_rows


class Projector(nn.Module):
    r"""A linear layer followed by l2 normalisation, (N, D) -> (N, dim)."""

    def __init__(self, width: int, dim: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return unit_rows(self.linear(x))
