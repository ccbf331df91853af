"""Small convolutional networks that train in a minute on a CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_rkd.models.heads import EmbeddingHead


class ConvNet(nn.Module):
    """Stages of 3 x 3 convolutions with max pooling between them, then average pooling and an embedding head.

    The named layers are ``backbone`` (pooled features, (N, widths[-1] * pool ** 2)), ``backbone.stage1`` and so on
    (feature maps), and ``head`` (the embedding). Images need at least ``2 ** (len(widths) - 1)`` pixels in each
    direction.

    Args:
        widths: Channels of each stage.
        embedding_dim: Width of the embedding.
        in_channels: Channels of the images.
        depth: Convolutions in each stage.
        pool: Size to which the last maps are averaged; 1 is global average pooling.
        normalize: Scale embeddings to unit norm. Do not normalise the student of a relational loss.

    Example:
        >>> import torch
        >>> net = ConvNet(widths=(8, 16), embedding_dim=32)
        >>> net(torch.zeros(4, 1, 28, 28)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        widths: Sequence[int] = (24, 48, 96),
        embedding_dim: int = 128,
        in_channels: int = 1,
        depth: int = 2,
        pool: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must name at least one stage of at least one channel, got {tuple(widths)}")
        for name, number in {"depth": depth, "pool": pool, "embedding_dim": embedding_dim}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for i, width in enumerate(widths, start=1):
            parts[f"stage{i}"] = _stage(channels, width, depth, halve=i > 1)
            channels = width
        parts["pool"] = nn.AdaptiveAvgPool2d(pool)
        parts["flatten"] = nn.Flatten()
        self.backbone = nn.Sequential(parts)
        self.head = EmbeddingHead(channels * pool**2, embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        embedding: Tensor = self.head(self.backbone(images))
        return embedding


def _stage(channels: int, width: int, depth: int, halve: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if halve else []
    for i in range(depth):
        # the norm has a shift, so the convolution needs no bias
        conv = nn.Conv2d(channels if i == 0 else width, width, kernel_size=3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
