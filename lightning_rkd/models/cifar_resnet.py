"""Residual networks for images of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.models.init import initialise_convolutions


class CIFARResNet(nn.Module):
    """A residual network of three stages of basic blocks, as in the CIFAR experiments of the ResNet paper.

    Channels of (16, 16, 32, 64) give the resnet8 to resnet110 of the literature, (32, 64, 128, 256) the "x4" variants
    resnet8x4 and resnet32x4. Where shapes change, the shortcut is a 1 x 1 convolution with a norm, as in published
    comparisons of distillation; the paper pads with zeros.

    The named layers are ``stem``, ``stage1``, ``stage2``, ``stage3`` (feature maps after the ReLU) and ``pool``.
    :class:`~lightning_rkd.models.Classified` adds a classifier.

    Shapes: images (N, in_channels, H, W) -> embeddings (N, channels[3]).

    Args:
        depth: Number of layers, 6 n + 2 for n blocks per stage: 8, 14, 20, 32, 44, 56, 110.
        channels: Channels of the first convolution and of the three stages.
        in_channels: Channels of the images.

    Raises:
        ValueError: A depth that is not 6 n + 2, or not four channels.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import Classified, count_parameters
        >>> net = CIFARResNet(20)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, count_parameters(Classified(net, 100))
        (torch.Size([2, 64]), 278324)
    """

    def __init__(self, depth: int = 20, channels: Sequence[int] = (16, 16, 32, 64), in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, for example 8, 20, 32 or 56, got {depth}")
        if len(channels) != 4 or min(channels) < 1:
            raise ValueError(f"channels must be four, of the first convolution and the stages, got {tuple(channels)}")
        stem, *widths = channels
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.stage1 = _stage(stem, widths[0], blocks, stride=1)
        self.stage2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.stage3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = widths[2]
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        embedding: Tensor = self.pool(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        return embedding


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, width, stride), *(_Block(width, width, 1) for _ in range(blocks - 1)))
