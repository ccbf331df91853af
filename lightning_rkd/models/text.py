"""A small network for texts without a pretrained part."""

from torch import Tensor, nn

from lightning_rkd.models.heads import EmbeddingHead


class HashedText(nn.Module):
    """The mean of learned rows of a text's words and pieces, then a hidden layer and an embedding head.

    :class:`~lightning_rkd.export.preprocess.PiecesPreprocess` turns texts into numbers of rows. The named layers are
    ``table``, ``backbone`` (hidden features (N, hidden)) and ``head``.

    Shapes: rows of the table (N, T), int64, where 0 is padding -> embeddings (N, embedding_dim).

    Args:
        rows: Rows of the table; row 0 is padding.
        dim: Width of the table.
        hidden: Width of the hidden layer.
        embedding_dim: Width of the embedding.
        normalize: Scale embeddings to unit norm. Do not normalise the student of a relational loss.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import count_parameters
        >>> net = HashedText(2048, 16, hidden=64, embedding_dim=32)
        >>> net(torch.tensor([[7, 9, 0], [7, 0, 0]])).shape, count_parameters(net)
        (torch.Size([2, 32]), 35936)
    """

    def __init__(
        self,
        rows: int = 4096,
        dim: int = 16,
        hidden: int = 128,
        embedding_dim: int = 128,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        for name, number, least in (("rows", rows, 2), ("dim", dim, 1), ("hidden", hidden, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        self.table = nn.Embedding(rows, dim, padding_idx=0)
        self.backbone = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.head = EmbeddingHead(hidden, embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, pieces: Tensor) -> Tensor:
        """Embeddings (N, D)."""
        count = (pieces != 0).sum(1, keepdim=True).clamp(min=1)
        return self.head(self.backbone(self.table(pieces).sum(1) / count))  # type: ignore[no-any-return]
