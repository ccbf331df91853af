"""A network with an embedding head on top."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_rkd.models.heads import EmbeddingHead


class Embedded(nn.Module):
    """A network of pooled features with a linear embedding on top, with the layers ``backbone`` and ``head``.

    Shapes: inputs of the backbone -> embeddings (N, D).

    Args:
        backbone: From inputs to features (N, F), with F as its attribute ``embedding_dim``.
        embedding_dim: D.
        normalize: Whether embeddings are brought to length one. Leave a student of a relational loss un-normalised.

    Raises:
        ValueError: F is not known, or D below 1.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import CIFARResNet
        >>> Embedded(CIFARResNet(8), embedding_dim=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(self, backbone: nn.Module, embedding_dim: int, normalize: bool = False) -> None:
        super().__init__()
        width = getattr(backbone, "embedding_dim", None)
        if not isinstance(width, int):
            raise ValueError(
                f"{type(backbone).__name__} does not tell how wide its features are: give it embedding_dim"
            )
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        self.backbone = backbone
        self.head = EmbeddingHead(width, embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings (N, D)."""
        embedding: Tensor = self.head(self.backbone(inputs))
        return embedding
