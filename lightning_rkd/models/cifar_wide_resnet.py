"""Wide residual networks for images of 32 x 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.models.init import initialise_convolutions


class CIFARWideResNet(nn.Module):
    """A wide residual network with norm and ReLU before the convolutions.

    ``CIFARWideResNet(40, 2)`` is the WRN-40-2 of the literature. The named layers are ``stem``, ``stage1``, ``stage2``,
    ``stage3`` (sums, before norm and ReLU), ``norm`` (the last feature maps, after norm and ReLU) and ``pool``.
    :class:`~lightning_rkd.models.Classified` adds a classifier.

    Shapes: images (N, in_channels, H, W) -> embeddings (N, 64 widen).

    Args:
        depth: Number of layers, 6 n + 4 for n blocks per stage: 10, 16, 28, 40.
        widen: Factor of the channels of the stages, which are 16, 32 and 64 for 1.
        in_channels: Channels of the images.

    Raises:
        ValueError: A depth that is not 6 n + 4, or ``widen`` below 1.

    Reference:
        Zagoruyko, Komodakis: Wide Residual Networks, 2016, arXiv:1605.07146.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import Classified, count_parameters
        >>> net = CIFARWideResNet(16, 2)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, count_parameters(Classified(net, 100))
        (torch.Size([2, 128]), 703284)
    """

    def __init__(self, depth: int = 16, widen: int = 2, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, for example 16, 28 or 40, got {depth}")
        if widen < 1:
            raise ValueError(f"widen must be at least 1, got {widen}")
        blocks, widths = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(16, widths[0], blocks, stride=1)
        self.stage2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.stage3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[2]), nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = widths[2]
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        maps = self.stage3(self.stage2(self.stage1(self.stem(images))))
        embedding: Tensor = self.pool(self.norm(maps))
        return embedding


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x), inplace=True)
        y = F.relu(self.norm2(self.conv1(active)), inplace=True)
        out: Tensor = self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))
        return out


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, width, stride), *(_Block(width, width, 1) for _ in range(blocks - 1)))
