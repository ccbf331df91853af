"""Networks for images of 32 x 32 pixels: ResNet, wide ResNet and VGG, as in published comparisons of distillation."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.models.small import convolutions

_VGG_WIDTHS = (64, 128, 256, 512, 512)
_VGG_CONVOLUTIONS = {
    8: (1, 1),
    11: (1, 2),
    13: (2, 2),
    16: (2, 3),
    19: (2, 4),
}  # of the first two stages, of the others


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
        stem_stride: Stride of the first convolution, whose kernel is 2 ``stem_stride`` + 1 pixels wide: 1 for images of
            32 pixels, 4 for 128 to 224 pixels.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import Classified, count_parameters
        >>> net = CIFARResNet(20)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, count_parameters(Classified(net, 100))
        (torch.Size([2, 64]), 278324)
    """

    def __init__(
        self,
        depth: int = 20,
        channels: Sequence[int] = (16, 16, 32, 64),
        in_channels: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, for example 8, 20, 32 or 56, got {depth}")
        if len(channels) != 4 or min(channels) < 1:
            raise ValueError(f"channels must be four, of the first convolution and the stages, got {tuple(channels)}")
        if stem_stride < 1:
            raise ValueError(f"stem_stride must be at least 1, got {stem_stride}")
        stem, *widths = channels
        blocks = (depth - 2) // 6
        first = nn.Conv2d(in_channels, stem, 2 * stem_stride + 1, stem_stride, padding=stem_stride, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.stage1 = _stack(_Block, stem, widths[0], blocks, stride=1)
        self.stage2 = _stack(_Block, widths[0], widths[1], blocks, stride=2)
        self.stage3 = _stack(_Block, widths[1], widths[2], blocks, stride=2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = widths[2]
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        return self.pool(self.stage3(self.stage2(self.stage1(self.stem(images)))))  # type: ignore[no-any-return]


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
        self.stage1 = _stack(_PreActivationBlock, 16, widths[0], blocks, stride=1)
        self.stage2 = _stack(_PreActivationBlock, widths[0], widths[1], blocks, stride=2)
        self.stage3 = _stack(_PreActivationBlock, widths[1], widths[2], blocks, stride=2)
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[2]), nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = widths[2]
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        maps = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return self.pool(self.norm(maps))  # type: ignore[no-any-return]


class CIFARVGG(nn.Module):
    """A VGG network with batch norm and global average pooling in place of the hidden linear layers.

    The named layers are ``stage1`` to ``stage5`` (feature maps after the ReLU, before pooling) and ``pool``. Maps are
    halved after the first three stages, and after the fourth for images of 64 pixels or more, as in published
    comparisons of distillation. :class:`~lightning_rkd.models.Classified` adds a classifier. As in the literature,
    ``depth`` counts the hidden linear layers that are replaced.

    Shapes: images (N, in_channels, H, W), H and W at least 8 -> embeddings (N, 512).

    Args:
        depth: 8, 11, 13, 16 or 19.
        in_channels: Channels of the images.

    Reference:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, 2015, arXiv:1409.1556.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import Classified, count_parameters
        >>> net = CIFARVGG(8)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, count_parameters(Classified(net, 100))
        (torch.Size([2, 512]), 3965028)
    """

    def __init__(self, depth: int = 8, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in _VGG_CONVOLUTIONS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _VGG_CONVOLUTIONS))}, got {depth}")
        channels = (in_channels, *_VGG_WIDTHS[:-1])
        first, others = _VGG_CONVOLUTIONS[depth]
        sizes = zip(channels, _VGG_WIDTHS, (first, first, others, others, others), strict=True)
        stages = [nn.Sequential(*convolutions(*size)) for size in sizes]
        self.stage1, self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.halve = nn.MaxPool2d(2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = _VGG_WIDTHS[-1]
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, 512)."""
        maps = images
        for stage in (self.stage1, self.stage2, self.stage3):
            maps = self.halve(stage(maps))
        maps = self.stage4(maps)
        if min(images.shape[-2:]) >= 64:
            maps = self.halve(maps)
        return self.pool(self.stage5(maps))  # type: ignore[no-any-return]


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


class _PreActivationBlock(nn.Module):
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


def _stack(
    block: Callable[[int, int, int], nn.Module], channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(block(channels, width, stride), *(block(width, width, 1) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    """Initialise convolutions as in He et al. 2015, arXiv:1502.01852, so that gradients keep their size."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
