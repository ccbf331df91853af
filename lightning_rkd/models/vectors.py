"""A small network for vectors."""

from torch import Tensor, nn

from lightning_rkd.models.heads import EmbeddingHead


class VectorMLP(nn.Module):
    """Columns standardised by running statistics, a hidden layer and an embedding head.

    Shapes: (N, in_features) -> (N, embedding_dim).

    Args:
        in_features: Width of the vectors.
        hidden: Width of the hidden layer.
        embedding_dim: Width of the embedding.
        normalize: Scale embeddings to unit norm. Do not normalise the student of a relational loss.

    Example:
        >>> import torch
        >>> VectorMLP(10, hidden=16, embedding_dim=4)(torch.randn(2, 10)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_features: int, hidden: int = 256, embedding_dim: int = 128, normalize: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features, affine=False)
        self.backbone = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        self.head = EmbeddingHead(hidden, embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, vectors: Tensor) -> Tensor:
        """Embeddings (N, D)."""
        return self.head(self.backbone(self.norm(vectors)))  # type: ignore[no-any-return]
