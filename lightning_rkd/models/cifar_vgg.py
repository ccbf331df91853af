"""VGG networks for images of 32 x 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_rkd.models.init import initialise_convolutions

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


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

    Raises:
        ValueError: A depth that is none of these.

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
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _CONVOLUTIONS))}, got {depth}")
        channels = (in_channels, *_WIDTHS[:-1])
        stages = [_stage(*sizes) for sizes in zip(channels, _WIDTHS, _CONVOLUTIONS[depth], strict=True)]
        self.stage1, self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.halve = nn.MaxPool2d(2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding_dim = _WIDTHS[-1]
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, 512)."""
        maps = images
        for stage in (self.stage1, self.stage2, self.stage3):
            maps = self.halve(stage(maps))
        maps = self.stage4(maps)
        if min(images.shape[-2:]) >= 64:
            maps = self.halve(maps)
        embedding: Tensor = self.pool(self.stage5(maps))
        return embedding


def _stage(channels: int, width: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        conv = nn.Conv2d(channels if i == 0 else width, width, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
