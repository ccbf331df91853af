"""The standard network of few-shot learning."""

from __future__ import annotations

from torch import Tensor, nn


class Conv4(nn.Module):
    """Four blocks of a 3 x 3 convolution, batch norm, ReLU and max pooling; the flattened last maps are the embedding.

    The named layers are ``block1`` to ``block4`` (feature maps).

    Shapes: images (N, in_channels, H, W), H and W at least 16 -> (N, width (H // 16) (W // 16)): width 64 for
    characters of 28 x 28 pixels, 1600 for images of 84 x 84.

    Args:
        in_channels: Channels of the images.
        width: Channels of each block.

    Raises:
        ValueError: Channels below 1; in a call, images smaller than 16 pixels.

    Reference:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra: Matching Networks for One Shot Learning, 2016,
        arXiv:1606.04080; with 64 channels as in Snell, Swersky, Zemel 2017, arXiv:1703.05175.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import count_parameters
        >>> net = Conv4(in_channels=1)
        >>> net(torch.zeros(2, 1, 28, 28)).shape, count_parameters(net)
        (torch.Size([2, 64]), 111936)
    """

    def __init__(self, in_channels: int = 1, width: int = 64) -> None:
        super().__init__()
        if min(in_channels, width) < 1:
            raise ValueError(f"in_channels and width must be at least 1, got {in_channels} and {width}")
        self.block1 = _block(in_channels, width)
        self.block2, self.block3, self.block4 = (_block(width, width) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        if min(images.shape[-2:]) < 16:
            raise ValueError(
                f"Conv4 halves images four times, so they must be 16 x 16 pixels at least, got {tuple(images.shape)}"
            )
        embedding: Tensor = self.block4(self.block3(self.block2(self.block1(images)))).flatten(1)
        return embedding


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )
